"""The gradient of a grouped convolution's weight as a matrix product that is never laid out, group by group:

    dweight[g, k, tap, c] = sum_p read(x)[q(p, tap), g, c] * dy[p, g, k]        dy = a * dz + q * y + b

p counts output pixels, q(p, tap) is the input's pixel under a tap, and what lies outside the image is 0. Taps and
channels are one flat index, the rows of the product. `read(x) = activation(x * scale + shift)` and dy are made where
they are read (docs/training.md). The pixels are split: each part leaves its sums, which are added in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import new_sums, total
from .common import SIZES, Launch, activate, dot, interpreting, machine, narrow, precision, too_large, unit
from .grouped_input_gradient import NO_AFFINE, Affine, geometry_constants
from .tables import Chosen, announce, chosen, fitting, planned


@dataclass(frozen=True)
class Config:
    """Tile sizes in taps and channels, output channels of one group, and pixels of one image."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, maps: int, norm: bool) -> int:
        """Shared memory at most: the tiles in flight and those made of them, or the result on its way out."""
        x, dy, dweight = self.block_m * self.block_k, self.block_n * self.block_k, self.block_m * self.block_n
        made = norm * x + (maps > 1) * dy
        return max(itemsize * (self.stages * (x + maps * dy) + made), 4 * dweight)


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: images, output pixels of one, groups and their widths, taps, strides multiplied,
    the maps behind dy, whether x has a norm, and the machine.
    """

    images: int
    image_pixels: int
    groups: int
    width: int
    out_width: int
    taps: int
    stride: int
    itemsize: int
    maps: int
    norm: bool
    tf32: bool
    arch: int
    processors: int


CONFIGS = tuple(
    Config(m, n, k, warps, stages)
    for m, n, warps in ((64, 16, 4), (128, 16, 4), (64, 32, 4), (128, 32, 4), (64, 64, 4), (128, 64, 8), (128, 128, 8))
    for k in (32, 64)
    for stages in (2, 3)
)
"""The search space of the tuner."""

EXTENTS = ("images", "image_pixels")


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    return too_large(config.shared_bytes(shape.itemsize, shape.maps, shape.norm), shape.arch)


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement: 128 taps and channels by the group's width."""
    block_m = 128 if shape.width * shape.taps > 64 else 64
    block_n = min(128, max(16, triton.next_power_of_2(shape.out_width)))
    block_k = 64 // shape.itemsize
    warps = 8 if block_m * block_n >= 128 * 64 else 4
    for stages in (3, 2):
        config = Config(block_m, block_n, block_k, warps, stages)
        if not too_large(2 * config.shared_bytes(shape.itemsize, shape.maps, shape.norm), shape.arch):
            return config
    return Config(64, min(64, block_n), block_k, 4, 2)


def splits(config: Config, shape: Shape) -> int:
    """Into how many parts the pixels are split: four programs for each processor, as far as there are tiles."""
    programs = triton.cdiv(shape.width * shape.taps, config.block_m) * triton.cdiv(shape.out_width, config.block_n)
    wanted = triton.cdiv(4 * shape.processors, programs * shape.groups)
    return min(wanted, shape.images * triton.cdiv(shape.image_pixels, config.block_k))


