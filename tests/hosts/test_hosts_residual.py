"""ResNets, MobileNets and EfficientNets of torchvision, and the ResNet of transformers, rebuilt."""

import copy
import math
from functools import partial

import pytest
import torch
import torchvision
from helpers import close, reasons
from regnets import assert_same_function, assert_trains_alike, logits, with_statistics
from torch import nn
from torch.nn import functional as F
from torchvision.models import detection, efficientnet, segmentation
from torchvision.ops import FrozenBatchNorm2d

import regnet_fast
from regnet_fast.blocks.fused import Fused

pytestmark = pytest.mark.usefixtures("no_silent_fallback", "one_thread")

NAMES = ("resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")


def of_torchvision(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return with_statistics(torchvision.models.get_model(name, weights=None, num_classes=5), seed)


def of_transformers(**config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=5)
    return with_statistics(transformers.ResNetForImageClassification(transformers.ResNetConfig(**small, **config)), 0)


def outputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": logits(model, x)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_torchvision(name, dtype):
    assert_same_function(of_torchvision(name), torch.randn(4, 3, 64, 96).to(dtype), outputs, name)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_transformers(kind):
    assert_same_function(of_transformers(layer_type=kind), torch.randn(4, 3, 64, 96), outputs, kind)


@pytest.mark.parametrize("name", ["resnet18", "transformers"])
def test_a_training_step(name):
    model = of_transformers() if name == "transformers" else of_torchvision(name)
    assert_trains_alike(model, lambda model, x, target: F.cross_entropy(logits(model, x), target))


def test_stochastic_depth_takes_the_hosts_numbers():
    config = efficientnet.MBConvConfig(2, 3, 1, 16, 16, 1)
    theirs = with_statistics(nn.Sequential(nn.Conv2d(3, 16, 1), efficientnet.MBConv(config, 0.5, nn.BatchNorm2d)), 0)
    ours, x = regnet_fast.rebuild(copy.deepcopy(theirs)).model.train(), torch.randn(16, 3, 16, 16)
    assert isinstance(ours[1], Fused) and reasons(copy.deepcopy(ours), x) == {None}
    found = []
    for model in (ours, theirs.train()):
        torch.manual_seed(3)
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), *[p.grad for p in model.parameters()]])
    alone = theirs[0](x)
    dropped = [torch.equal(a, b) for a, b in zip(found[1][0], alone, strict=True)]
    assert True in dropped and False in dropped
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_an_input_added_behind_an_activation():
    """Of a block of one convolution, as those that EfficientNetV2 begins with; of more it is left to torchvision."""
    assert not regnet_fast.rebuild(torchvision.models.get_model("efficientnet_v2_s", weights=None)).kept
    torch.manual_seed(0)
    config = partial(
        efficientnet.FusedMBConvConfig, kernel=3, stride=1, input_channels=16, out_channels=16, num_layers=1
    )
    theirs = efficientnet.FusedMBConv(config(expand_ratio=1), 0.2, nn.BatchNorm2d)
    assert_same_function(
        with_statistics(theirs, 0), torch.randn(2, 16, 9, 12), lambda model, x: {"y": model(x)}, "one convolution"
    )
    other = efficientnet.FusedMBConv(config(expand_ratio=2), 0.2, nn.BatchNorm2d)
    other.block[-1].append(nn.SiLU())
    (kept,) = regnet_fast.rebuild(other).kept
    assert kept[2] == "its input is added behind an activation"


def test_detection_with_frozen_norms():
    """The pyramid of torchvision's Faster R-CNN, and its boxes."""
    torch.manual_seed(0)
    theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3).eval()
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 1.5), module.running_mean.normal_(0, 0.1), module.weight.uniform_(0.5, 1)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs))
    assert len(ours.rebuilt) >= 16 and not ours.kept
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        expected, found = theirs.backbone(x), ours.model.backbone(x)
        assert reasons(ours.model.backbone, x) == {None}
        for name in expected:
            close(found[name], expected[name])
        boxes = [
            model([torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))])
            for model in (theirs, ours.model)
        ]
    assert len(boxes[0][0]["boxes"]) == len(boxes[1][0]["boxes"]) > 0
    apart = torch.cdist(boxes[1][0]["boxes"], boxes[0][0]["boxes"], p=math.inf)  # in any order: scores may be as near
    assert apart.amin(0).max() < 1 and apart.amin(1).max() < 1


def test_segmentation_with_dilated_stages():
    torch.manual_seed(0)
    theirs = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    theirs = with_statistics(theirs.backbone, 0)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert reasons(ours, x) == {None}
        close(ours(x)["out"], theirs(x)["out"])


def test_a_cut_body():
    """fastai's way: all but the head of a network in a container of its own, before and after it is rebuilt."""
    theirs = of_torchvision("resnet18")
    x = torch.randn(2, 3, 64, 64)
    body = nn.Sequential(*list(theirs.children())[:-2])
    after = nn.Sequential(*list(regnet_fast.rebuild(copy.deepcopy(theirs)).model.children())[:-2])
    before = regnet_fast.rebuild(copy.deepcopy(body)).model
    with torch.no_grad():
        for ours in (before, after):
            assert reasons(ours, x) == {None}
            close(ours(x), body(x))
