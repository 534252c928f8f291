"""The blocks of timm's RegNets and ResNetV2.

Each class subclasses timm's own, keeps its state and its constructor, and reads itself as a form. Nothing is decided
at construction: a block is read again whenever a module, a setting or a hook below it changes.
"""

from __future__ import annotations

from timm.models import register_notrace_module, regnet, resnetv2
from torch import nn

from ...blocks import forms
from ...blocks.fused import Fused
from ...blocks.units import NormActUnit
from . import layers


@register_notrace_module
class Bottleneck(Fused, regnet.Bottleneck):
    """timm's RegNet `Bottleneck` (RegNetX, RegNetY and the RegNetZ of regnet.py). Constructor and state are timm's."""

    host = regnet.Bottleneck

    def fused_form(self) -> forms.Bottleneck:
        return forms.Bottleneck(
            layers.conv_norm_act("conv1", self.conv1),
            layers.conv_norm_act("conv2", self.conv2),
            layers.conv_norm_act("conv3", self.conv3, after=layers.activation("act3", self.act3)),
            layers.squeeze_excite("se", self.se),
            **layers.shortcut("downsample", self.downsample, norm=True),
            drop_path=None if self.downsample is None else layers.drop_path(self.drop_path),
        )


@register_notrace_module
class PreBottleneck(Fused, regnet.PreBottleneck):
    """timm's RegNetV `PreBottleneck`. Constructor and state are timm's."""

    host = regnet.PreBottleneck

    def fused_form(self) -> forms.PreAct:
        squeeze_excite = layers.squeeze_excite("se", self.se)
        norm1 = layers.norm_act("norm1", self.norm1)
        return forms.PreAct(
            norm1,
            layers.conv_norm("conv1", self.conv1, "norm2", self.norm2),
            layers.conv_norm("conv2", self.conv2, "norm3", self.norm3 if squeeze_excite is None else None),
            layers.conv_norm("conv3", self.conv3, "", None),
            norm3=None if squeeze_excite is None else layers.norm_act("norm3", self.norm3),
            squeeze_excite=squeeze_excite,
            identity_after_norm=True,
            owns_norm=isinstance(norm1, NormActUnit),
            **layers.shortcut("downsample", self.downsample, norm=False),
            drop_path=None if self.downsample is None else layers.drop_path(self.drop_path),
        )


@register_notrace_module
class PreActBottleneck(Fused, resnetv2.PreActBottleneck):
    """timm's ResNetV2 `PreActBottleneck`. Constructor and state are timm's."""

    host = resnetv2.PreActBottleneck

    def fused_form(self) -> forms.PreAct:
        return forms.PreAct(
            layers.norm_act("norm1", self.norm1),
            layers.conv_norm("conv1", self.conv1, "norm2", self.norm2),
            layers.conv_norm("conv2", self.conv2, "norm3", self.norm3),
            layers.conv_norm("conv3", self.conv3, "", None),
            **_raw_shortcut(self.downsample),
            drop_path=layers.drop_path(self.drop_path),
        )


@register_notrace_module
class PreActBasic(Fused, resnetv2.PreActBasic):
    """timm's ResNetV2 `PreActBasic`. Constructor and state are timm's."""

    host = resnetv2.PreActBasic

    def fused_form(self) -> forms.PreAct:
        return forms.PreAct(
            layers.norm_act("norm1", self.norm1),
            layers.conv_norm("conv1", self.conv1, "norm2", self.norm2),
            layers.conv_norm("conv2", self.conv2, "", None),
            **_raw_shortcut(self.downsample),
            drop_path=layers.drop_path(self.drop_path),
        )


def _raw_shortcut(module: nn.Module | None) -> dict:
    """ResNetV2's shortcut: without a downsample module the raw input is added."""
    return {"identity": True} if module is None else layers.shortcut("downsample", module, norm=False)


BLOCKS = (Bottleneck, PreBottleneck, PreActBottleneck, PreActBasic)
