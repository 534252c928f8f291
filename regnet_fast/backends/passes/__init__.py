"""Which passes a training step takes, and why a forced backend has none."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .. import BACKENDS, BackendError, forced_backend, forced_backends, library
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


def passes_for(x: Tensor) -> Passes:
    """The compiled passes for what they do not refuse, otherwise torch's calls; or those of the first forced backend
    that has them, with csrc/'s grouped convolutions where `cuda` is forced before it.

    Raises BackendError where the forced backends have none for maps like x.
    """
    names = forced_backends()
    if not names:
        return TORCH if compiled.refuse(x) else COMPILED
    reason = refuse(x)
    if reason is not None:
        raise BackendError(f"training: the backend {forced_backend()!r} was asked for and cannot serve: {reason}")
    name = next(name for name in names if not _refused(name, x))
    return _forced(name, "cuda" in names[: names.index(name)])


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


def describe(x: Tensor, grouped: bool) -> Served:
    """What `passes_for(x)` is. `grouped` says that the block has a grouped convolution."""
    host = "cuDNN" if x.is_cuda else "oneDNN"
    names = forced_backends()
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
