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

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.passes.operands import Conv, Excite, Norm, OutputGrad, OutputNorm, Sums, Term
from ..backends.passes.sums import merged
from ..backends.passes.torch import Passes

_LAST = torch.channels_last
_is_batched, _is_batched_by_legacy = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


class NormStatistics(NamedTuple):
    """Which statistics a norm takes: those of the batch, or given ones.

    Attributes: `mean` and `var`, given ones, or None for the batch's; `eps`; `group`, the processes over which the
    batch is spread, or None; `note`, called without gradients with the batch's mean and variance, their count of values
    of a channel and the shape of the map.
    """

    mean: Tensor | None
    var: Tensor | None
    eps: float
    group: Any = None
    note: Callable[[Tensor, Tensor, float, torch.Size], None] | None = None


class Affine(NamedTuple):
    """The parameters of a norm and the activation behind it."""

    weight: Tensor | None
    bias: Tensor | None
    activation: str = "none"


class Normed(NamedTuple):
    """A raw map that is read through a norm: `activation((map - mean) / sqrt(var + eps) * weight + bias)`."""

    map: Tensor
    norm: Norm


Map = Tensor | Normed


class Branch(NamedTuple):
    """A convolution, and the norm behind it where it has statistics.

    Attributes: `weight`, in the map's dtype; `geometry`: stride, padding, dilation (pairs) and groups; `stats`, the
    statistics of the norm; `affine`, its parameters and activation.
    """

    weight: Tensor
    geometry: Sequence
    stats: NormStatistics | None = None
    affine: Affine | None = None


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which nothing is cast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _first_gradient(backward: Callable) -> Callable:
    """A backward that computes one gradient at a time, casts nothing and is not differentiated itself. Raises
    RuntimeError.
    """

    @wraps(backward)
    def checked(ctx, *gradients):
        asked = "the gradient of a gradient (create_graph=True)" if torch.is_grad_enabled() else None
        for t in gradients:
            if t is not None and (_is_batched(t) or _is_batched_by_legacy(t)):
                asked = asked or "many gradients at once (is_grads_batched=True, vmap)"
        if asked is not None:
            raise RuntimeError(
                f"regnet_fast: {asked} was asked for of a fused training step, which computes one first gradient. Run "
                "the step inside `with regnet_fast.backend('reference'):`, or call regnet_fast.restore(model)"
            )
        if not torch.is_autocast_enabled(ctx.device):
            return backward(ctx, *gradients)
        with torch.autocast(ctx.device, enabled=False):
            return backward(ctx, *gradients)

    return checked


# The arguments and results of an autograd function are one row of tensors; these are its parts.


class _Read(NamedTuple):
    """A map, or its gradient, and the tensors of the norm through which it is read, or theirs."""

    map: Any
    mean: Any = None
    var: Any = None
    weight: Any = None
    bias: Any = None


class _Result(NamedTuple):
    """A raw map and its statistics, or their gradients: dz, sum(dz * xhat) and sum(dz)."""

    map: Tensor
    mean: Tensor | None
    var: Tensor | None


class _Kept(NamedTuple):
    """What the backward of a convolution needs of its result and of the norm behind it."""

    map: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None


class _Vectors(NamedTuple):
    """The tensors of a norm."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None


class _Parameters(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None


_Parts = TypeVar("_Parts", bound=tuple)


def _cut(kind: type[_Parts], row: Iterable) -> list[_Parts]:
    """A row as tuples of a kind, one after another."""
    return [*map(partial(tuple.__new__, kind), zip(*[iter(row)] * len(kind._fields), strict=True))]


_Reading = tuple[float, str] | None
"""How a map is read, beside the tensors: epsilon and activation, or None where it is read as it is."""


def _flat(x: Map) -> tuple[_Reading, _Read]:
    if isinstance(x, Tensor):
        return None, _Read(x)
    mean, var, weight, bias, *reading = x.norm
    return tuple(reading), _Read(x.map, mean, var, weight, bias)


def _norm_of(reading: _Reading, read: _Read) -> Norm | None:
    return None if reading is None else Norm(*read[1:], *reading)


def _norm_gradients(sums: Sums | None, norm: Norm | None) -> tuple[Tensor | None, ...]:
    """The gradients of a norm's mean, variance, weight and bias, in the convention of this module."""
    if sums is None:
        return (None,) * 4
    product, plain = sums
    return product, plain, None if norm.weight is None else product, None if norm.bias is None else plain


