"""Convolution with its prologue and epilogue in one call, and the channel means that squeeze-excite needs.

y = activation(batch_norm(conv2d(x * gate[:, :, None, None], weight, bias, *geometry)) + residual)
means = y.mean((2, 3))

One operation under three names: `pointwise_conv`, a matrix product over the pixels; `grouped_conv`, 3x3 in groups, the
core of every RegNet; `dense_conv`, any other: stems, RepVGG, ResNetV2's 3x3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Geometry, pixel_means
from . import checks
from .checks import pair
from .convolution import (
    PackedConv,
    activation_gradient,
    autocast_enabled,
    channels_last,
    needs_input,
    without_autocast,
)
from .fold import BatchNorm, fold_to


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
    TypeError for arguments that do not fit together, and BackendError where a forced backend cannot serve.
    """
    return _named("pointwise_conv", x, weight, bias, norm, {"stride": stride}, activation, gate, residual)[0]


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
    given = {"stride": stride, "dilation": dilation, "groups": groups}
    y, found = _named("grouped_conv", x, weight, bias, norm, given, activation, means=means)
    return (y, found) if means else y


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
    """Any convolution with its epilogue.

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
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _named("dense_conv", x, weight, bias, norm, given, activation, residual=residual)[0]


_SERVED = {
    "pointwise_conv": "1x1 kernels without padding or groups",
    "grouped_conv": "3x3 kernels with padding equal to the dilation",
    "dense_conv": "every convolution",
}


def _serves(op: str, kernel: tuple[int, ...], geometry: Geometry) -> bool:
    tests = {"pointwise_conv": geometry.pointwise, "grouped_conv": geometry.same3x3}
    return op not in tests or tests[op](kernel)


def _named(
    op: str,
    x: Tensor,
    weight: Tensor | PackedConv,
    bias: Tensor | None,
    norm: BatchNorm | None,
    given: dict[str, Any],
    activation: str,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    means: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A public operation, of plain or packed weights: the result, and the channel means where they are asked."""
    if isinstance(weight, PackedConv):
        also = {name: value != (0 if name == "padding" else 1) for name, value in given.items()}
        also |= {"bias": bias is not None, "norm": norm is not None, "activation": activation != "none"}
        checks.check_not_given(op, **also)
        return _packed(op, weight, x, gate, residual, means)
    groups = given.pop("groups", 1)
    checks.check_weight(op, weight, groups)
    checks.check_input(op, x, weight.shape[1] * groups)
    kernel = tuple(weight.shape[2:])
    if op != "dense_conv" and kernel != ((1, 1) if op == "pointwise_conv" else (3, 3)):
        wanted = "(K, C, 1, 1)" if op == "pointwise_conv" else "(K, C / groups, 3, 3)"
        raise ValueError(f"{op}: the weight must be {wanted}, got {tuple(weight.shape)}; use dense_conv")
    geometry = Geometry(groups=groups, **{name: pair(value, f"{op}: {name}") for name, value in given.items()})
    if op == "grouped_conv":
        geometry = geometry._replace(padding=geometry.dilation)
    return conv(x, weight, bias, geometry, activation, norm, gate, residual, means, op)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str = "none",
    norm: BatchNorm | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    means: bool = False,
    op: str = "conv",
) -> tuple[Tensor, Tensor]:
    """`activation(batch_norm(conv2d(x * gate, weight, bias, *geometry)) + residual)`, and its channel means, which are
    empty unless they are asked. `op` is its name in errors.
    """
    x, (weight, bias), gate, residual = _in_compute_dtype(op, x, weight, bias, norm, gate, residual)
    checks.check_operands(op, x, weight, bias, gate, residual, geometry, activation)
    return torch.ops.regnet_fast.conv(x, weight, bias, gate, residual, *geometry, activation, means)


def _in_compute_dtype(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | None,
    gate: Tensor | None,
    residual: Tensor | None,
):
    """The operands in the dtype to compute in: autocast's where it is on, else x's; weights folded in float64 first."""
    for operand in (weight, gate, residual):
        checks.check_operand(op, x, operand)
    checks.check_vectors(op, x, weight.shape[0], bias, *(() if norm is None else norm.vectors()))
    autocast = autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not autocast and weight.dtype != dtype:
        raise TypeError(
            f"{op}: the input is {x.dtype}, the weight {weight.dtype}; convert one of them or use torch.autocast"
        )
    gate, residual = (None if t is None else t.to(dtype) for t in (gate, residual))
    return x.to(dtype), fold_to(dtype, weight, bias, norm), gate, residual


