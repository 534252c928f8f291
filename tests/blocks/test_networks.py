"""Rebuilt blocks inside other people's networks: segmentation, detection, and a block that stands in two places."""

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from helpers import assert_close_to_reference, randomize_bn, reasons
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from training_blocks import WIDTH, assert_equal_states, pair_of, state_of

import regnet_fast
from regnet_fast.blocks.chain import Chain
from regnet_fast.blocks.fused import Fused

pytestmark = pytest.mark.usefixtures("no_silent_fallback")

LAST = torch.channels_last


def rebuilt(theirs):
    report = regnet_fast.rebuild(copy.deepcopy(theirs))
    assert report.rebuilt and not report.kept
    return report.model


@torch.no_grad()
def assert_same_in_evaluation(ours, theirs, x, call=lambda model, x: model(x)):
    """Every tensor of the output, held to the float64 result."""
    assert reasons(ours, x) == {None}
    exact = call(copy.deepcopy(theirs).double(), x.double())
    deployed = timm.utils.reparameterize_model(theirs).to(memory_format=LAST)
    eager = call(deployed, x.contiguous(memory_format=LAST))
    outputs = [torch.utils._pytree.tree_leaves(y) for y in (call(ours, x), eager, exact)]
    for i, (y, e, r) in enumerate(zip(*outputs, strict=True)):
        assert_close_to_reference(y, e, r, f"output {i}")


def assert_same_step(ours, theirs, loss):
    """The loss, all gradients and all buffers of a training step in float64, in which nothing but a mistake differs."""
    found = []
    for model in (ours.double().train(), theirs.double().train()):
        torch.manual_seed(0)
        value = loss(model)
        value.backward()
        found.append({"loss": value.detach()} | state_of(model))
    assert_equal_states(*found, 1e-8)


# segmentation_models_pytorch


SEGMENTATION = [("Unet", "tu-regnetx_002"), ("FPN", "tu-regnety_002"), ("Unet", "tu-resnetv2_18"), ("FPN", "repvgg_a0")]
MORE_SEGMENTATION = [("Unet", "tu-regnetz_005"), ("Unet", "tu-regnetv_040"), ("DeepLabV3Plus", "timm-regnety_002")]


@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated")
@pytest.mark.parametrize(
    ("network", "encoder"),
    [*SEGMENTATION, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_SEGMENTATION)],
)
def test_segmentation(network, encoder, in_float64):
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = encoder if encoder.startswith("t") else f"tu-{encoder}"
    theirs = getattr(smp, network)(encoder, encoder_weights=None, classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    randomize_bn(theirs, 0, x)
    ours = rebuilt(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_in_evaluation(ours, theirs, x)
    dy = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same_step(ours, theirs, lambda model: (model(x.double()) * dy).sum())


# torchvision's detection


class Pyramid(nn.Module):
    """A features_only model of timm's as torchvision's detectors take a backbone."""

    out_channels = 16

    def __init__(self, name):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x))))


def detector(kind, name):
    anchors = AnchorGenerator(tuple((16 * 2**i,) for i in range(3)), ((0.5, 1.0, 2.0),) * 3)
    sizes = dict(min_size=64, max_size=96)
    if kind == "RetinaNet":
        return RetinaNet(Pyramid(name), 4, anchor_generator=anchors, score_thresh=0.0, **sizes)
    pool = MultiScaleRoIAlign(["0", "1", "2"], 5, 2)
    return FasterRCNN(Pyramid(name), 4, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes)


@pytest.mark.parametrize(("kind", "name"), [("FasterRCNN", "regnety_002"), ("RetinaNet", "resnetv2_18")])
def test_detection(kind, name, in_float64):
    theirs = detector(kind, name).eval()
    x = torch.randn(2, 3, 64, 96)
    randomize_bn(theirs.backbone, 0, x)
    ours = rebuilt(theirs)
    assert_same_in_evaluation(ours.backbone, theirs.backbone, x)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    with torch.no_grad():
        for found, expected in zip(ours(images), theirs(images), strict=True):
            assert len(found["boxes"]) == len(expected["boxes"]) > 0
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-3)
            apart = torch.cdist(found["boxes"], expected["boxes"], p=float("inf"))
            apart += 1e3 * (found["labels"][:, None] != expected["labels"])
            best = apart.amin(0)[:30]  # towards the end scores are equal but for rounding, and change places
            assert (best <= 0.1).float().mean() >= 0.9
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]).double(), "labels": torch.tensor([1])}] * 2
    images = [image.double() for image in images]
    assert_same_step(ours, theirs, lambda model: sum(model(images, copy.deepcopy(targets)).values()))


# One block in two places


class Twice(nn.Module):
    """A block, another one, and the first one again."""

    def __init__(self, first, second, container):
        super().__init__()
        self.body = container(first, second, first)
        self.again = first

    def forward(self, x):
        return self.again(self.body(x))


class Rows(nn.Module):
    """A container of somebody's own."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("container", [nn.Sequential, Rows])
@pytest.mark.parametrize("name", ["Bottleneck of width 8", "PreActBasic", "RepVggBlock"])
def test_one_block_in_two_places(name, container, in_float64):
    first, second = (pair_of(name)[1] for _ in range(2))
    randomize_bn(second, 1)
    theirs = Twice(first, second, container).eval()
    x = torch.randn(2, WIDTH, 12, 12)
    randomize_bn(theirs, 0, x)
    ours = rebuilt(theirs)
    assert isinstance(ours.again, Fused) and len([m for m in ours.modules() if isinstance(m, Fused)]) == 2
    assert isinstance(ours.body, Chain) == (container is nn.Sequential)
    assert_same_in_evaluation(ours, theirs, x)
    gradients = []
    for model in (ours, theirs):
        y = model(x)
        y.square().sum().backward()
        gradients.append(state_of(model))
        model.zero_grad()
    assert_equal_states(*gradients, 1e-3)
    dy = torch.randn(2, WIDTH, 12, 12, dtype=torch.float64)
    assert_same_step(ours, theirs, lambda model: (model(x.double()) * dy).sum())
    regnet_fast.restore(ours)
    assert type(ours.again) is type(theirs.again) and type(ours.body) is type(theirs.body)


def test_one_block_twice_in_a_stage():
    """timm's RegStage runs such a block once, where an `nn.Sequential` runs it twice."""
    theirs = timm.create_model("regnetx_002").eval()
    theirs.s3.b3 = theirs.s3.b2
    x = torch.randn(2, 3, 64, 64)
    randomize_bn(theirs, 0, x)
    assert_same_in_evaluation(rebuilt(theirs), theirs, x)
