"""The public operations, on plain tensors: `regnet_fast.functional`.

Importing this module registers them as `torch.ops.regnet_fast.*`.
"""

from __future__ import annotations

from torch import Tensor

from .ops import checks
from .ops.checks import pair
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


_SERVED = {
    "pointwise_conv": "1x1 kernels without padding or groups",
    "grouped_conv": "3x3 kernels with padding equal to the dilation",
    "dense_conv": "every convolution",
}


def _serves(op: str, kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int) -> bool:
    if op == "pointwise_conv":
        return kernel == (1, 1) and padding == (0, 0) and groups == 1
    if op == "grouped_conv":
        return kernel == (3, 3) and padding == dilation
    return True


def conv_op(
    kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int, residual: bool = False
) -> str:
    """Which operation serves a convolution: 1x1 is `pointwise_conv`, grouped 3x3 `grouped_conv`, all else
    `dense_conv`.
    """
    if _serves("pointwise_conv", kernel, padding, dilation, groups):
        return "pointwise_conv"
    if groups > 1 and not residual and _serves("grouped_conv", kernel, padding, dilation, groups):
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
    The result takes the place of `weight` in `pointwise_conv`, `grouped_conv` or `dense_conv`. Raises ValueError and
    TypeError for arguments that do not fit together, and for an operation that does not serve the shape.
    """
    checks.check_weight("pack_conv", weight, groups)
    stride, padding, dilation = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    kernel = tuple(weight.shape[2:])
    if op is None:
        op = conv_op(kernel, padding, dilation, groups)
    elif op not in _SERVED:
        raise ValueError(
            f"pack_conv: unknown operation {op!r}; choose one of {', '.join(_SERVED)}, or None for that of the shape"
        )
    elif not _serves(op, kernel, padding, dilation, groups):
        raise ValueError(
            f"pack_conv: {op} is for {_SERVED[op]}, got a kernel of {kernel} with padding {padding}, dilation "
            f"{dilation} and {groups} groups; use dense_conv, or None for the operation of the shape"
        )
    checks.check_activation(op, activation)
    checks.check_vectors(
        op, weight, weight.shape[0], bias, *(() if norm is None else (norm.mean, norm.var, norm.weight, norm.bias))
    )
    weight, bias = (None if t is None else t.detach() for t in fold_to(weight.dtype, weight, bias, norm))
    return PackedConv(
        op, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation
    )
