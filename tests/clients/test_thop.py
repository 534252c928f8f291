"""thop counts by the exact class of every layer."""

import pytest
from beside import NAMES, evaluated, images, quiet, same, twins

thop = pytest.importorskip("thop")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NAMES)
def test_operations_and_parameters(name):
    x = images()
    models = twins(name)
    evaluated(models[0], x)
    same(*(quiet(thop.profile, model, inputs=(x,), verbose=False) for model in models))
    same(*(evaluated(model, x) for model in models))
