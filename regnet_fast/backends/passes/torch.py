"""The passes of a training step over feature maps, on the framework's own calls.

A convolution leaves its result raw, and whoever reads the map normalises and activates it on the way:
`activation((x - mean) / sqrt(var + eps) * weight + bias)`. Backward, the gradient of a raw map is an affine function of
the gradient of the normalised one and of the map itself, and is formed where it is read as well. On a CPU the passes
that belong together run on some images at a time (`parts`).

All maps are channels_last, but images may come in any layout; nothing is written to an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..activations import ACTIVATIONS
from .operands import Conv, ConvGradients, Excite, Norm, OutputGrad, OutputNorm, Sums, Term
from .parts import ALL, of, parts
from .sums import Moments, summed, sums_of_norm, total

_LAST = torch.channels_last


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


def _activated(z: Tensor, activation: str, keep: bool = False) -> Tensor:
    """The activation of z, in z's memory unless it is to be kept."""
    one = ACTIVATIONS[activation]
    return one.function(z) if keep and not one.from_output else one.in_place(z)


def activation_backward(grad: Tensor, z: Tensor | None, a: Tensor | None, activation: str, out: Tensor) -> None:
    """The gradient before an activation `a = activation(z)` into `out`, which may be grad's memory, from that behind
    it.
    """
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, a, 0, grad_input=out)
    elif activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=out)
    elif activation != "none":
        out.copy_(ACTIVATIONS[activation].gradient(grad, z))
    elif out is not grad:
        out.copy_(grad)


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
        activation_backward(dhidden, self.before, self.hidden, activation, d1)
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
        a = of(self.x, part).contiguous(memory_format=_LAST)
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
        self.raw = self.z = self.a = e = of(self.x, part).contiguous(memory_format=_LAST)
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
        activation_backward(grad, self.z, self.a, self.norm.activation if through else "none", out)
        if through:
            self.sums.append(sums_of_norm(out, self.raw, self.norm))

    def totals(self) -> tuple[Sums | None, tuple[Tensor, ...] | None]:
        """The norm's sums and the gradients of squeeze-excite's parameters, of all images."""
        excited = tuple(summed(found) for found in zip(*self.excited, strict=True)) if self.excited else None
        return total(self.sums) if self.sums else None, excited


class GradientReader:
    """How a convolution's backward reads the gradient of its raw result, some images at a time."""

    def __init__(self, grad: Tensor, norm: OutputNorm | None, y: Tensor | None):
        self.grad, self.y = grad, y
        self.coefficients = None
        if norm is not None:
            self.coefficients = [None if t is None else t.view(1, -1, 1, 1) for t in norm.coefficients()]

    def read(self, part: slice, plus: Tensor | None = None) -> Tensor:
        """Some images of it, `plus` what is given of all, until the next ones are."""
        grad = of(self.grad, part)
        if self.coefficients is None:
            return grad
        a, q, k = self.coefficients
        found = grad * a if q is None else torch.addcmul(k, of(self.y, part), q).addcmul_(grad, a)
        found = found.to(grad.dtype)
        return found if plus is None else found.add_(of(plus, part))


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


