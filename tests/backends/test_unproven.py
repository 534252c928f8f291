"""Whatever is switched off, what serves where nothing was tried is the host's own library or the reference."""

import dataclasses
from contextlib import ExitStack, contextmanager

import pytest
import torch

from regnet_fast.backends import (
    BACKENDS,
    BackendError,
    BackToBackProblem,
    ConvProblem,
    Geometry,
    JoinProblem,
    NormActProblem,
    PairProblem,
    SqueezeExciteProblem,
    backend,
    cuda,
    library,
    onednn,
    refuse,
    select,
    triton,
)
from regnet_fast.backends.cuda import launcher
from regnet_fast.trials.candidate import candidates
from regnet_fast.trials.modes import mode

UNPROVEN = ("triton", "cuda")
PROBLEMS = [
    ConvProblem(
        (2, 32, 14, 14), 32, (3, 3), Geometry((1, 1), (1, 1), (1, 1), 4), "relu", False, False, torch.float32, ""
    ),
    ConvProblem((2, 32, 14, 14), 64, (1, 1), Geometry(), "relu", True, True, torch.float32, "", True),
    PairProblem((2, 32, 14, 14), 32, 64, "relu", 2, torch.float32, ""),
    SqueezeExciteProblem(2, 32, 8, "relu", torch.float32, ""),
    NormActProblem((2, 32, 14, 14), "relu", False, torch.float32, ""),
    JoinProblem((2, 32, 14, 14), "relu", True, True, torch.float32, ""),
    BackToBackProblem((2, 16, 14, 14), 32, 4, "relu", "relu", 2, torch.float32, ""),
]


@contextmanager
def set_to(module, **values):
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SWITCHES = {
    "nothing": ExitStack,
    "cuDNN off": lambda: set_to(torch.backends.cudnn, enabled=False),
    "no cuDNN": lambda: set_to(torch._C, _has_cudnn=False),
    "cuDNN deterministic": lambda: set_to(torch.backends.cudnn, deterministic=True),
    "cuDNN benchmark": lambda: set_to(torch.backends.cudnn, benchmark=True),
    "deterministic algorithms": deterministic,
    "oneDNN off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "ROCm": lambda: set_to(torch.version, hip="6.4"),
    "trials off": lambda: mode("off"),
    "trials stored": lambda: mode("stored"),
    "auto inside a force": lambda: backend("auto"),
}


@pytest.fixture(params=[(7, 0), (7, 5), (8, 0), (9, 0), (12, 0)], ids=str)
def card(request, monkeypatch):
    """A GPU on which both kinds of kernels can be launched where it is new enough."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(cuda, "refuse", lambda problem: None if request.param >= (8, 0) else "too old")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("switch", SWITCHES)
def test_on_a_gpu(card, switch, dtype):
    for problem in PROBLEMS:
        problem = dataclasses.replace(problem, device="cuda:1", dtype=dtype)
        with SWITCHES[switch]():
            refused = refuse("aten", problem)
            assert (select(problem).name == "aten") == (refused is None), (problem, refused)
            assert select(problem).name not in UNPROVEN
            peer, *others = candidates(problem)
            assert peer.backend == select(problem).name
            assert {other.backend for other in others} <= {*UNPROVEN, "aten"}
            if refused is not None:
                assert not any(other.backend == "aten" for other in others)


def test_there_is_something_to_be_wary_of(card):
    able = {
        name for name in UNPROVEN for p in PROBLEMS if refuse(name, dataclasses.replace(p, device="cuda:1")) is None
    }
    assert able == (set(UNPROVEN) if card >= (8, 0) else set())
    for name in able:
        assert "where a trial chose them" in library(name, "cuda:1").NOT_BY_ITSELF
        with backend(name):
            assert select(dataclasses.replace(PROBLEMS[0], device="cuda:1")).name == name


@pytest.mark.parametrize("switch", SWITCHES)
def test_on_a_cpu(monkeypatch, switch):
    """csrc/cpu is trusted as the libraries are."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for problem in PROBLEMS:
        problem = dataclasses.replace(problem, device="cpu")
        assert triton.refuse(problem) is None
        with SWITCHES[switch]():
            chosen = select(problem)
            assert chosen.name == ("aten" if onednn.refuse(problem) is None else chosen.name)
            assert chosen.name not in UNPROVEN and candidates(problem)[0].backend in ("aten", "reference")


@pytest.mark.parametrize("name", UNPROVEN)
def test_an_old_gpu_that_is_forced_to_has_a_reason(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    launcher_refuses = launcher.refuse_device("cuda:0")
    problem = dataclasses.replace(PROBLEMS[0], device="cuda:0")
    with backend(name), pytest.raises(BackendError, match=r"compute capability 8\.0|sm_80") as raised:
        select(problem)
    assert "Backends that can: aten, reference" in str(raised.value) and launcher_refuses


def test_every_backend_is_of_one_kind():
    trusted = {name for name in BACKENDS if not hasattr(library(name, "cuda:0"), "NOT_BY_ITSELF")}
    assert trusted == {"aten", "native", "reference"}
