"""What is the fastest here for a model: the variants of its layers, and on a GPU the configurations of Triton kernels.

What was never launched here runs in another process first: the configurations in `tuner`, candidates in the worker of
trials. A verdict is kept as soon as there is one, so that an interrupted run goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import triton
from ..kernels import tables
from ..kernels.tables import HEURISTIC, measured
from ..store import replace
from ..store.verdicts import Outcome, Verdict, Verdicts, listing
from ..trials import cpu
from ..trials.modes import mode
from ..trials.process import Child, Fault
from ..trials.session import session
from . import info
from .timing import Announce, silent
from .tuner import Subject, TuneError

PHASES = {"run": 600.0, "try": 120.0}
"""Seconds for each phase of the process that measures: a model's first run compiles all of its kernels."""

DEATHS = 3
"""So many processes may die of a kernel's shape in one search."""


def check_device(device: str) -> None:
    """Raise TuneError unless Triton's kernels run on the device, a GPU."""
    reason = "that is no GPU" if not device.startswith("cuda") else triton.refuse(info.probe(device, "float32"))
    if reason is not None:
        raise TuneError(
            f"tuning was asked for on the device {device!r}, but {reason}. It takes an NVIDIA GPU of compute "
            "capability 8.0 or newer. Without it the kernels run in heuristic configurations, or in those that another "
            "machine of the same kind measured: `regnet-fast verdicts import` brings them"
        )


def checkout_folder() -> Path:
    """Where this checkout keeps what is shipped. Raises TuneError where the package is no checkout."""
    folder = tables.SHIPPED.resolve()
    if not (folder.parent.parent / ".git").exists():
        raise TuneError(
            f"--commit writes into a git checkout of regnet_fast, and this one is installed in {folder.parent}. "
            "Without --commit, verdicts are kept in the user's cache folder"
        )
    return folder


def tune_cpu(model: nn.Module, x: Tensor) -> list[Verdict]:
    """Run a model on a CPU and try every layer and stage of it that no verdict is on; the verdicts on all of them.

    `model` is in evaluation mode, rebuilt, and has not run before.
    """
    with torch.inference_mode(), mode("on"), cpu.unhurried(), cpu.heard() as found:
        model(x)
    return found


class Search:
    """The search for the fastest configurations of the Triton kernels that a model launches, in a process that may die
    of one. Leaving it as a context ends the process.

    Args:
        subject: on a GPU.
        verdicts: of its device.
        deadline: a time of `time.monotonic()` from which on no further shape is begun.
        modules: what the process imports before anything else.

    Attributes: `left`, the problems that there is no verdict on. Raises StartError where no process can be started, and
    TuneError where the model does not run there.
    """

    def __init__(
        self,
        subject: Subject,
        verdicts: Verdicts,
        deadline: float = math.inf,
        modules: Sequence[str] = (),
    ):
        self._subject, self._verdicts, self._deadline, self._modules = subject, verdicts, deadline, [*modules]
        self._child: Child | None = None
        self.left = [problem for problem in self._ran() if not measured(verdicts.find(problem))]

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()

    def found(self, announce: Announce = silent) -> Iterator[Verdict]:
        """Each verdict once it is kept; `announce` is told which configuration comes next.

        Raises TuneError where there is too little memory.
        """
        for problem in [*self.left]:
            for _ in range(DEATHS):
                if time.monotonic() >= self._deadline:
                    return
                verdict = self._verdicts.keep(self._measured(problem, announce))
                if measured(verdict):
                    self.left.remove(problem)
                    yield verdict
                    break

    def _measured(self, problem: str, announce: Announce) -> Verdict:
        """The verdict on a problem. It has no times where the process dies, whose last configuration is put aside."""
        before = self._verdicts.find(problem)
        outcomes = dict(before.outcomes) if before is not None else {}
        trying = HEURISTIC

        def heard(phase: str) -> None:
            nonlocal trying
            trying = phase.partition(": ")[2] or HEURISTIC
            announce(f"{problem.partition(': ')[0]}: {trying}")

        if self._child is None:
            self._ran()
        try:
            answer = self._ask({"problem": problem, "known": [*outcomes]}, heard)
        except Fault as fault:
            if trying != HEURISTIC:
                outcomes[trying] = Outcome("hung" if fault.kind == "hung" else "crashed", reason=str(fault))
            return Verdict(problem, HEURISTIC, {**outcomes, HEURISTIC: Outcome("verified")})
        found = {name: Outcome(**facts) for name, facts in answer["outcomes"].items()}
        return Verdict(problem, answer["chosen"], {**outcomes, **found})

    def _ran(self) -> list[str]:
        """The problems of a model that runs in a new process."""
        model = [*self._subject[:3], str(self._subject.dtype).removeprefix("torch."), self._subject.device]
        self._child = Child((sys.executable, "-m", "regnet_fast.inspect.tuner"))
        self._child.started()
        try:
            return self._ask({"model": model, "modules": self._modules})["problems"]
        except Fault as fault:
            raise TuneError(f"{self._subject.model} does not run with the backend triton: {fault}") from None

    def _ask(self, question: dict[str, Any], heard: Callable[[str], object] = silent) -> dict[str, Any]:
        try:
            answer = self._child.ask(question, PHASES, heard)
        except Fault:
            self._child = None
            raise
        if answer["status"] == "refused":
            self._child.kill()
            self._child = None
            raise TuneError(answer["reason"])
        return answer


def settle(model: nn.Module, x: Tensor, deadline: float, announce: Announce, told: Callable[[Verdict], object]) -> int:
    """Run a model once, and try every candidate for its layers that was not tried before; how many layers are left.

    Args:
        model: in evaluation mode, rebuilt. It has not run before.
        deadline: a time of `time.monotonic()` from which on no further candidate is begun.
        announce: told which layers come next, `told` of each verdict once it is kept.
    """
    found: list[Verdict] = []

    def hear(verdict: Verdict) -> None:
        found.append(verdict)
        announce(f"{len(found)} of {waiting} layers are tried")
        told(verdict)

    with torch.inference_mode(), mode("on"):
        model(x)
        waiting = len(session.waiting)
        announce(f"trying {waiting} layers")
        session.settle(max(0.0, deadline - time.monotonic()), hear)
    return waiting - len(found)


def ship(verdicts: Verdicts) -> Path:
    """Write what was measured of kernels in an environment into the checkout, in the place of what is shipped for the
    same shapes and model of GPU.
    """
    gpu = verdicts.environment["device"]
    found = {verdict.problem: (facts, verdict) for facts, verdict in tables.shipped(gpu)}
    for verdict in verdicts:
        if tables.parsed(verdict.problem) is not None and measured(verdict):
            outcomes = {name: verdict.outcomes[name] for name in (HEURISTIC, verdict.chosen)}
            found[verdict.problem] = verdicts.environment, dataclasses.replace(verdict, outcomes=outcomes)
    path = tables.shipped_file(gpu)
    path.parent.mkdir(exist_ok=True)
    replace(path, json.dumps(listing(found.values()), indent=1).encode() + b"\n")
    return path
