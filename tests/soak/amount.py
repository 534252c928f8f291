"""How much is tried: REGNET_FAST_SOAK times the short form's number of examples, and what was tried, for the page.

The short form tries the same examples every time. With a factor above 1 they are random, and every test leaves its
figures in `RESULTS`, from which report.py makes docs/robustness.md.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import hypothesis

FACTOR = float(os.environ.get("REGNET_FAST_SOAK", "1"))
RESULTS = Path(__file__).parents[2] / ".cache" / "soak"


def times(short: int) -> int:
    """A number of the short form in the form that runs."""
    return max(1, round(short * FACTOR))


def examples(short: int) -> hypothesis.settings:
    """Settings of a hypothesis test that tries `short` examples in the short form."""
    return hypothesis.settings(
        max_examples=times(short),
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class Tally:
    """What one test tried: counts by name, and series over time."""

    def __init__(self, test: str):
        self.test, self.counts, self.series = test, Counter(), {}
        self.start = time.monotonic()

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] += number

    def write(self, folder: Path, failure: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found = {
            "test": self.test,
            "seconds": time.monotonic() - self.start,
            "factor": FACTOR,
            "failure": failure,
            "counts": dict(self.counts),
            "series": self.series,
        }
        name = "".join(c if c.isalnum() else "-" for c in self.test)
        (folder / f"{name}.json").write_text(json.dumps(found))
