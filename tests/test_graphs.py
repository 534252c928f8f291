"""`regnet_fast.graphed`: when a call is recorded, replayed, recorded anew or left alone, and what its results share.

There is no GPU here. A stand-in takes the place of the one class that talks to CUDA: it keeps a deep copy of the model
as it was when it was recorded, has one static input and one static result, and so shows every replay that is stale and
every result that is overwritten. tests/gpu runs the real one.
"""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import timm
import torch
from helpers import randomize_bn
from torch import nn
from torch.utils import _pytree as pytree

import regnet_fast
from regnet_fast import graphs
from regnet_fast.blocks.fused import FallbackWarning
from regnet_fast.trials import cpu


class End:
    def wait(self):
        pass


class StandIn:
    made = 0

    def __init__(self, call, x, pool):
        type(self).made += 1
        self.input, self.end = torch.empty_like(x).copy_(x), End()
        self.results = call(self.input)
        owner = getattr(call, "__self__", None)  # None where autocast wraps the call
        self.run = copy.deepcopy(owner) if owner is not None else call
        self.busy = False

    @staticmethod
    def refuse(x):
        return None

    @staticmethod
    def pool():
        return object()

    @staticmethod
    def on(device):
        return torch.no_grad()

    @staticmethod
    def here():
        return torch.no_grad()

    def replay(self, x):
        assert not self.busy, "two replays at the same time"
        self.busy = True
        self.input.copy_(x)
        fresh = self.run(self.input)
        pytree.tree_map(lambda old, new: old.copy_(new), self.results, fresh)
        results = pytree.tree_map_only(torch.Tensor, torch.clone, self.results)
        self.busy = False
        return results


@pytest.fixture
def captures(monkeypatch):
    monkeypatch.setattr(StandIn, "made", 0)
    monkeypatch.setattr(graphs, "Capture", StandIn)
    return lambda: StandIn.made


def make(name="regnety_002", **options):
    model = timm.create_model(name, **options).eval()
    randomize_bn(model, 0)
    return regnet_fast.rebuild(model).model


@pytest.fixture
def model():
    return make()


@pytest.fixture
def x(seed):
    return torch.randn(2, 3, 64, 64)


@torch.no_grad()
def test_same_numbers_recorded_once(captures, model, x):
    plain = copy.deepcopy(model)
    assert regnet_fast.graphed(model) is model
    for _ in range(3):
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        x = x.flip(0)
    assert captures() == 1 and len(model._compiled_call_impl) == 1
    assert model.state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
def test_an_example_is_recorded_at_once(captures, model, x):
    regnet_fast.graphed(model, x)
    assert captures() == 1
    model(x)
    assert captures() == 1


@torch.no_grad()
def test_a_result_is_not_overwritten_by_a_later_call(captures, model, x):
    regnet_fast.graphed(model)
    first = model(x)
    kept = first.clone()
    model(x * 2)
    assert torch.equal(first, kept)


@torch.no_grad()
def test_lists_of_features(captures, x):
    model = make(features_only=True)
    expected = copy.deepcopy(model)(x)
    found = regnet_fast.graphed(model)(x)
    assert type(found) is type(expected) and len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.no_grad()
def test_each_shape_dtype_and_layout_has_its_own(captures, model, x):
    regnet_fast.graphed(model)
    plain = copy.deepcopy(model)
    inputs = [x, x[:1], x[..., :32], x.contiguous(memory_format=torch.channels_last)]
    for _ in range(2):
        for one in inputs:
            torch.testing.assert_close(model(one), plain(one), rtol=0, atol=0)
    assert captures() == len(inputs)
    model(torch.randn(4, 3, 64, 64)[1:3])  # another view of the same shape
    assert captures() == len(inputs)


