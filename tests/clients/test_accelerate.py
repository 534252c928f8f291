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


def test_weights_that_come_from_the_meta_device():
    found, x = [], images()
    for model in twins("regnet_y"):
        evaluated(model, x)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        empty = model.to("meta")
        for name, value in state.items():
            accelerate.utils.set_module_tensor_to_device(empty, name, "cpu", value=value * 1.1)
        found.append(evaluated(empty, x))
    same(*found)
