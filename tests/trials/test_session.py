"""Planted candidates, each with a fault of its own: put aside with the right word, and nobody else harmed."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import own_cache

from regnet_fast import backends, store
from regnet_fast.backends import ConvProblem, Geometry, PairProblem
from regnet_fast.settings import Settings, settings
from regnet_fast.store.verdicts import entries
from regnet_fast.trials import process, session
from regnet_fast.trials.candidate import Candidate, candidates, from_json, to_json
from regnet_fast.trials.cpu import words
from regnet_fast.trials.modes import mode
from regnet_fast.trials.session import Session, TrialWarning

HERE = Path(__file__).parent
PHASES = dict.fromkeys(("start", "compile", "verify", "time"), 60.0)
SHORT = {**PHASES, "compile": 2.0}
PROBLEM = ConvProblem(
    (4, 16, 8, 8), 16, (3, 3), Geometry(padding=(1, 1), groups=2), "relu", False, False, torch.float32, "cpu"
)
PAIR = PairProblem((4, 16, 8, 8), 8, 24, "relu", 2, torch.float32, "cpu")
PEER = "aten"


@pytest.fixture(autouse=True)
def planted(tmp_path, monkeypatch):
    own_cache(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(process, "END_S", 3.0)
    store._warned.clear()
    import planted as module

    monkeypatch.setitem(backends._MODULES, "cuda", module)
    with mode("on"):
        yield lambda *names: monkeypatch.setenv("PLANTED", ",".join(names))


def new(phases=PHASES, **options):
    return Session(modules=["planted"], phases=phases, devices=("cpu",), **options)


def settled(one=None, problem=PROBLEM):
    """The verdict of a session on a problem."""
    one = one or new()
    assert one.chosen(problem) is None
    told = []
    one.settle(limit=1e9, told=told.append)
    return told[-1]


FAULTS = {
    "Segfault": ("crashed", "SIGSEGV"),
    "Abort": ("crashed", "SIGABRT"),
    "Exit": ("crashed", "ended with status 0"),
    "Stops": ("hung", "'compile'"),
    "Loops": ("hung", "'compile'"),
    "HangsInC": ("hung", "'compile'"),
    "OneValue": ("wrong", "largest error"),
    "MiddleImage": ("wrong", "middle of the batch"),
    "NanAtTheBorder": ("wrong", ""),
    "OddSizes": ("wrong", "error"),
    "SecondCall": ("wrong", "two calls differ"),
    "AnotherThread": ("wrong", "another thread"),
    "Unwritten": ("wrong", "unwritten"),
    "WritesBeside": ("wrong", "writes beside an input"),
    "ChangesAnInput": ("wrong", "changes an input"),
    "NotBitEqual": ("wrong", "two calls differ"),
    "Sticky": ("crashed", "illegal memory access"),
    "OutOfMemory": ("out of memory", "2 TiB"),
    "CompileError": ("refused", "ptxas fatal"),
}


@pytest.mark.parametrize("status", sorted({status for status, _ in FAULTS.values()}))
def test_a_fault_is_put_aside_with_the_right_word(planted, status):
    """All of a kind in one session, after one that is right."""
    names = [name for name, (word, _) in FAULTS.items() if word == status]
    planted(*names)
    verdict = settled(new(SHORT if status == "hung" else PHASES))
    assert verdict.chosen == PEER
    for name in names:
        outcome = verdict.outcomes[f"cuda:{name}"]
        assert outcome.status == status and FAULTS[name][1] in outcome.reason, (name, outcome)
    again = new()
    assert str(again.chosen(PROBLEM)) == PEER and not again.waiting, "negative verdicts are kept"


def test_what_is_right_and_not_faster_stays_aside(planted):
    planted("Slow", "HardlyFaster", "Garbage")
    verdict = settled()
    assert verdict.chosen == PEER and {outcome.status for outcome in verdict.outcomes.values()} == {"verified"}


def test_the_fastest_verified_candidate_serves(planted):
    planted("OneValue", "Segfault", "Fast", "HardlyFaster", "LeavesAChild", "Sticky")
    verdict = settled()
    assert verdict.chosen == "cuda:Fast"
    found = {name.partition(":")[2]: outcome.status for name, outcome in verdict.outcomes.items()}
    assert found == {
        "": "verified", "OneValue": "wrong", "Segfault": "crashed", "Fast": "verified", "HardlyFaster": "verified",
        "LeavesAChild": "verified", "Sticky": "crashed",
    }  # fmt: skip
    assert verdict.outcomes["cuda:Fast"].us == 50 and verdict.outcomes["cuda:Fast"].peer_us == 100
    sleeping = subprocess.run(["pgrep", "-f", "^sleep 600$"], capture_output=True, text=True).stdout.split()
    assert not sleeping, "a child of the child was left behind"


def test_means_are_verified_and_timed_with_the_map(planted):
    """`Fast` is that for the map alone, which is another problem."""
    planted("WrongMeans", "MapWrongWithMeans", "Parts", "Fast")
    verdict = settled(problem=dataclasses.replace(PROBLEM, means=True))
    assert verdict.chosen == "cuda:Parts" and verdict.outcomes["cuda:Fast"].status == "verified"
    assert verdict.outcomes["cuda:Parts"].us == 60 and verdict.outcomes["cuda:Parts"].peer_us == 100
    wrong = [verdict.outcomes[f"cuda:{name}"] for name in ("WrongMeans", "MapWrongWithMeans")]
    assert [outcome.status for outcome in wrong] == ["wrong"] * 2
    assert wrong[0].reason.startswith("the means: ") and not wrong[1].reason.startswith("the means")
    assert settled(problem=PROBLEM).chosen == "cuda:Fast"


def test_a_pair_is_tried_against_two_convolutions(planted):
    planted("WrongOther", "FastPair")
    verdict = settled(problem=PAIR)
    assert verdict.chosen == "cuda:FastPair" and "pointwise_pair 4x16x8x8 -> 8 and 24, stride 2" in verdict.problem
    wrong = verdict.outcomes["cuda:WrongOther"]
    assert wrong.status == "wrong" and wrong.reason.startswith("the other convolution: ")


def test_a_crash_after_the_answer_is_blamed_on_who_answered(planted):
    planted("DiesLater", "Fast")
    verdict = settled()
    assert verdict.outcomes["cuda:DiesLater"].status == "crashed"
    assert verdict.outcomes["cuda:Fast"].status == "verified" and verdict.chosen == "cuda:Fast"


def test_problems_and_names_survive_the_way_to_the_child():
    from regnet_fast.backends import NormActProblem, SqueezeExciteProblem

    for problem in (
        PROBLEM,
        dataclasses.replace(PROBLEM, means=True),
        PAIR,
        SqueezeExciteProblem(2, 16, 4, "relu", torch.bfloat16, "cuda:1"),
        NormActProblem((1, 2, 3, 4), "silu", True, torch.float16, "cpu"),
    ):
        import json

        assert from_json(json.loads(json.dumps(to_json(problem)))) == problem
    for candidate in (Candidate("aten"), Candidate("triton", "64x64")):
        assert Candidate.named(str(candidate)) == candidate


def test_the_peer_is_first(planted):
    planted("Fast", "Slow")
    assert [*map(str, candidates(PROBLEM))] == [PEER, "cuda:Fast", "cuda:Slow"]


def test_the_process_that_tries_has_the_settings_of_the_caller(planted):
    planted("TellsSettings")
    before = settings()
    given = Settings(False, True, False, True, True)
    try:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = "ieee", "tf32"
        torch.backends.cudnn.benchmark = True
        verdict = settled()
    finally:
        before.apply()
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert verdict.outcomes["cuda:TellsSettings"].reason == f"RuntimeError: {given}"


def test_nothing_is_tried_on_another_gpu_of_the_same_name(planted, monkeypatch):
    """Another of two different cards, to a process that sees other ones."""
    planted("Fast")
    one = new()
    assert one.chosen(PROBLEM) is None
    monkeypatch.setattr(session, "card", lambda device: "GPU-1")
    with pytest.warns(TrialWarning, match="another GPU in a second process"):
        one.settle(limit=1e9)
    assert not [*entries()]


def test_where_the_library_refuses_the_reference_is_the_peer(planted):
    planted("Fast", "OneValue")
    with torch.backends.mkldnn.flags(enabled=False):
        assert [*map(str, candidates(PROBLEM))] == ["reference", "cuda:Fast", "cuda:OneValue"]
        verdict = settled()
    assert verdict.chosen == "cuda:Fast" and verdict.outcomes["cuda:OneValue"].status == "wrong"
    assert verdict.outcomes["reference"].us is None


# What is kept, and when nothing is tried


def test_the_next_process_starts_with_the_verdicts(planted):
    planted("Fast")
    settled()
    again = Session(command=["/nowhere/python"], devices=("cpu",))
    assert again.chosen(PROBLEM) == Candidate("cuda", "Fast") and not again.waiting
    again.settle(limit=1e9)


def test_a_new_candidate_is_tried_and_the_known_ones_are_not(planted):
    planted("Slow")
    settled()
    planted("Slow", "Fast")
    again = new()
    assert str(again.chosen(PROBLEM)) == PEER and again.waiting
    told = []
    again.settle(limit=1e9, told=told.append)
    assert told[0].chosen == "cuda:Fast" and again.generation == 1


@pytest.mark.parametrize("how", ["stored", "off"])
def test_modes(planted, how):
    planted("Fast")
    one = new()
    with mode(how):
        assert one.chosen(PROBLEM) is None and not one.waiting
    settled()
    with mode(how):
        assert new().chosen(PROBLEM) == (Candidate("cuda", "Fast") if how == "stored" else None)


def test_where_no_process_can_be_started_the_peer_serves_and_one_line_says_why(planted):
    planted("Fast")
    one = Session(command=["/nowhere/python"], devices=("cpu",))
    one.chosen(PROBLEM)
    with pytest.warns(TrialWarning, match="no process can be started.*No such file"):
        one.settle(limit=1e9)
    assert one.chosen(PROBLEM) is None and not one.waiting and not list(entries())


def test_ctrl_c_ends_the_trials_alone(planted, monkeypatch):
    planted("Fast")
    one = new()
    one.chosen(PROBLEM)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(process.Child, "ask", interrupted)
    with pytest.warns(TrialWarning, match="interrupted"):
        one.settle(limit=1e9)
    assert not list((Path(os.environ["REGNET_FAST_CACHE"]) / "verdicts" / "inflight").iterdir())


def test_the_budget_ends_a_session_and_the_rest_waits_for_the_next(planted):
    planted("Slow", "Fast")
    now = iter(range(0, 10**6, 40))
    one = new(clock=lambda: next(now))
    one.chosen(PROBLEM)
    one.settle(limit=30.0)
    ((_, verdict, _),) = entries()
    assert set(verdict.outcomes) == {PEER, "cuda:Slow"} and verdict.chosen == PEER
    again = new()
    assert str(again.chosen(PROBLEM)) == PEER and again.waiting
    again.settle(limit=1e9)
    assert again.chosen(PROBLEM) == Candidate("cuda", "Fast")


def test_a_candidate_in_flight_when_everything_died_is_suspect(planted, tmp_path):
    planted("Segfault", "Fast")
    folder = tmp_path / "verdicts" / "inflight"
    folder.mkdir(parents=True)
    (folder / store.key(words(PROBLEM), "cuda:Segfault")[:32]).write_text("{}")
    verdict = settled()
    assert verdict.outcomes["cuda:Segfault"].status == "suspect" and verdict.chosen == "cuda:Fast"
    assert not list(folder.iterdir())


def test_two_processes_do_not_try_at_once(planted):
    planted("Fast")
    one = new()
    one.chosen(PROBLEM)
    with session._alone() as mine:
        assert mine
        one.settle(limit=1e9)
    assert not list(entries())


def test_a_folder_that_cannot_be_written_costs_the_keeping(planted, tmp_path):
    planted("Fast")
    (tmp_path / "verdicts").write_text("in the way")
    one = new()
    one.chosen(PROBLEM)
    with pytest.warns(store.CacheWarning):
        one.settle(limit=1e9)
    assert one.chosen(PROBLEM) == Candidate("cuda", "Fast")


def test_a_fork_does_not_drive_its_parents_session(planted):
    planted("Fast")
    one = new()
    one._owner = os.getpid() + 1
    assert one.chosen(PROBLEM) is None and not one.waiting


def test_under_a_dispatch_mode_nothing_waits(planted):
    from torch.utils.flop_counter import FlopCounterMode

    planted("Fast")
    one = new()
    with FlopCounterMode(display=False):
        assert one.chosen(PROBLEM) is None and not one.waiting
    assert one.chosen(PROBLEM) is None and one.waiting
    with FlopCounterMode(display=False):
        one.settle(limit=1e9)
    assert one.waiting, "it still waits"


def test_a_fault_that_is_no_candidates_is_held_against_none(planted):
    """Such as operands that cannot be made, or a peer that fails."""
    planted("Fast")
    one = new()
    one.chosen(replace(PROBLEM, activation="unheard of"))
    with pytest.warns(TrialWarning, match="the peer: .*unheard of"):
        one.settle(limit=1e9)
    assert not list(entries())


def test_the_worker_is_a_program():
    done = subprocess.run([sys.executable, "-m", "regnet_fast.trials.worker"], capture_output=True, text=True)
    assert done.returncode == 2 and "--read-fd" in done.stderr
