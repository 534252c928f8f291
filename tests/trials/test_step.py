"""Training steps as problems of trials: what is put aside, and which way a block takes before and after."""

import copy
import json
import os
from functools import partial
from pathlib import Path

import planted_steps
import pytest
import torch
from helpers import own_cache
from planted_steps import Fast
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_blocks import assert_equal_states, pair_of, state_of

import regnet_fast
from regnet_fast import store
from regnet_fast.backends import BackendError, backend, forced_backend
from regnet_fast.backends.passes import choices, compiled
from regnet_fast.blocks import fused, tried
from regnet_fast.observer import observing
from regnet_fast.store.verdicts import entries
from regnet_fast.trials import session, worker
from regnet_fast.trials.candidate import Candidate, candidates, from_json, prepare, to_json
from regnet_fast.trials.check import Wrong, verify
from regnet_fast.trials.cpu import words
from regnet_fast.trials.modes import mode
from regnet_fast.trials.session import Session
from regnet_fast.trials.step import PEER, Step, pose

HERE = Path(__file__).parent
PHASES = dict.fromkeys(("start", "compile", "verify", "time"), 100.0)
NAME = "Bottleneck of width 8"
HOSTS = Candidate(PEER)
HOST = "its step was not tried on this device"


@pytest.fixture(autouse=True)
def planted(tmp_path, monkeypatch):
    own_cache(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE, HERE.parents[1]))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("REGNET_FAST_TRIALS_BUDGET", "1000")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    store._warned.clear()
    planted_steps.plant(monkeypatch.setattr)
    with mode("on"):
        yield lambda *names: monkeypatch.setenv("PLANTED", ",".join(names))


class Here:
    """The process that tries candidates, in this one."""

    def __init__(self, command, environment=None):
        if command == ["/nowhere"]:
            raise AssertionError("nothing is tried here")

    def started(self):
        pass

    end = kill = started

    def ask(self, question, deadlines):
        return json.loads(json.dumps(worker.answer(json.loads(json.dumps(question)), lambda phase: None)))


@pytest.fixture
def gate(planted, monkeypatch):
    """A CPU as a device whose passes nobody trusts, with a session of its own that tries in this process."""

    def new(**options):
        one = Session(devices=("cpu",), **options)
        monkeypatch.setattr(tried, "session", one)
        return one

    monkeypatch.setattr(session, "Child", Here)
    monkeypatch.setattr(worker, "timer", planted_steps.timer)

    planted("Fast", "OneGradient")
    monkeypatch.setattr(fused, "asked", lambda x: forced_backend() is None)
    monkeypatch.setattr(Fast, "calls", 0)
    return new


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def images(channels=48, size=(12, 10), dtype=torch.float32):
    x = torch.randn(3, channels, *size).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def posed(block=None, x=None):
    return pose(pair_of(NAME)[0] if block is None else block, images() if x is None else x, torch.float32)


def heard(block, x):
    """Why the block is left to the host, or None."""
    found = []
    with observing(block=lambda block, x, plan, reason: found.append(reason)):
        block(x)
    return found[0]


def stepped(block, x):
    block.zero_grad()
    y = block(x)
    y.square().mean().backward()
    return {"y": y.detach()} | state_of(block)


# Trials

FAULTS = {
    "OneGradient": ("wrong", "the gradient of conv"),
    "NormGradient": ("wrong", "the gradient of conv"),
    "Statistics": ("wrong", ""),
    "LargeMaps": ("wrong", "of the real size"),
    "LastImage": ("wrong", "the output"),
    "Nan": ("wrong", "NaN"),
    "SecondCall": ("wrong", "the output: two calls differ"),
    "ChangesTheGradient": ("wrong", "it changes an input"),
    "ChangesAWeight": ("wrong", "it changes conv"),
    "RaisesBackward": ("refused", "ptxas fatal"),
    "OutOfMemory": ("out of memory", "2 TiB"),
    "Segfault": ("crashed", "SIGSEGV"),
    "Slow": ("verified", "not faster"),
    "HardlyFaster": ("verified", "not faster"),
    "Fast": ("verified", ""),
}


