"""Which module computes the passes of a training step, and why a forced backend cannot."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import BackendError, cpu_passes, cuda_passes, forced_backend, forced_backends, library, passes


def refuse(x: Tensor) -> str | None:
    """Why no forced backend has the passes for maps like x, or None; None as well where nothing is forced."""
    reasons = [_refused(name, x) for name in forced_backends()]
    return None if None in reasons else "; ".join(reasons) or None


def _refused(name: str, x: Tensor) -> str | None:
    refuse_training = getattr(library(name, str(x.device)), "refuse_training", None)
    return None if refuse_training is None else refuse_training(x)


def passes_for(x: Tensor) -> ModuleType | cuda_passes.Passes:
    """`cpu_passes` for what it does not refuse, otherwise `passes`, or where the backend `triton` is forced
    `triton_passes`: modules with the same functions. Where `cuda` is forced before it, `cuda_passes.Passes` over that
    module.

    Raises BackendError where the kernels of the forced backends cannot serve maps like x.
    """
    reason = refuse(x)
    if reason is not None:
        raise BackendError(f"training: the backend {forced_backend()!r} was asked for and cannot serve: {reason}")
    names = forced_backends()
    if not names:
        return passes if cpu_passes.refuse(x) else cpu_passes
    name = next((name for name in names if not _refused(name, x)), None)
    module = passes
    if name == "triton":
        from . import triton_passes as module
    if "cuda" not in names[: names.index(name) if name else 0]:
        return module
    return cuda_passes.Passes(module)


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
    library = "cuDNN" if x.is_cuda else "oneDNN"
    names = forced_backends()
    refused = {name: reason for name in names if (reason := _refused(name, x)) is not None}
    if not names:
        reason = cpu_passes.refuse(x)
        words = f"{library} convolutions, {'torch' if reason else 'csrc/cpu'} passes"
        return Served("aten", words, words, reason or "")
    serving = next(name for name in names if name not in refused)
    forward = backward = f"{library} convolutions, torch passes"
    if serving == triton.NAME:
        forward = f"Triton passes, 1x1 and grouped convolutions; {library} others"
        backward = f"Triton passes and grouped convolutions; {library} others"
    if cuda.NAME in names[: names.index(serving)]:
        serving = f"{cuda.NAME},{serving}"
        if grouped:
            forward, backward = (f"CUDA C++ grouped convolutions; else {words}" for words in (forward, backward))
    return Served(serving, forward, backward, "; ".join(f"{n}: {why}" for n, why in refused.items() if n != cuda.NAME))
