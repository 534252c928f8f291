"""torchao: weights that are subclasses of Tensor."""

import pytest
from beside import evaluated, images, same, twins
from torch import nn

quantization = pytest.importorskip("torchao.quantization")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("first", [False, True], ids=["before any call", "after a call"])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_classifier(config, first):
    found, x = [], images()
    for model in twins("regnet_y"):
        if first:
            evaluated(model, x)
        quantization.quantize_(model, getattr(quantization, config)(), lambda m, path: isinstance(m, nn.Linear))
        found.append(evaluated(model, x))
    same(*found)
