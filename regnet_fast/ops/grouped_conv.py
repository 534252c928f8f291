"""Grouped 3x3 convolution, the core of every RegNet, with bias and activation, and the channel means that SE needs.

y = activation(conv2d(x, weight, bias, stride, padding=dilation, dilation=dilation, groups=groups))
means = y.mean((2, 3))
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, convolution
from .checks import pair
from .convolution import PackedConv
from .fold import BatchNorm


def grouped_conv(
    x: Tensor,
    weight: Tensor | PackedConv,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    norm: BatchNorm | None = None,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    activation: str = "none",
    means: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped 3x3 convolution with padding equal to the dilation, so that stride 1 keeps the size.

    `activation(batch_norm(conv2d(x, weight, bias, stride, dilation, dilation, groups)))`

    Args:
        x: (N, C, H, W), any memory format.
        weight: (K, C / groups, 3, 3), or a `PackedConv` that holds all that follows but `means`.
        bias: (K,).
        groups: the number of groups; the group width is C / groups, 1 for a depthwise convolution.
        norm: an evaluation-mode BatchNorm over K channels, folded in float64.
        stride: one integer or two.
        dilation: one integer or two.
        activation: a name of `ACTIVATIONS`, such as "none", "relu" or "silu".
        means: also return the per-image channel means of the output.

    Returns (N, K, H', W') in channels_last, in x's dtype; with `means` also (N, K) means, float32 or wider.
    Differentiable in every tensor. Raises ValueError and TypeError for arguments that do not fit together, and
    BackendError where a forced backend cannot serve.
    """
    if isinstance(weight, PackedConv):
        checks.check_not_given(
            "grouped_conv",
            bias=bias is not None,
            norm=norm is not None,
            stride=stride != 1,
            activation=activation != "none",
            groups=groups != 1,
            dilation=dilation != 1,
        )
        return convolution.call_packed("grouped_conv", weight, x, None, None, means)
    checks.check_weight("grouped_conv", weight, groups)
    checks.check_input("grouped_conv", x, weight.shape[1] * groups)
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(
            f"grouped_conv: the weight must be (K, C / groups, 3, 3), got {tuple(weight.shape)}; use dense_conv"
        )
    stride, dilation = pair(stride, "grouped_conv: stride"), pair(dilation, "grouped_conv: dilation")
    x, (weight, bias), _, _ = convolution.in_compute_dtype("grouped_conv", x, weight, bias, norm, None, None)
    checks.check_operands("grouped_conv", x, weight, bias, None, None, stride, dilation, dilation, groups, activation)
    y, m = torch.ops.regnet_fast.grouped_conv(x, weight, bias, stride, dilation, groups, activation, means)
    return (y, m) if means else y


def _means_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("regnet_fast::grouped_conv", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    means: bool,
) -> tuple[Tensor, Tensor]:
    y, found = convolution.run_operator(
        "grouped_conv", x, weight, bias, None, None, stride, dilation, dilation, groups, activation, means
    )
    return y, found if means else y.new_empty(0, dtype=_means_dtype(y))


@_operator.register_fake
def _fake(x, weight, bias, stride, dilation, groups, activation, means):
    y = convolution.empty_output(x, weight, stride, dilation, dilation)
    return y, x.new_empty((x.shape[0], weight.shape[0]) if means else (0,), dtype=_means_dtype(x))


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.stride, ctx.dilation, ctx.groups, ctx.activation, ctx.means = inputs
    ctx.save_for_backward(x, weight, bias, output[0])


def _backward(ctx, dy, dmeans):
    x, weight, bias, y = ctx.saved_tensors
    if ctx.means and dmeans is not None:
        dy = dy + (dmeans / (y.shape[2] * y.shape[3])).to(dy.dtype)[:, :, None, None]
    needs = dict(zip(("x", "weight", "bias"), ctx.needs_input_grad, strict=False), gate=False, residual=False)
    d = convolution.conv_gradients(
        dy, y, x, weight, bias, None, None, ctx.stride, ctx.dilation, ctx.dilation, ctx.groups, ctx.activation, needs
    )
    return d["x"], d["weight"], d["bias"], None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)
