"""The run of a GPU: its order, what becomes of questions without an answer, and how a slice goes on from another."""

import json
import math
import os
import sys
import time

import gpu_child
import pytest
import torch

from bench import cases, peers, record, report
from bench.gpu import answers, order, run, walk
from bench.gpu.order import DRY, REAL, Item, Question, items
from bench.gpu.summary import main, render
from bench.gpu.walk import Journal, Walk, read
from regnet_fast.backends import cudnn, refuse
from regnet_fast.backends.cuda.launcher import standing_in
from regnet_fast.backends.cuda.plans import Target

COMMAND = (sys.executable, gpu_child.__file__)
ALL = [question for item in items(REAL) for question in item.questions]
OPERATION = "grouped_conv/24x24-k3s2g3-56-relu"


def ask(name, do, seconds=20.0, item="planted"):
    return Question(item, name, seconds, {"do": do})


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "gpu.jsonl", gpu_child.MACHINE)


def walked(journal, *asked, budget=math.inf, told=lambda *_: None):
    """What is left, and the statuses of what was answered."""
    left = Walk(journal, time.monotonic() + budget, told, COMMAND).all(asked)
    return [q.name for q in left], {name: answer["status"] for (_, name), answer in journal.answers.items()}


def again(journal):
    return Journal(journal.path, gpu_child.MACHINE)


# The order


def test_the_dry_run_walks_the_same_order():
    def names(scale):
        return list(dict.fromkeys(question.item for item in items(scale) for question in item.questions))

    assert names(DRY) == names(REAL)
    assert names(REAL)[:6] == ["start", "cudnn", "kernels", "joined", "gates", "models"]


def test_questions_have_names_of_their_own():
    assert len({question.key for question in ALL}) == len(ALL)


