"""The figure of a machine's runs, as SVG: speed-ups of one model of each family. It needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .tables import FAMILIES, Case, Run, best_ratios, several_sizes, timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#24292f", "#6a737d", "#d5dae0", "#ffffff"

_CLASSES = {  # colours that stay apart for colour-blind readers (Okabe and Ito)
    "eager": ("fastest eager", "#e69f00"),
    "compile": ("fastest compiled", "#009e73"),
    "runtime": ("fastest runtime", "#0072b2"),
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regnet_fast",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 8,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": False,
}
FILE = "models-families.svg"
TITLE = "Models, inference: one model of each family, a peer's time divided by ours"


def draw(runs: dict[str, Run]) -> str | None:
    """SVG of one model of each family, in the smallest and in the largest batch; None where the runs have none.

    The same data give the same bytes. Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise ImportError("figures need matplotlib: pip install matplotlib") from None
    if "models" not in runs:
        return None
    cases, told = _of_families(_labelled(timed(runs["models"]))), runs["models"]["conditions"]
    if not cases:
        return None
    with style.context(["default", _STYLE]):
        figure = _speedup(cases)
        _explain(figure, f"{TITLE}\n{told['machine']}, torch {told['torch']}")
        return _svg(figure)


def _speedup(cases: list[Case]) -> Figure:
    """Bars from 1 to the ratio over the fastest variant of each class, with the spread."""
    figure, panels, rows = _row_panels(cases, "ratio; right of 1 ours is faster")
    shown = [key for key in _CLASSES if any(key in best_ratios(case) for case in cases)]
    thickness = 0.8 / len(shown)
    for dtype, part in _by_dtype(cases).items():
        axes = panels[dtype]
        for place, key in enumerate(shown):
            label, colour = _CLASSES[key]
            found = [(rows[_row(case)], best_ratios(case)[key]) for case in part if key in best_ratios(case)]
            centres = [row + (place - (len(shown) - 1) / 2) * thickness for row, _ in found]
            ratios = [ratio["ratio"] for _, ratio in found]
            left, right = [r["low"] for _, r in found], [r["high"] for _, r in found]
            bars = {"height": 0.88 * thickness, "left": 1, "color": colour, "label": f"over the {label}"}
            axes.barh(centres, [ratio - 1 for ratio in ratios], **bars)
            axes.hlines(centres, left, right, colors=INK, linewidth=0.8)
            for y, ratio, low, high in zip(centres, ratios, left, right, strict=True):
                beyond = max(ratio, high) if ratio >= 1 else min(ratio, low)
                side = 1 if ratio >= 1 else -1
                axes.annotate(
                    f"{ratio:.2f}", (beyond, y), (3 * side, 0), textcoords="offset points", fontsize=6.5, color=INK,
                    va="center", ha="left" if side > 0 else "right",
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.axvline(1, color=INK, linewidth=0.8)
    found = [best_ratios(case)[key] for case in cases for key in shown if key in best_ratios(case)]
    ends = [ratio[what] for ratio in found for what in ("low", "ratio", "high")]
    low, high = min(1, *ends), max(1, *ends)
    for axes in panels.values():
        axes.set_xlim(low / (high / low) ** 0.16 / 1.02, high * (high / low) ** 0.16 * 1.02)
        _plain_ticks(axes.xaxis, _ratio_ticks(low, high))
    return figure


def _row_panels(cases: list[Case], label: str) -> tuple[Figure, dict[str, Axes], dict[tuple, float]]:
    """A panel for each dtype with a row for each model and batch, and the height of each row."""
    from matplotlib.figure import Figure

    dtypes = list(_by_dtype(cases))
    rows: dict[tuple, float] = {}
    ticks, model, height = [], "", 0.0
    for row in sorted({_row(case): None for case in cases}, key=_first_places(cases)):
        if rows:
            height += 1 if row[0] == model else 1.5
        ticks.append(f"{row[0]}\u2003{row[1]}" if row[0] != model else str(row[1]))
        rows[row], model = height, row[0]
    figure = Figure(figsize=(3.3 * len(dtypes) + 1.3, 0.27 * height + 1.5), layout="constrained")
    grid = figure.subplots(1, len(dtypes), squeeze=False, sharex=True, sharey=True)[0]
    panels = dict(zip(dtypes, grid, strict=True))
    for dtype, axes in panels.items():
        axes.set_title(dtype, x=0.03)
        axes.set(xlabel=label, ylim=(height + 0.7, -0.7))
        axes.set_yticks(list(rows.values()), ticks)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    beside = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "color": MUTED}
    grid[0].annotate("batch", (0, 1), (-4, 6), **beside)
    return figure, panels, rows


def _labelled(cases: list[Case]) -> list[Case]:
    """The cases with a `label`: the model, and the height of its images where there are several sizes."""
    with_size = several_sizes(cases)
    return [{**case, "label": f"{case['name']} {case['size'][0]}px" if with_size else case["name"]} for case in cases]


def _of_families(cases: list[Case]) -> list[Case]:
    """What is shown: the cases of one model of each family with a ratio, in the smallest and in the largest batch."""
    cases = [case for case in cases if case["name"] in FAMILIES and _CLASSES.keys() & case["ratios"].keys()]
    batches = sorted({case["batch"] for case in cases})
    return [case for case in cases if case["batch"] in (*batches[:1], *batches[-1:])]


def _row(case: Case) -> tuple[str, int]:
    return case["label"], case["batch"]


def _first_places(cases: list[Case]) -> Callable[[tuple[str, int]], tuple[int, int]]:
    """A key that keeps models in their order and sorts the batches of each."""
    places = {name: place for place, name in enumerate(dict.fromkeys(case["label"] for case in cases))}
    return lambda row: (places[row[0]], row[1])


def _by_dtype(cases: list[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case["dtype"], []).append(case)
    return found


def _ratio_ticks(low: float, high: float) -> list[float]:
    steps = (0.7, 0.8, 0.9, 1, 1.2, 1.5, 2) if high / low < 3.5 else tuple(2.0**power for power in range(-6, 10))
    return [step for step in steps if low / 1.05 <= step <= high * 1.05]


def _plain_ticks(axis: Axis, places: list[float]) -> None:
    """Ticks at these places alone, written as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _explain(figure: Figure, text: str) -> None:
    """A legend of all panels together, under the figure's title."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), title=text, title_fontsize=9, alignment="left", ncols=3,
        loc="outside upper left", borderaxespad=0.4, borderpad=0, labelspacing=0.8,
    )  # fmt: skip


def _svg(figure: Figure) -> str:
    """The figure without date and generator, so that the same data give the same bytes, and few of them."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)  # hundredths of a point
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"
