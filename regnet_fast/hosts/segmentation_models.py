"""segmentation_models_pytorch: the blocks of its own encoders, SE-ResNet, SE-ResNeXt, SENet and EfficientNet.

Its other encoders are built of timm's and torchvision's blocks.
"""

from __future__ import annotations

from segmentation_models_pytorch.encoders import _efficientnet as efficientnet
from segmentation_models_pytorch.encoders import _senet as senet
from torch import Tensor, nn

from ..blocks import forms
from ..blocks.chain import Chain
from ..blocks.fused import Fused
from ..blocks.units import BorderedConvUnit, ConvUnit, JoinUnit, Refused, SqueezeExciteUnit
from . import modules
from .modules import activation, class_name, conv_norm


class _SqueezeExcited(Fused):
    """What the blocks of a SENet share: three convolutions, then squeeze-excite, shortcut and activation."""

    def fused_form(self) -> forms.Bottleneck:
        act, excite = activation("relu", self.relu), self.se_module
        if type(excite) is not senet.SEModule or type(excite.avg_pool) is not nn.AdaptiveAvgPool2d:
            raise Refused(f"se_module is {class_name(excite)}, not SEModule")
        units = [
            conv_norm(f"conv{i}", getattr(self, f"conv{i}"), f"bn{i}", getattr(self, f"bn{i}"), after)
            for i, after in enumerate((act, act, "none"), 1)
        ]
        shortcut = None
        if self.downsample is not None:
            if type(self.downsample) is not nn.Sequential or len(self.downsample) != 2:
                raise Refused(f"downsample is {class_name(self.downsample)}, not a convolution and a norm")
            shortcut = conv_norm("downsample.0", self.downsample[0], "downsample.1", self.downsample[1], "none")
        between = activation("se_module.relu", excite.relu)
        return forms.Bottleneck(
            *units,
            modules.squeeze_excite("se_module", excite.fc1, excite.fc2, excite.sigmoid, between),
            shortcut=shortcut,
            identity=shortcut is None,
            join=JoinUnit("relu", act),
        )


class SEBottleneck(_SqueezeExcited, senet.SEBottleneck):
    """The block of a SENet. Constructor and state are the host's."""

    host = senet.SEBottleneck


class SEResNetBottleneck(_SqueezeExcited, senet.SEResNetBottleneck):
    """The block of an SE-ResNet. Constructor and state are the host's."""

    host = senet.SEResNetBottleneck


class SEResNeXtBottleneck(_SqueezeExcited, senet.SEResNeXtBottleneck):
    """The block of an SE-ResNeXt. Constructor and state are the host's."""

    host = senet.SEResNeXtBottleneck


class MBConvBlock(Fused, efficientnet.MBConvBlock):
    """The block of an EfficientNet, whose convolutions have borders by the size that it was built for. Constructor and
    state are the host's. In training mode it runs the host's own forward.
    """

    host = efficientnet.MBConvBlock
    trains = False

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        if self.training:
            return self.host.forward(self, inputs, drop_connect_rate)
        return super().forward(inputs)

    def fused_form(self) -> forms.Bottleneck:
        act, squeeze_excite = activation("_swish", self._swish), None
        units = [self._unit("_depthwise_conv", "_bn1", act), self._unit("_project_conv", "_bn2", "none")]
        if self._has_expansion:
            units.insert(0, self._unit("_expand_conv", "_bn0", act))
        if self._has_se:
            fc1, fc2 = self._unit("_se_reduce", None, "none"), self._unit("_se_expand", None, "none")
            for unit in (fc1, fc2):
                if isinstance(unit, BorderedConvUnit) or unit.conv.kernel_size != (1, 1) or unit.conv.bias is None:
                    raise Refused(f"{unit.path} is not a plain 1x1 convolution with bias")
            squeeze_excite = SqueezeExciteUnit("_se", fc1.conv, fc2.conv, act)
        return forms.Bottleneck(*units, squeeze_excite=squeeze_excite, identity=self._has_drop_connect)

    def _unit(self, path: str, norm_path: str | None, act: str) -> ConvUnit:
        conv, norm = getattr(self, path), getattr(self, norm_path) if norm_path else None
        modules.check_conv(path, conv, (nn.Conv2d, efficientnet.Conv2dStaticSamePadding))
        if norm is not None and not modules.folds(norm):
            raise Refused(f"{norm_path} is {class_name(norm)}, which has no fused form")
        facts = {"norm": norm, "activation": act, "norm_path": norm_path or ""}
        border = getattr(conv, "static_padding", None)
        if border is None or type(border) is nn.Identity:
            return ConvUnit(path, conv, **facts)
        if type(border) is not nn.ZeroPad2d:
            raise Refused(f"{path} has a border by {class_name(border)}")
        left, right, top, bottom = border.padding
        return BorderedConvUnit(path, conv, border=((top, bottom), (left, right)), **facts)


BLOCKS: dict[type[nn.Module], type[Fused]] = {
    cls.host: cls for cls in (SEBottleneck, SEResNetBottleneck, SEResNeXtBottleneck, MBConvBlock)
}
"""The host's class to ours, wherever it stands in a network."""

CHAINS: dict[type[nn.Module], type[Chain]] = {}
"""Its stages are plain Sequentials, which timm's host knows."""
