"""cuDNN and cuBLAS on a GPU: the convolutions that torch itself calls, with what follows in place, or, where a trial
chose it, convolution, bias, residual and ReLU in one call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import settings
from . import reference
from .activations import ACTIVATIONS
from .problem import Apart, Call, ConvProblem, InTurn, NormActProblem, Problem, Run

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuse(problem: Problem) -> str | None:
    """Why cuDNN cannot serve here, or None."""
    if torch.version.hip is not None:
        return "this build of torch is for ROCm, which has no cuDNN"
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "cuDNN is missing or switched off (torch.backends.cudnn)"
    if problem.dtype not in _DTYPES:
        return f"these calls compute in float32, float16 and bfloat16, not in {problem.dtype}"
    return None


class PlainConv(Run):
    """cuDNN's convolution with its bias; residual and activation follow in place."""

    label = "cuDNN"

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(problem.dtype)
        stride, padding, dilation, groups = problem.geometry
        self.geometry = (list(stride), list(padding), list(dilation), groups)
        self.activate = ACTIVATIONS[problem.activation].in_place

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        if gate is not None:
            x = x.mul_(gate[:, :, None, None]) if consume else x * gate[:, :, None, None]
        return self.convolve(x, residual)

    def convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The convolution of a map that the gate is in already."""
        y = F.conv2d(x, self.weight, self.bias, *self.geometry)
        return self.activate(y if residual is None else y.add_(residual))


class FusedConv(PlainConv):
    """cuDNN's convolution + bias [+ residual] + ReLU in one call, or the plain one for good once that has computed what
    the fused one could not.

    torch says of a missing engine no more than a RuntimeError with a text. So whatever is neither memory nor the device
    is taken for one, and an error that is not is the plain call's as well, which raises it.
    """

    label = "cuDNN, fused"

    def convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.refused:
            return super().convolve(x, residual)
        try:
            return self._fused(x, residual)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            y = super().convolve(x, residual)
            self.refused, self.label = str(error)[:300] or type(error).__name__, PlainConv.label
            return y

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
        return torch.ops.aten.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *self.geometry)


CONVS: dict[str, type[Run]] = {"plain": PlainConv, "fused": FusedConv}
"""The variants of a convolution."""


def variants(problem: Problem) -> tuple[str, ...]:
    """The variants that can compute a problem, first the one that serves where none is named.

    torch's fused calls ask for no deterministic kernel, whatever the settings, and with `benchmark` they run another
    kernel in every process than the one that a trial has seen.
    """
    if not isinstance(problem, ConvProblem):
        return ("",)
    on = settings()
    fuses = problem.activation == "relu" and not on.deterministic and not on.benchmark
    return ("plain", "fused") if fuses else ("plain",)


def prepare_conv(problem: ConvProblem, weight: Tensor, bias: Tensor | None, variant: str = "plain") -> Run:
    """The convolution bound to its weights by a variant."""
    return CONVS[variant](problem, weight, bias)


prepare_pair = Apart.by(PlainConv)
prepare_back_to_back = InTurn.by(PlainConv)
prepare_join = reference.join_in_place
prepare_squeeze_excite = reference.prepare_squeeze_excite


def prepare_norm_act(problem: NormActProblem, scale: Tensor, shift: Tensor) -> Run:
    """The affine map and activation bound to scale and shift."""
    scale, shift = (t.to(problem.dtype).reshape(1, -1, 1, 1) for t in (scale, shift))

    def run(x: Tensor, gate: Tensor | None, consume: bool) -> Tensor:
        y = torch.addcmul(shift, x, scale if gate is None else scale * gate[:, :, None, None])
        return ACTIVATIONS[problem.activation].in_place(y)

    return Call(run, "torch addcmul")
