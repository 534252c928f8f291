"""The backend `triton`: the kernels of kernels/, on a GPU since sm_80, or on a CPU in Triton's interpreter.

Nothing of Triton is imported before it can serve.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import activations
from .problem import (
    Apart,
    BackToBackProblem,
    ConvProblem,
    Deferred,
    InTurn,
    JoinProblem,
    NormActProblem,
    PairProblem,
    Problem,
    Run,
    SqueezeExciteProblem,
    computed,
)

LABEL = "Triton"
NOT_BY_ITSELF = "the Triton kernels serve where a trial chose them or where they are forced"
"""Why `auto` leaves a backend aside that could serve."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 2**31 - 2**16  # of what kernels count in 32 bits, with room for the last tile


def refuse(problem: Problem) -> str | None:
    """Why there is no kernel for a problem, or None."""
    if isinstance(problem, (PairProblem, BackToBackProblem)):
        return next(filter(None, map(refuse, problem.both)), None)
    reason = _refuse_device(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in _DTYPES:
        return f"the kernels compute in float32, float16 and bfloat16, not in {problem.dtype}"
    reason = activations.refuse(problem.activation)
    if reason is not None:
        return reason
    if isinstance(problem, SqueezeExciteProblem):
        return activations.refuse_gate(problem.gate_activation)
    if isinstance(problem, ConvProblem):
        return _refuse_conv(problem)
    if problem.input_shape[0] * _area(problem.input_shape) > _MOST:
        return "too many pixels to count in 32 bits"
    return None


def refuse_training(x: Tensor) -> str | None:
    """Why there are no kernels for the passes of a training step over maps like x, or None."""
    reason = _refuse_device(str(x.device))
    if reason is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"the kernels compute in float32, float16 and bfloat16, not in {x.dtype}"
    if x.shape[0] * _area(x.shape) > _MOST:
        return "too many pixels to count in 32 bits"
    return None


def _refuse_device(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with the CUDA builds of torch"
    if device == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "Triton's kernels run on a GPU"
    if device.partition(":")[0] != "cuda":
        return f"Triton's kernels do not run on the device {device!r}"
    if torch.version.hip is not None:
        return "this build of torch is for ROCm, which the kernels were not made for"
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or newer"
    return None


def _area(shape: tuple[int, int, int, int]) -> int:
    return shape[2] * shape[3]


def _refuse_conv(problem: ConvProblem) -> str | None:
    n, c, h, w = problem.input_shape
    if max(c * h * w, problem.output_shape[1] * _area(problem.output_shape)) > _MOST:
        return "an image of too many elements to count in 32 bits"
    if n * max(h * w, _area(problem.output_shape)) > _MOST:
        return "too many pixels to count in 32 bits"
    (down, across), _, _, groups = problem.geometry
    if problem.geometry.pointwise(problem.kernel):
        return None if down == across else "a 1x1 convolution with two different strides"
    if problem.gate:
        return "only 1x1 convolutions take a gate on their input"
    width, out_width = c // groups, problem.out_channels // groups
    if groups > 1 and not _depthwise(problem) and (width % 4 or out_width % 4):
        return f"groups of {width} and {out_width} channels: rows of a group would not be aligned"
    if _depthwise(problem) and problem.residual:
        return "a depthwise convolution with a residual"
    return None


def _depthwise(problem: ConvProblem) -> bool:
    return problem.depthwise and problem.out_channels == problem.input_shape[1]


def current(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class PointwiseConv(Run):
    """A 1x1 convolution bound to its weights; it normalises a deferred x and residual as it reads them."""

    label = LABEL
    takes_deferred = True

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None):
        from ..kernels.pointwise_conv import pointwise_conv

        self.launch = pointwise_conv
        self.weight = weight.flatten(1).contiguous()
        self.bias = None if bias is None else bias.float()
        self.stride, self.activation = problem.geometry.stride[0], problem.activation

    def __call__(
        self,
        x: Tensor | Deferred,
        gate: Tensor | None,
        residual: Tensor | Deferred | None,
        consume: bool,
        into_residual: bool,
    ) -> Tensor:
        norms = {}
        if x.__class__ is Deferred:
            norms["norm"], x, gate = x.run.affine, x.x, x.gate
        if residual.__class__ is Deferred:
            if residual.gate is None:
                norms["residual_norm"], residual = residual.run.affine, residual.x
            residual = computed(residual)
        gate = None if gate is None else gate.to(x.dtype).contiguous()
        options = {"stride": self.stride, "activation": self.activation, **norms}
        with current(x):
            return self.launch(x, self.weight, self.bias, gate, residual, **options)

    def beside(self, other: PointwiseConv, x: Tensor | Deferred) -> tuple[Tensor, Tensor] | None:
        """`Run.beside`; None where there is no kernel for the two."""
        if self.stride != 1 or other.activation != "none":
            return None
        from ..kernels.pointwise_pair import pointwise_pair

        norm = None
        if x.__class__ is Deferred:
            if x.gate is not None:
                return None
            norm, x = x.run.affine, x.x
        options = {"norm": norm, "stride": other.stride, "activation": self.activation}
        with current(x):
            return pointwise_pair(x, self.weight, self.bias, other.weight, other.bias, **options)


class GroupedConv(Run):
    """Any other convolution bound to its weights; it takes no gate."""

    label = LABEL

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None):
        self.geometry = (problem.kernel, *problem.geometry[:3])
        self.bias = None if bias is None else bias.float()
        self.groups, self.activation = problem.geometry.groups, problem.activation
        self.depthwise = _depthwise(problem)
        self.any_layout = not self.depthwise
        if self.depthwise:
            from ..kernels import depthwise_conv as kernels

            self.launch = kernels.depthwise_conv
        else:
            from ..kernels import implicit_gemm as kernels

            self.launch = kernels.convolution
        self.weight = kernels.packed_weight(weight)

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        return self._run(x, residual, False)[0]

    def with_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`Run.with_parts`."""
        return self._run(x, None, True)

    def _run(self, x: Tensor, residual: Tensor | None, means: bool) -> tuple[Tensor, Tensor | None]:
        with current(x):
            if self.depthwise:
                return self.launch(x, self.weight, self.bias, *self.geometry, self.activation, means)
            return self.launch(x, self.weight, self.bias, residual, *self.geometry, self.groups, self.activation, means)


def prepare_conv(problem: ConvProblem, weight: Tensor, bias: Tensor | None) -> Run:
    """The convolution bound to its weights."""
    return (PointwiseConv if problem.geometry.pointwise(problem.kernel) else GroupedConv)(problem, weight, bias)


class PointwisePair(Apart):
    """The convolutions of a pair in one launch."""

    label = LABEL

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        first, other = self.runs
        return first.beside(other, x)


PAIRS = {"apart": Apart, "beside": PointwisePair}
"""The variants of a pair."""


def variants(problem: Problem) -> tuple[str, ...]:
    """The variants that can compute a problem."""
    return tuple(PAIRS) if isinstance(problem, PairProblem) else ("",)


def prepare_pair(problem: PairProblem, *weights: Tensor | None, variant: str = "apart") -> Run:
    """Two convolutions of one map bound to their weights."""
    return PAIRS[variant].by(prepare_conv)(problem, *weights)


prepare_back_to_back = InTurn.by(prepare_conv)


class SqueezeExcite(Run):
    """The gate bound to its float32 weights."""

    label = LABEL

    def __init__(self, problem: SqueezeExciteProblem, *weights: Tensor):
        from ..kernels.squeeze_excite import squeeze_excite

        self.launch, self.weights = squeeze_excite, [t.contiguous() for t in weights]
        self.activations = {"activation": problem.activation, "gate_activation": problem.gate_activation}

    def __call__(self, means: Tensor) -> Tensor:
        return self.from_parts(means[:, None], means.dtype)

    def from_parts(self, parts: Tensor, dtype: torch.dtype) -> Tensor:
        """`Run.from_parts`."""
        with current(parts):
            return self.launch(parts.float().contiguous(), *self.weights, **self.activations, dtype=dtype)


prepare_squeeze_excite = SqueezeExcite


class Join(Run):
    """What ends a block, in one launch."""

    label = LABEL

    def __init__(self, problem: JoinProblem):
        from ..kernels.training_join import ReadMap, join

        self.launch, self.map, self.activation = join, ReadMap, problem.activation

    def __call__(self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool) -> Tensor:
        terms = [self.map(x, factor=None if gate is None else gate.contiguous())]
        terms += [] if residual is None else [self.map(residual)]
        with current(x):
            return self.launch(*terms, activation=self.activation)


prepare_join = Join


class NormAct(Run):
    """The affine map and activation bound to scale and shift."""

    label = LABEL

    def __init__(self, problem: NormActProblem, scale: Tensor, shift: Tensor):
        from ..kernels.norm_act import norm_act

        self.launch = norm_act
        self.affine = (scale.float().contiguous(), shift.float().contiguous(), problem.activation)

    def __call__(self, x: Tensor, gate: Tensor | None, consume: bool) -> Tensor:
        scale, shift, activation = self.affine
        gate = None if gate is None else gate.contiguous()
        with current(x):
            return self.launch(x, scale, shift, gate, activation=activation)


prepare_norm_act = NormAct
