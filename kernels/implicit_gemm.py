"""A convolution of any kernel size as a matrix product that is never laid out, group by group:

    y[p, g, n] = activation(sum_(tap, c) x[q(p, tap), g, c] * weight[g, n, tap, c] + bias[g, n] + residual[p, g, n])

p counts output pixels, q(p, tap) is the input's pixel under a tap, and what lies outside the image is 0. The sum runs
over taps and channels as one flat index, so that narrow groups fill the matrix instruction's depth with several taps
instead of padding. `grouped_conv` and `dense_conv` are its users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    SHARED_BYTES,
    SIZES,
    Launch,
    activate,
    dot,
    interpreting,
    machine,
    narrow,
    new_output,
    precision,
    too_large,
    unit,
)
from .tables import Chosen, announce, chosen, fitting, planned


@dataclass(frozen=True)
class Config:
    """Tile sizes in pixels, output channels of one group, and terms of the sum."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory at most: the tiles in flight, or the result on its way out."""
        x, weight, y = self.block_m * self.block_k, self.block_n * self.block_k, self.block_m * self.block_n
        return itemsize * max(self.stages * (x + weight), y)


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: output pixels, of all images and of one, groups and their widths, taps, strides
    multiplied, the operands, and the machine.
    """

    pixels: int
    image_pixels: int
    groups: int
    width: int
    out_width: int
    taps: int
    stride: int
    itemsize: int
    residual: bool
    means: bool
    tf32: bool
    arch: int
    processors: int


CONFIGS = tuple(
    Config(m, n, k, warps, stages)
    for m, n, warps in ((64, 16, 4), (128, 16, 4), (64, 32, 4), (128, 32, 4), (128, 64, 4), (128, 128, 8))
    for k in (32, 64, 128)
    for stages in (2, 3, 4)
)
"""The search space of the tuner."""

EXTENTS = ("pixels", "image_pixels")


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    return too_large(config.shared_bytes(shape.itemsize), shape.arch)


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement: tiles of 128 pixels by the group's width, halved while there are fewer
    than processors, of 256 for sums over a few taps of an image.
    """
    block_m, block_n = 128, min(128, max(16, triton.next_power_of_2(shape.out_width)))

    def tiles() -> int:
        return triton.cdiv(shape.pixels, block_m) * shape.groups * triton.cdiv(shape.out_width, block_n)

    while tiles() < shape.processors and max(block_m, block_n) > 32:
        block_m, block_n = (block_m // 2, block_n) if block_m >= block_n else (block_m, block_n // 2)
    block_k = min(128 // shape.itemsize, max(16, triton.next_power_of_2(shape.width * shape.taps)))
    if block_m < 64 <= block_n:
        block_k //= 2  # the addresses of deeper tiles do not fit in the registers
    scattered = shape.width % 4 != 0  # an image's channels, whose addresses take registers of their own
    warps = 8 if block_m * block_n >= (128 * 64 if scattered else 128 * 128) else 4
    short_sum = scattered and block_n <= 32 and block_k * shape.itemsize <= 64  # what surrounds it is most of a program
    if short_sum and block_m == 128 and tiles() >= 2 * shape.processors:
        block_m = 256
    short = block_m <= 64 and block_n >= 32 and SHARED_BYTES[shape.arch] < 128 << 10  # of registers, with more stages
    for stages in (2,) if short else (4, 3, 2):
        config = Config(block_m, block_n, block_k, warps, stages)
        if not too_large(2 * config.shared_bytes(shape.itemsize), shape.arch):
            return config
    return Config(block_m // 2, block_n // 2, block_k, 4, 2)


@triton.jit(do_not_specialize=SIZES)
def kernel(
    x, weight, bias, residual, y, partial,
    tiles, image_pixels, out_columns, height, columns, channel_units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile i of the pixels of one image, and of the channels of one group tile j."""
    channels, out_channels = channel_units * UNIT, out_units * OUT_UNIT
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    across: tl.constexpr = (OUT_WIDTH + BLOCK_N - 1) // BLOCK_N
    group, first = tl.program_id(1) // across, (tl.program_id(1) % across) * BLOCK_N
    pixels, ns = tile * BLOCK_M + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    top, left = (pixels // out_columns) * STRIDE_H - PAD_H, (pixels % out_columns) * STRIDE_W - PAD_W
    pixel_step, channel_step = channels, 1
    if CHANNELS_FIRST:
        pixel_step, channel_step = 1, height * columns
    x += image.to(tl.int64) * height * columns * channels + group * WIDTH * channel_step
    weight += (group * OUT_WIDTH).to(tl.int64) * (KH * KW * WIDTH)
    corners = (top * columns + left) * pixel_step
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, KH * KW * WIDTH, BLOCK_K, num_stages=STAGES):
        ks = start + tl.arange(0, BLOCK_K)
        tap, c = ks // WIDTH, ks % WIDTH
        down, right = (tap // KW) * DILATION_H, (tap % KW) * DILATION_W
        ih, iw = top[:, None] + down[None, :], left[:, None] + right[None, :]
        inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < columns)
        inside = inside & (pixels < image_pixels)[:, None] & (ks < KH * KW * WIDTH)[None, :]
        steps = (down * columns + right) * pixel_step + c * channel_step
        a = tl.load(x + corners[:, None] + steps[None, :], mask=inside, other=0.0)
        known = (ns < OUT_WIDTH)[:, None] & (ks < KH * KW * WIDTH)[None, :]
        b = tl.load(weight + ns[:, None] * (KH * KW * WIDTH) + ks[None, :], mask=known, other=0.0)
        accumulator = dot(a, tl.trans(b), accumulator, PRECISION, UPCAST)
    if HAS_BIAS:
        accumulator += tl.load(bias + group * OUT_WIDTH + ns, mask=ns < OUT_WIDTH, other=0.0)[None, :]
    base = image.to(tl.int64) * image_pixels * out_channels + group * OUT_WIDTH
    offsets = pixels[:, None] * out_channels + ns[None, :]
    inside = (pixels < image_pixels)[:, None] & (ns < OUT_WIDTH)[None, :]
    if HAS_RESIDUAL:
        accumulator += tl.load(residual + base + offsets, mask=inside, other=0.0).to(tl.float32)
    rounded = narrow(activate(accumulator, ACTIVATION), y.dtype.element_ty, UPCAST)
    tl.store(y + base + offsets, rounded, mask=inside)
    if HAS_PARTIAL:
        sums = tl.sum(tl.where(inside, rounded.to(tl.float32), 0.0), 0) / image_pixels
        tl.store(
            partial + tl.program_id(0).to(tl.int64) * out_channels + group * OUT_WIDTH + ns, sums, mask=ns < OUT_WIDTH
        )


def packed_weight(weight: Tensor) -> Tensor:
    """(K, C / groups, KH, KW) weights as (K, KH * KW * C / groups), tap by tap."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()


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
    """The compile-time arguments, but for x's layout and which optional tensors are there."""
    return {
        "UNIT": unit(shape.groups * shape.width),
        "OUT_UNIT": unit(shape.groups * shape.out_width),
        "WIDTH": shape.width,
        "OUT_WIDTH": shape.out_width,
        "KH": kernel_size[0],
        "KW": kernel_size[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "ACTIVATION": activation,
        "PRECISION": precision(dtype),
        "UPCAST": interpreting(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
    }


@planned
def _plan(
    input_size: torch.Size, out_channels: int, dtype: torch.dtype, device: torch.device, channels_first: bool,
    bias: bool, residual: bool, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], groups: int, activation: str, means: bool, product: str, config: Config | None,
) -> tuple[Chosen, tuple[int, ...], tuple[int, ...] | None, Launch]:  # fmt: skip
    """The choice, the sizes of y and of the parts, and what launches it."""
    n, channels, *extents = input_size
    size = [(extents[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    pixels, geometry = size[0] * size[1], (kernel_size, stride, padding, dilation)
    widths, taps, steps = (
        (channels // groups, out_channels // groups),
        kernel_size[0] * kernel_size[1],
        math.prod(stride),
    )
    operands = (dtype.itemsize, residual, means, product == "tf32")
    shape = Shape(n * pixels, pixels, groups, *widths, taps, steps, *operands, *machine(device))
    choice = chosen(__name__, shape, device, config)
    config = choice.config
    tiles = triton.cdiv(pixels, config.block_m)
    launch = Launch(
        kernel,
        (n * tiles, groups * triton.cdiv(shape.out_width, config.block_n)),
        (tiles, pixels, size[1], *extents, channels // unit(channels), out_channels // unit(out_channels)),
        config.warps,
        **constants(config, shape, *geometry, activation, dtype),
        **{"CHANNELS_FIRST": channels_first, "HAS_BIAS": bias, "HAS_RESIDUAL": residual, "HAS_PARTIAL": means},
    )
    return choice, (n, out_channels, *size), (n, tiles, out_channels) if means else None, launch


@fitting
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
    means: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`activation(conv2d(x, weight, bias, ...) + residual)`, and parts of its channel means where they are asked.

    Args:
        x: (N, C, H, W), channels_last or contiguous, as images come; float32, float16 or bfloat16.
        weight: as `packed_weight` makes it, of x's dtype.
        bias: (K), float32.
        residual: (N, K, OH, OW), channels_last, of x's dtype.
        means: whether to return (N, T, K) float32 parts, whose sum over T are the means over the pixels.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new (N, K, OH, OW) tensor in channels_last, and the parts or None. Sums in float32; the parts are sums of
    rounded results.
    """
    geometry = (kernel_size, stride, padding, dilation)
    choice, size, parts_size, launch = _plan(
        x.shape, weight.shape[0], x.dtype, x.device, not x.is_contiguous(memory_format=torch.channels_last),
        bias is not None, residual is not None, *geometry, groups, activation, means, precision(x.dtype), config,
    )  # fmt: skip

    def run(config: Config) -> tuple[Tensor, Tensor | None]:
        return convolution(x, weight, bias, residual, *geometry, groups, activation, means, config)

    announce(choice, run)
    y = new_output(size, x)
    parts = None if parts_size is None else torch.empty(parts_size, dtype=torch.float32, device=x.device)
    launch(x, weight, bias, residual, y, parts)
    return y, parts
