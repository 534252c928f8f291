"""One slice of the run: `python -m bench gpu`.

    python -m bench gpu --budget 540      each call goes on where the one before ended
    python -m bench gpu --dry-run         the same order on tiny shapes, on a CPU, into .cache/gpu-dry-run/

The journal gpu.jsonl and all else that a slice writes lies in $OUT where that is set, else in bench/results/<machine>/.
A journal that lies there from earlier slices is gone on with; where $OUT has none it begins with a copy of it, so that
what comes back is always whole. From its cases come the files that `python -m bench report` reads.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from pathlib import Path

from .. import record
from ..cases import KINDS, Case
from .order import DRY, MACHINE, REAL, ROOT, Question, items
from .summary import brief, render
from .walk import BAD, Answer, Journal, Walk, ask_once

DRY_RESULTS = ROOT / ".cache" / "gpu-dry-run"
JOURNAL = "gpu.jsonl"


def run(results: Path, budget_s: float | None = None, dry_run: bool = False) -> int:
    """One slice of at most `budget_s` seconds. Returns 0, or 1 where something is wrong, failed, or had no answer.

    Args:
        results: the folder of all machines' results.
        budget_s: None for as long as it takes.
        dry_run: tiny shapes on a CPU, into a folder of its own.

    Raises ValueError where there is no GPU and it is no dry run, and RuntimeError where the machine does not answer.
    """
    import torch

    until = time.monotonic() + (math.inf if budget_s is None else budget_s)
    if not dry_run and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --dry-run walks through the same on this CPU")
    scale = DRY if dry_run else REAL
    machine = ask_once({**MACHINE, "device": scale.device}, 120)
    if machine["status"] != "answered":
        raise RuntimeError(f"the machine does not answer: {machine['reason']}")
    root = DRY_RESULTS if dry_run else results
    kept = root / record.slug(machine["conditions"])
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") and not dry_run else kept
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / JOURNAL).exists() and (kept / JOURNAL).exists():
        shutil.copyfile(kept / JOURNAL, folder / JOURNAL)
    journal = Journal(folder / JOURNAL, machine)
    journal.open()

    def told(question: Question, answer: Answer) -> None:
        print(f"{question.item}: {question.name}: {brief(answer)}", flush=True)
        if "case" in question.facts:
            save_cases(journal, questions, folder)

    asked = items(scale)
    questions = [question for item in asked for question in item.questions]
    left = Walk(journal, until, told).all(asked)
    save_cases(journal, questions, folder)
    if folder == kept:
        from .. import report

        report.write(root)
    print(render(journal), flush=True)
    bad = [q for q in questions if journal.answers.get(q.key, {}).get("status") in BAD]
    for question in bad:
        print(f"{question.item}: {question.name}: {brief(journal.answers[question.key])}", file=sys.stderr)
    print(
        f"{len(left)} of {len(questions)} questions are left: the same command goes on"
        if left
        else "the run is complete"
    )
    return 1 if bad else 0


def save_cases(journal: Journal, questions: list[Question], folder: Path) -> None:
    """The cases among the answers as runs of `bench.record`, each kind a file. Of a case that was asked twice the later
    item's record counts.
    """
    conditions = journal.machine["conditions"]
    for kind in KINDS:
        asked = [q for q in questions if "case" in q.facts and q.facts["case"]["kind"] == kind]
        found = {}
        for question in asked:
            answer = journal.answers.get(question.key)
            if answer is not None:
                empty = {**record.empty_case(Case(**question.facts["case"])), "reason": brief(answer)}
                found[empty["id"]] = answer.get("record") or empty
        if found:
            run = record.new_run(kind, "python -m bench gpu", conditions, journal.machine["ceilings"])
            done = all(question.key in journal.answers for question in asked)
            run.update(cases=list(found.values()), finished=record.now() if done else None)
            record.save(run, folder / f"{kind}.json")
