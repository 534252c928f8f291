"""Blocks in a chain: each may write into the output of the one before, and nobody who can still see it notices."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import randomize_bn
from torch import nn

import regnet_fast
from regnet_fast.backends import backend
from regnet_fast.blocks import program
from regnet_fast.blocks.chain import Chain
from regnet_fast.blocks.fused import Fused
from regnet_fast.observer import observing

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


def randomized(name: str) -> nn.Module:
    model = timm.create_model(name).eval()
    randomize_bn(model, 0)
    return regnet_fast.rebuild(model).model


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
@pytest.mark.parametrize("name", ["aten", "native"])
def test_outputs_are_those_of_the_blocks_one_by_one(pair, x, name):
    _, ours, path = pair
    chain = ours.get_submodule(path)
    assert isinstance(chain, Chain)
    start = stage_input(ours, path, x)
    start = chain._modules.pop(next(iter(chain._modules)))(start)  # the first block of the rest adds its input itself
    kept = start.clone()
    expected = start
    with backend(name):
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


@pytest.mark.long
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


@pytest.fixture
def narrow(monkeypatch):
    """A cache so small that every stage takes its batch image by image, or three at a time."""

    def set_images(first: Fused, x: torch.Tensor, images: int) -> None:
        widest = first.fused_form().widest(*x.shape[1:]) * x.element_size()
        monkeypatch.setattr(program, "_BYTES_PER_THREAD", images * widest / torch.get_num_threads())

    return set_images


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "images", "parts"), [(5, 1, [1] * 5), (7, 3, [2, 2, 2, 1]), (4, 2, [2, 2]), (3, 4, [3])]
)
def test_a_large_batch_is_taken_in_parts(pair, narrow, batch, images, parts):
    _, ours, path = pair
    stage = ours.get_submodule(path)
    start = stage_input(ours, path, torch.randn(batch, 3, 64, 64))
    expected = start.clone()
    for block in stage.children():
        expected = block(expected)
    kept, heard = start.clone(), []
    narrow(next(stage.children()), start, images)
    with observing(block=lambda block, x, plan, reason: heard.append((block, len(x), reason))):
        found = stage(start)
    assert [size for block, size, _ in heard if block is next(stage.children())] == parts
    assert all(reason is None for *_, reason in heard)
    close(found, expected)
    assert torch.equal(start, kept), "the caller's tensor was overwritten"
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_parts_of_every_layout_and_dtype(narrow):
    ours = randomized("regnety_002")
    stage = ours.s1
    for dtype in (torch.float32, torch.bfloat16):
        ours.to(dtype)
        base = torch.randn(6, 32, 24, 20).to(dtype)
        narrow(stage.b1, base, 2)
        expected = stage(base[:2].contiguous()), stage(base[2:4].contiguous()), stage(base[4:].contiguous())
        for x in (base, base.contiguous(memory_format=torch.channels_last), base.repeat_interleave(2, 0)[::2]):
            assert torch.equal(stage(x), torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True], ids=["on a block", "below a block"])
def test_a_hook_sees_the_whole_batch(pair, narrow, inside):
    theirs, ours, path = pair
    x, kept = torch.randn(3, 3, 64, 64), []
    narrow(next(ours.get_submodule(path).children()), stage_input(ours, path, x), 1)
    for model in (theirs, ours):
        block = list(model.get_submodule(path).children())[1]
        last = [m for m in block.modules() if isinstance(m, (nn.ReLU, nn.SiLU))][-1] if inside else block
        last.register_forward_hook(lambda module, inputs, y: kept.append(y))
        model(x)
    assert len(kept) == 2
    close(kept[1], kept[0])


@torch.no_grad()
def test_a_changed_weight_is_seen_with_parts(pair, narrow):
    theirs, ours, path = pair
    x = torch.randn(3, 3, 64, 64)
    narrow(next(ours.get_submodule(path).children()), stage_input(ours, path, x), 1)
    ours(x)
    for model in (theirs, ours):
        block = list(model.get_submodule(path).children())[1]
        next(m for m in block.modules() if isinstance(m, nn.Conv2d)).weight.mul_(1.5)
    close(ours(x), theirs(x))


@torch.no_grad()
def test_a_batch_that_a_later_block_cannot_take_raises_what_timm_raises(narrow):
    theirs = timm.create_model("regnetx_002").eval()
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    for model in (theirs, ours):
        model.s4.b2 = copy.deepcopy(model.s2.b1)
    x = torch.randn(3, 3, 64, 64)
    narrow(ours.s4.b1, torch.empty(3, 152, 4, 4), 1)
    for model in (theirs, ours):
        with pytest.raises(RuntimeError, match="channels"):
            model(x)


@torch.no_grad()
def test_parts_of_a_chain_that_ends_in_a_head(narrow):
    theirs = timm.create_model("regnetx_002").eval()
    randomize_bn(theirs, 0)
    theirs = nn.Sequential(theirs.s4.b1, theirs.s4.b2, theirs.head)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(5, 152, 6, 6)
    narrow(ours[0], x, 2)
    close(ours(x), theirs(x))


@pytest.mark.long
@torch.no_grad()
def test_parts_are_counted(narrow):
    ours = randomized("regnety_002")
    whole = regnet_fast.explain(ours, (4, 3, 64, 64))
    narrow(ours.s1.b1, torch.empty(4, 32, 32, 32), 2)
    part, parts = (regnet_fast.explain(ours, (images, 3, 64, 64)) for images in (2, 4))
    assert [row.layer for row in parts] == [row.layer for row in whole]
    assert {row.times for row in whole} == {1}
    assert {row.times for row in parts if row.layer.startswith("s1.")} == {2}
    assert [row.flops for row in parts] == [row.flops for row in whole]
    one, two = (next(row for row in rows if row.layer == "s1.b1.conv1.conv") for rows in (part, parts))
    assert (two.shape, two.launches, two.bytes) == (one.shape, 2 * one.launches, 2 * one.bytes)
