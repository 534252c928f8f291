"""The operations of a training step as registered operators, which compilers take as they are.

Each has the functions of `backends.passes` for its forward and its gradient, over plain lists of tensors, and the
convention of `ops.training` for gradients. Two things differ:

- The result of an operator is never its argument, so that a map that enters a block is not handed on as another tensor:
  who reads it through its norm is told by `reading`, and gives the gradient of the map itself.
- Statistics are those of one process.

In the schemas a geometry is seven integers: stride, padding, dilation (pairs) and groups; a norm is mean, variance,
weight and bias, and a map that is read as it is has none; `forced` is the backend that is forced, or "auto".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ..backends import backend
from ..backends.operands import Arriving, Excite, Filter, Norm, Own, Sums, Term
from ..backends.training import passes_for
from .convolution import channels_last, empty_output

_LAST = torch.channels_last
_NORM, _GEOMETRY, _STATISTICS = 4, 7, 2
RAW, NORMED, BATCH, GIVEN = range(4)
"""What `reading` says of a map: it is read as it is; through the norm of the operation that made it; or it entered, and
is read through a norm with the batch's statistics, or with given ones."""


def _operator(schema: str) -> Callable:
    """A function as the operator of such a schema."""
    name = schema.partition("(")[0]

    def register(function: Callable) -> Callable:
        return torch.library.custom_op(f"regnet_fast::{name}", function, mutates_args=(), schema=schema[len(name) :])

    return register


@contextmanager
def _serving(forced: str, x: Tensor) -> Iterator[ModuleType]:
    """The passes of the forced backend, in the dtypes of their arguments."""
    with backend(forced), torch.autocast(x.device.type, enabled=False):
        yield passes_for(x)


def _sliced(found: Sequence, length: int) -> list[Sequence]:
    return [found[i : i + length] for i in range(0, len(found), length)]


def _norm(norm: Sequence[Tensor], eps: float, activation: str) -> Norm | None:
    return Norm(*norm, eps, activation) if norm else None


def _norms(norms: Sequence[Tensor], reading: Sequence[int]) -> list[Sequence[Tensor]]:
    """The norm of each map, empty where there is none."""
    rest = iter(norms)
    return [[] if how == RAW else [next(rest) for _ in range(_NORM)] for how in reading]


def _filters(weights: Sequence[Tensor], geometries: Sequence[int]) -> list[Filter]:
    return [
        Filter(weight, (tuple(g[0:2]), tuple(g[2:4]), tuple(g[4:6]), g[6]))
        for weight, g in zip(weights, _sliced(geometries, _GEOMETRY), strict=True)
    ]


def _count(x: Tensor) -> float:
    return x.numel() / x.shape[1]


def _empty_statistics(channels: int, x: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [torch.empty(channels, dtype=dtype, device=x.device) for _ in range(_STATISTICS)]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_LAST)


