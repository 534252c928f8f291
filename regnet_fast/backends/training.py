"""Which module computes the passes of a training step, and why a forced backend cannot."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import BACKENDS, BackendError, forced_backend, forced_backends, passes, triton


def refuse(x: Tensor) -> str | None:
    """Why no forced backend has the passes for maps like x, or None; None as well where nothing is forced."""
    reasons = [_refused(name, x) for name in forced_backends()]
    return None if None in reasons else "; ".join(reasons) or None


def _refused(name: str, x: Tensor) -> str | None:
    refuse_training = getattr(BACKENDS[name], "refuse_training", None)
    return None if refuse_training is None else refuse_training(x)


def passes_for(x: Tensor) -> ModuleType:
    """`passes`, or where the backend `triton` is forced `triton_passes`: a module with the same functions.

    Raises BackendError where the kernels of the forced backends cannot serve maps like x.
    """
    reason = refuse(x)
    if reason is not None:
        raise BackendError(f"training: the backend {forced_backend()!r} was asked for and cannot serve: {reason}")
    name = next((name for name in forced_backends() if not _refused(name, x)), None)
    if name != triton.NAME:
        return passes
    from . import triton_passes

    return triton_passes
