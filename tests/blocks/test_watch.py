"""Watches as one see what each of them sees."""

import pytest
import timm
import torch
from torch import nn

from regnet_fast.blocks.watch import Joined, Watch

BLOCKS = ("s1.b1", "s2.b1", "s3.b1")


class Other(nn.BatchNorm2d):
    """A class of somebody."""


def stepped(block):
    weights = [*block.parameters()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(weights, lr=0.1, fused=True).step()


CHANGES = {
    "weight in place": lambda block: block.conv2.conv.weight.add_(1.0),
    "weight behind data": lambda block: setattr(block.conv1.conv.weight, "data", block.conv1.conv.weight + 1.0),
    "all weights through data": lambda block: [p.data.mul_(2.0) for p in block.parameters()],
    "layout through data": lambda block: setattr(
        block.conv2.conv.weight, "data", block.conv2.conv.weight.data.as_strided((8, 8, 3, 3), (1, 8, 64, 192))
    ),
    "another weight": lambda block: setattr(block.conv3.conv, "weight", nn.Parameter(block.conv3.conv.weight + 1.0)),
    "statistics": lambda block: block.conv3.bn.running_mean.add_(1.0),
    "step of an optimizer": stepped,
    "setting": lambda block: setattr(block.conv2.conv, "padding", (0, 0)),
    "epsilon": lambda block: setattr(block.conv1.bn, "eps", 1.0),
    "replaced method": lambda block: setattr(block.se.fc1, "forward", abs),
    "replaced layer": lambda block: setattr(block, "act3", nn.SiLU()),
    "other class": lambda block: setattr(block.conv1.bn, "__class__", Other),
    "training": lambda block: block.train(),
    "training of a layer": lambda block: block.conv1.bn.train(),
    "hook": lambda block: block.conv1.register_forward_hook(lambda *_: None),
}


def blocks() -> list[nn.Module]:
    model = timm.create_model("regnety_002").eval()
    return [model.get_submodule(path) for path in BLOCKS]


@torch.no_grad()
@pytest.mark.parametrize("at", range(len(BLOCKS)))
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_of_any_is_seen(kind, at):
    some = blocks()
    if kind == "layout through data":
        some[at].conv2.conv.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    watches = [Watch(block) for block in some]
    joined = Joined(watches)
    assert joined.current()
    CHANGES[kind](some[at])
    assert [watch.current() for watch in watches] == [i != at for i in range(len(BLOCKS))]
    assert not joined.current()


@torch.no_grad()
def test_what_none_sees_is_not_seen():
    some = blocks()
    joined = Joined([Watch(block) for block in some])
    some[1].seen = some[1].register_forward_hook(lambda *_: None)  # of a block itself
    some[2].conv1.register_forward_hook(lambda *_: None).remove()
    assert joined.current()
    assert Joined([]).current()


@torch.no_grad()
def test_what_was_seen_before_they_were_joined_stays():
    some = blocks()
    watches = [Watch(block) for block in some]
    stepped(some[0])
    assert not Joined(watches).current()
