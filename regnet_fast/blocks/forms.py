"""The blocks as formulas over units: what each one computes in evaluation.

    unit  = convolution -> normalisation -> activation
    block = unit(1x1) -> unit(3x3, grouped) -> [squeeze-excite] -> unit(1x1) (+ shortcut) -> activation

A form holds units, or their packed versions after `bind`; `run(x)` is the same code for both. Packed versions take x as
`laid_out` gives it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..backends import Deferred, computed, pixel_means
from .units import (
    ActivationUnit,
    ChannelConvUnit,
    ConvUnit,
    GateUnit,
    HostNormUnit,
    JoinUnit,
    LinearUnit,
    NormActUnit,
    Refused,
    SqueezeExciteUnit,
    Unit,
)


class Form:
    """What a block computes. `casts_input` says that the output's dtype under autocast does not depend on the
    input's; `dense`, that nearly all of its work is dense convolutions of several taps.
    """

    casts_input: bool = True
    dense: bool = False
    drop_path: nn.Module | None = None

    def check_evaluation(self) -> None:
        """Raise `Refused` where a norm or stochastic depth is in training mode."""
        for path, norm in self.norms():
            if norm.training and isinstance(norm, nn.modules.batchnorm._NormBase):
                raise Refused(f"{path} is in training mode")
        for unit in self.units().values():
            host = unit.norm if isinstance(unit, HostNormUnit) else getattr(unit, "then", None)
            if host is not None and host.training:  # it may keep statistics, and a gradient would run it twice
                raise Refused(f"{unit.path} has a {type(host).__name__} in training mode")
        if self.drop_path is not None and self.drop_path.training:
            raise Refused(f"drop_path is an active {type(self.drop_path).__name__}")

    def norms(self) -> list[tuple[str, nn.Module]]:
        """The BatchNorm modules of all units, with their names."""
        return [norm for unit in self.units().values() for norm in unit.norms()]

    def units(self) -> dict[str, Unit]:
        """The units by field."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: unit for name, unit in named.items() if isinstance(unit, Unit)}

    def check_channels(self) -> None:
        """Raise `Refused` where the shapes of the weights do not fit each other: the host has its own error for it."""
        for unit in self.units().values():
            unit.check()

    def bind(self, wrap: Callable[[Unit], Callable]) -> Form:
        """The same form with every unit replaced by `wrap(unit)`."""
        bound = copy.copy(self)
        for name, unit in self.units().items():
            setattr(bound, name, wrap(unit))
        return bound

    def in_channels(self) -> int | None:
        """Channels of the input, where a unit tells."""
        for unit in self.units().values():
            if isinstance(unit, (ConvUnit, LinearUnit)):
                return unit.in_channels
            if isinstance(unit, NormActUnit):
                return unit.out_channels
        return None

    def widest(self, channels: int, height: int, width: int) -> int:
        """Elements of the largest map that one image has in this block, its input included."""
        area, widest = height * width, channels * height * width
        for unit in self.units().values():
            if isinstance(unit, ConvUnit):
                down, across = unit.conv.stride
                area //= down * across
                widest = max(widest, unit.conv.weight.shape[0] * area)
        return widest

    def laid_out(self, x: Tensor) -> Tensor:
        """The input in the layout that `run` reads, once the form is bound."""
        return x.contiguous(memory_format=torch.channels_last)

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        """The block's output; x may be overwritten where it is the block's `own`."""
        raise NotImplementedError


def check_flow(*units: Unit | None) -> None:
    """Refuse units of which one gives another number of channels than the next one takes."""
    known = [unit for unit in units if unit is not None and unit.in_channels is not None]
    for one, following in pairwise(known):
        if one.out_channels != following.in_channels:
            raise Refused(
                f"{one.path} gives {one.out_channels} channels and {following.path} takes {following.in_channels}"
            )


def _check_sum(unit: ConvUnit, added: Unit | None, identity: bool, first: Unit) -> None:
    """Refuse a shortcut, or what `first` takes, of other channels than the unit's that it is added to."""
    channels = added.out_channels if added is not None else first.in_channels if identity else None
    if channels not in (None, unit.out_channels):
        raise Refused(f"{unit.path} gives {unit.out_channels} channels and {channels} are added")


def _with_shortcut(
    conv1: Callable, shortcut: Callable | None, pool: nn.Module | None, x: Tensor | Deferred
) -> tuple[Tensor, Tensor | None]:
    """conv1's result, and the shortcut's where the backend computes both from one read of x."""
    both = conv1.beside(shortcut, x) if shortcut is not None and pool is None else None
    return (conv1(x), None) if both is None else both


