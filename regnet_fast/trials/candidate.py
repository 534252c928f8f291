"""What can serve a problem: a backend and one of its variants.

What trials need to know of a kind of problem are functions of one dispatch each, on the class of the problem: those of
the operations are `candidates` and `prepare` here, `cpu.words`, and `make` and `verify` of check.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import singledispatch
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import (
    BACKENDS,
    BackToBackProblem,
    ConvProblem,
    Geometry,
    JoinProblem,
    NormActProblem,
    PairProblem,
    Problem,
    SqueezeExciteProblem,
    library,
    refuse,
)

_PREPARE = {
    ConvProblem: "prepare_conv",
    SqueezeExciteProblem: "prepare_squeeze_excite",
    NormActProblem: "prepare_norm_act",
    JoinProblem: "prepare_join",
    PairProblem: "prepare_pair",
    BackToBackProblem: "prepare_back_to_back",
}
Bound = Callable[..., Tensor | tuple[Tensor, ...]]
"""What a call of a problem gives: one result, or several together."""

KINDS: dict[str, type] = {kind.__name__: kind for kind in _PREPARE}
"""Every kind of problem by the name of its class."""


class Candidate(NamedTuple):
    """A backend by its name, and the variant, "" where it has one alone."""

    backend: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.backend}:{self.variant}" if self.variant else self.backend

    @classmethod
    def named(cls, name: str) -> Candidate:
        """The candidate of a name."""
        backend, _, variant = name.partition(":")
        return cls(backend, variant)


@singledispatch
def candidates(problem: Problem) -> list[Candidate]:
    """Everything that can serve a problem here, the peer first: what serves where nothing was tried.

    A module tells its variants by `variants(problem)`. The peer is the framework's library, or where that refuses the
    reference. The kernels for a CPU are tried in this process (trials/cpu.py).
    """
    able = [name for name in BACKENDS if refuse(name, problem) is None]
    peer = "aten" if "aten" in able else "reference"
    found = []
    for name in (peer, *(name for name in able if name not in ("aten", "native", "reference"))):
        variants = getattr(library(name, problem.device), "variants", None)
        found += [Candidate(name, variant) for variant in (variants(problem) if variants else ("",))]
    return found


@singledispatch
def prepare(problem: Problem, weights: Sequence[Tensor | None], candidate: Candidate) -> Bound:
    """The weights bound by a candidate."""
    options = {"variant": candidate.variant} if candidate.variant else {}
    return bound(library(candidate.backend, problem.device), problem, weights, **options)


def bound(module: ModuleType, problem: Problem, weights: Sequence[Tensor | None], **options: str) -> Bound:
    """The weights bound by a backend, as the problem calls them."""
    run = getattr(module, _PREPARE[type(problem)])(problem, *weights, **options)
    return run.with_means if isinstance(problem, ConvProblem) and problem.means else run


def to_json(problem: Problem) -> dict[str, Any]:
    """A problem as JSON has it."""
    facts = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return {"kind": type(problem).__name__, **facts, "dtype": str(problem.dtype).removeprefix("torch.")}


def from_json(facts: dict[str, Any]) -> Problem:
    """The problem of `to_json`."""
    facts = dict(facts)
    kind = KINDS[facts.pop("kind")]
    facts["dtype"] = getattr(torch, facts["dtype"])
    for name in ("input_shape", "kernel"):
        if name in facts:
            facts[name] = tuple(facts[name])
    if "geometry" in facts:
        *pairs, groups = facts["geometry"]
        facts["geometry"] = Geometry(*map(tuple, pairs), groups)
    return kind(**facts)