def _copied(weight: Tensor | None) -> Tensor | None:
    """A norm's weight for the gradient of what it normalises: whoever reads the norm gives the weight its gradient
    before that, and a hook may change it then. Raises RuntimeError for a weight whose memory was given back.
    """
    if weight is not None and type(weight) in (Tensor, torch.nn.Parameter) and not weight.data_ptr():
        raise RuntimeError("regnet_fast: a norm's weight has no memory any more")
    return None if weight is None else weight.detach().clone()


def _merged(mean: Tensor, var: Tensor, count: float, group: Any) -> tuple[Tensor, Tensor, float]:
    """Statistics of all processes of a group, and their count."""
    mine = torch.cat([mean, var, mean.new_tensor([count])])
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    counts = [float(t[-1]) for t in found]
    present = [(t, n) for t, n in zip(found, counts, strict=True) if n]
    pairs = [t[:-1].chunk(2) for t, _ in present]
    return *merged(pairs, [n for _, n in present]), sum(counts)


def _statistics(stats: NormStatistics, found: tuple[Tensor, Tensor] | None, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, variance and count: the batch's, of all processes, or copies of the given ones."""
    count = y.numel() / y.shape[1]
    if stats.mean is not None:
        return stats.mean.clone(), stats.var.clone(), count
    mean, var = found
    if stats.group is not None:
        mean, var, count = _merged(mean, var, count, stats.group)
    if stats.note is not None:
        stats.note(mean, var, count, y.shape)
    return mean, var, count


def _output_norm(
    stats: NormStatistics, weight: Tensor | None, mean: Tensor, var: Tensor, sums: Sums, count: float
) -> OutputNorm:
    """The norm behind a map as its backward needs it, with the sums of all processes."""
    if stats.mean is not None:
        sums = None
    elif stats.group is not None:
        both = torch.cat(sums)
        dist.all_reduce(both, group=stats.group)
        sums = Sums(*both.chunk(2))
    return OutputNorm(mean, var, weight, stats.eps, sums, count)


class _Convs(torch.autograd.Function):
    """x and its norm, squeeze-excite, weights -> the raw results and their statistics."""

    @staticmethod
    def forward(ctx, spec, *tensors):
        passes, reading, branches, se_activation, recipe = spec
        read, excited, weights = _Read(*tensors[:5]), tensors[5:9], tensors[9:]
        norm = _norm_of(reading, read)
        excite = None if excited[0] is None else Excite(*excited, se_activation, [])
        convs = [Conv(weight, branch.geometry) for weight, branch in zip(weights, branches, strict=True)]
        measured = [branch.stats is not None and branch.stats.mean is None for branch in branches]
        results, kept, behind = [], [], []
        found = passes.convs(read.map, norm, excite, convs, measured)
        for (y, moments), (_, geometry, stats, affine), taken in zip(found, branches, measured, strict=True):
            mean, var, count = (None, None, 0.0) if stats is None else _statistics(stats, moments, y)
            results += y, mean, var
            kept += y if taken else None, mean, var, None if affine is None else _copied(affine.weight)
            behind.append((geometry, stats, count))
        if recipe is not None:
            reading, read = recipe
        ctx.spec, ctx.device = (passes, reading, behind, se_activation, recipe is None), read.map.device.type
        means = torch.cat(excite.means) if excite is not None and excite.means else None
        ctx.save_for_backward(*read, *excited, means, *weights, *kept)
        return tuple(results)

    @staticmethod
    @_first_gradient
    def backward(ctx, *gradients):
        passes, reading, behind, se_activation, through = ctx.spec
        tensors, end = ctx.saved_tensors, 10 + len(behind)
        read, excited, means, weights = _Read(*tensors[:5]), tensors[5:9], tensors[9], tensors[10:end]
        norm = _norm_of(reading, read)
        excite = None if excited[0] is None else Excite(*excited, se_activation, None if means is None else [means])
        results, kept, grads, convs = _cut(_Result, gradients), _cut(_Kept, tensors[end:]), [], []
        for weight, (geometry, stats, count), grad, one in zip(weights, behind, results, kept, strict=True):
            sums = None if stats is None else Sums(grad.mean, grad.var)
            own = None if stats is None else _output_norm(stats, one.weight, one.mean, one.var, sums, count)
            grads.append(OutputGrad(grad.map.contiguous(memory_format=_LAST), own, one.map))
            convs.append(Conv(weight, geometry))
        needs_x, needs_weights = any(ctx.needs_input_grad[1:10]), ctx.needs_input_grad[10:]
        found = passes.convs_backward(grads, read.map, norm, excite, convs, needs_x, needs_weights, through)
        dexcite = (None,) * 4
        if found.excite is not None:
            dexcite = [None if t is None else g for t, g in zip(excited, found.excite, strict=True)]
        return None, found.x, *_norm_gradients(found.sums, norm), *dexcite, *found.weights


def convs(passes: Passes, x: Map, branches: Sequence[Branch], excite: Excite | None = None) -> list[Map]:
    """`conv2d(excite(x), weight, None, *geometry)` for every branch, from one read of x, and the norm behind it where
    statistics are asked for.

    Args:
        passes: those of maps like x.
        x: a channels_last map, or one that is read through its norm.
        branches: the convolutions.
        excite: squeeze-and-excitation of what is read.

    Returns the raw results, as tensors or, with a norm, as `Normed`.
    """
    reading, read = _flat(x)
    excited, se_activation = ((None,) * 4, None) if excite is None else (excite[:4], excite.activation)
    weights = [branch.weight for branch in branches]
    found = _Convs.apply((passes, reading, branches, se_activation, _recipe(x)), *read, *excited, *weights)
    results = []
    for (y, mean, var), (_, _, stats, affine) in zip(_cut(_Result, found), branches, strict=True):
        if stats is not None:
            y = Normed(y, Norm(mean, var, affine.weight, affine.bias, stats.eps, affine.activation))
        results.append(y)
    return results


class _ReadThroughNorm(torch.autograd.Function):
    """x -> x as a map to normalise, its statistics, and x itself."""

    @staticmethod
    def forward(ctx, spec, x):
        passes, stats, affine = spec
        mean, var, count = _statistics(stats, passes.statistics(x) if stats.mean is None else None, x)
        ctx.spec, ctx.device = (passes, stats, count), x.device.type
        ctx.save_for_backward(x, mean, var, _copied(affine.weight))
        ctx.set_materialize_grads(False)
        return x.view_as(x), mean, var, x.view_as(x)

    @staticmethod
    @_first_gradient
    def backward(ctx, grad, product, plain, identity):
        passes, stats, count = ctx.spec
        x, mean, var, weight = ctx.saved_tensors
        if grad is None:
            return None, identity
        norm = _output_norm(stats, weight, mean, var, Sums(product, plain), count)
        return None, passes.entered_backward(grad.contiguous(memory_format=_LAST), norm, x, identity)


def read_through_norm(passes: Passes, x: Tensor, stats: NormStatistics, affine: Affine) -> tuple[Normed, Tensor]:
    """x as a map that is read through a norm, and x as it is: both to be used in place of x.

    The gradients of the two meet in one pass.
    """
    read, mean, var, identity = _ReadThroughNorm.apply((passes, stats, affine), x)
    return Normed(read, Norm(mean, var, affine.weight, affine.bias, stats.eps, affine.activation)), identity


class _Join(torch.autograd.Function):
    """Terms -> the activation of their sum."""

    @staticmethod
    def forward(ctx, spec, factor, *tensors):
        passes, activation, readings = spec
        terms = _terms(readings, factor, tensors)
        y = passes.join(terms, activation)
        ctx.spec, ctx.device = spec, y.device.type
        ctx.save_for_backward(y if activation == "relu" else None, factor, *tensors)
        return y

    @staticmethod
    @_first_gradient
    def backward(ctx, grad):
        passes, activation, readings = ctx.spec
        y, factor, *tensors = ctx.saved_tensors
        terms = _terms(readings, factor, tensors)
        needs = [*map(any, _cut(_Read, ctx.needs_input_grad[2:]))]
        found = passes.join_backward(grad.contiguous(memory_format=_LAST), y, terms, activation, needs)
        results = []
        for term, (dx, sums) in zip(terms, found, strict=True):
            results += dx, *_norm_gradients(sums, term.norm)
        return None, None, *results


def _terms(readings: Sequence[_Reading], factor: Tensor | None, tensors: Sequence[Tensor | None]) -> list[Term]:
    """The factor is the first term's."""
    terms = []
    for reading, read in zip(readings, _cut(_Read, tensors), strict=True):
        terms.append(Term(read.map, _norm_of(reading, read), None if terms else factor))
    return terms


def join(passes: Passes, *terms: Map, activation: str = "none", factor: Tensor | None = None) -> Tensor:
    """`activation(factor * read(terms[0]) + read(terms[1]))` of one or two terms.

    Args:
        passes: those of maps like the terms.
        terms: maps, or maps that are read through their norms.
        factor: (N, 1, 1, 1), of the first term: stochastic depth.
    """
    readings, tensors = [], []
    for term in terms:
        reading, read = _flat(term)
        readings.append(reading)
        tensors += read
    y = _Join.apply((passes, activation, readings), factor, *tensors)
    alone = len(terms) == 1 and isinstance(terms[0], Normed) and activation == "none" and factor is None
    if alone and not y.is_inference():
        x, mean, var, *parameters = (None if t is None else t.detach() for t in read)
        copied = (None if t is None else t.clone() for t in parameters)
        y._regnet_fast_recipe = (y._version, reading, _Read(x, mean, var, *copied))
    return y


def _recipe(x: Map) -> tuple[_Reading, _Read] | None:
    """How to make a map again that is nothing but a raw one read through its norm: kept in its place, since the raw map
    is kept anyway. None where there is none, or where the map was changed since.
    """
    version, *recipe = getattr(x, "_regnet_fast_recipe", (None,))
    return tuple(recipe) if recipe and version == x._version and x.is_contiguous(memory_format=_LAST) else None


class _RepVgg(torch.autograd.Function):
    """x, two weights and the parameters of three norms -> the activation of the sum of three branches.

    The result of the 1x1 branch is not kept: backward computes it again.
    """

    @staticmethod
    def forward(ctx, spec, factor, x, weight, pointwise, *parameters):
        passes, activation, geometries, statistics = spec
        convs = [Conv(*one) for one in zip((weight, pointwise), geometries, strict=True)]
        found = passes.convs(x, None, None, convs, [stats.mean is None for stats in statistics[:2]])
        if len(statistics) == 3:
            found.append((x, passes.statistics(x) if statistics[2].mean is None else None))
        norms, counts = [], []
        for (y, moments), stats, affine in zip(found, statistics, _cut(_Parameters, parameters), strict=True):
            mean, var, count = _statistics(stats, moments, y)
            norms.append(Norm(mean, var, *affine, stats.eps, "none"))
            counts.append(count)
        y = passes.join(_branches([y for y, _ in found], norms, factor), activation)
        ctx.spec, ctx.device = (spec, counts), x.device.type
        seen = y if activation == "relu" else None
        ctx.save_for_backward(factor, x, weight, pointwise, found[0][0], seen, *(t for norm in norms for t in norm[:4]))
        return y

    @staticmethod
    @_first_gradient
    def backward(ctx, grad):
        (passes, activation, geometries, statistics), counts = ctx.spec
        factor, x, weight, pointwise, kxk, y, *vectors = ctx.saved_tensors
        norms = [Norm(*one, stats.eps, "none") for one, stats in zip(_cut(_Vectors, vectors), statistics, strict=True)]
        convs = [Conv(*one) for one in zip((weight, pointwise), geometries, strict=True)]
        maps = [kxk, passes.convs(x, None, None, convs[1:], [False])[0][0], x][: len(norms)]
        grad = grad.contiguous(memory_format=_LAST)
        found = passes.join_backward(grad, y, _branches(maps, norms, factor), activation, [True] * len(norms))
        grads, dparameters = [], []
        for y, norm, stats, count, (dz, sums) in zip(maps, norms, statistics, counts, found, strict=True):
            behind = _output_norm(stats, norm.weight, norm.mean, norm.var, sums, count)
            grads.append(OutputGrad(dz, behind, y))
            dparameters += _norm_gradients(sums, norm)[2:]
        needs_x, *needs = ctx.needs_input_grad[2:5]
        gradients = passes.convs_backward(grads[:2], x, None, None, convs, needs_x, needs)
        dx = gradients.x
        if needs_x and len(norms) == 3:
            dx = passes.entered_backward(grads[2].grad, grads[2].norm, x, dx)
        return None, None, dx, *gradients.weights, *dparameters


def _branches(maps: Sequence[Tensor], norms: Sequence[Norm], factor: Tensor | None) -> list[Term]:
    """The factor is that of the two convolutions."""
    return [Term(x, norm, factor if i < 2 else None) for i, (x, norm) in enumerate(zip(maps, norms, strict=True))]


def repvgg(
    passes: Passes,
    x: Tensor,
    weights: Sequence[Tensor],
    geometries: Sequence[Sequence],
    statistics: Sequence[NormStatistics],
    affines: Sequence[Affine],
    activation: str,
    factor: Tensor | None = None,
) -> Tensor:
    """`activation(factor * (norm(kxk(x)) + norm(pointwise(x))) + norm(x))`, the last term where there is a third norm.

    Args:
        passes: those of maps like x.
        x: a channels_last map.
        weights, geometries: of the k x k convolution and of the 1x1 convolution.
        statistics, affines: of the norms of the two branches and of the identity.
        factor: (N, 1, 1, 1): stochastic depth.
    """
    parameters = [t for one in affines for t in (one.weight, one.bias)]
    return _RepVgg.apply((passes, activation, geometries, statistics), factor, x, *weights, *parameters)
