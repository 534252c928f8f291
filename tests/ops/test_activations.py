"""Every activation by every way that a CPU has, with its gradients, and in networks; unknown ones raise."""

import copy
import dataclasses

import pytest
import timm
import torch
from helpers import assert_close_to_reference, close, pair, randomize_bn, reasons
from torch import nn
from torch.nn import functional as F

import regnet_fast
from regnet_fast import functional as R
from regnet_fast.backends import (
    ACTIVATIONS,
    BackendError,
    ConvProblem,
    Geometry,
    SqueezeExciteProblem,
    activations,
    backend,
    cuda,
    onednn,
    triton,
)

DEFINITIONS = {
    "none": lambda z: z,
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z * z.sigmoid(),
    "relu6": lambda z: z.clamp(0, 6),
    "leaky_relu": lambda z: torch.where(z < 0, 0.01 * z, z),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "gelu_tanh": lambda z: z * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "hardswish": lambda z: z * (z + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda z: (z + 3).clamp(0, 6) / 6,
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
}
ONEDNN16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [torch.float32, *([torch.bfloat16] if ONEDNN16 else [])]


def test_every_activation_has_a_definition_here():
    assert ACTIVATIONS.keys() == DEFINITIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_function_is_the_definition(name):
    z = torch.randn(1000, dtype=torch.float64) * 4
    one, expected = ACTIVATIONS[name], DEFINITIONS[name](z)
    torch.testing.assert_close(one.function(z), expected)
    torch.testing.assert_close(one.function(z.float()), expected.float(), rtol=1e-5, atol=1e-6)
    own = z.clone()
    assert one.in_place(own) is own and torch.equal(own, one.function(z))
    assert one.function(torch.tensor([torch.nan])).isnan().all()


CONVS = {
    "a matrix product": ((12, 8, 1, 1), {}),
    "oneDNN": ((16, 8, 3, 3), {"padding": 1}),
    "oneDNN, grouped": ((16, 4, 3, 3), {"padding": 1, "groups": 4}),
    "Winograd": ((256, 256, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("way", CONVS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_behind_convolutions(name, way, residual, dtype):
    size, geometry = CONVS[way]
    channels = size[1] * geometry.get("groups", 1)
    x, weight, bias = torch.randn(2, channels, 14, 14), torch.randn(size) / (3 * size[1]) ** 0.5, torch.randn(size[0])
    added = torch.randn(2, size[0], 14, 14) if residual and "grouped" not in way else None

    def eager(dtype):
        last = x.to(dtype).contiguous(memory_format=torch.channels_last)  # where oneDNN may take Winograd's way itself
        y = F.conv2d(last, weight.to(dtype), bias.to(dtype), **geometry)
        y = y if added is None else y + added.to(dtype)
        return DEFINITIONS[name](y) if dtype == torch.float64 else ACTIVATIONS[name].function(y)

    op = getattr(R, R.pack_conv(weight, **geometry).op)
    options = {} if added is None else {"residual": added.to(dtype)}
    with backend("aten"):
        packed = R.pack_conv(weight.to(dtype), bias.to(dtype), activation=name, **geometry)
        ours = op(x.to(dtype), packed, **options)
    rounded = [t.to(dtype) for t in (x, weight, bias)]
    x, weight, bias = rounded
    added = None if added is None else added.to(dtype)
    assert_close_to_reference(ours, eager(dtype), eager(torch.float64), f"{name}, {way}")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_behind_norms_and_between_linear_layers(name):
    x, scale, shift = torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(8)
    ours = R.norm_act(x, (scale, shift), activation=name)
    z = x.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    torch.testing.assert_close(ours, DEFINITIONS[name](z).float(), rtol=1e-5, atol=1e-5)
    means, fc1, b1, fc2, b2 = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8)
    gate = R.squeeze_excite(means, fc1, b1, fc2, b2, activation=name)
    hidden = DEFINITIONS[name](F.linear(means.double(), fc1.double(), b1.double()))
    expected = F.linear(hidden, fc2.double(), b2.double())
    torch.testing.assert_close(gate, expected.sigmoid().float(), rtol=1e-5, atol=1e-5)
    gate = R.squeeze_excite(means, fc1, b1, fc2, b2, activation=name, gate_activation=name)
    torch.testing.assert_close(gate, DEFINITIONS[name](expected).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients(name):
    """First and second ones, by differences, away from the kinks."""
    generator = torch.Generator().manual_seed(3)

    def random(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()

    arguments = random(1, 2, 3, 3), random(3, 2, 1, 1), random(3)
    assert torch.autograd.gradcheck(lambda *a: R.pointwise_conv(*a, activation=name), arguments)
    arguments = random(1, 2, 3, 3), random(2), random(2)
    assert torch.autograd.gradcheck(lambda x, *affine: R.norm_act(x, affine, activation=name), arguments)
    arguments = random(2, 3), random(2, 3), random(2), random(3, 2), random(3)
    assert torch.autograd.gradcheck(lambda *a: R.squeeze_excite(*a, activation=name), arguments)
    assert torch.autograd.gradgradcheck(lambda *a: R.squeeze_excite(*a, activation=name), arguments)
    assert torch.autograd.gradcheck(lambda *a: R.squeeze_excite(*a, gate_activation=name), arguments)


MODULES = {
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "hard_swish": "hard_swish",
    "hardswish": nn.Hardswish,
    "timm's gelu": "gelu",
    "timm's gelu_tanh": "gelu_tanh",
}


@pytest.mark.parametrize("name", ["regnety_002", "regnetz_005", "resnetv2_18", "regnetv_040"])
@pytest.mark.parametrize("act", MODULES)
def test_networks_with_another_activation(name, act):
    """Fused in evaluation; in training the host's own, with its reason.

    The rule is each operation's, above: a network with random weights amplifies rounding at the kinks.
    """
    theirs = timm.create_model(name, num_classes=5, act_layer=MODULES[act])
    randomize_bn(theirs, 0, torch.randn(4, 3, 64, 64)).eval()
    ours = copy.deepcopy(theirs)
    report = regnet_fast.rebuild(ours)
    assert report.rebuilt
    x = torch.randn(2, 3, 64, 64)
    assert reasons(ours, x) == {None}
    with torch.no_grad():
        close(ours(x), theirs(x))
    ours.train(), theirs.train()
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["regnety_002", "regnetz_005", "regnetv_040"])
def test_networks_with_a_hard_gate(name):
    """Fused in evaluation; in training the host's own, with its reason."""
    theirs = timm.create_model(name, num_classes=5)
    for module in theirs.modules():
        if isinstance(module, timm.layers.SEModule):
            module.gate = nn.Hardsigmoid()
    randomize_bn(theirs, 0, torch.randn(4, 3, 64, 64)).eval()
    ours, x = copy.deepcopy(theirs), torch.randn(2, 3, 64, 64)
    regnet_fast.rebuild(ours)
    assert reasons(ours, x) == {None}
    with torch.no_grad():
        close(ours(x), theirs(x))
    ours.train()
    assert any("the gate of se is a hardsigmoid" in (reason or "") for reason in reasons(ours, x))


def test_a_slope_that_is_not_the_table_s_is_refused_and_seen_when_it_changes():
    ours, theirs = pair("regnety_002", act_layer=nn.LeakyReLU)
    x = torch.randn(1, 3, 64, 64)
    assert reasons(ours, x) == {None}
    for model in (ours, theirs):
        model.s1.b1.conv1.bn.act.negative_slope = 0.3
    found = reasons(ours, x)
    assert any(reason and "slope 0.3" in reason for reason in found)
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_the_kernels_refuse_what_they_do_not_have(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, one in ACTIVATIONS.items():
        geometry = Geometry(padding=(1, 1), groups=2)
        problem = ConvProblem((1, 16, 8, 8), 16, (3, 3), geometry, name, False, False, torch.float32, "cpu")
        assert onednn.refuse(problem) is None
        expected = None if one.code is not None else f"the kernels have no {name}"
        assert activations.refuse(name) == expected
        assert triton.refuse(problem) == expected
        if expected:
            assert cuda.refuse_conv(problem) == expected
    gate = SqueezeExciteProblem(2, 8, 4, "relu", torch.float32, "cpu", "relu")
    assert onednn.refuse(gate) is None
    assert triton.refuse(gate) == "the kernels make a gate by a sigmoid or a hardsigmoid, not by relu"
    assert triton.refuse(dataclasses.replace(gate, gate_activation="hardsigmoid")) is None
    with backend("triton"), pytest.raises(BackendError, match="the kernels have no gelu"):
        R.grouped_conv(torch.randn(1, 16, 8, 8), torch.randn(16, 8, 3, 3), groups=2, activation="gelu")


def test_an_unknown_one_raises(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"unknown activation 'mish'; choose one of none, relu, silu"):
        R.pack_conv(torch.zeros(3, 3, 3, 3), activation="mish")
    facts = "mish", False, False, torch.float32, "cpu"
    problem = ConvProblem((1, 4, 8, 8), 4, (3, 3), Geometry(padding=(1, 1)), *facts)
    with pytest.raises(KeyError, match="mish"):
        onednn.prepare_conv(problem, torch.randn(4, 4, 3, 3), None)
    with pytest.raises(KeyError, match="mish"):
        triton.refuse(problem)
