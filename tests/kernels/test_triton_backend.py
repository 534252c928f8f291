"""The backend `triton` forced in the interpreter: the public operations, blocks of every group width, whole models."""

import copy
import dataclasses
from functools import partial

import pytest
import timm
import torch
from helpers import assert_close_to_reference, compare, randomize_bn
from timm.models.regnet import RegNet, RegNetCfg
from torch import nn

import regnet_fast
import regnet_fast.functional as R
from regnet_fast.backends import (
    BackendError,
    ConvProblem,
    Geometry,
    JoinProblem,
    PairProblem,
    backend,
    reference,
    select,
    triton,
)
from regnet_fast.observer import observing
from regnet_fast.trials.candidate import bound
from regnet_fast.trials.check import verify

pytestmark = pytest.mark.usefixtures("unchecked_integers")

MODELS = ("regnety_002", "repvgg_a0", "resnetv2_18")
REST = ("repvgg_a0", "resnetv2_18")
HALF = (torch.float16, torch.bfloat16)
MORE_MODELS = ("regnetx_002", "regnetz_005", "regnetz_b16", "regnetv_040", "repvgg_b1g4", "regnety_016", "resnetv2_50")


def check(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)  # one small image: other draws may miss the rule
    with backend("triton"):
        compare(randomize_bn(timm.create_model(name), 0), torch.randn(1, 3, 32, 32, dtype=dtype), name)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_whole_models(model):
    check(model, torch.float32)


@pytest.mark.long
@pytest.mark.parametrize("model", ["regnety_002", *(pytest.param(m, marks=pytest.mark.slow) for m in REST)])
def test_whole_models_in_bfloat16(model):
    check(model, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", MORE_MODELS)
def test_more_models(model, dtype):
    check(model, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(t, marks=pytest.mark.slow) for t in HALF)])
@pytest.mark.parametrize("width", [1, 4, 8, 16, 24, 40, 48, 56, 64, 112])
def test_whole_models_of_every_group_width(width, dtype):
    first = -(-max(width, 24) // 8) * 8
    config = RegNetCfg(depth=5, w0=first, wa=float(first), wm=1.5, group_size=width, se_ratio=0.25)
    host = RegNet(config, num_classes=10).eval()
    randomize_bn(host, 0)
    x, host = torch.randn(2, 3, 16, 16).to(dtype), host.to(dtype)
    model = regnet_fast.rebuild(host, inplace=False).model
    assert {m.in_channels // m.groups for m in host.modules() if getattr(m, "kernel_size", 0) == (3, 3)} == {3, width}
    with backend("triton"):
        y = model(x)
    assert_close_to_reference(y, host(x), host.double()(x.double()), f"group width {width}")


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "sliced", "expanded"])
def test_the_operation_takes_any_layout(layout):
    x = torch.randn(3, 24, 6, 5)
    x = {
        "NCHW": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(5, 27, 6, 7)[1:4, 2:26, :, 1:6],
        "expanded": x[:1, :, :, :1].expand(x.shape),
    }[layout]
    weight, bias = torch.randn(40, 24, 1, 1), torch.randn(40)
    with backend("triton"):
        y = R.pointwise_conv(x, weight, bias, activation="relu")
        groups, means = R.grouped_conv(x, torch.randn(24, 8, 3, 3), groups=3, means=True)
    exact = R.pointwise_conv(x.double(), weight.double(), bias.double(), activation="relu")
    eager = torch.relu(torch.nn.functional.conv2d(x, weight, bias))
    assert_close_to_reference(y, eager, exact, layout)
    torch.testing.assert_close(means, groups.mean((2, 3)))


def test_what_no_kernel_computes_is_refused_with_the_reason():
    x = torch.randn(1, 746, 3, 3)
    with backend("triton"), pytest.raises(BackendError, match="groups of 373 and 373 channels"):
        R.grouped_conv(x, torch.randn(746, 373, 3, 3), groups=2)
    with backend("triton"), pytest.raises(BackendError, match=r"not in torch\.float64"):
        R.pointwise_conv(x.double(), torch.randn(8, 746, 1, 1).double())
    with backend("triton"):
        assert R.pointwise_conv(x[:0], torch.randn(8, 746, 1, 1)).shape == (0, 8, 3, 3)


def test_what_cannot_be_counted_in_32_bits_is_refused():
    conv = R.pack_conv(torch.randn(8, 8, 1, 1)).problem(torch.randn(1, 8, 2, 2))
    grouped = dataclasses.replace(conv, kernel=(3, 3), geometry=Geometry(padding=(1, 1), groups=2))
    for problem in (conv, grouped):
        assert triton.refuse(dataclasses.replace(problem, input_shape=(2**17, 8, 96, 96))) is None
        assert "too many pixels" in triton.refuse(dataclasses.replace(problem, input_shape=(2**18, 8, 96, 96)))
        assert "too many elements" in triton.refuse(dataclasses.replace(problem, input_shape=(1, 8, 2**15, 2**14)))