@dataclass(eq=False)
class Single(Form):
    """One convolution unit: stems, a final convolution, a stand-alone layer. With `join` its input is added behind the
    activation.
    """

    unit: ConvUnit
    join: JoinUnit | None = None
    drop_path: nn.Module | None = None

    @property
    def casts_input(self) -> bool:
        return self.join is None

    def check_channels(self) -> None:
        super().check_channels()
        _check_sum(self.unit, None, self.join is not None, self.unit)

    def laid_out(self, x: Tensor) -> Tensor:
        return self.unit.laid_out(x) if self.join is None else super().laid_out(x)

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        y = self.unit(x)
        return y if self.join is None else self.join(y, None, x)


@dataclass(eq=False)
class LastLayer(Form):
    """A norm with its activation, or an activation: what stands behind the last block."""

    unit: NormActUnit | ActivationUnit

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        return self.unit(x, consume=own)


@dataclass(eq=False)
class Stem(Form):
    """Up to three convolution units, then `rest`: the host's own layers, such as a pooling."""

    conv1: ConvUnit
    conv2: ConvUnit | None = None
    conv3: ConvUnit | None = None
    rest: tuple[nn.Module, ...] = ()

    def check_channels(self) -> None:
        super().check_channels()
        check_flow(self.conv1, self.conv2, self.conv3)

    def laid_out(self, x: Tensor) -> Tensor:
        return self.conv1.laid_out(x)

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        for layer in (self.conv1, self.conv2, self.conv3, *self.rest):
            x = x if layer is None else layer(x)
        return x


@dataclass(eq=False)
class Bottleneck(Form):
    """`conv3(se(conv2(conv1(x)))) + shortcut(x) -> activation`: RegNetX, RegNetY, RegNetZ, ResNet, EfficientNet.

    Without `conv3` it is a basic block or a depthwise-separable one, whose last convolution is conv2: it reads what the
    squeeze-excite gates, and is added to. With `join` the last convolution's own result is gated and added to instead:
    `join(conv3(...) * se(conv3(...)) + shortcut(x))`.

    `shortcut` is a unit on the pooled input, `identity` adds x itself, and with neither nothing is added. `before` is a
    convolution of x that conv1 reads in its place, `blur` a pooling of what the last convolution reads.
    """

    conv1: ConvUnit
    conv2: ConvUnit
    conv3: ConvUnit | None = None
    squeeze_excite: SqueezeExciteUnit | ChannelConvUnit | None = None
    shortcut: ConvUnit | None = None
    pool: nn.Module | None = None
    identity: bool = False
    drop_path: nn.Module | None = None
    join: JoinUnit | None = None
    before: ConvUnit | None = None
    blur: nn.Module | None = None

    @property
    def casts_input(self) -> bool:
        return not self.identity

    @property
    def last(self) -> ConvUnit:
        """The convolution that the sum is of."""
        return self.conv2 if self.conv3 is None else self.conv3

    @property
    def first(self) -> ConvUnit:
        """The convolution that reads the input."""
        return self.conv1 if self.before is None else self.before

    def in_channels(self) -> int:
        return self.first.in_channels

    def check_channels(self) -> None:
        super().check_channels()
        inner = [self.conv1] if self.conv3 is None else [self.conv1, self.conv2]
        gated = [self.squeeze_excite, self.last] if self.join is None else [self.last, self.squeeze_excite]
        check_flow(self.before, *inner, *gated)
        if self.shortcut is not None and self.shortcut.in_channels != self.first.in_channels:
            raise Refused(f"{self.shortcut.path} takes {self.shortcut.in_channels} channels")
        _check_sum(self.last, self.shortcut, self.identity, self.first)

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        gates_input = self.squeeze_excite is not None and self.join is None
        means, shortcut = None, None
        first = x if self.before is None else self.before(x)
        both = None if self.conv3 is None else self.conv1.ahead(self.conv2, first, gates_input)
        if both is not None:
            y, means = both
        elif self.conv3 is None and gates_input:
            y, means = self.conv1(first, means=True)
        elif self.before is not None:
            y = self.conv1(first)
        else:
            y, shortcut = _with_shortcut(self.conv1, self.shortcut, self.pool, x)
        if self.conv3 is not None and both is None:
            if gates_input:
                y, means = self.conv2(y, means=True)
            else:
                y = self.conv2(y)
        gate = None if means is None else self.squeeze_excite(means, y.dtype)
        residual, into_residual = x if self.identity else None, own and self.identity
        if self.shortcut is not None:
            residual, into_residual = shortcut, True
            if shortcut is None:
                residual = self.shortcut(x if self.pool is None else self.pool(x))
        if self.blur is not None:
            y = self.blur(y)
            y = y.contiguous(memory_format=torch.channels_last) if isinstance(y, Tensor) else y
        if self.join is None:
            return self.last(y, gate, residual, consume=True, into_residual=into_residual)
        if self.squeeze_excite is None:
            return self.join(self.last(y), None, residual)
        y, means = self.last(y, means=True)
        return self.join(y, self.squeeze_excite(means, y.dtype), residual)


