"""csrc/ and Triton in the order of a table: `backend("cuda|triton")`."""

import dataclasses

import pytest
import torch
from simulator.stand_in import simulated

from bench import cuda_choice
from regnet_fast.backends import (
    ConvProblem,
    NormActProblem,
    Selection,
    SqueezeExciteProblem,
    backend,
    choice,
    cuda_passes,
    forced_backends,
    passes,
    select,
    triton,
)
from regnet_fast.backends.cuda_plans import Target
from regnet_fast.backends.operands import Filter
from regnet_fast.backends.training import passes_for

PROBLEM = ConvProblem(
    *("grouped_conv", (2, 48, 9, 7), 48, (3, 3), (1, 1), (1, 1), (1, 1), 2, "relu", False, False),
    *(torch.bfloat16, "cpu"),
)


def table(arch, **times):
    """Of one step: the times of csrc/ and of Triton for width 24, and the other way round for width 64."""
    entries = [
        {"step": step, "width": width, "stride": 1, "cuda": pair[0], "triton": pair[1]}
        for step, (a, b) in times.items()
        for width, pair in ((24, (a, b)), (64, (b, a)))
    ]
    return {"arch": arch, "machine": f"sm_{arch}", "provenance": "modelled", "entries": entries}


@pytest.fixture
def tables(monkeypatch):
    found = [table(90, inference=(2.0, 3.0), forward=(4.0, 3.0), backward=(1.0, 5.0)), table(89, inference=(3.0, 2.0))]
    monkeypatch.setattr(choice, "_modelled", lambda: found)
    choice.forget()
    yield found
    choice.forget()


@pytest.fixture
def served(monkeypatch):
    """As though Triton's kernels could be launched."""
    monkeypatch.setattr(triton, "_refuse_device", lambda device: None)


def test_the_faster_one_is_asked_first(tables, served):
    wide = dataclasses.replace(PROBLEM, input_shape=(2, 112, 9, 7), out_channels=112)
    with simulated(), backend("cuda|triton"):
        assert forced_backends() == ("cuda", "triton")
        reason = "modelled to take 1.50 times as long as cuda (sm_90, inference)"
        assert select(PROBLEM) == Selection("cuda", {"triton": reason})
        assert select(wide) == Selection("triton", {"cuda": reason.replace("as cuda", "as triton")})
    with simulated(), backend("cuda,triton"):
        assert select(wide) == Selection("cuda")
    with simulated(), backend("triton,cuda"):
        assert select(PROBLEM) == Selection("triton")
    with simulated(Target(86, 2)), backend("triton|cuda,aten"):  # the GPU with as much shared memory
        assert forced_backends() == ("cuda", "triton", "aten")
        assert select(PROBLEM).name == "triton" and select(wide).name == "cuda"


def test_the_other_one_serves_what_the_faster_one_refuses(tables, served):
    odd = dataclasses.replace(PROBLEM, dilation=(2, 2), padding=(2, 2))
    with simulated(), backend("cuda|triton"):
        chosen = select(odd)
    assert chosen.name == "triton" and list(chosen.refused) == ["cuda"] and "padding 1" in chosen.refused["cuda"]


def test_csrc_is_asked_first_where_nothing_is_known(tables, served):
    problems = [
        dataclasses.replace(PROBLEM, groups=48),
        dataclasses.replace(PROBLEM, stride=(2, 2)),
        SqueezeExciteProblem(2, 48, 8, "relu", torch.float32, "cpu"),
    ]
    with simulated(), backend("cuda|triton"):
        for problem in problems:
            assert select(problem) == Selection("cuda")
        assert select(NormActProblem((2, 8, 4, 4), "relu", False, torch.half, "cpu")).name == "triton"


def test_in_training_each_half_of_a_step_has_its_own(tables, served, monkeypatch):
    x = torch.randn(1, 48, 4, 4).bfloat16()
    filters = [Filter(torch.randn(48, 24, 3, 3).bfloat16(), ((1, 1), (1, 1), (1, 1), 2))]
    with simulated():
        assert "1.33 times as long as triton (sm_90, forward)" in cuda_passes.refuse(x, None, filters, "forward")
        for compared in ("backward", None):
            assert cuda_passes.refuse(x, None, filters, compared) is None
    called = []
    monkeypatch.setattr(passes, "convs", lambda *given: called.append(given) or [(x, None)])
    with simulated():
        cuda_passes.Passes(passes, compared=True).convs(x, None, None, filters, [False])
        assert len(called) == 1
        cuda_passes.Passes(passes).convs(x, None, None, filters, [False])
        assert len(called) == 1


@pytest.mark.parametrize(("name", "compared"), [("cuda|triton", True), ("cuda,triton", False)])
def test_who_is_compared_in_training(served, name, compared):
    x = torch.randn(1, 48, 4, 4)
    pytest.importorskip("triton")
    with backend(name):
        chosen = passes_for(x)
    assert type(chosen) is cuda_passes.Passes and chosen.compared is compared
    assert chosen.others.__name__.endswith("triton_passes")


def test_only_csrc_and_the_framework():
    """Where Triton refuses there is nothing to compare."""
    with backend("cuda|triton,aten"):
        chosen = passes_for(torch.randn(1, 48, 4, 4))
    assert chosen.others is passes and not chosen.compared


# The shipped file


def test_the_file_says_where_it_comes_from_and_is_up_to_date():
    """One width of it; all of it is what the command writes."""
    pytest.importorskip("triton")
    shipped = choice.read(choice.FILE)
    assert [one["machine"] for one in shipped] == [machine.name for machine in cuda_choice.MACHINES]
    for one, machine in zip(shipped, cuda_choice.MACHINES, strict=True):
        assert one["provenance"] == "modelled" and one["by"] == "python -m bench.cuda_choice"
        again = list(cuda_choice.entries(machine, {24}))
        assert again == [e for e in one["entries"] if e["width"] == 24], "run python -m bench.cuda_choice --write"
    assert choice.text(shipped) == choice.FILE.read_text()
    document = cuda_choice.PAGE.read_text()
    assert cuda_choice.filled(document, cuda_choice.page(shipped)) == document


def test_narrow_groups_are_modelled_faster_on_csrc():
    for width, step, first in ((8, "inference", "cuda"), (24, "backward", "cuda"), (232, "backward", "triton")):
        assert choice._ranked(None, 90, step, width, 1).names[0] == first
