"""Sums over the pixels of maps on torch's calls: statistics, and the gradients of norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .operands import Norm, Sums

_LANES = 16
_PIXELS = 512
"""Sums over pixels take channels in multiples of `_LANES`, in maps of so many pixels and more."""

_COLUMNS = 1024
_FEW = 256
"""How many sums of a gradient torch makes at once, in maps of so many pixels and more."""

_LAST = torch.channels_last


def _beside(x: Tensor) -> int:
    """How many neighbouring pixels of a map to measure side by side, as one of as many times the channels.

    So that the channels fill the processor's vectors: torch's sums over pixels take up to five times as long where they
    do not (docs/training.md).
    """
    n, c, h, w = x.shape
    pixels, beside = n * h * w, _LANES // math.gcd(c, _LANES)
    if pixels < _PIXELS * beside or pixels % beside:
        return 1
    return beside if x.is_cpu and x.is_contiguous(memory_format=_LAST) else 1


@lru_cache(maxsize=4096)
def _abreast(pixels: int, channels: int) -> int:
    """How many neighbouring pixels of a gradient to sum side by side: as many as `_COLUMNS` hold, in whole vectors.

    torch adds up a column in float32, one value after another. Of a gradient that is nearly the same for all pixels, as
    that of an average pool is, each of so many columns loses so many times less.
    """
    if pixels < _FEW:
        return 1
    fit = [n for n in range(1, min(pixels, _COLUMNS // channels) + 1) if pixels % n == 0]
    return max([n for n in fit if n * channels % _LANES == 0] or fit or [1])


def _side_by_side(x: Tensor, beside: int) -> Tensor:
    """The same memory, with so many pixels as one."""
    if beside == 1:
        return x
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(1, n * h * w // beside, 1, beside * c).permute(0, 3, 1, 2)


def sums_of_norm(grad: Tensor, x: Tensor, norm: Norm) -> Sums:
    """Those of the gradient of a normalised map, from the map before its norm."""
    invstd, mean, weight = (norm.var + norm.eps).rsqrt_(), norm.mean, norm.weight
    beside = 1
    if all(t.is_cpu and t.is_contiguous(memory_format=_LAST) for t in (x, grad)):
        beside = _abreast(x.numel() // x.shape[1], x.shape[1])
    if beside > 1:
        invstd, mean, weight = (None if t is None else t.repeat(beside) for t in (invstd, mean, weight))
    grads, maps = _side_by_side(grad, beside), _side_by_side(x, beside)
    found = torch.ops.aten.native_batch_norm_backward(
        grads, maps, weight, None, None, mean, invstd, True, norm.eps, [False, True, True]
    )[1:]
    return Sums(*(found if beside == 1 else (t.view(beside, -1).sum(0) for t in found)))


def summed(found: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors, in their order."""
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def total(found: Sequence[Sums]) -> Sums:
    """Those of all parts."""
    return Sums(*(summed(one) for one in zip(*found, strict=True)))


def merged(statistics: Sequence[tuple[Tensor, Tensor]], counts: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all parts, from those of each part and how many values it has.

    Source: T. Chan, G. Golub and R. LeVeque, "Updating formulae and a pairwise algorithm", 1979.
    """
    if len(statistics) == 1:
        return statistics[0]
    means, variances = (torch.stack(t) for t in zip(*statistics, strict=True))
    share = means.new_tensor(counts)[:, None] / sum(counts)
    mean = (means * share).sum(0)
    return mean, ((variances + (means - mean).square_()) * share).sum(0)


def _measured(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance of every channel, of parts of the map that are of the same size."""
    beside = _beside(x)
    wide, running = _side_by_side(x, beside), [None, None]
    if x.dtype in (torch.bfloat16, torch.float16):  # torch gives the statistics in the dtype of the running ones
        running = [x.new_zeros(wide.shape[1], dtype=torch.float32) for _ in range(2)]
    mean, var = torch.batch_norm_update_stats(wide, *running, 0.0)
    return [(mean, var)] if beside == 1 else list(zip(mean.chunk(beside), var.chunk(beside), strict=True))


class Moments:
    """Mean and variance of a map that comes in parts."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []
        self.counts: list[int] = []

    def add(self, x: Tensor, copy: Tensor | None = None) -> None:
        """Take some images, in channels_last, and copy them where a copy is wanted."""
        if copy is not None:
            copy.copy_(x)
        found = _measured(x)
        self.found += found
        self.counts += [x.shape[0] * _LANES // len(found)] * len(found)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Those of all images."""
        return merged(self.found, self.counts)
