"""Children that crash, hang and lie: each ends with the right word, in time, and leaves nothing behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regnet_fast.trials import process
from regnet_fast.trials.process import Child, Fault, StartError, death

PROGRAM = str(Path(__file__).with_name("child.py"))
DEADLINES = {"compile": 5.0, "verify": 5.0}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(process, "END_S", 3.0)


@pytest.fixture
def child():
    with Child([sys.executable, PROGRAM]) as one:
        one.started()
        yield one


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_questions_are_answered_one_after_another(child):
    heard = []
    for _ in range(3):
        assert child.ask({"do": "answer"}, DEADLINES)["status"] == "ok"
    child.ask({"do": "phases"}, DEADLINES, heard.append)
    assert heard == ["start", "compile", "verify"]
    child.end()


@pytest.mark.parametrize(
    ("deed", "kind", "words"),
    [
        ("raise", "crashed", "ended with status 1; it printed: .*ZeroDivisionError"),
        ("segfault", "crashed", "ended by SIGSEGV"),
        ("abort", "crashed", "ended by SIGABRT"),
        ("exit", "crashed", "ended with status 0"),
        ("exit 3", "crashed", "ended with status 3"),
        ("killed", "crashed", "SIGKILL: probably too little memory"),
        ("stop", "hung", "in time in the phase 'start'"),
        ("loop", "hung", "in time in the phase 'start'"),
        ("hang in C", "hung", "in time in the phase 'start'"),
        ("close pipe", "crashed", "closed its pipe and went on"),
        ("unknown phase", "garbled", "phase 'dance'"),
        ("nonsense", "garbled", "answered b'.*nonsense"),
        ("a list", "garbled", r"answered b'\[1, 2\]"),
        ("no end", "garbled", "no end"),
        ("another's answer", "garbled", "to question 2"),
    ],
)
def test_a_bad_child_is_put_to_death_with_the_right_word(child, deed, kind, words):
    child.ask({"do": "answer"}, DEADLINES)
    pid, begin = child._process.pid, time.monotonic()
    with pytest.raises(Fault, match=words) as caught:
        child.ask({"do": deed}, DEADLINES)
    assert caught.value.kind == kind and not caught.value.before
    assert not alive(pid) and time.monotonic() - begin < 20


def test_a_death_after_an_answer_is_of_the_question_before(child):
    child.ask({"do": "die later"}, DEADLINES)
    time.sleep(0.7)
    with pytest.raises(Fault, match="SIGSEGV") as caught:
        child.ask({"do": "answer"}, DEADLINES)
    assert caught.value.before and caught.value.kind == "crashed"


def test_a_death_at_the_end_is_of_the_last_question(child):
    child.ask({"do": "die later"}, DEADLINES)
    time.sleep(0.7)
    with pytest.raises(Fault, match="SIGSEGV") as caught:
        child.end()
    assert caught.value.before


def test_each_phase_has_its_deadline(child):
    begin = time.monotonic()
    with pytest.raises(Fault, match="in the phase 'start'") as caught:
        child.ask({"do": "loop"}, {"start": 0.3})
    assert caught.value.kind == "hung" and time.monotonic() - begin < 10


def test_all_phases_together_have_a_limit(child):
    begin = time.monotonic()
    with pytest.raises(Fault, match="in the phase 'verify'") as caught:
        child.ask({"do": "chatter"}, DEADLINES, limit=0.5)
    assert caught.value.kind == "hung" and time.monotonic() - begin < 5


def test_what_it_prints_is_no_answer(child):
    found = child.ask({"do": "shout"}, DEADLINES)
    assert found["status"] == "ok" and "forged" not in found
    assert child.ask({"do": "answer"}, DEADLINES)["status"] == "ok"


def test_children_of_a_child_end_with_it(child):
    left = child.ask({"do": "leave behind"}, DEADLINES)["pid"]
    assert alive(left)
    child.kill()
    for _ in range(100):
        if not alive(left):
            break
        time.sleep(0.01)
    assert not alive(left)


def test_ctrl_c_ends_the_child_and_is_raised(child, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(process.select, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.ask({"do": "answer"}, DEADLINES)
    assert not alive(child._process.pid)


def test_no_descriptor_is_left():
    before = open_descriptors()
    for deed in ("answer", "segfault", "nonsense"):
        with Child([sys.executable, PROGRAM]) as one:
            one.started()
            if deed == "answer":
                one.ask({"do": deed}, DEADLINES)
                one.end()
            else:
                with pytest.raises(Fault):
                    one.ask({"do": deed}, DEADLINES)
    with pytest.raises(StartError):
        Child(["/nowhere/python"])
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/nowhere/python"], "no process can be started.*No such file"),
        ([sys.executable, PROGRAM, "broken"], "did not start.*no such library"),
        ([sys.executable, PROGRAM, "slow"], "did not start: nothing came in time"),
        ([sys.executable, "-c", "import time; time.sleep(600)"], "did not start: nothing came in time"),
        ([sys.executable, "-c", "print(1)"], "did not start.*status 0; it printed: 1"),
    ],
)
def test_a_child_that_cannot_start_is_told(command, words, monkeypatch):
    monkeypatch.setattr(process, "START_S", 1.0 if "600" in command[-1] or "slow" in command else 60.0)
    with pytest.raises(StartError, match=words), Child(command) as one:
        one.started()


def test_a_child_ends_with_its_parent():
    """Also where it hangs and reads nothing any more."""
    program = f"""
import sys, threading, os, time
from regnet_fast.trials.process import Child
one = Child([sys.executable, {PROGRAM!r}])
one.started()
threading.Thread(target=lambda: one.ask({{"do": "hang in C"}}, {{"start": 600.0}}), daemon=True).start()
time.sleep(0.5)
print(one._process.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    for _ in range(200):
        if not alive(pid):
            break
        time.sleep(0.01)
    assert not alive(pid)


def test_a_death_in_words():
    assert death(0) == "the process ended with status 0"
    assert "SIGBUS" in death(-7)
