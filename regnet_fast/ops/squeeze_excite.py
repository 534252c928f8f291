"""Squeeze-excite: from the channel means of a feature map to a factor for each of its channels.

    gate = sigmoid(fc2(activation(fc1(means))))

The sigmoid may be another activation, as the hard one of MobileNetV3 is.

Source: J. Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, arXiv 1709.01507.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Run, SqueezeExciteProblem
from ..backends.reference import activate
from ..trials.serving import Serving
from .checks import FLOATS, check_activation, check_operand, check_tensor
from .convolution import activation_gradient, without_autocast
from .packed import Packed


def squeeze_excite(
    means: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: str = "relu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """The gate of a squeeze-excite module.

    `gate_activation(linear(activation(linear(means, fc1_weight, fc1_bias)), fc2_weight, fc2_bias))`

    Args:
        means: (N, C), float32 as `grouped_conv(..., means=True)` gives them; any floating dtype is taken.
        fc1_weight: (R, C), or (R, C, 1, 1) as timm keeps it. fc1_bias: (R,).
        fc2_weight: (C, R), or (C, R, 1, 1). fc2_bias: (C,).
        activation: between the two, a name of `ACTIVATIONS`, such as "relu" or "silu".
        gate_activation: behind them, such as "sigmoid" or "hardsigmoid".

    Returns (N, C) in the dtype of the means; the weights are converted to it. Differentiable in every tensor. Raises
    ValueError and TypeError for arguments that do not fit together.
    """
    check_activation("squeeze_excite", activation)
    check_activation("squeeze_excite", gate_activation)
    check_tensor("squeeze_excite", means)
    if means.dtype not in FLOATS:
        raise TypeError(f"squeeze_excite: the means must be a floating-point tensor, got {means.dtype}; convert it")
    for weight in (fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        check_operand("squeeze_excite", means, weight)
    if means.dim() != 2 or min(fc1_weight.dim(), fc2_weight.dim()) < 2:
        raise ValueError(
            f"squeeze_excite: the means must be (N, C) and the weights (R, C) and (C, R), got {tuple(means.shape)}, "
            f"{tuple(fc1_weight.shape)} and {tuple(fc2_weight.shape)}"
        )
    fc1_weight, fc2_weight = (w.flatten(1).to(means.dtype) for w in (fc1_weight, fc2_weight))
    fc1_bias, fc2_bias = fc1_bias.to(means.dtype), fc2_bias.to(means.dtype)
    hidden, channels = fc1_weight.shape
    if (
        means.shape[1] != channels
        or fc2_weight.shape != (channels, hidden)
        or fc1_bias.shape != (hidden,)
        or fc2_bias.shape != (channels,)
    ):
        raise ValueError(
            f"squeeze_excite: shapes do not fit: means {tuple(means.shape)}, "
            f"fc1 {tuple(fc1_weight.shape)} and {tuple(fc1_bias.shape)}, "
            f"fc2 {tuple(fc2_weight.shape)} and {tuple(fc2_bias.shape)}"
        )
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return torch.ops.regnet_fast.squeeze_excite(means, *weights, activation, gate_activation)


class PackedSqueezeExcite(Packed):
    """Squeeze-excite with its float32 weights packed: `gate = packed(means, dtype)`, from (N, C) means or from
    (N, T, C) parts whose sum over T they are.
    """

    def __init__(
        self,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        activation: str,
        gate_activation: str = "sigmoid",
    ):
        super().__init__()
        self.weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        self.activation, self.gate_activation = activation, gate_activation

    def key(self, means: Tensor) -> tuple:
        return (means.shape[0],)

    def problem(self, means: Tensor) -> SqueezeExciteProblem:
        sizes = means.shape[0], means.shape[-1], self.weights[0].shape[0]
        return SqueezeExciteProblem(*sizes, self.activation, means.dtype, str(means.device), self.gate_activation)

    def bind(self, problem: SqueezeExciteProblem, by: Serving) -> Run:
        return by.module.prepare_squeeze_excite(problem, *self.weights, **by.options)

    def __call__(self, means: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The gate in `dtype`, by default that of the means."""
        run = self._runs.get((means.shape[0],)) or self.run_for(means)
        if means.dim() == 3:
            if run.from_parts is not None:
                return run.from_parts(means, dtype or means.dtype)
            means = means.sum(1)
        gate = run(means)
        return gate if dtype is None or dtype == gate.dtype else gate.to(dtype)


@torch.library.custom_op("regnet_fast::squeeze_excite", mutates_args=())
def _operator(
    means: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str,
    gate_activation: str,
) -> Tensor:
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return without_autocast(PackedSqueezeExcite(*weights, activation, gate_activation), means)


@_operator.register_fake
def _fake(means, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, gate_activation):
    return means.new_empty(means.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.activation, ctx.gate_activation = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, dgate):
    means, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate = ctx.saved_tensors
    before = torch.addmm(fc1_bias, means, fc1_weight.t())
    hidden = activate(before, ctx.activation)
    if ctx.gate_activation == "sigmoid":
        d2 = dgate * gate * (1 - gate)
    else:
        d2 = activation_gradient(dgate, gate, torch.addmm(fc2_bias, hidden, fc2_weight.t()), ctx.gate_activation)
    d1 = activation_gradient(d2 @ fc2_weight, hidden, before, ctx.activation)
    return d1 @ fc1_weight, d1.t() @ means, d1.sum(0), d2.t() @ hidden, d2.sum(0), None, None


_operator.register_autograd(_backward, setup_context=_setup)
