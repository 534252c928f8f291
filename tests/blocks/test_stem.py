"""ResNetV2's stem called whole and layer by layer."""

import copy

import pytest
import torch
from helpers import pair
from timm.models import resnetv2
from torch import nn

from regnet_fast.hosts.timm import Stem


@pytest.mark.parametrize("name", ["resnetv2_18", "resnetv2_18d", "resnetv2_50x1_bit", "resnetv2_50d_gn"])
def test_intermediates_are_those_of_forward(name):
    """To the bit, in evaluation; after a change of weights and of layers too; and copies have nothing of it."""
    ours, theirs = pair(name)
    assert type(ours.stem) is Stem
    x = torch.randn(2, 3, 65, 64)
    for _ in range(2):
        with torch.no_grad():
            final, features = ours.forward_intermediates(x)
            assert torch.equal(final, ours.forward_features(x))
            assert torch.equal(features[0], ours.forward_intermediates(x, indices=[0], intermediates_only=True)[0])
            torch.testing.assert_close(final, theirs.forward_intermediates(x)[0], rtol=1e-3, atol=1e-3)
        for model in (ours, theirs):
            torch.manual_seed(0)
            first = next(iter(model.stem))
            with torch.no_grad():
                first.weight.mul_(1.5)
            fresh = copy.deepcopy(first)
            nn.init.normal_(fresh.weight, std=0.1)
            setattr(model.stem, next(iter(model.stem._modules)), fresh)
    assert not [key for key in copy.deepcopy(ours.stem).__dict__ if key.startswith("_regnet_fast")]
    assert [type(layer) for layer in ours.stem] == [type(layer) for layer in theirs.stem]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.long
@pytest.mark.parametrize("train", [False, True])
def test_compiled_whole(train, fresh_compiler):
    """Nothing in the way of iterating breaks a compiler's graph."""
    ours = pair("resnetv2_18d")[0].train(train)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for call in (ours.forward_features, ours.forward_intermediates):
            torch.compile(call, backend="eager", fullgraph=True)(x)


def test_the_code_that_it_knows_is_timm_s():
    assert "enumerate" in resnetv2.ResNetV2.forward_intermediates.__code__.co_names


@pytest.mark.parametrize("train", [False, True])
def test_a_hook_on_a_layer_is_called(train):
    ours, theirs = (model.train(train) for model in pair("resnetv2_18d"))
    heard = []
    for model in (ours, theirs):
        model.stem.norm1.register_forward_hook(lambda module, args, y: heard.append(y.shape))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for model in (ours, theirs):
            model.forward_intermediates(x)
    assert len(heard) == 2
