"""Where the time of a frozen network goes on a CPU: the steps of its program, timed inside it, in classes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from regnet_fast.backends import native
from regnet_fast.backends.cpu_library import Step
from regnet_fast.blocks.program import Program
from regnet_fast.inspect.timing import REST_SECONDS

OTHER = "means, norms, pools"


def timed_steps(program: Program, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """What the classes of steps take, the longest first: `what`, how many `steps`, `ms` and `flops`.

    A step's time is the median of its own in so many runs, each behind a rest and a run that does not count.
    """
    runs = []
    for _ in range(rounds):
        time.sleep(REST_SECONDS)
        program.timed(x)
        runs.append(program.timed(x))
    found: dict[str, dict[str, Any]] = {}
    for same in zip(*runs, strict=True):
        step = same[0][0]
        one = found.setdefault(kind(step), {"what": kind(step), "steps": 0, "ms": 0.0, "flops": 0})
        one["steps"] += 1
        one["ms"] += 1e3 * statistics.median(seconds for _, seconds in same)
        one["flops"] += flops(step)
    return sorted(found.values(), key=lambda one: -one["ms"])


def flops(step: Step) -> int:
    """Multiplications and additions of a convolution computed directly; those of other steps are not counted."""
    if step.kind != native.CONV:
        return 0
    pixels = step.images * step.out_height * step.out_width
    return 2 * pixels * step.out_channels * (step.channels // step.groups) * _product(step.kernel)


def kind(step: Step) -> str:
    """A step's class, in words."""
    if step.kind != native.CONV:
        return OTHER
    if step.images == step.width == step.out_width == 1 and _product(step.kernel) == 1:
        return "vectors (gates, classifier)"
    if step.channels <= native.FEW_CHANNELS:
        return "stem"
    size, width = "x".join(map(str, step.kernel)), step.channels // step.groups
    if _product(step.kernel) == 1 and step.groups == 1:
        return size
    groups = "dense" if step.groups == 1 else "depthwise" if width == 1 else f"groups of {width}"
    return f"{size} {groups}" + (", Winograd" if step.way == native.WINOGRAD else "")


def _product(sizes: Sequence[int]) -> int:
    return sizes[0] * sizes[1]
