"""Drives workers through cases: progress, a file written after every case, going on where a run was interrupted."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from . import record, spread
from .cases import FRESH_PROCESS, Case
from .worker import serve


class Worker:
    """A process of `bench.worker`, and the pipe to it. `cache` is where it and others keep what they compile."""

    def __init__(self, kind: str, device: str, patterns: Sequence[str] | None, rounds: int, cache: str | None = None):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, kind, device, list(patterns) if patterns else None, rounds, cache)
        self.process = context.Process(target=serve, args=arguments, daemon=False)
        self.process.start()
        theirs.close()

    def measure(self, case: Case, deadline: float | None, announce: Callable) -> dict[str, Any] | None:
        """The record of a case; a failed one where the process died; None where the deadline passed, and it is dead."""
        try:
            self.pipe.send(case.as_dict())
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and (left <= 0 or not self.pipe.poll(left)):
                    self.stop(kill=True)
                    return None
                what, content = self.pipe.recv()
                if what == "done":
                    return content
                announce(content)
        except (EOFError, OSError):
            self.process.join()
            return {**record.empty_case(case), "reason": f"the process {_death(self.process.exitcode)}"}

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def stop(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        elif self.alive:
            with suppress(OSError):  # it may die meanwhile
                self.pipe.send(None)
        self.process.join()
        self.pipe.close()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (": probably too little memory" if name == "SIGKILL" else "")
    return f"ended with status {code}"


def run(
    kind: str,
    cases: Sequence[Case],
    device: str,
    patterns: Sequence[str] | None,
    rounds: int,
    processes: int,
    command: str,
    path: Path | None = None,
    budget_s: float | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Measure cases into a run, and into its file after each one.

    Args:
        kind: of the cases.
        cases: what to measure; those that the file already has are not measured again.
        device: "cpu", "cuda" or "cuda:1".
        patterns: of the peers.
        rounds: samples of each variant in each process.
        processes: how many measure each case, one after another, where a case has a process of its own.
        command: what reproduces the run.
        path: the file. Without one nothing is kept.
        budget_s: seconds after which no case goes on; the run is then left unfinished, to be gone on with. A case that
            had more than half of the budget to itself and did not end is recorded as failed.
        quick: ceilings by a glance instead of a measurement.

    Raises RecordError where the file is of other conditions.
    """
    from tqdm import tqdm

    from .roofline.ceilings import measure_ceilings

    begin = time.monotonic()
    deadline = None if budget_s is None else begin + budget_s
    facts = record.conditions(device)
    found = None if path is None else record.resume(path, kind, facts)
    if found is None:
        found = record.new_run(kind, command, facts, measure_ceilings(device, sorted({c.dtype for c in cases}), quick))
    done = {case["id"] for case in found["cases"]}
    left = [case for case in cases if case.id not in done]
    found["finished"] = None
    worker: Worker | None = None
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared with child processes, which do not use it
        with tqdm(total=len(cases), initial=len(cases) - len(left), unit="case", disable=None) as bar:
            for case in left:
                if deadline is not None and time.monotonic() >= deadline:
                    return found
                started = time.monotonic()

                def announce(text: str, at: str = case.id) -> None:
                    bar.set_postfix_str(f"{at}: {text}")

                if kind in FRESH_PROCESS:
                    result = _in_fresh_processes(
                        processes, partial(Worker, kind, device, patterns, rounds), case, deadline, announce
                    )
                else:
                    if worker is None or not worker.alive:
                        worker = Worker(kind, device, patterns, rounds)
                    result = worker.measure(case, deadline, announce)
                if result is None:
                    if budget_s is None or time.monotonic() - started < budget_s / 2:
                        return found
                    result = {**record.empty_case(case), "reason": f"took longer than {budget_s:.0f} s"}
                found["cases"].append(result)
                if path is not None:
                    record.save(found, path)
                bar.update()
                bar.write(line(result), file=sys.stdout)
                sys.stdout.flush()
        found["finished"] = record.now()
        if path is not None:
            record.save(found, path)
        return found
    finally:
        if worker is not None and worker.alive:
            worker.stop(kill=True)


def _in_fresh_processes(
    count: int, new: Callable[..., Worker], case: Case, deadline: float | None, announce: Callable
) -> dict[str, Any] | None:
    """A case measured by several processes. The first compiles what the others find in the cache."""
    records = []
    with tempfile.TemporaryDirectory() as cache:
        for index in range(count):
            worker = new(cache=cache)
            try:
                said = f"process {index + 1} of {count}: " if count > 1 else ""
                found = worker.measure(case, deadline, lambda text, said=said: announce(said + text))
            finally:
                worker.stop(kill=True)
            if found is None:
                return None
            records.append(found)
            if found["status"] != "timed":
                break
    return spread.pooled(records)


def line(result: dict[str, Any]) -> str:
    """One line about a record: the times, or why there are none."""
    if result["status"] != "timed":
        return f"{result['id']}: {result['status']}: {result['reason']}"
    times = ", ".join(
        f"{name} {v['median_ms']:.3g} ms" if v["status"] == "timed" else f"{name} {v['status']}"
        for name, v in result["variants"].items()
    )
    ratios = ", ".join(
        f"{r['ratio']:.2f}x ({r['low']:.2f}-{r['high']:.2f}) over {key}" for key, r in result["ratios"].items()
    )
    return f"{result['id']}: {times}" + (f"; {ratios}" if ratios else "")
