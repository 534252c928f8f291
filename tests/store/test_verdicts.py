"""Verdicts on disk: whole or not at all, of one environment, and nothing of another process lost."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from regnet_fast import store
from regnet_fast.store import environment as module
from regnet_fast.store import verdicts
from regnet_fast.store.environment import environment, kernels_digest
from regnet_fast.store.verdicts import Outcome, Verdict, VerdictError, Verdicts

HERE = {"device": "a CPU", "threads": "2"}
FOUND = Verdict("a problem", "fast", {"safe": Outcome("verified", 2.0), "fast": Outcome("verified", 1.0)})


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    store._warned.clear()


def files(tmp_path):
    return sorted(path for path in tmp_path.glob("verdicts/*/*") if path.suffix != ".lock")


def test_what_is_kept_is_found_by_another_process():
    assert Verdicts(HERE).find("a problem") is None
    Verdicts(HERE).keep(FOUND)
    assert Verdicts(HERE).find("a problem") == FOUND and FOUND.gain("safe") == 2.0
    assert Verdicts(HERE).find("another problem") is None


@pytest.mark.parametrize("fact", HERE)
def test_another_environment_knows_nothing(fact):
    Verdicts(HERE).keep(FOUND)
    assert Verdicts({**HERE, fact: "another"}).find("a problem") is None


@pytest.mark.parametrize("fact", ["device", "threads", "onednn", "torch", "regnet_fast", "kernels"])
def test_the_environment_of_a_cpu_has_what_a_verdict_rests_on(fact):
    facts = environment("cpu")
    assert facts[fact] and all(isinstance(value, str) for value in facts.values())


def test_the_digest_is_of_the_text_of_the_kernels(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "a.py"
    seen = []
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    for text in ("1", "2", "1"):
        source.write_text(text)
        kernels_digest.cache_clear()
        seen.append(kernels_digest())
    kernels_digest.cache_clear()
    assert seen[0] == seen[2] != seen[1]


def test_the_digest_covers_every_kind_of_kernel():
    from regnet_fast.store.environment import _KERNELS, _PACKAGE

    found = {path.suffix for pattern in _KERNELS for path in _PACKAGE.glob(pattern)}
    assert {".cu", ".cuh", ".cpp", ".py"} <= found


DAMAGE = {
    "cut": lambda data: data[:-3],
    "flipped": lambda data: data[:60] + bytes([data[60] ^ 4]) + data[61:],
    "empty": lambda data: b"",
    "foreign": lambda data: b"\x7fELF" * 40,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_found_again(tmp_path, what):
    Verdicts(HERE).keep(FOUND)
    (path,) = files(tmp_path)
    path.write_bytes(DAMAGE[what](path.read_bytes()))
    assert Verdicts(HERE).find("a problem") is None
    Verdicts(HERE).keep(FOUND)
    assert Verdicts(HERE).find("a problem") == FOUND


FOREIGN = {
    "schema": lambda content: {**content, "schema": 99},
    "problem": lambda content: {**content, "problem": "another"},
    "choice": lambda content: {**content, "chosen": "nobody"},
    "unverified choice": lambda content: {**content, "outcomes": {"fast": {"status": "wrong"}}},
    "status": lambda content: {**content, "outcomes": {**content["outcomes"], "x": {"status": "splendid"}}},
    "fields": lambda content: {**content, "outcomes": {"fast": {"speed": 1}}},
    "list": lambda content: [content],
    "nothing": lambda content: {},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_verdict_of_another_form_is_none(tmp_path, what):
    Verdicts(HERE).keep(FOUND)
    (path,) = files(tmp_path)
    store.updated(path, lambda content: json.dumps(FOREIGN[what](json.loads(content))).encode())
    assert Verdicts(HERE).find("a problem") is None


def test_two_processes_lose_nothing(tmp_path):
    """Each keeps outcomes of its own for the same and for other problems, at once."""
    program = """
import sys
from regnet_fast.store.verdicts import Outcome, Verdict, Verdicts
who = sys.argv[1]
for i in range(40):
    for problem in (f"problem {i}", f"problem {i} of {who}"):
        found = {"safe": Outcome("verified", 1.0), who: Outcome("wrong")}
        Verdicts({"device": "a CPU", "threads": "2"}).keep(Verdict(problem, "safe", found))
