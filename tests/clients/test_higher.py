"""higher: a differentiable inner loop, whose weights are computed."""

import pytest
import torch
from beside import evaluated, images, quiet, same, twins

higher = pytest.importorskip("higher")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["regnet_y", "resnet_v2"])
def test_an_inner_loop_in_evaluation(name):
    found, x = [], images(2, 32)
    for model in twins(name):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (inner, steps):
            for _ in range(2):
                steps.step(quiet(inner, x).square().mean())
            y = quiet(inner, x + 1)
            y.square().mean().backward()
        found.append((y.detach(), {n: p.grad for n, p in model.named_parameters()}, evaluated(model, x)))
    assert all(grad is not None for grad in found[1][1].values())
    same(*found)
