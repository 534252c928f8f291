"""The blocks of timm's byobnet.py: RepVGG, MobileOne, GENet, most RegNetZ, and the ResNets in its style.

Each class subclasses timm's own, keeps its state and its constructor, and reads itself as a form.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import byobnet, register_notrace_module
from torch import nn

from ...blocks import forms
from ...blocks.fused import Fused
from ...blocks.units import Branch, BranchesUnit, ConvUnit, GateUnit, JoinUnit, Refused
from . import layers


class _Residual(Fused):
    """What the blocks share: `ConvNormAct`s, a squeeze-excite before the last one or behind it, and a shortcut."""

    def _form(self, *paths: str) -> forms.Bottleneck:
        inner = layers.attention("attn", self.attn)
        behind = layers.attention("attn_last", self.attn_last)
        if inner is not None and behind is not None:
            raise Refused("it has a squeeze-excite before its last convolution and one behind it")
        act = layers.activation("act", self.act)
        join = None if behind is None else JoinUnit("act", act)
        *first, last = paths
        return forms.Bottleneck(
            *(layers.conv_norm_act(path, getattr(self, path)) for path in first),
            layers.conv_norm_act(last, getattr(self, last), after=act if join is None else "none"),
            squeeze_excite=inner or behind,
            **layers.shortcut("shortcut", self.shortcut, norm=True),
            drop_path=layers.drop_path(self.drop_path),
            join=join,
        )


@register_notrace_module
class BasicBlock(_Residual, byobnet.BasicBlock):
    """timm's byobnet `BasicBlock`. Constructor and state are timm's."""

    host = byobnet.BasicBlock

    def fused_form(self) -> forms.Bottleneck:
        return self._form("conv1_kxk", "conv2_kxk")


@register_notrace_module
class DarkBlock(_Residual, byobnet.DarkBlock):
    """timm's byobnet `DarkBlock`. Constructor and state are timm's."""

    host = byobnet.DarkBlock

    def fused_form(self) -> forms.Bottleneck:
        return self._form("conv1_1x1", "conv2_kxk")


@register_notrace_module
class EdgeBlock(_Residual, byobnet.EdgeBlock):
    """timm's byobnet `EdgeBlock`. Constructor and state are timm's."""

    host = byobnet.EdgeBlock

    def fused_form(self) -> forms.Bottleneck:
        return self._form("conv1_kxk", "conv2_1x1")


@register_notrace_module
class BottleneckBlock(_Residual, byobnet.BottleneckBlock):
    """timm's byobnet `BottleneckBlock` (most RegNetZ). Constructor and state are timm's."""

    host = byobnet.BottleneckBlock

    def fused_form(self) -> forms.Bottleneck:
        if type(self.conv2b_kxk) is not nn.Identity:
            raise Refused("conv2b_kxk has no fused form")
        return self._form("conv1_1x1", "conv2_kxk", "conv3_1x1")


class _Reparameterisable(Fused):
    """What RepVGG and MobileOne share: branches that are one convolution, and squeeze-excite behind their sum."""

    def _form(self, kxk: Sequence[tuple[str, nn.Module]], pointwise: tuple[str, nn.Module | None]) -> forms.RepVgg:
        squeeze_excite = layers.attention("attn", self.attn)
        activation = layers.activation("act", self.act)
        after = activation if squeeze_excite is None else "none"

        def form(unit: ConvUnit, casts_input: bool, drop_path: nn.Module | None) -> forms.RepVgg:
            gate = None if squeeze_excite is None else GateUnit("act", unit.conv, activation)
            return forms.RepVgg(unit, squeeze_excite, gate, casts_input=casts_input, drop_path=drop_path)

        if self.reparam_conv is not None:
            return form(layers.conv_norm("reparam_conv", self.reparam_conv, "", None, after), True, None)
        named = [*kxk, *([] if pointwise[1] is None else [pointwise])]
        first, *others = [layers.conv_norm_act(path, module) for path, module in named]
        normed = [first, *others] + ([] if self.identity is None else [layers.norm_act("identity", self.identity)])
        if any(getattr(unit, "norm", None) is None or unit.activation != "none" for unit in normed):
            raise Refused("its branches are not all BatchNorm without an activation")
        _check_geometry([first, *others])
        unit = BranchesUnit(
            named[0][0],
            first.conv,
            first.norm,
            activation=after,
            norm_path=first.norm_path,
            others=tuple(Branch(path, unit.conv, unit.norm) for (path, _), unit in zip(named[1:], others, strict=True)),
            identity=self.identity,
        )
        drop_path = None if self.identity is None else layers.drop_path(self.drop_path)
        return form(unit, self.identity is None, drop_path)


def _check_geometry(units: Sequence[ConvUnit]) -> None:
    """Refuse branches that do not read the same pixels around each of their own."""
    first = units[0].conv
    for unit in units:
        conv = unit.conv
        centred = tuple(conv.dilation[i] * (conv.kernel_size[i] // 2) for i in range(2))
        same = (conv.stride, conv.groups) == (first.stride, first.groups)
        spaced = conv.dilation == first.dilation or conv.kernel_size == (1, 1)
        if unit.standardize or conv.padding != centred or not same or not spaced:
            raise Refused("its branches do not have the same geometry")


@register_notrace_module
class RepVggBlock(_Reparameterisable, byobnet.RepVggBlock):
    """timm's `RepVggBlock`, in training form and reparameterised. Constructor and state are timm's."""

    host = byobnet.RepVggBlock

    def fused_form(self) -> forms.RepVgg:
        if self.reparam_conv is not None:
            return self._form((), ("", None))
        return self._form([("conv_kxk", self.conv_kxk)], ("conv_1x1", self.conv_1x1))


@register_notrace_module
class MobileOneBlock(_Reparameterisable, byobnet.MobileOneBlock):
    """timm's `MobileOneBlock`, in training form and reparameterised. Constructor and state are timm's."""

    host = byobnet.MobileOneBlock

    def fused_form(self) -> forms.RepVgg:
        if self.reparam_conv is not None:
            return self._form((), ("", None))
        if type(self.conv_kxk) is not nn.ModuleList or not len(self.conv_kxk):
            raise Refused("it has no branches of its kernel's size")
        kxk = [(f"conv_kxk.{i}", branch) for i, branch in enumerate(self.conv_kxk)]
        return self._form(kxk, ("conv_scale", self.conv_scale))


BLOCKS = (BasicBlock, DarkBlock, EdgeBlock, BottleneckBlock, RepVggBlock, MobileOneBlock)
