"""safetensors: whole models to files and back."""

import pytest
import torch
from beside import NAMES, evaluated, images, moved, same, twins

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    models, x = twins(name), images()
    files = [tmp_path / f"{k}.safetensors" for k in range(2)]
    before = evaluated(models[1], x)
    same(evaluated(models[0], x), before)
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                p.mul_(1.1)
    for model, file in zip(models, files, strict=True):
        safetensors.save_model(model, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    for model in twins(name):
        same(evaluated(model, x), before)
        safetensors.load_model(model, files[0])
        moved(before, evaluated(model, x))
        same(evaluated(model, x), evaluated(models[1], x))