@torch.no_grad()
def test_only_the_last_few_are_kept(captures, model):
    regnet_fast.graphed(model)
    for size in range(32, 32 + graphs._KEPT + 3):
        model(torch.randn(1, 3, size, 32))
    assert len(model._compiled_call_impl) == graphs._KEPT
    made = captures()
    model(torch.randn(1, 3, size, 32))
    assert captures() == made
    model(torch.randn(1, 3, 32, 32))
    assert captures() == made + 1


CHANGES = {
    "a weight in place": lambda m: m.s2.b1.conv1.conv.weight.mul_(2),
    "a weight replaced": lambda m: setattr(m.s2.b1.conv1.conv, "weight", nn.Parameter(m.s2.b1.conv1.conv.weight * 2)),
    "another memory": lambda m: setattr(m.head.fc.weight, "data", m.head.fc.weight.data * 2),
    "a statistic": lambda m: m.s1.b1.conv2.bn.running_mean.add_(1),
    "a checkpoint": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "another classifier": lambda m: m.reset_classifier(7),
    "a replaced layer": lambda m: setattr(m.s2.b1, "act3", nn.Identity()),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_recorded_anew_when_the_model_changed(captures, model, x, change):
    regnet_fast.graphed(model)
    before = model(x)
    CHANGES[change](model)
    model.eval()
    after = model(x)
    assert captures() == 2
    assert after.shape != before.shape or not torch.equal(after, before)
    torch.testing.assert_close(after, copy.deepcopy(model)(x), rtol=0, atol=0)


@torch.no_grad()
def test_a_frozen_model_is_not_looked_at_until_the_promise_is_lifted(captures, model, x, monkeypatch):
    regnet_fast.graphed(regnet_fast.freeze(model))
    before = model(x)
    model.s2.b1.conv1.conv.weight.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "replay", lambda self, x: before)
        patch.setattr(graphs.Watch, "current", lambda self: pytest.fail("a frozen model is looked at"))
        assert torch.equal(model(x), before) and captures() == 1
    model.eval()
    assert not torch.equal(model(x), before) and captures() == 2


@torch.no_grad()
def test_packed_weights_live_as_long_as_the_graph_that_reads_them(captures, model, x, monkeypatch):
    """Blocks keep the packed weights of a few shapes and dtypes; a graph reads its own for as long as it is there."""
    monkeypatch.setattr(cpu, "by_program", lambda *_: False)  # as on a GPU
    regnet_fast.graphed(model)
    model(x)
    runs = [weakref.ref(run) for run in model.s1.b1._regnet_fast_plans.popitem()[1].form.conv1._runs.values()]
    for block in model.modules():
        block.__dict__.pop("_regnet_fast_plans", None)
    gc.collect()
    assert runs and all(run() is not None for run in runs)
    regnet_fast.ungraphed(model)
    gc.collect()
    assert all(run() is None for run in runs)


def refusals(model, x):
    def hook():
        model.s1.register_forward_hook(lambda *_: None)
        return model(x)

    return {
        "a gradient may be asked for": lambda: torch.enable_grad()(model)(x),
        "one plain tensor": lambda: model(nn.Parameter(x, requires_grad=False)),
        "is empty": lambda: model(x[:0]),
        "a hook": hook,
    }


@torch.no_grad()
@pytest.mark.parametrize("reason", ["a gradient may be asked for", "one plain tensor", "is empty", "a hook"])
def test_what_is_not_recorded_runs_as_ever_and_says_why_once(captures, model, x, reason):
    regnet_fast.graphed(model)
    call = refusals(model, x)[reason]
    with pytest.warns(FallbackWarning, match=reason) as warned:
        found = call()
    assert len([w for w in warned if "CUDA graph" in str(w.message)]) == 1
    assert captures() == 0 and reason in model._compiled_call_impl.reason
    assert found.shape[1] == 1000
    model.s1._forward_hooks.clear()
    model(x)
    assert captures() == 1 and model._compiled_call_impl.reason is None


