"""The backend `cuda`: the CUDA C++ kernels of csrc/, on a GPU since sm_80.

Nothing of CUDA is touched, and nothing compiled, before it is asked to serve on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .. import activations, triton
from ..problem import BackToBackProblem, ConvProblem, InTurn, Problem, Run, SqueezeExciteProblem
from . import launcher, plans
from .plans import DepthwiseConv, Launch
from .plans import GroupedConv as Groups

LABEL = "CUDA C++"
NOT_BY_ITSELF = "the CUDA C++ kernels serve where a trial chose them or where they are forced"
"""Why `auto` leaves a backend aside that could serve."""


def refuse(problem: Problem) -> str | None:
    """Why there is no kernel for a problem, or no way to it, or None."""
    reason = launcher.refuse_device(problem.device)
    if reason is not None:
        return reason
    if isinstance(problem, SqueezeExciteProblem):
        return _refuse_squeeze_excite(problem)
    if isinstance(problem, BackToBackProblem):
        return _refuse_back_to_back(problem)
    if not isinstance(problem, ConvProblem) or problem.geometry.groups == 1:
        return "csrc/ has kernels for grouped convolutions and squeeze-excite alone"
    return refuse_conv(problem) or no_way((_launch(problem, means) for means in (False, True)), problem.device)


def refuse_conv(problem: ConvProblem) -> str | None:
    """Why there are no kernels for a grouped convolution on a device that nothing is said against, or None."""
    reason = activations.refuse(problem.activation)
    if reason is not None:
        return reason
    if problem.gate or problem.residual:
        return f"a grouped convolution with a {'gate' if problem.gate else 'residual'}"
    if problem.out_channels != problem.input_shape[1]:
        return f"{problem.input_shape[1]} channels in and {problem.out_channels} out: only as many out as in"
    stride, padding, dilation, _ = problem.geometry
    if stride[0] != stride[1]:
        return f"two different strides, {stride}"
    geometry = {"kernel": problem.kernel, "padding": padding, "dilation": dilation}
    refuse_plan = plans.refuse_depthwise if problem.depthwise else plans.refuse
    return refuse_plan(plan_of(problem), arch=launcher.target(problem.device).arch, **geometry)


def _refuse_back_to_back(problem: BackToBackProblem) -> str | None:
    reason = activations.refuse(problem.first_activation) or refuse_conv(problem.second)
    if reason is not None or problem.second.depthwise:
        return reason or "a depthwise convolution behind another"
    plan, target = _plan_of_both(problem), launcher.target(problem.device)
    reason = plans.refuse(plan, arch=target.arch) or plans.refuse_in_front(plan, target)
    return reason or no_way((_launch_both(problem),), problem.device)


def variants(problem: Problem) -> tuple[str, ...]:
    """The variants that can compute a problem: two convolutions back to back in one launch, or Triton's and one of
    csrc/ in turn.
    """
    if not isinstance(problem, BackToBackProblem):
        return ("",)
    in_turn = triton.refuse(problem.first) is None and refuse(problem.second) is None
    return ("fused", "in turn") if in_turn else ("fused",)


def no_way(launches: Iterable[Launch], device: str) -> str | None:
    """Why some plans cannot be launched on a device that nothing is said against, or None."""
    return next(filter(None, (launcher.refuse(launch, device) for launch in launches)), None)


def refuse_training(x: Tensor) -> str:
    """Why there are no kernels for a whole training step."""
    return "csrc/ has the grouped convolutions of a training step alone: name what computes the rest, as 'cuda,triton'"


def plan_of(problem: ConvProblem) -> Groups | DepthwiseConv:
    """A convolution as the plans take it."""
    images, channels, height, columns = problem.input_shape
    groups, facts = problem.geometry.groups, (problem.geometry.stride[0], _plain(problem.dtype))
    if problem.depthwise:
        return DepthwiseConv(images, height, columns, channels, *facts)
    return Groups(images, height, columns, groups, channels // groups, *facts)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _launch(problem: ConvProblem, means: bool) -> Launch:
    if problem.depthwise:
        return plans.depthwise_conv_forward(plan_of(problem), problem.activation, means)
    target = launcher.target(problem.device)
    return plans.grouped_conv_forward(plan_of(problem), problem.activation, means, target)


def _plan_of_both(problem: BackToBackProblem) -> Groups:
    return replace(plan_of(problem.second), in_channels=problem.input_shape[1])


def _launch_both(problem: BackToBackProblem) -> Launch:
    options = {"target": launcher.target(problem.device), "read": problem.first_activation}
    return plans.grouped_conv_forward(_plan_of_both(problem), problem.activation, problem.means, **options)


def packed_weight(problem: ConvProblem, weight: Tensor) -> Tensor:
    """(K, C / groups, 3, 3) as the kernels read it, tap by tap: (K, 9 * C / groups), or (9, K) of a depthwise one."""
    if problem.depthwise:
        return weight.flatten(1).t().contiguous()
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


class GroupedConv(Run):
    """A grouped 3x3 convolution bound to its weights; it takes no gate and no residual."""

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None):
        self.problem, self.weight = problem, aligned(packed_weight(problem, weight))
        self.bias = None if bias is None else aligned(bias.float().contiguous())
        _, k, h, w = self._shape = problem.output_shape
        self._strides = (k * h * w, 1, k * w, k)  # channels_last
        self._kernels: dict[bool, launcher.Kernel] = {}
        self.label = f"{LABEL}, {launcher.way(_launch(problem, False), problem.device)}"

    def _kernel(self, means: bool) -> launcher.Kernel:
        kernel = self._kernels.get(means)
        if kernel is None:
            kernel = launcher.Kernel(_launch(self.problem, means), self.weight.device)
            self._kernels = {**self._kernels, means: kernel}  # a new one, since other threads may be reading
        return kernel

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        return self._run(x, False)[0]

    def with_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`Run.with_parts`."""
        return self._run(x, True)

    def _run(self, x: Tensor, means: bool) -> tuple[Tensor, Tensor | None]:
        kernel = self._kernel(means)
        y = x.new_empty_strided(self._shape, self._strides)
        parts = x.new_empty(kernel.launch.buffers["parts"], dtype=torch.float32) if means else None
        kernel(x=aligned(x), weight=self.weight, bias=self.bias, y=y, parts=parts, **_NOTHING_READ)
        return y, parts


