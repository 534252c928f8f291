"""Any convolution: stems, RepVGG, ResNetV2's 3x3, with bias, residual and activation in one call.

y = activation(conv2d(x, weight, bias, stride, padding, dilation, groups) + residual)
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, convolution
from .checks import pair
from .convolution import PackedConv
from .fold import BatchNorm


def dense_conv(
    x: Tensor,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    *,
    norm: BatchNorm | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """A convolution with its epilogue.

    `activation(batch_norm(conv2d(x, weight, bias, stride, padding, dilation, groups)) + residual)`

    Args:
        x: (N, C, H, W), any memory format.
        weight: (K, C / groups, R, S), or a `PackedConv` that holds all that follows but the residual.
        bias: (K,).
        norm: an evaluation-mode BatchNorm over K channels, folded in float64.
        stride: one integer or two.
        padding: one integer or two.
        dilation: one integer or two.
        activation: a name of `ACTIVATIONS`, such as "none", "relu" or "silu".
        residual: (N, K, H', W'), added before the activation.

    Returns (N, K, H', W') in channels_last, in x's dtype. Differentiable in every tensor. Raises ValueError and
    TypeError for arguments that do not fit together, and BackendError where a forced backend cannot serve.
    """
    if isinstance(weight, PackedConv):
        checks.check_not_given(
            "dense_conv",
            bias=bias is not None,
            norm=norm is not None,
            stride=stride != 1,
            activation=activation != "none",
            groups=groups != 1,
            dilation=dilation != 1,
            padding=padding != 0,
        )
        return convolution.call_packed("dense_conv", weight, x, None, residual)
    checks.check_weight("dense_conv", weight, groups)
    checks.check_input("dense_conv", x, weight.shape[1] * groups)
    stride, padding, dilation = (
        pair(stride, "dense_conv: stride"),
        pair(padding, "dense_conv: padding"),
        pair(dilation, "dense_conv: dilation"),
    )
    x, (weight, bias), _, residual = convolution.in_compute_dtype("dense_conv", x, weight, bias, norm, None, residual)
    checks.check_operands("dense_conv", x, weight, bias, None, residual, stride, padding, dilation, groups, activation)
    return torch.ops.regnet_fast.dense_conv(x, weight, bias, residual, stride, padding, dilation, groups, activation)


@torch.library.custom_op("regnet_fast::dense_conv", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    return convolution.run_operator(
        "dense_conv", x, weight, bias, None, residual, stride, padding, dilation, groups, activation
    )[0]


@_operator.register_fake
def _fake(x, weight, bias, residual, stride, padding, dilation, groups, activation):
    return convolution.empty_output(x, weight, stride, padding, dilation)


def _setup(ctx, inputs, output):
    x, weight, bias, residual, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, residual, output)


def _backward(ctx, dy):
    x, weight, bias, residual, y = ctx.saved_tensors
    needs = dict(zip(("x", "weight", "bias", "residual"), ctx.needs_input_grad, strict=False), gate=False)
    d = convolution.conv_gradients(
        dy, y, x, weight, bias, None, residual, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.activation, needs
    )
    return d["x"], d["weight"], d["bias"], d["residual"], None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)
