"""Which module computes the passes of a training step."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import BackendError, forced_backend, passes, triton


def passes_for(x: Tensor) -> ModuleType:
    """`passes`, or where the backend `triton` is forced `triton_passes`: a module with the same functions.

    Raises BackendError where the kernels cannot serve maps like x.
    """
    if forced_backend() != triton.NAME:
        return passes
    reason = triton.refuse_training(x)
    if reason is not None:
        raise BackendError(f"training: the backend {triton.NAME!r} was asked for and cannot serve: {reason}")
    from . import triton_passes

    return triton_passes