_NOTHING_READ = dict.fromkeys(("scale", "shift", "in_weight", "in_bias", "moments"))


class BackToBack(Run):
    """A 1x1 convolution and a grouped 3x3 of its result in one launch, bound to their weights."""

    def __init__(
        self,
        problem: BackToBackProblem,
        weight: Tensor,
        bias: Tensor | None,
        second_weight: Tensor,
        second_bias: Tensor | None,
    ):
        packed = weight.flatten(1).contiguous(), packed_weight(problem.second, second_weight)
        biases = (None if t is None else aligned(t.float().contiguous()) for t in (bias, second_bias))
        names = ("in_weight", "weight", "in_bias", "bias")
        self._given = dict(zip(names, (*map(aligned, packed), *biases), strict=True))
        self._kernel = launcher.Kernel(_launch_both(problem), weight.device)
        self.problem = problem
        self.label = f"{LABEL}, both in one, {launcher.way(self._kernel.launch, problem.device)}"
        _, k, h, w = self._shape = problem.second.output_shape
        self._strides = (k * h * w, 1, k * w, k)  # channels_last

    def __call__(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        kernel, means = self._kernel, self.problem.means
        y = x.new_empty_strided(self._shape, self._strides)
        parts = x.new_empty(kernel.launch.buffers["parts"], dtype=torch.float32) if means else None
        kernel(x=aligned(x), y=y, parts=parts, scale=None, shift=None, moments=None, **self._given)
        return (y, parts) if means else y


def prepare_back_to_back(problem: BackToBackProblem, *weights: Tensor | None, variant: str = "fused") -> Run:
    """Two convolutions bound to their weights by a variant."""
    if variant == "fused":
        return BackToBack(problem, *weights)
    return InTurn(problem, triton.prepare_conv(problem.first, *weights[:2]), prepare_conv(problem.second, *weights[2:]))


def aligned(t: Tensor) -> Tensor:
    """A dense tensor, or a copy of one that begins in the middle of something."""
    return t.clone() if t.data_ptr() % launcher.ALIGNMENT else t


def prepare_conv(problem: ConvProblem, weight: Tensor, bias: Tensor | None) -> Run:
    """The convolution bound to its packed weights.

    The first run raises `nvrtc.CompileError` where the kernel has to be compiled and cannot.
    """
    return GroupedConv(problem, weight, bias)


def _refuse_squeeze_excite(problem: SqueezeExciteProblem) -> str | None:
    if _plain(problem.dtype) not in plans.GATES:
        return f"the gate is in {', '.join(plans.GATES)}, not in {problem.dtype}"
    sizes = problem.batch, problem.channels, problem.hidden
    reason = plans.refuse_squeeze_excite(*sizes, launcher.target(problem.device))
    reason = reason or activations.refuse(problem.activation) or activations.refuse_gate(problem.gate_activation)
    return reason or no_way(_gate_launches(problem, 1, problem.dtype), problem.device)


def _gate_launches(problem: SqueezeExciteProblem, tiles: int, dtype: torch.dtype) -> tuple[Launch, Launch]:
    sizes, target = (problem.batch, tiles, problem.channels, problem.hidden), launcher.target(problem.device)
    return plans.squeeze_excite(*sizes, _plain(dtype), problem.activation, target, problem.gate_activation)


class SqueezeExcite(Run):
    """The gate bound to its weights."""

    def __init__(self, problem: SqueezeExciteProblem, *weights: Tensor):
        self.problem = problem
        self.fc1, self.bias1, self.fc2, self.bias2 = (aligned(t.float().contiguous()) for t in weights)
        self._kernels: dict[tuple, list[launcher.Kernel]] = {}
        self.label = f"{LABEL}, {launcher.way(_gate_launches(problem, 1, problem.dtype)[1], problem.device)}"

    def __call__(self, means: Tensor) -> Tensor:
        return self.from_parts(means[:, None], means.dtype)

    def from_parts(self, parts: Tensor, dtype: torch.dtype) -> Tensor:
        """`Run.from_parts`."""
        key = (parts.shape[1], dtype)
        kernels = self._kernels.get(key)
        if kernels is None:
            kernels = [launcher.Kernel(launch, parts.device) for launch in _gate_launches(self.problem, *key)]
            self._kernels = {**self._kernels, key: kernels}
        first, second = kernels
        hidden = parts.new_empty(first.launch.buffers["hidden"], dtype=torch.float32)
        gate = torch.empty((parts.shape[0], parts.shape[2]), dtype=dtype, device=parts.device)
        first(parts=aligned(parts.float().contiguous()), fc1=self.fc1, bias1=self.bias1, hidden=hidden)
        second(values=hidden, fc2=self.fc2, bias2=self.bias2, gate=gate)
        return gate


prepare_squeeze_excite = SqueezeExcite
