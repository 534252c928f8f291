"""The blocks of timm's RegNets, RepVGG and ResNetV2.

Each class subclasses timm's own, keeps its state and its constructor, and reads itself as a form. Nothing is decided
at construction: a block is read again whenever a module, a setting or a hook below it changes.
"""

from __future__ import annotations

from timm.models import byobnet, register_notrace_module, regnet, resnetv2
from torch import nn

from ...blocks import forms
from ...blocks.fused import Fused
from ...blocks.units import ConvUnit, GateUnit, HostNormUnit, NormActUnit, Refused, RepVggUnit
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
class BottleneckBlock(Fused, byobnet.BottleneckBlock):
    """timm's byobnet `BottleneckBlock` (most RegNetZ). Constructor and state are timm's."""

    host = byobnet.BottleneckBlock

    def fused_form(self) -> forms.Bottleneck:
        for path in ("conv2b_kxk", "attn_last"):
            if type(getattr(self, path)) is not nn.Identity:
                raise Refused(f"{path} has no fused form")
        return forms.Bottleneck(
            layers.conv_norm_act("conv1_1x1", self.conv1_1x1),
            layers.conv_norm_act("conv2_kxk", self.conv2_kxk),
            layers.conv_norm_act("conv3_1x1", self.conv3_1x1, after=layers.activation("act", self.act)),
            layers.squeeze_excite("attn", self.attn),
            **layers.shortcut("shortcut", self.shortcut, norm=True),
            drop_path=layers.drop_path(self.drop_path),
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


@register_notrace_module
class RepVggBlock(Fused, byobnet.RepVggBlock):
    """timm's `RepVggBlock`, in training form and reparameterised. Constructor and state are timm's."""

    host = byobnet.RepVggBlock

    def fused_form(self) -> forms.RepVgg:
        squeeze_excite = layers.squeeze_excite("attn", self.attn)
        activation = layers.activation("act", self.act)
        after = activation if squeeze_excite is None else "none"

        def form(unit: ConvUnit, casts_input: bool) -> forms.RepVgg:
            gate = None if squeeze_excite is None else GateUnit("act", unit.conv, activation)
            branches = self.reparam_conv is None  # a deployed block has lost them
            drop_path = layers.drop_path(self.drop_path) if branches and self.identity is not None else None
            return forms.RepVgg(unit, squeeze_excite, gate, casts_input=casts_input, drop_path=drop_path)

        if self.reparam_conv is not None:
            return form(layers.conv_norm("reparam_conv", self.reparam_conv, "", None, after), True)
        kxk = layers.conv_norm_act("conv_kxk", self.conv_kxk)
        pointwise = layers.conv_norm_act("conv_1x1", self.conv_1x1)
        folded = (
            [kxk, pointwise] if self.identity is None else [kxk, pointwise, layers.norm_act("identity", self.identity)]
        )
        if any(unit.norm is None or unit.activation != "none" or isinstance(unit, HostNormUnit) for unit in folded):
            raise Refused("its branches are not all BatchNorm without an activation")
        padding = tuple(self.conv_kxk.conv.dilation[i] * (self.conv_kxk.conv.kernel_size[i] // 2) for i in range(2))
        if (
            kxk.standardize
            or pointwise.standardize
            or pointwise.conv.padding != (0, 0)
            or kxk.conv.padding != padding
            or pointwise.conv.stride != kxk.conv.stride
            or pointwise.conv.groups != kxk.conv.groups
        ):
            raise Refused("its branches do not have the same geometry")
        unit = RepVggUnit(
            "conv_kxk",
            self.conv_kxk.conv,
            self.conv_kxk.bn,
            activation=after,
            norm_path="conv_kxk.bn",
            pointwise=self.conv_1x1.conv,
            pointwise_norm=self.conv_1x1.bn,
            identity=self.identity,
        )
        return form(unit, self.identity is None)
