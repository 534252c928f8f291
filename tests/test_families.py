"""Whole models of timm beside the RegNets, RepVGG and ResNetV2, against timm's own: keys, numbers, training.

A sample of each kind of block in `make test`; every architecture of which something is rebuilt in `make matrix`.
"""

import copy
import gc
from functools import partial

import pytest
import timm
import torch
from helpers import assert_close_to_reference, compare, in_channels_last, randomize_bn
from timm.layers import BlurPool2d, EcaModule
from timm.models import resnet
from timm.models._efficientnet_blocks import ConvBnAct, EdgeResidual, InvertedResidual, SqueezeExcite
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
    "ecaresnet26t",
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
    "tf_mobilenetv3_small_minimal_100",
    "tf_efficientnetv2_b0",
    "efficientnetv2_rw_t",
)
WHOLE = (
    "resnet18",
    "seresnext26t_32x4d",
    "mobileone_s0",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "tf_mobilenetv3_small_minimal_100",
    "tf_efficientnetv2_b0",
)
MOST_PARAMETERS = 150e6


def every(sample) -> list:
    """All architectures, those slow that are not in the sample."""
    return [name if name in sample else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def randomized(name: str, **options) -> nn.Module:
    model, only = timm.create_model(name, **options).eval(), size(name)
    return randomize_bn(model, 0, (4, 3, *(2 * [128 if only == 64 else only])))


def size(name: str) -> int:
    """The smallest image of an architecture that stays a map to its end, or the only one that its attention takes."""
    model = timm.create_model(name, device="meta").eval()
    try:
        model(torch.empty(1, 3, 64, 64, device="meta"))
    except (AssertionError, RuntimeError):
        return model.default_cfg["input_size"][-1]
    return 64


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
def test_a_network_is_one_program(name, dtype):
    """From the image to the logits, frozen or not."""
    theirs = randomized(name)
    if name.startswith("mobileone"):
        theirs = timm.utils.reparameterize_model(theirs)
    exact, theirs = copy.deepcopy(theirs).double(), theirs.to(dtype)
    x = torch.randn(2, 3, 96, 96).to(dtype)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    with torch.inference_mode():
        eager, reference = in_channels_last(theirs)(x), exact(x.double())
        assert_close_to_reference(ours(x), eager, reference, name)
        for frozen in (False, True):
            if frozen:
                regnet_fast.freeze(ours)
            with regnet_fast.backend("native"):
                found = ours(x)
            assert_close_to_reference(found, eager, reference, f"{name}, frozen: {frozen}")
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


SIZES = ((7, 9), (8, 8), (1, 4), (2, 5), (16, 33))


@pytest.mark.parametrize("backend", ["native", "aten", "reference"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (4, 1), (3, 3)])
def test_a_border_by_the_size_of_the_image(kernel, stride, backend):
    """timm's padding "same", of a depthwise and of a dense convolution."""
    facts = {"stride": stride, "pad_type": "same"}
    depthwise = InvertedResidual(16, 24, dw_kernel_size=kernel, se_layer=SqueezeExcite, **facts)
    for channels, block in ((16, depthwise), (3, EdgeResidual(3, 8, exp_kernel_size=kernel, **facts))):
        theirs = randomize_bn(nn.Sequential(block).eval(), 0)
        ours, exact = regnet_fast.rebuild(copy.deepcopy(theirs)).model, copy.deepcopy(theirs).double()
        with torch.no_grad(), regnet_fast.backend(backend):
            for size in SIZES:
                x = torch.randn(3, channels, *size)
                assert_close_to_reference(ours(x), theirs(x), exact(x.double()), f"{size}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_borders_of_a_whole_network(dtype):
    """Of images of every remainder, in its program."""
    theirs = randomized("tf_mobilenetv3_small_minimal_100").to(dtype)
    ours, exact = regnet_fast.rebuild(copy.deepcopy(theirs)).model, copy.deepcopy(theirs).double()
    with torch.no_grad():
        for size in ((64, 64), (65, 97), (70, 75), (95, 33)):
            x = torch.randn(2, 3, *size).to(dtype)
            assert_close_to_reference(ours(x), theirs(x), exact(x.double()), f"{size}")
        assert serving(ours) is not None


def test_a_step_in_training_of_such_a_border_is_the_hosts():
    ours = nn.Sequential(InvertedResidual(16, 24, stride=2, pad_type="same"))
    theirs = copy.deepcopy(ours).train()
    regnet_fast.rebuild(ours).model.train()
    x = torch.randn(4, 16, 9, 9)
    torch.testing.assert_close(ours(x), theirs(x))
    assert any(
        "a border that training does not have" in row.reason for row in regnet_fast.explain(ours, x.shape, train=True)
    )


def test_an_input_added_behind_an_activation():
    theirs = randomize_bn(ConvBnAct(16, 16, 3, skip=True, drop_path_rate=0.5).eval(), 0)
    ours, x = regnet_fast.rebuild(nn.Sequential(copy.deepcopy(theirs))).model, torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        assert_close_to_reference(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()), "evaluation")
        assert {row.backend for row in regnet_fast.explain(ours, x.shape)} != {"host"}
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        model(x).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_efficient_channel_attention(block, dtype):
    """As part of a network's program, of blocks by every backend, and in training by timm."""
    facts = {"block_args": {"attn_layer": "eca"}, "num_classes": 5}
    theirs = randomize_bn(resnet.ResNet(block, [1, 1, 2, 1], channels=(8, 16, 24, 136), **facts).eval(), 0)
    compare(copy.deepcopy(theirs), torch.randn(2, 3, 64, 71).to(dtype), block.__name__)
    theirs = theirs.to(dtype)
    ours, exact = regnet_fast.rebuild(copy.deepcopy(theirs)).model, copy.deepcopy(theirs).double()
    x = torch.randn(3, 3, 64, 64).to(dtype)
    with torch.no_grad():
        for backend in ("native", "aten", "reference"):
            with regnet_fast.backend(backend):
                found = ours(x)
            assert_close_to_reference(found, theirs(x), exact(x.double()), f"{block.__name__}, {backend}")
    rows = regnet_fast.explain(ours, (2, 3, 64, 64), train=True)
    assert any("no fused form in training mode" in row.reason for row in rows)
    assert "channel_conv" in {row.operation for row in regnet_fast.explain(ours, (2, 3, 64, 64))}


@pytest.mark.parametrize("attention", ["ceca", "cbam", partial(EcaModule, use_mlp=True)])
def test_other_attention_is_kept_with_its_reason(attention):
    block = timm.models.resnet.Bottleneck(64, 16, attn_layer=attention).eval()
    report = regnet_fast.rebuild(block)
    expected = "not SEModule" if isinstance(attention, str) else "more than one plain convolution"
    assert not report.rebuilt and expected in report.kept[0][2]


@pytest.mark.parametrize("attention", [None, "se"])
@pytest.mark.parametrize("blur", [nn.AvgPool2d, BlurPool2d])
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_anti_aliasing(block, blur, attention):
    """A pooling before the last convolution; in training the block is timm's."""
    facts = {"aa_layer": blur, "block_args": {"attn_layer": attention}, "num_classes": 5}
    theirs = randomize_bn(resnet.ResNet(block, [1, 1, 1, 1], channels=(8, 16, 24, 32), **facts).eval(), 0)
    report = regnet_fast.rebuild(copy.deepcopy(theirs))
    assert len(report.rebuilt) >= 4 and not report.kept
    for size in (64, 96 if blur is nn.AvgPool2d else 71):  # of odd maps timm's shortcut is larger than what is pooled
        compare(copy.deepcopy(theirs), torch.randn(2, 3, size, size), f"{blur.__name__}, {size}")
    rows = regnet_fast.explain(report.model, (2, 3, 64, 64), train=True)
    reason = "no fused form in training mode" if attention else "its last convolution reads a pooling"
    assert any(reason in row.reason for row in rows)


def test_other_anti_aliasing_is_kept_with_its_reason():
    block = resnet.Bottleneck(64, 16, stride=2, aa_layer=partial(nn.MaxPool2d, 2)).eval()
    (kept,) = regnet_fast.rebuild(block).kept
    assert "aa is" in kept[2] and "MaxPool2d" in kept[2]


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
