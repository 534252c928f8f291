"""What an operation is asked to do, the facts a backend decides on; and what a backend makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution's kernel moves over its input; pairs are rows and columns."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the result."""
        axes = zip(size, kernel, *self[:3], strict=True)
        height, width = ((n + 2 * pad - dilation * (k - 1) - 1) // step + 1 for n, k, step, pad, dilation in axes)
        return height, width

    def pointwise(self, kernel: Sequence[int]) -> bool:
        """Whether it is a matrix product over pixels: `pointwise_conv`."""
        return tuple(kernel) == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def same3x3(self, kernel: Sequence[int]) -> bool:
        """Whether it is a 3x3 convolution that keeps the size but for its stride, as `grouped_conv` is."""
        return tuple(kernel) == (3, 3) and self.padding == self.dilation

    def op(self, kernel: Sequence[int], residual: bool = False) -> str:
        """The narrowest public operation that serves a convolution."""
        if self.pointwise(kernel):
            return "pointwise_conv"
        return "grouped_conv" if self.groups > 1 and not residual and self.same3x3(kernel) else "dense_conv"


@dataclass(frozen=True)
class ConvProblem:
    """One convolution with its epilogue: `activation(conv(x * gate) + bias + residual)`.

    `input_shape` is (N, C, H, W) whatever the memory format. `device` is a device's name, such as "cpu" or "cuda:1".
    `means` says that the channel means of the result are asked as well.
    """

    input_shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    geometry: Geometry
    activation: str
    gate: bool
    residual: bool
    dtype: torch.dtype
    device: str
    means: bool = False

    @property
    def op(self) -> str:
        """The public operation: `pointwise_conv`, `grouped_conv` or `dense_conv`."""
        return self.geometry.op(self.kernel, self.residual)

    @property
    def depthwise(self) -> bool:
        """Whether each channel of the input is a group of its own."""
        return self.geometry.groups > 1 and self.geometry.groups == self.input_shape[1]

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = self.geometry.output_size(self.input_shape[2:], self.kernel)
        return (self.input_shape[0], self.out_channels, *size)

    @property
    def flops(self) -> int:
        """Multiplications and additions, two per multiply-accumulate."""
        n, k, h, w = self.output_shape
        return 2 * n * k * h * w * (self.input_shape[1] // self.geometry.groups) * self.kernel[0] * self.kernel[1]

    @property
    def bytes(self) -> int:
        """Bytes of a perfect execution: input, weights and residual read once, output written once."""
        n, c, h, w = self.input_shape
        on, k, oh, ow = self.output_shape
        weights = k * (c // self.geometry.groups) * self.kernel[0] * self.kernel[1] + k
        elements = (
            n * c * h * w + on * k * oh * ow * (2 if self.residual else 1) + weights + (n * c if self.gate else 0)
        )
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class SqueezeExciteProblem:
    """`gate_activation(fc2(activation(fc1(means))))` for (N, C) means and R hidden channels."""

    batch: int
    channels: int
    hidden: int
    activation: str
    dtype: torch.dtype
    device: str
    gate_activation: str = "sigmoid"
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


@dataclass(frozen=True)
class JoinProblem:
    """What ends a block whose convolutions are gated or added to as they are: `activation(x * gate + residual)`, where
    there are a gate and a residual.
    """

    input_shape: tuple[int, int, int, int]
    activation: str
    gate: bool
    residual: bool
    dtype: torch.dtype
    device: str
    op: str = "join"

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.input_shape)

    @property
    def bytes(self) -> int:
        return (2 + self.residual) * math.prod(self.input_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PairProblem:
    """Two 1x1 convolutions of one map, as a block's first one and its shortcut: `activation(conv(x) + bias)`, and
    `conv(x) + bias` with other channels and a stride.
    """

    input_shape: tuple[int, int, int, int]
    out_channels: int
    other_channels: int
    activation: str
    stride: int
    dtype: torch.dtype
    device: str
    op: str = "pointwise_pair"

    @classmethod
    def of(cls, first: ConvProblem, other: ConvProblem) -> PairProblem | None:
        """The two as a pair, or None where they are not of this form."""
        stride = other.geometry.stride[0]
        widths = first.out_channels, other.out_channels
        pair = cls(first.input_shape, *widths, first.activation, stride, first.dtype, first.device)
        return pair if pair.both == (first, other) else None

    @property
    def first(self) -> ConvProblem:
        """The convolution without a stride."""
        return self._conv(self.out_channels, 1, self.activation)

    @property
    def other(self) -> ConvProblem:
        """The convolution with the stride."""
        return self._conv(self.other_channels, self.stride, "none")

    def _conv(self, out_channels: int, stride: int, activation: str) -> ConvProblem:
        facts = activation, False, False, self.dtype, self.device
        return ConvProblem(self.input_shape, out_channels, (1, 1), Geometry((stride, stride)), *facts)

    @property
    def both(self) -> tuple[ConvProblem, ConvProblem]:
        return self.first, self.other

    @property
    def flops(self) -> int:
        return self.first.flops + self.other.flops

    @property
    def bytes(self) -> int:
        return self.first.bytes + self.other.bytes - math.prod(self.input_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BackToBackProblem:
    """A 1x1 convolution and a grouped one of its result, as a block's first two: `activation(conv3x3(y) + bias)` of
    `y = first_activation(conv1x1(x) + first_bias)`; and with `means` the channel means of that.
    """

    input_shape: tuple[int, int, int, int]
    out_channels: int
    groups: int
    first_activation: str
    activation: str
    stride: int
    dtype: torch.dtype
    device: str
    means: bool = False
    op: str = "back_to_back"

    @classmethod
    def of(cls, first: ConvProblem, second: ConvProblem) -> BackToBackProblem | None:
        """The two as one problem, or None where they are not of this form."""
        facts = first.activation, second.activation, second.geometry.stride[0], first.dtype, first.device, second.means
        found = cls(first.input_shape, second.out_channels, second.geometry.groups, *facts)
        return found if found.groups > 1 and found.both == (first, second) else None

    @property
    def first(self) -> ConvProblem:
        """The 1x1 convolution."""
        facts = self.first_activation, False, False, self.dtype, self.device
        return ConvProblem(self.input_shape, self.out_channels, (1, 1), Geometry(), *facts)

    @property
    def second(self) -> ConvProblem:
        """The grouped one."""
        geometry = Geometry((self.stride, self.stride), (1, 1), (1, 1), self.groups)
        facts = self.activation, False, False, self.dtype, self.device, self.means
        return ConvProblem(self.first.output_shape, self.out_channels, (3, 3), geometry, *facts)

    @property
    def both(self) -> tuple[ConvProblem, ConvProblem]:
        return self.first, self.second

    @property
    def flops(self) -> int:
        return self.first.flops + self.second.flops

    @property
    def bytes(self) -> int:
        return self.first.bytes + self.second.bytes - 2 * math.prod(self.first.output_shape) * self.dtype.itemsize


Problem = ConvProblem | SqueezeExciteProblem | NormActProblem | JoinProblem | PairProblem | BackToBackProblem


class Run:
    """A problem's weights bound to a backend: what its `prepare_conv`, `prepare_pair` and so on return. A
    subclass defines `__call__` and, where it can more, some of the others:

    - a convolution is `run(x, gate, residual, consume, into_residual)`: `consume` allows it to overwrite x,
      `into_residual` to write its result there. It is packed for one input shape, or serves every shape;
    - a pair is `run(x)`, which gives both results; two convolutions back to back are `run(x)`, which gives the second
      one's, and with `means` these too;
    - squeeze-excite is `run(means)`, a scale, shift and activation `run(x, gate, consume)`, and the end of a block
      `run(x, gate, residual, consume)`.

    Attributes:
        label: what serves, in words for `explain`.
        takes_deferred: x and the residual may be `Deferred`.
        any_layout: x may be contiguous instead of channels_last.
        affine: scale, shift and activation of a `Deferred` map, where convolutions can compute it as they read x.
        with_parts: `run.with_parts(x)` is the result and its float32 means, (N, K), or (N, T, K) parts whose sum over T
            they are.
        beside: `run.beside(other, x)` is this result and that of another run of the class from one read of x, or None.
        from_parts: `run.from_parts(parts, dtype)` is the gate from (N, T, C) parts whose sum over T are the means.
        refused: why a library did not compute a call as it was to, and another way was taken for good; None as a rule.
    """

    label: str
    takes_deferred: bool = False
    any_layout: bool = False
    affine: tuple[Tensor, Tensor, str] | None = None
    with_parts: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    beside: Callable[..., tuple[Tensor, Tensor] | None] | None = None
    from_parts: Callable[[Tensor, torch.dtype], Tensor] | None = None
    refused: str | None = None

    def with_means(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> tuple[Tensor, Tensor]:
        """A convolution's result and its channel means, float32 or wider: (N, K), or (N, T, K) parts whose sum over T
        they are where the backend computes these on the way.
        """
        if self.with_parts is not None and gate is None and residual is None:
            return self.with_parts(x)
        y = self(x, gate, residual, consume, into_residual)
        return y, pixel_means(y)


class Call(Run):
    """A run that is nothing but a function."""

    def __init__(self, call: Callable[..., Tensor], label: str):
        self.call, self.label = call, label

    def __call__(self, *arguments) -> Tensor:
        return self.call(*arguments)


class Apart(Run):
    """Two convolutions of one map in two launches: `Apart.by(prepare_conv)` is a backend's `prepare_pair`."""

    label = "two convolutions"

    def __init__(self, problem: PairProblem | BackToBackProblem, *runs: Run):
        self.problem, self.runs = problem, runs

    @classmethod
    def by(cls, prepare_conv: Callable[..., Run]) -> Callable[..., Run]:
        def prepare(
            problem: PairProblem | BackToBackProblem,
            weight: Tensor,
            bias: Tensor | None,
            other_weight: Tensor,
            other_bias: Tensor | None,
        ) -> Run:
            first, other = problem.both
            return cls(problem, prepare_conv(first, weight, bias), prepare_conv(other, other_weight, other_bias))

        return prepare

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(x, None, None, False, False) for run in self.runs)


class InTurn(Apart):
    """Two convolutions back to back in two launches: `InTurn.by(prepare_conv)` is a `prepare_back_to_back`."""

    def __call__(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        first, second = self.runs
        operands = first(x, None, None, False, False), None, None, True, False
        return second.with_means(*operands) if self.problem.means else second(*operands)


class Deferred:
    """`activation(x * scale * gate + shift)`, not computed yet: its readers compute it as they read x.

    Args:
        run: the affine map bound to its scale, shift and activation, `run.affine`.
        x: (N, C, H, W), channels_last. gate: (N, C) or None.
    """

    def __init__(self, run: Run, x: Tensor, gate: Tensor | None):
        self.run, self.x, self.gate = run, x, gate
        self.shape: torch.Size = x.shape
        self.dtype, self.device = x.dtype, x.device
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The map itself, for readers that cannot normalise; computed once."""
        if self._value is None:
            self._value = self.run(self.x, self.gate, False)
        return self._value


def computed(x: Tensor | Deferred) -> Tensor:
    """x itself, or the value of a deferred one."""
    return x.value() if x.__class__ is Deferred else x


def pixel_means(y: Tensor) -> Tensor:
    """(N, C) means over the pixels of a channels_last tensor, float32 or wider."""
    if y.dtype != torch.bfloat16 or not y.is_cpu:
        return y.mean((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))
    # on a CPU torch's own mean converts the whole map to float32 first, which is slower (docs/cpu.md)
    return y.sum((2, 3)).float().mul_(1 / (y.shape[2] * y.shape[3]))
