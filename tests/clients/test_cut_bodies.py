"""What fastai and course notebooks do: a model cut into a body and a new head, in groups that are frozen one by one."""

import pytest
import torch
from beside import SMALL, evaluated, images, quiet, same, twins
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")


def cut(model):
    body = nn.Sequential(*list(model.children())[:-1])
    torch.manual_seed(0)
    pools = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(
        body, nn.Sequential(*pools, nn.BatchNorm1d(model.num_features), nn.Linear(model.num_features, 4))
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_cut_body_is_tuned_in_groups(name):
    found, x, target = [], images(4, 64), torch.arange(4)
    for model in twins(name):
        network = cut(model)
        groups = [*network[0].children(), network[1]]
        seen = []
        for frozen in (len(groups) - 1, len(groups) // 2, 0):
            for i, group in enumerate(groups):
                group.requires_grad_(i >= frozen)
                for norm in (m for m in group.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
                    norm.requires_grad_(True)  # fastai trains the norms always
            rates = [
                dict(params=list(g.parameters()), lr=1e-3 * (i + 1))
                for i, g in enumerate(groups)
                if list(g.parameters())
            ]
            optimizer = torch.optim.SGD(rates, lr=1e-3)
            loss = F.cross_entropy(quiet(network.train(), x), target)
            loss.backward()
            seen.append((loss.detach(), [None if p.grad is None else p.grad.clone() for p in network.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
            seen.append(evaluated(network.eval(), x))
        found.append(seen)
    same(*found)


@pytest.mark.parametrize("name", SMALL)
def test_features_by_hooks_for_a_dynamic_unet(name):
    found, x = [], images(2, 64)
    for model in twins(name):
        body = nn.Sequential(*list(model.children())[:-1]).eval()
        sizes, handles = [], []
        for child in body:
            handles.append(child.register_forward_hook(lambda m, i, o, sizes=sizes: sizes.append(o.clone())))
        y = evaluated(body, x)
        for handle in handles:
            handle.remove()
        found.append((sizes, y, evaluated(body, x)))
    same(*found)