class Passes:
    """The passes of a training step. A subclass brings its own way to read maps and gradients and to take moments, or
    whole operations of its own.
    """

    reader = Reader
    backward_reader = BackwardReader
    gradient_reader = GradientReader
    moments = Moments

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every channel, in float32 at least."""
        found = self.moments()
        for part in parts(x):
            found.add(of(x, part))
        return found.merged()

    def convs(
        self, x: Tensor, norm: Norm | None, excite: Excite | None, convs: Sequence[Conv], measured: Sequence[bool]
    ) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """For every convolution `conv2d(excite(activation(norm(x))), weight, None, *geometry)`, and its channels' mean
        and variance where they are measured. The map is read once.
        """
        wider = max([weight.shape[0] / (x.shape[1] * stride[0] * stride[1]) for weight, (stride, *_) in convs])
        reader = self.reader(x, norm, excite)
        results: list[Tensor | None] = [None] * len(convs)
        moments = [self.moments() if taken else None for taken in measured]
        for part in parts(x, wider):
            a = reader.read(part)
            for i, (weight, geometry) in enumerate(convs):
                y = torch.conv2d(a, weight, None, *geometry)
                y = y.contiguous(memory_format=_LAST)  # which the result of a map of one channel need not be
                copy = None
                if part is ALL:
                    results[i] = y
                else:
                    if results[i] is None:
                        results[i] = _empty((x.shape[0], *y.shape[1:]), y)
                    copy = results[i][part]
                if measured[i]:
                    moments[i].add(y, copy)
                elif copy is not None:
                    copy.copy_(y)
        return [(y, None if one is None else one.merged()) for y, one in zip(results, moments, strict=True)]

    def convs_backward(
        self,
        grads: Sequence[OutputGrad],
        x: Tensor,
        norm: Norm | None,
        excite: Excite | None,
        convs: Sequence[Conv],
        needs_x: bool,
        needs_weights: Sequence[bool],
        through: bool = True,
    ) -> ConvGradients:
        """The gradients of `convs`. The gradient of x goes `through` its norm, or is that of the map that was read."""
        arriving = [self.gradient_reader(*one) for one in grads]
        cut = parts(x, max([one.grad.nbytes for one in grads]) / x.nbytes)
        reader = self.backward_reader(x, norm, excite)
        dx = _empty(x.shape, x) if needs_x and len(cut) > 1 else None
        dweights: list[Tensor | None] = [None] * len(convs)
        for part in cut:
            e, de = reader.read(part), None
            for i, one in enumerate(arriving):
                da, dw = convolution_backward(one.read(part), e, *convs[i], needs_x, needs_weights[i])
                if needs_x:
                    da = da.contiguous(memory_format=_LAST)
                    de = da if de is None else de.add_(da)
                if needs_weights[i]:
                    dw = dw if part is ALL else dw.to(torch.promote_types(dw.dtype, torch.float32))
                    dweights[i] = dw if dweights[i] is None else dweights[i].add_(dw)
            if needs_x:
                dx = de if part is ALL else dx
                reader.back(de, of(dx, part), through and norm is not None)
        dweights = [
            None if dw is None else _as_laid_out(dw, weight) for dw, (weight, _) in zip(dweights, convs, strict=True)
        ]
        return ConvGradients(dx, *reader.totals(), dweights)

    def join(self, terms: Sequence[Term], activation: str) -> Tensor:
        """`activation(sum(factor * read(x)))` of some terms: a new map."""
        cut, normalisers = parts(terms[0].x), _normalisers(terms)
        if len(cut) == 1:
            return _activated(_added(terms, normalisers, ALL, None), activation)
        y = _empty(terms[0].x.shape, terms[0].x)
        for part in cut:
            _activated(_added(terms, normalisers, part, y[part]), activation)
        return y

    def join_backward(
        self, grad: Tensor, y: Tensor | None, terms: Sequence[Term], activation: str, needs: Sequence[bool]
    ) -> list[tuple[Tensor | None, Sums | None]]:
        """For every term the gradient of the map as it is read (before its own activation), and its norm's sums."""
        cut, normalisers = parts(grad), _normalisers(terms)
        shared = grad if activation == "none" else _empty(grad.shape, grad)
        results = [
            None if not need else shared if is_shared(term) else _empty(grad.shape, grad)
            for need, term in zip(needs, terms, strict=True)
        ]
        sums: list[list[Sums]] = [[] for _ in terms]
        for part in cut:
            d = of(shared, part)
            if activation != "none":
                z = None if activation == "relu" else _added(terms, normalisers, part, None)
                activation_backward(of(grad, part), z, of(y, part), activation, d)
            for i, (x, norm, factor) in enumerate(terms):
                if results[i] is None:
                    continue
                read, out = of(x, part), of(results[i], part)
                if results[i] is not shared:
                    z = a = None
                    if norm is not None and norm.activation != "none":
                        z = normalisers[i](read)
                        a = _activated(z, norm.activation, keep=True)
                    one = d if factor is None else d * of(factor, part)
                    activation_backward(one, z, a, "none" if norm is None else norm.activation, out)
                if norm is not None:
                    sums[i].append(sums_of_norm(out, read, norm))
        return [(found, total(s) if s else None) for found, s in zip(results, sums, strict=True)]

    def entered_backward(self, grad: Tensor, norm: OutputNorm, x: Tensor, identity: Tensor | None) -> Tensor:
        """The gradient of a map that was normalised, from that of the normalised map; plus `identity`."""
        arriving, cut = self.gradient_reader(grad, norm, x), parts(x)
        if len(cut) == 1:
            return arriving.read(ALL, identity)
        dx = _empty(x.shape, x)
        for part in cut:
            dx[part] = arriving.read(part, identity)
        return dx


def is_shared(term: Term) -> bool:
    """Whether a term's gradient is that of the sum."""
    return term.factor is None and (term.norm is None or term.norm.activation == "none")
