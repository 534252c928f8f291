"""1x1 convolution as a matrix product over pixels, with everything around it in the same pass:

    y[p, k] = activation(sum_c x[q(p), c] * gate[image(p), c] * weight[k, c] + bias[k] + residual[p, k])

p counts the output's pixels and q(p) is the input's pixel that a stride picks for it. x and the residual may be
normalised as they are read: with a scale and a shift for each channel, and an activation.

Two forms. *Resident*: few input channels, so that a tile of the weights has all of them; a program keeps it and walks
over tiles of pixels. *Streamed*: a program computes one tile of the output and walks over the input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LIMITS, activate, dot, interpreting, launch, machine, narrow, new_output, precision, too_large, unit
from .tables import choose, fitting

Affine = tuple[Tensor, Tensor, str]
"""Scale and shift of each channel, and the activation after them."""

_NO_NORM = (None, None, None)


@dataclass(frozen=True)
class Config:
    """Tile sizes in pixels, output channels and input channels; `resident` is the form."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    resident: bool

    def shared_bytes(self, itemsize: int, gate: bool, residual: bool) -> int:
        """Shared memory at most: the tiles in flight, the resident weights, and the result on its way out."""
        x, weight, y = self.block_m * self.block_k, self.block_n * self.block_k, self.block_m * self.block_n
        flying = x * (1 + gate)
        if self.resident:
            return itemsize * (self.stages * (flying + y * residual) + weight + y)
        return itemsize * max(self.stages * (flying + weight), y)


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: the product, its operands, the machine, and what is normalised as it is read."""

    pixels: int
    channels: int
    out_channels: int
    itemsize: int
    gate: bool
    residual: bool
    stride: int
    tf32: bool
    arch: int
    processors: int
    norm: bool = False
    residual_norm: bool = False


CONFIGS = tuple(
    [
        Config(m, n, k, warps, stages, True)
        for m, warps in ((64, 4), (128, 4), (256, 8))
        for n in (16, 32, 64, 128)
        for k in (16, 32, 64, 128, 256)
        for stages in (2, 3)
    ]
    + [
        Config(m, n, k, warps, stages, False)
        for m, n, warps in ((64, 32, 4), (64, 64, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8))
        for k in (32, 64)
        for stages in (3, 4)
    ]
)
"""The search space of the tuner."""

EXTENTS = ("pixels",)


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    if config.resident and config.block_k < shape.channels:
        return f"{config.block_k} channels of weights stay, the layer has {shape.channels}"
    return too_large(config.shared_bytes(shape.itemsize, shape.gate, shape.residual), shape.arch)


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement.

    Tiles of 128 pixels by the layer's width, halved while there are fewer than processors. Weights stay where all
    their channels fit; two programs share a processor where the memory allows it.
    """
    block_m, block_n = 128, min(128, max(16, triton.next_power_of_2(shape.out_channels)))

    def tiles() -> int:
        return triton.cdiv(shape.pixels, block_m) * triton.cdiv(shape.out_channels, block_n)

    while tiles() < shape.processors and max(block_m, block_n) > 32:
        block_m, block_n = (block_m // 2, block_n) if block_m >= block_n else (block_m, block_n // 2)
    resident = shape.channels <= 512 // shape.itemsize
    block_k = max(16, triton.next_power_of_2(shape.channels)) if resident else 128 // shape.itemsize
    sizes = [(block_m, block_n), (max(16, block_m // 2), block_n), (max(16, block_m // 2), max(16, block_n // 2))]
    for share in (2, 1):
        for stages in (3, 2):
            for m, n in sizes:
                row = block_k * shape.itemsize
                deep = row >= 256 if shape.gate and shape.norm else m >= 64 and row == 512
                wide = 64 * 128 if shape.norm or block_k >= 128 else 128 * 128
                large = deep or m * n >= wide  # four warps would lack registers
                config = Config(m, n, block_k, 8 if large else 4, stages, resident)
                fits = config.shared_bytes(shape.itemsize, shape.gate, shape.residual) * share
                if not too_large(fits, shape.arch):
                    return config
    return Config(32, 32, 64 // shape.itemsize, 4, 2, False)


@triton.jit
def _input_rows(rows, out_area, out_width, in_area, in_width, STRIDE: tl.constexpr):
    """The rows of x that rows of y are computed from."""
    rows = rows.to(tl.int64)
    if STRIDE == 1:
        return rows
    image, pixel = rows // out_area, rows % out_area
    return image * in_area + (pixel // out_width) * (STRIDE * in_width) + (pixel % out_width) * STRIDE


@triton.jit
def _load_x(
    x, gate, scale, shift, rows, in_rows, ks, pixels, channels, out_area,
    HAS_GATE: tl.constexpr, NORM: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of x, gated, normalised and rounded as the host's own map would be. NORM is the activation after the
    normalisation, or None.
    """
    inside = (rows < pixels)[:, None]
    if not EVEN_K:
        inside = inside & (ks < channels)[None, :]
    a = tl.load(x + in_rows[:, None] * channels + ks[None, :], mask=inside, other=0.0)
    if HAS_GATE:
        image = (rows // out_area).to(tl.int64)
        g = tl.load(gate + image[:, None] * channels + ks[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM is not None:
        s = tl.load(scale + ks, mask=ks < channels, other=0.0)[None, :]
        if HAS_GATE:
            s = s * g
        z = a.to(tl.float32) * s + tl.load(shift + ks, mask=ks < channels, other=0.0)[None, :]
        a = narrow(activate(z, NORM), x.dtype.element_ty, UPCAST)
    elif HAS_GATE:
        a = narrow(a.to(tl.float32) * g, x.dtype.element_ty, UPCAST)
    return a


@triton.jit
def _load_weight(weight, ns, ks, channels, out_channels, EVEN_K: tl.constexpr):
    inside = (ns < out_channels)[:, None]
    if not EVEN_K:
        inside = inside & (ks < channels)[None, :]
    return tl.load(weight + ns[:, None] * channels + ks[None, :], mask=inside, other=0.0)


@triton.jit
def _finish(
    accumulator, bias, residual, residual_scale, residual_shift, y, rows, ns, pixels, out_channels,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Bias, residual, activation, and the tile's way to memory."""
    if HAS_BIAS:
        accumulator += tl.load(bias + ns, mask=ns < out_channels, other=0.0)[None, :]
    offsets = rows.to(tl.int64)[:, None] * out_channels + ns[None, :]
    inside = (rows < pixels)[:, None] & (ns < out_channels)[None, :]
    if HAS_RESIDUAL:
        r = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL_NORM is not None:
            r = r * tl.load(residual_scale + ns, mask=ns < out_channels, other=0.0)[None, :]
            r += tl.load(residual_shift + ns, mask=ns < out_channels, other=0.0)[None, :]
            r = narrow(activate(r, RESIDUAL_NORM), y.dtype.element_ty, UPCAST).to(tl.float32)
        accumulator += r
    tl.store(y + offsets, narrow(activate(accumulator, ACTIVATION), y.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def resident_kernel(
    x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y,
    pixels, out_area, out_width, in_area, in_width, channel_units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j) keeps tile j of the weights and computes every so many tiles of pixels, from the i-th on."""
    channels, out_channels = channel_units * UNIT, out_units * OUT_UNIT
    ns, ks = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    b = tl.trans(_load_weight(weight, ns, ks, channels, out_channels, EVEN_K))
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = _input_rows(rows, out_area, out_width, in_area, in_width, STRIDE)
        a = _load_x(
            x, gate, scale, shift, rows, in_rows, ks, pixels, channels, out_area, HAS_GATE, NORM, EVEN_K, UPCAST
        )
        accumulator = dot(a, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION, UPCAST)
        _finish(
            accumulator, bias, residual, residual_scale, residual_shift, y, rows, ns, pixels, out_channels,
            HAS_BIAS, HAS_RESIDUAL, RESIDUAL_NORM, ACTIVATION, UPCAST,
        )  # fmt: skip


@triton.jit
def streamed_tile(
    x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y, first_row, first_column,
    pixels, out_area, out_width, in_area, in_width, channels, out_channels,
    STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tile of y that begins in a row and a column."""
    rows, ns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    in_rows = _input_rows(rows, out_area, out_width, in_area, in_width, STRIDE)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
        ks = start + tl.arange(0, BLOCK_K)
        a = _load_x(
            x, gate, scale, shift, rows, in_rows, ks, pixels, channels, out_area, HAS_GATE, NORM, EVEN_K, UPCAST
        )
        b = tl.trans(_load_weight(weight, ns, ks, channels, out_channels, EVEN_K))
        accumulator = dot(a, b, accumulator, PRECISION, UPCAST)
    _finish(
        accumulator, bias, residual, residual_scale, residual_shift, y, rows, ns, pixels, out_channels,
        HAS_BIAS, HAS_RESIDUAL, RESIDUAL_NORM, ACTIVATION, UPCAST,
    )  # fmt: skip


@triton.jit
def streamed_kernel(
    x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y,
    pixels, out_area, out_width, in_area, in_width, channel_units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y for each program; neighbours share their pixels, whose tiles of channels are then in the cache."""
    channels, out_channels = channel_units * UNIT, out_units * OUT_UNIT
    across = tl.cdiv(out_channels, BLOCK_N)
    row, column = (tl.program_id(0) // across) * BLOCK_M, (tl.program_id(0) % across) * BLOCK_N
    streamed_tile(
        x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y, row, column,
        pixels, out_area, out_width, in_area, in_width, channels, out_channels, STRIDE, ACTIVATION,
        HAS_BIAS, HAS_GATE, NORM, HAS_RESIDUAL, RESIDUAL_NORM, EVEN_K, PRECISION, UPCAST,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip


def constants(config: Config, shape: Shape, stride: int, activation: str, dtype: torch.dtype) -> dict:
    """The compile-time arguments, but for `HAS_BIAS`, `NORM` and `RESIDUAL_NORM`."""
    return {
        "HAS_GATE": shape.gate,
        "HAS_RESIDUAL": shape.residual,
        "UNIT": unit(shape.channels),
        "OUT_UNIT": unit(shape.out_channels),
        "STRIDE": stride,
        "ACTIVATION": activation,
        "EVEN_K": shape.channels % config.block_k == 0,
        "PRECISION": precision(dtype),
        "UPCAST": interpreting(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
    }


@fitting
def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: Affine | None = None,
    residual_norm: Affine | None = None,
    stride: int = 1,
    activation: str = "none",
    config: Config | None = None,
) -> Tensor:
    """`activation(conv2d(norm(x * gate), weight, bias, stride) + residual_norm(residual))` for a 1x1 convolution.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        weight: (K, C), contiguous, of x's dtype.
        bias: (K), float32.
        gate: (N, C), contiguous, of x's dtype.
        residual: (N, K, OH, OW), channels_last, of x's dtype.
        norm, residual_norm: scale and shift, (C) or (K) and float32, and the activation after them. What they make is
            rounded to x's dtype.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new (N, K, OH, OW) tensor in channels_last. Sums in float32.
    """
    n, channels, height, width = x.shape
    out_channels = weight.shape[0]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    pixels = n * out_height * out_width
    y = new_output((n, out_channels, out_height, out_width), x)
    operands = (x.element_size(), gate is not None, residual is not None)
    tf32, (arch, processors) = precision(x.dtype) == "tf32", machine(x.device)
    norms = {"norm": norm, "residual_norm": residual_norm}
    given = {name: one is not None for name, one in norms.items()}
    shape = Shape(pixels, channels, out_channels, *operands, stride, tf32, arch, processors, **given)

    def run(config: Config) -> Tensor:
        options = {**norms, "stride": stride, "activation": activation, "config": config}
        return pointwise_conv(x, weight, bias, gate, residual, **options)

    config = choose(__name__, shape, x.device, config, run)
    across, down = triton.cdiv(out_channels, config.block_n), triton.cdiv(pixels, config.block_m)
    if config.resident:
        kernel, grid = resident_kernel, (min(down, max(1, 2 * processors // across)), across)
    else:
        kernel, grid = streamed_kernel, (down * across,)
    launch(
        kernel, grid,
        x, weight, bias, gate, *(norm or _NO_NORM)[:2], residual, *(residual_norm or _NO_NORM)[:2], y,
        pixels, out_height * out_width, out_width, height * width, width,
        channels // unit(channels), out_channels // unit(out_channels),
        HAS_BIAS=bias is not None, NORM=(norm or _NO_NORM)[2], RESIDUAL_NORM=(residual_norm or _NO_NORM)[2],
        **constants(config, shape, stride, activation, x.dtype),
        num_warps=config.warps, **LIMITS,
    )  # fmt: skip
    return y
