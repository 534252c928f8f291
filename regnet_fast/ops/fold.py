"""Folding: an evaluation-mode BatchNorm as a per-channel scale and shift, multiplied into the weights in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchNorm:
    """The statistics and parameters of an evaluation-mode BatchNorm over C channels, each of shape (C,).

    `batch_norm(x) = (x - mean) / sqrt(var + eps) * weight + bias`, which is `x * scale + shift`.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    def vectors(self) -> tuple[Tensor | None, ...]:
        """All that is of shape (C,)."""
        return self.mean, self.var, self.weight, self.bias

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map in float64: `scale = weight / sqrt(var + eps)`, `shift = bias - mean * scale`.
        Differentiable.
        """
        scale = (self.var.double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -self.mean.double() * scale
        if self.bias is not None:
            shift = shift + self.bias.double()
        return scale, shift


def fold(weight: Tensor, bias: Tensor | None, norm: BatchNorm | None) -> tuple[Tensor, Tensor | None]:
    """The weights and bias of `conv` followed by `norm` as those of one convolution, in float64. Differentiable.

    `batch_norm(conv2d(x, weight, bias)) == conv2d(x, folded_weight, folded_bias)` with
    `folded_weight[k] = weight[k] * scale[k]` and `folded_bias = bias * scale + shift`.
    """
    weight = weight.double()
    bias = None if bias is None else bias.double()
    if norm is None:
        return weight, bias
    scale, shift = norm.scale_shift()
    return weight * scale.reshape(-1, 1, 1, 1), shift if bias is None else bias * scale + shift


def fold_to(
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | None,
) -> tuple[Tensor, Tensor | None]:
    """`fold` rounded once to the compute dtype; weights without a norm pass through unrounded where they fit."""
    if norm is not None or weight.dtype != dtype:
        weight, bias = fold(weight, bias, norm)
    return weight.to(dtype), None if bias is None else bias.to(dtype)
