"""docs/compilation.md: a section for each version of Triton, whose rows are replaced by newly compiled ones."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "compilation.md"
COLUMNS = (
    "| kernel | dtype | architecture | variants | tiles | registers | shared, KB | spills | multiplies with |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---|\n"
)
_ROW = re.compile(r"^\| (\w+\.\w+) \| (\w+) \| sm_(\d+) \| (\d+) \|.*\| (\d+) \| [^|]* \|$", re.MULTILINE)


def rows(text: str) -> dict[tuple[str, str, int], re.Match]:
    """The rows of a table by kernel, dtype and architecture."""
    return {(row[1], row[2], int(row[3])): row for row in _ROW.finditer(text)}


def update(page: str, version: str, table: str) -> str:
    """The page with the rows of a table in the section of a version of Triton, in the place of those it had."""
    head, *sections = re.split(r"^(?=## Triton )", page, flags=re.MULTILINE)
    found = {section.split()[2]: rows(section) for section in sections}
    found[version] = found.get(version, {}) | rows(table)
    return head + "\n".join(_section(version, found[version]) for version in sorted(found, key=_order, reverse=True))


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _section(version: str, found: dict[tuple[str, str, int], re.Match]) -> str:
    variants, spilling = (sum(int(row[i]) for row in found.values()) for i in (4, 5))
    lines = "\n".join(found[key][0] for key in sorted(found))
    return f"## Triton {version}\n\n{variants:,} variants, of which {spilling} spill.\n\n{COLUMNS}{lines}\n"
