"""The backends, and the one place where a backend is chosen.

A backend is a module with `NAME`, `refuse(problem) -> str | None` (why it cannot serve, in words for the user) and one
`prepare_*` function per kind of problem, which takes folded weights and returns a callable bound to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType

from . import aten, reference, triton
from .problem import ACTIVATIONS, ConvProblem, NormActProblem, Problem, SqueezeExciteProblem

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "BackendError",
    "ConvProblem",
    "NormActProblem",
    "Problem",
    "Selection",
    "SqueezeExciteProblem",
    "backend",
    "forced_backend",
    "select",
]

BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (aten, triton, reference)}
"""Every backend by name, in the order in which `auto` asks them."""


class BackendError(RuntimeError):
    """A backend was forced where it cannot serve."""


@dataclass(frozen=True)
class Selection:
    """The backend that serves a problem, and why each one asked before it does not."""

    name: str
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        return BACKENDS[self.name]


_forced: ContextVar[str | None] = ContextVar("regnet_fast_backend", default=None)


def _checked(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}.")
    return name


@lru_cache(maxsize=1)
def _environment_backend() -> str:
    return _checked(os.environ.get("REGNET_FAST_BACKEND", "auto"))


def forced_backend() -> str | None:
    """The backend forced here and now by `backend(...)` or REGNET_FAST_BACKEND (read once), or None for `auto`."""
    name = _forced.get() or _environment_backend()
    return None if name == "auto" else name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block, in this thread or task alone.

    Args:
        name: one of `BACKENDS`, or "auto" to lift a force that stands outside.

    Inside the block whatever the backend cannot serve raises `BackendError` with the reason, where `auto` would have
    taken another way. Raises ValueError for an unknown name.
    """
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def select(problem: Problem) -> Selection:
    """Choose the backend for a problem: the forced one, else the first in `BACKENDS` that does not refuse.

    Raises BackendError where the forced backend refuses, naming the operation, the reason and the alternatives.
    """
    forced = forced_backend()
    if forced is not None:
        reason = BACKENDS[forced].refuse(problem)
        if reason is None:
            return Selection(forced)
        others = [name for name, module in BACKENDS.items() if name != forced and module.refuse(problem) is None]
        raise BackendError(
            f"{problem.op}: the backend {forced!r} was asked for and cannot serve: {reason}. "
            f"Backends that can: {', '.join(others) or 'none'}. Problem: {problem}"
        )
    refused: dict[str, str] = {}
    for name, module in BACKENDS.items():
        reason = module.refuse(problem)
        if reason is None:
            return Selection(name, refused)
        refused[name] = reason
    raise BackendError(f"{problem.op}: no backend can serve {problem}: {refused}")
