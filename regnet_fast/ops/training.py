"""The operations of a training step, with their gradients.

A convolution returns its raw result, whose norm is left to whoever reads the map: `Normed` is a raw map with its
statistics and affine parameters. So nothing is saved for backward but raw maps and the outputs of blocks, and no pass
over memory has the sole purpose of normalising.

Between the operations the gradient of a raw map is that of the *normalised* map, before its activation, and the
gradients of its mean and variance are sum(dz * xhat) and sum(dz): what the operation that made the map needs to form
the gradient of its raw result as it reads it. Who uses `Normed` only through this module sees ordinary gradients.

Source: W. Jung et al., "Restructuring Batch Normalization to Accelerate CNN Training", MLSys 2019, arXiv 1807.01702.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import passes
from ..backends.operands import Arriving, Excite, Filter, Norm, Own, Sums, Term
from ..backends.training import passes_for

_LAST = torch.channels_last


@dataclass(frozen=True)
class Statistics:
    """Which statistics a norm takes: those of the batch, or given ones.

    Attributes: `mean` and `var`, given ones, or None for the batch's; `eps`; `group`, the processes over which the
    batch is spread, or None.
    """

    mean: Tensor | None
    var: Tensor | None
    eps: float
    group: Any = None

    @property
    def batch(self) -> bool:
        return self.mean is None


@dataclass(frozen=True)
class Affine:
    """The parameters of a norm and the activation behind it."""

    weight: Tensor | None
    bias: Tensor | None
    activation: str = "none"


@dataclass(frozen=True)
class Normed:
    """A raw map that is read as `activation((map - mean) / sqrt(var + eps) * weight + bias)`.

    `count` is the number of values of a channel behind mean and var, of all processes.
    """

    map: Tensor
    mean: Tensor
    var: Tensor
    affine: Affine
    eps: float
    count: float

    @property
    def shape(self) -> torch.Size:
        return self.map.shape


Map = Tensor | Normed


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which nothing is cast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_batched(t: Tensor | float | None) -> bool:
    """Whether a tensor stands for many, under vmap."""
    functorch = torch._C._functorch
    return isinstance(t, Tensor) and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))


def _first_gradient(backward: Callable) -> Callable:
    """A backward that computes one gradient at a time, and that is not differentiated itself. Raises RuntimeError."""

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            asked = "the gradient of a gradient (create_graph=True)"
        elif any(map(_is_batched, gradients)):
            asked = "many gradients at once (is_grads_batched=True, vmap)"
        else:
            return backward(ctx, *gradients)
        raise RuntimeError(
            f"regnet_fast: {asked} was asked for of a fused training step, which computes one first gradient. Run the "
            "step inside `with regnet_fast.backend('reference'):`, or call regnet_fast.restore(model)"
        )

    return checked


def _flat(x: Map) -> tuple:
    if isinstance(x, Tensor):
        return x, None, None, None, None
    return x.map, x.mean, x.var, x.affine.weight, x.affine.bias


def _reading(x: Map) -> tuple[float, str] | None:
    """How a map is read, beside the tensors: epsilon and activation, or None where it is read as it is."""
    return None if isinstance(x, Tensor) else (x.eps, x.affine.activation)


def _norm(
    reading: tuple[float, str] | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Norm | None:
    return None if reading is None else Norm(mean, var, weight, bias, *reading)


def _of_norm(sums: Sums, norm: Norm) -> tuple[Tensor | None, ...]:
    """The gradients of a norm's mean, variance, weight and bias, in the convention of this module."""
    product, plain = sums
    return product, plain, None if norm.weight is None else product, None if norm.bias is None else plain


def _copied(weight: Tensor | None) -> Tensor | None:
    """A norm's weight for the gradient of what it normalises: whoever reads the norm gives the weight its gradient
    before that, and a hook may change it then. Raises RuntimeError for a weight whose memory was given back.
    """
    if weight is not None and type(weight) in (Tensor, torch.nn.Parameter) and not weight.data_ptr():
        raise RuntimeError("regnet_fast: a norm's weight has no memory any more")
    return None if weight is None else weight.detach().clone()


def _count(x: Tensor) -> float:
    return x.numel() / x.shape[1]


def _merged(mean: Tensor, var: Tensor, count: float, group: Any) -> tuple[Tensor, Tensor, float]:
    """Statistics of all processes of a group, and their count."""
    if group is None:
        return mean, var, count
    mine = torch.cat([mean, var, mean.new_tensor([count])])
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    counts = [float(t[-1]) for t in found]
    present = [(t, n) for t, n in zip(found, counts, strict=True) if n]
    pairs = [t[:-1].chunk(2) for t, _ in present]
    return *passes.merged(pairs, [n for _, n in present]), sum(counts)


