"""cuDNN's two ways of a convolution, with stand-ins for its fused calls, which a CPU has not."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from regnet_fast import backends
from regnet_fast.backends import ConvProblem, Geometry, NormActProblem, SqueezeExciteProblem, cudnn, reference
from regnet_fast.settings import settings
from regnet_fast.trials import worker
from regnet_fast.trials.candidate import Candidate, candidates, prepare, to_json

RELU = ConvProblem(
    (2, 8, 6, 5), 12, (3, 3), Geometry((2, 1), (1, 1), groups=2), "relu", True, True, torch.float32, "cpu"
)
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.fixture
def library(monkeypatch):
    """The fused calls as cuDNN defines them; `error` is what they raise, `calls` their names."""

    class Library:
        error, calls = None, []

        def relu(self, x, weight, bias, stride, padding, dilation, groups, z=0.0):
            self.calls.append("relu" if isinstance(z, float) else "add_relu")
            if self.error is not None:
                raise self.error
            return torch.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + z)

        def add_relu(self, x, weight, z, alpha, *rest):
            return self.relu(x, weight, *rest, z=alpha * z)

    one = Library()
    one.calls = []
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", one.relu)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", one.add_relu)
    return one


def operands(problem):
    x, gate = torch.randn(problem.input_shape), torch.rand(problem.input_shape[:2]) if problem.gate else None
    return x, gate, torch.randn(problem.output_shape) if problem.residual else None


def weights(problem):
    groups = problem.geometry.groups
    return torch.randn(problem.out_channels, problem.input_shape[1] // groups, *problem.kernel), torch.randn(
        problem.out_channels
    )


def check(problem, bound, w, consume=False):
    x, gate, residual = operands(problem)
    expected = reference.prepare_conv(problem, *w)(x, gate, residual, False, False)
    torch.testing.assert_close(bound(x, gate, residual, consume, False), expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("variant", ["plain", "fused"])
def test_every_variant_computes_the_same(library, variant, gate, residual):
    problem = dataclasses.replace(RELU, gate=gate, residual=residual)
    w = weights(problem)
    bound = cudnn.prepare_conv(problem, *w, variant=variant)
    for consume in (False, True):
        check(problem, bound, w, consume)
    assert library.calls == ([] if variant == "plain" else ["add_relu" if residual else "relu"] * 2)


@pytest.mark.parametrize("activation", ["none", "silu", "hardswish"])
def test_other_activations_have_the_plain_way_alone(library, activation):
    problem = dataclasses.replace(RELU, activation=activation)
    w = weights(problem)
    assert cudnn.variants(problem) == ("plain",)
    check(problem, cudnn.prepare_conv(problem, *w), w)
    assert not library.calls


@pytest.mark.parametrize("residual", [False, True])
def test_where_cudnn_has_no_engine_the_plain_call_serves_for_good(library, residual):
    problem, library.error = dataclasses.replace(RELU, residual=residual), NO_ENGINE
    w = weights(problem)
    bound = cudnn.prepare_conv(problem, *w, variant="fused")
    for consume in (True, False, True):
        check(problem, bound, w, consume)
    assert len(library.calls) == 1 and bound.label == "cuDNN" and "find an engine" in bound.refused
    other = cudnn.prepare_conv(problem, *w, variant="fused")
    check(problem, other, w)
    assert len(library.calls) == 2, "another problem asks again"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 TiB"), torch.AcceleratorError("an illegal memory access")])
def test_what_is_no_missing_engine_is_raised(library, error):
    w, library.error = weights(RELU), error
    bound = cudnn.prepare_conv(RELU, *w, variant="fused")
    for _ in range(2):
        with pytest.raises(type(error)):
            check(RELU, bound, w)
    library.error = None
    check(RELU, bound, w)
    assert len(library.calls) == 3, "the fused call is still asked"


def test_where_the_plain_call_fails_as_well_its_error_is_raised_and_nothing_decided(library, monkeypatch):
    w, library.error = weights(RELU), NO_ENGINE
    bound = cudnn.prepare_conv(RELU, *w, variant="fused")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="dead"):
        patch.setattr(F, "conv2d", lambda *_: (_ for _ in ()).throw(RuntimeError("the device is dead")))
        bound(*operands(RELU), False, False)
    library.error = None
    check(RELU, bound, w)
    assert library.calls == ["add_relu"] * 2


def test_nothing_is_fused_before_a_trial_chose_it(library):
    w = weights(RELU)
    check(RELU, cudnn.prepare_conv(RELU, *w), w)
    assert not library.calls


@pytest.mark.parametrize("means", [False, True])
def test_a_trial_refuses_what_has_no_engine_and_says_so(library, monkeypatch, means):
    monkeypatch.setitem(backends._ATEN, "cpu", cudnn)
    problem, library.error = dataclasses.replace(RELU, means=means), NO_ENGINE
    facts = {"problem": to_json(problem), "candidate": "aten:fused", "peer": "aten:plain", "rounds": 1, "card": ""}
    found = worker.answer({**facts, "settings": settings()}, lambda phase: None)
    assert found["status"] == "refused" and "find an engine" in found["reason"]


@pytest.mark.parametrize("name", ["deterministic", "benchmark"])
def test_settings_that_the_fused_call_does_not_obey_leave_it_aside(monkeypatch, name):
    assert cudnn.variants(RELU) == ("plain", "fused")
    monkeypatch.setattr(torch.backends.cudnn, name, True)
    assert cudnn.variants(RELU) == ("plain",)


def test_the_plain_way_is_the_peer_under_a_name_that_stays(monkeypatch):
    monkeypatch.setattr(cudnn, "refuse", lambda problem: None)
    on_gpu = dataclasses.replace(RELU, device="cuda:0")
    assert [*map(str, candidates(on_gpu))] == ["aten:plain", "aten:fused"]
    assert [*map(str, candidates(dataclasses.replace(on_gpu, activation="silu")))] == ["aten:plain"]
    for problem in (
        SqueezeExciteProblem(2, 16, 4, "relu", torch.float32, "cuda:0"),
        NormActProblem((1, 2, 3, 4), "relu", True, torch.float32, "cuda:0"),
    ):
        assert candidates(problem)[0] == Candidate("aten")


def test_a_candidate_is_prepared_by_its_name(library, monkeypatch):
    monkeypatch.setitem(backends._ATEN, "cpu", cudnn)
    w = weights(RELU)
    for name, calls in (("aten:plain", 0), ("aten:fused", 1)):
        check(RELU, partial(prepare(RELU, w, Candidate.named(name))), w)
        assert len(library.calls) == calls
