"""The units that blocks are made of: which of a host's modules form one operation, and how to run it.

A unit refers to the host's own modules and reads their weights when it is used. Called, it runs through the public
operations (traceable, differentiable). `pack(dtype)` gives the same callable with its weights folded and packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import Geometry, computed, pixel_means
from ..backends.reference import activate, channel_means
from ..ops.conv import conv
from ..ops.convolution import PackedConv
from ..ops.fold import BatchNorm, fold
from ..ops.join import PackedJoin
from ..ops.norm_act import PackedNormAct, norm_act
from ..ops.squeeze_excite import PackedSqueezeExcite, squeeze_excite


class Refused(Exception):
    """Why a block cannot run fused, in words for the user."""


def batch_norm(module: nn.Module) -> BatchNorm:
    """The statistics and parameters of an evaluation-mode BatchNorm module."""
    return BatchNorm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


class Unit:
    """One operation of a block. `path` is its module's name inside the block."""

    path: str

    def pack(self, dtype: torch.dtype) -> Callable:
        """The unit with its weights folded and packed, computing in `dtype`."""
        raise NotImplementedError

    def norms(self) -> list[tuple[str, nn.Module]]:
        """The BatchNorm modules that the unit folds, with their names."""
        return []

    @property
    def in_channels(self) -> int | None:
        """Channels of what it reads, None where it takes any number."""
        return None

    @property
    def out_channels(self) -> int | None:
        """Channels of its result."""
        return self.in_channels

    def beside(self, other: Callable, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """`self(x)` and `other(x)` where both are computed from one read of x, else None."""
        return None

    def ahead(self, second: Callable, x: Tensor, means: bool) -> tuple[Tensor, Tensor | None] | None:
        """`second(self(x))`, and with `means` these, where both are computed without a map between them, else None."""
        return None

    def check(self) -> None:
        """Raise `Refused` where the shapes of its weights do not fit each other."""
        for path, norm in self.norms():
            _check_vectors(path, self.out_channels, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def _check_vectors(path: str, channels: int, *vectors: Tensor | None) -> None:
    for t in vectors:
        if t is not None and t.shape != (channels,):
            raise Refused(f"{path} has a vector of shape {tuple(t.shape)} for {channels} channels")


@dataclass(eq=False)
class ConvUnit(Unit):
    """`activation(norm(conv(x * gate)) + residual)`.

    `norm` is an evaluation-mode BatchNorm and is folded. `then` is a norm without an affine form, which runs as the
    host's own module between the convolution and the residual. `standardize` is the epsilon of weight standardisation.
    """

    path: str
    conv: nn.Conv2d
    norm: nn.Module | None = None
    then: nn.Module | None = None
    activation: str = "none"
    standardize: float | None = None
    norm_path: str = ""

    def norms(self) -> list[tuple[str, nn.Module]]:
        return [] if self.norm is None else [(self.norm_path, self.norm)]

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The folded weights and bias in float64."""
        weight = self.conv.weight
        if self.standardize is not None:
            rows = weight.double().flatten(1)
            variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
            weight = ((rows - mean) * (variance + self.standardize).rsqrt()).reshape(weight.shape)
        return fold(weight, self.conv.bias, None if self.norm is None else batch_norm(self.norm))

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype

    @property
    def in_channels(self) -> int:
        return self.conv.weight.shape[1] * self.conv.groups

    @property
    def out_channels(self) -> int:
        return self.conv.weight.shape[0]

    def check(self) -> None:
        super().check()
        shape = tuple(self.conv.weight.shape)
        if len(shape) != 4 or shape[0] % self.conv.groups or shape[2:] != self.conv.kernel_size:
            raise Refused(f"{self.path} has a weight of shape {shape}")
        _check_vectors(self.path, shape[0], self.conv.bias)

    def geometry(self) -> Geometry:
        conv = self.conv
        return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)

    def __call__(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        means: bool = False,
        consume: bool = False,
        into_residual: bool = False,
    ):
        weight, bias = (None if t is None else t.to(self.dtype) for t in self.weights())
        if self.then is None:
            y, found = conv(x, weight, bias, self.geometry(), self.activation, None, gate, residual, means)
            return (y, found) if means else y
        y = self.then(conv(x, weight, bias, self.geometry(), gate=gate)[0])
        y = activate(y if residual is None else y + residual, self.activation)
        return (y, channel_means(y)) if means else y

    def pack(self, dtype: torch.dtype) -> Callable:
        packed = PackedUnit(self, dtype)
        return packed if self.then is None else PackedConvThenNorm(packed, self.then, self.activation)


Borders = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and behind the rows, and the columns."""


@dataclass(eq=False)
class BorderedConvUnit(ConvUnit):
    """A `ConvUnit` of a map that gets a border of zeros first: `border`, or else one by the size of the map, as in
    TensorFlow's padding "same", for `ceil(size / stride)` results; of an odd number the larger half is behind.
    """

    border: Borders | None = None

    def borders(self, size: Sequence[int]) -> Borders:
        """Of a map of such a size."""
        if self.border is not None:
            return self.border
        conv, found = self.conv, []
        for n, kernel, stride, dilation in zip(size, conv.kernel_size, conv.stride, conv.dilation, strict=True):
            total = max((-(-n // stride) - 1) * stride + (kernel - 1) * dilation + 1 - n, 0)
            found.append((total // 2, total - total // 2))
        return found[0], found[1]

    def bordered(self, x: Tensor) -> Tensor:
        """x with its border, in the layout of x."""
        (top, bottom), (left, right) = self.borders(x.shape[2:])
        return F.pad(x, (left, right, top, bottom))

    def check(self) -> None:
        super().check()
        if self.conv.padding != (0, 0):
            raise Refused(f"{self.path} has a border of its own beside another one")
        sizes = [] if self.border is None else [n for both in self.border for n in both]
        if min(sizes, default=0) < 0 or (any(sizes) and tuple(self.conv.kernel_size) == (1, 1)):
            raise Refused(f"{self.path} has the border {self.border}, which is no border of its kernel")
        if self.then is not None:
            raise Refused(f"{self.path} has a border of its own, and {type(self.then).__name__} behind it")

    def __call__(self, x: Tensor, *arguments, **options):
        return super().__call__(self.bordered(x), *arguments, **options)

    def pack(self, dtype: torch.dtype) -> Callable:
        return Bordered(self, PackedUnit(self, dtype))


class Bordered:
    """A packed convolution of a map that gets its border first."""

    def __init__(self, unit: BorderedConvUnit, conv: PackedConv):
        self.unit, self.conv = unit, conv

    def laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def beside(self, other: Callable, x: Tensor) -> None:
        """Never, since it reads another map."""

    def ahead(self, second: Callable, x: Tensor, means: bool) -> None:
        """Never, since it reads another map."""

    def __call__(self, x: Tensor, *arguments, **options):
        bordered = self.unit.bordered(computed(x))
        return self.conv(bordered.contiguous(memory_format=torch.channels_last), *arguments, **options)


class PackedUnit(PackedConv):
    """The packed weights of a unit. It keeps no folded copy beside them: another input shape folds again."""

    def __init__(self, unit: ConvUnit, dtype: torch.dtype):
        shape = torch.empty(unit.conv.weight.shape, dtype=dtype, device="meta")
        super().__init__(shape, None, unit.geometry(), unit.activation if unit.then is None else "none")
        self.unit, self.dtype = unit, dtype

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.unit.weights()
        return weight.to(self.dtype), None if bias is None else bias.float()


class PackedConvThenNorm:
    """A packed convolution, the host's own norm, then residual and activation."""

    def __init__(self, conv: PackedConv, norm: nn.Module, activation: str):
        self.conv, self.norm, self.activation = conv, norm, activation
        self.laid_out = conv.laid_out

    def beside(self, other: Callable, x: Tensor) -> None:
        """Never, since the norm reads the convolution's result."""

    def ahead(self, second: Callable, x: Tensor, means: bool) -> None:
        """Never, since the norm reads the convolution's result."""

    def __call__(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        means: bool = False,
        consume: bool = False,
        into_residual: bool = False,
    ):
        y = self.norm(self.conv(x, gate, consume=consume))
        y = activate(y if residual is None else y + computed(residual), self.activation)
        return (y, pixel_means(y)) if means else y


class Branch(NamedTuple):
    """A convolution and its norm beside another one, by the name of what holds both."""

    path: str
    conv: nn.Conv2d
    norm: nn.Module


@dataclass(eq=False)
class BranchesUnit(ConvUnit):
    """The sum of a k x k convolution, others of k x k or 1x1 and an identity, each with its BatchNorm, as one
    convolution: the blocks of RepVGG and MobileOne before they are reparameterised.

    `conv` and `norm` are the first branch; smaller kernels, and a unit kernel for the identity, are padded to k x k and
    added. Source: X. Ding et al., "RepVGG", CVPR 2021, arXiv 2101.03697.
    """

    others: tuple[Branch, ...] = ()
    identity: nn.Module | None = None

    def norms(self) -> list[tuple[str, nn.Module]]:
        found = [*super().norms(), *((f"{branch.path}.bn", branch.norm) for branch in self.others)]
        return found if self.identity is None else [*found, ("identity", self.identity)]

    def check(self) -> None:
        super().check()
        kxk = self.conv.weight.shape
        for branch in self.others:
            shape = branch.conv.weight.shape
            if tuple(shape) not in ((*kxk[:2], 1, 1), tuple(kxk)):
                raise Refused(f"its branches have weights of the shapes {tuple(kxk)} and {tuple(shape)}")
        if self.identity is not None and self.in_channels != kxk[0]:
            raise Refused(f"its input of {self.in_channels} channels is added to {kxk[0]}")

    def weights(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().weights()
        centre = weight.shape[2] // 2
        for branch in self.others:
            weight1, bias1 = fold(branch.conv.weight, branch.conv.bias, batch_norm(branch.norm))
            weight, bias = weight + F.pad(weight1, [centre - weight1.shape[2] // 2] * 4), bias + bias1
        if self.identity is not None:
            scale, shift = batch_norm(self.identity).scale_shift()
            channel = torch.arange(weight.shape[0], dtype=torch.int64, device=weight.device)
            unit = F.one_hot(channel % weight.shape[1], weight.shape[1]).to(weight.dtype) * scale[:, None]
            weight, bias = weight + F.pad(unit[:, :, None, None], [centre] * 4), bias + shift
        return weight, bias


@dataclass(eq=False)
class LinearUnit(Unit):
    """A classifier on (N, C) means: a Linear, or a 1x1 convolution read as one.

    It stays torch's matrix product: on such a small problem oneDNN's convolution is no faster and rounds worse.
    """

    path: str
    linear: nn.Linear | nn.Conv2d

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.weight.dtype

    @property
    def in_channels(self) -> int:
        return self.linear.weight.shape[1]

    @property
    def out_channels(self) -> int:
        return self.linear.weight.shape[0]

    def check(self) -> None:
        _check_vectors(self.path, self.out_channels, self.linear.bias)

    def __call__(self, means: Tensor) -> Tensor:
        return F.linear(means, self.linear.weight.flatten(1), self.linear.bias)

    def pack(self, dtype: torch.dtype) -> Callable:
        weight, bias = self.linear.weight.flatten(1).to(dtype), self.linear.bias
        bias = None if bias is None else bias.to(dtype)
        return lambda means: F.linear(means, weight, bias)


@dataclass(eq=False)
class SqueezeExciteUnit(Unit):
    """From float32 channel means to a gate in the dtype of the feature map: `unit(means, dtype)`."""

    path: str
    fc1: nn.Conv2d
    fc2: nn.Conv2d
    activation: str = "relu"
    gate_activation: str = "sigmoid"

    @property
    def in_channels(self) -> int:
        return self.fc1.weight.shape[1]

    def check(self) -> None:
        hidden, channels = self.fc1.weight.shape[:2]
        if tuple(self.fc1.weight.shape[2:]) != (1, 1) or tuple(self.fc2.weight.shape) != (channels, hidden, 1, 1):
            shapes = [tuple(conv.weight.shape) for conv in (self.fc1, self.fc2)]
            raise Refused(f"{self.path} has weights of the shapes {shapes[0]} and {shapes[1]}")
        _check_vectors(self.path, hidden, self.fc1.bias)
        _check_vectors(self.path, channels, self.fc2.bias)

    def __call__(self, means: Tensor, dtype: torch.dtype) -> Tensor:
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        acts = {"activation": self.activation, "gate_activation": self.gate_activation}
        return squeeze_excite(means, *weights, **acts).to(dtype)

    def pack(self, dtype: torch.dtype) -> Callable:
        weights = [
            t.float() for t in (self.fc1.weight.flatten(1), self.fc1.bias, self.fc2.weight.flatten(1), self.fc2.bias)
        ]
        return PackedSqueezeExcite(*weights, self.activation, self.gate_activation)


@dataclass(eq=False)
class ChannelConvUnit(Unit):
    """Efficient channel attention: from float32 channel means to a gate in the dtype of the feature map, by a
    convolution along the channels, `gate_activation(conv1d(means))`: `unit(means, dtype)`.

    Source: Q. Wang et al., "ECA-Net", CVPR 2020, arXiv 1910.03151.
    """

    path: str
    conv: nn.Conv1d
    gate_activation: str = "sigmoid"

    def check(self) -> None:
        shape = tuple(self.conv.weight.shape)
        if shape[:2] != (1, 1) or shape[2] % 2 == 0 or self.conv.padding != (shape[2] // 2,):
            raise Refused(f"{self.path} has a weight of shape {shape} and a border of {self.conv.padding}")

    def __call__(self, means: Tensor, dtype: torch.dtype) -> Tensor:
        y = F.conv1d(means[:, None], self.conv.weight.to(means.dtype), padding=self.conv.padding)[:, 0]
        return activate(y, self.gate_activation).to(dtype)

    def pack(self, dtype: torch.dtype) -> Callable:
        return PackedChannelConv(self.conv.weight.float(), self.gate_activation)


class PackedChannelConv:
    """The same, of means or of (N, T, C) parts whose sum over T they are."""

    def __init__(self, weight: Tensor, gate_activation: str):
        self.weight, self.gate_activation = weight, gate_activation

    def __call__(self, means: Tensor, dtype: torch.dtype) -> Tensor:
        means = means if means.dim() == 2 else means.sum(1)
        y = F.conv1d(means[:, None], self.weight.to(means.dtype), padding=self.weight.shape[2] // 2)[:, 0]
        return activate(y, self.gate_activation).to(dtype)


@dataclass(eq=False)
class NormActUnit(Unit):
    """`activation(norm(x * gate))` for an evaluation-mode BatchNorm."""

    path: str
    norm: nn.Module
    activation: str = "none"

    def norms(self) -> list[tuple[str, nn.Module]]:
        return [(self.path, self.norm)]

    @property
    def in_channels(self) -> int:
        return self.norm.running_mean.shape[0]

    def __call__(self, x: Tensor, gate: Tensor | None = None, *, consume: bool = False, defer: bool = False) -> Tensor:
        return norm_act(x, batch_norm(self.norm), activation=self.activation, gate=gate)

    def pack(self, dtype: torch.dtype) -> Callable:
        scale, shift = batch_norm(self.norm).scale_shift()
        return PackedNormAct(scale.float(), shift.float(), self.activation)


@dataclass(eq=False)
class ActivationUnit(Unit):
    """`activation(x)`."""

    path: str
    activation: str

    def __call__(self, x: Tensor, *, consume: bool = False) -> Tensor:
        return activate(x, self.activation)

    def pack(self, dtype: torch.dtype) -> Callable:
        return self


@dataclass(eq=False)
class GateUnit(Unit):
    """`activation(x * gate)` for the result x of `conv`: a norm that scales by one."""

    path: str
    conv: nn.Conv2d
    activation: str

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        return activate(x * gate[:, :, None, None], self.activation)

    def pack(self, dtype: torch.dtype) -> Callable:
        weight = self.conv.weight
        ones = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
        return PackedNormAct(ones, torch.zeros_like(ones), self.activation)


@dataclass(eq=False)
class JoinUnit(Unit):
    """`activation(x * gate + residual)`, where there are a gate and a residual."""

    path: str
    activation: str = "none"

    def __call__(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate[:, :, None, None]
        return activate(x if residual is None else x + residual, self.activation)

    def pack(self, dtype: torch.dtype) -> Callable:
        return PackedJoin(self.activation)


@dataclass(eq=False)
class HostNormUnit(Unit):
    """A norm without an affine form, run as the host's own module: `norm(x * gate)`."""

    path: str
    norm: nn.Module

    def __call__(self, x: Tensor, gate: Tensor | None = None, *, consume: bool = False, defer: bool = False) -> Tensor:
        return self.norm(x if gate is None else x * gate[:, :, None, None])

    def pack(self, dtype: torch.dtype) -> Callable:
        return self
