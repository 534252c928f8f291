"""Everything that is measured of a CPU, and then the report: `python -m bench cpu`.

    python -m bench cpu --budget 540      one slice; each call goes on where the one before ended

Results lie in bench/results/<machine>/, written after every case.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import cases, record, runner
from .report.tables import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
BOTH = ("float32", "bfloat16")
LEAST_S = 20  # a step that has less left waits for the next slice


@dataclass(frozen=True)
class Step:
    """One `python -m bench KIND`, whose results are the KIND.json of the machine's folder."""

    kind: str
    patterns: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)
    peers: tuple[str, ...] | None = None
    rounds: int = 7
    processes: int = 1

    def command(self, file: Path) -> str:
        words = ["python", "-m", "bench", self.kind, "--case", *self.patterns]
        words += ["--batch", *map(str, self.batches), "--dtype", *self.dtypes]
        words += ["--peers", *self.peers] if self.peers else []
        words += ["--processes", str(self.processes)] if self.processes > 1 else []
        return shlex.join([*words, "--rounds", str(self.rounds), "--json", os.path.relpath(file, ROOT)])


MODELS = (*FAMILIES, "regnety_002")
TRAINED = ("regnety_002", "regnety_016", "repvgg_a2")
CPU_STEPS = (
    Step("models", MODELS, (1, 8), BOTH),
    Step("ops", ("regnety_016",), (1, 8), BOTH, peers=("timm*",)),
    Step("train", TRAINED, (16,), ("float32",), peers=("timm*", "regnet_fast channels_last"), processes=3),
)


def run(results: Path, budget_s: float | None = None) -> int:
    """One slice of at most `budget_s` seconds. Returns 0, or 1 where a case is wrong or failed.

    Args:
        results: the folder of all machines' results.
        budget_s: None for as long as it takes.

    Raises RecordError where the folder holds results under other conditions.
    """
    from . import report

    deadline = time.monotonic() + (math.inf if budget_s is None else budget_s)
    folder = results / record.slug(record.conditions("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    good = finished = True
    for step in CPU_STEPS:
        left = deadline - time.monotonic()
        if left < LEAST_S:
            finished = False
            break
        file = folder / f"{step.kind}.json"
        print(f"{step.kind}" + ("" if left == math.inf else f", {left:.0f} s left"), flush=True)
        chosen = cases.select(step.kind, step.patterns, step.batches, step.dtypes)
        command, limit = step.command(file), None if left == math.inf else left
        how = ("cpu", step.peers, step.rounds, step.processes, command, file, limit)
        found = runner.run(step.kind, chosen, *how)
        good &= all(case["status"] == "timed" for case in found["cases"])
        finished &= found["finished"] is not None
    for path in report.write(results):
        print(path)
    print("the run is complete" if finished else "there is more to measure: the same command goes on")
    if not good:
        print("a case is wrong or failed: see above", file=sys.stderr)
    return 0 if good else 1
