"""laplace-torch: a posterior of the last layer, and of all weights."""

import pytest
import torch
from beside import images, quiet, same, twins

laplace = pytest.importorskip("laplace")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_the_last_layer(structure):
    found, x = [], images(2, 32)
    data = torch.utils.data.TensorDataset(images(6, 32), torch.arange(6) % 5)
    for model in twins("regnet_y"):
        options = dict(subset_of_weights="last_layer", hessian_structure=structure, last_layer_name="head.fc")
        one = laplace.Laplace(model, "classification", **options)
        quiet(one.fit, torch.utils.data.DataLoader(data, 3))
        found.append(quiet(one, x, link_approx="probit").detach())
    same(*found)
