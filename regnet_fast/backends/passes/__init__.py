"""Which passes a training step takes, and why a forced backend has none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .. import BACKENDS, BackendError, forced_backend, forced_backends, library
from ..cuda import launcher
from . import compiled
from .compiled import CompiledPasses
from .cuda import CudaConvs
from .torch import Passes

TORCH, COMPILED = Passes(), CompiledPasses()


def refuse(x: Tensor) -> str | None:
    """Why no forced backend has the passes for maps like x, or None; None as well where nothing is forced."""
    reasons = [_refused(name, x) for name in forced_backends()]
    return None if None in reasons else "; ".join(reasons) or None


def _refused(name: str, x: Tensor) -> str | None:
    refuse_training = getattr(library(name, str(x.device)), "refuse_training", None)
    return None if refuse_training is None else refuse_training(x)


def passes_for(x: Tensor, names: Sequence[str] | None = None) -> Passes:
    """The compiled passes for what they do not refuse, otherwise torch's calls; or those of the first backend named
    that has them, with csrc/'s grouped convolutions where `cuda` is named before it.

    `names` are the forced backends where none are given. Raises BackendError where these have none for maps like x.
    """
    names = forced_backends() if names is None else names
    if not names:
        return TORCH if compiled.refuse(x) else COMPILED
    name = next((name for name in names if not _refused(name, x)), None)
    if name is None:
        raise BackendError(f"training: the backend {forced_backend()!r} was asked for and cannot serve: {refuse(x)}")
    return _forced(name, "cuda" in names[: names.index(name)])


def choices(x: Tensor, grouped: bool) -> list[str]:
    """Everything that `backend(...)` can be told for maps like x, but the reference; csrc/'s grouped convolutions are
    named before other passes where there are `grouped` ones.
    """
    able = [name for name in BACKENDS if name not in ("native", "reference") and _refused(name, x) is None]
    behind = able if grouped and launcher.refuse_device(str(x.device)) is None else []
    return [*(f"cuda,{name}" for name in behind), *able]


@lru_cache(maxsize=len(BACKENDS) * 2)
def _forced(name: str, behind_cuda: bool) -> Passes:
    if name != "triton":
        return CudaConvs() if behind_cuda else TORCH
    from .triton import CudaTritonPasses, TritonPasses  # which need Triton

    return CudaTritonPasses() if behind_cuda else TritonPasses()


class Served(NamedTuple):
    """In words, what computes a block in a training step.

    Attributes: `backend`; `forward` and `backward`, the libraries; `reason`, why faster passes do not serve, or "".
    """

    backend: str
    forward: str
    backward: str
    reason: str


def describe(x: Tensor, grouped: bool, names: Sequence[str] | None = None) -> Served:
    """What `passes_for(x, names)` is. `grouped` says that the block has a grouped convolution."""
    host = "cuDNN" if x.is_cuda else "oneDNN"
    names = forced_backends() if names is None else names
    refused = {name: reason for name in names if (reason := _refused(name, x)) is not None}
    if not names:
        reason = compiled.refuse(x)
        words = f"{host} convolutions, {'torch' if reason else 'csrc/cpu'} passes"
        return Served("aten", words, words, reason or "")
    serving = next(name for name in names if name not in refused)
    forward = backward = f"{host} convolutions, torch passes"
    if serving == "triton":
        forward = f"Triton passes, 1x1 and grouped convolutions; {host} others"
        backward = f"Triton passes and grouped convolutions; {host} others"
    if "cuda" in names[: names.index(serving)]:
        serving = f"cuda,{serving}"
        if grouped:
            forward, backward = (f"CUDA C++ grouped convolutions; else {words}" for words in (forward, backward))
    return Served(serving, forward, backward, "; ".join(f"{n}: {why}" for n, why in refused.items() if n != "cuda"))
