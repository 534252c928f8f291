"""Everything that is measured of one machine, and then the report: `python -m bench gpu` and `python -m bench cpu`.

    python -m bench gpu --budget 540      one slice; each call goes on where the one before ended
    python -m bench gpu --dry-run         the same code on tiny shapes, on whatever device there is

Results lie in bench/results/<machine>/, written after every case; those of a dry run in .cache/gpu-dry-run/.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import cases, record, runner

ROOT = Path(__file__).resolve().parent.parent
DRY_RESULTS = ROOT / ".cache" / "gpu-dry-run"
DRY_TESTS = "regnetx_002 and float32"
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
    size: int | None = None
    rounds: int = 7
    processes: int = 1

    def command(self, device: str, file: Path) -> str:
        words = ["python", "-m", "bench", self.kind, "--device", device, "--case", *self.patterns]
        words += ["--batch", *map(str, self.batches), "--dtype", *self.dtypes]
        words += ["--peers", *self.peers] if self.peers else []
        words += ["--size", str(self.size)] if self.size else []
        words += ["--processes", str(self.processes)] if self.processes > 1 else []
        return shlex.join([*words, "--rounds", str(self.rounds), "--json", os.path.relpath(file, ROOT)])


# What decides most comes first: a slice may end anywhere.
GPU_STEPS = (
    Step("models", cases.MODELS, (256, 32, 1)),
    Step("ops", cases.MODELS, (256, 1), peers=("timm*",)),
    Step("train", cases.MODELS, (128,)),
    Step("blocks", ("regnetx_032", "regnety_016", "regnetz_b16"), (256,)),
)
TRAINED = ("regnety_002", "regnety_016", "repvgg_a2")
CPU_STEPS = (
    Step("models", (*cases.MODELS, "regnetx_004", "resnetv2_18"), (1, 8, 32), BOTH, rounds=5, processes=3),
    Step("ops", ("regnety_016",), (1, 8), BOTH, peers=("timm*",)),
    Step("train", TRAINED, (16,), ("float32",), peers=("timm*", "regnet_fast channels_last"), processes=3),
)
DRY_STEPS = (
    Step("models", ("regnetx_002",), (2,), ("float32",), size=32, rounds=2),
    Step("ops", ("grouped_conv/152x152-k3s1g19-*", "squeeze_excite/24-8"), (1, 2), peers=("timm*",), size=64, rounds=2),
    Step("train", ("regnetx_002",), (4,), ("float32",), ("timm*",), 64, 2),  # smaller norms see too few values
    Step("blocks", ("regnety_002/s1.b1",), (2,), ("float32",), ("timm*",), 64, 2),
)


def run(device: str, results: Path, budget_s: float | None = None, dry_run: bool = False) -> int:
    """One slice of at most `budget_s` seconds. Returns 0, or 1 where a test failed or a case is wrong or failed.

    Args:
        device: "cuda" or "cpu". A dry run takes the CPU where there is no GPU.
        results: the folder of all machines' results.
        budget_s: None for as long as it takes.
        dry_run: tiny shapes, into a folder of its own.

    Raises RecordError where the folder holds results under other conditions, and ValueError without a GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        if not dry_run:
            raise ValueError("there is no GPU here; --dry-run walks through the same on this CPU")
        device = "cpu"
    deadline = time.monotonic() + (math.inf if budget_s is None else budget_s)
    steps = DRY_STEPS if dry_run else GPU_STEPS if device == "cuda" else CPU_STEPS
    facts = record.conditions(device)
    root = DRY_RESULTS if dry_run else results
    folder = root / record.slug(facts)
    folder.mkdir(parents=True, exist_ok=True)
    good = finished = True
    if device == "cuda" or dry_run:
        good = _tests(folder / "tests.txt", device, facts, deadline, DRY_TESTS if dry_run else "")
    for step in steps:
        left = deadline - time.monotonic()
        if left < LEAST_S:
            finished = False
            break
        file = folder / f"{step.kind}.json"
        print(f"{step.kind}" + ("" if left == math.inf else f", {left:.0f} s left"), flush=True)
        chosen = cases.select(step.kind, step.patterns, step.batches, step.dtypes, step.size)
        command, limit = step.command(device, file), None if left == math.inf else left
        how = (device, step.peers, step.rounds, step.processes, command, file, limit)
        found = runner.run(step.kind, chosen, *how, quick=dry_run)
        good &= all(case["status"] == "timed" for case in found["cases"])
        finished &= found["finished"] is not None
    from . import report

    for path in report.write(root):
        print(path)
    print("the run is complete" if finished else "there is more to measure: the same command goes on")
    if not good:
        print("a test failed, or a case is wrong or failed: see above", file=sys.stderr)
    return 0 if good else 1


def _tests(log: Path, device: str, facts: dict, deadline: float, only: str) -> bool:
    """Whether the tests for a device pass; the log says of which commit and is not written again for the same."""
    head = f"commit {facts['commit']}, {facts['machine']}, torch {facts['torch']}"
    if log.exists():
        text = log.read_text()
        if text.startswith(f"{head}: passed"):
            return True
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    command += ["-k", only] if only else []
    print(shlex.join(command), flush=True)
    environment = {**os.environ, "REGNET_FAST_TEST_DEVICE": device}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=None if deadline == math.inf else max(1.0, deadline - time.monotonic()),
        )
        verdict, output = "passed" if done.returncode == 0 else f"failed ({done.returncode})", done.stdout
    except subprocess.TimeoutExpired as error:
        verdict, output = "did not end in time", (error.stdout or b"").decode(errors="replace")
    log.write_text(f"{head}: {verdict}\n\n{output[-20000:]}")
    print(f"tests: {verdict}", flush=True)
    return verdict == "passed"
