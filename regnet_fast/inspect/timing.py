"""Calls timed side by side: one process, samples interleaved forwards and backwards, medians with their quartiles.

A sample is several calls in a row, long enough for the clock; a CPU is timed by `perf_counter`, a GPU by events. On a
CPU a rest comes before each sample, and a call that is not timed: threads of OpenMP, OpenVINO and ONNX Runtime go on
spinning for a while after their work, on the cores of whoever comes next.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

SAMPLE_SECONDS = {"cpu": 0.05, "cuda": 0.02}
WARM_UPS = 10
WARM_UP_SECONDS = 2.0  # a call that takes long needs fewer than `WARM_UPS`, but never fewer than `LEAST_WARM_UPS`
LEAST_WARM_UPS = 3
REST_SECONDS = 0.1  # ONNX Runtime's threads were seen to spin for more than 0.03

Announce = Callable[[str], None]


def silent(text: str) -> None:
    """Announces nothing."""


@dataclass
class Timed:
    """One way to compute something, and what was measured of it.

    `call` computes it once; `around` gives the context that its samples run in; `device` is the device's type;
    `error` says why it could not be measured.
    """

    name: str
    call: Callable[[], Any]
    device: str = "cpu"
    around: Callable[[], Any] = nullcontext
    first_seconds: float | None = None
    iterations: int = 1
    samples: list[float] = field(default_factory=list)
    working_mib: float | None = None
    error: str = ""

    @property
    def median(self) -> float:
        """Milliseconds of one call."""
        return statistics.median(self.samples)

    def sample(self, iterations: int = 1) -> float:
        """Milliseconds of one call, from several in a row."""
        with self.around():
            if self.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(iterations):
                    self.call()
                end.record()
                end.synchronize()
                return start.elapsed_time(end) / iterations
            begin = time.perf_counter()
            for _ in range(iterations):
                self.call()
            return 1e3 * (time.perf_counter() - begin) / iterations

    def warm_up(self) -> None:
        """Call it until it is warm, and choose how many calls make a sample."""
        estimate, begin = math.inf, time.perf_counter()
        for count in range(WARM_UPS):
            if count >= LEAST_WARM_UPS and time.perf_counter() - begin > WARM_UP_SECONDS:
                break
            estimate = min(estimate, self.sample())
        self.iterations = max(1, math.ceil(1e3 * SAMPLE_SECONDS[self.device] / max(estimate, 1e-3)))
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.sample()
            self.working_mib = (torch.cuda.max_memory_allocated() - before) / 2**20

    def rested_sample(self) -> float:
        """Milliseconds of one call, from as many as `warm_up` chose, undisturbed by what ran before."""
        if self.device == "cpu":
            time.sleep(REST_SECONDS)
            self.sample()
        return self.sample(self.iterations)

    def as_dict(self, images: int) -> dict[str, Any]:
        """What was measured, for calls that serve so many images."""
        q1, median, q3 = quartiles(self.samples)
        return {
            "median_ms": median,
            "q1_ms": q1,
            "q3_ms": q3,
            "images_per_s": 1e3 * images / median,
            "first_s": self.first_seconds,
            "iterations": self.iterations,
            "samples_ms": self.samples,
            "working_mib": self.working_mib,
        }


def synchronize(device: str) -> None:
    """Wait for a device of this type."""
    if device == "cuda":
        torch.cuda.synchronize()


def describe(error: Exception) -> str:
    """An exception's class and the first line of its message."""
    lines = str(error).strip().split("\n")
    return f"{type(error).__name__}: {lines[0][:200]}"


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, median, q3


def interleave(found: Sequence[Timed], rounds: int, announce: Announce = silent) -> None:
    """Warm all up and sample all in turn, forwards and backwards."""
    announce("warming up")
    for timed in found:
        timed.warm_up()
    for index in range(rounds):
        announce(f"round {index + 1} of {rounds}")
        for timed in found if index % 2 == 0 else reversed(found):
            timed.samples.append(timed.rested_sample())


def ratio(peers: Iterable[Timed], ours: Timed) -> dict[str, Any] | None:
    """How many times faster ours is than the fastest of some peers; None where no peer was timed.

    The median of the quotients within the rounds; `low` and `high` are their quartiles.
    """
    timed = [peer for peer in peers if peer.samples and not peer.error]
    if not timed:
        return None
    best = min(timed, key=lambda peer: peer.median)
    low, middle, high = quartiles([a / b for a, b in zip(best.samples, ours.samples, strict=True)])
    return {"peer": best.name, "ratio": middle, "low": low, "high": high}


@contextmanager
def tuned_cudnn() -> Iterator[None]:
    """Let cuDNN try its algorithms, for every side alike."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def frozen_compilation(force_layout: bool = False) -> Iterator[None]:
    """What to compile in: nothing from the cache of earlier runs, and without gradients the weights frozen.

    Where the environment names a cache of inductor's, that one, to be shared by processes.
    """
    import torch._inductor.config as config
    from torch._inductor import utils

    cache = nullcontext() if "TORCHINDUCTOR_CACHE_DIR" in os.environ else utils.fresh_cache()
    with cache, config.patch(freezing=True, force_layout_optimization=force_layout):
        yield
