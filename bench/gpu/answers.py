"""The process that answers the questions of `order`: `python -m bench.gpu.answers --read-fd N --write-fd M`.

What may crash, hang or be wrong does so here. A trial is one of `regnet_fast.trials`: the same verification, the same
clock.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from regnet_fast.backends import (
    ACTIVATIONS,
    BackToBackProblem,
    ConvProblem,
    Geometry,
    Problem,
    SqueezeExciteProblem,
    cudnn,
    refuse,
)
from regnet_fast.inspect.timing import tuned_cudnn
from regnet_fast.settings import settings
from regnet_fast.store.environment import card
from regnet_fast.trials import worker
from regnet_fast.trials.candidate import Candidate, bound, candidates, to_json
from regnet_fast.trials.check import Case as Operands
from regnet_fast.trials.check import Wrong, make, verify
from regnet_fast.trials.clock import timer
from regnet_fast.trials.process import descriptors, serve

from .. import cases
from .order import ROOT

Say = Callable[[str], object]
TAIL = 3000  # characters of a command's output that an answer quotes


def machine(device: str, say: Say, **_: Any) -> dict[str, Any]:
    """What everything else depends on."""
    from .. import record
    from ..roofline.ceilings import measure_ceilings

    facts = record.conditions(device)
    say("work: ceilings")
    ceilings = measure_ceilings(device, ["bfloat16", "float32"], quick=device == "cpu")
    return {"status": "answered", "conditions": facts, "ceilings": ceilings}


def trial(say: Say, candidate: str, rounds: int, **facts: Any) -> dict:
    """One candidate for one operation beside the framework's own library."""
    problem = problem_of(**facts)
    reason = refuse(Candidate.named(candidate).backend, problem)
    if reason is not None:
        return {"status": "refused", "reason": reason}
    peer = str(candidates(problem)[0])
    asked = {"problem": to_json(problem), "candidate": candidate, "peer": peer, "rounds": rounds}
    asked |= {"settings": settings(), "card": card(problem.device)}
    found = worker.answer(asked, lambda phase: say(f"work: {phase}"))
    return {**found, "peer": peer, "bytes": problem.bytes, "flops": problem.flops}


