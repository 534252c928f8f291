"""Argument checks that the operations share: each raises in the operation's own name, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import ACTIVATIONS, Geometry

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """An integer or a pair of them as a pair. Raises TypeError for anything else."""
    if isinstance(value, int):
        return (value, value)
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, int) for v in value):
        raise TypeError(f"{name} must be an integer or two integers, got {value!r}")
    return tuple(value)


def check_tensor(op: str, value: object) -> None:
    """Raise TypeError for what is no tensor, such as an array of another library."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        hint = "; torch.from_dlpack(array) is a tensor in its memory" if hasattr(value, "__dlpack__") else ""
        raise TypeError(f"{op}: expected a torch.Tensor, got {kind}{hint}")


def check_input(op: str, x: Tensor, channels: int, *others: Tensor | None) -> None:
    """Raise TypeError or ValueError unless x is a floating (N, C, H, W) tensor that matches the other tensors."""
    check_tensor(op, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: the input must be (N, C, H, W), got {x.dim()} dimensions: {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: the input must be a floating-point tensor, got {x.dtype}; convert it with x.float()")
    if x.shape[1] != channels:
        raise ValueError(f"{op}: the input has {x.shape[1]} channels, the weights are for {channels}")
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"{op}: the input is on {x.device}, a weight or operand on {other.device}; move one of them"
            )
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"{op}: the input is {x.dtype}, a weight or operand is {other.dtype}; convert one of them")


def check_operand(op: str, x: Tensor, operand: Tensor | None) -> None:
    """Raise TypeError or ValueError unless a weight or operand is floating-point and on x's device, or None."""
    if operand is None:
        return
    check_tensor(op, operand)
    if operand.device != x.device:
        raise ValueError(
            f"{op}: all tensors must be on one device: a weight or operand is on {operand.device}, one on {x.device}"
        )
    if operand.dtype not in FLOATS:
        raise TypeError(f"{op}: a weight or operand is {operand.dtype}, which is no floating-point type; convert it")


def check_vectors(op: str, x: Tensor, channels: int, *vectors: Tensor | None) -> None:
    """Raise TypeError or ValueError unless each vector is a floating (channels,) tensor on x's device, or None."""
    for vector in vectors:
        check_operand(op, x, vector)
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{op}: bias and norm must have vectors of shape ({channels},), got {tuple(vector.shape)}")


def check_activation(op: str, activation: str) -> None:
    """Raise ValueError for an activation that has no fused form."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")


def check_not_given(op: str, **given: bool) -> None:
    """Raise ValueError for arguments given beside packed weights, which would be ignored."""
    names = [name for name, present in given.items() if present]
    if names:
        raise ValueError(
            f"{op}: {', '.join(names)} given beside packed weights, which hold their own; give it to pack_conv"
        )


def check_weight(op: str, weight: Tensor, groups: int) -> None:
    """Raise ValueError unless weight is (K, C / groups, R, S) with K a multiple of the groups."""
    check_tensor(op, weight)
    if weight.dim() != 4:
        raise ValueError(f"{op}: the weight must be (K, C / groups, R, S), got {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: {weight.shape[0]} output channels cannot be divided into {groups} groups; choose a divisor of them"
        )


def check_operands(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> None:
    """Raise ValueError or TypeError unless all operands of a convolution fit together."""
    stride, padding, dilation, groups = geometry
    check_activation(op, activation)
    check_input(op, x, weight.shape[1] * groups, weight, bias, gate, residual)
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{op}: only the batch may be empty, got an input of {tuple(x.shape)}")
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"{op}: stride {stride} and dilation {dilation} must be positive, padding {padding} not negative"
        )
    size = geometry.output_size(x.shape[2:], weight.shape[2:])
    if min(size) < 1:
        raise ValueError(
            f"{op}: an image of {tuple(x.shape[2:])} is too small for a kernel of {tuple(weight.shape[2:])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: the bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if gate is not None and gate.shape != x.shape[:2]:
        raise ValueError(f"{op}: the gate must be (N, C) = {tuple(x.shape[:2])}, got {tuple(gate.shape)}")
    expected = (x.shape[0], weight.shape[0], *size)
    if residual is not None and tuple(residual.shape) != expected:
        raise ValueError(f"{op}: the residual must have the output's shape {expected}, got {tuple(residual.shape)}")
