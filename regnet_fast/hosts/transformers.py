"""Hugging Face transformers: which of its classes is which block. `RegNetModel` and what is built on it."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2CLS
from transformers.models.regnet import modeling_regnet as regnet

from ..blocks import forms
from ..blocks.chain import Chain
from ..blocks.fused import Fused
from ..blocks.units import ConvUnit, Refused, SqueezeExciteUnit
from . import modules
from .modules import conv_norm, squeeze_excite

_ACTIVATIONS = {ACT2CLS["silu"]: "silu", ACT2CLS["linear"]: "none", ACT2CLS["gelu"]: "gelu"}


def _activation(path: str, module: nn.Module) -> str:
    return modules.activation(path, module, _ACTIVATIONS)


def _unit(path: str, module: nn.Module, after: str = "none") -> ConvUnit:
    """transformers' RegNetConvLayer or RegNetShortCut as a unit; `after` is the activation behind the layer's sum."""
    if type(module) not in (regnet.RegNetConvLayer, regnet.RegNetShortCut, RegNetConvLayer):
        raise Refused(f"{path} is {type(module).__name__}, not RegNetConvLayer or RegNetShortCut")
    dot = f"{path}." if path else ""
    if not isinstance(module, regnet.RegNetShortCut):
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


class _Layer(Fused):
    """What `RegNetXLayer` and `RegNetYLayer` have in common."""

    def fused_form(self) -> forms.Bottleneck:
        units = list(self.layer)
        excites = self.host is regnet.RegNetYLayer
        if len(units) != 3 + excites:
            raise Refused(f"layer has {len(units)} parts, not {3 + excites}")
        last = f"layer.{2 + excites}"
        identity = type(self.shortcut) is nn.Identity
        return forms.Bottleneck(
            _unit("layer.0", units[0]),
            _unit("layer.1", units[1]),
            _unit(last, units[-1], after=_activation("activation", self.activation)),
            _squeeze_excite("layer.2", units[2]) if excites else None,
            shortcut=None if identity else _unit("shortcut", self.shortcut),
            identity=identity,
        )


class RegNetXLayer(_Layer, regnet.RegNetXLayer):
    """transformers' `RegNetXLayer`. Constructor and state are transformers'."""

    host = regnet.RegNetXLayer


class RegNetYLayer(_Layer, regnet.RegNetYLayer):
    """transformers' `RegNetYLayer`. Constructor and state are transformers'."""

    host = regnet.RegNetYLayer


BLOCKS: dict[type[nn.Module], type[Fused]] = {cls.host: cls for cls in (RegNetConvLayer, RegNetXLayer, RegNetYLayer)}
"""transformers' class to ours, wherever it stands in a network."""

CHAINS: dict[type[nn.Module], type[Chain]] = {}
"""A stage of transformers is a plain Sequential, which timm's host knows."""