def ask_cudnn(say: Say, rounds: int, **facts: Any) -> dict[str, Any]:
    """A convolution by every call of cuDNN's that torch has, each verified, and the plain one in NCHW.

    The memory that a result is put into is NaN before, so that a call that multiplies what was there by zero is seen.
    """
    problem = problem_of(**facts)
    ways: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    with torch.inference_mode():
        operands = make(problem, 0)
        plain = partial(_bound, variant="plain")
        for variant in cudnn.variants(problem):
            say(f"work: {variant}")
            bind = partial(_bound, variant=variant)
            try:
                run = bind(problem, operands.weights)
                run(*operands.call)
                if run.refused:
                    ways[variant] = {"status": "refused", "reason": run.refused}
                    continue
                ways[variant] = {"status": "verified", "error": verify(problem, bind, plain)}
                calls[variant] = partial(run, *operands.call)
            except Wrong as wrong:
                ways[variant] = {"status": "wrong", "reason": str(wrong)}
            except RuntimeError as error:
                worker.synchronize(problem)  # raises where the device is lost
                ways[variant] = {"status": "refused", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
        if not problem.gate and not problem.residual:
            calls["plain NCHW"], ways["plain NCHW"] = _in_nchw(problem, operands), {"status": "not verified"}
        say("work: time")
        with tuned_cudnn():
            for call in calls.values():
                call()  # which lets cuDNN try its algorithms
            for name, samples in zip(calls, timer(problem.device)(list(calls.values()), rounds), strict=True):
                ways[name]["us"] = samples
    return {"status": "answered", "ways": ways, "bytes": problem.bytes, "flops": problem.flops}


def _bound(problem: Problem, weights: Any, variant: str) -> Callable:
    return bound(cudnn, problem, weights, variant=variant)


def _in_nchw(problem: ConvProblem, operands: Operands) -> Callable[[], object]:
    x, weight, bias = (t.to(problem.dtype).contiguous() for t in (operands.call[0], *operands.weights))
    activate = ACTIVATIONS[problem.activation].in_place
    return lambda: activate(F.conv2d(x, weight, bias, *problem.geometry))


def problem_of(
    name: str,
    batch: int,
    dtype: str,
    size: int | None,
    device: str,
    gate: bool = False,
    residual: bool = False,
    second: str = "",
    **_: Any,
) -> Problem:
    """An operation of `cases.operations` as backends are asked for it; with `second` the two back to back."""
    from ..subjects import scaled

    if second:
        first, behind = (problem_of(one, batch, dtype, size, device) for one in (name, second))
        return BackToBackProblem.of(first, replace(behind, means=True))

    facts, kind = cases.operations()[name], getattr(torch, dtype)
    device = "cuda:0" if device == "cuda" else device
    if facts["op"] == "squeeze_excite":
        return SqueezeExciteProblem(batch, facts["in"], facts["out"], facts["activation"], kind, device)
    hw = scaled(facts["hw"], size) * facts["stride"]
    padding = facts["dilation"] * (facts["kernel"] // 2)
    pairs = (facts["stride"],) * 2, (padding,) * 2, (facts["dilation"],) * 2
    shape, kernel = (batch, facts["in"], hw, hw), (facts["kernel"],) * 2
    operands = facts["activation"], gate, residual, kind, device
    return ConvProblem(shape, facts["out"], kernel, Geometry(*pairs, facts["groups"]), *operands)


def case(case: dict[str, Any], peers: list[str], rounds: int, device: str, say: Say, **_: Any) -> dict[str, Any]:
    """A case of `bench.measure`."""
    from .. import measure
    from ..peers import choose

    chosen = choose(peers, device, case["kind"])
    found = measure.measure(cases.Case(**case), device, chosen, rounds, lambda text: say(f"work: {text}"))
    return {"status": found["status"], "reason": found["reason"], "record": found}


def tests(say: Say, words: list[str], workers: int, folder: str, device: str = "", **_: Any) -> dict[str, Any]:
    """Tests by pytest, with what they print in tests.txt, where it also is after a deadline."""
    spread = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=-ra"]
    found = command(say, ["-m", "pytest", *options, *spread, *words], folder, {"REGNET_FAST_TEST_DEVICE": device})
    status = {0: "passed", 5: "skipped"}.get(found["exit"], "failed")
    return {**found, "status": "skipped" if status == "passed" and " passed" not in found["tail"] else status}


def command(
    say: Say, words: list[str], folder: str, environment: dict[str, str] | None = None, **_: Any
) -> dict[str, Any]:
    """A program of this project, with what it prints in commands.txt."""
    log = Path(folder) / ("tests.txt" if "pytest" in words else "commands.txt")
    say(f"work: {' '.join(words)}")
    variables = {name: value for name, value in (environment or {}).items() if value}
    with log.open("ab") as file:
        file.write(f"$ python {' '.join(words)}\n".encode())
        file.flush()
        begin = file.tell()
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT
        )
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - TAIL))
        tail = file.read().decode(errors="replace")
    status = "answered" if done.returncode == 0 else "failed"
    return {"status": status, "exit": done.returncode, "tail": tail}


def verdicts(say: Say, folder: str, **_: Any) -> dict[str, Any]:
    """What trials have found meanwhile, in a file that `regnet-fast verdicts import` takes."""
    from regnet_fast.store import verdicts as kept

    content = kept.exported()
    (Path(folder) / "verdicts.json").write_text(json.dumps(content))
    return {"status": "answered", "verdicts": len(content["verdicts"])}


ANSWERS = {
    "machine": machine,
    "trial": trial,
    "cudnn": ask_cudnn,
    "case": case,
    "tests": tests,
    "command": command,
    "verdicts": verdicts,
}


def answer(question: dict[str, Any], say: Say) -> dict[str, Any]:
    """Whatever a question asks; what Python raises of it fails alone."""
    facts = dict(question)
    try:
        say("work")
        return ANSWERS[facts.pop("do")](say=say, **facts)
    except Exception as error:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises where the device is lost: this process with it
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}


if __name__ == "__main__":
    serve(*descriptors(sys.argv[1:]), answer)
