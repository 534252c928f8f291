"""The backend `reference`: each operation in plain torch, the definition that the others are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .problem import (
    Apart,
    Call,
    ConvProblem,
    Geometry,
    InTurn,
    JoinProblem,
    NormActProblem,
    Problem,
    Run,
    SqueezeExciteProblem,
)

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
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """`activation(conv2d(x * gate, weight, bias, *geometry) + residual)` with a (N, C) gate."""
    if gate is not None:
        x = x * gate[:, :, None, None]
    y = F.conv2d(x, weight, bias, *geometry)
    return activate(y if residual is None else y + residual, activation)


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
    gate_activation: str = "sigmoid",
) -> Tensor:
    """`gate_activation(fc2(activation(fc1(means))))`, (N, C) to (N, C)."""
    hidden = activate(F.linear(means, fc1_weight, fc1_bias), activation)
    return activate(F.linear(hidden, fc2_weight, fc2_bias), gate_activation)


def norm_act(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """`activation(x * scale * gate + shift)` with per-channel scale and shift and a (N, C) gate."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, scale, shift = x.to(wide), scale.to(wide), shift.to(wide)
    if gate is not None:
        scale = scale * gate
    return activate(x * scale.reshape(-1, x.shape[1], 1, 1) + shift[:, None, None], activation).to(dtype)


def prepare_conv(problem: ConvProblem, weight: Tensor, bias: Tensor | None) -> Run:
    """The convolution bound to its folded weights."""
    bias = None if bias is None else bias.to(problem.dtype)

    def run(x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool) -> Tensor:
        return conv(x, weight, bias, gate, residual, problem.geometry, problem.activation)

    return Call(run, LABEL)


prepare_pair = Apart.by(prepare_conv)
prepare_back_to_back = InTurn.by(prepare_conv)


def prepare_squeeze_excite(problem: SqueezeExciteProblem, *weights: Tensor) -> Run:
    """The gate bound to its float32 weights."""
    acts = problem.activation, problem.gate_activation
    return Call(lambda means: squeeze_excite(means, *weights, *acts), LABEL)


def prepare_join(problem: JoinProblem) -> Run:
    """What ends a block."""

    def run(x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool) -> Tensor:
        x = x if gate is None else x * gate[:, :, None, None]
        return activate(x if residual is None else x + residual, problem.activation)

    return Call(run, LABEL)


def join_in_place(problem: JoinProblem) -> Run:
    """What ends a block, one after the other in the memory of x where that is given up: the libraries' way."""

    def run(x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool) -> Tensor:
        x = x if consume else x.clone()
        if gate is not None:
            x = x.mul_(gate[:, :, None, None])
        return ACTIVATIONS[problem.activation].in_place(x if residual is None else x.add_(residual))

    return Call(run, "torch, in place")


def prepare_norm_act(problem: NormActProblem, scale: Tensor, shift: Tensor) -> Run:
    """The affine map and activation bound to scale and shift."""
    return Call(lambda x, gate, consume: norm_act(x, scale, shift, gate, problem.activation), LABEL)