@torch.no_grad()
def test_on_a_cpu_it_says_that_a_graph_needs_a_gpu(model, x):
    expected = copy.deepcopy(model)(x)
    with pytest.warns(FallbackWarning, match="need a GPU, and the input is on cpu"):
        assert torch.equal(regnet_fast.graphed(model, x)(x), expected)


@torch.no_grad()
def test_a_call_that_no_graph_holds_is_tried_once(captures, model, x, monkeypatch):
    class Fails(StandIn):
        def __init__(self, call, x, pool):
            super().__init__(call, x, pool)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "Capture", Fails)
    regnet_fast.graphed(model)
    with pytest.warns(FallbackWarning, match="cannot be recorded: operation not permitted when stream is capturing$"):
        found = model(x)
    assert torch.equal(model(x), found) and Fails.made == 1


@torch.no_grad()
def test_the_models_own_error_is_the_users(captures, model, x):
    regnet_fast.graphed(model)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        model(x[:, :2])
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.long
def test_training_tracing_and_compilation_pass_by(captures, model, x):
    regnet_fast.graphed(model)
    model.train()(x).sum().backward()
    model.eval()
    with torch.no_grad():
        torch.jit.trace(model, x, check_trace=False)  # whose check is an ordinary call
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-4)
        regnet_fast.explain(model, tuple(x.shape))
    assert captures() == 0 and model._compiled_call_impl.reason is None


@torch.no_grad()
def test_autocast_has_its_own_and_leaves_no_cached_weights(captures, x):
    model = make("resnetv2_50d_gn", num_classes=8)  # group norms: weights that blocks do not fold are cast by autocast
    plain = copy.deepcopy(model)
    regnet_fast.graphed(model)
    model(x)
    seen, own = [], model.stem.forward

    def watched(x):
        seen.append(torch.is_autocast_cache_enabled())
        return own(x)

    model.stem.forward = watched
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        assert torch.is_autocast_cache_enabled()
        torch.testing.assert_close(found, plain(x), rtol=0, atol=0)
    assert seen and not any(seen)
    assert found.dtype == torch.bfloat16


@torch.no_grad()
def test_threads_take_turns(captures, model, x):
    plain = copy.deepcopy(model)
    regnet_fast.graphed(model)
    inputs = [torch.randn(2, 3, 64, 64) for _ in range(8)]
    results = [None] * len(inputs)

    def run(i):
        with torch.no_grad():
            results[i] = model(inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(results, inputs, strict=True):
        torch.testing.assert_close(one, plain(other), rtol=0, atol=0)
    assert captures() == 1


@torch.no_grad()
def test_two_models_have_nothing_in_common(captures, model, x):
    other = make("regnetx_002")
    expected = copy.deepcopy(model)(x), copy.deepcopy(other)(x)
    regnet_fast.graphed(model), regnet_fast.graphed(other)
    assert torch.equal(model(x), expected[0]) and torch.equal(other(x), expected[1])
    assert model._compiled_call_impl._pool is not other._compiled_call_impl._pool


@torch.no_grad()
def test_copies_pickles_and_collection(captures, x):
    model = regnet_fast.graphed(make(), x)
    assert copy.deepcopy(model)._compiled_call_impl is None
    assert pickle.loads(pickle.dumps(model))._compiled_call_impl is None
    kept = weakref.ref(model._compiled_call_impl)
    del model
    gc.collect()
    assert kept() is None


@torch.no_grad()
def test_create_model_with_graph(captures, x):
    model = regnet_fast.create_model("regnety_002", graph=True).eval()
    model(x)
    assert captures() == 1
    assert timm.create_model("regnety_002").state_dict().keys() == model.state_dict().keys()
    model(x[:1])
    assert captures() == 2
    regnet_fast.ungraphed(model)
    model(x)
    assert captures() == 2 and model._compiled_call_impl is None


def test_arguments():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got function"):
        regnet_fast.graphed(lambda x: x)
    model = nn.Linear(2, 2)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled in place with model\.compile"):
        regnet_fast.graphed(model)
