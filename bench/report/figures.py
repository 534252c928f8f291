"""Figures of a machine's runs, as SVG: speed-ups, time against batch size, memory, rooflines. They need matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .tables import FAMILIES, KINDS, OURS, Case, Run, behind, number, several_sizes, timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

INK, MUTED, RULE, PAPER = "#24292f", "#6a737d", "#d5dae0", "#ffffff"

_CLASSES = {  # colours that stay apart for colour-blind readers (Okabe and Ito), and a marker each
    "eager": ("fastest eager", "#e69f00", "s"),
    "compile": ("fastest compiled", "#009e73", "^"),
    "ours": (OURS, "#0072b2", "o"),
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
_TITLES = {
    "speedup": "speed-up, a peer's time divided by ours",
    "families": "one model of each family, a peer's time divided by ours",
    "batch": "time per image against batch size",
    "memory": "working memory",
    "roofline": "achieved TFLOP/s beside the ceilings",
}
_NAME = re.compile(rf"({'|'.join(KINDS)})-({'|'.join(_TITLES)})(?:-(\w+))?\.svg")


def kind_of(name: str) -> str:
    """The kind of run that a figure's file name tells; '' for a file that is none of ours."""
    found = _NAME.fullmatch(name)
    return found[1] if found else ""


def title(name: str) -> str:
    """What the figure of that file name shows; '' for a file that is none of ours."""
    found = _NAME.fullmatch(name)
    return f"{KINDS[found[1]]}: {_TITLES[found[2]]}" + (f", {found[3]}" if found[3] else "") if found else ""


def in_order(names: Iterable[str]) -> list[str]:
    """File names as a reader wants the figures: by kind, the speed-ups first."""
    kinds, subjects = list(KINDS), list(_TITLES)
    return sorted(names, key=lambda n: (kinds.index(_NAME.fullmatch(n)[1]), subjects.index(_NAME.fullmatch(n)[2]), n))


def draw(runs: dict[str, Run]) -> dict[str, str]:
    """SVG by file name, of every figure for which the runs (by kind) have data; the same data give the same bytes.

    Raises ImportError where matplotlib is missing.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise ImportError("figures need matplotlib: pip install matplotlib") from None
    with style.context(["default", _STYLE]):
        return {name: _svg(figure) for name, figure in build(runs).items()}


def build(runs: dict[str, Run]) -> dict[str, Figure]:
    """The figures of `draw` as matplotlib's objects, in the style that is set."""
    found: dict[str, Figure | None] = {}
    for kind, run in runs.items():
        cases = _labelled(timed(run))
        if kind in ("models", "train"):
            found[f"{kind}-speedup.svg"] = _speedup(cases)
            found[f"{kind}-families.svg"] = _speedup(_of_families(cases)) if kind == "models" else None
            found[f"{kind}-memory.svg"] = _memory(cases)
            for dtype, part in _by_dtype(cases).items():
                found[f"{kind}-batch-{re.sub('[^a-zA-Z0-9_]+', '_', dtype)}.svg"] = _batch(part)
        found[f"{kind}-roofline.svg"] = _roofline(cases, run.get("ceilings") or {})
    made = {name: figure for name, figure in found.items() if figure is not None}
    for name, figure in made.items():
        told = runs[kind_of(name)]["conditions"]
        _explain(figure, f"{title(name)}\n{told['machine']}, torch {told['torch']}")
    return made


def _speedup(cases: list[Case]) -> Figure | None:
    """Bars from 1 to the ratio over the fastest eager and compiled variants, with the spread."""
    cases = [case for case in cases if _references(case)]
    if not cases:
        return None
    figure, panels, rows = _row_panels(cases, "ratio; right of 1 ours is faster")
    shown = [key for key in ("eager", "compile") if any(key in case["ratios"] for case in cases)]
    thickness = 0.8 / len(shown)
    for dtype, part in _by_dtype(cases).items():
        axes = panels[dtype]
        for place, key in enumerate(shown):
            label, colour, _ = _CLASSES[key]
            found = [(rows[_row(case)], case["ratios"][key]) for case in part if key in case["ratios"]]
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
    found = [case["ratios"][key] for case in cases for key in shown if key in case["ratios"]]
    ends = [ratio[what] for ratio in found for what in ("low", "ratio", "high")]
    low, high = min(1, *ends), max(1, *ends)
    for axes in panels.values():
        axes.set_xlim(low / (high / low) ** 0.16 / 1.02, high * (high / low) ** 0.16 * 1.02)
        _plain_ticks(axes.xaxis, _ratio_ticks(low, high))
    return figure


