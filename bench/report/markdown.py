"""Markdown: documents of headings, paragraphs, tables and figures; and filling the places that markers hold for them.

A marker stands alone on a line, and everything up to its end is generated:

    <!-- bench:families cpu-amd-epyc-2-threads -->
    <!-- /bench:families -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from .tables import Table


class ReportError(ValueError):
    """Results or markers from which no report can be made; the message says where and what to do."""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture in the folder figures/ beside the report."""

    name: str
    title: str


Block = str | Heading | Code | Table | Figure
"""A part of a document; a plain string is a paragraph. All text is plain: rendering escapes it."""

_SPECIAL = re.compile(r"[\\`*|~\[\]]|(?<!\w)_|_(?!\w)")
_MARKER = re.compile(
    r"^ {0,3}<!--[ \t]*(?P<end>/?)bench:(?P<name>\S+)(?P<machine>(?:[ \t]+\S+)*?)[ \t]*-->[ \t\r]*$", re.MULTILINE
)


def escape(text: str) -> str:
    """Text that shows as itself within a line or a cell of Markdown, and can neither end it nor bring in HTML."""
    text = " ".join(str(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(lambda found: "\\" + found[0], text)


def render(blocks: Sequence[Block]) -> str:
    """The Markdown of a document, ending in a newline."""
    return "\n\n".join(map(_render, blocks)) + "\n"


def _render(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escape(text)}"
        case Code(text):
            return "    " + " ".join(text.split())
        case Figure(name, title):
            return f"![{escape(title)}](figures/{quote(name)})"
        case Table(titles, rows):
            rule = ["---:" if block.numeric(column) else "---" for column in range(len(titles))]
            cells = [[escape(cell) for cell in row] for row in (titles, *rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
    return escape(block)


def fill(text: str, where: str, content: Callable[[str, str], str]) -> str:
    """The text with `content(name, machine)` between each pair of markers; machine is '' where the marker names none.

    Raises ReportError, naming `where`, the line and the marker, for a marker without its end, an end without its marker
    and whatever `content` cannot give.
    """
    parts, position, opened = [], 0, None
    for marker in _MARKER.finditer(text):
        here = f"{where}, line {text.count(chr(10), 0, marker.start()) + 1}: {marker[0].strip()}"
        if not marker["end"]:
            if opened:
                raise ReportError(f"{here} stands before the end of bench:{opened[0]}: {_closing(opened[0])}")
            opened = marker["name"], here
            parts.append(text[position : marker.end()])
            try:
                parts.append(f"\n{content(marker['name'], marker['machine'].strip())}")
            except ReportError as error:
                raise ReportError(f"{here}: {error}") from None
        elif not opened or opened[0] != marker["name"]:
            raise ReportError(f"{here} ends nothing: put <!-- bench:{marker['name']} ... --> before it, or delete it")
        else:
            opened = None
            position = marker.start()
    if opened:
        raise ReportError(f"{opened[1]} has no end: {_closing(opened[0])}")
    return "".join([*parts, text[position:]])


def _closing(name: str) -> str:
    return f"add the line <!-- /bench:{name} --> after it"
