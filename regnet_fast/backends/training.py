"""Which module computes the passes of a training step, and why a forced backend cannot."""

from __future__ import annotations

from types import ModuleType

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
