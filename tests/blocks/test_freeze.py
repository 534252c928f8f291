"""`regnet_fast.freeze`: what a frozen model does not look at any more, and what lifts the promise."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import randomize_bn

import regnet_fast


@pytest.fixture
def frozen():
    model = timm.create_model("regnety_002").eval()
    randomize_bn(model, 0)
    return regnet_fast.freeze(regnet_fast.rebuild(model).model)


@pytest.fixture
def x(seed):
    return torch.randn(2, 3, 64, 64)


def scale(model):
    with torch.no_grad():
        model.s2.b1.conv1.conv.weight.mul_(2)


@torch.no_grad()
def test_same_numbers(frozen, x):
    assert torch.equal(frozen(x), copy.deepcopy(frozen)(x))


@torch.no_grad()
def test_an_in_place_change_is_not_seen_until_the_promise_is_lifted(frozen, x):
    before = frozen(x)
    scale(frozen)
    assert torch.equal(frozen(x), before)
    frozen.eval()
    after = frozen(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, regnet_fast.rebuild(regnet_fast.restore(copy.deepcopy(frozen))).model(x))


@torch.no_grad()
def test_weights_are_those_of_the_next_call(frozen, x):
    before = frozen(x)
    scale(frozen)
    assert not torch.equal(regnet_fast.freeze(frozen)(x), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "lift",
    [
        lambda model: model.eval(),
        lambda model: model.train().eval(),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.double().float(),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: regnet_fast.rebuild(regnet_fast.restore(model)).model,
    ],
    ids=["eval", "train", "load_state_dict", "to", "deepcopy", "pickle", "restore"],
)
def test_what_lifts_the_promise(frozen, x, lift):
    before = frozen(x)
    lifted = lift(frozen)
    model = lifted if isinstance(lifted, torch.nn.Module) else frozen
    scale(model)
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_new_shapes_dtypes_and_backends_still_work(frozen, x):
    expected = frozen(x)
    assert frozen(x[:1, :, :33, :47]).shape == (1, 1000)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    with regnet_fast.backend("reference"):
        torch.testing.assert_close(frozen(x), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(frozen(x), expected)


def test_gradients_still_flow(frozen, x):
    x.requires_grad_()
    frozen(x).sum().backward()
    expected = torch.autograd.grad(regnet_fast.restore(copy.deepcopy(frozen))(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-4)


def test_a_model_in_training_mode_is_refused(frozen, x):
    frozen.train()
    with pytest.raises(ValueError, match=r"freeze: stem is in training mode; call model.eval\(\) first"):
        regnet_fast.freeze(frozen)


def test_a_model_without_blocks_of_ours_is_left_alone():
    model = torch.nn.Linear(2, 2)
    assert regnet_fast.freeze(model) is model
