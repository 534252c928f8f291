"""Whole models of timm beside the RegNets, RepVGG and ResNetV2, against timm's own: keys, numbers, training.

A sample of each kind of block in `make test`; every architecture of which something is rebuilt in `make matrix`.
"""

import copy
import gc

import pytest
import timm
import torch
from helpers import assert_close_to_reference, compare, randomize_bn
from torch import nn

import regnet_fast
from regnet_fast.blocks.fused import Fused
from regnet_fast.blocks.network import Network, serving
from regnet_fast.models import fused_shares

ALREADY = ("regnetx", "regnety", "regnetv", "regnetz", "repvgg", "resnetv2")  # tests/test_models.py
NAMES = [name for name in fused_shares() if not name.startswith(ALREADY)]
SAMPLE = (
    "resnet18",
    "resnet26d",
    "resnext50_32x4d",
    "seresnext26t_32x4d",
    "hrnet_w18_small",
    "seresnext26ts",
    "gernet_s",
    "mobileone_s0",
    "efficientnet_b0",
    "efficientnet_es",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mnasnet_small",
    "tf_efficientnet_lite0",
    "efficientnetv2_rw_t",
)
WHOLE = (
    "resnet18",
    "seresnext26t_32x4d",
    "mobileone_s0",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
)
MOST_PARAMETERS = 150e6


def every(sample) -> list:
    """All architectures, those slow that are not in the sample."""
    return [name if name in sample else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def randomized(name: str, **options) -> nn.Module:
    model = timm.create_model(name, **options).eval()
    return randomize_bn(model, 0)


def size(name: str) -> int:
    """The smallest image of an architecture that stays a map to its end."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return timm.get_pretrained_cfg(name).input_size[-1] if fixed else 64


@pytest.fixture(autouse=True)
def two_threads():
    """As in tests/test_models.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def numbers(name: str, dtype: torch.dtype, images: int) -> None:
    """The largest error of few values is chance: half of four other draws have to miss the rule too for a failure."""

    def missed() -> AssertionError | None:
        x = torch.randn(images, 3, size(name), size(name)).to(dtype)
        try:
            compare(randomized(name), x, name)
        except AssertionError as error:
            return error
        finally:
            gc.collect()

    error = missed()
    if error and sum(missed() is not None for _ in range(4)) >= 2:
        raise error


def too_large(name: str) -> bool:
    return sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) > MOST_PARAMETERS


@pytest.mark.parametrize("name", every(SAMPLE))
def test_same_keys(name):
    ours, theirs = regnet_fast.create_model(name, device="meta"), timm.create_model(name, device="meta")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert any(isinstance(m, Fused) for m in ours.modules())
    assert {type(m) for m in regnet_fast.restore(ours).modules()} == {type(m) for m in theirs.modules()}


@pytest.mark.parametrize("name", every(SAMPLE))
def test_stages_and_logits(name):
    if too_large(name):
        pytest.skip("it takes more memory than two workers have")
    numbers(name, torch.float32, 2)


@pytest.mark.parametrize("name", every(WHOLE))
def test_stages_and_logits_in_bfloat16(name):
    if too_large(name):
        pytest.skip("it takes more memory than two workers have")
    numbers(name, torch.bfloat16, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_frozen_network_is_one_program(name, dtype):
    """From the image to the logits; of a network that is not frozen the layers around the blocks are the host's."""
    theirs = randomized(name)
    if name.startswith("mobileone"):
        theirs = timm.utils.reparameterize_model(theirs)
    exact, theirs = copy.deepcopy(theirs).double(), theirs.to(dtype)
    x = torch.randn(2, 3, 96, 96).to(dtype)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    with torch.inference_mode():
        eager, reference = theirs.to(memory_format=torch.channels_last)(x), exact(x.double())
        assert_close_to_reference(ours(x), eager, reference, name)
        regnet_fast.freeze(ours)
        with regnet_fast.backend("native"):
            found = ours(x)
        assert_close_to_reference(found, eager, reference, f"{name}, frozen")
        assert isinstance(ours, Network) and serving(ours).shape == reference.shape


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_b0"])
def test_what_is_changed_around_the_blocks_is_seen(name):
    """A hook on the stem, another classifier and another stem of a frozen network."""
    theirs = randomized(name)
    x = torch.randn(1, 3, 64, 64)
    ours = regnet_fast.freeze(regnet_fast.rebuild(copy.deepcopy(theirs)).model)
    stem = next(path for path, m in theirs.named_children() if isinstance(m, nn.Conv2d))
    heard = []
    with torch.inference_mode():
        before = ours(x)
        handle = getattr(ours, stem).register_forward_hook(lambda m, args, y: heard.append(y))
        torch.testing.assert_close(ours(x), before, rtol=1e-3, atol=1e-4)
        assert len(heard) == 1
        handle.remove()
        for model in (ours, theirs):
            torch.manual_seed(1)
            model.reset_classifier(7)
        assert ours(x).shape == (1, 7)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
        for model in (ours, theirs):
            torch.manual_seed(2)
            old = getattr(model, stem)
            setattr(model, stem, nn.Conv2d(3, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["eca", "cbam"])
def test_other_attention_is_kept_with_its_reason(attention):
    block = timm.models.resnet.Bottleneck(64, 16, attn_layer=attention).eval()
    report = regnet_fast.rebuild(block)
    assert not report.rebuilt and "not SEModule" in report.kept[0][2]


def test_anti_aliasing_is_kept_with_its_reason():
    model = timm.create_model("resnetblur18" if timm.is_model("resnetblur18") else "resnetblur50", device="meta")
    kept = regnet_fast.rebuild(model).kept
    assert kept and all("aa is" in reason for _, _, reason in kept)


def test_a_model_without_a_known_block_is_timms():
    ours, theirs = regnet_fast.create_model("vit_tiny_patch16_224"), timm.create_model("vit_tiny_patch16_224")
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_names_of_what_is_rebuilt():
    names = regnet_fast.list_models(fused=True)
    assert {"resnet50", "efficientnet_b0", "regnety_002"} <= set(names) and "vit_tiny_patch16_224" not in names
    assert set(names) <= set(timm.list_models()) and len(names) >= 400
    assert regnet_fast.list_models("resnet5*", fused=True, exclude_filters="*clip*") == [
        name for name in timm.list_models("resnet5*", exclude_filters="*clip*") if name in names
    ]
    assert all(tag.startswith("resnet18.") for tag in regnet_fast.list_models("resnet18", fused=True, pretrained=True))