@pytest.mark.long
def test_every_fault_is_put_aside_with_the_right_word(planted):
    planted(*FAULTS)
    one, problem, told = Session(modules=["planted_steps"], phases=PHASES, devices=("cpu",)), posed(), []
    assert one.chosen(problem) is None
    one.settle(limit=1e9, told=told.append)
    (verdict,) = told
    for name, (status, reason) in FAULTS.items():
        outcome = verdict.outcomes[name]
        assert outcome.status == status and reason in outcome.reason, (name, outcome)
    assert verdict.chosen == "Fast" and verdict.outcomes["Fast"].peer_us == 100
    assert Session(command=["/nowhere"], devices=("cpu",)).chosen(problem) == Candidate("Fast")


def verified(problem, name="aten"):
    bind = [partial(prepare, candidate=Candidate(one)) for one in (name, PEER)]
    with torch.inference_mode():  # as in the process that tries candidates
        return verify(problem, *bind)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("name", ["stem", "Bottleneck, average pool", "PreActBottleneck, strided", "RepVggBlock"])
def test_right_passes_are_verified(name, act):
    block = pair_of(name, act)[0]
    first = next(block.parameters())
    channels = first.shape[1] if first.dim() == 4 else first.shape[0]
    assert verified(posed(block, images(channels))) < 2


@pytest.mark.parametrize(
    "name", ["conv2.bn.running_var", "conv3.bn.num_batches_tracked", "the gradient of se.fc2.bias"]
)
def test_every_result_is_held_to_the_host(name):
    class Off(Step):
        def results(self, *call):
            found = super().results(*call)
            return {**found, name: found[name] * 2 if name.endswith("tracked") else found[name] * 1.0001}

    with torch.inference_mode(), pytest.raises(Wrong, match=f"^{name}"):
        verify(posed(), lambda problem, weights: Off(problem, *weights, "aten"), partial(prepare, candidate=HOSTS))


