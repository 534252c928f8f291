"""`tune`, `verdicts` and `explain` on a CPU: from an empty folder to verdicts that another machine reads."""

import json

import pytest
from helpers import own_cache
from typer.testing import CliRunner

from regnet_fast.cli import app
from regnet_fast.store.verdicts import Outcome, Verdict
from regnet_fast.trials import cpu
from regnet_fast.trials.modes import mode

FOUND = Verdict("a layer", "direct", {"direct": Outcome("verified", 1.0)})
SMALL = ("regnetx_002", "--size", "64")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    own_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(cpu, "_decided", {})
    monkeypatch.setattr(cpu, "_NOISY", 1e9)
    cpu._verdicts.cache_clear()
    with mode("on"):
        yield
    cpu._verdicts.cache_clear()


def invoke(*words, status=0):
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == status, result.output
    return result


def test_from_tuning_to_another_machine(tmp_path, monkeypatch):
    found = json.loads(invoke("tune", *SMALL, "--device", "cpu", "--json").stdout)
    assert len(found) >= 6 and all(one["chosen"] in one["outcomes"] for one in found)

    listed = invoke("verdicts").stdout
    assert f"{len(found)} verdicts in {tmp_path}" in listed and "pointwise_conv" in listed and "threads" in listed

    explained = json.loads(invoke("explain", *SMALL, "--json").stdout)
    assert sum("a trial: " in layer["reason"] for layer in explained["layers"]) >= 6

    file = tmp_path / "verdicts.json"
    invoke("verdicts", "export", file)
    assert "File exists" in invoke("verdicts", "export", file, status=3).stderr
    invoke("verdicts", "--forget")
    assert json.loads(invoke("verdicts", "--json").stdout)["verdicts"] == []
    invoke("verdicts", "import", file)

    monkeypatch.setattr(cpu, "_decided", {})
    cpu._verdicts.cache_clear()
    monkeypatch.setattr(cpu, "tried", lambda *_, **__: pytest.fail("everything is known"))
    again = json.loads(invoke("tune", *SMALL, "--device", "cpu", "--json").stdout)
    assert {one["problem"] for one in again} <= {one["problem"] for one in found}, "blocks of a stage are not looked at"

    monkeypatch.setattr(cpu, "_decided", {})
    cpu._verdicts.cache_clear()
    tried = []
    monkeypatch.setattr(cpu, "tried", lambda problem, *_, **__: tried.append(problem) or FOUND)
    invoke("tune", *SMALL, "--device", "cpu", "--again")
    assert set(tried) & {one["problem"] for one in found}


def test_a_batch_has_verdicts_on_its_stages():
    found = json.loads(invoke("tune", *SMALL, "--batch", "4", "--device", "cpu", "--json").stdout)
    stages = [one for one in found if one["problem"].startswith("stage ")]
    kinds = {"program", "blocks"}, {"1", "2", "4", "8"}
    assert stages and all(any(set(one["outcomes"]) <= kind for kind in kinds) for one in stages)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1, "verdicts": [3]}'])
def test_what_is_no_file_of_verdicts(tmp_path, text):
    (tmp_path / "verdicts.json").write_text(text)
    assert "verdicts.json: " in invoke("verdicts", "import", tmp_path / "verdicts.json", status=2).stderr
    assert "No such file" in invoke("verdicts", "import", tmp_path / "nowhere.json", status=3).stderr
