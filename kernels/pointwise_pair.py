"""Two 1x1 convolutions of one map in one launch: a block's first convolution and its shortcut, with its stride.

    y[p] = activation(x[p] @ weight + bias)        other[p] = x[q(p)] @ other_weight + other_bias

In the forms of `pointwise_conv`. Programs that run at the same time compute both for the same pixels, so that x comes
from memory once and from the cache from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pointwise_conv
from .common import SIZES, Launch, machine, new_output, precision, unit
from .pointwise_conv import CONFIGS, EXTENTS, Affine, Config, programs, resident_tiles, streamed_tile  # noqa: F401
from .tables import Chosen, announce, chosen, fitting, planned


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: the first product, the other's width and stride, and the machine; `norm` says
    that x is normalised as it is read.
    """

    pixels: int
    channels: int
    out_channels: int
    other_channels: int
    itemsize: int
    stride: int
    tf32: bool
    norm: bool
    arch: int
    processors: int

    @property
    def first(self) -> pointwise_conv.Shape:
        """The shape of the first product alone."""
        return pointwise_conv.Shape(
            self.pixels, self.channels, self.out_channels, self.itemsize, 0, False, 1, self.tf32, self.arch,
            self.processors, self.norm,
        )  # fmt: skip

    @property
    def both(self) -> tuple[pointwise_conv.Shape, pointwise_conv.Shape]:
        """Those of both products; of images with odd sizes the other has a few more pixels."""
        pixels = triton.cdiv(self.pixels, self.stride**2)
        return self.first, replace(self.first, pixels=pixels, out_channels=self.other_channels, stride=self.stride)


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    return pointwise_conv.config_supports(config, shape.first)


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement."""
    return pointwise_conv.heuristic(*shape.both)


@triton.jit(do_not_specialize=SIZES)
def resident_kernel(
    x, scale, shift, weight, bias, y, other_weight, other_bias, other,
    share, pixels, other_pixels, out_area, out_width, in_area, in_width, channel_units, out_units, other_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, OTHER_UNIT: tl.constexpr, STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, OTHER_BIAS: tl.constexpr, NORM: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program keeps a tile of one of the weights; `share` programs have the same one of the first. All run at once
    and go through x from its beginning to its end.
    """
    channels, out_channels, other_channels = channel_units * UNIT, out_units * OUT_UNIT, other_units * OTHER_UNIT
    across, other_across = tl.cdiv(out_channels, BLOCK_N), tl.cdiv(other_channels, BLOCK_N)
    place = tl.program_id(0) - share * across
    if place < 0:
        resident_tiles(
            x, weight, bias, None, scale, shift, None, None, None, y,
            tl.program_id(0) // across, share, (tl.program_id(0) % across) * BLOCK_N,
            pixels, in_area, in_width, in_area, in_width, channels, out_channels, 1, ACTIVATION, HAS_BIAS,
            False, 0, NORM, False, None, EVEN_K, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, REST, STAGES,
        )  # fmt: skip
    if place >= 0:  # `else` ends both loops in the same code, for which the compiler keeps the memory of both
        resident_tiles(
            x, other_weight, other_bias, None, scale, shift, None, None, None, other,
            place // other_across, (tl.num_programs(0) - share * across) // other_across,
            (place % other_across) * BLOCK_N,
            other_pixels, out_area, out_width, in_area, in_width, channels, other_channels, STRIDE, "none", OTHER_BIAS,
            False, 0, NORM, False, None, EVEN_K, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, REST, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def streamed_kernel(
    x, scale, shift, weight, bias, y, other_weight, other_bias, other,
    pixels, other_pixels, out_area, out_width, in_area, in_width, channel_units, out_units, other_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, OTHER_UNIT: tl.constexpr, STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, OTHER_BIAS: tl.constexpr, NORM: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many programs have a tile of the other's pixels, and before it the tiles of y in the same rows of x."""
    channels, out_channels, other_channels = channel_units * UNIT, out_units * OUT_UNIT, other_units * OTHER_UNIT
    across, other_across = tl.cdiv(out_channels, BLOCK_N), tl.cdiv(other_channels, BLOCK_N)
    first = STRIDE * STRIDE * across
    share, place = tl.program_id(0) // (first + other_across), tl.program_id(0) % (first + other_across)
    if place < first:
        row, column = (share * STRIDE * STRIDE + place // across) * BLOCK_M, (place % across) * BLOCK_N
        streamed_tile(
            x, weight, bias, None, scale, shift, None, None, None, y, row, column,
            pixels, in_area, in_width, in_area, in_width, channels, out_channels, 1, ACTIVATION,
            HAS_BIAS, False, 0, NORM, False, None, EVEN_K, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        streamed_tile(
            x, other_weight, other_bias, None, scale, shift, None, None, None, other,
            share * BLOCK_M, (place - first) * BLOCK_N,
            other_pixels, out_area, out_width, in_area, in_width, channels, other_channels, STRIDE, "none",
            OTHER_BIAS, False, 0, NORM, False, None, EVEN_K, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip


def constants(config: Config, shape: Shape, activation: str, dtype: torch.dtype) -> dict:
    """The compile-time arguments, but for the biases and `NORM`: those of the first product, less what no pair has."""
    found = pointwise_conv.constants(config, shape.first, shape.stride, activation, dtype)
    for name in ("HAS_GATE", "IMAGES", "HAS_RESIDUAL"):
        del found[name]
    return {**found, "OTHER_UNIT": unit(shape.other_channels)}


@planned
def _plan(
    size: torch.Size, out_channels: int, other_channels: int, dtype: torch.dtype, device: torch.device,
    bias: bool, other_bias: bool, norm: str | None, stride: int, activation: str, product: str, config: Config | None,
) -> tuple[Chosen, tuple[tuple[int, ...], ...], Launch]:  # fmt: skip
    """The choice, the sizes of the results, and what launches both."""
    n, channels, height, width = size
    other_height, other_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    pixels, other_pixels = n * height * width, n * other_height * other_width
    widths, operands = (channels, out_channels, other_channels), (dtype.itemsize, stride, product == "tf32")
    shape = Shape(pixels, *widths, *operands, norm is not None, *machine(device))
    choice = chosen(__name__, shape, device, config)
    config = choice.config
    (across, _), (other_across, _) = (config.tiles(one) for one in shape.both)
    if config.resident:
        share, other_share = programs(config, *shape.both)
        count, sizes = share * across + other_share * other_across, (share,)
    else:
        shares = max(triton.cdiv(pixels, stride * stride * config.block_m), triton.cdiv(other_pixels, config.block_m))
        count, sizes = shares * (stride * stride * across + other_across), ()
    launch = Launch(
        resident_kernel if config.resident else streamed_kernel,
        (count,),
        (
            *sizes,
            *(pixels, other_pixels, other_height * other_width, other_width, height * width, width),
            *(one // unit(one) for one in widths),
        ),
        config.warps,
        **constants(config, shape, activation, dtype),
        **{"HAS_BIAS": bias, "OTHER_BIAS": other_bias, "NORM": norm},
    )
    return choice, ((n, out_channels, height, width), (n, other_channels, other_height, other_width)), launch


@fitting
def pointwise_pair(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other_weight: Tensor,
    other_bias: Tensor | None,
    *,
    norm: Affine | None = None,
    stride: int = 1,
    activation: str = "none",
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`activation(conv2d(norm(x), weight, bias))` and `conv2d(norm(x), other_weight, other_bias, stride)`, both 1x1.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        weight, other_weight: (K, C) and (K', C), contiguous, of x's dtype.
        bias, other_bias: (K) and (K'), float32.
        norm: as `pointwise_conv` takes it.
        stride: of the other one.
        config: by default a tuned one, or that of `heuristic`.

    Returns two new tensors in channels_last. Sums in float32.
    """
    scale, shift, after = norm or (None, None, None)
    choice, sizes, launch = _plan(
        x.shape, weight.shape[0], other_weight.shape[0], x.dtype, x.device, bias is not None, other_bias is not None,
        after, stride, activation, precision(x.dtype), config,
    )  # fmt: skip

    def run(config: Config) -> tuple[Tensor, Tensor]:
        options = {"norm": norm, "stride": stride, "activation": activation, "config": config}
        return pointwise_pair(x, weight, bias, other_weight, other_bias, **options)

    announce(choice, run)
    y, other = (new_output(size, x) for size in sizes)
    launch(x, scale, shift, weight, bias, y, other_weight, other_bias, other)
    return y, other
