"""How long calls take, in microseconds: on a GPU by its own clock, on a CPU by the process's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

Calls = Sequence[Callable[[], object]]


def timer(device: str) -> Callable[[Calls, int], list[list[float]]]:
    """`timer(device)(calls, rounds)`: so many samples of each call, interleaved, after a warm-up of the same."""
    if device.startswith("cuda"):
        import torch

        from ..inspect.tune import GpuTimer

        return GpuTimer(torch.device(device))
    return on_cpu


def on_cpu(calls: Calls, rounds: int) -> list[list[float]]:
    """By the process's clock."""
    samples: list[list[float]] = [[] for _ in calls]
    for i in range(rounds + 2):
        for which in range(len(calls)) if i % 2 else reversed(range(len(calls))):
            start = time.perf_counter()
            calls[which]()
            if i >= 2:
                samples[which].append(1e6 * (time.perf_counter() - start))
    return samples
