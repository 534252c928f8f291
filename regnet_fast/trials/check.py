"""Whether a candidate computes what it should, and nothing beside: in the process that may die of it.

A result, each where there are several, is held to float64's by the rule of `inspect.judging`, eager being the reference
in the dtype, on the first and last image of the problem, with two seeds, and on a small odd one; all other images to
the peer's. Inputs lie between guards of NaN, which must stay as they are, and the memory that a result, or what is
computed on the way to one, may be put into is NaN before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ..backends import (
    BackToBackProblem,
    ConvProblem,
    JoinProblem,
    NormActProblem,
    PairProblem,
    Problem,
    SqueezeExciteProblem,
    reference,
)
from ..inspect.judging import ERROR_RATIO, judge
from .candidate import Bound, bound

_GUARD = 4096
"""Elements before and behind each input."""

_APART = 8.0
"""How many times as far from the peer a result may be as the peer and the reference are from float64."""

_SUMMED = 8.0
"""What stands in the place of the rule's 2 for means, which may be summed in any order: eager's is a good one."""

_SECOND = {ConvProblem: "the means", BackToBackProblem: "the means", PairProblem: "the other convolution"}
"""What the second result of a problem is called, where there is one."""


class Wrong(Exception):
    """A candidate does not compute what it should; the message says where."""


@dataclass
class Case:
    """A problem with random operands and weights. `call` is what a run is called with."""

    problem: Problem
    weights: tuple[Tensor | None, ...]
    call: tuple[Any, ...]
    guarded: list[tuple[Tensor, Tensor]]

    def unchanged(self) -> str | None:
        """Which input was changed or what beside one was written, or None."""
        for held, kept in self.guarded:
            if not torch.equal(held.view(torch.uint8), kept.view(torch.uint8)):
                inside = not torch.equal(held[_GUARD:-_GUARD].view(torch.uint8), kept[_GUARD:-_GUARD].view(torch.uint8))
                return "it changes an input" if inside else "it writes beside an input"
        return None


@singledispatch
def make(problem: Problem, seed: int) -> Case:
    """Operands of unit variance, and weights that keep it."""
    random = torch.Generator(problem.device).manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []

    def normal(shape: Sequence[int], scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=random, dtype=torch.float32, device=problem.device) * scale
        return guarded(made.to(dtype or problem.dtype), kept)

    if isinstance(problem, ConvProblem):
        n, c, _, _ = problem.input_shape
        fan = c // problem.geometry.groups * problem.kernel[0] * problem.kernel[1]
        weights = (
            normal((problem.out_channels, c // problem.geometry.groups, *problem.kernel), fan**-0.5),
            normal((problem.out_channels,), 0.5, torch.float32),
        )
        x = normal(problem.input_shape)
        gate = normal((n, c)).sigmoid() if problem.gate else None
        residual = normal(problem.output_shape) if problem.residual else None
        return Case(problem, weights, (x, gate, residual, False, False), kept)
    if isinstance(problem, NormActProblem):
        n, c, _, _ = problem.input_shape
        weights = normal((c,), 0.3, torch.float32) + 1, normal((c,), 0.5, torch.float32)
        gate = normal((n, c)).sigmoid() if problem.gate else None
        return Case(problem, weights, (normal(problem.input_shape), gate, False), kept)
    if isinstance(problem, JoinProblem):
        gate = normal(problem.input_shape[:2]).sigmoid() if problem.gate else None
        residual = normal(problem.input_shape) if problem.residual else None
        return Case(problem, (), (normal(problem.input_shape), gate, residual, False), kept)
    if isinstance(problem, (PairProblem, BackToBackProblem)):
        first, other = problem.both
        point = (1, other.input_shape[1], 1, 1)  # the weights alone are taken
        first, other = make(first, seed), make(replace(other, input_shape=point), seed + 1)
        return Case(problem, first.weights + other.weights, first.call[:1], first.guarded + other.guarded)
    c, r = problem.channels, problem.hidden
    shapes = ((r, c), c**-0.5), ((r,), 0.5), ((c, r), r**-0.5), ((c,), 0.5)
    weights = tuple(normal(shape, scale, torch.float32) for shape, scale in shapes)
    return Case(problem, weights, (normal((problem.batch, c)),), kept)


def guarded(t: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The same tensor between guards, in channels_last."""
    held = torch.full((t.numel() + 2 * _GUARD,), float("nan"), dtype=t.dtype, device=t.device)
    inner = held[_GUARD:-_GUARD]
    if t.dim() == 4:
        n, c, h, w = t.shape
        inside = inner.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        inside = inner.view(t.shape)
    inside.copy_(t)
    kept.append((held, held.clone()))
    return inside


