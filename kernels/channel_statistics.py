"""Mean and biased variance of every channel of a map, in one pass:

mean[c] = sum_p x[p, c] / P        var[c] = sum_p (x[p, c] - mean[c])^2 / P

Each program sums about the mean of its first tile, and the programs' means and squares are merged by the formula of
T. Chan, G. Golub and R. LeVeque, "Updating formulae and a pairwise algorithm", 1979: a mean far from zero costs no
digits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import channel_tiles
from .channel_tiles import Config, launch_tiles, new_sums, shape_of, tiles
from .common import SIZES, launch, unit
from .tables import choose, fitting

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


@fitting
def statistics(x: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        config: by default a tuned one, or that of `heuristic`.

    Returns two float32 tensors of C values.
    """
    shape, channels = shape_of(x, 1, 2), x.shape[1]

    def run(config: Config) -> tuple[Tensor, Tensor]:
        return statistics(x, config)

    config = choose(channel_tiles.__name__, shape, x.device, config, run)
    parts, mean, var = (new_sums(size, x) for size in ((tiles(config, shape), 3, channels), (channels,), (channels,)))
    launch_tiles(statistics_kernel, config, shape, x=x, parts=parts, pixels=shape.pixels)
    sizes = (len(parts), shape.pixels, config.block_p * config.steps, channels // unit(channels))
    grid = (triton.cdiv(channels, BLOCKS["BLOCK_M"]),)
    launch(merge_kernel, grid, parts, mean, var, *sizes, UNIT=unit(channels), **BLOCKS, num_warps=4)
    return mean, var
