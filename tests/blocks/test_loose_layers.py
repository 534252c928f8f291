"""Layers of a network that stand in no block, where no program is: each group of them is called as the block it is."""

import copy
import functools
import gc
import weakref
from contextlib import ExitStack, suppress

import pytest
import timm
import torch
from helpers import assert_close_to_reference, randomize_bn
from torch import nn
from torch.overrides import TorchFunctionMode

import regnet_fast
from regnet_fast import graphs
from regnet_fast.backends import BackendError
from regnet_fast.blocks.fused import STATE
from regnet_fast.observer import observing

LAST = torch.channels_last
BACKENDS = ["reference", "aten,reference"]
GROUPS = {
    "resnet18": [("conv1", "bn1", "act1", "maxpool"), ("global_pool", "fc")],
    "resnet10t": [("conv1", "bn1", "act1", "maxpool"), ("global_pool", "fc")],
    "mnasnet_small": [("conv_stem", "bn1"), ("conv_head", "bn2"), ("global_pool", "classifier")],
    "mobilenetv3_small_050": [
        ("conv_stem", "bn1"),
        ("global_pool", "conv_head", "norm_head", "act2", "flatten", "classifier"),
    ],
    "resnetv2_18": [("norm",)],
}
"""Networks with what runs as one block in them."""

pytestmark = pytest.mark.usefixtures("no_silent_fallback")


@functools.cache
def made(name: str) -> nn.Module:
    return randomize_bn(timm.create_model(name, num_classes=100).eval(), 0)


@pytest.fixture
def twins():
    """A resnet18 of timm's and ours."""
    theirs = copy.deepcopy(made("resnet18"))
    return theirs, regnet_fast.rebuild(copy.deepcopy(theirs)).model


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def taken(model, x):
    """What the model gives, and the names of the layers in the blocks that are called and stand nowhere in it."""
    inside, heard = {*model.modules()}, []
    with observing(block=lambda block, x, plan, reason: heard.append((block, reason))):
        y = model(x)
    assert all(reason is None for _, reason in heard)
    return y, [tuple(name for name, _ in block.named_children()) for block, _ in heard if block not in inside]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("force", BACKENDS)
@pytest.mark.parametrize("name", GROUPS)
def test_they_are_called_as_blocks(name, force, dtype):
    """None of timm's layers is, the result is that of float64, and nothing of the model is another."""
    theirs = copy.deepcopy(made(name)).to(dtype)
    ours, x = regnet_fast.rebuild(copy.deepcopy(theirs)).model, torch.randn(2, 3, 47, 65).to(dtype)
    exact, eager = copy.deepcopy(theirs).double()(x.double()), copy.deepcopy(theirs).to(memory_format=LAST)
    before = [*ours.state_dict()], [*ours.modules()]
    with regnet_fast.backend(force):
        found, groups = taken(ours, x)
        assert torch.equal(ours(x), found)
    assert groups == GROUPS[name]
    assert_close_to_reference(found, eager(x.contiguous(memory_format=LAST)), exact, name)
    assert ([*ours.state_dict()], [*ours.modules()]) == before


