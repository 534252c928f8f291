"""Hugging Face transformers: which of its classes is which block. `RegNetModel`, `ResNetModel` and what is built on
them.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2CLS
from transformers.models.regnet import modeling_regnet as regnet
from transformers.models.resnet import modeling_resnet as resnet

from ..blocks import forms
from ..blocks.chain import Chain
from ..blocks.fused import Fused
from ..blocks.units import ConvUnit, Refused, SqueezeExciteUnit
from . import modules
from .modules import conv_norm, squeeze_excite

_ACTIVATIONS = {ACT2CLS["silu"]: "silu", ACT2CLS["linear"]: "none", ACT2CLS["gelu"]: "gelu"}

_CONV_LAYERS = regnet.RegNetConvLayer, resnet.ResNetConvLayer
_SHORTCUTS = regnet.RegNetShortCut, resnet.ResNetShortCut


def _activation(path: str, module: nn.Module) -> str:
    return modules.activation(path, module, _ACTIVATIONS)


def _unit(path: str, module: nn.Module, after: str = "none") -> ConvUnit:
    """A ConvLayer or ShortCut of transformers as a unit; `after` is the activation behind the layer's sum."""
    if type(module) not in (*_CONV_LAYERS, *_SHORTCUTS, RegNetConvLayer, ResNetConvLayer):
        raise Refused(f"{path} is {type(module).__name__}, not {_CONV_LAYERS[0].__name__} or {_SHORTCUTS[0].__name__}")
    dot = f"{path}." if path else ""
    if type(module) not in _SHORTCUTS:
        own = _activation(f"{dot}activation", module.activation)
        if "none" not in (own, after):
            raise Refused(f"{path} has an activation of its own before the layer's sum")
        after = after if own == "none" else own
    return conv_norm(f"{dot}convolution", module.convolution, f"{dot}normalization", module.normalization, after)


def _squeeze_excite(path: str, module: nn.Module) -> SqueezeExciteUnit:
    if type(module) is not regnet.RegNetSELayer:
        raise Refused(f"{path} is {type(module).__name__}, not RegNetSELayer")
    if len(module.attention) != 4:
        raise Refused(f"{path}.attention is not two convolutions, an activation and a gate")
    fc1, act, fc2, gate = module.attention
    return squeeze_excite(path, fc1, fc2, gate, _activation(f"{path}.attention.1", act))


class RegNetConvLayer(Fused, regnet.RegNetConvLayer):
    """transformers' `RegNetConvLayer`: `act(norm(conv(x)))`, the stem. Constructor and state are transformers'."""

    host = regnet.RegNetConvLayer

    def fused_form(self) -> forms.Single:
        return forms.Single(_unit("", self))


class ResNetConvLayer(Fused, resnet.ResNetConvLayer):
    """transformers' `ResNetConvLayer`: `act(norm(conv(x)))`, the stem. Constructor and state are transformers'."""

    host = resnet.ResNetConvLayer

    def fused_form(self) -> forms.Single:
        return forms.Single(_unit("", self))


class _Layer(Fused):
    """What the layers have in common: two or three convolutions, with a squeeze-excite before the last in RegNetY."""

    def fused_form(self) -> forms.Bottleneck:
        parts = [(f"layer.{i}", part) for i, part in enumerate(self.layer)]
        excites = self.host is regnet.RegNetYLayer
        wanted = 2 if self.host is resnet.ResNetBasicLayer else 3
        if len(parts) != wanted + excites:
            raise Refused(f"layer has {len(parts)} parts, not {wanted + excites}")
        squeeze_excite = _squeeze_excite(*parts.pop(-2)) if excites else None
        *first, last = parts
        identity = type(self.shortcut) is nn.Identity
        return forms.Bottleneck(
            *(_unit(path, part) for path, part in first),
            _unit(*last, after=_activation("activation", self.activation)),
            squeeze_excite=squeeze_excite,
            shortcut=None if identity else _unit("shortcut", self.shortcut),
            identity=identity,
        )


class RegNetXLayer(_Layer, regnet.RegNetXLayer):
    """transformers' `RegNetXLayer`. Constructor and state are transformers'."""

    host = regnet.RegNetXLayer


class RegNetYLayer(_Layer, regnet.RegNetYLayer):
    """transformers' `RegNetYLayer`. Constructor and state are transformers'."""

    host = regnet.RegNetYLayer


class ResNetBasicLayer(_Layer, resnet.ResNetBasicLayer):
    """transformers' `ResNetBasicLayer`. Constructor and state are transformers'."""

    host = resnet.ResNetBasicLayer


class ResNetBottleNeckLayer(_Layer, resnet.ResNetBottleNeckLayer):
    """transformers' `ResNetBottleNeckLayer`. Constructor and state are transformers'."""

    host = resnet.ResNetBottleNeckLayer


BLOCKS: dict[type[nn.Module], type[Fused]] = {
    cls.host: cls
    for cls in (
        *(RegNetConvLayer, RegNetXLayer, RegNetYLayer),
        *(ResNetConvLayer, ResNetBasicLayer, ResNetBottleNeckLayer),
    )
}
"""transformers' class to ours, wherever it stands in a network."""

CHAINS: dict[type[nn.Module], type[Chain]] = {}
"""A stage of transformers is a plain Sequential, which timm's host knows."""
