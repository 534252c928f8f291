"""Problems of several results: each is held to float64's, in this process."""

import dataclasses
import json
from functools import partial

import planted
import pytest
import torch
from test_session import PAIR, PROBLEM

import regnet_fast.functional as R
from regnet_fast import backends
from regnet_fast.backends import (
    BackToBackProblem,
    Geometry,
    JoinProblem,
    PairProblem,
    Selection,
    cuda,
    cudnn,
    onednn,
    reference,
    triton,
)
from regnet_fast.backends.problem import Call, Run
from regnet_fast.ops import convolution
from regnet_fast.ops.convolution import PackedConv
from regnet_fast.trials import candidate, serving
from regnet_fast.trials.candidate import Candidate
from regnet_fast.trials.check import Wrong, verify
from regnet_fast.trials.cpu import words

PAIR_OF = (8, 1, "relu"), (24, 2, "none")
MEANS = dataclasses.replace(PROBLEM, means=True)
PEER = partial(candidate.bound, reference)

pytestmark = pytest.mark.usefixtures("one_thread")


def verified(problem, variant):
    with torch.inference_mode():
        return verify(problem, partial(candidate.bound, planted, variant=variant), PEER)


@pytest.mark.parametrize("variant", ["Plain", "Parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_that_are_right(variant, dtype):
    assert verified(dataclasses.replace(MEANS, dtype=dtype), variant) < 3


@pytest.mark.parametrize(
    ("variant", "message"), [("WrongMeans", "the means: .*error"), ("MapWrongWithMeans", "^the la")]
)
def test_means_that_are_wrong_or_spoil_the_map(variant, message):
    with pytest.raises(Wrong, match=message):
        verified(MEANS, variant)
    verified(PROBLEM, variant)


def test_a_residual_is_not_lost_where_the_backend_has_the_means_of_a_plain_convolution():
    problem = dataclasses.replace(MEANS, residual=True)
    assert verified(problem, "Parts") < 3


def test_packed_weights_ask_for_a_choice_of_their_own_with_means(monkeypatch):
    """On a GPU; on a CPU it is one problem, and the weights are packed once."""
    asked = []

    class Bound(Run):
        label = "bound"

        def __call__(self, *arguments):
            return torch.ones(1, 4, 3, 3, dtype=torch.float32, device="meta")

    def prepare_conv(problem, weight, bias):
        asked.append(problem.means)
        return Bound()

    monkeypatch.setattr(reference, "prepare_conv", prepare_conv)
    packed, x = R.pack_conv(torch.randn(4, 4, 3, 3, device="meta"), padding=1), torch.randn(1, 4, 3, 3, device="meta")
    for means in (False, True, True, False):
        packed(x, means=means)
    assert asked == [False, True]
    assert packed.problem(x, None, None, True).means


def test_packed_weights_on_a_cpu_are_one_problem_with_means_or_without():
    packed, x = R.pack_conv(torch.randn(4, 4, 3, 3), padding=1), torch.randn(1, 4, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    y = packed(x)
    again, means = packed(x, means=True)
    assert isinstance(packed, PackedConv) and len(packed._runs) == 1 and torch.equal(y, again)
    torch.testing.assert_close(means, y.mean((2, 3)))
    assert packed.problem(x, None, None, True) == packed.problem(x)


# Pairs


def test_a_pair_is_of_one_form():
    assert PairProblem.of(PAIR.first, PAIR.other) == PAIR
    assert (PAIR.first.geometry.stride, PAIR.other.geometry.stride) == ((1, 1), (2, 2))
    others = dict(activation="relu", geometry=Geometry((2, 1)), kernel=(3, 3), residual=True, means=True, gate=True)
    for name, value in others.items():
        assert PairProblem.of(PAIR.first, dataclasses.replace(PAIR.other, **{name: value})) is None
    assert PairProblem.of(dataclasses.replace(PAIR.first, geometry=Geometry((2, 2))), PAIR.other) is None
    read_once = PAIR.first.bytes + PAIR.other.bytes - 4 * 16 * 8 * 8 * 4
    assert PAIR.bytes == read_once and PAIR.flops == PAIR.first.flops + PAIR.other.flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pair_that_is_right(stride, dtype):
    assert verified(dataclasses.replace(PAIR, stride=stride, dtype=dtype), "Pair") < 3


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("WrongOther", "the other convolution: the largest error"),
        ("OtherUnwritten", "unwritten"),
        ("OtherInTheMiddle", "the other convolution: an image in the middle"),
    ],
)
def test_a_pair_whose_second_result_is_wrong(variant, message):
    with pytest.raises(Wrong, match=message):
        verified(PAIR, variant)


class Recycling:
    """Memory that was let go and is handed out again as it is, by its size, as torch's allocator does on a GPU."""

    def __init__(self, monkeypatch):
        self.blocks, self.full_like = [], torch.full_like
        monkeypatch.setattr(torch, "full_like", self.filled)

    def filled(self, t, value, **options):
        made = self.full_like(t, value, **options)
        self.blocks.append(made.flatten().clone())
        return made

    def empty(self, like):
        for i, block in enumerate(self.blocks):
            if block.numel() == like.numel():
                return self.blocks.pop(i).view(like.shape)
        return torch.zeros_like(like)


@pytest.mark.parametrize("gate", [False, True])
def test_nothing_times_what_lay_there_before_is_seen(monkeypatch, gate):
    """As of cudnn_convolution_relu, which hands its own unwritten result to cuDNN as what to add, times zero; a gated
    input is made before that.
    """
    memory = Recycling(monkeypatch)

    class Fused(planted.Plain):
        adds = False

        def __call__(self, x, gate, *rest):
            if gate is not None:
                memory.empty(x)
            y = super().__call__(x, gate, *rest)
            stale = memory.empty(y)
            return y + 0 * stale if self.adds else y

    monkeypatch.setitem(planted.FAULTS, "Fused", Fused)
    problem = dataclasses.replace(PROBLEM, gate=gate)
    assert verified(problem, "Fused") < 3
    monkeypatch.setattr(Fused, "adds", True)
    with pytest.raises(Wrong, match="leaves values unwritten, or makes them NaN"):
        verified(problem, "Fused")


def test_one_result_is_no_pair():
    with pytest.raises(Wrong, match="1 result where there are 2"):
        verified(PAIR, "OneAlone")


def test_triton_has_both_ways_of_a_pair_and_the_peer_is_another(monkeypatch):
    on_gpu = dataclasses.replace(PAIR, device="cuda:0")
    for module in (cudnn, triton):
        monkeypatch.setattr(module, "refuse", lambda problem: None)
    assert [*map(str, candidate.candidates(on_gpu))] == ["aten", "triton:apart", "triton:beside"]


@pytest.mark.parametrize("module", [cudnn, onednn, reference], ids=lambda module: module.__name__)
def test_the_convolutions_of_a_pair_one_after_the_other(module):
    with torch.inference_mode():
        assert verify(PAIR, partial(candidate.bound, module), PEER) < 3


@pytest.mark.parametrize("chosen", [None, "aten", "triton:apart", "triton:beside"])
def test_a_pair_is_computed_from_one_read_by_a_verdict_alone(monkeypatch, chosen):
    asked = []

    class Bound(Run):
        def beside(self, other, x):
            return x, x

    def choose(problem):
        asked.append(problem)
        return chosen and Candidate.named(chosen)

    monkeypatch.setattr(convolution.session, "chosen", choose)
    convolution._beside.cache_clear()
    one, other = (R.pack_conv(torch.randn(k, 16, 1, 1), stride=s, activation=a) for k, s, a in PAIR_OF)
    monkeypatch.setattr(PackedConv, "run_for", lambda *_: Bound())
    x = torch.randn(PAIR.input_shape)
    for _ in range(2):
        assert (one.beside(other, x) is None) == (chosen != "triton:beside")
    assert asked == [PAIR], "the verdict is looked up once"
    assert other.beside(one, x) is None and len(asked) == 1
    with backends.backend("triton"):
        assert one.beside(other, x) is not None
    monkeypatch.setattr(convolution.session, "generation", convolution.session.generation + 1)
    one.beside(other, x)
    assert asked == [PAIR] * 2
    convolution._beside.cache_clear()


BOTH = BackToBackProblem((2, 16, 9, 7), 24, 3, "silu", "relu", 2, torch.bfloat16, "cpu", means=True)


def test_two_convolutions_back_to_back_are_of_one_form():
    assert BackToBackProblem.of(*BOTH.both) == BOTH
    assert BOTH.second.output_shape == (2, 24, 5, 4) and BOTH.second.means and not BOTH.first.means
    changes = ({"gate": True}, {"residual": True}, {"kernel": (5, 5)}, {"dtype": torch.float16}, {"out_channels": 48})
    changes += tuple({"geometry": BOTH.second.geometry._replace(groups=groups)} for groups in (1, 24))
    changes += tuple({"geometry": BOTH.second.geometry._replace(**{name: (2, 1)})} for name in ("stride", "dilation"))
    for change in changes:
        found = BackToBackProblem.of(BOTH.first, dataclasses.replace(BOTH.second, **change))
        assert (found is None) == (change != {"geometry": BOTH.second.geometry._replace(groups=24)})
    assert BackToBackProblem.of(dataclasses.replace(BOTH.first, geometry=Geometry((2, 2))), BOTH.second) is None
    assert candidate.from_json(json.loads(json.dumps(candidate.to_json(BOTH)))) == BOTH
    assert words(BOTH) != words(dataclasses.replace(BOTH, first_activation="none"))


@pytest.mark.parametrize("module", [cudnn, onednn, reference], ids=lambda module: module.__name__)
@pytest.mark.parametrize("operands", [(True, True), (False, True), (True, False)])
def test_the_end_of_a_block(module, operands):
    problem = JoinProblem((3, 24, 5, 6), "relu", *operands, torch.bfloat16, "cpu")
    with torch.inference_mode():
        assert verify(problem, partial(candidate.bound, module), PEER) < 3
    assert candidate.from_json(json.loads(json.dumps(candidate.to_json(problem)))) == problem


@pytest.mark.parametrize("module", [cudnn, onednn, reference], ids=lambda module: module.__name__)
@pytest.mark.parametrize("means", [False, True])
def test_two_convolutions_in_turn(module, means):
    problem = dataclasses.replace(BOTH, means=means)
    with torch.inference_mode():
        assert verify(problem, partial(candidate.bound, module), PEER) < 3


@pytest.mark.parametrize("chosen", [None, "aten", "cuda:in turn", "cuda:fused"])
def test_two_convolutions_are_joined_by_a_verdict_alone(monkeypatch, chosen):
    asked, problem = [], dataclasses.replace(BOTH, device="cuda:0")

    def look(problem):
        asked.append(problem)
        return chosen and Candidate.named(chosen), True

    monkeypatch.setattr(serving.session, "look", look)
    monkeypatch.setattr(serving, "library", lambda name, device: {"cuda": cuda, "aten": reference}[name])
    monkeypatch.setattr(serving, "select", lambda problem: Selection("aten", reference))
    run = Call(lambda x: (x, "means"), "")
    monkeypatch.setattr(cuda, "prepare_back_to_back", lambda problem, *weights, variant: run)
    first = R.pack_conv(torch.randn(24, 16, 1, 1).bfloat16(), activation="silu")
    second = R.pack_conv(torch.randn(24, 8, 3, 3).bfloat16(), stride=2, padding=1, groups=3, activation="relu")
    x = OnGpu((2, 16, 9, 7))
    for _ in range(2):
        assert first.ahead(second, x, True) == ((x, "means") if chosen == "cuda:fused" else None)
    assert asked == [problem], "the verdict is looked up once"
    assert second.ahead(first, x, True) is None and first.ahead(object(), x, True) is None
    assert first.ahead(second, backends.Deferred(Run(), torch.randn(2, 16, 9, 7), None), True) is None
    assert first.ahead(second, torch.randn(2, 16, 9, 7), True) is None, "nothing is asked on a CPU"
    assert len(asked) == 1


class OnGpu:
    """What is asked of a map on a GPU."""

    dtype, device = torch.bfloat16, torch.device("cuda:0")

    def __init__(self, shape):
        self.shape = torch.Size(shape)


def test_what_is_normalised_as_it_is_read_has_no_verdict(monkeypatch):
    monkeypatch.setattr(convolution.session, "chosen", lambda problem: pytest.fail("asked"))
    one, other = (R.pack_conv(torch.randn(k, 16, 1, 1), stride=s, activation=a) for k, s, a in PAIR_OF)
    x = backends.Deferred(Run(), torch.randn(PAIR.input_shape), None)
    assert not convolution.beside_allowed(one, other, x)
