"""Blocks in a chain: each may write into the output of the one before, and nobody who can still see it notices."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import randomize_bn
from torch import nn

import regnet_fast
from regnet_fast.blocks.chain import Chain
from regnet_fast.blocks.fused import Fused

# A model of each kind of container, with the blocks of one stage.
STAGES = {
    "regnetx_002": "s4",
    "regnety_002": "s4",
    "regnetv_040": "s3",
    "regnetz_b16": "stages.2",
    "repvgg_a0": "stages.2",
    "resnetv2_50": "stages.2.blocks",
}


@pytest.fixture(params=STAGES)
def pair(request):
    """timm's model, ours, and the path of a chain."""
    theirs = timm.create_model(request.param).eval()
    randomize_bn(theirs, 0)
    return theirs, regnet_fast.rebuild(copy.deepcopy(theirs)).model, STAGES[request.param]


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def close(a, b):
    assert (a - b).norm() <= 1e-4 * b.norm()


@torch.no_grad()
def stage_input(model: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    seen = []
    chain = model.get_submodule(path)
    hook = chain.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    model(x)
    hook.remove()
    return seen[0].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_outputs_are_those_of_the_blocks_one_by_one(pair, x):
    _, ours, path = pair
    chain = ours.get_submodule(path)
    assert isinstance(chain, Chain)
    start = stage_input(ours, path, x)
    start = chain._modules.pop(next(iter(chain._modules)))(start)  # the first block of the rest adds its input itself
    kept = start.clone()
    expected = start
    for block in chain.children():
        expected = block(expected)
    assert torch.equal(chain(start), expected)
    assert torch.equal(start, kept), "the caller's tensor was overwritten"


@torch.no_grad()
def test_intermediate_features_are_not_overwritten(pair, x):
    theirs, ours, _ = pair
    for found, expected in zip(
        ours.forward_intermediates(x, intermediates_only=True),
        theirs.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True], ids=["on a block", "below a block"])
def test_what_a_hook_kept_stays(pair, x, inside):
    """A hook keeps the output of one block, or of its last activation, the same tensor; the next runs fused."""
    theirs, ours, path = pair
    kept = []
    for model in (theirs, ours):
        block = list(model.get_submodule(path).children())[1]
        last = [m for m in block.modules() if isinstance(m, (nn.ReLU, nn.SiLU))][-1] if inside else block
        last.register_forward_hook(lambda module, inputs, y: kept.append(y))
        model(x)
    close(kept[1], kept[0])


@torch.no_grad()
def test_a_replaced_forward_is_called(pair, x):
    _, ours, path = pair
    block = list(ours.get_submodule(path).children())[1]
    called = []
    forward = block.forward
    block.forward = lambda y: called.append(y.clone()) or forward(y)
    ours(x)
    assert len(called) == 1


def test_gradients(pair, x):
    theirs, ours, path = pair
    start = stage_input(ours, path, x)
    gradients = []
    for model in (theirs, ours):
        leaf = start.clone().requires_grad_()
        model.get_submodule(path)(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    close(gradients[1], gradients[0])


@torch.no_grad()
def test_copies_and_restored_models(pair, x):
    theirs, ours, path = pair
    expected = ours(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(twin.get_submodule(path), Chain) and torch.equal(twin(x), expected)
    regnet_fast.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


@torch.no_grad()
def test_a_block_of_timms_between_ours(pair, x):
    theirs, ours, path = pair
    chain = ours.get_submodule(path)
    block = regnet_fast.restore(list(chain.children())[1])
    assert isinstance(chain, Chain) and not isinstance(block, Fused)
    close(ours(x), theirs(x))


def test_grad_checkpointing_is_timms(x):
    model = regnet_fast.create_model("regnety_002")
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    model.eval()
    with torch.no_grad():
        assert model(x).shape == (2, 1000)
