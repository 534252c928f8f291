"""torch.compile and torch.export of rebuilt models: through the operators, at any batch, here and for a GPU."""

import pytest
import torch
from helpers import randomize_bn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import regnet_fast

LONG = ("regnetx_002", "regnetz_005", "resnetv2_18")
MODELS = ["regnety_002", "regnetv_040", "repvgg_a0", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]
OPERATORS = {
    "regnetx_002": {"pointwise_conv", "grouped_conv", "dense_conv"},
    "regnety_002": {"conv", "squeeze_excite"},
    "regnetz_005": {"conv", "squeeze_excite"},
    "regnetv_040": {"conv", "squeeze_excite", "norm_act"},
    "repvgg_a0": {"conv"},
    "resnetv2_18": {"conv", "norm_act"},
}


BARE_STEMS = ("regnetv_040",)
"""A convolution that stands in the model itself, in no block, is timm's."""


def make(name):
    model = regnet_fast.create_model(name).eval()
    randomize_bn(model, 0)
    return model


def operators(graph) -> list[str]:
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("regnet_fast.")]


def foreign_convolutions(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "aten.conv" in str(node.target)]


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_exported_with_any_batch(name, seed):
    model = make(name)
    x = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert set(operators(exported.graph)) == OPERATORS[name]
    assert len(foreign_convolutions(exported.graph)) == (name in BARE_STEMS)
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("regnety_002", torch.no_grad, marks=pytest.mark.slow),
        ("resnetv2_18", torch.no_grad),
        pytest.param("resnetv2_18", torch.inference_mode, marks=pytest.mark.slow),
    ],
)
def test_compiled_once_for_any_batch(name, mode, seed, fresh_compiler):
    model = make(name)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with mode():
        for n in (2, 3, 5):
            x = torch.randn(n, 3, 64, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.long
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_exported_for_a_gpu_without_one(name, dtype):
    """The operators are in the graph, and the fakes promise every result on the GPU, in its dtype and layout."""
    model = regnet_fast.create_model(name).eval()
    with FakeTensorMode() as mode:
        for table in (table for m in model.modules() for table in (m._parameters, m._buffers)):
            for key, t in table.items():
                fake = None if t is None else mode.from_tensor(t).detach().to("cuda", dtype)
                table[key] = nn.Parameter(fake, requires_grad=False) if isinstance(t, nn.Parameter) else fake
        x = torch.empty(2, 3, 64, 64, device="cuda", dtype=dtype)
        exported = torch.export.export(model, (x,))
    assert set(operators(exported.graph)) == OPERATORS[name]
    assert len(foreign_convolutions(exported.graph)) == (name in BARE_STEMS)
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if str(node.target).startswith("regnet_fast.") and isinstance(value, torch.Tensor):
            assert value.device.type == "cuda"
            if value.dim() == 4:
                assert value.dtype == dtype and value.is_contiguous(memory_format=torch.channels_last)
