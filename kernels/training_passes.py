"""Passes of a training step over one map:

raw_gradient    out[p, c] = a[c] * dz[p, c] + q[c] * y[p, c] + k[c] + identity[p, c]
image_parts     out[n, c] = share * sum over an image of read(x)[p, c] * times[p, c]

The first is the gradient of a raw map from that of the normalised one; the second are the means and the gradient of
squeeze-and-excitation. `read` is that of `training_join`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import (
    Config,
    chosen_tiles,
    launch_of,
    load,
    new_sums,
    norm_of,
    normalised,
    place_of,
    store,
    tiles,
)
from .common import SIZES, Launch, activate, interpreting, new_output
from .tables import Chosen, announce, fitting, planned
from .training_join import Form, ReadMap


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


@planned
def _plan_affine(
    size: torch.Size, dtype: torch.dtype, device: torch.device, slope: bool, identity: bool, config: Config | None
) -> tuple[Chosen, Launch]:
    """The choice, and what launches it."""
    choice = chosen_tiles(size, dtype, device, 2 + slope + identity, 0, config)
    return choice, launch_of(affine_kernel, choice, choice.shape.pixels, UPCAST=interpreting())


@planned
def _plan_image(
    size: torch.Size, device: torch.device, form: Form, times: bool, share: float, config: Config | None
) -> tuple[Chosen, tuple[int, int, int], Launch]:
    """The choice, the size of the parts, and what launches it."""
    choice = chosen_tiles(size, form.dtype, device, 1 + times, 1, config, each_image=True)
    shape, count = choice.shape, tiles(choice.config, choice.shape)
    sizes = (form.eps, share, count, shape.pixels)
    launch = launch_of(image_kernel, choice, *sizes, ACTIVATION=form.activation)
    return choice, (shape.images, count, shape.channels), launch


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
    choice, launch = _plan_affine(dz.shape, dz.dtype, dz.device, q is not None, identity is not None, config)

    def run(config: Config) -> Tensor:
        return raw_gradient(dz, y, a, q, k, identity, config)

    announce(choice, run)
    out = new_output(dz.shape, dz)
    launch(dz, None if q is None else y, identity, out, a, q, k)
    return out


@fitting
def image_parts(term: ReadMap, times: Tensor | None = None, share: float = 1.0, config: Config | None = None) -> Tensor:
    """Parts of `share * sum(read(x) * times)` over the pixels of each image; the term has no factor, and `times` x's
    dtype.

    Returns (N, T, C) float32 values, whose sums over T are the sums.
    """
    x = term.x
    choice, size, launch = _plan_image(x.shape, x.device, term.form(), times is not None, share, config)

    def run(config: Config) -> Tensor:
        return image_parts(term, times, share, config)

    announce(choice, run)
    parts = new_sums(size, x)
    launch(x, term.mean, term.var, term.weight, term.bias, times, parts)
    return parts
