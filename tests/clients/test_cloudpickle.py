"""cloudpickle: models by value, as Ray, Dask and Spark send them."""

import pickle

import pytest
from beside import evaluated, images, same, twins

cloudpickle = pytest.importorskip("cloudpickle")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["regnet_y", "regnet_v", "repvgg", "resnet_v2", "regnety_002"])
def test_sent(name):
    models, x = twins(name), images()
    evaluated(models[0], x)
    sent = [pickle.loads(cloudpickle.dumps(model)) for model in models]
    assert [type(m).__name__ for m in sent[0].modules()] == [type(m).__name__ for m in models[0].modules()]
    same(evaluated(sent[0], x), evaluated(sent[1], x))
    closures = [pickle.loads(cloudpickle.dumps(lambda x, model=model: evaluated(model, x))) for model in models]
    same(closures[0](x), closures[1](x))
