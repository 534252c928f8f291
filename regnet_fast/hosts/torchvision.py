"""torchvision: which of its classes is which block.

RegNet, ResNet, ResNeXt, Wide ResNet, MobileNetV2 and V3, and EfficientNet, as torchvision builds them.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import efficientnet, mobilenetv2, mobilenetv3, regnet, resnet
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import Conv2dNormActivation as HostConvNorm
from torchvision.ops.misc import SqueezeExcitation

from ..blocks import forms
from ..blocks.chain import Chain
from ..blocks.fused import Fused
from ..blocks.units import ConvUnit, JoinUnit, Refused, SqueezeExciteUnit
from .modules import ACTIVATIONS, activation, conv_norm, squeeze_excite


def _unit(path: str, module: nn.Module, after: str = "none") -> ConvUnit:
    """torchvision's Conv2dNormActivation as a unit: a Sequential of a convolution, a norm and an activation.

    `after` is the activation behind the block's sum.
    """
    if type(module) not in (HostConvNorm, Conv2dNormActivation, regnet.SimpleStemIN, SimpleStemIN):
        raise Refused(f"{path} is {type(module).__name__}, not Conv2dNormActivation")
    layers = list(module)
    norm = layers[1] if len(layers) > 1 and type(layers[1]) not in ACTIVATIONS else None
    acts = layers[1 if norm is None else 2 :]
    if len(acts) > 1 or not layers:
        raise Refused(f"{path or 'it'} is not a convolution, a norm and at most an activation")
    dot = f"{path}." if path else ""
    if acts:
        if after != "none":
            raise Refused(f"{path} has an activation of its own before the block's sum")
        after = activation(f"{dot}{len(layers) - 1}", acts[0])
    return conv_norm(f"{dot}0", layers[0], f"{dot}1", norm, after)


def _squeeze_excite(path: str, module: nn.Module) -> SqueezeExciteUnit:
    if type(module) is not SqueezeExcitation:
        raise Refused(f"{path} is {type(module).__name__}, not SqueezeExcitation")
    act = activation(f"{path}.activation", module.activation)
    return squeeze_excite(path, module.fc1, module.fc2, module.scale_activation, act)


class SimpleStemIN(Fused, regnet.SimpleStemIN):
    """torchvision's `SimpleStemIN`: `act(norm(conv(x)))`. Constructor and state are torchvision's."""

    host = regnet.SimpleStemIN

    def fused_form(self) -> forms.Single:
        return forms.Single(_unit("", self))


class ResBottleneckBlock(Fused, regnet.ResBottleneckBlock):
    """torchvision's `ResBottleneckBlock`, with and without SE. Constructor and state are torchvision's."""

    host = regnet.ResBottleneckBlock

    def fused_form(self) -> forms.Bottleneck:
        if type(self.f) is not regnet.BottleneckTransform:
            raise Refused(f"f is {type(self.f).__name__}, not BottleneckTransform")
        names = [name for name, _ in self.f.named_children()]
        if names not in (["a", "b", "c"], ["a", "b", "se", "c"]):
            raise Refused(f"f has the layers {', '.join(names)}, not a, b, [se,] c")
        return forms.Bottleneck(
            _unit("f.a", self.f.a),
            _unit("f.b", self.f.b),
            _unit("f.c", self.f.c, after=activation("activation", self.activation)),
            _squeeze_excite("f.se", self.f.se) if "se" in names else None,
            shortcut=None if self.proj is None else _unit("proj", self.proj),
            identity=self.proj is None,
        )


class Conv2dNormActivation(Fused, HostConvNorm):
    """torchvision's `Conv2dNormActivation`: `act(norm(conv(x)))`. Constructor and state are torchvision's."""

    host = HostConvNorm

    def fused_form(self) -> forms.Single:
        return forms.Single(_unit("", self))


class _Numbered(Fused):
    """What both blocks of a ResNet share: convolutions by number, each with its norm, one activation, a shortcut."""

    def _form(self, count: int) -> forms.Bottleneck:
        act = activation("relu", self.relu)
        units = [
            conv_norm(f"conv{i}", getattr(self, f"conv{i}"), f"bn{i}", getattr(self, f"bn{i}"), act)
            for i in range(1, count + 1)
        ]
        if self.downsample is None:
            return forms.Bottleneck(*units, identity=True)
        if type(self.downsample) is not nn.Sequential or len(self.downsample) != 2:
            raise Refused(f"downsample is {type(self.downsample).__name__}, not a convolution and a norm")
        shortcut = conv_norm("downsample.0", self.downsample[0], "downsample.1", self.downsample[1], "none")
        return forms.Bottleneck(*units, shortcut=shortcut)


class BasicBlock(_Numbered, resnet.BasicBlock):
    """torchvision's ResNet `BasicBlock`. Constructor and state are torchvision's."""

    host = resnet.BasicBlock

    def fused_form(self) -> forms.Bottleneck:
        return self._form(2)


class Bottleneck(_Numbered, resnet.Bottleneck):
    """torchvision's ResNet `Bottleneck`. Constructor and state are torchvision's."""

    host = resnet.Bottleneck

    def fused_form(self) -> forms.Bottleneck:
        return self._form(3)


class _Inverted(Fused):
    """What the blocks of MobileNets and EfficientNets share: layers in one container, to which the input is added."""

    def _form(self, path: str) -> forms.Bottleneck | forms.Single:
        layers = list(getattr(self, path).named_children())
        units: list[ConvUnit] = []
        gate, gates = None, 0
        while layers:
            (name, layer), *layers = layers
            own = f"{path}.{name}"
            if isinstance(layer, SqueezeExcitation):
                gate, gates = _squeeze_excite(own, layer), len(units)
            elif type(layer) is nn.Conv2d and layers:
                (name, norm), *layers = layers
                units.append(conv_norm(own, layer, f"{path}.{name}", norm, "none"))
            else:
                units.append(_unit(own, layer))
        added = self.use_res_connect
        if gate is not None and gates != len(units) - 1:
            raise Refused("its squeeze-excite is not before the last convolution")
        depth = getattr(self, "stochastic_depth", None) if added else None
        if depth is not None and (type(depth) is not StochasticDepth or depth.mode != "row"):
            raise Refused(f"stochastic_depth is {depth}, not one of whole images")
        if len(units) == 1 and gate is None:
            return forms.Single(units[0], JoinUnit("", "none") if added else None, depth)
        if len(units) not in (2, 3):
            raise Refused(f"{path} has {len(units)} convolutions")
        if added and units[-1].activation != "none":
            raise Refused("its input is added behind an activation")
        return forms.Bottleneck(*units, squeeze_excite=gate, identity=added, drop_path=depth)


class MobileNetV2InvertedResidual(_Inverted, mobilenetv2.InvertedResidual):
    """torchvision's `InvertedResidual` of MobileNetV2. Constructor and state are torchvision's."""

    host = mobilenetv2.InvertedResidual

    def fused_form(self) -> forms.Bottleneck:
        return self._form("conv")


class InvertedResidual(_Inverted, mobilenetv3.InvertedResidual):
    """torchvision's `InvertedResidual` of MobileNetV3. Constructor and state are torchvision's."""

    host = mobilenetv3.InvertedResidual

    def fused_form(self) -> forms.Bottleneck:
        return self._form("block")


class MBConv(_Inverted, efficientnet.MBConv):
    """torchvision's `MBConv`. Constructor and state are torchvision's."""

    host = efficientnet.MBConv

    def fused_form(self) -> forms.Bottleneck:
        return self._form("block")


class FusedMBConv(_Inverted, efficientnet.FusedMBConv):
    """torchvision's `FusedMBConv`. Constructor and state are torchvision's."""

    host = efficientnet.FusedMBConv

    def fused_form(self) -> forms.Bottleneck | forms.Single:
        return self._form("block")


class AnyStage(Chain, regnet.AnyStage):
    """A stage of a RegNet."""

    host = regnet.AnyStage


BLOCKS: dict[type[nn.Module], type[Fused]] = {
    cls.host: cls
    for cls in (
        *(SimpleStemIN, ResBottleneckBlock, Conv2dNormActivation, BasicBlock, Bottleneck),
        *(MobileNetV2InvertedResidual, InvertedResidual, MBConv, FusedMBConv),
    )
}
"""torchvision's class to ours, wherever it stands in a network."""

CHAINS: dict[type[nn.Module], type[Chain]] = {AnyStage.host: AnyStage}
"""torchvision's container to ours, where the blocks in it were rebuilt."""
