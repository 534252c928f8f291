"""csrc/ in the simulator against Triton in the interpreter, with an invented clock."""

import json

import pytest
import torch
from simulator.stand_in import simulated
from torch import nn

from regnet_fast import tune_backends
from regnet_fast.backends import ConvProblem, backend, choice, cuda, select
from regnet_fast.kernels import tables

pytestmark = pytest.mark.usefixtures("unchecked_integers")

GPU = "test-gpu"
PROBLEM = ConvProblem(
    *("grouped_conv", (1, 16, 5, 4), 16, (3, 3), (1, 1), (1, 1), (1, 1), 2, "relu", False, False),
    *(torch.bfloat16, "cpu"),
)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """Tables of a GPU that the simulator and the interpreter take for their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(choice, "gpu", lambda device: GPU)
    choice.forget()
    with simulated():
        yield
    choice.forget()


def clock(calls, rounds):
    """csrc/ takes twice as long."""
    for call in calls:
        call()
    return [[10.0] * rounds, [5.0] * rounds]


class Selecting(nn.Module):
    """Asks for a grouped convolution, one that csrc/ refuses and a dense one, as a model would."""

    def forward(self, x):
        for groups in (2, 4, 1):
            select(ConvProblem(**vars(PROBLEM) | {"groups": groups}))


def tune():
    return tune_backends.tune(Selecting(), torch.zeros(1, 16, 5, 4, dtype=torch.bfloat16), tables.user_folder(), clock)


def chosen():
    with backend("cuda|triton"):
        return select(PROBLEM)


def test_the_faster_one_is_written_and_taken():
    assert chosen().name == "cuda" and "modelled" in chosen().refused["triton"]
    assert tune() == 3
    (table,) = json.loads((tables.user_folder() / GPU / choice.NAME).read_text())
    assert [entry["step"] for entry in table["entries"]] == ["backward", "forward", "inference"]
    assert table["provenance"] == "measured" and table["torch"] == torch.__version__ and table["date"]
    reason = f"measured to take 2.00 times as long as triton ({table['machine']}, inference)"
    assert chosen().name == "triton" and chosen().refused == {"cuda": reason}
    assert tune() == 3
    assert len(choice.read(tables.user_folder() / GPU / choice.NAME)) == 1  # in the place of the old one


def test_a_wrong_result_is_not_timed(monkeypatch):
    prepare = cuda.prepare_conv

    def wrong(*given):
        run = prepare(*given)
        return lambda *x: run(*x) + 1

    monkeypatch.setattr(cuda, "prepare_conv", wrong)
    assert tune_backends.measure([PROBLEM], torch.device("cpu"), clock) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"machine": "x", "provenance": "y", "entries": [{}]}]', "\0"])
def test_a_damaged_table_is_left_aside_and_kept(content):
    path = tables.user_folder() / GPU / choice.NAME
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(tables.TableWarning, match="cannot be used"):
        assert chosen().name == "cuda"
    with pytest.raises(tables.TableError, match="Move it away"):
        tune()
    assert path.read_text() == content
