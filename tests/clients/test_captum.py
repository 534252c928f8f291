"""captum: attributions by gradients, by hooks on layers, and by changed inputs."""

import pytest
import torch
from beside import images, quiet, same, twins
from torch import nn

attr = pytest.importorskip("captum.attr")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def layer(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)][4]


def block(model):
    return model.s2.b1 if hasattr(model, "s2") else model.stages[0]


METHODS = {
    "Saliency": lambda m, x: attr.Saliency(m).attribute(x, target=1),
    "IntegratedGradients": lambda m, x: attr.IntegratedGradients(m).attribute(x, target=1, n_steps=4),
    "InputXGradient": lambda m, x: attr.InputXGradient(m).attribute(x, target=1),
    "LayerGradCam of a layer": lambda m, x: attr.LayerGradCam(m, layer(m)).attribute(x, target=1),
    "LayerGradCam of a block": lambda m, x: attr.LayerGradCam(m, block(m)).attribute(x, target=1),
    "LayerActivation": lambda m, x: attr.LayerActivation(m, layer(m)).attribute(x),
    "LayerConductance": lambda m, x: attr.LayerConductance(m, block(m)).attribute(x, target=1, n_steps=3),
    "NeuronGradient": lambda m, x: attr.NeuronGradient(m, layer(m)).attribute(x, (0, 0, 0)),
    "Occlusion": lambda m, x: attr.Occlusion(m).attribute(x, (3, 16, 16), strides=(3, 16, 16), target=1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["regnet_y", "resnet_v2"])
def test_attributions(name, method):
    x = images(2, 32)
    found = []
    for model in twins(name):
        for _ in range(2):
            y = quiet(METHODS[method], model, x.clone())
        found.append(y.detach())
    same(*found)


@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution", "DeepLift"])
def test_rules_for_relu(method):
    """They hook every ReLU; one that is used in place or twice they refuse."""
    x = images(2, 32)
    found = []
    for model in twins("repvgg_a0", "relu"):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        y = quiet(getattr(attr, method)(model).attribute, x.clone(), target=torch.tensor([1, 2]))
        found.append(y.detach())
    same(*found)
