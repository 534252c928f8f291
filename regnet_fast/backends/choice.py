"""Which of csrc/ and Triton is asked first for a grouped convolution, where a user leaves it open: `cuda|triton`.

`choices.json` beside this file has times of both for each group width, stride and step, and says where they come from.
Those of today are modelled by `python -m bench.cuda_choice`, for two GPUs at batch 256; nothing was measured yet.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

from . import cuda_launch
from .cuda_plans import SHARED_BYTES
from .problem import ConvProblem, Problem

FILE = Path(__file__).with_name("choices.json")
STEPS = ("inference", "forward", "backward")
"""What a convolution is computed for: inference, and the two halves of a training step."""
COMPARED = ("cuda", "triton")


class Ranking(NamedTuple):
    """Both backends, the one to ask first before the other, and why, or ''."""

    names: tuple[str, str]
    reason: str


def ranked(problem: Problem, step: str = "inference") -> Ranking:
    """Both backends in the order in which they are asked: csrc/ first where nothing is known."""
    if not isinstance(problem, ConvProblem) or problem.groups == 1 or cuda_launch.refuse_device(problem.device):
        return Ranking(COMPARED, "")
    width, arch = problem.input_shape[1] // problem.groups, cuda_launch.target(problem.device).arch
    return _ranked(arch, step, width, problem.stride[0])


@functools.lru_cache(maxsize=1024)
def _ranked(arch: int, step: str, width: int, stride: int) -> Ranking:
    """By the table of the architecture that is nearest in its shared memory, and the nearest width."""
    table = min(_tables(), key=lambda table: abs(SHARED_BYTES[table["arch"]] - SHARED_BYTES[arch]))
    known = [entry for entry in table["entries"] if (entry["step"], entry["stride"]) == (step, stride)]
    if not known or width < min(entry["width"] for entry in known):
        return Ranking(COMPARED, "")
    entry = min(known, key=lambda entry: abs(entry["width"] - width))
    first, second = sorted(COMPARED, key=entry.__getitem__)
    times = entry[second] / entry[first]
    reason = f"{table['provenance']} to take {times:.2f} times as long as {first} ({table['machine']}, {step})"
    return Ranking((first, second), reason)


@functools.lru_cache(maxsize=1)
def _tables() -> list[dict]:
    return json.loads(FILE.read_bytes())
