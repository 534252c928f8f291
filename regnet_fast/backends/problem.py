"""What an operation is asked to do: the facts a backend decides on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ConvProblem:
    """One convolution with its epilogue: `activation(conv(x * gate) + bias + residual)`.

    `op` names the public operation it belongs to (`pointwise_conv`, `grouped_conv` or `dense_conv`); `input_shape` is
    (N, C, H, W) whatever the memory format. `device` is a device's name, such as "cpu" or "cuda:1".
    """

    op: str
    input_shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str
    gate: bool
    residual: bool
    dtype: torch.dtype
    device: str

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = [
            (self.input_shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        ]
        return (self.input_shape[0], self.out_channels, size[0], size[1])

    @property
    def flops(self) -> int:
        """Multiplications and additions, two per multiply-accumulate."""
        n, k, h, w = self.output_shape
        return 2 * n * k * h * w * (self.input_shape[1] // self.groups) * self.kernel[0] * self.kernel[1]

    @property
    def bytes(self) -> int:
        """Bytes of a perfect execution: input, weights and residual read once, output written once."""
        n, c, h, w = self.input_shape
        on, k, oh, ow = self.output_shape
        weights = k * (c // self.groups) * self.kernel[0] * self.kernel[1] + k
        elements = (
            n * c * h * w + on * k * oh * ow * (2 if self.residual else 1) + weights + (n * c if self.gate else 0)
        )
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class SqueezeExciteProblem:
    """`sigmoid(fc2(activation(fc1(means))))` for (N, C) means and R hidden channels."""

    batch: int
    channels: int
    hidden: int
    activation: str
    dtype: torch.dtype
    device: str
    op: str = "squeeze_excite"

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.channels * self.hidden

    @property
    def bytes(self) -> int:
        return (2 * self.channels * self.hidden + self.hidden + self.channels + 2 * self.batch * self.channels) * 4


@dataclass(frozen=True)
class NormActProblem:
    """`activation(x * scale * gate + shift)` with per-channel scale and shift and a per-image gate."""

    input_shape: tuple[int, int, int, int]
    activation: str
    gate: bool
    dtype: torch.dtype
    device: str
    op: str = "norm_act"

    @property
    def flops(self) -> int:
        n, c, h, w = self.input_shape
        return 2 * n * c * h * w

    @property
    def bytes(self) -> int:
        n, c, h, w = self.input_shape
        return (2 * n * c * h * w + 2 * c) * self.dtype.itemsize


Problem = ConvProblem | SqueezeExciteProblem | NormActProblem
