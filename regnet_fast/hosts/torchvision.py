"""torchvision: which of its classes is which block. `regnet_x_*` and `regnet_y_*`, as torchvision builds them."""

from __future__ import annotations

from torch import nn
from torchvision.models import regnet
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from ..blocks import forms
from ..blocks.chain import Chain
from ..blocks.fused import Fused
from ..blocks.units import ConvUnit, Refused, SqueezeExciteUnit
from .modules import activation, conv_norm, squeeze_excite


def _unit(path: str, module: nn.Module, after: str = "none") -> ConvUnit:
    """torchvision's Conv2dNormActivation as a unit: a Sequential of a convolution, a norm and an activation.

    `after` is the activation behind the block's sum.
    """
    if type(module) not in (Conv2dNormActivation, regnet.SimpleStemIN, SimpleStemIN):
        raise Refused(f"{path} is {type(module).__name__}, not Conv2dNormActivation")
    layers = list(module)
    if len(layers) not in (2, 3):
        raise Refused(f"{path or 'it'} is not a convolution, a norm and at most an activation")
    dot = f"{path}." if path else ""
    if len(layers) == 3:
        if after != "none":
            raise Refused(f"{path} has an activation of its own before the block's sum")
        after = activation(f"{dot}2", layers[2])
    return conv_norm(f"{dot}0", layers[0], f"{dot}1", layers[1], after)


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


class AnyStage(Chain, regnet.AnyStage):
    """A stage of a RegNet."""

    host = regnet.AnyStage


BLOCKS: dict[type[nn.Module], type[Fused]] = {cls.host: cls for cls in (SimpleStemIN, ResBottleneckBlock)}
"""torchvision's class to ours, wherever it stands in a network."""

CHAINS: dict[type[nn.Module], type[Chain]] = {AnyStage.host: AnyStage}
"""torchvision's container to ours, where the blocks in it were rebuilt."""
