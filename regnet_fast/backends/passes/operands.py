"""What the passes of a training step are given, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """How a map is read: with which statistics (the biased variance), affine parameters, epsilon and activation."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, dense vectors in the dtype of the statistics: the normalised map is `x * scale + shift`."""
        scale = (self.var + self.eps).rsqrt_()
        scale = scale if self.weight is None else scale * self.weight
        if self.bias is None:
            return scale, -self.mean * scale
        return scale, torch.addcmul(self.bias, self.mean, scale, value=-1.0)


class Excite(NamedTuple):
    """Squeeze-and-excitation of the map that a convolution reads: (R, C) and (C, R) weights, biases, activation.

    `means`, where it is a list: forward leaves the channel means of the images there, of some after the others, and
    backward takes them from its first entry if there is one.
    """

    fc1: Tensor
    bias1: Tensor
    fc2: Tensor
    bias2: Tensor
    activation: str
    means: list[Tensor] | None = None


class Sums(NamedTuple):
    """Over images and pixels, for the gradient dz of a normalised map xhat: sum(dz * xhat) and sum(dz)."""

    product: Tensor
    plain: Tensor


class Conv(NamedTuple):
    """A convolution: its weight in the map's dtype, and stride, padding, dilation (pairs) and groups."""

    weight: Tensor
    geometry: Sequence


class ConvGradients(NamedTuple):
    """Gradients of convolutions of one map: of the map as it is read (before its activation where it has a norm), the
    norm's sums, squeeze-excite's four parameters, and every weight.
    """

    x: Tensor | None
    sums: Sums | None
    excite: tuple[Tensor, ...] | None
    weights: list[Tensor | None]


class OutputNorm(NamedTuple):
    """The norm behind a convolution, for the gradient of its raw result y: with batch statistics

        dy = weight * invstd * (dz - sum(dz) / count - xhat * sum(dz * xhat) / count)

    and with fixed ones, where `sums` is None, `dy = weight * invstd * dz`.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    eps: float
    sums: Sums | None
    count: float

    def coefficients(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """a, q and k of `dy = a * dz + q * y + k`, dense vectors in the dtype of the statistics."""
        invstd = (self.var + self.eps).rsqrt_()
        a = invstd if self.weight is None else invstd * self.weight
        if self.sums is None:
            return a, None, None
        q = (a * invstd).mul_(self.sums.product).mul_(-1.0 / self.count)
        return a, q, torch.addcmul(q * self.mean, a, self.sums.plain, value=1.0 / self.count).neg_()

    def vectors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`coefficients` in float32."""
        return tuple(None if t is None else t.float() for t in self.coefficients())


class OutputGrad(NamedTuple):
    """The gradient of a convolution's raw result y, or of its norm's result where there is a norm."""

    grad: Tensor
    norm: OutputNorm | None
    y: Tensor | None


class Term(NamedTuple):
    """One summand of a join: a map, read through its norm where it has one, times a factor for each image."""

    x: Tensor
    norm: Norm | None
    factor: Tensor | None