@dataclass(eq=False)
class PreAct(Form):
    """`conv3(norm3(se(conv2(norm2(conv1(norm1(x))))))) + shortcut`: RegNetV and ResNetV2.

    norm2, and norm3 where no squeeze-excite stands before it, are folded into conv1 and conv2. Without `conv3` it is
    the basic block of two convolutions. `shortcut` reads the normalised input; an identity adds the normalised input
    where `identity_after_norm` (RegNetV), else x itself (ResNetV2).
    """

    norm1: NormActUnit | HostNormUnit
    conv1: ConvUnit
    conv2: ConvUnit
    conv3: ConvUnit | None = None
    norm3: NormActUnit | HostNormUnit | None = None
    squeeze_excite: SqueezeExciteUnit | ChannelConvUnit | None = None
    shortcut: ConvUnit | None = None
    pool: nn.Module | None = None
    identity: bool = True
    identity_after_norm: bool = False
    owns_norm: bool = True
    drop_path: nn.Module | None = None
    casts_input = False

    def check_channels(self) -> None:
        super().check_channels()
        check_flow(self.norm1, self.conv1, self.conv2, self.squeeze_excite, self.norm3, self.conv3)
        check_flow(self.norm1, self.shortcut)
        if self.shortcut is not None and self.shortcut.in_channels != self.conv1.in_channels:
            raise Refused(f"{self.shortcut.path} takes {self.shortcut.in_channels} channels")
        _check_sum(self.conv3 or self.conv2, self.shortcut, self.identity, self.conv1)

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        owned = self.shortcut is not None
        normalised = self.norm1(x, consume=own and (owned or self.identity_after_norm), defer=self.conv3 is not None)
        y, residual = _with_shortcut(self.conv1, self.shortcut, self.pool, normalised)
        if owned and residual is None:
            residual = self.shortcut(normalised if self.pool is None else self.pool(computed(normalised)))
        elif self.shortcut is None and self.identity:
            owned = self.owns_norm if self.identity_after_norm else own
            residual = normalised if self.identity_after_norm else x
        if self.conv3 is None:
            return self.conv2(y, None, residual, into_residual=owned)
        if self.squeeze_excite is not None:
            y, means = self.conv2(y, means=True)
            y = self.norm3(y, self.squeeze_excite(means, y.dtype), consume=True, defer=True)
        else:
            y = self.conv2(y)
            y = y if self.norm3 is None else self.norm3(y, consume=True, defer=True)
        return self.conv3(y, None, residual, into_residual=owned)


@dataclass(eq=False)
class RepVgg(Form):
    """One convolution, [squeeze-excite], activation."""

    conv: ConvUnit
    squeeze_excite: SqueezeExciteUnit | ChannelConvUnit | None = None
    gate: GateUnit | None = None
    casts_input: bool = True
    drop_path: nn.Module | None = None
    dense: bool = True

    def check_channels(self) -> None:
        super().check_channels()
        check_flow(self.conv, self.squeeze_excite)

    def laid_out(self, x: Tensor) -> Tensor:
        return self.conv.laid_out(x)

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        if self.squeeze_excite is None:
            return self.conv(x)
        y, means = self.conv(x, means=True)
        return self.gate(y, self.squeeze_excite(means, y.dtype))


@dataclass(eq=False)
class Head(Form):
    """Global average pooling, then a linear classifier (a Linear or a 1x1 convolution) where there is one.

    `hidden` is a 1x1 convolution of the means before it. How means become a map of one pixel and back is what a program
    replaces, as it does the pooling.
    """

    classifier: LinearUnit | None = None
    hidden: ConvUnit | None = None
    pool: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(lambda x: pixel_means(x).to(x.dtype))
    as_map: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(lambda means: means[:, :, None, None])
    as_rows: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(lambda x: x.flatten(1))

    def check_channels(self) -> None:
        super().check_channels()
        check_flow(self.hidden, self.classifier)

    def in_channels(self) -> int | None:
        unit = self.hidden or self.classifier
        return None if unit is None else unit.in_channels

    def run(self, x: Tensor, own: bool = False) -> Tensor:
        means = self.pool(x)
        if self.hidden is not None:
            means = self.as_rows(self.hidden(self.as_map(means)))
        return means if self.classifier is None else self.classifier(means)