def _like(dw: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight in the weight's layout."""
    return dw if dw.stride() == weight.stride() else torch.empty_like(weight).copy_(dw)


def _split(found: Sequence, lengths: Sequence[int]) -> list[list]:
    """The list cut into pieces of such lengths."""
    rest = iter(found)
    return [[next(rest) for _ in range(length)] for length in lengths]


def _itself(serving: ModuleType, dz: Tensor, sums: Sums, x: Tensor, norm: Norm, reading: int) -> Tensor:
    """The gradient of a map that entered, from that of the normalised map."""
    own = Own(norm.mean, norm.var, norm.weight, norm.eps, sums if reading == BATCH else None, _count(x))
    return serving.entered_backward(dz, own, x, None)


def _of_norm(sums: Sequence[Tensor], reading: int) -> list[Tensor | None]:
    """The gradients of a norm, in the convention of `ops.training`."""
    return [*(sums if reading == NORMED else (None, None)), *sums]


def _none(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """No gradients for a list, as autograd wants to have it: a list with None in it counts as one argument."""
    return None if any(t is None for t in tensors) else [None] * len(tensors)


# Entering


@_operator("training_enter(Tensor x, str forced) -> (Tensor, Tensor)")
def enter(x, forced):
    """Mean and biased variance of every channel of a map, whose gradient its readers give."""
    with _serving(forced, x) as serving:
        mean, var = serving.statistics(x)
    return mean, var


@enter.register_fake
def _enter_fake(x, forced):
    return tuple(_empty_statistics(x.shape[1], x))


enter.register_autograd(lambda ctx, dmean, dvar: (None, None), setup_context=lambda ctx, inputs, output: None)


# Convolutions of one map

_READ = "Tensor x, Tensor[] norm, float eps, str activation, int reading, Tensor[] excite, str se_activation"
_CONVS = f"{_READ}, Tensor[] weights, int[] geometries, Tensor?[] own, float[] own_eps, bool[] batch, str forced"


@_operator(f"training_convs({_CONVS}) -> Tensor[]")
def convs(x, norm, eps, activation, reading, excite, se_activation, weights, geometries, own, own_eps, batch, forced):
    """`passes.convs`: every raw result, with its mean and variance where `batch` says that its norm takes them.

    `own` has three entries for each convolution: the weight of its norm, and the given mean and variance.
    """
    squeeze = Excite(*excite, se_activation) if excite else None
    with _serving(forced, x) as serving:
        found = serving.convs(x, _norm(norm, eps, activation), squeeze, _filters(weights, geometries), batch)
    return [t for y, seen in found for t in (y, *(seen or ()))]


@convs.register_fake
def _convs_fake(
    x, norm, eps, activation, reading, excite, se_activation, weights, geometries, own, own_eps, batch, forced
):
    results = []
    for (weight, geometry), taken in zip(_filters(weights, geometries), batch, strict=True):
        results.append(empty_output(x, weight, *geometry[:3]))
        results += _empty_statistics(weight.shape[0], x) if taken else []
    return results


_CONVS_BACKWARD = "Tensor[] grads, Tensor?[] maps, Tensor?[] sums, bool needs_x, bool[] needs_weights"


@_operator(f"training_convs_backward({_CONVS_BACKWARD}, {_CONVS}) -> Tensor[]")
def convs_backward(
    grads, maps, sums, needs_x, needs_weights, x, norm, eps, activation, reading, excite, se_activation, weights,
    geometries, own, own_eps, batch, forced,
):  # fmt: skip
    """`passes.convs_backward`: the gradients of x, of its norm's sums, of squeeze-excite and of the weights, as far as
    there are such and they are needed. `maps` and `sums` are the raw results and the gradients of mean and variance.
    """
    read = _norm(norm, eps, activation)
    squeeze = Excite(*excite, se_activation) if excite else None
    arriving = []
    rows = zip(grads, maps, _sliced(sums, 2), _sliced(own, 3), own_eps, batch, strict=True)
    for grad, y, arrived, (weight, mean, var), eps_i, taken in rows:
        behind = None
        if mean is not None:
            behind = Own(mean, var, weight, eps_i, Sums(*arrived) if taken else None, _count(grad))
        arriving.append(Arriving(grad.contiguous(memory_format=_LAST), behind, y))
    with _serving(forced, x) as serving:
        filters = _filters(weights, geometries)
        found = serving.convs_backward(arriving, x, read, squeeze, filters, needs_x, needs_weights)
        dx = found.x
        if needs_x and reading in (BATCH, GIVEN):
            dx = _itself(serving, dx, found.sums, x, read, reading)
    results = [] if dx is None else [channels_last(dx)]
    results += [] if found.sums is None else [t.to(read.mean.dtype) for t in found.sums]
    results += [] if found.excite is None else [g.to(t.dtype) for g, t in zip(found.excite, excite, strict=True)]
    return results + [_like(dw, w) for dw, w in zip(found.weights, weights, strict=True) if dw is not None]


@convs_backward.register_fake
def _convs_backward_fake(
    grads, maps, sums, needs_x, needs_weights, x, norm, eps, activation, reading, excite, se_activation, weights,
    geometries, own, own_eps, batch, forced,
):  # fmt: skip
    results = []
    if needs_x:
        results += [_empty_like(x), *map(torch.empty_like, (*norm[:2], *excite))]
    return results + [torch.empty_like(w) for w, need in zip(weights, needs_weights, strict=True) if need]


def _convs_setup(ctx, inputs, output):
    x, norm, eps, activation, reading, excite, se_activation, weights, geometries, own, own_eps, batch, forced = inputs
    results, kept = iter(output), []
    for i, taken in enumerate(batch):
        y = next(results)
        own_weight, mean, var = own[3 * i : 3 * i + 3]
        kept += [y, own_weight, next(results), next(results)] if taken else [None, own_weight, mean, var]
    ctx.save_for_backward(x, *norm, *excite, *weights, *kept)
    ctx.counts = len(norm), len(excite), len(weights), len(kept)
    ctx.facts = eps, activation, reading, se_activation, geometries, own_eps, batch, forced
    ctx.none = _none(own)


def _convs_gradients(ctx, gradients):
    eps, activation, reading, se_activation, geometries, own_eps, batch, forced = ctx.facts
    x, *rest = ctx.saved_tensors
    norm, excite, weights, kept = _split(rest, ctx.counts)
    results, grads, sums = iter(gradients), [], []
    for taken in batch:
        grads.append(next(results))
        sums += [next(results), next(results)] if taken else [None, None]
    kept = _sliced(kept, 4)
    of_x, of_norm, *_, of_excite, _, needs_weights = ctx.needs_input_grad[:8]
    needs_x = any((of_x, *of_norm, *of_excite))
    arguments = (grads, [one[0] for one in kept], sums, needs_x, needs_weights)
    read = (x, norm, eps, activation, reading, excite, se_activation)
    behind = ([t for one in kept for t in one[1:]], own_eps, batch)
    found = iter(convs_backward(*arguments, *read, weights, geometries, *behind, forced))
    dx, dnorm, dexcite = None, [None] * len(norm), [None] * len(excite)
    if needs_x:
        dx = next(found)
        if norm:
            dnorm = _of_norm((next(found), next(found)), reading)
        dexcite = [next(found) for _ in excite]
    dweights = [next(found) if need else None for need in needs_weights]
    return dx, dnorm, None, None, None, dexcite, None, dweights, None, ctx.none, None, None, None


convs.register_autograd(_convs_gradients, setup_context=_convs_setup)


# Joins

_JOIN = "Tensor[] maps, Tensor[] norms, float[] eps, str activations, int[] reading, Tensor?[] factors"


@_operator(f"training_join({_JOIN}, str activation, str forced) -> Tensor")
def join(maps, norms, eps, activations, reading, factors, activation, forced):
    """`passes.join` of one or two terms; `activations` are the terms' own, with spaces."""
    with _serving(forced, maps[0]) as serving:
        return channels_last(serving.join(_terms(maps, norms, eps, activations, reading, factors), activation))


@join.register_fake
def _join_fake(maps, norms, eps, activations, reading, factors, activation, forced):
    return _empty_like(maps[0])


def _terms(maps, norms, eps, activations, reading, factors) -> list[Term]:
    rows = zip(maps, _norms(norms, reading), eps, activations.split(), factors, strict=True)
    return [Term(x, _norm(norm, eps_i, own), factor) for x, norm, eps_i, own, factor in rows]


def _passed_on(activations, reading, factors) -> list[bool]:
    """Which terms have the gradient of the sum itself."""
    own = zip(activations.split(), reading, factors, strict=True)
    return [factor is None and activation == "none" and how in (RAW, NORMED) for activation, how, factor in own]


_JOIN_BACKWARD = "Tensor grad, Tensor? y, bool[] needs"


@_operator(f"training_join_backward({_JOIN_BACKWARD}, {_JOIN}, str activation, str forced) -> Tensor[]")
def join_backward(grad, y, needs, maps, norms, eps, activations, reading, factors, activation, forced):
    """`passes.join_backward`: for every term that needs it the gradient of its map, and its norm's sums.

    The gradient of the sum is there once at most: not for a second term that has it, nor where it is `grad`.
    """
    terms, results = _terms(maps, norms, eps, activations, reading, factors), []
    with _serving(forced, grad) as serving:
        grad = grad.contiguous(memory_format=_LAST)
        found = serving.join_backward(grad, y, terms, activation, needs)
        there = activation == "none"
        for i, same in enumerate(_passed_on(activations, reading, factors)):
            if not needs[i]:
                continue
            (x, norm, _), (dx, sums) = terms[i], found[i]
            if reading[i] in (BATCH, GIVEN):
                dx = _itself(serving, dx, sums, x, norm, reading[i])
            results += [] if same and there else [channels_last(dx)]
            results += [] if sums is None else [t.to(norm.mean.dtype) for t in sums]
            there = there or same
    return results


@join_backward.register_fake
def _join_backward_fake(grad, y, needs, maps, norms, eps, activations, reading, factors, activation, forced):
    there, results, cut = activation == "none", [], _norms(norms, reading)
    for i, same in enumerate(_passed_on(activations, reading, factors)):
        if needs[i]:
            results += [] if same and there else [_empty_like(maps[i])]
            results += map(torch.empty_like, cut[i][:2])
            there = there or same
    return results


def _join_setup(ctx, inputs, output):
    maps, norms, eps, activations, reading, factors, activation, forced = inputs
    ctx.save_for_backward(*maps, *norms, *factors, output if activation == "relu" else None)
    ctx.counts = len(maps), len(norms), len(factors)
    ctx.facts = eps, activations, reading, activation, forced
    ctx.none = _none(factors)


def _join_gradients(ctx, grad):
    eps, activations, reading, activation, forced = ctx.facts
    *rest, y = ctx.saved_tensors
    maps, norms, factors = _split(rest, ctx.counts)
    of_maps, of_norms = ctx.needs_input_grad[:2]
    needs = [any((one, *norm)) for one, norm in zip(of_maps, _norms(of_norms, reading), strict=True)]
    arguments = (maps, norms, eps, activations, reading, factors, activation, forced)
    found = iter(join_backward(grad, y, needs, *arguments))
    dmaps, dnorms, summed = [], [], grad if activation == "none" else None
    for i, same in enumerate(_passed_on(activations, reading, factors)):
        normed = reading[i] != RAW
        if not needs[i]:
            dmaps, dnorms = [*dmaps, None], dnorms + [None] * (_NORM * normed)
            continue
        dx = summed if same and summed is not None else next(found)
        summed = dx if same else summed
        dmaps.append(dx)
        dnorms += _of_norm((next(found), next(found)), reading[i]) if normed else []
    return dmaps, dnorms, None, None, None, ctx.none, None, None


join.register_autograd(_join_gradients, setup_context=_join_setup)


# RepVGG

_BRANCHES = "Tensor? factor, Tensor x, Tensor[] weights, int[] geometries, Tensor[] affines, Tensor?[] given"
_REPVGG = f"{_BRANCHES}, float[] eps, bool[] batch, str activation, str forced"


@_operator(f"training_repvgg({_REPVGG}) -> Tensor[]")
def repvgg(factor, x, weights, geometries, affines, given, eps, batch, activation, forced):
    """The activation of the sum of the branches, the raw result of the first, and every branch's mean and variance.

    The branches are k x k, 1 x 1 and, with a third norm, the map itself. `affines` and `given` have the weight and bias
    of each norm, and its given mean and variance.
    """
    with _serving(forced, x) as serving:
        found = serving.convs(x, None, None, _filters(weights, geometries), batch[:2])
        maps = [y for y, _ in found] + [x] * (len(batch) - 2)
        seen = [one for _, one in found]
        seen += [serving.statistics(x) if taken else None for taken in batch[2:]]
        own = [
            tuple(t.clone() for t in fixed) if one is None else one
            for one, fixed in zip(seen, _sliced(given, 2), strict=True)
        ]
        y = channels_last(serving.join(_branches(maps, own, affines, eps, factor), activation))
    return [y, maps[0], *(t for pair in own for t in pair)]


@repvgg.register_fake
def _repvgg_fake(factor, x, weights, geometries, affines, given, eps, batch, activation, forced):
    (weight, geometry), _ = _filters(weights, geometries)
    maps = [empty_output(x, weight, *geometry[:3]) for _ in range(2)]
    return maps + [t for _ in batch for t in _empty_statistics(weight.shape[0], x)]


def _branches(maps, own, affines, eps, factor) -> list[Term]:
    norms = [
        Norm(*pair, *affine, eps_i, "none") for pair, affine, eps_i in zip(own, _sliced(affines, 2), eps, strict=True)
    ]
    return [Term(x, norm, factor if i < 2 else None) for i, (x, norm) in enumerate(zip(maps, norms, strict=True))]


_REPVGG_BACKWARD = "Tensor grad, Tensor? y, Tensor kxk, Tensor[] statistics, bool needs_x, bool[] needs_weights"


@_operator(f"training_repvgg_backward({_REPVGG_BACKWARD}, {_REPVGG}) -> Tensor[]")
def repvgg_backward(
    grad, y, kxk, statistics, needs_x, needs_weights,
    factor, x, weights, geometries, affines, given, eps, batch, activation, forced,
):  # fmt: skip
    """The gradients of x and of the weights that need one, and the sums of every norm. The 1x1 branch's result is
    computed again.
    """
    filters, count = _filters(weights, geometries), len(batch)
    own = _sliced(statistics, 2)
    with _serving(forced, grad) as serving:
        maps = [kxk, serving.convs(x, None, None, filters[1:], [False])[0][0], x][:count]
        grad = grad.contiguous(memory_format=_LAST)
        terms = _branches(maps, own, affines, eps, factor)
        found = serving.join_backward(grad, y, terms, activation, [True] * count)
        norms = [
            Own(mean, var, affine[0], eps_i, sums if taken else None, _count(one.x))
            for one, (mean, var), affine, eps_i, (_, sums), taken in zip(
                terms, own, _sliced(affines, 2), eps, found, batch, strict=True
            )
        ]
        arriving = [Arriving(dz, *one) for (dz, _), *one in zip(found[:2], norms, maps, strict=False)]
        gradients = serving.convs_backward(arriving, x, None, None, filters, needs_x, needs_weights)
        dx = gradients.x
        if needs_x and count == 3:
            dx = serving.entered_backward(found[2][0], norms[2], x, dx)
    results = [channels_last(dx)] if needs_x else []
    results += [_like(dw, w) for dw, w in zip(gradients.weights, weights, strict=True) if dw is not None]
    return results + [t.to(mean.dtype) for (_, sums), (mean, _) in zip(found, own, strict=True) for t in sums]


@repvgg_backward.register_fake
def _repvgg_backward_fake(
    grad, y, kxk, statistics, needs_x, needs_weights,
    factor, x, weights, geometries, affines, given, eps, batch, activation, forced,
):  # fmt: skip
    results = [_empty_like(x)] if needs_x else []
    results += [torch.empty_like(w) for w, need in zip(weights, needs_weights, strict=True) if need]
    return results + [torch.empty_like(t) for t in statistics]


def _repvgg_setup(ctx, inputs, output):
    factor, x, weights, geometries, affines, given, eps, batch, activation, forced = inputs
    y, *kept = output
    ctx.save_for_backward(factor, x, y if activation == "relu" else None, *weights, *affines, *kept)
    ctx.counts = len(weights), len(affines), len(kept)
    ctx.facts = geometries, eps, batch, activation, forced
    ctx.none = _none(given)


def _repvgg_gradients(ctx, gradients):
    geometries, eps, batch, activation, forced = ctx.facts
    factor, x, y, *rest = ctx.saved_tensors
    weights, affines, (kxk, *statistics) = _split(rest, ctx.counts)
    needs_x, needs_weights = ctx.needs_input_grad[1], list(ctx.needs_input_grad[2])
    arguments = (gradients[0], y, kxk, statistics, needs_x, needs_weights)
    branches = (factor, x, weights, geometries, affines, [None] * len(affines), eps, batch)
    found = iter(repvgg_backward(*arguments, *branches, activation, forced))
    dx = next(found) if needs_x else None
    dweights = [next(found) if need else None for need in needs_weights]
    return None, dx, dweights, None, list(found), ctx.none, None, None, None, None


repvgg.register_autograd(_repvgg_gradients, setup_context=_repvgg_setup)