def _memory(cases: list[Case]) -> Figure | None:
    """Working memory of ours and the fastest of each class, a dot each."""
    cases = [case for case in cases if any(behind(case, key).get("working_mib") for key in _CLASSES)]
    if not cases:
        return None
    figure, panels, rows = _row_panels(cases, "MiB beside weights and input")
    for dtype, part in _by_dtype(cases).items():
        for place, (key, (label, colour, marker)) in enumerate(_CLASSES.items()):
            found = [(behind(case, key).get("working_mib"), rows[_row(case)] + 0.25 * (place - 1)) for case in part]
            dots = [(mib, row) for mib, row in found if mib]
            if dots:
                panels[dtype].plot(*zip(*dots, strict=True), marker, color=colour, label=label, markersize=4.5)
    for axes in panels.values():
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, _log_ticks(1, 2, 5))
        axes.grid()
    return figure


def _batch(cases: list[Case]) -> Figure | None:
    """Time per image against batch size, a panel for each model of one dtype that has two batch sizes or more."""
    models: dict[str, list[Case]] = {}
    for case in cases:
        if behind(case, "ours"):
            models.setdefault(case["label"], []).append(case)
    models = {name: part for name, part in models.items() if len({case["batch"] for case in part}) > 1}
    if not models:
        return None
    columns = min(4, len(models))
    lines = math.ceil(len(models) / columns)
    figure, grid = _figure(2.1 * columns + 0.4, 1.75 * lines + 0.9, lines, columns)
    for axes in grid[len(models) :]:
        axes.remove()
    logarithmic = any(max(times) > 8 * min(times) for times in map(_image_times, models.values()))
    for axes, (name, part) in zip(grid, models.items(), strict=False):
        part = sorted(part, key=lambda case: case["batch"])
        for key, (label, colour, marker) in _CLASSES.items():
            found = [(case["batch"], behind(case, key)) for case in part]
            points = [(batch, variant["median_ms"] / batch) for batch, variant in found if variant]
            if points:
                style = {"color": colour, "label": label, "marker": marker, "markersize": 4, "linewidth": 1.4}
                axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(name)
        axes.set_xscale("log", base=2)
        axes.margins(x=0.12)
        axes.grid(axis="y")
        if logarithmic:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, _log_ticks(1, 2, 5))
        else:
            axes.set_ylim(0, 1.12 * max(_image_times(part)))
        _plain_ticks(axes.xaxis, sorted({case["batch"] for case in part}))
    figure.supxlabel("images per batch", fontsize=8)
    figure.supylabel("ms per image", fontsize=8)
    return figure


