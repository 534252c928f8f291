"""timm: which of its classes is which block."""

from __future__ import annotations

from timm.models import resnetv2
from torch import nn

from ...blocks.fused import Fused
from . import byobnet, efficientnet, regnet, resnet
from .byobnet import BottleneckBlock, RepVggBlock
from .layers import CONVS
from .networks import CHAINS, NETWORKS, ByobNet, RegNet, RegStage, ResNetV2, Sequential
from .parts import ClassifierHead, ConvNormAct, LastLayer, Layers, Stem
from .regnet import Bottleneck, PreActBasic, PreActBottleneck, PreBottleneck

__all__ = [
    "BLOCKS",
    "CHAINS",
    "NETWORKS",
    "Bottleneck",
    "BottleneckBlock",
    "ByobNet",
    "ClassifierHead",
    "ConvNormAct",
    "LastLayer",
    "Layers",
    "PreActBasic",
    "PreActBottleneck",
    "PreBottleneck",
    "RegNet",
    "RegStage",
    "RepVggBlock",
    "ResNetV2",
    "Sequential",
    "Stem",
    "part",
]

BLOCKS: dict[type[nn.Module], type[Fused]] = {
    cls.host: cls
    for cls in (
        ConvNormAct,
        ClassifierHead,
        *regnet.BLOCKS,
        *byobnet.BLOCKS,
        *resnet.BLOCKS,
        *efficientnet.BLOCKS,
    )
}
"""timm's class to ours, wherever it stands in a network."""


def part(parent: nn.Module, name: str) -> type[Fused] | None:
    """The twin of a child whose class alone does not tell what it is, or None."""
    is_stem = isinstance(parent, resnetv2.ResNetV2) and name == "stem" and type(parent.stem) is nn.Sequential
    return Stem if is_stem and type(next(iter(parent.stem), None)) in CONVS else None
