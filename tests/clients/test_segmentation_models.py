"""segmentation_models_pytorch: encoders of timm."""

import copy

import pytest
import torch
from beside import evaluated, images, quiet, same
from helpers import randomize_bn

import regnet_fast

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
