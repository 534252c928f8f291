"""All reports on one HTML page that needs nothing else: style, script and figures are in it, all text is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from . import figures
from .markdown import Block, Code, Figure, Heading
from .tables import Table

_LOSS = re.compile(r"0\.\d+x")  # a ratio below 1 begins so
_COLOURS = {
    figures.INK: "currentColor",
    figures.MUTED: "var(--muted)",
    figures.RULE: "var(--rule)",
    figures.PAPER: "none",
}

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #24292f; --muted: #6a737d; --rule: #d5dae0; --loss: #b35900;
  --shade: #f6f8fa; --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f1318; --ink: #e2e6ea; --muted: #98a2ad; --rule: #343b44; --loss: #ffb366; --shade: #181e25;
    --link: #6cb2ff }
}
* { box-sizing: border-box }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  padding: 1.5rem; max-width: 92rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.35rem; margin-top: 3rem; border-bottom: 1px solid var(--rule) }
h3 { font-size: 1.15rem; margin-top: 2rem } h4 { font-size: 1rem }
p { max-width: 48rem }
a { color: var(--link) }
nav a { margin-right: 1.2rem }
pre { background: var(--shade); padding: .6rem .8rem; overflow-x: auto; font-size: .85rem }
.scroll { overflow-x: auto; max-height: 40rem; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { position: sticky; top: 0; background: var(--paper); vertical-align: bottom; cursor: pointer }
th[aria-sort=ascending]::after { content: " \\25b4" } th[aria-sort=descending]::after { content: " \\25be" }
tbody tr:hover { background: var(--shade) }
.number { text-align: right } .long { white-space: normal; min-width: 18rem }
.loss { color: var(--loss); font-weight: 600 }
figure { margin: 1.2rem 0 } figure svg { max-width: 100%; height: auto }
"""

_SCRIPT = """
for (const th of document.querySelectorAll("th")) th.addEventListener("click", () => {
  const rows = th.closest("table").tBodies[0], i = th.cellIndex, up = th.getAttribute("aria-sort") !== "ascending";
  const text = row => row.cells[i].textContent, value = row => parseFloat(text(row));
  const compare = (a, b) => isNaN(value(a)) || isNaN(value(b))
    ? isNaN(value(a)) - isNaN(value(b)) || text(a).localeCompare(text(b)) : value(a) - value(b);
  rows.append(...[...rows.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)));
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
});
"""


def html(
    opening: Sequence[Block],
    machines: dict[str, list[Block]],
    losses: Sequence[Block],
    drawn: dict[str, dict[str, str]],
) -> str:
    """The page: the opening, the losses, then each machine by the name of its folder, with its figures as SVG text."""
    links = [(f"machine-{i}", blocks[0].text) for i, blocks in enumerate(machines.values())] + [("losses", "Losses")]
    navigation = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links)
    parts = [_render(block, 0, {}, "") for block in opening]
    parts.insert(1, f"<nav>{navigation}</nav>")
    for i, (machine, blocks) in enumerate(machines.items()):
        parts.append(_section(f"machine-{i}", blocks, drawn.get(machine, {})))
    parts.append(_section("losses", losses, {}))
    body = "\n".join(parts)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(opening[0].text)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _section(anchor: str, blocks: Sequence[Block], svgs: dict[str, str]) -> str:
    parts = "\n".join(_render(block, 1, svgs, anchor) for block in blocks)
    return f'<section id="{anchor}">\n{parts}\n</section>'


def _render(block: Block, deeper: int, svgs: dict[str, str], anchor: str) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level + deeper}>{escape(text)}</h{level + deeper}>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Figure(name, title):
            label = f'role="img" aria-label="{escape(title)}"'
            return f"<figure {label}>{_inline(svgs[name], f'{anchor}-{name[:-4]}')}</figure>"
        case Table():
            return _table(block)
    return f"<p>{escape(block)}</p>"


def _table(table: Table) -> str:
    """A table in a box that scrolls, its numbers to the right; ratios below 1 stand out, and long texts may wrap."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{classes(text, column)}>{escape(text)}</{tag}>" for column, text in enumerate(row))

    def classes(text: str, column: int) -> str:
        names = {"number": table.numeric(column), "loss": _LOSS.match(text), "long": len(text) > 60}
        found = " ".join(name for name, holds in names.items() if holds)
        return f' class="{found}"' if found else ""

    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    head = f"<thead><tr>{cells('th', table.titles)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>\n{rows}\n</tbody></table></div>'


def _inline(svg: str, prefix: str) -> str:
    """SVG as a part of a page: in the page's colours, and with names that no other figure has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, name)
    return svg.strip()
