"""torch-pruning reads layers by their exact class and replaces their weights by smaller ones."""

import pytest
import torch
from beside import evaluated, images, quiet, same, twins

tp = pytest.importorskip("torch_pruning")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["regnetx_002", "repvgg_a0", "resnetv2_18"])
def test_pruned_channels(name):
    x = images(2)
    found = []
    for model in twins(name):
        before = evaluated(model, x)
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.25,
            ignored_layers=[model.head.fc],
        )
        quiet(pruner.step)
        after = evaluated(model, x)
        assert not torch.allclose(before, after)
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        found.append((shapes, after, tp.utils.count_ops_and_params(model, x)))
    same(*found)
