"""1x1 convolution: a matrix product over the pixels, with SE gate, bias, residual and activation in one call.

y = activation(conv2d(x * gate[:, :, None, None], weight, bias, stride) + residual)
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, convolution
from .checks import pair
from .convolution import PackedConv
from .fold import BatchNorm


def pointwise_conv(
    x: Tensor,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    *,
    norm: BatchNorm | None = None,
    stride: int | tuple[int, int] = 1,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """1x1 convolution with its prologue and epilogue.

    `activation(batch_norm(conv2d(x * gate[:, :, None, None], weight, bias, stride)) + residual)`

    Args:
        x: (N, C, H, W), any memory format.
        weight: (K, C, 1, 1), or a `PackedConv` that holds all that follows but gate and residual.
        bias: (K,).
        norm: an evaluation-mode BatchNorm over K channels, folded in float64.
        stride: one integer or two.
        activation: a name of `ACTIVATIONS`, such as "none", "relu" or "silu".
        gate: (N, C), a factor for each image and input channel (squeeze-excite).
        residual: (N, K, H', W'), added before the activation.

    Returns (N, K, H', W') in channels_last, in x's dtype. Differentiable in every tensor. Raises ValueError and
    TypeError
    for arguments that do not fit together, and BackendError where a forced backend cannot serve.
    """
    if isinstance(weight, PackedConv):
        checks.check_not_given(
            "pointwise_conv",
            bias=bias is not None,
            norm=norm is not None,
            stride=stride != 1,
            activation=activation != "none",
        )
        return convolution.call_packed("pointwise_conv", weight, x, gate, residual)
    checks.check_weight("pointwise_conv", weight, 1)
    checks.check_input("pointwise_conv", x, weight.shape[1])
    if tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"pointwise_conv: the weight must be (K, C, 1, 1), got {tuple(weight.shape)}; use dense_conv")
    x, (weight, bias), gate, residual = convolution.in_compute_dtype(
        "pointwise_conv", x, weight, bias, norm, gate, residual
    )
    checks.check_operands(
        "pointwise_conv",
        x,
        weight,
        bias,
        gate,
        residual,
        pair(stride, "pointwise_conv: stride"),
        (0, 0),
        (1, 1),
        1,
        activation,
    )
    return torch.ops.regnet_fast.pointwise_conv(
        x, weight, bias, gate, residual, pair(stride, "pointwise_conv: stride"), activation
    )


@torch.library.custom_op("regnet_fast::pointwise_conv", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
) -> Tensor:
    return convolution.run_operator(
        "pointwise_conv", x, weight, bias, gate, residual, stride, (0, 0), (1, 1), 1, activation
    )[0]


@_operator.register_fake
def _fake(x, weight, bias, gate, residual, stride, activation):
    return convolution.empty_output(x, weight, stride, (0, 0), (1, 1))


def _setup(ctx, inputs, output):
    x, weight, bias, gate, residual, ctx.stride, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, gate, residual, output)


def _backward(ctx, dy):
    x, weight, bias, gate, residual, y = ctx.saved_tensors
    needs = dict(zip(("x", "weight", "bias", "gate", "residual"), ctx.needs_input_grad, strict=False))
    d = convolution.conv_gradients(
        dy, y, x, weight, bias, gate, residual, ctx.stride, [0, 0], [1, 1], 1, ctx.activation, needs
    )
    return d["x"], d["weight"], d["bias"], d["gate"], d["residual"], None, None


_operator.register_autograd(_backward, setup_context=_setup)
