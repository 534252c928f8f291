"""The passes of a training step over feature maps, on the framework's own calls.

A convolution leaves its result raw, and whoever reads the map normalises and activates it on the way:
`activation((x - mean) / sqrt(var + eps) * weight + bias)`. Backward, the gradient of a raw map is an affine function of
the gradient of the normalised one and of the map itself, and is formed where it is read as well. On a CPU the passes
that belong together run on some images at a time, so that what one writes the next still finds in the cache
(docs/training.md).

All maps are channels_last, but images may come in any layout; nothing is written to an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .activations import ACTIVATIONS
from .operands import Arriving, ConvGradients, Excite, Filter, Norm, Own, Sums, Term

_PART_BYTES = 4e6
"""How many bytes of one map a thread takes at a time (docs/training.md)."""

_LANES = 16
_PIXELS = 512
"""Sums over pixels take channels in multiples of `_LANES`, in maps of so many pixels and more."""

_COLUMNS = 1024
_FEW = 256
"""How many sums of a gradient torch makes at once, in maps of so many pixels and more."""

_LAST = torch.channels_last
_ALL = slice(None)


def parts(x: Tensor, wider: float = 1.0) -> list[slice]:
    """The images to take at a time, so that a thread has `_PART_BYTES` of x, or of a map so many times as large if that
    is more. On a GPU, all.
    """
    n = x.shape[0]
    if not x.is_cpu or n == 1:
        return [_ALL]
    step = max(1, int(_PART_BYTES * torch.get_num_threads() * n / (x.nbytes * max(wider, 1.0))))
    if step >= n:
        return [_ALL]
    step = -(-n // -(-n // step))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def of(x: Tensor | None, part: slice) -> Tensor | None:
    """Some images."""
    return x if part is _ALL or x is None else x[part]


def _laid_out(x: Tensor, part: slice) -> Tensor:
    """Some images, in channels_last whatever the layout of all."""
    return of(x, part).contiguous(memory_format=_LAST)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_LAST)


def normaliser(norm: Norm, like: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes of images their values after a norm, before its activation: new tensors.

    On a CPU one pass of `x * scale + shift` is faster than torch's own (docs/training.md), which however is the one
    that reads 16 bits and computes in 32.
    """
    if not like.is_cpu or like.dtype != norm.mean.dtype:
        facts = (norm.weight, norm.bias, norm.mean, norm.var, False, 0.0, norm.eps)
        return lambda x: torch.native_batch_norm(x, *facts)[0]
    scale, shift = (t.view(1, -1, 1, 1) for t in norm.affine())
    return lambda x: torch.addcmul(shift, x, scale)


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """The map after its norm, before its activation: a new tensor."""
    return normaliser(norm, x)(x)


def _activated(z: Tensor, activation: str, keep: bool = False) -> Tensor:
    """The activation of z, in z's memory unless it is to be kept."""
    one = ACTIVATIONS[activation]
    return one.function(z) if keep and not one.from_output else one.in_place(z)