@torch.no_grad()
@pytest.mark.parametrize("promise", [False, True], ids=["", "frozen"])
def test_changes_are_followed(twins, x, promise):
    """Of weights, statistics and the layer itself, and of the mode."""
    theirs, ours = twins
    if promise:
        regnet_fast.freeze(ours)

    def mean(model):
        model.bn1.running_mean.add_(1)

    def other(model):
        torch.manual_seed(0)
        model.conv1 = nn.Conv2d(3, 64, 5, 2, 2, bias=False)

    with regnet_fast.backend("reference"):
        before = ours(x)
        for change in (lambda m: m.conv1.weight.mul_(1.5), mean, other, lambda m: m.train().eval()):
            ours(x)  # weights that are others in each call would be left to the host
            change(theirs), change(ours)
            y, groups = taken(ours, x)
            assert groups == GROUPS["resnet18"] and not torch.allclose(y, before)
            torch.testing.assert_close(y, theirs(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_whoever_comes_between_gets_the_hosts_layers(twins, x):
    """Hooks, other methods and classes, checkpointing, a layer in training: its group or all groups are timm's."""
    _, plain = twins
    stem, head = GROUPS["resnet18"]

    def hooked(model):
        model.bn1.register_forward_hook(lambda module, given, y: called.append(1))

    def method(model):
        model.forward_features = lambda x: called.append(1) or type(model).forward_features(model, x)

    def derived(model):
        class Mine(type(model)):
            def forward_head(self, x, pre_logits=False):
                called.append(1)
                return super().forward_head(x, pre_logits)

        model.__class__ = Mine

    for change, groups in (
        (hooked, [head]),
        (method, []),
        (derived, []),
        (lambda model: model.set_grad_checkpointing(), []),
        (lambda model: model.bn1.train(), [head]),
        (lambda model: setattr(model.conv1, "padding_mode", "circular"), [head]),
    ):
        model, called = copy.deepcopy(plain), []
        with regnet_fast.backend("reference"):
            assert taken(model, x)[1] == [stem, head]
            change(model)
            y, found = taken(model, x)
        assert found == groups and bool(called) == (change in (hooked, method, derived))
        assert y.shape == (2, 100)


@pytest.mark.parametrize(
    "by", ["nobody", "gradients", "a mode", "a global hook", "autocast", "a subclass", "compiling"]
)
def test_a_call_that_others_see_is_the_hosts(twins, x, by, monkeypatch):
    """The blocks refuse some of these where a backend is forced, after the stem has run."""
    _, ours = twins

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Mine(torch.Tensor):
        pass

    called, forward = [], nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: called.append(self) or forward(self, x))
    with ExitStack() as stack:
        stack.enter_context(regnet_fast.backend("reference"))
        stack.enter_context(suppress(BackendError))
        stack.enter_context(torch.set_grad_enabled(by == "gradients"))
        if by == "a mode":
            stack.enter_context(Mode())
        elif by == "a global hook":
            stack.callback(nn.modules.module.register_module_forward_hook(lambda *given: None).remove)
        elif by == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif by == "compiling":
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        ours(x.as_subclass(Mine) if by == "a subclass" else x)
    assert (ours.bn1 in called) == (by != "nobody")


@torch.no_grad()
def test_other_modules_hooks_are_called(twins, x):
    _, ours = twins
    called = []
    for name in ("layer1", "layer2.0", "layer4"):
        ours.get_submodule(name).register_forward_hook(lambda *given, name=name: called.append(name))
    with regnet_fast.backend("reference"):
        assert taken(ours, x)[1] == GROUPS["resnet18"]
    assert called == ["layer1", "layer2.0", "layer4"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["regnetx_002", "regnety_002", "repvgg_a0"])
def test_a_network_without_any_is_not_asked_for_its_order(name, x, monkeypatch):
    ours = regnet_fast.rebuild(copy.deepcopy(made(name))).model
    monkeypatch.setattr(type(ours), "in_order", lambda self: pytest.fail("its order was asked for"))
    with regnet_fast.backend("reference"):
        ours(x)


@torch.no_grad()
@pytest.mark.parametrize("promise", [False, True], ids=["", "frozen"])
def test_a_recorded_call_keeps_their_weights_and_follows_them(twins, x, promise):
    """A graph reads the packed weights for as long as it may be replayed."""
    _, ours = twins
    if promise:
        regnet_fast.freeze(ours)
    with regnet_fast.backend("reference"):
        ours(x)
        capture = graphs._Recorded(ours, None)
    plans = [weakref.ref(plan) for piece in ours.pieces() for plan in piece.__dict__[STATE].values()]
    assert len(plans) == 2
    assert capture.current()
    ours.conv1.weight.mul_(2)
    assert not capture.current()
    ours.eval()
    gc.collect()
    assert all(plan() is not None for plan in plans)


@torch.no_grad()
def test_explain_has_rows_of_what_runs(twins):
    """Also of a network inside another module; of one whose layers are called by themselves, the host's."""
    _, ours = twins

    def rows(model):
        with regnet_fast.backend("aten,reference"):
            return {row.layer: row for row in regnet_fast.explain(model, (1, 3, 64, 64))}

    found = rows(nn.Sequential(nn.Identity(), ours))
    stem = found["1.conv1"]
    assert (stem.operation, stem.backend) == ("dense_conv", "aten") and "1.bn1" not in found
    assert found["1.fc"].operation == "linear" and not any(row.operation == "host" for row in found.values())

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = ours

        def forward(self, x):
            return self.network.forward_features(x)

    found = rows(Features())
    assert [found[f"network.{name}"].operation for name in GROUPS["resnet18"][0]] == ["host"] * 4
    hook = ours.act1.register_forward_hook(lambda *given: None)
    assert rows(ours)["conv1"].operation == "host" and rows(ours)["fc"].operation == "linear"
    hook.remove()
    assert rows(ours)["conv1"].operation == "dense_conv"
    with regnet_fast.backend("reference"):
        assert regnet_fast.explain(ours, (1, 3, 64, 64))[0].backend == "reference"