def _own(stats: Statistics, weight: Tensor | None, mean: Tensor, var: Tensor, sums: Sums, count: float) -> Own:
    """The norm behind a map as its backward needs it, with the sums of all processes."""
    if not stats.batch:
        return Own(mean, var, weight, stats.eps, None, count)
    if stats.group is not None:
        both = torch.cat(sums)
        dist.all_reduce(both, group=stats.group)
        sums = Sums(*both.chunk(2))
    return Own(mean, var, weight, stats.eps, sums, count)


@dataclass(frozen=True)
class Branch:
    """A convolution, and the norm behind it where it has statistics.

    Attributes: `weight`, in the map's dtype; `geometry`: stride, padding, dilation (pairs) and groups; `stats`, the
    statistics of the norm; `affine`, its parameters and activation.
    """

    weight: Tensor
    geometry: Sequence
    stats: Statistics | None = None
    affine: Affine | None = None


class _Convs(torch.autograd.Function):
    """x and its norm, squeeze-excite, weights -> the raw results, and their statistics with their counts."""

    @staticmethod
    def forward(ctx, spec, x, mean, var, scale, shift, fc1, bias1, fc2, bias2, *weights):
        reading, statistics, geometries, se_activation, recipe = spec
        weights, own_weights = weights[: len(geometries)], weights[len(geometries) :]
        norm = _norm(reading, mean, var, scale, shift)
        excite = None if fc1 is None else Excite(fc1, bias1, fc2, bias2, se_activation, [])
        ctx.passes = passes_for(x)
        filters = [Filter(*one) for one in zip(weights, geometries, strict=True)]
        measured = [stats is not None and stats.batch for stats in statistics]
        results, kept, ctx.counts = [], [], []
        found = ctx.passes.convs(x, norm, excite, filters, measured)
        for (y, seen), stats, taken, own_weight in zip(found, statistics, measured, own_weights, strict=True):
            own = (None, None, 0.0) if stats is None else _statistics(stats, seen, y)
            results += [y, *own]
            kept += [own_weight, y if taken else None, *own[:2]]
            ctx.counts.append(own[2])
        if recipe is not None:
            reading, (x, mean, var, scale, shift) = recipe
        ctx.spec = (reading, statistics, geometries, se_activation, recipe is None)
        means = torch.cat(excite.means) if excite is not None and excite.means else None
        ctx.save_for_backward(x, mean, var, scale, shift, fc1, bias1, fc2, bias2, means, *weights, *kept)
        return tuple(results)

    @staticmethod
    @_first_gradient
    def backward(ctx, *gradients):
        reading, statistics, geometries, se_activation, through = ctx.spec
        x, mean, var, scale, shift, fc1, bias1, fc2, bias2, means, *rest = ctx.saved_tensors
        weights, kept = rest[: len(geometries)], rest[len(geometries) :]
        norm = _norm(reading, mean, var, scale, shift)
        known = None if means is None else [means]
        excite = None if fc1 is None else Excite(fc1, bias1, fc2, bias2, se_activation, known)
        arriving = []
        for i, stats in enumerate(statistics):
            grad, product, plain, _ = gradients[4 * i : 4 * i + 4]
            own_weight, y, *own = kept[4 * i : 4 * i + 4]
            own = None if stats is None else _own(stats, own_weight, *own, Sums(product, plain), ctx.counts[i])
            arriving.append(Arriving(grad.contiguous(memory_format=_LAST), own, y))
        needs_x, needs_weights = any(ctx.needs_input_grad[1:10]), ctx.needs_input_grad[10 : 10 + len(geometries)]
        filters = [Filter(*one) for one in zip(weights, geometries, strict=True)]
        with without_autocast(x.device.type):
            found = ctx.passes.convs_backward(arriving, x, norm, excite, filters, needs_x, needs_weights, through)
        sums = (None,) * 4 if found.sums is None else _of_norm(found.sums, norm)
        excited = (None,) * 4
        if found.excite is not None:
            excited = [None if t is None else g for t, g in zip(excite, found.excite, strict=False)]
        return None, found.x, *sums, *excited, *found.weights, *(None for _ in geometries)


def convs(x: Map, branches: Sequence[Branch], excite: Excite | None = None) -> list[Map]:
    """`conv2d(excite(x), weight, None, *geometry)` for every branch, from one read of x, and the norm behind it where
    statistics are asked for.

    Args:
        x: a channels_last map, or one that is read through its norm.
        branches: the convolutions.
        excite: squeeze-and-excitation of what is read.

    Returns the raw results, as tensors or, with a norm, as `Normed`.
    """
    spec = (
        _reading(x),
        [branch.stats for branch in branches],
        [branch.geometry for branch in branches],
        None if excite is None else excite.activation,
        _recipe(x),
    )
    own_weights = [None if branch.affine is None else _copied(branch.affine.weight) for branch in branches]
    excited = (None,) * 4 if excite is None else excite[:4]
    found = _Convs.apply(spec, *_flat(x), *excited, *(branch.weight for branch in branches), *own_weights)
    results = []
    for i, branch in enumerate(branches):
        y, mean, var, count = found[4 * i : 4 * i + 4]
        results.append(y if branch.stats is None else Normed(y, mean, var, branch.affine, branch.stats.eps, count))
    return results


