"""The backend `reference`: each operation in plain torch, the definition that the others are held to."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .problem import ConvProblem, NormActProblem, Problem, SqueezeExciteProblem

NAME = "reference"
LABEL = "plain torch"


def refuse(problem: Problem) -> str | None:
    """Never refuses: torch itself raises for what it cannot compute."""
    return None


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of x by name."""
    return ACTIVATIONS[activation].function(x)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> Tensor:
    """`activation(conv2d(x * gate, weight, bias) + residual)` with a (N, C) gate."""
    if gate is not None:
        x = x * gate[:, :, None, None]
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    return activate(y, activation)


def channel_means(x: Tensor) -> Tensor:
    """(N, C) means over the pixels, in float32 at least."""
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def squeeze_excite(
    means: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str,
) -> Tensor:
    """`sigmoid(fc2(activation(fc1(means))))`, (N, C) to (N, C)."""
    hidden = activate(F.linear(means, fc1_weight, fc1_bias), activation)
    return torch.sigmoid(F.linear(hidden, fc2_weight, fc2_bias))


def norm_act(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """`activation(x * scale * gate + shift)` with per-channel scale and shift and a (N, C) gate."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, scale, shift = x.to(wide), scale.to(wide), shift.to(wide)
    if gate is not None:
        scale = scale * gate
    return activate(x * scale.reshape(-1, x.shape[1], 1, 1) + shift[:, None, None], activation).to(dtype)


def prepare_conv(problem: ConvProblem, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """The convolution bound to its folded weights: `run(x, gate, residual, consume, into_residual)`."""
    bias = None if bias is None else bias.to(problem.dtype)

    def run(x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool) -> Tensor:
        return conv(
            x,
            weight,
            bias,
            gate,
            residual,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
            problem.activation,
        )

    run.label = LABEL
    return run


def prepare_squeeze_excite(problem: SqueezeExciteProblem, *weights: Tensor) -> Callable[[Tensor], Tensor]:
    """The gate bound to its float32 weights: `run(means)`."""

    def run(means: Tensor) -> Tensor:
        return squeeze_excite(means, *weights, problem.activation)

    run.label = LABEL
    return run


def prepare_norm_act(problem: NormActProblem, scale: Tensor, shift: Tensor) -> Callable[..., Tensor]:
    """The affine map and activation bound to scale and shift: `run(x, gate, consume)`."""

    def run(x: Tensor, gate: Tensor | None, consume: bool) -> Tensor:
        return norm_act(x, scale, shift, gate, problem.activation)

    run.label = LABEL
    return run
