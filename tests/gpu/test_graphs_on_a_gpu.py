"""CUDA graphs on a real device: the numbers of the same model without one, streams, two models, and memory."""

import copy
import gc
import threading

import pytest
import torch

import regnet_fast
from regnet_fast.inspect.verify import host_model, randomize_norms
from regnet_fast.models import rebuild

MODELS = ("regnetx_002", "regnety_002", "regnetz_005", "regnetv_040", "repvgg_a0", "resnetv2_18")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]


def make(name, dtype=torch.float32):
    return rebuild(randomize_norms(host_model(name)).eval()).model.to("cuda", dtype)


def assert_same(found, expected):
    """The same kernels made both: within a rounding of the largest value, far less than two inputs differ by."""
    close = 2 * torch.finfo(expected.dtype).eps if expected.dtype != torch.float32 else 1e-5
    assert float((found - expected).abs().max()) <= close * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers(name, backend, dtype):
    model = make(name, dtype)
    plain = copy.deepcopy(model)
    regnet_fast.graphed(model)
    with regnet_fast.backend(backend):
        for batch in (1, 3, 1):
            x = torch.randn(batch, 3, 96, 96, device="cuda", dtype=dtype)
            assert_same(model(x), plain(x))
    assert len(model._compiled_call_impl) == 2 and model._compiled_call_impl.reason is None


@torch.no_grad()
def test_a_changed_weight_is_seen():
    model = make("regnety_002")
    x = torch.randn(2, 3, 96, 96, device="cuda")
    regnet_fast.graphed(model)
    before = model(x)
    model.s2.b1.conv1.conv.weight.mul_(2)
    after = model(x)
    assert not torch.equal(before, after)
    assert_same(after, copy.deepcopy(model)(x))


@torch.no_grad()
def test_two_models_on_two_streams():
    models = [make("regnety_002"), make("regnetx_002")]
    plain = [copy.deepcopy(model) for model in models]
    for model in models:
        regnet_fast.graphed(model)
    inputs = [torch.randn(4, 3, 96, 96, device="cuda") for _ in range(16)]
    expected = [[model(x) for x in inputs] for model in plain]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = [[], []]
    for i, x in enumerate(inputs):  # each model is called from every stream, without waiting in between
        for j, model in enumerate(models):
            with torch.cuda.stream(streams[(i + j) % len(streams)]):
                found[j].append(model(x))
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)


@torch.no_grad()
def test_memory_is_freed():
    model = make("regnety_002")
    x = torch.randn(64, 3, 224, 224, device="cuda")
    model(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    regnet_fast.graphed(model, x)
    assert torch.cuda.memory_reserved() > before
    regnet_fast.ungraphed(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (2 << 20)


@torch.no_grad()
def test_what_no_graph_holds_runs_as_ever():
    class Synchronises(torch.nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    model = Synchronises().cuda().eval()
    x = torch.randn(4, device="cuda")
    regnet_fast.graphed(model)
    with pytest.warns(regnet_fast.FallbackWarning, match="cannot be recorded"):
        torch.testing.assert_close(model(x), x * x.sum())
    torch.testing.assert_close(model(x + 1), (x + 1) * (x + 1).sum())


class Elsewhere(torch.nn.Module):
    """Computes on a stream of its own, beside the one that is recorded."""

    def __init__(self):
        super().__init__()
        self.stream = torch.cuda.Stream()

    def forward(self, x):
        with torch.cuda.stream(self.stream):
            return x * 2


@torch.no_grad()
def test_a_recording_of_nothing_is_refused():
    for model in (torch.nn.Identity().eval(), Elsewhere().eval()):
        regnet_fast.graphed(model)
        inputs = [torch.randn(4, device="cuda") for _ in range(3)]
        torch.cuda.synchronize()
        with pytest.warns(regnet_fast.FallbackWarning, match="cannot be recorded"):
            found = [model(x) for x in inputs]
        torch.cuda.synchronize()
        for one, x in zip(found, inputs, strict=True):
            torch.testing.assert_close(one, x if isinstance(model, torch.nn.Identity) else 2 * x)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_gpus(order):
    """torch keeps one stream for all recordings of a process, on whichever GPU came first."""
    for device in order:
        with torch.cuda.device(device):
            model = make("regnety_002").to(f"cuda:{device}")
        plain = copy.deepcopy(model)
        regnet_fast.graphed(model)
        for _ in range(3):
            x = torch.randn(2, 3, 96, 96, device=f"cuda:{device}")
            with torch.cuda.device(1 - device):
                assert_same(model(x), plain(x))
        assert model._compiled_call_impl.reason is None


@torch.no_grad()
def test_what_was_recorded_for_a_thread_outlives_it():
    """torch lets cuDNN's plans of a thread go when it ends."""
    model = make("regnety_002", torch.float16)
    plain = copy.deepcopy(model)
    regnet_fast.graphed(model)
    x = torch.randn(2, 3, 96, 96, device="cuda", dtype=torch.float16)
    thread = threading.Thread(target=torch.no_grad()(model), args=(x,))
    thread.start()
    thread.join()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for _ in range(3):
        assert_same(model(x), plain(x))
        x = x.flip(0)
    assert len(model._compiled_call_impl) == 1


@torch.no_grad()
@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_recorded_by_the_user(called, graphed):
    """The graph is of the host's own forward, and follows the weights; calls before and after it are right as well."""
    model = make("regnety_002")
    plain = copy.deepcopy(model)
    if graphed:
        regnet_fast.graphed(model)
    x = torch.randn(2, 3, 96, 96, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (model if called else plain)(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(regnet_fast.FallbackWarning), torch.cuda.graph(graph):
        y = model(x)
    for factor in (1, 2):
        for m in (model, plain):
            m.s2.b1.conv1.conv.weight.mul_(factor)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, plain(x), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-2, atol=1e-2)
