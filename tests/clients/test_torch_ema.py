"""torch-ema: weights are exchanged for their averages and back, around an evaluation."""

import pytest
import torch
from beside import evaluated, images, moved, same, twins

torch_ema = pytest.importorskip("torch_ema")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["regnet_y", "resnet_v2", "repvgg", "regnet_v"])
def test_averages(name):
    found, x = [], images()
    for model in twins(name):
        average = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
        seen = []
        for k in range(3):
            generator = torch.Generator().manual_seed(k)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator))
            average.update()
            seen.append(evaluated(model, x))
            with average.average_parameters():
                seen.append(evaluated(model, x))
            seen.append(evaluated(model, x))
        found.append(seen)
    moved(found[1][0], found[1][1])
    same(*found)
