"""Passes of a training step over one map:

raw_gradient    out[p, c] = a[c] * dz[p, c] + q[c] * y[p, c] + k[c] + identity[p, c]
image_parts     out[n, c] = share * sum over an image of read(x)[p, c] * times[p, c]

The first is the gradient of a raw map from that of the normalised one; the second are the means and the gradient of
squeeze-and-excitation. `read` is that of `training_join`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import channel_tiles
from .channel_tiles import (
    Config,
    launch_tiles,
    load,
    new_sums,
    norm_of,
    normalised,
    place_of,
    shape_of,
    store,
    tiles,
)
from .common import SIZES, activate, interpreting, new_output
from .tables import choose, fitting
from .training_join import ReadMap


@triton.jit(do_not_specialize=SIZES)
def affine_kernel(
    dz, y, identity, out, a, q, k, pixels, channel_units, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some channels of some pixels."""
    channels = channel_units * UNIT
    first = tl.program_id(0) * (BLOCK_P * STEPS)
    base, cs = first.to(tl.int64) * channels, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    alpha = tl.load(a + cs, mask=cs < channels, other=0.0)[None, :]
    if q is not None:
        slope = tl.load(q + cs, mask=cs < channels, other=0.0)[None, :]
        shift = tl.load(k + cs, mask=cs < channels, other=0.0)[None, :]
    for step in tl.range(STEPS):
        place = place_of(step, base, first, pixels, pixels, cs, channels, BLOCK_P)
        found = load(dz, place) * alpha
        if q is not None:
            found += load(y, place) * slope + shift
        if identity is not None:
            found += load(identity, place)
        store(out, found, place, UPCAST)


@triton.jit(do_not_specialize=SIZES)
def image_kernel(
    x, mean, var, weight, bias, times, parts, eps, share, tiles, image_pixels, channel_units,
    ACTIVATION: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some channels of some pixels of one image."""
    channels = channel_units * UNIT
    image, first = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * (BLOCK_P * STEPS)
    base = (image.to(tl.int64) * image_pixels + first) * channels
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    norm = norm_of(mean, var, weight, bias, eps, cs, cs < channels)
    found = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in tl.range(STEPS):
        place = place_of(step, base, first, image_pixels, image_pixels, cs, channels, BLOCK_P)
        value = activate(normalised(x, norm, place), ACTIVATION)
        if times is not None:
            value *= load(times, place)
        found += tl.where(place[2], value, 0.0)
    sums = tl.sum(found, 0) * share
    tl.store(parts + tl.program_id(0).to(tl.int64) * channels + cs, sums, mask=cs < channels)


@fitting
def raw_gradient(
    dz: Tensor,
    y: Tensor,
    a: Tensor,
    q: Tensor | None = None,
    k: Tensor | None = None,
    identity: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`a * dz + q * y + k + identity`: the gradient of a raw map from that of the normalised one.

    Args:
        dz, y, identity: channels_last, of one dtype.
        a, q, k: C float32 values; q and k are given together.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new channels_last tensor of dz's dtype.
    """
    out, shape = new_output(tuple(dz.shape), dz), shape_of(dz, 2 + (q is not None) + (identity is not None), 0)

    def run(config: Config) -> Tensor:
        return raw_gradient(dz, y, a, q, k, identity, config)

    launch_tiles(
        affine_kernel, choose(channel_tiles.__name__, shape, dz.device, config, run), shape,
        dz=dz, y=None if q is None else y, identity=identity, out=out, a=a, q=q, k=k,
        pixels=shape.pixels, UPCAST=interpreting(),
    )  # fmt: skip
    return out


@fitting
def image_parts(term: ReadMap, times: Tensor | None = None, share: float = 1.0, config: Config | None = None) -> Tensor:
    """Parts of `share * sum(read(x) * times)` over the pixels of each image; the term has no factor.

    Returns (N, T, C) float32 values, whose sums over T are the sums.
    """
    x = term.x
    shape = shape_of(x, 1 + (times is not None), 1, each_image=True)

    def run(config: Config) -> Tensor:
        return image_parts(term, times, share, config)

    config = choose(channel_tiles.__name__, shape, x.device, config, run)
    parts = new_sums((shape.images, tiles(config, shape), shape.channels), x)
    launch_tiles(
        image_kernel, config, shape,
        x=x, mean=term.mean, var=term.var, weight=term.weight, bias=term.bias, times=times, parts=parts,
        eps=term.eps, share=share, tiles=parts.shape[1], image_pixels=shape.pixels, ACTIVATION=term.activation,
    )  # fmt: skip
    return parts