def _roofline(cases: list[Case], ceilings: dict[str, Any]) -> Figure | None:
    """TFLOP/s against operations per byte that must move, under the bandwidth and the peak of each dtype."""
    bandwidth, peaks = ceilings.get("bytes_per_s"), ceilings.get("flops_per_s", {})
    cases = [case for case in cases if (case.get("work") or {}).get("flops") and behind(case, "ours")]
    cases = [case for case in cases if bandwidth and peaks.get(case["dtype"])]
    if not cases:
        return None
    dtypes = _by_dtype(cases)
    figure, grid = _figure(3.7 * len(dtypes) + 0.4, 3.7, 1, len(dtypes), sharex=True, sharey=True)
    panels = dict(zip(dtypes, grid, strict=True))
    knees = [peaks[dtype] / bandwidth for dtype in dtypes]
    intensities = [case["work"]["flops"] / case["work"]["bytes"]["ideal"] for case in cases]
    low, high = min(*intensities, *knees) / 5, max(*intensities, *knees) * 3
    for dtype, axes in panels.items():
        knee = peaks[dtype] / bandwidth
        roof = ([low, knee, high], [bandwidth * low / 1e12, peaks[dtype] / 1e12, peaks[dtype] / 1e12])
        axes.plot(*roof, color=INK, linewidth=1.2, zorder=1)
        for key, (label, colour, marker) in _CLASSES.items():
            found = [(case["work"], behind(case, key)) for case in dtypes[dtype]]
            points = [
                (work["flops"] / work["bytes"]["ideal"], work["flops"] / variant["median_ms"] / 1e9)
                for work, variant in found
                if variant
            ]
            if points:
                style = {"color": colour, "label": label, "markersize": 5, "markeredgecolor": PAPER, "alpha": 0.9}
                axes.plot(*zip(*points, strict=True), marker, markeredgewidth=0.4, **style)
        axes.set(title=dtype, xscale="log", yscale="log", xlabel="FLOP per byte", xlim=(low, high))
        text = {"fontsize": 7, "color": MUTED, "ha": "right", "va": "bottom"}
        slope = {"rotation": math.degrees(math.atan(bandwidth / 1e12)), "transform_rotates_text": True}
        axes.text(high / 1.1, peaks[dtype] / 1e12 * 1.03, f"{number(peaks[dtype] / 1e12)} TFLOP/s", **text)
        axes.text(
            knee / 1.1, peaks[dtype] / 1e12 / 1.1, f"{number(bandwidth / 1e9)} GB/s",
            rotation_mode="anchor", **slope, **text,
        )  # fmt: skip
        axes.grid()
        _plain_ticks(axes.xaxis, _log_ticks(1, 3))
        _plain_ticks(axes.yaxis, _log_ticks(1, 2, 5))
    grid[0].set_ylabel("TFLOP/s")
    return figure


def _figure(width: float, height: float, lines: int, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False, **options).flat)


def _row_panels(cases: list[Case], label: str) -> tuple[Figure, dict[str, Axes], dict[tuple, float]]:
    """A panel for each dtype with a row for each model and batch, and the height of each row."""
    dtypes = list(_by_dtype(cases))
    rows: dict[tuple, float] = {}
    ticks, model, height = [], "", 0.0
    for row in sorted({_row(case): None for case in cases}, key=_first_places(cases)):
        if rows:
            height += 1 if row[0] == model else 1.5
        ticks.append(f"{row[0]}\u2003{row[1]}" if row[0] != model else str(row[1]))
        rows[row], model = height, row[0]
    figure, grid = _figure(3.3 * len(dtypes) + 1.3, 0.27 * height + 1.5, 1, len(dtypes), sharex=True, sharey=True)
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


def _image_times(cases: list[Case]) -> list[float]:
    found = [(behind(case, key), case["batch"]) for case in cases for key in _CLASSES]
    return [variant["median_ms"] / batch for variant, batch in found if variant]


def _labelled(cases: list[Case]) -> list[Case]:
    """The cases with a `label`: the model, and the height of its images where there are several sizes."""
    with_size = several_sizes(cases)
    return [{**case, "label": f"{case['name']} {case['size'][0]}px" if with_size else case["name"]} for case in cases]


def _of_families(cases: list[Case]) -> list[Case]:
    """One model of each family, in the smallest and in the largest batch."""
    cases = [case for case in cases if case["name"] in FAMILIES]
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


def _references(case: Case) -> bool:
    return "eager" in case["ratios"] or "compile" in case["ratios"]


def _ratio_ticks(low: float, high: float) -> list[float]:
    steps = (0.7, 0.8, 0.9, 1, 1.2, 1.5, 2) if high / low < 3.5 else tuple(2.0**power for power in range(-6, 10))
    return [step for step in steps if low / 1.05 <= step <= high * 1.05]


def _log_ticks(*digits: int) -> Locator:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=digits)


def _plain_ticks(axis: Axis, places: Locator | list[float]) -> None:
    """Ticks at these places alone, written as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(places) if isinstance(places, list) else places)
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
