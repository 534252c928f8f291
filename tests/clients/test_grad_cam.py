"""pytorch-grad-cam hooks layers and blocks, with gradients."""

import pytest
import torch
from beside import images, quiet, same, twins

cam = pytest.importorskip("pytorch_grad_cam")
targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM"])
@pytest.mark.parametrize("name", ["regnety_002", "resnet_v2", "repvgg"])
def test_maps(name, method):
    x = images(2, 64)
    found = []
    for model in twins(name):
        layer = model.s4 if hasattr(model, "s4") else model.stages[-1]
        with getattr(cam, method)(model=model, target_layers=[layer]) as one:
            for _ in range(2):
                maps = quiet(one, input_tensor=x, targets=[targets.ClassifierOutputTarget(k) for k in (1, 2)])
        found.append(torch.from_numpy(maps))
    same(*found)
