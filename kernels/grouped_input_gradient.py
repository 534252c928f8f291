"""The gradient of a grouped convolution's input as a matrix product that is never laid out, group by group:

    dx[p, g, c] = sum_(tap, k) dy[o(p, tap), g, k] * weight[g, k, c, tap]        dy = a * dz + q * y + b

o(p, tap) is the output's pixel that read p under a tap; where there is none, dy is 0. With a stride, the pixels of the
same remainders have a launch of their own, since they have the same taps: none is multiplied in vain. dy is made where
it is read, of the normalised map's gradient dz and the raw map y (docs/training.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES, Launch, dot, interpreting, machine, narrow, new_output, precision, too_large, unit
from .tables import Chosen, announce, chosen, fitting, planned

Affine = tuple[Tensor, Tensor | None, Tensor | None]
"""a, q and b, float32; the last two are given together, or neither."""

NO_AFFINE = (None, None, None)


@dataclass(frozen=True)
class Config:
    """Tile sizes in pixels, input channels of one group, and terms of the sum."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, maps: int) -> int:
        """Shared memory at most: the tiles in flight, or the result on its way out."""
        dy, weight, dx = self.block_m * self.block_k, self.block_n * self.block_k, self.block_m * self.block_n
        return itemsize * max(self.stages * (maps * dy + weight) + (maps > 1) * dy, dx)


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: input pixels, of all images and of one, groups and their widths, taps, strides
    multiplied, the maps behind dy, and the machine.
    """

    pixels: int
    image_pixels: int
    groups: int
    width: int
    out_width: int
    taps: int
    stride: int
    itemsize: int
    maps: int
    tf32: bool
    arch: int
    processors: int


CONFIGS = tuple(
    Config(m, n, k, warps, stages)
    for m, n, warps in ((64, 16, 4), (128, 16, 4), (64, 32, 4), (128, 32, 4), (128, 64, 4), (128, 128, 8))
    for k in (32, 64)
    for stages in (2, 3)
)
"""The search space of the tuner."""

EXTENTS = ("pixels", "image_pixels")


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    return too_large(config.shared_bytes(shape.itemsize, shape.maps), shape.arch)


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement: tiles of 128 pixels by the group's width, halved while there are fewer
    than processors.
    """
    block_m, block_n = 128, min(128, max(16, triton.next_power_of_2(shape.width)))

    def tiles() -> int:
        return triton.cdiv(shape.pixels, block_m) * shape.groups * triton.cdiv(shape.width, block_n)

    while tiles() < shape.processors and max(block_m, block_n) > 32:
        block_m, block_n = (block_m // 2, block_n) if block_m >= block_n else (block_m, block_n // 2)
    block_k = min(64 // shape.itemsize, max(16, triton.next_power_of_2(shape.out_width * shape.taps)))
    warps = 8 if block_m >= 128 or block_m * block_n >= 64 * 128 else 4
    for stages in (3, 2):
        config = Config(block_m, block_n, block_k, warps, stages)
        if not too_large(2 * config.shared_bytes(shape.itemsize, shape.maps), shape.arch):
            return config
    return Config(block_m // 2, block_n // 2, block_k, warps, 2)


@triton.jit(do_not_specialize=SIZES)
def kernel(
    dz, y, a, q, b, weight, dx,
    tiles, out_height, out_columns, height, columns, channel_units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    REST_H: tl.constexpr, TAP_H: tl.constexpr, STEP_H: tl.constexpr, TAPS_H: tl.constexpr,
    REST_W: tl.constexpr, TAP_W: tl.constexpr, STEP_W: tl.constexpr, TAPS_W: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some pixels of one image with these remainders, and of the channels of one group tile j."""
    channels, out_channels = channel_units * UNIT, out_units * OUT_UNIT
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    terms: tl.constexpr = TAPS_H * TAPS_W * OUT_WIDTH
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    group, first = tl.program_id(1) // across, (tl.program_id(1) % across) * BLOCK_N
    per_row = (columns - REST_W + STRIDE_W - 1) // STRIDE_W
    pixels, ns = tile * BLOCK_M + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    ih, iw = (pixels // per_row) * STRIDE_H + REST_H, (pixels % per_row) * STRIDE_W + REST_W
    there = ih < height
    bottom, right = (ih + PAD_H) // STRIDE_H, (iw + PAD_W) // STRIDE_W
    origin = image.to(tl.int64) * out_height * out_columns * out_channels + group * OUT_WIDTH
    weight += (group * WIDTH).to(tl.int64) * (KH * KW * OUT_WIDTH)
    corners = (bottom * out_columns + right) * out_channels
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, terms, BLOCK_K, num_stages=STAGES):
        ks = start + tl.arange(0, BLOCK_K)
        known, tap, k = ks < terms, ks // OUT_WIDTH, ks % OUT_WIDTH
        kh, kw = TAP_H + (tap // TAPS_W) * STEP_H, TAP_W + (tap % TAPS_W) * STEP_W
        up, left = kh * DILATION_H // STRIDE_H, kw * DILATION_W // STRIDE_W
        oh, ow = bottom[:, None] - up[None, :], right[:, None] - left[None, :]
        inside = (oh >= 0) & (oh < out_height) & (ow >= 0) & (ow < out_columns) & there[:, None] & known[None, :]
        offsets = corners[:, None] + (k - (up * out_columns + left) * out_channels)[None, :]
        d = tl.load(dz + origin + offsets, mask=inside, other=0.0)
        if a is not None:
            cs = group * OUT_WIDTH + k
            wide = d.to(tl.float32) * tl.load(a + cs)[None, :]
            if q is not None:
                raw = tl.load(y + origin + offsets, mask=inside, other=0.0).to(tl.float32)
                wide += raw * tl.load(q + cs)[None, :] + tl.load(b + cs)[None, :]
            d = narrow(tl.where(inside, wide, 0.0), dz.dtype.element_ty, UPCAST)
        places = ns[:, None] * (KH * KW * OUT_WIDTH) + ((kh * KW + kw) * OUT_WIDTH + k)[None, :]
        w = tl.load(weight + places, mask=(ns < WIDTH)[:, None] & known[None, :], other=0.0)
        accumulator = dot(d, tl.trans(w), accumulator, PRECISION, UPCAST)
    base = image.to(tl.int64) * height * columns * channels + group * WIDTH
    offsets = (ih * columns + iw)[:, None] * channels + ns[None, :]
    rounded = narrow(accumulator, dx.dtype.element_ty, UPCAST)
    tl.store(dx + base + offsets, rounded, mask=there[:, None] & (ns < WIDTH)[None, :])


def packed_weight(weight: Tensor, groups: int) -> Tensor:
    """(K, C / groups, KH, KW) weights as (C, KH * KW * K / groups), tap by tap."""
    by_group = weight.view(groups, -1, *weight.shape[1:])
    return by_group.permute(0, 2, 3, 4, 1).reshape(groups * weight.shape[1], -1).contiguous()


def geometry_constants(
    groups: int,
    width: int,
    out_width: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> dict[str, int]:
    """The compile-time arguments of a convolution's gradients."""
    found = {"UNIT": unit(groups * width), "OUT_UNIT": unit(groups * out_width), "WIDTH": width, "OUT_WIDTH": out_width}
    for i, axis in enumerate("HW"):
        found |= {f"K{axis}": kernel_size[i], f"STRIDE_{axis}": stride[i]}
        found |= {f"PAD_{axis}": padding[i], f"DILATION_{axis}": dilation[i]}
    return found


def constants(
    config: Config,
    shape: Shape,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
) -> dict:
    """The compile-time arguments."""
    found = geometry_constants(shape.groups, shape.width, shape.out_width, kernel_size, stride, padding, dilation)
    found |= {"PRECISION": precision(dtype), "UPCAST": interpreting(), "STAGES": config.stages}
    return found | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def classes(
    kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> list[dict[str, int]]:
    """For all remainders of a pixel's row and column by the strides, as compile-time arguments: these, the first tap
    that reaches such pixels, the step to the next, and how many there are.
    """
    found: list[dict[str, int]] = [{}]
    for i, axis in enumerate("HW"):
        options = []
        for rest in range(stride[i]):
            taps = [t for t in range(kernel_size[i]) if (rest + padding[i] - t * dilation[i]) % stride[i] == 0]
            first, step = taps[0] if taps else 0, taps[1] - taps[0] if len(taps) > 1 else 1
            values = {"REST": rest, "TAP": first, "STEP": step, "TAPS": len(taps)}
            options.append({f"{name}_{axis}": value for name, value in values.items()})
        found = [one | other for one in found for other in options]
    # Where one axis has no tap there is nothing to sum, and no division by 0.
    return [one if one["TAPS_H"] and one["TAPS_W"] else one | {"TAPS_H": 0, "TAPS_W": 1} for one in found]


@planned
def _plan(
    out_size: torch.Size, channels: int, dtype: torch.dtype, device: torch.device, affine: bool, slope: bool,
    size: tuple[int, int], kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], groups: int, product: str, config: Config | None,
) -> tuple[Chosen, tuple[int, ...], list[Launch]]:  # fmt: skip
    """The choice, the size of dx, and what launches it: a launch for all pixels with the same remainders."""
    n, out_channels, *out_extents = out_size
    pixels, geometry = size[0] * size[1], (kernel_size, stride, padding, dilation)
    widths, taps = (channels // groups, out_channels // groups), kernel_size[0] * kernel_size[1]
    operands = (dtype.itemsize, 1 + slope, product == "tf32")
    shape = Shape(n * pixels, pixels, groups, *widths, taps, stride[0] * stride[1], *operands, *machine(device))
    choice = chosen(__name__, shape, device, config)
    config, launches = choice.config, []
    across, units = groups * triton.cdiv(shape.width, config.block_n), [c // unit(c) for c in (channels, out_channels)]
    for one in classes(*geometry):
        rows, per_row = (triton.cdiv(size[i] - one[f"REST_{axis}"], stride[i]) for i, axis in enumerate("HW"))
        tiles = triton.cdiv(rows * per_row, config.block_m)
        if tiles:
            sizes, fixed = (tiles, *out_extents, *size, *units), constants(config, shape, *geometry, dtype) | one
            launches.append(Launch(kernel, (n * tiles, across), sizes, config.warps, **fixed))
    return choice, (n, channels, *size), launches


@fitting
def input_gradient(
    dz: Tensor,
    y: Tensor | None,
    affine: Affine | None,
    weight: Tensor,
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    config: Config | None = None,
) -> Tensor:
    """The gradient of the input of a grouped convolution.

    Args:
        dz: (N, K, OH, OW), channels_last; float32, float16 or bfloat16.
        y: of the same shape, layout and dtype, where `affine` has a q.
        affine: dy = a * dz + q * y + b, by channel; without it dz is dy.
        weight: as `packed_weight` makes it, of dz's dtype.
        size: height and width of the input.
        kernel_size, stride, padding, dilation, groups: the convolution's; strides are 1 or 2.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new (N, C, H, W) tensor in channels_last. Sums in float32.
    """
    a, q, b = affine or NO_AFFINE
    geometry = (kernel_size, stride, padding, dilation)
    choice, dx_size, launches = _plan(
        dz.shape, weight.shape[0], dz.dtype, dz.device, a is not None, q is not None, size, *geometry, groups,
        precision(dz.dtype), config,
    )  # fmt: skip

    def run(config: Config) -> Tensor:
        return input_gradient(dz, y, affine, weight, size, *geometry, groups, config)

    announce(choice, run)
    dx = new_output(dx_size, dz)
    for launch in launches:
        launch(dz, None if q is None else y, a, q, b, weight, dx)
    return dx
