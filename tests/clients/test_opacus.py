"""opacus: gradients of each image by its hooks, and a private step."""

import pytest
import torch
from beside import evaluated, images, quiet, same, twins
from torch.nn import functional as F

opacus = pytest.importorskip("opacus")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def stepped(model, mode):
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    x = images(4, 32)
    wrapped = opacus.GradSampleModule(model.train(), strict=False) if mode == "hooks" else None
    if wrapped is None:
        wrapped = opacus.grad_sample.GradSampleModuleExpandedWeights(model.train())
    quiet(lambda: F.cross_entropy(wrapped(x), torch.arange(4)).backward())
    return {n: p.grad_sample.detach() for n, p in wrapped.named_parameters()}


@pytest.mark.parametrize("mode", ["hooks", "expanded weights"])
def test_gradients_of_each_image(mode):
    found = []
    for model in twins("resnet_v2_gn"):
        torch.manual_seed(0)
        found.append(stepped(model, mode))
    assert found[1]
    same(*found)


def test_a_private_step():
    found, x = [], images(4, 32)
    for model in twins("resnet_v2_gn"):
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        data = torch.utils.data.TensorDataset(x, torch.arange(4))
        torch.manual_seed(0)
        private, optimizer, loader = opacus.PrivacyEngine().make_private(
            module=model.train(),
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            data_loader=torch.utils.data.DataLoader(data, 4),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        for image, target in loader:
            quiet(lambda: F.cross_entropy(private(image), target).backward())  # noqa: B023
            optimizer.step()
        found.append(({n: p.detach() for n, p in model.named_parameters()}, evaluated(model.eval(), x)))
    same(*found)


def test_batch_norms_are_refused_and_replaced_alike():
    found = []
    for model in twins("regnet_y"):
        errors = opacus.validators.ModuleValidator.validate(model.train(), strict=False)
        torch.manual_seed(0)
        fixed = opacus.validators.ModuleValidator.fix(model)
        found.append(([str(error) for error in errors], evaluated(fixed.eval(), images(2, 32) * 0 + 0.5)))
    same(*found)
