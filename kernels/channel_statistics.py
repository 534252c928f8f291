"""Mean and biased variance of every channel of a map, in one pass:

mean[c] = sum_p x[p, c] / P        var[c] = sum_p (x[p, c] - mean[c])^2 / P

Each program sums about the mean of its first tile, and the programs' means and squares are merged by the formula of
T. Chan, G. Golub and R. LeVeque, "Updating formulae and a pairwise algorithm", 1979: a mean far from zero costs no
digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import Config, chosen_tiles, launch_of, new_sums, tiles
from .common import SIZES, Launch, unit
from .tables import Chosen, announce, fitting, planned

BLOCKS = {"BLOCK_T": 64, "BLOCK_M": 16}


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x, parts, pixels, channel_units,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): a pivot, the sum about it and the centred sum of squares of some pixels and channels."""
    channels = channel_units * UNIT
    first = tl.program_id(0) * (BLOCK_P * STEPS)
    count = tl.minimum(pixels - first, BLOCK_P * STEPS)
    rows, cs = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets, known = rows[:, None] * channels + cs[None, :], cs < channels
    x += first.to(tl.int64) * channels
    inside = (rows < count)[:, None] & known[None, :]
    v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    # 12 bits: the differences of 16-bit values from it, and sums of a few of them, are exact
    pivot = (tl.sum(v, 0) / tl.minimum(count, BLOCK_P)).to(tl.int32, bitcast=True) & -4096
    pivot = pivot.to(tl.float32, bitcast=True)
    plain, square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in tl.range(STEPS):
        inside = (rows < count - step * BLOCK_P)[:, None] & known[None, :]
        v = tl.load(x + offsets + step * BLOCK_P * channels, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, v - pivot[None, :], 0.0)
        plain += v
        square += v * v
    plain = tl.sum(plain, 0)
    squares = tl.sum(square, 0) - plain * plain / count
    parts += tl.program_id(0).to(tl.int64) * 3 * channels
    tl.store(parts + cs, pivot, mask=known)
    tl.store(parts + channels + cs, plain, mask=known)
    tl.store(parts + 2 * channels + cs, tl.where(squares < 0, 0.0, squares), mask=known)


@triton.jit
def _about(parts, start, pivot, tiles, pixels, tile_pixels, channels, cs, BLOCK_T: tl.constexpr):
    """Some programs' sums about one pivot, their counts, where their parts are, and which of them there are.

    The difference of two pivots is exact where the means are far from zero.
    """
    ts = start + tl.arange(0, BLOCK_T)
    inside = (ts < tiles)[:, None] & (cs < channels)[None, :]
    count = tl.minimum(pixels - ts * tile_pixels, tile_pixels).to(tl.float32)[:, None]
    part = parts + ts.to(tl.int64)[:, None] * 3 * channels + cs[None, :]
    own = tl.load(part, mask=inside, other=0.0)
    plain = tl.load(part + channels, mask=inside, other=0.0) + count * (own - pivot[None, :])
    return tl.where(inside, plain, 0.0), count, part, inside


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    parts, mean, var, tiles, pixels, tile_pixels, channel_units,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Mean and variance of some channels."""
    channels = channel_units * UNIT
    cs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pivot = tl.load(parts + cs, mask=cs < channels, other=0.0)
    plain, square = tl.zeros((BLOCK_T, BLOCK_M), tl.float32), tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for start in tl.range(0, tiles, BLOCK_T):
        plain += _about(parts, start, pivot, tiles, pixels, tile_pixels, channels, cs, BLOCK_T)[0]
    total = tl.sum(plain, 0)
    shift = total / pixels
    for start in tl.range(0, tiles, BLOCK_T):
        plain, count, part, inside = _about(parts, start, pivot, tiles, pixels, tile_pixels, channels, cs, BLOCK_T)
        m = plain / count - shift[None, :]
        own = tl.load(part + 2 * channels, mask=inside, other=0.0)
        square += tl.where(inside, own + m * m * count, 0.0)
    tl.store(mean + cs, (total + pivot * pixels) / pixels, mask=cs < channels)
    tl.store(var + cs, tl.sum(square, 0) / pixels, mask=cs < channels)


@planned
def _plan(
    size: torch.Size, dtype: torch.dtype, device: torch.device, config: Config | None
) -> tuple[Chosen, tuple[int, int, int], Launch, Launch]:
    """The choice, the size of the parts, and what launches the sums and their merging."""
    choice, channels = chosen_tiles(size, dtype, device, 1, 2, config), size[1]
    config, shape = choice.config, choice.shape
    count = tiles(config, shape)
    merge = Launch(
        merge_kernel, (triton.cdiv(channels, BLOCKS["BLOCK_M"]),),
        (count, shape.pixels, config.block_p * config.steps, channels // unit(channels)), 4,
        UNIT=unit(channels), **BLOCKS,
    )  # fmt: skip
    return choice, (count, 3, channels), launch_of(statistics_kernel, choice, shape.pixels), merge


@fitting
def statistics(x: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        config: by default a tuned one, or that of `heuristic`.

    Returns two float32 tensors of C values.
    """
    choice, size, launch, merge = _plan(x.shape, x.dtype, x.device, config)

    def run(config: Config) -> tuple[Tensor, Tensor]:
        return statistics(x, config)

    announce(choice, run)
    parts, mean, var = new_sums(size, x), new_sums(size[2:], x), new_sums(size[2:], x)
    launch(x, parts)
    merge(parts, mean, var)
    return mean, var
