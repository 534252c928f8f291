"""The backend `cuda`: the CUDA C++ kernels of csrc/, on a GPU since sm_80.

Nothing of CUDA is touched, and nothing compiled, before it is asked to serve on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import cuda_launch, cuda_plans
from .cuda_plans import DepthwiseConv, Launch
from .cuda_plans import GroupedConv as Groups
from .problem import ConvProblem, Problem
from .triton import current

NAME = "cuda"
LABEL = "CUDA C++"
NOT_BY_ITSELF = "the CUDA C++ kernels have not been measured on a GPU yet, so that they run only where they are forced"
"""Why `auto` leaves a backend aside that could serve."""


def refuse(problem: Problem) -> str | None:
    """Why there is no kernel for a problem, or no way to it, or None."""
    reason = cuda_launch.refuse_device(problem.device)
    if reason is not None:
        return reason
    if not isinstance(problem, ConvProblem) or (problem.groups == 1 and problem.op != "grouped_conv"):
        return "csrc/ has kernels for grouped convolutions alone"
    if problem.gate or problem.residual:
        return f"a grouped convolution with a {'gate' if problem.gate else 'residual'}"
    if problem.out_channels != problem.input_shape[1]:
        return f"{problem.input_shape[1]} channels in and {problem.out_channels} out: only as many out as in"
    if problem.stride[0] != problem.stride[1]:
        return f"two different strides, {problem.stride}"
    geometry = {"kernel": problem.kernel, "padding": problem.padding, "dilation": problem.dilation}
    arch = cuda_launch.target(problem.device).arch
    refuse_plan = cuda_plans.refuse_depthwise if _depthwise(problem) else cuda_plans.refuse
    reason = refuse_plan(_plan(problem), arch=arch, **geometry)
    launches = () if reason else (_launch(problem, means) for means in (False, True))
    return reason or next(filter(None, (cuda_launch.refuse(launch, problem.device) for launch in launches)), None)


def refuse_training(x: Tensor) -> str:
    """Why there are no kernels for a training step."""
    return "the CUDA C++ kernels are used in inference alone"


def _depthwise(problem: ConvProblem) -> bool:
    return problem.groups > 1 and problem.groups == problem.input_shape[1]


def _plan(problem: ConvProblem) -> Groups | DepthwiseConv:
    images, channels, height, columns = problem.input_shape
    facts = problem.stride[0], str(problem.dtype).removeprefix("torch.")
    if _depthwise(problem):
        return DepthwiseConv(images, height, columns, channels, *facts)
    return Groups(images, height, columns, problem.groups, channels // problem.groups, *facts)


def _launch(problem: ConvProblem, means: bool) -> Launch:
    if _depthwise(problem):
        return cuda_plans.depthwise_conv_forward(_plan(problem), problem.activation, means)
    target = cuda_launch.target(problem.device)
    return cuda_plans.grouped_conv_forward(_plan(problem), problem.activation, means, target)


def packed_weight(problem: ConvProblem, weight: Tensor) -> Tensor:
    """(K, C / groups, 3, 3) as the kernels read it, tap by tap: (K, 9 * C / groups), or (9, K) of a depthwise one."""
    if _depthwise(problem):
        return weight.flatten(1).t().contiguous()
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


class GroupedConv:
    """A grouped 3x3 convolution bound to its weights: `run(x, gate, residual, consume, into_residual)`.

    The gate and the residual are None.
    """

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None):
        self.problem, self.weight = problem, _aligned(packed_weight(problem, weight))
        self.bias = None if bias is None else _aligned(bias.float().contiguous())
        self._kernels: dict[bool, cuda_launch.Kernel] = {}
        self.label = f"{LABEL}, {cuda_launch.way(_launch(problem, False), problem.device)}"

    def _kernel(self, means: bool) -> cuda_launch.Kernel:
        kernel = self._kernels.get(means)
        if kernel is None:
            kernel = cuda_launch.Kernel(_launch(self.problem, means), self.weight.device)
            self._kernels = {**self._kernels, means: kernel}  # a new one, since other threads may be reading
        return kernel

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        return self._run(x, False)[0]

    def with_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and (N, T, K) float32 parts whose sum over T are its channel means."""
        return self._run(x, True)

    def _run(self, x: Tensor, means: bool) -> tuple[Tensor, Tensor | None]:
        kernel = self._kernel(means)
        y = torch.empty(self.problem.output_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        parts = x.new_empty(kernel.launch.buffers["parts"], dtype=torch.float32) if means else None
        with current(x):
            kernel(x=_aligned(x), weight=self.weight, bias=self.bias, y=y, parts=parts)
        return y, parts


def _aligned(t: Tensor) -> Tensor:
    """A dense tensor, or a copy of one that begins in the middle of something."""
    return t.clone() if t.data_ptr() % cuda_launch.ALIGNMENT else t


def prepare_conv(problem: ConvProblem, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """The convolution bound to its packed weights: `run(x, gate, residual, consume, into_residual)`.

    The first run raises `cuda_nvrtc.CompileError` where the kernel has to be compiled and cannot.
    """
    return GroupedConv(problem, weight, bias)
