"""What stands around the blocks of timm's networks: stems, last layers and heads, and `ConvNormAct` anywhere."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from timm.layers import ClassifierHead as TimmClassifierHead
from timm.layers import ConvNormAct as TimmConvNormAct
from timm.layers import Linear
from timm.models import register_notrace_module, resnetv2
from torch import nn

from ...backends import native
from ...blocks import forms
from ...blocks.fused import PIECES, Fused
from ...blocks.units import ActivationUnit, ConvUnit, HostNormUnit, LinearUnit, Refused
from .. import modules
from . import layers as read

_FORWARD_INTERMEDIATES = resnetv2.ResNetV2.forward_intermediates.__code__


@register_notrace_module
class ConvNormAct(Fused, TimmConvNormAct):
    """timm's `ConvNormAct`: `act(norm(conv(x)))`. Constructor and state are timm's."""

    host = TimmConvNormAct

    def fused_form(self) -> forms.Single:
        return forms.Single(read.conv_norm_act("", self))


class Layers(Fused, nn.Sequential):
    """Layers one after another that are one block."""

    trains = False

    @classmethod
    def around(cls, *layers: tuple[str, nn.Module]) -> Layers:
        """The block of layers that stand elsewhere, by their names; they stay as they are."""
        found = cls(OrderedDict(layers))
        found.training = False
        return found


def _flat(path: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a container, and those of plain containers in it, with their names."""
    for name, layer in container.named_children():
        if type(layer) is nn.Sequential:
            yield from _flat(f"{path}{name}.", layer)
        elif type(layer) is not nn.Identity:
            yield f"{path}{name}", layer


@register_notrace_module
class Stem(Layers):
    """A stem: convolutions, with the norm and the activation behind each where there are any, then padding and pooling.

    Stems of networks whose layers stand in no container of their own, and last convolutions, are read alike.
    """

    host = nn.Sequential

    def fused_form(self) -> forms.Stem:
        layers, units = [*_flat("", self)], []
        while layers and len(units) < 3 and type(layers[0][1]) in read.CONVS:
            normed = len(layers) > 1 and type(layers[1][1]) not in read.CONVS and read.has_parameters(layers[1][1])
            unit = read.conv_norm(*layers[0], *(layers[1] if normed else ("", None)))
            layers = layers[1 + normed :]
            if layers and unit.activation == "none" and read.is_activation(layers[0][1]):
                unit.activation, layers = read.activation(*layers[0]), layers[1:]
            units.append(unit)
        if not units:
            raise Refused("it does not begin with a plain convolution")
        for path, layer in layers:
            if read.has_parameters(layer):
                raise Refused(f"{path} is {modules.class_name(layer)}, which has no fused form here")
        return forms.Stem(*units, rest=tuple(layer for _, layer in layers))

    def __iter__(self) -> Iterator[nn.Module]:
        """The layers. For timm's `forward_intermediates`, which calls them one by one and has to give what `forward`
        gives, each convolution fused with the norm behind it, and nothing in the place of that norm.
        """
        layers = tuple(self._modules.items())
        whole = self.training or torch.compiler.is_compiling()
        if whole or sys._getframe(1).f_code is not _FORWARD_INTERMEDIATES:
            return iter([layer for _, layer in layers])
        known, pieces = self.__dict__.get(PIECES, (None, []))
        if known != layers:
            pieces = self._pieces(layers)
            self.__dict__[PIECES] = layers, pieces
        return iter(pieces)

    @staticmethod
    def _pieces(layers: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
        found: list[nn.Module] = []
        while layers:
            (_, layer), *behind = layers
            if type(layer) not in read.CONVS:
                found, layers = [*found, layer], behind
                continue
            normed = bool(behind) and type(behind[0][1]) not in read.CONVS and read.has_parameters(behind[0][1])
            piece = Stem.around(*layers[: 1 + normed])
            found, layers = [*found, piece, *[nn.Identity()] * normed], behind[normed:]
        return found


@register_notrace_module
class LastLayer(Layers):
    """A norm with its activation, or an activation, behind the last block, as a program has it: `act(norm(x))`."""

    host = nn.Sequential

    def fused_form(self) -> forms.LastLayer:
        ((name, layer),) = self.named_children()
        norm = type(layer) in read.NORM_ACTS
        unit = read.norm_act(name, layer) if norm else ActivationUnit(name, read.activation(name, layer))
        if isinstance(unit, HostNormUnit) or unit.activation not in native.ACTIVATION_CODES:
            raise Refused(f"{name} is a {type(layer).__name__}, which csrc/cpu has not")
        return forms.LastLayer(unit)


@register_notrace_module
class Pooled(Layers):
    """A global average and a classifier that stand in a network itself, with a 1x1 convolution between them or not."""

    host = nn.Sequential

    def fused_form(self) -> forms.Head:
        (pool_path, pool), *between, (path, classifier) = self.named_children()
        if type(classifier) not in (nn.Linear, Linear):
            raise Refused(f"{path} is {modules.class_name(classifier)}, not a linear layer")
        flat, hidden = read.check_means(pool_path, pool), None
        between = [(path, layer) for path, layer in between if type(layer) is not nn.Identity]
        if between and not flat:
            hidden, between = self._hidden(between)
        flat = flat or (bool(between) and read.flattens(*between.pop()))
        if between or not flat:
            raise Refused("its classifier does not read the means of every channel")
        return forms.Head(LinearUnit(path, classifier), hidden)

    @staticmethod
    def _hidden(layers: list[tuple[str, nn.Module]]) -> tuple[ConvUnit | None, list[tuple[str, nn.Module]]]:
        """The convolution of the means, with its norm and activation, and what stands behind it."""
        (path, conv), *rest = layers
        if not modules.is_linear(conv):
            return None, layers
        norm = rest.pop(0) if rest and read.has_parameters(rest[0][1]) else ("", None)
        unit = read.conv_norm(path, conv, *norm)
        if rest and unit.activation == "none" and read.is_activation(rest[0][1]):
            unit.activation = read.activation(*rest.pop(0))
        return unit, rest


@register_notrace_module
class ClassifierHead(Fused, TimmClassifierHead):
    """timm's `ClassifierHead`: global average pooling and a linear classifier. Constructor and state are timm's."""

    host = TimmClassifierHead
    trains = False

    def fused_form(self) -> forms.Head:
        read.check_inert("drop", self.drop)
        pooled_flat, ends_flat = (
            read.check_means("global_pool", self.global_pool),
            read.flattens("flatten", self.flatten),
        )
        if type(self.fc) is nn.Identity and (pooled_flat or ends_flat):
            return forms.Head()
        if not (type(self.fc) is nn.Linear and pooled_flat) and not (
            modules.is_linear(self.fc) and ends_flat and not pooled_flat
        ):
            raise Refused(f"fc is {modules.class_name(self.fc)}, not a plain linear layer or 1x1 convolution")
        return forms.Head(LinearUnit("fc", self.fc))

    def reset(self, *args, **kwargs):
        self._forget()
        super().reset(*args, **kwargs)

    def forward(self, x, pre_logits: bool = False):
        return TimmClassifierHead.forward(self, x, pre_logits) if pre_logits else Fused.forward(self, x)
