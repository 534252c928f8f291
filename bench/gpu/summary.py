"""The answers as tables: `python -m bench.gpu.summary FILE`, where FILE is a journal."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..report.markdown import render as rendered
from ..report.tables import ABSENT, Table, number

Answer = dict[str, Any]


def brief(answer: Answer) -> str:
    """An answer in a line."""
    if answer["status"] in ("timed", "answered", "verified") and not answer.get("reason"):
        ways = answer.get("ways") or {"": answer}
        times = ", ".join(f"{name} {_outcome(way)}".strip() for name, way in ways.items())
        if "record" in answer:
            from ..runner import line

            return line(answer["record"]).partition(": ")[2]
        return times or answer["status"]
    reason = answer.get("reason") or " ".join(answer.get("tail", "").split())[-200:]
    return f"{answer['status']}: {reason}" if reason else answer["status"]


def _outcome(way: Answer) -> str:
    """The time of a way with that of the peer, or why there is none."""
    us = _median(way.get("us"))
    if us is None:
        return f"{way['status']} {way.get('reason', '')[:100]}".strip()
    peer = _median(way.get("peer_us"))
    return f"{number(us)} us" + (f" ({peer / us:.2f}x the peer's {number(peer)})" if peer else "")


def _median(samples: list[float] | None) -> float | None:
    return statistics.median(samples) if samples else None


def render(journal: Any) -> str:
    """The tables of kernels: what cuDNN and ours take, and what that is of the time to copy the bytes."""
    bandwidth = journal.machine["ceilings"]["bytes_per_s"]
    rows = []
    for (item, name), answer in journal.answers.items():
        for way, found in _ways(answer):
            us = _median(found.get("us"))
            copy = us and number(100 * 1e6 * answer["bytes"] / bandwidth / us, 2)
            peer = _median(found.get("peer_us"))
            ratio = f"{peer / us:.2f}x" if us and peer else ABSENT
            cells = (item, name, way, found["status"], number(us), copy or ABSENT, ratio)
            rows.append((*cells, str(found.get("reason", ""))[:80] or ABSENT))
    titles = ("item", "operation", "by", "status", "us", "% of copy", "over the library", "reason")
    return rendered([Table(titles, tuple(rows))]) if rows else ""


def _ways(answer: Answer) -> Iterator[tuple[str, Answer]]:
    if "ways" in answer:
        yield from answer["ways"].items()
    elif "peer" in answer:
        yield "ours", answer


def main(arguments: list[str] | None = None) -> int:
    from .walk import Journal, read

    parser = argparse.ArgumentParser(prog="python -m bench.gpu.summary", description=__doc__.partition(":")[0])
    parser.add_argument("file", type=Path)
    path = parser.parse_args(arguments).file
    machines = [line["machine"] for line in read(path) if "machine" in line]
    if not machines:
        print(f"bench.gpu.summary: {path} is no journal of a run", file=sys.stderr)
        return 2
    print(render(Journal(path, machines[-1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
