"""The passes of a training step in which csrc/ has the grouped convolutions, and other passes all else.

csrc/ takes a grouped convolution that reads its map alone and is not behind squeeze-excite, but for the forward of a
depthwise one. The map is read through its norm, and the result's statistics come with it; both gradients come from one
read of the gradient, the raw result and the map. What is made of these is made as they are read, and never stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda
from ..cuda import launcher, plans
from ..cuda.plans import Launch, Target
from ..problem import ConvProblem, Geometry
from .operands import Conv, ConvGradients, Excite, Norm, OutputGrad, Sums
from .torch import Passes

_LAST = torch.channels_last


def refuse(x: Tensor, excite: Excite | None, convs: Sequence[Conv]) -> str | None:
    """Why convolutions of a training step are left to other passes, or None."""
    if excite is not None:
        return "a convolution behind squeeze-excite"
    if len(convs) > 1:
        return "convolutions that read their map together"
    problem = _problem(x, convs[0])
    reason = launcher.refuse_device(problem.device)
    if reason is None and problem.geometry.groups == 1:
        return "csrc/ has grouped convolutions alone"
    return reason or cuda.refuse_conv(problem)


def _problem(x: Tensor, one: Conv) -> ConvProblem:
    weight, geometry = one
    sizes = (tuple(x.shape), weight.shape[0], tuple(weight.shape[2:]), Geometry(*geometry))
    return ConvProblem(*sizes, "none", False, False, x.dtype, str(x.device))


class CudaConvs(Passes):
    """The grouped convolutions of csrc/, before torch's calls or, as the first base of a class, before its second."""

    def convs(
        self, x: Tensor, norm: Norm | None, excite: Excite | None, convs: Sequence[Conv], measured: Sequence[bool]
    ) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        found = None
        if refuse(x, excite, convs) is None:
            found = _forward(x, norm, convs[0], measured[0])
        return super().convs(x, norm, excite, convs, measured) if found is None else [found]

    def convs_backward(
        self,
        grads: Sequence[OutputGrad],
        x: Tensor,
        norm: Norm | None,
        excite: Excite | None,
        convs: Sequence[Conv],
        needs_x: bool,
        needs_weights: Sequence[bool],
        through: bool = True,
    ) -> ConvGradients:
        found = None
        if refuse(x, excite, convs) is None:
            found = _backward(grads[0], x, norm, convs[0], needs_x, needs_weights[0], through)
        if found is None:
            return super().convs_backward(grads, x, norm, excite, convs, needs_x, needs_weights, through)
        return found


@functools.lru_cache(maxsize=1024)
def _forward_launches(problem: ConvProblem, target: Target, read: str | None, moments: bool) -> tuple[Launch, ...]:
    launch = plans.grouped_conv_forward(cuda.plan_of(problem), target=target, read=read, moments=moments)
    if not moments:
        return (launch,)
    return launch, plans.merged_moments(launch.grid[0], problem.out_channels)


@functools.lru_cache(maxsize=1024)
def _backward_launches(problem: ConvProblem, target: Target, switches: tuple) -> tuple[Launch, ...]:
    plan, options = cuda.plan_of(problem), dict(switches, target=target)
    if problem.depthwise:
        return plans.depthwise_conv_backward(plan, **options)
    return plans.grouped_conv_backward(plan, **options)


def _launched(launches: Sequence[Launch], x: Tensor, given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors of some launches, aligned, with those that the plans have made."""
    tensors = {name: None if t is None else cuda.aligned(t) for name, t in given.items()}
    for launch in launches:
        tensors |= {name: x.new_empty(shape, dtype=torch.float32) for name, shape in launch.buffers.items()}
    for launch in launches:
        names = (name for name in launch.arguments if isinstance(name, str))
        launcher.kernel(launch, x.device)(**{name: tensors.get(name) for name in names})
    return tensors


def _forward(
    x: Tensor, norm: Norm | None, one: Conv, measured: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
    """The raw result and its statistics; None where there are no kernels, or no way to them."""
    problem, read = _problem(x, one), None if norm is None else norm.activation
    if problem.depthwise:
        return None
    launches = _forward_launches(problem, launcher.target(problem.device), read, measured)
    if cuda.no_way(launches, problem.device) is not None:
        return None
    scale, shift = (None, None) if norm is None else norm.affine()
    weight = cuda.packed_weight(problem, one.weight)
    y = torch.empty(problem.output_shape, dtype=x.dtype, device=x.device, memory_format=_LAST)
    given = {"x": x.contiguous(memory_format=_LAST), "scale": scale, "shift": shift, "weight": weight, "y": y}
    tensors = _launched(launches, x, given)
    return tensors["y"], (tensors["mean"], tensors["var"]) if measured else None


def _backward(
    arriving: OutputGrad, x: Tensor, norm: Norm | None, one: Conv, needs_x: bool, needs_weight: bool, through: bool
) -> ConvGradients | None:
    """The gradients; None where there is no way to the kernels."""
    (grad, behind, y), problem = arriving, _problem(x, one)
    a, q, b = (None, None, None) if behind is None else behind.vectors()
    sums = needs_x and through and norm is not None
    switches = {
        "needs_input": needs_x,
        "needs_weight": needs_weight,
        "affine": 0 if a is None else 1 if q is None else 2,
        "norm": norm is not None,
        "sums": sums,
        "activation": "none" if norm is None else norm.activation,
    }
    launches = _backward_launches(problem, launcher.target(problem.device), tuple(switches.items()))
    if cuda.no_way(launches, problem.device) is not None:
        return None
    scale, shift = (None, None) if norm is None else norm.affine()
    maps = {"dz": grad, "y": None if q is None else y, "x": x}
    given = {name: None if t is None else t.contiguous(memory_format=_LAST) for name, t in maps.items()}
    given |= {"weight": _by_input(problem, one.weight), "a": a, "q": q, "b": b, "scale": scale, "shift": shift}
    if sums:
        given |= {"mean": norm.mean.float(), "invstd": (norm.var.float() + norm.eps).rsqrt_()}
    if needs_x:
        given["dx"] = torch.empty_like(given["x"])
    tensors = _launched(launches, x, given)
    product, plain = tensors["sums"].sum((0, 1)) if sums else (None, None)
    dweight = _as_weight(problem, tensors["dweight"], one.weight) if needs_weight else None
    return ConvGradients(tensors.get("dx"), Sums(product, plain) if sums else None, None, [dweight])


def _by_input(problem: ConvProblem, weight: Tensor) -> Tensor:
    """The weight with a row for each input channel, tap by tap; (9, channels) of a depthwise convolution."""
    if problem.depthwise:
        return cuda.packed_weight(problem, weight)
    rows, width = weight.shape[:2]
    return weight.reshape(-1, width, width, 9).permute(0, 2, 3, 1).reshape(rows, -1)


def _as_weight(problem: ConvProblem, dweight: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight from (K, 9, C / groups) sums, or (9, K) of a depthwise convolution."""
    if problem.depthwise:
        return dweight.t().reshape(weight.shape).to(weight.dtype)
    return dweight.view(-1, 3, 3, weight.shape[1]).permute(0, 3, 1, 2).to(weight.dtype)
