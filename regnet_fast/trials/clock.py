"""How long calls take, in microseconds: on a GPU by its own clock, on a CPU by the process's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

QUEUE_US = 300  # in which a call is queued for sure

Calls = Sequence[Callable[[], object]]
Timer = Callable[[Calls, int], list[list[float]]]
"""`timer(calls, rounds)`: so many samples of each call, interleaved."""


def timer(device: str) -> Timer:
    """The timer for a device."""
    return GpuTimer(torch.device(device)) if device.startswith("cuda") else on_cpu


def on_cpu(calls: Calls, rounds: int) -> list[list[float]]:
    """By the process's clock, after a warm-up of the same."""
    samples: list[list[float]] = [[] for _ in calls]
    for i in range(rounds + 2):
        for which in range(len(calls)) if i % 2 else reversed(range(len(calls))):
            start = time.perf_counter()
            calls[which]()
            if i >= 2:
                samples[which].append(1e6 * (time.perf_counter() - start))
    return samples


class GpuTimer:
    """Times calls on a GPU by events, each with a cold L2 cache.

    Before every call a buffer larger than that cache is written, for so long that the call is queued before the GPU
    comes to it: the GPU's time is measured, not Python's.
    """

    def __init__(self, device: torch.device):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.fills = 10
        fill = self([lambda: [self.buffer.zero_() for _ in range(10)]], 2)[0][-1] / 10
        self.fills = math.ceil(QUEUE_US / fill)

    def __call__(self, calls: Calls, rounds: int) -> list[list[float]]:
        marks = []
        for index in range(rounds):
            order = list(enumerate(calls))
            for which, call in order if index % 2 == 0 else reversed(order):
                for _ in range(self.fills):
                    self.buffer.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                marks.append((which, start, end))
        torch.cuda.synchronize()
        samples: list[list[float]] = [[] for _ in calls]
        for which, start, end in marks:
            samples[which].append(1e3 * start.elapsed_time(end))
        return samples
