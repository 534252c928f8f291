"""timm's containers of blocks and whole networks."""

from __future__ import annotations

from collections.abc import Iterator

from timm.models import byobnet, efficientnet, mobilenetv3, regnet, resnet, resnetv2
from torch import Tensor, nn

from ...blocks.chain import Chain
from ...blocks.network import Network
from ...blocks.watch import only_forwards
from .parts import LastLayer, Pooled, Stem


class RegStage(Chain, regnet.RegStage):
    """A stage of a RegNet."""

    host = regnet.RegStage

    def forward(self, x: Tensor) -> Tensor:
        return regnet.RegStage.forward(self, x) if self.grad_checkpointing else Chain.forward(self, x)


class Sequential(Chain, nn.Sequential):
    """A stage of a ByobNet, the blocks of a stage of ResNetV2 and of a stage of transformers' RegNet."""

    host = nn.Sequential


CHAINS: dict[type[nn.Module], type[Chain]] = {cls.host: cls for cls in (RegStage, Sequential)}
"""timm's container to ours, where the blocks in it were rebuilt."""


def _there(*modules: nn.Module) -> Iterator[nn.Module]:
    """All but those that do nothing."""
    return (module for module in modules if type(module) is not nn.Identity or not only_forwards(module))


def _in(container: nn.Module) -> Iterator[nn.Module]:
    """What a plain Sequential calls; of any other container, itself."""
    plain = type(container) is nn.Sequential and only_forwards(container)
    return iter(container) if plain else iter([container])


class RegNet(Network, regnet.RegNet):
    """A whole RegNet."""

    host = regnet.RegNet
    loose = ((("stem",), Stem), (("final_conv",), LastLayer))  # of a RegNetV

    def in_order(self) -> Iterator[nn.Module]:
        return _there(self.stem, self.s1, self.s2, self.s3, self.s4, self.final_conv, self.head)


class ByobNet(Network, byobnet.ByobNet):
    """A whole RepVGG, or RegNetZ of byobnet."""

    host = byobnet.ByobNet

    def in_order(self) -> Iterator[nn.Module]:
        return _there(self.stem, *_in(self.stages), self.final_conv, self.head)


class ResNetV2(Network, resnetv2.ResNetV2):
    """A whole ResNetV2."""

    host = resnetv2.ResNetV2
    loose = ((("norm",), LastLayer),)

    def in_order(self) -> Iterator[nn.Module]:
        yield self.stem
        for stage in _in(self.stages):
            own = type(stage) is resnetv2.ResNetStage and only_forwards(stage) and not stage.grad_checkpointing
            yield stage.blocks if own else stage
        yield from _there(self.norm, self.head)


class ResNet(Network, resnet.ResNet):
    """A whole ResNet, ResNeXt or Wide ResNet."""

    host = resnet.ResNet
    loose = ((("conv1", "bn1", "act1", "maxpool"), Stem), (("global_pool", "fc"), Pooled))

    def in_order(self) -> Iterator[nn.Module]:
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return _there(self.conv1, self.bn1, self.act1, self.maxpool, *stages, self.global_pool, self.fc)


class EfficientNet(Network, efficientnet.EfficientNet):
    """A whole EfficientNet, or one of its many relatives."""

    host = efficientnet.EfficientNet
    loose = (
        (("conv_stem", "bn1"), Stem),
        (("conv_head", "bn2"), Stem),
        (("global_pool", "classifier"), Pooled),
    )

    def in_order(self) -> Iterator[nn.Module]:
        around = (self.conv_head, self.bn2, self.global_pool, self.classifier)
        return _there(self.conv_stem, self.bn1, *_in(self.blocks), *around)


class MobileNetV3(Network, mobilenetv3.MobileNetV3):
    """A whole MobileNetV3 or MobileNetV4."""

    host = mobilenetv3.MobileNetV3
    loose = (
        (("conv_stem", "bn1"), Stem),
        (("global_pool", "conv_head", "norm_head", "act2", "flatten", "classifier"), Pooled),
    )

    def in_order(self) -> Iterator[nn.Module]:
        head = (self.global_pool, self.conv_head, self.norm_head, self.act2, self.flatten, self.classifier)
        return _there(self.conv_stem, self.bn1, *_in(self.blocks), *head)


NETWORKS: dict[type[nn.Module], type[Network]] = {
    cls.host: cls for cls in (RegNet, ByobNet, ResNet, ResNetV2, EfficientNet, MobileNetV3)
}
"""timm's network to ours, where blocks in it were rebuilt."""
