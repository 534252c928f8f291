"""The kernels of csrc/ as nvcc compiled them: a file with a row for each, and a summary."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from regnet_fast.backends.cuda.plans import SHARED_BYTES, TYPES

from ..report import markdown
from ..report.tables import ABSENT, Table

Row = dict[str, str | int]


def write(path: Path, rows: Sequence[Row]) -> None:
    """All rows into a file of comma-separated values."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["architecture"], kind(row), row["kernel"])))


def kind(row: Row) -> tuple[str, int]:
    """The kernel with what it makes, and its group width (0: none)."""
    name, _, rest = row["kernel"].partition("<")
    facts = rest.rstrip(">").split(", ")
    if name == "grouped_conv_backward":
        made = {("true", "true"): "both", ("true", "false"): "dx", ("false", "true"): "dweight"}[facts[12], facts[13]]
        return f"{name}, {made}", int(facts[1])
    return name, int(facts[1]) if name.startswith("grouped") else 0


def _dtype(row: Row) -> str:
    """The dtype of a kernel, or ABSENT for one that has none."""
    names = {name: dtype for dtype, name in TYPES.items()}
    return names.get(row["kernel"].partition("<")[2].partition(",")[0], ABSENT)


def _groups(rows: Iterable[Row], label: Callable[[Row], tuple]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(label(row), []).append(row)
    return dict(sorted(found.items()))


def _worst(rows: Sequence[Row]) -> tuple[str, ...]:
    """The most registers and KB of shared memory of any kernel, and the least occupancy."""
    most = max(row["registers"] for row in rows), max(row["shared_bytes"] for row in rows) // 1024
    return (*map(str, most), str(min(row["occupancy_percent"] for row in rows)))


def summary(rows: Sequence[Row]) -> str:
    """What is the worst of each architecture, and of each kernel and width on every architecture."""
    totals = [
        (f"sm_{arch}", dtype, str(len(same)), *_worst(same), *(str(sum(row[what] for row in same)) for what in _SUMS))
        for (arch, dtype), same in _groups(rows, lambda row: (row["architecture"], _dtype(row))).items()
    ]
    titles = "architecture", "dtype", "kernels", "registers", "shared, KB", "occupancy, %", *_SUMS.values()
    worst = []
    for (kernel, width), same in _groups(rows, kind).items():
        of_arch = _groups(same, lambda row: (row["architecture"],))
        cells = [" / ".join(_worst(of_arch[arch,])) if (arch,) in of_arch else ABSENT for arch in SHARED_BYTES]
        worst.append((kernel, str(width) if width else ABSENT, str(len(same)), *cells))
    faults = [
        (row["kernel"], f"sm_{row['architecture']}", str(row["local_bytes"])) for row in rows if row["local_bytes"]
    ]
    found = [Table(titles, tuple(totals)), Table(_TITLES, tuple(worst))]
    if faults:
        found.insert(1, Table(("kernel with local memory", "architecture", "bytes"), tuple(sorted(faults))))
    return markdown.render(found)


_SUMS = {"local_bytes": "local memory, bytes", "smaller_copies": "copies below 16 bytes"}
_TITLES = ("kernel", "width", "kernels", *(f"sm_{arch}" for arch in SHARED_BYTES))
