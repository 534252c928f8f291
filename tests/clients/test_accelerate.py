"""accelerate: its loop, and weights that are elsewhere until they are needed."""

import pytest
import torch
from beside import evaluated, images, quiet, same, twins
from torch.nn import functional as F

accelerate = pytest.importorskip("accelerate")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["regnet_y", "resnet_v2"])
def test_a_training_loop(name):
    found, x = [], images()
    batches = [(images(4, 64), torch.arange(4)) for _ in range(2)]
    for model in twins(name):
        accelerator = accelerate.Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters(), 1e-2))
        losses = []
        for image, target in batches:
            with accelerator.accumulate(prepared):
                loss = F.cross_entropy(quiet(prepared, image), target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        found.append((losses, evaluated(accelerator.unwrap_model(prepared).eval(), x)))
    same(*found)


@pytest.mark.parametrize("name", ["regnet_y", "resnet_v2", "repvgg"])
def test_cpu_offload(name):
    """Weights lie on the meta device between calls, and hooks bring them."""
    found, x = [], images()
    for model in twins(name):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        found.append([evaluated(model, x), evaluated(model, x + 1)])
    same(*found)


def test_empty_weights_and_loading(tmp_path):
    found, x = [], images()
    for model in twins("regnet_y"):
        torch.save(model.state_dict(), tmp_path / "weights.bin")
        empty = model.to("meta")
        accelerate.load_checkpoint_in_model(empty, str(tmp_path / "weights.bin"))
        found.append(evaluated(empty, x))
    same(*found)
