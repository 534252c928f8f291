"""README.md and the pages of docs/, as the tests read them: blocks of code, lines for a shell, links and headings."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]*)#?([^)\s]*)(?=\))")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_INDENTED = re.compile(r"^    (\S.*)$", re.MULTILINE)
_CODE = re.compile(r"`([^`]+)`")
_REMARK = re.compile(r" {3,}.*")


def name(page: Path) -> str:
    """A page as the tests call it: README.md, docs/limits.md."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of a language, each with the number of its first line."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in _FENCE.finditer(text) if m[1] == language]


def commands(page: Path) -> list[str]:
    """What a reader may type into a shell: indented lines without the remark behind them, and code within sentences."""
    text = _without_fences(page)
    indented = [_REMARK.sub("", found) for found in _INDENTED.findall(text)]
    return indented + [" ".join(found.split()) for found in _CODE.findall(_INDENTED.sub("", text))]


def links(page: Path) -> list[tuple[str, str]]:
    """The targets of links to files, each with its anchor; either may be empty."""
    return _LINK.findall(_CODE.sub("", _without_fences(page)))


def anchors(page: Path) -> set[str]:
    """What a link may name behind '#'."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in _HEADING.findall(_without_fences(page)))
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


def _without_fences(page: Path) -> str:
    return _FENCE.sub(lambda m: "\n" * m[0].count("\n"), page.read_text())
