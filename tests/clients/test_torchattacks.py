"""torchattacks: gradients of the images in evaluation, many times."""

import pytest
import torch
from beside import images, quiet, same, twins

torchattacks = pytest.importorskip("torchattacks")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["regnet_y", "repvgg", "resnet_v2"])
@pytest.mark.parametrize("attack", ["PGDL2", "FFGSM", "VANILA", "CW"])
def test_attacks(name, attack):
    """Those whose steps are no signs, at which rounding would leap."""
    options = dict(PGDL2=dict(steps=3, random_start=False), FFGSM=dict(eps=0.0), CW=dict(steps=3)).get(attack, {})
    found, x = [], images(2, 32).sigmoid()
    for model in twins(name):
        torch.manual_seed(0)
        found.append(quiet(getattr(torchattacks, attack)(model, **options), x, torch.tensor([1, 2])).detach())
    same(*found)
