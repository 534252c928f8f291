"""How the passes of a training step cut a map: tiles of pixels by channels, and sums over the pixels of each channel.

A program walks over some tiles of the same channels and leaves one part of each sum. `total` adds the parts in their
order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES, Launch, machine, narrow, unit
from .tables import Chosen, chosen, planned


@dataclass(frozen=True)
class Config:
    """Tile sizes in pixels and channels, and the tiles of a program."""

    block_p: int
    block_c: int
    steps: int
    warps: int


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: images (1 where a tile may reach over several), the pixels of one, channels, the
    maps that are read and written, the sums that are kept, and the processors.
    """

    images: int
    pixels: int
    channels: int
    itemsize: int
    maps: int
    sums: int
    processors: int


CONFIGS = tuple(
    Config(size // c, c, steps, warps)
    for size, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8))
    for c in (32, 64, 128, 256)
    for steps in (1, 4, 16)
)
"""The search space of the tuner."""

EXTENTS = ("images", "pixels")
_MOST_STEPS = 64
BLOCKS = {"BLOCK_T": 64, "BLOCK_M": 16}


def _most_values(shape: Shape) -> int:
    """How many values of a tile a thread can hold in its registers beside the sums."""
    if shape.sums < 2 or shape.maps <= 2:
        return 32
    return 16 if shape.sums <= 4 else 8


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    values = config.block_p * config.block_c // (32 * config.warps)
    if values > _most_values(shape):
        return f"{shape.sums} sums beside {values} values in a thread do not fit in the registers"
    return None


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement: four warps with as much as their registers hold, little beyond the
    last channel, and as many tiles in a program as leave four programs for each processor.
    """
    block_c = min((256, 128, 64), key=lambda c: triton.cdiv(shape.channels, c) * c)
    if shape.channels <= 32:
        block_c = max(16, triton.next_power_of_2(shape.channels))
    values = min(_most_values(shape), 16) if shape.maps > 3 else _most_values(shape)  # Triton 3.6 spills more
    block_p, steps = 128 * values // block_c, 1

    def programs(steps: int) -> int:
        return shape.images * triton.cdiv(shape.pixels, block_p * steps) * triton.cdiv(shape.channels, block_c)

    while steps < _MOST_STEPS and steps * block_p < shape.pixels and programs(2 * steps) >= 4 * shape.processors:
        steps *= 2
    return Config(block_p, block_c, steps, 4)


def chosen_tiles(
    size: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    maps: int,
    sums: int,
    config: Config | None,
    each_image: bool = False,
) -> Chosen:
    """The configuration of a pass over channels_last maps of a size, whose tiles stay within an image or not."""
    n, channels, height, width = size
    images, pixels = (n, height * width) if each_image else (1, n * height * width)
    shape = Shape(images, pixels, channels, dtype.itemsize, maps, sums, machine(device)[1])
    return chosen(__name__, shape, device, config)


def constants(config: Config, channels: int) -> dict[str, int]:
    """The compile-time arguments of all passes."""
    blocks = {"BLOCK_P": config.block_p, "BLOCK_C": config.block_c, "STEPS": config.steps}
    return {"UNIT": unit(channels), **blocks}


def tiles(config: Config, shape: Shape) -> int:
    """How many programs share an image, or all of them."""
    return triton.cdiv(shape.pixels, config.block_p * config.steps)


def launch_of(kernel: Any, choice: Chosen, *sizes: float, **more: Any) -> Launch:
    """What launches a pass over the whole map; `sizes` are the kernel's but for its last, the `channel_units`."""
    config, shape = choice.config, choice.shape
    grid = (shape.images * tiles(config, shape), triton.cdiv(shape.channels, config.block_c))
    sizes = (*sizes, shape.channels // unit(shape.channels))
    return Launch(kernel, grid, sizes, config.warps, **more, **constants(config, shape.channels))


def new_sums(size: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised float32 tensor for a kernel to write."""
    return torch.empty(size, dtype=torch.float32, device=like.device)


@triton.jit
def norm_of(mean, var, weight, bias, eps, cs, known):
    """Mean, inverse standard deviation, scale and shift of the channels; without a norm 0, 1, 1 and 0.

    The normalised value is (x - mean) * scale + shift.
    """
    if mean is None:
        centre, invstd, scale, shift = 0.0, 1.0, 1.0, 0.0
    else:
        centre = tl.load(mean + cs, mask=known, other=0.0)[None, :]
        invstd = 1.0 / tl.sqrt_rn(tl.load(var + cs, mask=known, other=1.0)[None, :] + eps)
        scale = invstd
        if weight is not None:
            scale = invstd * tl.load(weight + cs, mask=known, other=0.0)[None, :]
        shift = 0.0
        if bias is not None:
            shift = tl.load(bias + cs, mask=known, other=0.0)[None, :]
    return centre, invstd, scale, shift


@triton.jit
def before_activation(d, z, ACTIVATION: tl.constexpr):
    """The gradient before an activation of z from that behind it."""
    if ACTIVATION == "relu":
        d = tl.where(z <= 0, 0.0, d)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        d = d * (s * (1.0 + z * (1.0 - s)))
    else:
        tl.static_assert(ACTIVATION == "none", "an activation that the kernels do not have")
    return d


@triton.jit
def place_of(step, base, first, pixels, image_pixels, cs, channels, BLOCK_P: tl.constexpr):
    """Where a program's next tile lies: the base and offsets of its elements, which of them there are, the image and
    validity of its rows, and the offsets of an image's channels.
    """
    at = step * BLOCK_P + tl.arange(0, BLOCK_P)
    known = at < pixels - first
    image = ((first + at) // image_pixels)[:, None]
    inside = known[:, None] & (cs < channels)[None, :]
    return base, at[:, None] * channels + cs[None, :], inside, image, known[:, None], image * channels + cs[None, :]


@triton.jit
def load(pointer, place):
    """A tile in float32, 0 beyond the map."""
    base, offsets, inside, _, _, _ = place
    return tl.load(pointer + base + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalised(x, norm, place):
    """A tile of a map after its norm, before its activation."""
    centre, _, scale, shift = norm
    return (load(x, place) - centre) * scale + shift


@triton.jit
def store(pointer, value, place, UPCAST: tl.constexpr):
    """Write a tile, and return what was written."""
    base, offsets, inside, _, _, _ = place
    rounded = narrow(value, pointer.dtype.element_ty, UPCAST)
    tl.store(pointer + base + offsets, rounded, mask=inside)
    return tl.where(inside, rounded.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=SIZES)
def total_kernel(
    parts, sums, tiles, column_units, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Program (b, j): some columns of matrix b."""
    columns = column_units * UNIT
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = tl.program_id(0).to(tl.int64)
    parts += batch * tiles * columns
    found = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for start in tl.range(0, tiles, BLOCK_T):
        ts = start + tl.arange(0, BLOCK_T)
        inside = (ts < tiles)[:, None] & (ms < columns)[None, :]
        found += tl.load(parts + ts.to(tl.int64)[:, None] * columns + ms[None, :], mask=inside, other=0.0)
    tl.store(sums + batch * columns + ms, tl.sum(found, 0), mask=ms < columns)


@planned
def _plan(size: torch.Size, device: torch.device) -> Launch:
    """What adds parts."""
    batch, tiles, columns = size
    grid, sizes = (batch, triton.cdiv(columns, BLOCKS["BLOCK_M"])), (tiles, columns // unit(columns))
    return Launch(total_kernel, grid, sizes, 4, UNIT=unit(columns), **BLOCKS)


def total(parts: Tensor) -> Tensor:
    """(B, M) sums of (B, T, M) float32 parts over T."""
    batch, tiles, columns = parts.shape
    if tiles == 1:
        return parts[:, 0]
    sums = new_sums((batch, columns), parts)
    _plan(parts.shape, parts.device)(parts, sums)
    return sums
