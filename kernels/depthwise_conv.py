"""Depthwise convolution, one filter for each channel, with bias, activation and parts of the channel means:

    y[p, c] = activation(sum_tap x[q(p, tap), c] * weight[tap, c] + bias[c])

There is no product of matrices in it: every thread sums the taps of its own channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES, Launch, activate, interpreting, narrow, new_output, unit
from .tables import Chosen, announce, chosen, fitting, planned


@dataclass(frozen=True)
class Config:
    """Tile sizes in pixels of one image and channels."""

    block_p: int
    block_c: int
    warps: int


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: output pixels, of all images and of one, channels, taps, strides multiplied, and
    the operands.
    """

    pixels: int
    image_pixels: int
    channels: int
    taps: int
    stride: int
    itemsize: int
    means: bool


CONFIGS = tuple(Config(p, c, w) for p in (16, 32, 64) for c in (32, 64, 128) for w in (4, 8))
"""The search space of the tuner."""

EXTENTS = ("pixels", "image_pixels")


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None: each can."""
    return None


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement: 2048 elements."""
    block_c = min(128, max(16, triton.next_power_of_2(shape.channels)))
    return Config(2048 // block_c, block_c, 4)


@triton.jit(do_not_specialize=SIZES)
def kernel(
    x, weight, bias, y, partial, tiles, image_pixels, out_columns, height, columns, channel_units,
    UNIT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PARTIAL: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile i of the pixels of one image, and tile j of the channels."""
    channels = channel_units * UNIT
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixels, cs = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top, left = (pixels // out_columns) * STRIDE_H - PAD_H, (pixels % out_columns) * STRIDE_W - PAD_W
    x += image.to(tl.int64) * height * columns * channels
    z = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in tl.static_range(KH * KW):
        ih, iw = top + (tap // KW) * DILATION_H, left + (tap % KW) * DILATION_W
        seen = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < columns) & (pixels < image_pixels)
        inside = seen[:, None] & (cs < channels)[None, :]
        a = tl.load(x + (ih * columns + iw)[:, None] * channels + cs[None, :], mask=inside, other=0.0)
        w = tl.load(weight + tap * channels + cs, mask=cs < channels, other=0.0)
        z += a.to(tl.float32) * w.to(tl.float32)[None, :]
    if HAS_BIAS:
        z += tl.load(bias + cs, mask=cs < channels, other=0.0)[None, :]
    rounded = narrow(activate(z, ACTIVATION), y.dtype.element_ty, UPCAST)
    inside = (pixels < image_pixels)[:, None] & (cs < channels)[None, :]
    y += image.to(tl.int64) * image_pixels * channels
    tl.store(y + pixels[:, None] * channels + cs[None, :], rounded, mask=inside)
    if HAS_PARTIAL:
        sums = tl.sum(tl.where(inside, rounded.to(tl.float32), 0.0), 0) / image_pixels
        tl.store(partial + tl.program_id(0).to(tl.int64) * channels + cs, sums, mask=cs < channels)


def packed_weight(weight: Tensor) -> Tensor:
    """(C, 1, KH, KW) weights as (KH * KW, C)."""
    return weight.flatten(1).t().contiguous()


@planned
def _plan(
    input_size: torch.Size, dtype: torch.dtype, device: torch.device, bias: bool, kernel_size: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], activation: str, means: bool,
    config: Config | None,
) -> tuple[Chosen, tuple[int, ...], tuple[int, ...] | None, Launch]:  # fmt: skip
    """The choice, the sizes of y and of the parts, and what launches it."""
    n, channels, *extents = input_size
    size = [(extents[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    pixels, taps, steps = size[0] * size[1], kernel_size[0] * kernel_size[1], stride[0] * stride[1]
    choice = chosen(__name__, Shape(n * pixels, pixels, channels, taps, steps, dtype.itemsize, means), device, config)
    config = choice.config
    tiles = triton.cdiv(pixels, config.block_p)
    launch = Launch(
        kernel, (n * tiles, triton.cdiv(channels, config.block_c)),
        (tiles, pixels, size[1], *extents, channels // unit(channels)), config.warps,
        UNIT=unit(channels), KH=kernel_size[0], KW=kernel_size[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        PAD_H=padding[0], PAD_W=padding[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
        ACTIVATION=activation, HAS_BIAS=bias, HAS_PARTIAL=means, UPCAST=interpreting(),
        BLOCK_P=config.block_p, BLOCK_C=config.block_c,
    )  # fmt: skip
    return choice, (n, channels, *size), (n, tiles, channels) if means else None, launch


@fitting
def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
    means: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`activation(conv2d(x, weight, bias, ..., groups=C))`, and parts of its channel means where they are asked.

    Arguments and results are those of `implicit_gemm.convolution`, with the weight as `packed_weight` makes it.
    """
    geometry = (kernel_size, stride, padding, dilation)
    choice, size, parts_size, launch = _plan(
        x.shape, x.dtype, x.device, bias is not None, *geometry, activation, means, config
    )

    def run(config: Config) -> tuple[Tensor, Tensor | None]:
        return depthwise_conv(x, weight, bias, *geometry, activation, means, config)

    announce(choice, run)
    y = new_output(size, x)
    parts = None if parts_size is None else torch.empty(parts_size, dtype=torch.float32, device=x.device)
    launch(x, weight, bias, y, parts)
    return y, parts