def _statistics(stats: Statistics, found: tuple[Tensor, Tensor] | None, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, variance and count: the batch's, of all processes, or copies of the given ones."""
    if not stats.batch:
        return stats.mean.clone(), stats.var.clone(), _count(y)
    return _merged(*found, _count(y), stats.group)


class _Enter(torch.autograd.Function):
    """x -> x as a map to normalise, its statistics with their count, and x itself."""

    @staticmethod
    def forward(ctx, stats, x, own_weight):
        ctx.passes = passes_for(x)
        mean, var, ctx.count = _statistics(stats, ctx.passes.statistics(x) if stats.batch else None, x)
        ctx.stats = stats
        ctx.save_for_backward(x, own_weight, mean, var)
        ctx.set_materialize_grads(False)
        return x.view_as(x), mean, var, ctx.count, x.view_as(x)

    @staticmethod
    @_first_gradient
    def backward(ctx, grad, product, plain, _, identity):
        x, weight, mean, var = ctx.saved_tensors
        if grad is None:
            return None, identity, None
        own = _own(ctx.stats, weight, mean, var, Sums(product, plain), ctx.count)
        grad = grad.contiguous(memory_format=_LAST)
        return None, ctx.passes.entered_backward(grad, own, x, identity), None


def enter(x: Tensor, stats: Statistics, affine: Affine) -> tuple[Normed, Tensor]:
    """x as a map that is read through a norm, and x as it is: both to be used in place of x.

    The gradients of the two meet in one pass.
    """
    read, mean, var, count, identity = _Enter.apply(stats, x, _copied(affine.weight))
    return Normed(read, mean, var, affine, stats.eps, count), identity


class _Join(torch.autograd.Function):
    """Terms -> the activation of their sum."""

    @staticmethod
    def forward(ctx, spec, *tensors):
        activation, readings, factors = spec
        terms = _terms(readings, factors, tensors)
        ctx.passes = passes_for(terms[0].x)
        y = ctx.passes.join(terms, activation)
        ctx.spec = (activation, readings, [t is not None for t in factors])
        kept = y if activation == "relu" else None
        ctx.save_for_backward(kept, *tensors, *(t for t in factors if t is not None))
        return y

    @staticmethod
    @_first_gradient
    def backward(ctx, grad):
        activation, readings, factored = ctx.spec
        y, *tensors = ctx.saved_tensors
        found = iter(tensors[5 * len(readings) :])
        factors = [next(found) if there else None for there in factored]
        terms = _terms(readings, factors, tensors)
        grad = grad.contiguous(memory_format=_LAST)
        needs = [any(ctx.needs_input_grad[1 + 5 * i : 6 + 5 * i]) for i in range(len(terms))]
        results = []
        for term, (dx, sums) in zip(terms, ctx.passes.join_backward(grad, y, terms, activation, needs), strict=True):
            results += [dx, *((None,) * 4 if sums is None else _of_norm(sums, term.norm))]
        return None, *results


def _terms(readings: Sequence, factors: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Term]:
    found = []
    for i, (reading, factor) in enumerate(zip(readings, factors, strict=True)):
        x, *norm = tensors[5 * i : 5 * i + 5]
        found.append(Term(x, _norm(reading, *norm), factor))
    return found


def join(*terms: Map, activation: str = "none", factor: Tensor | None = None) -> Tensor:
    """`activation(factor * read(terms[0]) + read(terms[1]))` of one or two terms.

    Args:
        terms: maps, or maps that are read through their norms.
        factor: (N, 1, 1, 1), of the first term: stochastic depth.
    """
    factors = [factor, None][: len(terms)]
    flat = [t for term in terms for t in _flat(term)]
    y = _Join.apply((activation, [_reading(term) for term in terms], factors), *flat)
    alone = len(terms) == 1 and isinstance(terms[0], Normed) and activation == "none" and factor is None
    if alone and not y.is_inference():
        kept = [t.detach() for t in flat[:3]] + [None if t is None else t.detach().clone() for t in flat[3:]]
        y._regnet_fast_recipe = (y._version, _reading(terms[0]), kept)
    return y


def _recipe(x: Map) -> tuple | None:
    """How to make a map again that is nothing but a raw one read through its norm: kept in its place, since the raw map
    is kept anyway. None where there is none, or where the map was changed since.
    """
    version, *recipe = getattr(x, "_regnet_fast_recipe", (None,))
    return tuple(recipe) if recipe and version == x._version and x.is_contiguous(memory_format=_LAST) else None


class _RepVgg(torch.autograd.Function):
    """x, two weights and three norms -> the activation of the sum of three branches.

    The result of the 1x1 branch is not kept: backward computes it again.
    """

    @staticmethod
    def forward(ctx, spec, factor, x, weight, pointwise, *affine):
        (activation, geometries, statistics), note = spec
        ctx.passes = passes_for(x)
        maps, own = [], []
        filters = [Filter(*one) for one in zip((weight, pointwise), geometries, strict=True)]
        found = ctx.passes.convs(x, None, None, filters, [stats.batch for stats in statistics[:2]])
        for (y, seen), stats in zip(found, statistics, strict=False):
            maps.append(y)
            own.append(_statistics(stats, seen, y))
        if len(statistics) > len(maps):
            stats = statistics[-1]
            own.append(_statistics(stats, ctx.passes.statistics(x) if stats.batch else None, x))
            maps.append(x)
        terms = _branches(statistics, maps, own, affine, factor)
        if note is not None:
            for i, (term, found) in enumerate(zip(terms, own, strict=True)):
                note(i, *found, term.x.shape)
        y = ctx.passes.join(terms, activation)
        ctx.spec, ctx.counts = spec[0], [count for _, _, count in own]
        kept = [t for mean, var, _ in own for t in (mean, var)]
        seen = y if activation == "relu" else None
        ctx.save_for_backward(factor, x, weight, pointwise, maps[0], seen, *kept, *affine)
        return y

    @staticmethod
    @_first_gradient
    def backward(ctx, grad):
        activation, geometries, statistics = ctx.spec
        factor, x, weight, pointwise, kxk, y, *rest = ctx.saved_tensors
        count = len(statistics)
        own = [(rest[2 * i], rest[2 * i + 1], ctx.counts[i]) for i in range(count)]
        affine = rest[2 * count :]
        filters = [Filter(*one) for one in zip((weight, pointwise), geometries, strict=True)]
        maps = [kxk, ctx.passes.convs(x, None, None, filters[1:], [False])[0][0], x][:count]
        grad = grad.contiguous(memory_format=_LAST)
        terms = _branches(statistics, maps, own, affine, factor)
        found = ctx.passes.join_backward(grad, y, terms, activation, [True] * count)
        norms = [
            _own(stats, affine[2 * i], mean, var, sums, n)
            for i, (stats, (mean, var, n), (_, sums)) in enumerate(zip(statistics, own, found, strict=True))
        ]
        needs_x, *needs = ctx.needs_input_grad[2:5]
        arriving = [Arriving(dz, *one) for (dz, _), *one in zip(found[:2], norms, maps, strict=False)]
        gradients = ctx.passes.convs_backward(arriving, x, None, None, filters, needs_x, needs)
        dx = gradients.x
        if needs_x and count == 3:
            dx = ctx.passes.entered_backward(found[2][0], norms[2], x, dx)
        sums = [t for term, (_, sums) in zip(terms, found, strict=True) for t in _of_norm(sums, term.norm)[2:]]
        return None, None, dx, *gradients.weights, *sums


def _branches(
    statistics: Sequence[Statistics],
    maps: Sequence[Tensor],
    own: Sequence[tuple[Tensor, Tensor, float]],
    affine: Sequence[Tensor | None],
    factor: Tensor | None,
) -> list[Term]:
    norms = [
        Norm(mean, var, affine[2 * i], affine[2 * i + 1], stats.eps, "none")
        for i, (stats, (mean, var, _)) in enumerate(zip(statistics, own, strict=True))
    ]
    return [Term(x, norm, factor if i < 2 else None) for i, (x, norm) in enumerate(zip(maps, norms, strict=True))]


def repvgg(
    x: Tensor,
    weights: Sequence[Tensor],
    geometries: Sequence[Sequence],
    statistics: Sequence[Statistics],
    affines: Sequence[Affine],
    activation: str,
    factor: Tensor | None = None,
    note: Callable[[int, Tensor, Tensor, float, torch.Size], None] | None = None,
) -> Tensor:
    """`activation(factor * (norm(kxk(x)) + norm(pointwise(x))) + norm(x))`, the last term where there is a third norm.

    Args:
        x: a channels_last map.
        weights, geometries: of the k x k convolution and of the 1x1 convolution.
        statistics, affines: of the norms of the two branches and of the identity.
        factor: (N, 1, 1, 1): stochastic depth.
        note: called with the number of each norm, its mean, variance and count, and the shape of its map.
    """
    affine = [t for one in affines for t in (one.weight, one.bias)]
    spec = (activation, tuple(geometries), tuple(statistics))
    return _RepVgg.apply((spec, note), factor, x, *weights, *affine)