@singledispatch
def odd(problem: Problem) -> Problem:
    """A small problem of the same kind with an odd size, for which other tiles are cut."""
    if not isinstance(problem, SqueezeExciteProblem):
        height, width = (max(5, 2 * k + 1) for k in getattr(problem, "kernel", (1, 1)))
        return replace(problem, input_shape=(3, problem.input_shape[1], height + 2, width))
    return replace(problem, batch=3)


def edges(problem: Problem, call: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...], Callable[[Tensor], Tensor]]:
    """The first and the last image of a problem."""
    images = problem.batch if not hasattr(problem, "input_shape") else problem.input_shape[0]
    if images <= 2:
        return problem, call, lambda y: y
    chosen = [0, images - 1]
    if hasattr(problem, "input_shape"):
        small = replace(problem, input_shape=(2, *problem.input_shape[1:]))
    else:
        small = replace(problem, batch=2)
    return small, tuple(t[chosen] if isinstance(t, Tensor) else t for t in call), lambda y: y[chosen]


def results(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a call gives, with means added up where they are in parts."""
    return tuple(t.sum(1) if t.dim() == 3 else t for t in (found if isinstance(found, tuple) else (found,)))


def by_reference(
    problem: Problem, weights: Sequence[Tensor | None], call: tuple, dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """The reference, in another dtype where one is named."""
    if dtype is not None:
        problem = replace(problem, dtype=dtype)
        weights = [None if t is None else t.to(dtype) for t in weights]
        call = tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in call)
    return results(bound(reference, problem, weights)(*call))


@singledispatch
def verify(
    problem: Problem,
    prepare: Callable[[Problem, Sequence[Tensor | None]], Bound],
    peer: Callable[[Problem, Sequence[Tensor | None]], Bound],
) -> float:
    """The largest error of a candidate against float64, in units of what eager is granted. Raises Wrong.

    Args:
        prepare: binds a problem's weights by the candidate, `peer` by what serves otherwise.
    """
    worst = 0.0
    for one, seed in ((problem, 0), (odd(problem), 1), (problem, 2)):
        case = make(one, seed)
        expected = results(peer(one, case.weights)(*case.call))
        run = prepare(one, case.weights)
        found = _twice(run, case, expected)
        small, call, pick = edges(one, case.call)
        exact = by_reference(small, case.weights, call, torch.float64)
        eager = by_reference(small, case.weights, call, None)
        if len(found) != len(expected):
            raise Wrong(f"it gives {len(found)} result where there are {len(expected)}")
        for i, result in enumerate(zip(found, expected, eager, exact, strict=True)):
            ratio = _SUMMED if i and one.__class__ is not PairProblem else ERROR_RATIO
            try:
                worst = max(worst, _judged(*result, pick, ratio))
            except Wrong as wrong:
                raise Wrong(f"{_SECOND[type(one)]}: {wrong}" if i else str(wrong)) from None
    return worst


def _judged(
    found: Tensor, expected: Tensor, eager: Tensor, exact: Tensor, pick: Callable[[Tensor], Tensor], ratio: float
) -> float:
    """The error of one result in units of what eager is granted. Raises Wrong."""
    check = judge("", pick(found), eager.to(found.dtype), exact, ratio)
    if not check.ok:
        raise Wrong(f"{check.failure} ({check.place})")
    granted = _APART * max(_largest(pick(expected).double() - exact), check.max_eager, check.floor)
    if not _largest(found.double() - expected.double()) <= granted:
        raise Wrong("an image in the middle of the batch is not the peer's")
    return check.ratio


def _twice(run: Bound, case: Case, expected: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a run, which two calls give to the bit."""
    like = *expected, *(t for t in case.call if isinstance(t, Tensor))
    poison(*like)
    first = _inferred(run, case)
    poison(*like)
    second = _inferred(run, case)
    fault = case.unchanged()
    if fault:
        raise Wrong(fault)
    if not _equal(first, second):
        finite = all(t.isfinite().all() for t in first)
        raise Wrong("two calls differ" if finite else "it leaves values unwritten, or makes them NaN")
    elsewhere: list[tuple[Tensor, ...]] = []
    thread = threading.Thread(target=lambda: elsewhere.append(_inferred(run, case)))
    thread.start()
    thread.join()
    if not elsewhere or not _equal(first, elsewhere[0]):
        raise Wrong("another thread gets another result")
    return first


def _inferred(run: Bound, case: Case) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return tuple(t.clone() for t in results(run(*case.call)))


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def poison(*like: Tensor) -> None:
    """Memory as large as these, full of NaN and then let go, all at once: torch's allocator gives it to whoever asks
    next for as much, which may be a gated input before the result.
    """
    _ = [torch.full_like(t, float("nan")) for t in like]


def _largest(t: Tensor) -> float:
    return t.abs().nan_to_num(nan=float("inf")).max().item()