def _inactivated(grad: Tensor, z: Tensor, a: Tensor, activation: str, out: Tensor) -> None:
    """The gradient before an activation into `out`, which may be its own memory, from that behind it."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, a, 0, grad_input=out)
    elif activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=out)
    elif activation != "none":
        out.copy_(ACTIVATIONS[activation].gradient(grad, z))
    elif out is not grad:
        out.copy_(grad)


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


def _sums(grad: Tensor, x: Tensor, norm: Norm) -> Sums:
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


def _total(found: Sequence[Sums]) -> Sums:
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


class Statistics:
    """Mean and variance of a map that comes in parts."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []
        self.counts: list[int] = []

    def add(self, x: Tensor, copy: Tensor | None = None) -> None:
        """Take some images, and copy them where a copy is wanted."""
        if copy is not None:
            copy.copy_(x)
        found = _measured(x)
        self.found += found
        self.counts += [x.shape[0] * _LANES // len(found)] * len(found)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Those of all images."""
        return merged(self.found, self.counts)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in float32 at least."""
    found = Statistics()
    for part in parts(x):
        found.add(of(x, part))
    return found.merged()


class Gate:
    """Squeeze-and-excitation's gate from the channel means of some images, and its gradients."""

    def __init__(self, means: Tensor, excite: Excite):
        self.means, self.excite = means, excite
        self.before = F.linear(means, excite.fc1, excite.bias1)
        self.hidden = reference.activate(self.before, excite.activation)
        self.gate = torch.sigmoid(F.linear(self.hidden, excite.fc2, excite.bias2))

    def backward(self, dgate: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradients of the means and of the four parameters."""
        fc1, _, fc2, _, activation, _ = self.excite
        d2 = dgate * self.gate * (1 - self.gate)
        dhidden = d2 @ fc2
        d1 = torch.empty_like(dhidden)
        _inactivated(dhidden, self.before, self.hidden, activation, d1)
        return d1 @ fc1, (d1.t() @ self.means, d1.sum(0), d2.t() @ self.hidden, d2.sum(0))


def known_means(excite: Excite, part: slice) -> Tensor | None:
    """The channel means of some images, where the forward pass left them."""
    return of(excite.means[0], part) if excite.means else None


class _Gated:
    """A map and its gate."""

    def __init__(self, a: Tensor, excite: Excite, means: Tensor | None = None):
        self.a = a
        self.gate = Gate(a.mean((2, 3), dtype=excite.fc1.dtype) if means is None else means, excite)
        self.factor = self.gate.gate.to(a.dtype)[:, :, None, None]

    def backward(self, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradient of the map from that of the gated map, in its memory, and of the four parameters."""
        dgate = (grad * self.a).sum((2, 3), dtype=self.gate.gate.dtype)
        dmeans, found = self.gate.backward(dgate)
        dmeans = dmeans / (self.a.shape[2] * self.a.shape[3])
        return torch.addcmul(dmeans.to(grad.dtype)[:, :, None, None], grad, self.factor, out=grad), found


class Reader:
    """How convolutions read a map, some images at a time: `excite(activation(norm(x)))`."""

    def __init__(self, x: Tensor, norm: Norm | None, excite: Excite | None):
        self.x, self.norm, self.excite = x, norm, excite
        self.normalise = None if norm is None else normaliser(norm, x)

    def read(self, part: slice) -> Tensor:
        """Some images as they are read, to be used before the next ones are."""
        a = _laid_out(self.x, part)
        a = a if self.norm is None else _activated(self.normalise(a), self.norm.activation)
        if self.excite is None:
            return a
        gated = _Gated(a, self.excite)
        if self.excite.means is not None:
            self.excite.means.append(gated.gate.means)
        return a * gated.factor if self.norm is None else a.mul_(gated.factor)


class BackwardReader(Reader):
    """A reader that takes gradients of what it read back through squeeze-excite and the activation."""

    def __init__(self, x: Tensor, norm: Norm | None, excite: Excite | None):
        super().__init__(x, norm, excite)
        self.sums: list[Sums] = []
        self.excited: list[tuple[Tensor, ...]] = []

    def read(self, part: slice) -> Tensor:
        self.raw = self.z = self.a = e = _laid_out(self.x, part)
        if self.norm is not None:
            self.z = self.normalise(self.raw)
            self.a = e = _activated(self.z, self.norm.activation, keep=True)
        if self.excite is not None:
            self.gate = _Gated(self.a, self.excite, known_means(self.excite, part))
            e = self.a * self.gate.factor
        return e

    def back(self, grad: Tensor, out: Tensor, through: bool) -> None:
        """The gradient of the images read last, into `out`: `through` norm and activation, with the norm's sums, or of
        the map before squeeze-excite. `grad` may be `out`, and is used up.
        """
        if self.excite is not None:
            grad, found = self.gate.backward(grad)
            self.excited.append(found)
        _inactivated(grad, self.z, self.a, self.norm.activation if through else "none", out)
        if through:
            self.sums.append(_sums(out, self.raw, self.norm))

    def totals(self) -> tuple[Sums | None, tuple[Tensor, ...] | None]:
        """The norm's sums and the gradients of squeeze-excite's parameters, of all images."""
        excited = tuple(summed(found) for found in zip(*self.excited, strict=True)) if self.excited else None
        return _total(self.sums) if self.sums else None, excited


class Calls(NamedTuple):
    """What the convolutions of a training step are made with besides themselves."""

    reader: type[Reader]
    backward_reader: type[BackwardReader]
    statistics: type[Statistics]
    raw_gradient: Callable[[Own], Callable[[Tensor, Tensor], Tensor]]


def raw_gradient(grad: Tensor, y: Tensor, coefficients: tuple[Tensor, Tensor | None, Tensor | None]) -> Tensor:
    """`a * dz + q * y + k` in a new tensor of the gradient's dtype."""
    a, q, k = coefficients
    found = grad * a if q is None else torch.addcmul(k, y, q).addcmul_(grad, a)
    return found.to(grad.dtype)


def _raw_gradients(own: Own) -> Callable[[Tensor, Tensor], Tensor]:
    coefficients = own.coefficients()
    return lambda grad, y: raw_gradient(grad, y, coefficients)


FRAMEWORK = Calls(Reader, BackwardReader, Statistics, _raw_gradients)


def convs(
    x: Tensor,
    norm: Norm | None,
    excite: Excite | None,
    filters: Sequence[Filter],
    measured: Sequence[bool],
    calls: Calls = FRAMEWORK,
) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
    """For every filter `conv2d(excite(activation(norm(x))), weight, None, *geometry)`, and its channels' mean and
    variance where they are measured. The map is read once.
    """
    wider = max(weight.shape[0] / (x.shape[1] * stride[0] * stride[1]) for weight, (stride, *_) in filters)
    reader = calls.reader(x, norm, excite)
    results: list[Tensor | None] = [None] * len(filters)
    found = [calls.statistics() if taken else None for taken in measured]
    for part in parts(x, wider):
        a = reader.read(part)
        for i, (weight, geometry) in enumerate(filters):
            y = torch.conv2d(a, weight, None, *geometry)
            y = y.contiguous(memory_format=_LAST)  # which the result of a map of one channel need not be
            copy = None
            if part is _ALL:
                results[i] = y
            else:
                if results[i] is None:
                    results[i] = _empty((x.shape[0], *y.shape[1:]), y)
                copy = results[i][part]
            if measured[i]:
                found[i].add(y, copy)
            elif copy is not None:
                copy.copy_(y)
    return [(y, None if s is None else s.merged()) for y, s in zip(results, found, strict=True)]


def convs_backward(
    arriving: Sequence[Arriving],
    x: Tensor,
    norm: Norm | None,
    excite: Excite | None,
    filters: Sequence[Filter],
    needs_x: bool,
    needs_weights: Sequence[bool],
    through: bool = True,
    calls: Calls = FRAMEWORK,
) -> ConvGradients:
    """The gradients of `convs`. The gradient of x goes `through` its norm, or is that of the map that was read."""
    raw_gradients = [None if own is None else calls.raw_gradient(own) for _, own, _ in arriving]
    cut = parts(x, max(grad.nbytes for grad, _, _ in arriving) / x.nbytes)
    reader = calls.backward_reader(x, norm, excite)
    dx = _empty(x.shape, x) if needs_x and len(cut) > 1 else None
    dweights: list[Tensor | None] = [None] * len(filters)
    for part in cut:
        e, de = reader.read(part), None
        for i, (grad, _, y) in enumerate(arriving):
            dy = of(grad, part)
            dy = dy if raw_gradients[i] is None else raw_gradients[i](dy, of(y, part))
            one, dw = convolution_backward(dy, e, *filters[i], needs_x, needs_weights[i])
            if needs_x:
                one = one.contiguous(memory_format=_LAST)
                de = one if de is None else de.add_(one)
            if needs_weights[i]:
                dw = dw if part is _ALL else dw.to(torch.promote_types(dw.dtype, torch.float32))
                dweights[i] = dw if dweights[i] is None else dweights[i].add_(dw)
        if needs_x:
            dx = de if part is _ALL else dx
            reader.back(de, of(dx, part), through and norm is not None)
    dweights = [
        None if dw is None else _as_laid_out(dw, weight) for dw, (weight, _) in zip(dweights, filters, strict=True)
    ]
    sums, excited = reader.totals()
    return ConvGradients(dx, sums, dweights, excited)


def _as_laid_out(dweight: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight in its dtype; of a 1x1 convolution in its strides, so that autograd need not copy it."""
    dweight = dweight.to(weight.dtype)
    if weight.shape[2:] == (1, 1) and _rows(weight) and _rows(dweight):
        return dweight.as_strided(weight.shape, weight.stride())
    return dweight


def _rows(weight: Tensor) -> bool:
    """Whether the channels of each output channel of a 1x1 convolution lie together, one output after another."""
    return weight.stride()[:2] == (weight.shape[1], 1)


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Sequence, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight of a convolution alone."""
    stride, padding, dilation, groups = geometry
    if needs_weight and x.is_cpu and weight.shape[2:] == (1, 1) and weight.shape[1] < 16 and groups == 1:
        # oneDNN writes beyond its memory for the weights of a strided 1x1 convolution of RGB images (docs/training.md).
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
        rows = padded[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        dw = (dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1]).t() @ rows).view(weight.shape)
        return convolution_backward(dy, x, weight, geometry, True, False)[0] if needs_x else None, dw
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [needs_x, needs_weight, False]
    )
    return dx, dw


_Normalise = Callable[[Tensor], Tensor] | None


def _normalisers(terms: Sequence[Term]) -> list[_Normalise]:
    return [None if norm is None else normaliser(norm, x) for x, norm, _ in terms]


def _value(term: Term, normalise: _Normalise, part: slice) -> tuple[Tensor, bool]:
    """A term as it is added, and whether it is a new tensor."""
    x, norm, factor = term
    value = of(x, part)
    if norm is not None:
        value = _activated(normalise(value), norm.activation)
    if factor is not None:
        value = value * of(factor, part)
    return value, norm is not None or factor is not None


def _added(terms: Sequence[Term], normalisers: Sequence[_Normalise], part: slice, out: Tensor | None) -> Tensor:
    """The sum of the terms, into `out` or into new memory."""
    (total, new), *others = [_value(*term, part) for term in zip(terms, normalisers, strict=True)]
    if out is None:
        out = total if new else next((value for value, new in others[:1] if new), None)
    if not others:
        return total.clone() if out is None else total if out is total else out.copy_(total)
    for value, _ in others:
        total = torch.add(total, value, out=out)
        out = total
    return total


def join(terms: Sequence[Term], activation: str) -> Tensor:
    """`activation(sum(factor * read(x)))` of some terms: a new map."""
    cut, normalisers = parts(terms[0].x), _normalisers(terms)
    if len(cut) == 1:
        return _activated(_added(terms, normalisers, _ALL, None), activation)
    y = _empty(terms[0].x.shape, terms[0].x)
    for part in cut:
        _activated(_added(terms, normalisers, part, y[part]), activation)
    return y


def join_backward(
    grad: Tensor, y: Tensor, terms: Sequence[Term], activation: str, needs: Sequence[bool]
) -> list[tuple[Tensor | None, Sums | None]]:
    """For every term the gradient of the map as it is read (before its own activation), and its norm's sums."""
    cut, normalisers = parts(grad), _normalisers(terms)
    summed = grad if activation == "none" else _empty(grad.shape, grad)
    shared = [term.factor is None and (term.norm is None or term.norm.activation == "none") for term in terms]
    results = [
        None if not need else summed if same else _empty(grad.shape, grad)
        for need, same in zip(needs, shared, strict=True)
    ]
    sums: list[list[Sums]] = [[] for _ in terms]
    for part in cut:
        d = of(summed, part)
        if activation != "none":
            z = None if activation == "relu" else _added(terms, normalisers, part, None)
            _inactivated(of(grad, part), z, None if y is None else of(y, part), activation, d)
        for i, (x, norm, factor) in enumerate(terms):
            if results[i] is None:
                continue
            read, out = of(x, part), of(results[i], part)
            if results[i] is not summed:
                z = a = None
                if norm is not None and norm.activation != "none":
                    z = normalisers[i](read)
                    a = _activated(z, norm.activation, keep=True)
                one = d if factor is None else d * of(factor, part)
                _inactivated(one, z, a, "none" if norm is None else norm.activation, out)
            if norm is not None:
                sums[i].append(_sums(out, read, norm))
    return [(found, _total(s) if s else None) for found, s in zip(results, sums, strict=True)]


def entered_backward(grad: Tensor, own: Own, x: Tensor, identity: Tensor | None) -> Tensor:
    """The gradient of a map that was normalised, from that of the normalised map; plus `identity`."""
    coefficients = own.coefficients()
    cut = parts(x)
    dx = None if len(cut) == 1 else _empty(x.shape, x)
    for part in cut:
        one = raw_gradient(of(grad, part), of(x, part), coefficients)
        one = one if identity is None else one.add_(of(identity, part))
        if dx is None:
            return one
        dx[part] = one
    return dx
