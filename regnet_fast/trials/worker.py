"""The process that tries candidates: `python -m regnet_fast.trials.worker --read-fd N --write-fd M`.

A question names a problem, a candidate and the peer. The answer has a status of `verdicts.STATUSES`, and the times of
both where the candidate is verified. Whatever else becomes of this process, `process.Child` says.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..backends import Problem
from ..settings import Settings
from ..store.environment import card
from . import step  # noqa: F401, as a kind of problem
from .candidate import Candidate, from_json, prepare
from .check import Wrong, make, verify
from .clock import timer
from .process import descriptors, serve


def answer(question: dict[str, Any], say: Callable[[str], object]) -> dict[str, Any]:
    """Try one candidate for one problem."""
    for module in question.get("modules", ()):
        importlib.import_module(module)
    problem = from_json(question["problem"])
    Settings(*question["settings"]).apply()
    unable = _unable(problem, question["card"])
    if unable:
        return {"status": "unable", "reason": unable}
    candidate, peer = (partial(prepare, candidate=Candidate.named(question[name])) for name in ("candidate", "peer"))
    with torch.inference_mode():
        try:
            case = make(problem, 0)
            peer(problem, case.weights)(*case.call)
            synchronize(problem)
        except torch.OutOfMemoryError as error:
            return {"status": "out of memory", "reason": str(error).splitlines()[0]}
        except Exception as error:  # no candidate's fault
            return {"status": "unable", "reason": f"the peer: {type(error).__name__}: {str(error)[:300]}"}
        try:
            say("compile")
            run = candidate(problem, case.weights)
            run(*case.call)
            synchronize(problem)
            refused = getattr(run, "__self__", run).refused
            if refused:
                return {"status": "refused", "reason": refused}
            say("verify")
            error = verify(problem, candidate, peer)
            synchronize(problem)
            say("time")
            calls = [partial(run, *case.call), partial(peer(problem, case.weights), *case.call)]
            times, peers = timer(problem.device)(calls, question["rounds"])
            synchronize(problem)
            verify(problem, candidate, peer)
        except Wrong as wrong:
            return {"status": "wrong", "reason": str(wrong)}
        except torch.OutOfMemoryError as error:
            return {"status": "out of memory", "reason": str(error).splitlines()[0]}
        except Exception as error:  # the compiler, or a launch that the library refuses
            if _poisoned(problem):
                raise
            return {"status": "refused", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"status": "verified", "us": times, "peer_us": peers, "error": error}


def _unable(problem: Problem, asked: str) -> str:
    """Why nothing can be tried on the device of a problem, or ''. Half of the memory that is free may be used.

    Another process may have the GPU for itself, or all of its memory. Under its name there may be another GPU here than
    where it was asked, after CUDA_VISIBLE_DEVICES was changed there.
    """
    try:
        if card(problem.device) != asked:
            return f"{problem.device} is another GPU in a second process than in this one"
        if not problem.device.startswith("cuda"):
            return ""
        free, total = torch.cuda.mem_get_info(problem.device)
        torch.cuda.set_per_process_memory_fraction(free / total / 2, problem.device)
        torch.ones(1, dtype=torch.float32, device=problem.device).sum().item()
    except RuntimeError as error:
        return f"{problem.device} cannot be used by a second process: {str(error).splitlines()[0]}"
    return ""


def synchronize(problem: Problem) -> None:
    """Wait for the device, so that an error is that of the candidate that caused it."""
    if problem.device.startswith("cuda"):
        torch.cuda.synchronize(problem.device)


def _poisoned(problem: Problem) -> bool:
    """Whether the device can no longer be used here: every later call would raise the same error."""
    try:
        synchronize(problem)
        torch.ones(1, dtype=torch.float32, device=problem.device).sum().item()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    serve(*descriptors(sys.argv[1:]), answer)
