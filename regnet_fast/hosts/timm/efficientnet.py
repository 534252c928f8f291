"""The blocks of timm's EfficientNets, MobileNets and the networks that are built of them (`_efficientnet_blocks.py`).

Each class subclasses timm's own, keeps its state and its constructor, and reads itself as a form.
"""

from __future__ import annotations

from timm.models import _efficientnet_blocks as blocks
from timm.models import register_notrace_module
from torch import nn

from ...blocks import forms
from ...blocks.fused import Fused
from ...blocks.units import ConvUnit, JoinUnit, Refused, SqueezeExciteUnit
from .. import modules
from . import layers


class _Skipping(Fused):
    """What the blocks share: each convolution has its norm and activation, and the input may be added to the last."""

    def _unit(self, conv: str, norm: str) -> ConvUnit:
        return layers.conv_norm(conv, getattr(self, conv), norm, getattr(self, norm))

    def _without(self, *paths: str) -> None:
        """Refuse layers that a form has no place for."""
        for path in paths:
            module = getattr(self, path)
            if module is not None and type(module) is not nn.Identity:
                raise Refused(f"{path} is {modules.class_name(module)}, which has no fused form")

    def _sum(self, *units: ConvUnit, before: ConvUnit | None = None) -> forms.Bottleneck:
        join = JoinUnit("", "none") if self.has_skip and units[-1].activation != "none" else None
        squeeze_excite = squeeze_excite_unit("se", self.se)
        if join is not None and squeeze_excite is not None:
            raise Refused("its last convolution has an activation before the block's sum, and a gate before it")
        return forms.Bottleneck(
            *units,
            squeeze_excite=squeeze_excite,
            identity=self.has_skip,
            drop_path=layers.drop_path(self.drop_path),
            join=join,
            before=before,
        )


def squeeze_excite_unit(path: str, module: nn.Module) -> SqueezeExciteUnit | None:
    """Either of timm's squeeze-excites as a unit, None where there is none."""
    if type(module) is not blocks.SqueezeExcite:
        return layers.squeeze_excite(path, module)
    modules.check_excite(path, module.conv_reduce, module.conv_expand)
    acts = layers.activation(f"{path}.act1", module.act1), layers.activation(f"{path}.gate", module.gate)
    return SqueezeExciteUnit(path, module.conv_reduce, module.conv_expand, *acts)


@register_notrace_module
class ConvBnAct(_Skipping, blocks.ConvBnAct):
    """timm's `ConvBnAct`: `act(norm(conv(x)))`. Constructor and state are timm's."""

    host = blocks.ConvBnAct

    def fused_form(self) -> forms.Single:
        self._without("aa")
        join = JoinUnit("", "none") if self.has_skip else None
        return forms.Single(self._unit("conv", "bn1"), join, layers.drop_path(self.drop_path))


@register_notrace_module
class DepthwiseSeparableConv(_Skipping, blocks.DepthwiseSeparableConv):
    """timm's `DepthwiseSeparableConv`. Constructor and state are timm's."""

    host = blocks.DepthwiseSeparableConv

    def fused_form(self) -> forms.Bottleneck:
        self._without("conv_s2d", "aa")
        return self._sum(self._unit("conv_dw", "bn1"), self._unit("conv_pw", "bn2"))


@register_notrace_module
class InvertedResidual(_Skipping, blocks.InvertedResidual):
    """timm's `InvertedResidual`, the MBConv of EfficientNet. Constructor and state are timm's."""

    host = blocks.InvertedResidual

    def fused_form(self) -> forms.Bottleneck:
        self._without("conv_s2d", "aa")
        units = (self._unit(f"conv_{name}", f"bn{i}") for i, name in enumerate(("pw", "dw", "pwl"), 1))
        return self._sum(*units)


@register_notrace_module
class EdgeResidual(_Skipping, blocks.EdgeResidual):
    """timm's `EdgeResidual`, the FusedMBConv of EfficientNetV2. Constructor and state are timm's."""

    host = blocks.EdgeResidual

    def fused_form(self) -> forms.Bottleneck:
        self._without("aa")
        return self._sum(self._unit("conv_exp", "bn1"), self._unit("conv_pwl", "bn2"))


@register_notrace_module
class UniversalInvertedResidual(_Skipping, blocks.UniversalInvertedResidual):
    """timm's `UniversalInvertedResidual` of MobileNetV4. Constructor and state are timm's."""

    host = blocks.UniversalInvertedResidual

    def fused_form(self) -> forms.Bottleneck:
        self._without("dw_end", "layer_scale")
        start, *units = (
            layers.conv_norm_act(path, module) if type(module) is not nn.Identity else None
            for path, module in ((path, getattr(self, path)) for path in ("dw_start", "pw_exp", "dw_mid", "pw_proj"))
        )
        return self._sum(*(unit for unit in units if unit is not None), before=start)


BLOCKS = (ConvBnAct, DepthwiseSeparableConv, InvertedResidual, EdgeResidual, UniversalInvertedResidual)
