"""The blocks of timm's resnet.py: ResNet, ResNeXt, Wide ResNet and those with squeeze-excite; HRNet is made of them.

Each class subclasses timm's own, keeps its state and its constructor, and reads itself as a form.
"""

from __future__ import annotations

from timm.layers import BlurPool2d
from timm.models import register_notrace_module, resnet
from torch import nn

from ...blocks import forms
from ...blocks.fused import Fused
from ...blocks.units import JoinUnit, Refused
from .. import modules
from . import layers

_BLURS = (nn.Identity, nn.AvgPool2d, BlurPool2d)


class _Residual(Fused):
    """What both blocks share: convolutions by number, each with its norm, then squeeze-excite, shortcut, activation."""

    def _form(self, count: int) -> forms.Bottleneck:
        layers.check_inert("drop_block", self.drop_block)
        if type(self.aa) not in _BLURS:
            raise Refused(f"aa is {modules.class_name(self.aa)}, which has no fused form")
        squeeze_excite = None if self.se is None else layers.attention("se", self.se)
        acts = [layers.activation(f"act{i}", getattr(self, f"act{i}")) for i in range(1, count + 1)]
        join = None if squeeze_excite is None else JoinUnit(f"act{count}", acts.pop())
        units = [
            layers.conv_norm(f"conv{i}", getattr(self, f"conv{i}"), f"bn{i}", getattr(self, f"bn{i}"), act)
            for i, act in enumerate([*acts, "none"][:count], 1)
        ]
        return forms.Bottleneck(
            *units,
            squeeze_excite=squeeze_excite,
            **_downsample(self.downsample),
            drop_path=layers.drop_path(self.drop_path),
            join=join,
            blur=None if type(self.aa) is nn.Identity else self.aa,
        )


def _downsample(module: nn.Module | None) -> dict:
    """The fields `shortcut`, `pool` and `identity` of a form: a convolution and a norm, behind a pooling or not."""
    if module is None:
        return {"identity": True}
    if type(module) is not nn.Sequential or len(module) not in (2, 3):
        raise Refused(f"downsample is {type(module).__name__}, not a convolution and a norm")
    *pools, (conv_path, conv), (norm_path, norm) = module.named_children()
    pool = pools[0][1] if pools and type(pools[0][1]) is not nn.Identity else None
    unit = layers.conv_norm(f"downsample.{conv_path}", conv, f"downsample.{norm_path}", norm)
    return {"shortcut": unit, "pool": pool, "identity": False}


@register_notrace_module
class BasicBlock(_Residual, resnet.BasicBlock):
    """timm's ResNet `BasicBlock`. Constructor and state are timm's."""

    host = resnet.BasicBlock

    def fused_form(self) -> forms.Bottleneck:
        return self._form(2)


@register_notrace_module
class Bottleneck(_Residual, resnet.Bottleneck):
    """timm's ResNet `Bottleneck`. Constructor and state are timm's."""

    host = resnet.Bottleneck

    def fused_form(self) -> forms.Bottleneck:
        return self._form(3)


BLOCKS = (BasicBlock, Bottleneck)