def test_16_bits_are_judged_though_values_change_their_side_of_a_relu():
    block, x = pair_of(NAME)[0], images(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        problem = pose(block, x, torch.bfloat16)
    assert "autocast from bfloat16" in words(problem)
    verified(problem)
    with pytest.raises(Wrong, match="RMS error"):
        verified(problem, "Statistics")


def test_stochastic_depth_frozen_norms_and_frozen_weights_are_part_of_a_step():
    block = pair_of(NAME)[0]
    block.drop_path = DropPath(0.4).train()
    block.conv2.bn.eval()
    block.conv1.requires_grad_(False)
    problem = posed(block, images().detach())
    assert not problem.needs_x
    verified(problem)


# Problems


def test_a_problem_survives_the_way_to_the_child():
    problem = posed()
    again = from_json(json.loads(json.dumps(to_json(problem))))
    assert again == problem and again.pickled == problem.pickled and hash(again) == hash(problem)
    assert problem.bytes == 4 * 3 * 48 * 12 * 10 and "Bottleneck(" in words(problem)


def test_a_block_travels_without_weights_and_whoever_listens():
    block = pair_of(NAME)[0]
    block.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(block.state_dict())
    assert len(posed(block).pickled) < 40_000
    assert len(block._forward_hooks) == 1
    assert_equal_states(block.state_dict(), before)


def test_equal_blocks_share_a_problem():
    one, other = (pair_of(NAME)[0] for _ in range(2))
    other.conv1.bn.eps = 1e-3
    assert posed(one) == posed(other) and words(posed(one)) == words(posed(other))


CHANGES = {
    "groups": lambda block: setattr(block.conv2.conv, "groups", 1),
    "a norm's mode": lambda block: block.conv2.bn.eval(),
    "a frozen weight": lambda block: block.conv1.conv.weight.requires_grad_(False),
    "layout": lambda block: block.to(memory_format=torch.channels_last),
    "dtype": lambda block: block.bfloat16(),
    "activation": lambda block: setattr(block.conv1.bn, "act", nn.SiLU()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_blocks_are_other_problems(what):
    before, after = (pair_of(NAME)[0] for _ in range(2))
    CHANGES[what](after)
    assert words(posed(before)) != words(posed(after))


def test_other_inputs_are_other_problems():
    block, x = pair_of(NAME)[0], images()
    others = [images(size=(9, 9)), x.detach(), x.contiguous().detach().requires_grad_(), x.bfloat16()]
    assert len({words(posed(block, one)) for one in (x, *others[:3])}) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert words(posed(block, x)) != words(posed(block, others[3])) != words(posed(block, x.detach()))


def test_which_candidates_there_are(monkeypatch):
    from regnet_fast.backends.cuda import launcher
    from regnet_fast.trials import step

    monkeypatch.setattr(step, "choices", choices)
    monkeypatch.setattr("regnet_fast.backends.BACKENDS", ("aten", "triton", "cuda", "reference"))
    x = images()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choices(x, True) == ["aten"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launcher, "refuse_device", lambda device: None)
    assert choices(x, False) == ["aten", "triton"]
    assert [*map(str, candidates(posed()))] == ["reference", "cuda,aten", "cuda,triton", "aten", "triton"]
    for name in choices(x, True):
        with backend(name):
            pass


# Which way a block takes


def test_the_host_answers_first_and_the_chosen_passes_from_the_second_step_on(gate, monkeypatch):
    one, (block, host), x = gate(), pair_of(NAME), images()
    expected = stepped(host, x)
    assert_equal_states(stepped(block, x), expected, 0.0)
    assert not Fast.calls and one.waiting
    block.train().eval().train()
    stepped(block, x)
    assert Fast.calls and not one.waiting
    ((_, verdict, _),) = entries()
    assert verdict.chosen == "Fast" and verdict.outcomes["OneGradient"].status == "wrong"
    assert heard(block, x) is None

    monkeypatch.setattr(Fast, "calls", 0)
    gate(command=["/nowhere"])  # as the next process
    block = pair_of(NAME)[0]
    assert heard(block, x) is None and Fast.calls == 3
    with mode("stored"):
        assert heard(block, x) is None
    with mode("off"):
        assert HOST in heard(block, x)
    assert heard(block, x) is None


def test_what_is_not_faster_leaves_the_step_to_the_host(gate, planted):
    gate()
    planted("HardlyFaster")
    block, x = pair_of(NAME)[0], images()
    for _ in range(2):
        stepped(block, x)
    assert heard(block, x) == "a trial: reference; HardlyFaster 98 us against the peer's 100"


def test_equal_blocks_wait_once_and_another_shape_waits_again(gate):
    one, x = gate(), images()
    for _ in range(2):
        stepped(pair_of(NAME)[0], x)
    assert len(one.waiting) == 1
    stepped(pair_of(NAME)[0], images(size=(9, 9)))
    assert len(one.waiting) == 2


@pytest.mark.parametrize("how", ["stored", "off"])
def test_modes(gate, how):
    one, block, x = gate(), pair_of(NAME)[0], images()
    with mode(how):
        for _ in range(2):
            assert heard(block, x) == HOST
    assert not one.waiting


def test_a_forced_backend_is_as_ever(gate):
    one, block, x = gate(), pair_of(NAME)[0], images()
    with backend("aten"):
        assert heard(block, x) is None
    with backend("Fast"):
        assert heard(block, x) is None and Fast.calls == 3
    with backend("cuda"), pytest.raises(BackendError):
        block(x)
    assert not one.waiting


def without_grad(block, x):
    with torch.no_grad():
        return heard(block, x)


def deterministic(block, x):
    torch.use_deterministic_algorithms(True)
    try:
        return heard(block, x)
    finally:
        torch.use_deterministic_algorithms(False)


def saved_elsewhere(block, x):
    with torch.autograd.graph.save_on_cpu():
        return heard(block, x)


def in_a_backward(block, x):
    found = []
    y = x * 2
    y.register_hook(lambda grad: found.append(heard_with_grad(block, x.detach())))
    y.sum().backward()
    return found[0]


def heard_with_grad(block, x):
    with torch.enable_grad():
        return heard(block, x)


SITUATIONS = {
    without_grad: "no gradient is asked for",
    deterministic: "deterministic algorithms",
    saved_elsewhere: "the way has to stay the same",
    in_a_backward: "computed again in a backward pass",
}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda one: one.__name__)
def test_where_the_host_serves_whatever_was_found(gate, situation):
    one, block, x = gate(), pair_of(NAME)[0], images()
    for _ in range(2):
        assert SITUATIONS[situation] in situation(block, x)
    assert not one.waiting
    for _ in range(2):
        stepped(block, x)
    assert heard(block, x) is None
    assert SITUATIONS[situation] in situation(block, x)


def test_a_checkpointed_block_is_computed_again_as_it_was(gate):
    """Its second forward is that of its backward: nothing is tried there, and nothing changes there."""
    one, block, x = gate(), pair_of(NAME)[0], images()
    for reentrant in (False, True):
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert not one.waiting
    for _ in range(2):
        stepped(block, x)
    assert heard(block, x) is None
    Fast.calls = 0
    for reentrant in (False, True):
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert not Fast.calls


def test_norms_of_several_processes_take_the_hosts_way(gate, monkeypatch):
    one, block, x = gate(), pair_of(NAME)[0], images()
    monkeypatch.setattr("regnet_fast.blocks.training.Training.in_processes", lambda self: True)
    assert "several processes" in heard(block, x) and not one.waiting


def test_a_replica_of_a_call_is_left_to_the_host(gate):
    one, block, x = gate(), pair_of(NAME)[0], images()
    assert "replica" in heard(block._replicate_for_data_parallel(), x) and not one.waiting


def test_only_the_first_process_of_a_machine_tries(gate, monkeypatch):
    """The others take up its verdicts as soon as they are there."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    clock = Clock()
    follower, block, x = gate(command=["/nowhere"], clock=clock), pair_of(NAME)[0], images()
    for _ in range(3):
        stepped(block, x)
    assert HOST in heard(block, x) and follower.waiting and not list(entries())
    monkeypatch.setenv("LOCAL_RANK", "0")
    first, theirs = gate(), pair_of(NAME)[0]
    for _ in range(2):
        stepped(theirs, x)
    assert not first.waiting and heard(theirs, x) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(tried, "session", follower)
    stepped(block, x)
    assert HOST in heard(block, x), "it is not looked in every step"
    clock.now += 2
    stepped(block, x)
    assert heard(block, x) is None and not follower.waiting


def test_who_observes_sees_no_trials(gate):
    one, block, x = gate(), pair_of(NAME)[0], images()
    for _ in range(3):
        assert HOST in heard(block, x)
    assert one.waiting


def test_another_structure_is_asked_for_again(gate):
    one, block, x = gate(), pair_of(NAME)[0], images()
    for _ in range(2):
        stepped(block, x)
    assert heard(block, x) is None
    block.conv1.conv.weight.requires_grad_(False)
    assert HOST in heard(block, x) and one.waiting
    block.conv1.conv.weight.requires_grad_(True)
    assert heard(block, x) is None


def test_a_block_that_cannot_travel_is_left_to_the_host(gate):
    one, block, x = gate(), pair_of(NAME)[0], images()
    block.note = lambda: None
    for _ in range(2):
        assert "cannot be told to another process" in heard(block, x) and not one.waiting


def test_explain_says_what_was_found(gate):
    gate()
    block, x = pair_of("stem")[0], images(3, (16, 16)).detach()
    (row,) = regnet_fast.explain(block, tuple(x.shape), train=True)
    assert row.operation == "host" and HOST in row.reason
    for _ in range(2):
        stepped(block, x.contiguous())
    (row,) = regnet_fast.explain(block, tuple(x.shape), train=True)
    assert row.operation == "ConvNormAct" and row.backend == "Fast"
    assert row.reason.startswith("a trial: Fast, 2.00 times as fast as the peer; ")
    assert "reference the peer; OneGradient wrong: the gradient" in row.reason


def test_a_cpu_is_trusted(monkeypatch):
    """Nothing is asked, and nothing is made to ask with."""
    block, x = pair_of(NAME)[0], images()
    monkeypatch.setattr(tried, "session", None)
    monkeypatch.setattr(compiled, "refuse", lambda x: "it is Sunday")
    assert heard(block, x) is None
    assert "tried" not in vars(block.__dict__["_regnet_fast_training"])
