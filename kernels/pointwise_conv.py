"""1x1 convolution as a matrix product over pixels, with everything around it in the same pass:

    y[p, k] = activation(sum_c x[q(p), c] * gate[image(p), c] * weight[k, c] + bias[k] + residual[p, k])

p counts the output's pixels and q(p) is the input's pixel that a stride picks for it. x and the residual may be
normalised as they are read: with a scale and a shift for each channel, and an activation.

Two forms. *Resident*: few input channels, so that a tile of the weights has all of them; a program keeps it and walks
over tiles of pixels. *Streamed*: a program computes one tile of the output and walks over the input channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES, Launch, activate, dot, interpreting, machine, narrow, new_output, precision, unit
from .pointwise_tiles import (  # noqa: F401 - a kernel's module has its configurations
    CONFIGS,
    EXTENTS,
    MOST_IMAGES,
    Config,
    Shape,
    config_supports,
    heuristic,
    programs,
)
from .tables import Chosen, announce, chosen, fitting, planned

Affine = tuple[Tensor, Tensor, str]
"""Scale and shift of each channel, and the activation after them."""

_NO_NORM = (None, None, None)


@triton.jit
def _input_rows(rows, out_area, out_width, in_area, in_width, STRIDE: tl.constexpr):
    """The rows of x that rows of y are computed from."""
    if STRIDE == 1:
        return rows.to(tl.int64)
    image, pixel = rows // out_area, rows % out_area
    return image.to(tl.int64) * in_area + (pixel // out_width) * (STRIDE * in_width) + (pixel % out_width) * STRIDE


@triton.jit
def _gates(gate, rows, first_row, ks, pixels, channels, out_area, IMAGES: tl.constexpr, EVEN_K: tl.constexpr):
    """The gates of a tile's rows in float32: those of its images, each read once, where there are few of them."""
    if IMAGES == 0:
        inside = (rows < pixels)[:, None]
        if not EVEN_K:
            inside = inside & (ks < channels)[None, :]
        image = (rows // out_area).to(tl.int64)
        found = tl.load(gate + image[:, None] * channels + ks[None, :], mask=inside, other=0.0)
    else:
        first, last = first_row // out_area, (pixels - 1) // out_area
        found = tl.load(gate + first.to(tl.int64) * channels + ks, mask=ks < channels, other=0.0)[None, :]
        for i in tl.static_range(1, IMAGES):
            image = tl.minimum(first + i, last).to(tl.int64)
            other = tl.load(gate + image * channels + ks, mask=ks < channels, other=0.0)[None, :]
            found = tl.where((rows >= (first + i) * out_area)[:, None], other, found)
    return found.to(tl.float32)


@triton.jit
def _load_x(
    x, gate, scale, shift, rows, first_row, in_rows, ks, pixels, channels, out_area,
    HAS_GATE: tl.constexpr, IMAGES: tl.constexpr, NORM: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of x, gated, normalised and rounded as the host's own map would be. NORM is the activation after the
    normalisation, or None.
    """
    inside = (rows < pixels)[:, None]
    if not EVEN_K:
        inside = inside & (ks < channels)[None, :]
    a = tl.load(x + in_rows[:, None] * channels + ks[None, :], mask=inside, other=0.0)
    if HAS_GATE:
        g = _gates(gate, rows, first_row, ks, pixels, channels, out_area, IMAGES, EVEN_K)
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
    """Bias, residual, activation, and the way of a tile of channels by pixels to memory."""
    accumulator = tl.trans(accumulator)
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
def resident_tiles(
    x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y, first_tile, step, first_column,
    pixels, out_area, out_width, in_area, in_width, channels, out_channels,
    STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    IMAGES: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The weights from a column on stay, and every so many tiles of pixels are computed, from a first one on."""
    ns, ks = first_column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w = _load_weight(weight, ns, ks, channels, out_channels, EVEN_K)
    if REST > 0:
        rest = BLOCK_K + tl.arange(0, REST)
        rest_w = _load_weight(weight, ns, rest, channels, out_channels, EVEN_K)
    for tile in tl.range(first_tile, tl.cdiv(pixels, BLOCK_M), step, num_stages=STAGES):
        first_row = tile * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        in_rows = _input_rows(rows, out_area, out_width, in_area, in_width, STRIDE)
        a = _load_x(
            x, gate, scale, shift, rows, first_row, in_rows, ks, pixels, channels, out_area,
            HAS_GATE, IMAGES, NORM, EVEN_K, UPCAST,
        )  # fmt: skip
        accumulator = dot(w, tl.trans(a), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION, UPCAST)
        if REST > 0:
            a = _load_x(
                x, gate, scale, shift, rows, first_row, in_rows, rest, pixels, channels, out_area,
                HAS_GATE, IMAGES, NORM, EVEN_K, UPCAST,
            )  # fmt: skip
            accumulator = dot(rest_w, tl.trans(a), accumulator, PRECISION, UPCAST)
        _finish(
            accumulator, bias, residual, residual_scale, residual_shift, y, rows, ns, pixels, out_channels,
            HAS_BIAS, HAS_RESIDUAL, RESIDUAL_NORM, ACTIVATION, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def resident_kernel(
    x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y,
    pixels, out_area, out_width, in_area, in_width, channel_units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IMAGES: tl.constexpr, NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j) keeps tile j of the weights and computes every so many tiles of pixels, from the i-th on."""
    resident_tiles(
        x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y,
        tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BLOCK_N,
        pixels, out_area, out_width, in_area, in_width, channel_units * UNIT, out_units * OUT_UNIT, STRIDE, ACTIVATION,
        HAS_BIAS, HAS_GATE, IMAGES, NORM, HAS_RESIDUAL, RESIDUAL_NORM, EVEN_K, PRECISION, UPCAST,
        BLOCK_M, BLOCK_N, BLOCK_K, REST, STAGES,
    )  # fmt: skip


@triton.jit
def streamed_tile(
    x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y, first_row, first_column,
    pixels, out_area, out_width, in_area, in_width, channels, out_channels,
    STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    IMAGES: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tile of y that begins in a row and a column.

    It is computed with channels as rows: what is made of x in registers is then the second operand, which goes through
    shared memory, and all products of a step run at once. As the first one it would stay in registers, where each
    product of Hopper's waits for the one before.
    """
    rows, ns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    in_rows = _input_rows(rows, out_area, out_width, in_area, in_width, STRIDE)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
        ks = start + tl.arange(0, BLOCK_K)
        a = _load_x(
            x, gate, scale, shift, rows, first_row, in_rows, ks, pixels, channels, out_area,
            HAS_GATE, IMAGES, NORM, EVEN_K, UPCAST,
        )  # fmt: skip
        w = _load_weight(weight, ns, ks, channels, out_channels, EVEN_K)
        accumulator = dot(w, tl.trans(a), accumulator, PRECISION, UPCAST)
    _finish(
        accumulator, bias, residual, residual_scale, residual_shift, y, rows, ns, pixels, out_channels,
        HAS_BIAS, HAS_RESIDUAL, RESIDUAL_NORM, ACTIVATION, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def streamed_kernel(
    x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y,
    pixels, out_area, out_width, in_area, in_width, channel_units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, IMAGES: tl.constexpr, NORM: tl.constexpr,
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
        HAS_BIAS, HAS_GATE, IMAGES, NORM, HAS_RESIDUAL, RESIDUAL_NORM, EVEN_K, PRECISION, UPCAST,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip


def constants(config: Config, shape: Shape, stride: int, activation: str, dtype: torch.dtype) -> dict:
    """The compile-time arguments, but for `HAS_BIAS`, `NORM` and `RESIDUAL_NORM`."""
    images = config.images(shape.gate)
    return {
        "HAS_GATE": shape.gate > 0,
        "IMAGES": images if images <= MOST_IMAGES else 0,
        "HAS_RESIDUAL": shape.residual,
        "UNIT": unit(shape.channels),
        "OUT_UNIT": unit(shape.out_channels),
        "STRIDE": stride,
        "ACTIVATION": activation,
        "EVEN_K": config.kept == shape.channels if config.resident else shape.channels % config.block_k == 0,
        "PRECISION": precision(dtype),
        "UPCAST": interpreting(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        **({"REST": config.rest} if config.resident else {}),
    }


@planned
def _plan(
    size: torch.Size, out_channels: int, dtype: torch.dtype, device: torch.device, bias: bool, gate: bool,
    residual: bool, norm: str | None, residual_norm: str | None, stride: int, activation: str, product: str,
    config: Config | None,
) -> tuple[Chosen, tuple[int, ...], Launch]:  # fmt: skip
    """The choice, the size of y, and what launches it."""
    n, channels, height, width = size
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    area, norms = out_height * out_width, {"norm": norm is not None, "residual_norm": residual_norm is not None}
    operands = (dtype.itemsize, area if gate else 0, residual, stride, product == "tf32")
    shape = Shape(n * area, channels, out_channels, *operands, *machine(device), **norms)
    choice = chosen(__name__, shape, device, config)
    config = choice.config
    across, (share,) = config.tiles(shape)[0], programs(config, shape)
    launch = Launch(
        resident_kernel if config.resident else streamed_kernel,
        (share, across) if config.resident else (share * across,),
        (
            *(n * area, area, out_width, height * width, width),
            *(channels // unit(channels), out_channels // unit(out_channels)),
        ),
        config.warps,
        **constants(config, shape, stride, activation, dtype),
        **{"HAS_BIAS": bias, "NORM": norm, "RESIDUAL_NORM": residual_norm},
    )
    return choice, (n, out_channels, out_height, out_width), launch


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
    scale, shift, after = norm or _NO_NORM
    residual_scale, residual_shift, residual_after = residual_norm or _NO_NORM
    choice, size, launch = _plan(
        x.shape, weight.shape[0], x.dtype, x.device, bias is not None, gate is not None, residual is not None,
        after, residual_after, stride, activation, precision(x.dtype), config,
    )  # fmt: skip

    def run(config: Config) -> Tensor:
        options = {"stride": stride, "activation": activation, "config": config}
        return pointwise_conv(x, weight, bias, gate, residual, norm=norm, residual_norm=residual_norm, **options)

    announce(choice, run)
    y = new_output(size, x)
    launch(x, weight, bias, gate, scale, shift, residual, residual_scale, residual_shift, y)
    return y