def test_a_block_asks_the_kernel_for_the_parts_of_the_means(monkeypatch):
    """RegNetY's block is four kernels, with its shortcut or without: no pass of its own for the means or the gate."""
    model = regnet_fast.create_model("regnety_002").eval()
    launched = []
    for cls in (triton.PointwiseConv, triton.GroupedConv, triton.SqueezeExcite):
        for name in ("__call__", "with_parts", "from_parts", "beside"):
            if name in cls.__dict__:
                before = getattr(cls, name)

                def spy(self, *args, before=before, what=f"{cls.__name__}.{name}"):
                    launched.append(what)
                    return before(self, *args)

                monkeypatch.setattr(cls, name, spy)
    x = torch.randn(1, 24, 8, 8)
    with backend("triton"), torch.no_grad():
        model.s2.b1(x)
        first = launched[:]
        launched.clear()
        model.s3.b2(torch.randn(1, 152, 4, 4))
    assert first == [
        *("PointwiseConv.beside", "GroupedConv.with_parts", "SqueezeExcite.from_parts", "PointwiseConv.__call__")
    ]
    assert launched == [
        *("PointwiseConv.__call__", "GroupedConv.with_parts", "SqueezeExcite.from_parts", "PointwiseConv.__call__")
    ]


@pytest.mark.parametrize(("model", "passes"), [("resnetv2_50", 1), ("regnetv_040", 0), ("resnetv2_18", 9)])
def test_norms_are_computed_where_they_are_read(model, passes):
    """Bottlenecks have no pass for a norm. What is left is ResNetV2's last one, and one for each basic block."""
    network = regnet_fast.create_model(model).eval()
    launched = []

    def listen(name, arguments):
        launched.append(name.partition(".")[0])
        return False

    with backend("triton"), torch.no_grad(), observing(launch=listen):
        network(torch.randn(1, 3, 64, 64))
    assert launched.count("norm_act") == passes
    assert "pointwise_pair" in launched or model == "resnetv2_18"


def test_auto_does_not_take_the_interpreter():
    problem = R.pack_conv(torch.randn(8, 8, 1, 1)).problem(torch.randn(1, 8, 2, 2))
    assert select(problem).name == "aten"


def test_a_gradient_flows_through_forced_kernels():
    conv = nn.Conv2d(16, 16, 1)
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    with backend("triton"):
        R.pointwise_conv(x, conv.weight, conv.bias, activation="silu").sum().backward()
    expected = torch.autograd.grad(torch.nn.functional.silu(conv(x)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("operands", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
def test_the_end_of_a_block_passes_its_trial(activation, operands):
    problem = JoinProblem((3, 24, 6, 5), activation, *operands, torch.float16, "cpu")
    with torch.inference_mode():
        assert verify(problem, partial(bound, triton), partial(bound, reference)) < 3


def test_se_resnets_end_their_blocks_in_one_launch():
    """Of the gate, the shortcut and the activation behind the last convolution."""
    host = randomize_bn(timm.create_model("seresnet18", num_classes=5).layer1, 0, (2, 64, 12, 12)).eval()
    x, ours, launched = torch.randn(2, 64, 12, 12), regnet_fast.rebuild(host, inplace=False).model, []
    hear = lambda name, arguments: launched.append(name) or True  # noqa: E731
    with torch.inference_mode(), backend("triton"), observing(launch=hear):
        y = ours(x.contiguous(memory_format=torch.channels_last))
    assert launched.count("training_join.join_kernel") == 2
    with torch.inference_mode():
        assert_close_to_reference(y, host(x), copy.deepcopy(host).double()(x.double()), "layer1")


@pytest.mark.parametrize("variant", ["apart", "beside"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pair_passes_its_trial(variant, stride):
    pair = PairProblem((3, 16, 6, 5), 8, 24, "relu", stride, torch.float32, "cpu")
    with torch.inference_mode():
        assert verify(pair, partial(bound, triton, variant=variant), partial(bound, reference)) < 3


def test_a_convolution_with_its_means_passes_its_trial():
    geometry = Geometry(padding=(1, 1), groups=2)
    problem = ConvProblem((3, 16, 6, 5), 16, (3, 3), geometry, "relu", False, False, torch.float32, "cpu", means=True)
    with torch.inference_mode():
        assert verify(problem, partial(bound, triton), partial(bound, reference)) < 9
