"""What `verify` found, as a figure and as a page: one HTML file with the figure in it, that loads nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .info import conditions, conditions_line
from .judging import ERROR_RATIO, Check
from .verify import Verification


class ReportError(ValueError):
    """The figure or the page cannot be made as was asked; the message says what would work."""


def check_request(figure: Path | None, html: Path | None) -> None:
    """Raise ReportError for a file that cannot be written here."""
    for path in (figure, html):
        if path is not None and not path.parent.is_dir():
            raise ReportError(f"there is no folder '{path.parent}'")
    if figure is None and html is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ReportError("the figure needs matplotlib: pip install 'regnet_fast[report]'") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if figure is not None and figure.suffix[1:] not in formats:
        raise ReportError(f"'{figure}' ends in none of the formats of figures: {', '.join(formats)}")


def figure(found: Sequence[Verification]) -> Any:
    """A matplotlib figure: for each verification the largest error of every layer, ours, timm's and what is allowed."""
    from matplotlib.figure import Figure

    widest = max(len(_drawn(one)) for one in found)
    made = Figure(figsize=(min(max(7, 0.3 * widest), 30), 1 + 3.4 * len(found)), layout="constrained")
    for one, axes in zip(found, made.subplots(len(found), squeeze=False)[:, 0], strict=True):
        _draw(axes, one)
    return made


def _drawn(found: Verification) -> list[Check]:
    """The layers; the stages where nothing is rebuilt."""
    return found.layers or found.checks


def _draw(axes: Any, found: Verification) -> None:
    checks = _drawn(found)
    where = range(len(checks))
    allowed = [ERROR_RATIO * check.max_eager + check.floor for check in checks]
    axes.plot(where, allowed, color="0.6", linestyle="--", label="allowed")
    axes.plot(where, [check.max_eager for check in checks], color="tab:blue", marker="o", markersize=4, label="timm")
    axes.plot(where, [check.max_ours for check in checks], color="tab:orange", marker="o", markersize=4, label="ours")
    worst = max(where, key=lambda i: checks[i].ratio)
    axes.axvline(worst, color="0.85", zorder=0)
    axes.set_yscale("log")
    axes.set_xticks(where, [check.stage for check in checks], rotation=90, fontsize=8)
    axes.set_ylabel("largest error against float64")
    axes.set_title(f"{_title(found)}; worst ratio {checks[worst].ratio:.2f} at {checks[worst].stage}", fontsize=10)
    axes.legend(fontsize=8)


def _title(found: Verification) -> str:
    return f"{found.model}, {'x'.join(map(str, found.input_shape))}, {found.dtype}, {found.device}"


_STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, td:last-child, th:first-child, th:last-child { text-align: left }
.wrong { color: #b00 } svg { max-width: 100%; height: auto }"""


def html(found: Sequence[Verification]) -> str:
    """The page: the verdict, the figure, and for each verification the tables of stages and of layers."""
    drawn = io.StringIO()
    figure(found).savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    models = ", ".join(dict.fromkeys(one.model for one in found))
    wrong = [one for one in found if not one.ok]
    verdict = "the same function as timm's" if not wrong else "NOT the same function as timm's"
    rule = (
        f"The same function means: against timm's forward in float64, our largest and our RMS error are at most "
        f"{ERROR_RATIO:g} times those of timm in the same dtype, plus a floor; on the whole output and on its border "
        f"alone. Weights and input are random."
    )
    facts = conditions(found[0].device)
    facts.pop("load_average", None)  # nothing was timed
    parts = [
        f'<p class="{"wrong" if wrong else "right"}"><b>{escape(models)} is {verdict}.</b></p><p>{rule}</p>',
        svg[svg.index("<svg") :],
        *map(_section, found),
        f"<p>{escape(conditions_line(facts))}</p>",
    ]
    head = f'<meta charset="utf-8"><title>regnet_fast: {escape(models)}</title><style>{_STYLE}</style>'
    body = f"<h1>regnet-fast verify {escape(models)}</h1>" + "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _section(found: Verification) -> str:
    lines = [f"<h2>{escape(_title(found))}, seed {found.seed}</h2>", _table("stage", found.checks)]
    if found.worst is None:
        return "\n".join([*lines, "<p>Nothing is rebuilt: the model is passed through as it is.</p>"])
    worst = found.worst
    kept = [f"kept as timm makes it: {path} ({kind}): {reason}" for path, kind, reason in found.kept]
    told = [f"Worst layer: {worst.stage}, {worst.ratio:.2f} times timm's error; {worst.place}", *kept]
    lines += [f"<p>{escape(text)}</p>" for text in told]
    lines += [f"<h3>{found.rebuilt} rebuilt modules</h3>", _table("layer", found.layers)]
    return "\n".join(lines)


def _table(first: str, checks: Sequence[Check]) -> str:
    titles = (first, "shape", "largest error", "timm's", "ratio", "RMS error", "timm's", "largest at", "verdict")
    rows = ["<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"]
    for check in checks:
        cells = (
            check.stage,
            "x".join(map(str, check.shape)),
            f"{check.max_ours:.2e}",
            f"{check.max_eager:.2e}",
            f"{check.ratio:.2f}",
            f"{check.rms_ours:.2e}",
            f"{check.rms_eager:.2e}",
            ", ".join(map(str, check.where)),
            check.failure or "ok",
        )
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{"right" if check.ok else "wrong"}">{row}</tr>')
    return "<table>" + "\n".join(rows) + "</table>"
