"""The backends, and the one place where a backend is chosen.

A backend is a module with `refuse(problem) -> str | None` (why it cannot serve, in words for the user) and one
`prepare_*` function per kind of problem, which takes folded weights and returns a `Run` bound to them. Where it has
several ways to serve, `variants(problem)` names them. One that has `NOT_BY_ITSELF`, a reason, serves only where a trial
chose it or it is forced. The name `aten` stands for the framework's own library for a device: oneDNN on a CPU, cuDNN on
a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType

from . import cuda, cudnn, native, onednn, reference, triton
from .activations import ACTIVATIONS
from .problem import (
    BackToBackProblem,
    ConvProblem,
    Deferred,
    Geometry,
    JoinProblem,
    NormActProblem,
    PairProblem,
    Problem,
    Run,
    SqueezeExciteProblem,
    computed,
    pixel_means,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "BackToBackProblem",
    "BackendError",
    "ConvProblem",
    "Deferred",
    "Geometry",
    "JoinProblem",
    "NormActProblem",
    "PairProblem",
    "Problem",
    "Run",
    "Selection",
    "SqueezeExciteProblem",
    "backend",
    "computed",
    "forced_backend",
    "forced_backends",
    "library",
    "pixel_means",
    "refuse",
    "select",
]

BACKENDS = ("aten", "native", "triton", "cuda", "reference")
"""The names of all backends, in the order in which `auto` asks them."""

_MODULES = {"native": native, "triton": triton, "cuda": cuda, "reference": reference}
_ATEN = {"cpu": onednn, "cuda": cudnn}


def library(name: str, device: str) -> ModuleType | None:
    """The module behind a backend's name on a device; None where the framework has no library for the device."""
    return _ATEN.get(device.partition(":")[0]) if name == "aten" else _MODULES[name]


def refuse(name: str, problem: Problem) -> str | None:
    """Why a backend cannot serve a problem, or None."""
    module = library(name, problem.device)
    if module is None:
        return f"the framework has no fused convolution calls for the device {problem.device!r}"
    return module.refuse(problem)


class BackendError(RuntimeError):
    """A backend was forced where it cannot serve."""


@dataclass(frozen=True)
class Selection:
    """The backend that serves a problem, and why each one asked before it does not."""

    name: str
    module: ModuleType
    refused: dict[str, str] = field(default_factory=dict)


_forced: ContextVar[str | None] = ContextVar("regnet_fast_backend", default=None)


def _checked(name: str) -> str:
    unknown = next((one for one in name.split(",") if one not in BACKENDS), None)
    if name != "auto" and unknown is not None:
        raise ValueError(f"Unknown backend {unknown!r}; choose one of: auto, {', '.join(BACKENDS)}.")
    return name


@lru_cache(maxsize=1)
def _environment_backend() -> str:
    return _checked(os.environ.get("REGNET_FAST_BACKEND", "auto"))


def forced_backend() -> str | None:
    """The backend forced here and now by `backend(...)` or REGNET_FAST_BACKEND (read once), or None for `auto`.

    Several are one name, with commas.
    """
    name = _forced.get() or _environment_backend()
    return None if name == "auto" else name


def forced_backends() -> tuple[str, ...]:
    """The names of the backends that are forced here and now, in the order in which they are asked."""
    name = forced_backend()
    return () if name is None else tuple(name.split(","))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block, in this thread or task alone.

    Args:
        name: one of `BACKENDS`; several with commas, such as "cuda,triton", to be asked in this order; or "auto" to
            lift a force that stands outside.

    Inside the block whatever none of them can serve raises `BackendError` with the reason, where `auto` would have
    taken another way. Raises ValueError for an unknown name.
    """
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def select(problem: Problem) -> Selection:
    """Choose the backend for a problem: the first forced one that does not refuse, or where none is forced the first in
    `BACKENDS` that does not refuse and serves by itself.

    Raises BackendError where the forced backends refuse, naming the operation, the reason and the alternatives.
    """
    forced, refused = forced_backends(), {}
    for name in forced or BACKENDS:
        reason, module = refuse(name, problem), library(name, problem.device)
        if reason is None and not forced:
            reason = getattr(module, "NOT_BY_ITSELF", None)
        if reason is None:
            return Selection(name, module, refused)
        refused[name] = reason
    if forced:
        others = [name for name in BACKENDS if name not in forced and refuse(name, problem) is None]
        reasons = refused[forced[0]] if len(forced) == 1 else "; ".join(f"{name}: {r}" for name, r in refused.items())
        raise BackendError(
            f"{problem.op}: the backend {forced_backend()!r} was asked for and cannot serve: {reasons}. "
            f"Backends that can: {', '.join(others) or 'none'}. Problem: {problem}"
        )
    raise BackendError(f"{problem.op}: no backend can serve {problem}: {refused}")