def _packed(
    op: str, packed: PackedConv, x: Tensor, gate: Tensor | None, residual: Tensor | None, means: bool
) -> tuple[Tensor, Tensor | None]:
    """A public operation called with packed weights: check what is left to check, then run."""
    weight, geometry = packed.weight, packed.geometry
    if not _serves(op, weight.shape[2:], geometry):
        raise ValueError(f"{op}: the packed weights were made for {packed.op}")
    checks.check_operands(op, x, weight, packed.bias, gate, residual, geometry, packed.activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gate, residual)):
        raise ValueError(
            f"{op}: packed weights are for inference; pass plain weights where a gradient is needed, "
            "or use torch.no_grad()"
        )
    return _run(packed.here(x), x, gate, residual, means)


def _run(
    packed: PackedConv, x: Tensor, gate: Tensor | None, residual: Tensor | None, means: bool
) -> tuple[Tensor, Tensor | None]:
    """The result and its channel means, or None where they are not asked."""
    if x.numel() == 0 or packed.weight.shape[0] == 0:
        y = _empty_output(x, packed.weight, packed.geometry)
        return y, pixel_means(y) if means else None
    x = x.contiguous(memory_format=torch.channels_last)
    if not means:
        return channels_last(without_autocast(packed, x, gate, residual)), None
    y, found = without_autocast(packed, x, gate, residual, means=True)
    return channels_last(y), found.sum(1) if found.dim() == 3 else found


def _empty_output(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """An uninitialised channels_last output of the convolution: what a fake returns."""
    size = geometry.output_size(x.shape[2:], weight.shape[2:])
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _means_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("regnet_fast::conv", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    means: bool,
) -> tuple[Tensor, Tensor]:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    y, found = _run(PackedConv(weight, bias, geometry, activation), x, gate, residual, means)
    return y, y.new_empty(0, dtype=_means_dtype(y)) if found is None else found


@_operator.register_fake
def _fake(x, weight, bias, gate, residual, stride, padding, dilation, groups, activation, means):
    y = _empty_output(x, weight, Geometry(stride, padding, dilation, groups))
    return y, x.new_empty((x.shape[0], weight.shape[0]) if means else (0,), dtype=_means_dtype(x))


def _setup(ctx, inputs, output):
    x, weight, bias, gate, residual, *geometry, ctx.activation, ctx.means = inputs
    ctx.geometry = Geometry(*geometry)
    ctx.save_for_backward(x, weight, bias, gate, residual, output[0])


def _backward(ctx, dy, dmeans):
    """Where the activation's gradient takes its input, that is computed again."""
    x, weight, bias, gate, residual, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_gate, _ = ctx.needs_input_grad[:5]
    if ctx.means and dmeans is not None:
        dy = dy + (dmeans / (y.shape[2] * y.shape[3])).to(dy.dtype)[:, :, None, None]
    gated = x if gate is None else x * gate[:, :, None, None]
    before = None
    if needs_input(ctx.activation):
        before = F.conv2d(gated, weight, bias, *ctx.geometry)
        before = before if residual is None else before + residual
    dz = activation_gradient(dy, y, before, ctx.activation)
    wanted, sizes = [needs_x or needs_gate, needs_weight, needs_bias], None if bias is None else list(bias.shape)
    stride, padding, dilation, groups = ctx.geometry
    dx = dweight = dbias = dgate = None
    if any(wanted):
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dz, gated, weight, sizes, stride, padding, dilation, False, [0, 0], groups, wanted
        )
    if gate is not None and dx is not None:
        dgate = (dx * x).sum((2, 3)) if needs_gate else None
        dx = dx * gate[:, :, None, None] if needs_x else None
    return dx, dweight, dbias, dgate, None if residual is None else dz, *[None] * 6


_operator.register_autograd(_backward, setup_context=_setup)


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

    The arguments are those of `dense_conv`; `op` names an operation that the result has to serve. It takes the place of
    `weight` in any of `pointwise_conv`, `grouped_conv` and `dense_conv` that serves its shape. Raises ValueError and
    TypeError for arguments that do not fit together, and for an operation that does not serve the shape.
    """
    checks.check_weight("pack_conv", weight, groups)
    pairs = pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation")
    geometry, kernel = Geometry(*pairs, groups), tuple(weight.shape[2:])
    if op is None:
        op = geometry.op(kernel)
    elif op not in _SERVED:
        raise ValueError(
            f"pack_conv: unknown operation {op!r}; choose one of {', '.join(_SERVED)}, or None for that of the shape"
        )
    elif not _serves(op, kernel, geometry):
        raise ValueError(
            f"pack_conv: {op} is for {_SERVED[op]}, got a kernel of {kernel} with padding {geometry.padding}, dilation "
            f"{geometry.dilation} and {groups} groups; use dense_conv, or None for the operation of the shape"
        )
    checks.check_activation(op, activation)
    checks.check_vectors(op, weight, weight.shape[0], bias, *(() if norm is None else norm.vectors()))
    weight, bias = (None if t is None else t.detach() for t in fold_to(weight.dtype, weight, bias, norm))
    return PackedConv(weight, bias, geometry, activation)