"""
    both = [subprocess.Popen([sys.executable, "-c", program, who]) for who in ("a", "b")]
    assert [one.wait(120) for one in both] == [0, 0]
    here = Verdicts(HERE)
    for i in range(40):
        assert set(here.find(f"problem {i}").outcomes) == {"safe", "a", "b"}
        assert set(here.find(f"problem {i} of b").outcomes) == {"safe", "b"}
    assert not list(tmp_path.glob("verdicts/*/*.tmp"))


def test_what_cannot_be_kept_serves_this_process(tmp_path, monkeypatch):
    (tmp_path / "verdicts").write_text("a file in the way")
    here = Verdicts(HERE)
    with pytest.warns(store.CacheWarning, match="REGNET_FAST_CACHE"):
        assert here.keep(FOUND) == FOUND
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert here.keep(FOUND) == FOUND == here.find("a problem")


def test_again_removes_what_is_looked_for_and_nothing_else():
    other = Verdict("other", "safe", {"safe": Outcome("verified")})
    Verdicts(HERE).keep(FOUND)
    Verdicts(HERE).keep(other)
    here = Verdicts(HERE)
    with verdicts.again():
        assert here.find("a problem") is None
        here.keep(Verdict("a problem", "safe", {"safe": Outcome("verified", 3.0)}))
        assert here.find("a problem").outcomes == {"safe": Outcome("verified", 3.0)}
    assert [verdict.problem for verdict in Verdicts(HERE)] in (["a problem", "other"], ["other", "a problem"])
    assert Verdicts(HERE).find("a problem").chosen == "safe" and Verdicts(HERE).find("other") == other


def test_a_gpu_that_is_too_old_for_cudnn_has_an_environment(monkeypatch):
    """torch raises where its cuDNN does not serve the oldest GPU of a machine."""

    def raises():
        raise RuntimeError("cuDNN version 91900 is not compatible with devices with SM < 7.5.")

    monkeypatch.setattr(torch.backends.cudnn, "version", raises)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    module._cuda.cache_clear()
    facts = environment("cuda:0")
    module._cuda.cache_clear()
    assert facts["cudnn"] == "refused" and facts["device"] == "an old one"


def test_an_environment_knows_its_own_verdicts_alone(tmp_path):
    Verdicts(HERE).keep(FOUND)
    Verdicts({**HERE, "threads": "8"}).keep(Verdict("other", "safe", {"safe": Outcome("verified")}))
    assert list(Verdicts(HERE)) == [FOUND]
    (path,) = [path for path in files(tmp_path) if path.parent == Verdicts(HERE).folder]
    path.write_bytes(path.read_bytes()[:-3])
    assert list(Verdicts(HERE)) == []


def test_verdicts_are_shipped(tmp_path, monkeypatch):
    Verdicts(HERE).keep(FOUND)
    Verdicts({**HERE, "threads": "8"}).keep(Verdict("other", "safe", {"safe": Outcome("verified")}))
    shipped = json.loads(json.dumps(verdicts.exported()))
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path / "elsewhere"))
    assert verdicts.imported(shipped) == 2 and len(list(verdicts.entries())) == 2
    assert Verdicts(HERE).find("a problem") == FOUND and Verdicts(HERE).find("other") is None
    assert verdicts.forget() == 2 and Verdicts(HERE).find("a problem") is None


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"schema": 2, "verdicts": []},
        {"schema": 1},
        {"schema": 1, "verdicts": [1]},
        {"schema": 1, "verdicts": [{"problem": "p", "chosen": "x", "outcomes": {"x": {"status": "verified"}}}]},
        {
            "schema": 1,
            "verdicts": [
                {"environment": {"device": 3}, "problem": "p", "chosen": "x", "outcomes": {"x": {"status": "verified"}}}
            ],
        },
    ],
)
def test_what_is_no_file_of_verdicts_is_refused(content):
    with pytest.raises(VerdictError):
        verdicts.imported(content)
    assert not list(verdicts.entries())