def test_what_decides_most_is_asked():
    def operations(item):
        return [q.facts["name"] for q in ALL if q.item == item]

    known = cases.operations()
    assert {*operations("cudnn"), *operations("gates")} <= known.keys() and len(operations("cudnn")) == 20
    grouped = [known[name] for name in operations("cudnn") if name.startswith("grouped_conv/")]
    assert {facts["in"] // facts["groups"] for facts in grouped} >= {8, 24, 40, 56, 112, 232}
    assert set(operations("kernels")) == set(operations("cudnn"))
    by = {(q.facts["name"], q.facts["candidate"]) for q in ALL if q.item == "kernels"}
    assert all((name, "cuda") in by for name in operations("cudnn") if name.startswith("grouped_conv/"))
    assert all((name, "triton") in by for name in operations("cudnn"))
    assert {q.facts["batch"] for q in ALL if q.item == "gates" and "excite" in q.name} == {1, 256}


def test_torch_is_asked_to_tune_once_and_at_last():
    tuned = [q for q in ALL if any("max-autotune" in peer for peer in q.facts.get("peers", ()))]
    assert tuned == ALL[-1:]


@pytest.mark.parametrize("scale", [REAL, DRY], ids=["real", "dry"])
def test_every_case_can_be_chosen(scale):
    for item in items(scale):
        for question in item.questions:
            if "case" in question.facts:
                case = cases.Case(**question.facts["case"])
                assert peers.choose(question.facts["peers"], scale.device, case.kind)
                assert case.kind == "ops" or case.name in cases.model_names()


def test_operations_are_asked_of_every_backend():
    names = {peer.name for q in ALL if q.item == "ops" for peer in peers.choose(q.facts["peers"], "cuda", "ops")}
    assert {"timm channels_last", "regnet_fast aten", "regnet_fast cuda", "regnet_fast triton"} <= names


# Questions without an answer


@pytest.mark.parametrize(
    ("deed", "status", "words"),
    [
        ("hang", "hung", "in the phase 'work'"),
        ("chatter", "hung", "in the phase 'work: "),
        ("crash", "crashed", "SIGSEGV"),
        ("exit", "crashed", "status 3"),
        ("garbage", "garbled", "garbage"),
    ],
)
def test_one_question_is_lost_and_the_next_ones_are_answered(journal, deed, status, words):
    bad = ask("bad", deed, 1.0)
    begin = time.monotonic()
    left, found = walked(
        journal, Item((ask("first", "answer"), bad, ask("next", "print"))), Item((ask("last", "answer"),))
    )
    assert left == [] and found == {"first": "answered", "bad": status, "next": "answered", "last": "answered"}
    assert words in journal.answers[bad.key]["reason"] and time.monotonic() - begin < 15
    assert again(journal).answers == journal.answers


def test_a_death_after_an_answer_is_of_that_question(journal):
    first, second = ask("first", "die later"), ask("second", "answer")
    walker = Walk(journal, math.inf, lambda question, _: time.sleep(0.7 * (question is first)), COMMAND)
    assert walker.all([Item((first, second))]) == []
    assert (
        journal.answers[first.key]["status"] == "crashed" and "after its answer" in journal.answers[first.key]["reason"]
    )
    assert journal.answers[second.key]["status"] == "answered"


def test_a_process_for_each_question_or_one_for_all(journal):
    two = [[ask(f"{i} {fresh}", "answer") for i in range(2)] for fresh in (False, True)]
    walked(journal, Item(tuple(two[0])), Item(tuple(two[1]), fresh=True))
    pids = {name: answer["pid"] for (_, name), answer in journal.answers.items()}
    assert pids["0 False"] == pids["1 False"] and len(set(pids.values())) == 3


def test_a_process_finds_the_checkout_and_its_environment(journal):
    walked(journal, Item((ask("where", "where"),), {"SAID": "so"}))
    found = journal.answers["planted", "where"]
    assert found["path"].split(os.pathsep)[0] == str(order.ROOT) and found["said"] == "so"


def test_a_process_that_cannot_be_started_costs_its_question(journal):
    Walk(journal, math.inf, lambda *_: None, ("no such program",)).all([Item((ask("one", "answer"),))])
    assert journal.answers["planted", "one"]["status"] == "failed"


# Slices


def test_what_has_an_answer_is_not_asked_again(journal):
    asked = Item((ask("one", "answer"), ask("two", "hang", 0.5)))
    walked(journal, asked)
    before, told = dict(journal.answers), []
    later = again(journal)
    left, _ = walked(later, asked, Item((ask("three", "answer"),)), told=lambda question, _: told.append(question.name))
    assert left == [] and told == ["three"] and before.items() <= later.answers.items()


def test_what_does_not_fit_waits_for_the_next_slice_and_lets_others_go_first(journal):
    asked = Item(tuple(ask(name, "answer", seconds) for name, seconds in (("one", 9), ("long", 99), ("short", 9))))
    left, found = walked(journal, asked, budget=30)
    assert left == ["long"] and list(found) == ["one", "short"]
    left, found = walked(again(journal), asked, budget=30)
    assert left == [] and found["long"] == "answered", "the first one of a slice is asked in any case"


def test_the_slice_cuts_its_first_question_off(journal):
    begin = time.monotonic()
    left, found = walked(journal, Item((ask("one", "hang", 99),)), budget=1.5)
    assert left == [] and found == {"one": "hung"} and time.monotonic() - begin < 15


def test_a_question_that_a_run_ended_with_is_asked_once_more_and_last(journal):
    asked, told = [ask("deadly", "answer"), ask("other", "answer")], []
    journal.begin(asked[0])
    left, _ = walked(again(journal), Item(tuple(asked)), told=lambda question, _: told.append(question.name))
    assert told == ["other", "deadly"] and left == []


def test_a_question_that_ended_two_runs_is_given_up(journal):
    deadly = ask("deadly", "answer")
    for _ in range(2):
        journal.begin(deadly)
    left, found = walked(again(journal), Item((deadly,)))
    assert left == [] and found == {"deadly": "cut off"}


def test_every_answer_is_on_disk_at_once(journal):
    lines = []
    walked(
        journal,
        Item((ask("one", "answer"), ask("two", "answer"))),
        told=lambda *_: lines.append(len(read(journal.path))),
    )
    assert lines == [2, 4]


def test_half_a_line_costs_no_other(journal):
    walked(journal, Item((ask("one", "answer"),)))
    with journal.path.open("a") as file:
        file.write('\n{"run": "12')
    later = again(journal)
    walked(later, Item((ask("two", "answer"),)))
    assert len(again(later).answers) == 2


def test_answers_under_other_conditions_do_not_count(journal):
    walked(journal, Item((ask("one", "answer"),)))
    machine = {**gpu_child.MACHINE, "conditions": {**gpu_child.MACHINE["conditions"], "sources": "5678"}}
    other = Journal(journal.path, machine)
    assert not other.answers and len(again(journal).answers) == 1


# A run


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """A run of two questions on a GPU that is not there."""
    case = cases.Case("models", "regnety_032", 256, "bfloat16")
    facts = {"do": "exit", "case": case.as_dict()}
    asked = [Item((ask("one", "answer", 1), Question("models", case.id, 1, facts)))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "items", lambda scale: asked)
    monkeypatch.setattr(walk, "COMMAND", COMMAND)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path / "bench" / "results"


def test_a_run_is_kept_by_machine_and_reported(planted, capsys):
    assert run.run(planted) == 1, "a case has no time"
    folder = planted / "test-gpu"
    case = record.load(folder / "models.json", "models")["cases"][0]
    assert case["status"] == "failed" and "status 3" in case["reason"]
    assert "status 3" in (folder / "report.md").read_text() and "the run is complete" in capsys.readouterr().out


def test_what_a_folder_for_results_gets(planted, monkeypatch, tmp_path):
    """It is emptied between slices; what came back of the one before lies with the results."""
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    assert run.run(planted) == 1 and not planted.exists()
    assert {path.name for path in out.iterdir()} == {"gpu.jsonl", "models.json"}
    (planted / "test-gpu").mkdir(parents=True)
    for path in out.iterdir():
        path.rename(planted / "test-gpu" / path.name)
    answered = [line for line in read(planted / "test-gpu" / "gpu.jsonl") if "status" in line]
    assert run.run(planted) == 1
    assert [line for line in read(out / "gpu.jsonl") if "status" in line] == answered, "nothing was asked twice"


def test_without_a_gpu_there_is_no_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--dry-run"):
        run.run(tmp_path)


def test_the_summary_is_made_of_a_journal(journal, capsys):
    journal.open()
    facts = {"bytes": 10**9, "flops": 1, "peer": "aten:plain", "us": [2000.0], "peer_us": [3000.0]}
    journal.end(ask("a", "trial"), {"status": "verified", **facts})
    ways = {"fused": {"status": "refused", "reason": "no engine"}, "plain": {"status": "verified", "us": [1000.0]}}
    journal.end(ask("b", "cudnn"), {"status": "answered", "bytes": 10**9, "ways": ways})
    assert main([str(journal.path)]) == 0
    text = capsys.readouterr().out
    assert text == render(journal) + "\n"
    assert (
        "| a | ours | verified | 2000 | 50 | 1.50x |" in text and "| fused | refused | - | - | - | no engine |" in text
    )
    (journal.path.parent / "empty.jsonl").write_text("[]\n")
    assert main([str(journal.path.parent / "empty.jsonl")]) == 2


# Answers


@pytest.fixture
def fused(monkeypatch):
    """cuDNN's fused call, which a CPU has not; what it makes of the right result is `fused.made`."""

    class Fused:
        made = staticmethod(lambda y: y)

        def __call__(self, x, weight, bias, *geometry):
            return self.made(torch.relu(torch.nn.functional.conv2d(x, weight, bias, *geometry)))

    one = Fused()
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", one)
    return one


def no_engine(y):
    raise RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.mark.parametrize(
    ("made", "status", "reason"),
    [
        (lambda y: y, "verified", ""),
        (lambda y: y * 1.01, "wrong", "times eager's"),
        (lambda y: y + 0 * torch.full_like(y, math.nan), "wrong", "NaN"),
        (no_engine, "refused", "unable to find an engine"),
    ],
    ids=["right", "wrong", "NaN", "no engine"],
)
def test_what_cudnn_does_is_found_out(fused, made, status, reason):
    fused.made = made
    asked = {"do": "cudnn", "name": OPERATION, "batch": 2, "dtype": "float32", "size": 64, "device": "cpu", "rounds": 2}
    found = answers.answer(asked, lambda phase: None)
    assert found["status"] == "answered" and found["ways"].keys() == {*cudnn.CONVS, "plain NCHW"}
    assert found["ways"]["fused"]["status"] == status and reason in found["ways"]["fused"].get("reason", "")
    assert ("us" in found["ways"]["fused"]) == (status == "verified")
    assert all(len(found["ways"][way]["us"]) == 2 for way in ("plain", "plain NCHW"))
    json.dumps(found)


def test_cudnn_gets_the_gate_and_the_residual(fused):
    asked = {"do": "cudnn", "name": "pointwise_conv/24x24-k1s1g1-56-relu", "batch": 2, "dtype": "float32", "size": 64}
    asked |= {"device": "cpu", "rounds": 2, "gate": True, "residual": True}
    found = answers.answer(asked, lambda phase: None)
    assert found["ways"]["plain"]["status"] == "verified" and found["ways"].keys() == set(cudnn.CONVS)
    assert found["ways"]["fused"]["status"] == "refused", "the stand-in has no such call"
    asked_of = [q.name for q in ALL if q.item == "gates" and q.facts["do"] == "cudnn"]
    assert len(asked_of) == len(REAL.gated) and all("gate residual" in name for name in asked_of)


def test_a_candidate_is_refused_in_words():
    asked = {"name": OPERATION, "batch": 2, "dtype": "float32", "size": 64, "device": "cpu", "rounds": 2}
    found = answers.answer({"do": "trial", "candidate": "cuda", **asked}, lambda phase: None)
    assert found == {"status": "refused", "reason": "the CUDA C++ kernels run on an NVIDIA GPU"}


@pytest.mark.parametrize("scale", [REAL, DRY], ids=["real", "dry"])
def test_convolutions_that_share_a_launch_follow_each_other(scale):
    """And are taken by csrc/, in the dtype that it has."""
    for first, second in scale.joined:
        names = {"name": f"pointwise_conv/{first}", "second": f"grouped_conv/{second}"}
        problem = answers.problem_of(**names, batch=256, dtype="bfloat16", size=scale.size, device="cpu")
        assert problem is not None and problem.means
        with standing_in(lambda *_: pytest.fail("launched"), Target()):
            assert refuse("cuda", problem) is None


def test_a_candidate_is_tried_as_users_trials_try_it():
    asked = {"name": "pointwise_conv/24x24-k1s1g1-56-relu", "batch": 2, "dtype": "float32", "size": 64, "device": "cpu"}
    asked |= {"do": "trial", "candidate": "aten", "gate": True, "residual": True, "rounds": 2}
    found = answers.answer(asked, lambda phase: None)
    assert found["status"] == "verified" and len(found["us"]) == len(found["peer_us"]) == 2
    assert found["bytes"] > 3 * 2 * 24 * 16 * 16 * 4 and found["peer"].startswith("aten")


def test_a_question_that_cannot_be_answered_fails_alone():
    found = answers.answer({"do": "nonsense"}, lambda phase: None)
    assert found == {"status": "failed", "reason": "KeyError: 'nonsense'"}


def test_tests_are_run_and_kept(tmp_path, monkeypatch):
    (tmp_path / "test_one.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    asked = {"do": "tests", "words": ["-c", os.devnull, str(tmp_path)], "workers": 0, "folder": str(tmp_path)}
    found = answers.answer(asked, lambda phase: None)
    assert found["status"] == "failed" and "1 failed, 1 passed" in found["tail"]
    assert "test_one.py::test_bad FAILED" in (tmp_path / "tests.txt").read_text()
    asked["words"] += ["-k", "good"]
    assert answers.answer(asked, lambda phase: None)["status"] == "passed"
    asked["words"][-1] = "neither"
    assert answers.answer(asked, lambda phase: None)["status"] == "skipped"


def test_a_copy_without_git_says_of_which_sources_it_is(monkeypatch):
    from regnet_fast.inspect import info

    monkeypatch.setattr(info, "_commit", dict)
    facts = record.conditions("cpu")
    assert facts["commit"] is None and len(facts["sources"]) == 16
    assert f"sources {facts['sources']}" in report.conditions({"conditions": facts})
