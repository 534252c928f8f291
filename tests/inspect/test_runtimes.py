"""Other runtimes: that they compute the model, what they are told, and why they cannot."""

import pytest
import timm
import torch
from helpers import randomize_bn
from torch import nn

from regnet_fast.inspect import runtimes
from regnet_fast.inspect.judging import judge
from regnet_fast.inspect.timing import Timed, interleave

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_a_runtime_computes_the_model_from_the_image_as_it_lies_there(name, dtype):
    if reason := runtimes.refuse(name, dtype):
        pytest.skip(reason)
    model = randomize_bn(timm.create_model("regnety_002"), 0).eval().to(dtype)
    x = torch.randn(1, 3, 64, 64).to(dtype)
    call = runtimes.Call(name, model, x)
    with torch.no_grad():
        eager, before = model(x), call().clone()
        check = judge(name, before.to(dtype), eager, model.double()(x.double()), runtimes.ERROR_RATIO)
        assert check.ok, check.failure
        if dtype == FLOAT32:  # which is not copied
            x.mul_(2)
            assert not torch.equal(call(), before)


@pytest.mark.long
@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_a_model_of_transformers_has_its_logits_by_a_runtime(name):
    """Whose own result is a record of several fields."""
    transformers = pytest.importorskip("transformers")
    if reason := runtimes.refuse(name, FLOAT32):
        pytest.skip(reason)
    config = transformers.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8)
    model, x = transformers.RegNetForImageClassification(config).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(runtimes.Call(name, model, x)(), model(x).logits)


def test_a_runtime_that_is_missing_or_has_no_such_dtype_is_refused(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    for name in runtimes.RUNTIMES:
        assert "not installed; pip install 'regnet_fast[runtimes]'" in runtimes.refuse(name, FLOAT32)
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: object())
    assert runtimes.refuse("onnxruntime", FLOAT32) is None
    assert runtimes.refuse("onnxruntime", BFLOAT16) == "it computes no bfloat16 on a CPU"
    assert runtimes.refuse("openvino", torch.float16) == "it computes no float16 on a CPU"
    monkeypatch.setattr(runtimes, "_knows_bfloat16", lambda: False)
    assert runtimes.refuse("openvino", BFLOAT16) == "it computes no bfloat16 on this CPU"


def test_a_runtime_has_the_threads_of_torch_and_the_precision_of_the_case():
    for name, dtype, told in (
        ("openvino", FLOAT32, "f32"),
        ("openvino", BFLOAT16, "bf16"),
        ("onnxruntime", FLOAT32, 1),
    ):
        call = runtimes.Call(name, nn.Identity(), torch.ones(1, dtype=dtype))
        assert {torch.get_num_threads(), told} <= set(call.settings.values())


def test_a_call_that_is_not_timed_comes_before_each_sample():
    calls = []
    timed = Timed("", lambda: calls.append(1))
    interleave([timed], 0)
    warm, timed.iterations = len(calls), 3
    timed.rested_sample()
    assert len(calls) == warm + 1 + 3