@triton.jit(do_not_specialize=SIZES)
def kernel(
    x, scale, shift, dz, y, a, q, b, parts,
    share, all_tiles, tiles, image_pixels, out_columns, height, columns, channel_units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): part i of the pixels, `share` tiles of single images, and tile j of one group's weights."""
    channels, out_channels = channel_units * UNIT, out_units * OUT_UNIT
    rows: tl.constexpr = KH * KW * WIDTH
    down_tiles: tl.constexpr = (rows + BLOCK_M - 1) // BLOCK_M
    across: tl.constexpr = (OUT_WIDTH + BLOCK_N - 1) // BLOCK_N
    group, rest = tl.program_id(1) // (down_tiles * across), tl.program_id(1) % (down_tiles * across)
    ms, ns = (rest // across) * BLOCK_M + tl.arange(0, BLOCK_M), (rest % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, c = ms // WIDTH, ms % WIDTH
    down, right = (tap // KW) * DILATION_H - PAD_H, (tap % KW) * DILATION_W - PAD_W
    if scale is not None:
        factor = tl.load(scale + group * WIDTH + c)[None, :]
        summand = tl.load(shift + group * WIDTH + c)[None, :]
    known = ns < OUT_WIDTH
    if a is not None:
        cs = group * OUT_WIDTH + ns
        alpha = tl.load(a + cs, mask=known, other=0.0)[None, :]
        if q is not None:
            slope = tl.load(q + cs, mask=known, other=0.0)[None, :]
            constant = tl.load(b + cs, mask=known, other=0.0)[None, :]
    steps = (down * columns + right) * channels + group * WIDTH + c
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0) * share
    for t in tl.range(first, tl.minimum(first + share, all_tiles), num_stages=STAGES):
        image, pixels = (t // tiles).to(tl.int64), (t % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        top, left = (pixels // out_columns) * STRIDE_H, (pixels % out_columns) * STRIDE_W
        ih, iw = top[:, None] + down[None, :], left[:, None] + right[None, :]
        inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < columns)
        inside = inside & (pixels < image_pixels)[:, None] & (ms < rows)[None, :]
        corner = x + image * height * columns * channels
        e = tl.load(corner + ((top * columns + left) * channels)[:, None] + steps[None, :], mask=inside, other=0.0)
        if scale is not None:
            wide = activate(e.to(tl.float32) * factor + summand, ACTIVATION)
            e = narrow(tl.where(inside, wide, 0.0), x.dtype.element_ty, UPCAST)
        base = image * image_pixels * out_channels + group * OUT_WIDTH
        offsets = pixels[:, None] * out_channels + ns[None, :]
        there = (pixels < image_pixels)[:, None] & known[None, :]
        d = tl.load(dz + base + offsets, mask=there, other=0.0)
        if a is not None:
            made = d.to(tl.float32) * alpha
            if q is not None:
                made += tl.load(y + base + offsets, mask=there, other=0.0).to(tl.float32) * slope + constant
            d = narrow(tl.where(there, made, 0.0), dz.dtype.element_ty, UPCAST)
        accumulator = dot(tl.trans(e), d, accumulator, PRECISION, UPCAST)
    parts += (tl.program_id(0).to(tl.int64) * out_channels + group * OUT_WIDTH) * rows
    tl.store(parts + ns[None, :] * rows + ms[:, None], accumulator, mask=known[None, :] & (ms < rows)[:, None])


def constants(
    config: Config,
    shape: Shape,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
    dtype: torch.dtype,
) -> dict:
    """The compile-time arguments."""
    found = geometry_constants(shape.groups, shape.width, shape.out_width, kernel_size, stride, padding, dilation)
    found |= {
        "ACTIVATION": activation,
        "PRECISION": precision(dtype),
        "UPCAST": interpreting(),
        "STAGES": config.stages,
    }
    return found | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


@planned
def _plan(
    size: torch.Size, out_size: torch.Size, dtype: torch.dtype, device: torch.device, norm: str | None, affine: bool,
    slope: bool, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], groups: int, product: str, config: Config | None,
) -> tuple[Chosen, tuple[int, int, int], Launch]:  # fmt: skip
    """The choice, the size of the parts, and what launches it; `norm` is the activation behind one."""
    (n, channels, *extents), (_, out_channels, out_height, out_columns) = size, out_size
    pixels, geometry = out_height * out_columns, (kernel_size, stride, padding, dilation)
    widths, taps = (channels // groups, out_channels // groups), kernel_size[0] * kernel_size[1]
    operands = (dtype.itemsize, 1 + slope, norm is not None, product == "tf32")
    shape = Shape(n, pixels, groups, *widths, taps, stride[0] * stride[1], *operands, *machine(device))
    choice = chosen(__name__, shape, device, config)
    config = choice.config
    tiles = triton.cdiv(pixels, config.block_k)
    share = triton.cdiv(n * tiles, splits(config, shape))
    count = triton.cdiv(n * tiles, share)
    across = triton.cdiv(taps * widths[0], config.block_m) * triton.cdiv(widths[1], config.block_n)
    units = (channels // unit(channels), out_channels // unit(out_channels))
    launch = Launch(
        kernel, (count, groups * across), (share, n * tiles, tiles, pixels, out_columns, *extents, *units),
        config.warps, **constants(config, shape, *geometry, norm or "none", dtype),
    )  # fmt: skip
    return choice, (1, count, out_channels * taps * widths[0]), launch


@fitting
def weight_gradient(
    x: Tensor,
    norm: tuple[Tensor, Tensor, str] | None,
    dz: Tensor,
    y: Tensor | None,
    affine: Affine | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    config: Config | None = None,
) -> Tensor:
    """The gradient of the weight of a grouped convolution.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        norm: how x is read: scale and shift (C, float32), and the activation.
        dz: (N, K, OH, OW), channels_last, of x's dtype.
        y: of dz's shape, layout and dtype, where `affine` has a q.
        affine: dy = a * dz + q * y + b, by channel; without it dz is dy.
        kernel_size, stride, padding, dilation, groups: the convolution's.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new float32 tensor (K, C / groups, KH, KW).
    """
    a, q, b = affine or NO_AFFINE
    scale, shift, activation = norm or (None, None, None)
    geometry = (kernel_size, stride, padding, dilation)
    choice, size, launch = _plan(
        x.shape, dz.shape, x.dtype, x.device, activation, a is not None, q is not None, *geometry, groups,
        precision(x.dtype), config,
    )  # fmt: skip

    def run(config: Config) -> Tensor:
        return weight_gradient(x, norm, dz, y, affine, *geometry, groups, config)

    announce(choice, run)
    parts = new_sums(size, x)
    launch(x, scale, shift, dz, None if q is None else y, a, q, b, parts)
    return total(parts).view(dz.shape[1], *kernel_size, -1).permute(0, 3, 1, 2).contiguous()
