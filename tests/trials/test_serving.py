"""When a model's convolutions are tried, and what serves meanwhile: a planted backend stands in for a GPU's."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close_to_reference, own_cache, randomize_bn
from timm.models import regnet
from torch.utils.flop_counter import FlopCounterMode

import regnet_fast
from regnet_fast import backends, store
from regnet_fast.backends import backend, reference
from regnet_fast.store.verdicts import entries
from regnet_fast.trials import cpu, process, session
from regnet_fast.trials.modes import mode
from regnet_fast.trials.session import Session

HERE = Path(__file__).parent
PHASES = dict.fromkeys(("start", "compile", "verify", "time"), 60.0)


class Clock:
    """Goes on by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def planted(tmp_path, monkeypatch, clock):
    own_cache(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PLANTED", "Fast")
    monkeypatch.syspath_prepend(str(HERE))
    store._warned.clear()
    import planted as module

    monkeypatch.setitem(backends._MODULES, "cuda", module)
    monkeypatch.setitem(backends._ATEN, "cpu", reference)
    monkeypatch.setattr(cpu, "by_program", lambda *_: False)  # as on a GPU
    fresh = Session(modules=["planted"], phases=PHASES, clock=clock, devices=("cpu",))
    fresh.waiting = session.session.waiting
    kept = dict(vars(session.session))
    vars(session.session).update(vars(fresh))
    with mode("on"):
        yield
    session.session.waiting.clear()
    vars(session.session).update(kept)


@pytest.fixture
def no_children(monkeypatch):
    """Fails where a process is started."""

    def started(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(session, "Child", started)


def network():
    torch.manual_seed(0)
    config = regnet.RegNetCfg(w0=8, wa=12.0, wm=2.0, depth=6, group_size=8, stem_width=8, se_ratio=0.25)
    return randomize_bn(regnet.RegNet(config, num_classes=5), 0, (2, 3, 32, 32)).eval()


@pytest.fixture
def model():
    return regnet_fast.rebuild(network()).model


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def call(model, x=X):
    with torch.inference_mode():
        return model(x)


def backends_of(model):
    """What serves the convolutions."""
    return {row.backend for row in regnet_fast.explain(model, tuple(X.shape)) if row.operation.endswith("_conv")}


def test_the_first_call_is_the_peers_and_the_second_tries(model):
    first = call(model)
    waiting = list(session.waiting)
    assert len(waiting) > 5 and not list(entries()), "nothing is tried for a script that calls once"
    second = call(model)
    assert not session.waiting and session.session.generation == 1
    assert {verdict.chosen for _, verdict, _ in entries()} == {"cuda:Fast"}
    assert backends_of(model) == {"cuda"}
    exact = network().double()(X.double())
    for found in (first, second, call(model)):
        assert_close_to_reference(found, network()(X), exact, "logits")


def test_explain_tells_the_gain_and_why_others_lost(model, monkeypatch):
    monkeypatch.setenv("PLANTED", "Fast,OneValue")
    call(model)
    call(model)
    row = next(row for row in regnet_fast.explain(model, tuple(X.shape)) if row.operation == "grouped_conv")
    assert "cuda:Fast, 2.00 times as fast as the peer" in row.reason
    assert "cuda:OneValue wrong: " in row.reason and "aten the peer" in row.reason


def test_the_next_process_starts_with_the_verdicts(model, no_children):
    verdicts = session.session.verdicts(next(iter(waiting_of(model))))
    for problem in session.waiting:
        keep(verdicts, problem)
    session.waiting.clear()
    again = regnet_fast.rebuild(network()).model
    call(again)
    assert not session.waiting and backends_of(again) == {"cuda"}


def waiting_of(model):
    call(model)
    assert session.waiting
    return session.waiting


def keep(verdicts, problem):
    """A verdict as another process finds it."""
    from regnet_fast.store.verdicts import Outcome, Verdict
    from regnet_fast.trials.cpu import words

    outcomes = {"aten": Outcome("verified"), "cuda:Fast": Outcome("verified", 50.0, "", 100.0)}
    verdicts.keep(Verdict(words(problem), "cuda:Fast", outcomes))


def test_a_rank_that_does_not_hold_the_lock_goes_on_with_peers_until_the_verdicts_are_there(model, clock, no_children):
    from regnet_fast.store.environment import environment
    from regnet_fast.store.verdicts import Verdicts

    waiting_of(model)
    with session._alone() as mine:
        assert mine
        call(model)
        assert session.waiting and backends_of(model) == {"aten"}
        for problem in session.waiting:
            keep(Verdicts(environment("cpu")), problem)
    call(model)
    assert session.waiting, "it is not looked in every call"
    clock.now += 2
    call(model)
    assert not session.waiting and backends_of(model) == {"cuda"}


def test_nothing_is_tried_where_somebody_watches(model, no_children, monkeypatch):
    with FlopCounterMode(display=False):
        call(model)
        call(model)
    assert not session.waiting
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(model)
    assert not session.waiting
    monkeypatch.undo()


def test_what_was_met_under_a_watch_is_tried_later(model):
    with FlopCounterMode(display=False):
        call(model)
    call(model)
    assert session.waiting, "the plan that was made under the watch waits as well"
    call(model)
    assert backends_of(model) == {"cuda"}


@pytest.mark.parametrize("how", ["stored", "off"])
def test_modes(model, no_children, how):
    with mode(how):
        call(model)
        call(model)
        assert not session.waiting and backends_of(model) == {"aten"}


def test_a_forced_backend_is_not_tried(model, no_children):
    with backend("reference"):
        call(model)
        call(model)
    assert not session.waiting


@pytest.mark.parametrize("how", ["algorithms", "cuDNN"])
def test_deterministic_runs_try_nothing(model, no_children, how):
    torch.use_deterministic_algorithms(how == "algorithms")
    torch.backends.cudnn.deterministic = how == "cuDNN"
    try:
        call(model)
        call(model)
        assert not session.waiting and backends_of(model) == {"aten"}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_so_many_sizes_are_tried_and_no_more(model):
    problem = next(iter(waiting_of(model)))
    for size in range(8, 8 + 2 * session._SHAPES):
        session.session.look(replace(problem, input_shape=(1, problem.input_shape[1], size, size)))
    alike = [one for one in session.waiting if session._of_any_size(one) == session._of_any_size(problem)]
    assert len(alike) == session._SHAPES


def test_where_no_process_starts_the_peers_serve_and_one_line_says_why(model, monkeypatch):
    monkeypatch.setattr(session.session, "command", ["/nowhere/python"])
    call(model)
    with pytest.warns(session.TrialWarning, match="no process can be started"):
        call(model)
    call(model)
    assert not session.waiting and backends_of(model) == {"aten"} and not list(entries())


def test_a_frozen_program_starts_nothing(model, monkeypatch, no_children):
    monkeypatch.setattr(session.sys, "frozen", True, raising=False)
    call(model)
    with pytest.warns(session.TrialWarning, match="without an interpreter"):
        call(model)


def test_a_device_that_takes_no_second_process_is_not_held_against_the_kernels(model, monkeypatch):
    monkeypatch.setattr(process.Child, "ask", lambda *_: {"status": "unable", "reason": "cuda:0 is taken"})
    call(model)
    with pytest.warns(session.TrialWarning, match="cuda:0 is taken"):
        call(model)
    assert not list(entries()) and backends_of(model) == {"aten"}


def test_a_graph_records_what_the_trials_have_chosen(model, monkeypatch):
    """A graph's first call tries, since the next ones replay it."""
    from regnet_fast import graphs

    class Recorded:
        refuse = staticmethod(lambda x: None)
        pool = staticmethod(lambda: None)
        on = staticmethod(lambda device: nullcontext())
        here = staticmethod(nullcontext)
        end = None

        def __init__(self, call, x, pool):
            self.recorded = call(x)
            assert not session.waiting

        def replay(self, x):
            return self.recorded.clone()

    monkeypatch.setattr(graphs, "Capture", Recorded)
    found = call(regnet_fast.graphed(model))
    assert {verdict.chosen for _, verdict, _ in entries()} == {"cuda:Fast"}
    assert torch.equal(found, call(regnet_fast.ungraphed(model))) and backends_of(model) == {"cuda"}
