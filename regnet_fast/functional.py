"""The public operations, on plain tensors: `regnet_fast.functional`.

Importing this module registers them as `torch.ops.regnet_fast.*`.
"""

from __future__ import annotations

from torch import Tensor

from .ops.checks import check_activation, pair
from .ops.convolution import PackedConv
from .ops.dense_conv import dense_conv
from .ops.fold import BatchNorm, fold, fold_to
from .ops.grouped_conv import grouped_conv
from .ops.norm_act import norm_act
from .ops.pointwise_conv import pointwise_conv
from .ops.squeeze_excite import squeeze_excite

__all__ = [
    "BatchNorm",
    "PackedConv",
    "dense_conv",
    "fold",
    "grouped_conv",
    "norm_act",
    "pack_conv",
    "pointwise_conv",
    "squeeze_excite",
]


def conv_op(
    kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int, residual: bool = False
) -> str:
    """Which operation serves a convolution: 1x1 is `pointwise_conv`, grouped 3x3 `grouped_conv`, all else
    `dense_conv`.
    """
    if kernel == (1, 1) and padding == (0, 0) and groups == 1:
        return "pointwise_conv"
    if kernel == (3, 3) and padding == dilation and groups > 1 and not residual:
        return "grouped_conv"
    return "dense_conv"


def pack_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: BatchNorm | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
    op: str | None = None,
) -> PackedConv:
    """Weights folded and packed once, for many calls of a convolution without a gradient.

    The arguments are those of `dense_conv`; `op` names the operation to serve, which is otherwise chosen by the shape.
    The result takes the place of `weight` in `pointwise_conv`, `grouped_conv` or `dense_conv`.
    """
    stride, padding, dilation = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    op = op or conv_op(tuple(weight.shape[2:]), padding, dilation, groups)
    check_activation(op, activation)
    weight, bias = (None if t is None else t.detach() for t in fold_to(weight.dtype, weight, bias, norm))
    return PackedConv(
        op, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation
    )
