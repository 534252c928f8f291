"""The backend `aten`: what the framework's own libraries fuse, oneDNN on a CPU and cuDNN on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from . import cudnn, onednn
from .problem import ConvProblem, NormActProblem, Problem, SqueezeExciteProblem

NAME = "aten"
_LIBRARIES: dict[str, ModuleType] = {"cpu": onednn, "cuda": cudnn}


def refuse(problem: Problem) -> str | None:
    """Why the device's library cannot serve, or None."""
    library = _LIBRARIES.get(_type(problem))
    if library is None:
        return f"the framework has no fused convolution calls for the device {problem.device!r}"
    return library.refuse(problem)


def _type(problem: Problem) -> str:
    return problem.device.partition(":")[0]


def way(problem: ConvProblem) -> type[onednn.Convolution] | None:
    """On a CPU the class that serves a problem and may serve other input shapes with the same weights."""
    return onednn.way(problem) if _type(problem) == "cpu" else None


def prepare_conv(
    problem: ConvProblem, weight: Tensor, bias: Tensor | None, packed: bool = True
) -> Callable[..., Tensor]:
    """The convolution bound to its weights: `run(x, gate, residual, consume, into_residual)`; on a CPU they are packed
    for the input shape, or serve every shape.
    """
    if _type(problem) == "cpu":
        return onednn.prepare_conv(problem, weight, bias, packed)
    return cudnn.prepare_conv(problem, weight, bias)


def prepare_squeeze_excite(problem: SqueezeExciteProblem, *weights: Tensor) -> Callable[[Tensor], Tensor]:
    """The gate bound to its float32 weights: `run(means)`."""
    return _LIBRARIES[_type(problem)].prepare_squeeze_excite(problem, *weights)


def prepare_norm_act(problem: NormActProblem, scale: Tensor, shift: Tensor) -> Callable[..., Tensor]:
    """The affine map and activation bound to scale and shift: `run(x, gate, consume)`."""
    return _LIBRARIES[_type(problem)].prepare_norm_act(problem, scale, shift)
