"""segmentation_models_pytorch: encoders of timm, of torchvision and of its own."""

import copy

import pytest
import torch
from beside import evaluated, images, quiet, same
from helpers import randomize_bn

import regnet_fast
from regnet_fast.observer import observing

smp = pytest.importorskip("segmentation_models_pytorch")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("network", "encoder"), [("Unet", "tu-regnety_002"), ("FPN", "tu-resnetv2_18")])
def test_segmentation(network, encoder):
    x = images(2, 64)
    torch.manual_seed(0)
    theirs = randomize_bn(getattr(smp, network)(encoder, encoder_weights=None, classes=3).eval(), 0, x)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    same(evaluated(ours, x), evaluated(theirs, x))
    for model in (ours, theirs):
        model.zero_grad()
        quiet(model, x).square().mean().backward()
    assert all(
        (a.grad is None) == (b.grad is None) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


OWN = {  # encoders of its own classes, and how many of them there are
    ("Unet", "resnet50"): 16,
    ("Unet", "se_resnext50_32x4d"): 16,
    ("DeepLabV3Plus", "se_resnet50"): 16,
    ("Unet", "efficientnet-b0"): 16,
    ("DeepLabV3Plus", "efficientnet-b0"): 16,  # with dilations in the place of strides
}


@pytest.mark.parametrize(("network", "encoder"), OWN)
def test_its_own_encoders(network, encoder):
    x = images(2, 96)
    torch.manual_seed(0)
    theirs = randomize_bn(getattr(smp, network)(encoder, encoder_weights=None, classes=3).eval(), 0, x)
    report = regnet_fast.rebuild(copy.deepcopy(theirs))
    assert len(report.rebuilt) >= OWN[network, encoder] and not report.kept, report
    heard = []
    with observing(block=lambda block, image, plan, reason: heard.append(reason)):
        found = evaluated(report.model, x)
    assert set(heard) == {None}
    same(found, evaluated(theirs, x))
    same(evaluated(regnet_fast.restore(report.model), x), evaluated(theirs, x))


@pytest.mark.parametrize("encoder", ["se_resnext50_32x4d", "efficientnet-b0"])
def test_a_step_of_its_own_encoders(encoder):
    """From the same random numbers: those that are dropped of the blocks of an EfficientNet are the host's."""
    torch.manual_seed(0)
    theirs = smp.Unet(encoder, encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 4))
    ours, found = regnet_fast.rebuild(copy.deepcopy(theirs)).model, []
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.train()(images(4, 64)).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2 * float(a.abs().max()))


@pytest.mark.parametrize("name", ["_depthwise_conv", "_se_expand"])
def test_a_block_of_other_layers_is_kept_with_its_reason(name):
    block = smp.encoders.get_encoder("efficientnet-b0", weights=None)._blocks[1].eval()
    setattr(block, name, torch.nn.Conv2d(96 if name[1] == "d" else 4, 96, 1, groups=1, padding_mode="circular"))
    (kept,) = regnet_fast.rebuild(block).kept
    assert name in kept[2] and "circular" in kept[2]


@pytest.mark.parametrize(("name", "border"), [("_expand_conv", (0, 1, 0, 1)), ("_depthwise_conv", (-1, 1, 0, 1))])
def test_a_border_that_a_kernel_does_not_have_is_the_hosts(name, border):
    """A 1x1 convolution that makes its map larger; a border that cuts."""
    block = smp.encoders.get_encoder("efficientnet-b0", weights=None)._blocks[1].eval()
    getattr(block, name).static_padding = torch.nn.ZeroPad2d(border)
    (kept,) = regnet_fast.rebuild(block).kept
    assert name in kept[2] and "no border of its kernel" in kept[2]
