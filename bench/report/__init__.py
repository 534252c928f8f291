"""The reports of all results: a page per machine with its figure, one that filters all models, the losses, and the
tables in README and docs.

The same JSON gives the same bytes.
"""

from __future__ import annotations

import os.path
import sys
from pathlib import Path
from urllib.parse import quote

from .. import record
from . import figures, page, tables
from .markdown import Block, Code, Figure, Heading, ReportError, escape, fill, render
from .tables import KINDS, REFERENCES, Results, Run, groups, timed

_NOTES = (
    "Medians of interleaved rounds on the same weights. A ratio is a peer's time divided by ours, with its "
    "spread: above 1, ours is faster. Of several processes, the geometric mean with its 95 % confidence interval; of "
    "one, the median of the quotients within its rounds with their quartiles. Compare within a run only: between runs "
    "the machine may have changed."
)
_CEILINGS = (
    "Measured in the same run as the cases. GB/s and TFLOP/s below are what ours achieves: the bytes that must move "
    "when everything that can be fused is, and the operations, over the median time. 'At least' is the longer of both "
    "at the ceilings; '% of roofline' is that over the time. Above 100 % data stayed in a cache, which the bandwidth, "
    "measured from memory, leaves out. A run that does not say by what it measured them took a copy and matrix "
    "products, which on a CPU may be slower than its arithmetic."
)

_STEPS = (
    "The steps of one program, timed inside it. Operations are those of a direct convolution, so that Winograd's may "
    "pass the peak. What a step waits for its slowest thread is in its time."
)


def load_results(folder: Path) -> Results:
    """Read every run of a results folder, by machine and kind.

    A run stands in `<machine>/<kind>.json`; JSON beside it that holds no cases is somebody else's. Raises RecordError
    or ReportError, naming the file, for what is no run of this schema, and for a run that is not in its place.
    """
    results: Results = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.stem in KINDS:
            results.setdefault(path.parent.name, {})[path.stem] = record.load(path, path.stem)
        elif b'"cases"' in path.read_bytes():
            kind = record.load(path)["kind"]
            raise ReportError(f"{path}: holds a run of {kind}, which belongs in {kind}.json; merge or delete it")
    return {machine: {kind: runs[kind] for kind in KINDS if kind in runs} for machine, runs in results.items()}


def write(folder: Path, check: bool = False) -> list[Path]:
    """Bring every report up to date, and return the files that were not; with `check`, only return them.

    In the folder: report.md and figures/ for each machine, losses.md and models.html. In a repository that holds it as
    bench/results: also what stands between `<!-- bench:... -->` markers in its Markdown files, at the top and in docs/.
    `check` looks at Markdown alone, since figures differ between versions of matplotlib. Without matplotlib the figures
    stay as they are, and a line on standard error says so.

    Raises RecordError or ReportError, before anything is written, for results that cannot be read and for markers that
    cannot be filled.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder; measure first, with python -m bench models")
    results = load_results(folder)
    paths = {machine: folder / machine / "figures" / figures.FILE for machine in results}
    drawn = {machine: path.read_text("utf-8") if path.is_file() else None for machine, path in paths.items()}
    if not check:
        try:
            drawn = {machine: figures.draw(runs) for machine, runs in results.items()}
        except ImportError as error:
            print(f"{error}; the figures stay as they are", file=sys.stderr)

    files = {
        folder / machine / "report.md": render(machine_report(runs, drawn[machine] is not None))
        for machine, runs in results.items()
    }
    files[folder / "losses.md"] = render(losses_report(results))
    models = {machine: conditions(runs["models"]) for machine, runs in results.items() if "models" in runs}
    if (drawn_page := page.draw(results, models)) is not None:
        files[folder / page.FILE] = drawn_page
    files |= _filled(folder, results)
    if not check:
        files |= {paths[machine]: svg for machine, svg in drawn.items() if svg is not None}

    stale = [path for path, text in files.items() if not path.is_file() or path.read_bytes() != text.encode()]
    if not check:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path].encode())
        for machine, path in paths.items():
            if drawn[machine] is None and path.is_file():
                path.unlink()
                stale.append(path)
    return sorted(stale)


def machine_report(runs: dict[str, Run], with_figure: bool) -> list[Block]:
    """All that was measured on a machine."""
    blocks: list[Block] = [Heading(1, str(next(iter(runs.values()))["conditions"]["machine"])), _NOTES]
    ceilings = tables.ceilings(runs)
    if ceilings.rows:
        blocks += [Heading(2, "Ceilings"), _CEILINGS, ceilings]
    for kind, run in runs.items():
        blocks += [Heading(2, KINDS[kind]), conditions(run), Code(run["command"])]
        if with_figure and kind == "models":
            blocks.append(Figure(figures.FILE, figures.TITLE))
        cases, missing = timed(run), tables.not_timed(run)
        if cases:
            blocks += _case_sections(kind, run)
        if missing.rows:
            blocks += [Heading(3, "Not timed"), missing]
        if not run["cases"]:
            blocks.append("No case has been measured.")
    return blocks


def _case_sections(kind: str, run: Run) -> list[Block]:
    cases, ceilings = timed(run), run.get("ceilings") or {}
    means = tables.means(cases)
    blocks: list[Block] = [Heading(3, "Geometric means"), means] if means.rows else []
    if kind in ("models", "train"):
        blocks += [Heading(3, "Times"), tables.times(kind, cases)]
        passes, use = tables.passes(cases), tables.use(kind, cases, ceilings)
        if passes.titles:
            blocks += [Heading(3, "Forward and backward"), passes]
        if use.titles:
            blocks += [Heading(3, "Use of the machine"), use]
        steps = tables.steps(cases, ceilings)
        if steps.rows:
            blocks += [Heading(3, "Steps of a frozen network"), _STEPS, steps]
        return blocks
    if tables.with_ours(run):
        blocks.append(tables.compact(kind, tables.with_ours(run)))
    for (label,), part in groups(kind, cases, by_dtype=False).items():
        blocks += [Heading(3, label), tables.times(kind, part)]
        use = tables.use(kind, part, ceilings)
        if use.titles:
            blocks.append(use)
    return blocks


def losses_report(results: Results) -> list[Block]:
    """Every timed case in which a peer is faster, the largest loss first."""
    found = tables.losses(results)
    runs = [run for kinds in results.values() for run in kinds.values()]
    compared = sum("peer" in case["ratios"] for run in runs for case in timed(run))
    others = sum(len(run["cases"]) for run in runs) - compared
    outside = sum(row[found.titles.index("the spread")] == "outside" for row in found.rows)
    blocks: list[Block] = [Heading(1, "Losses")]
    if found.rows:
        blocks += [
            f"A peer is faster in {len(found.rows)} of {compared} cases, in {outside} of them outside the spread: "
            "there even the upper end is below 1. The last column is what runs there by default.",
            found,
        ]
    else:
        blocks.append(f"None: no peer is faster in any of {compared} cases.")
    if others:
        blocks.append(f"Not compared: {others} cases that failed, whose result was wrong or that one side did not run.")
    return blocks


def summary(results: Results) -> list[Block]:
    """The geometric means of every machine, kind, dtype and batch."""
    parts: dict[tuple[str, ...], list[tables.Case]] = {}
    for machine, runs in results.items():
        for kind, run in runs.items():
            for case in tables.with_ours(run):
                parts.setdefault((machine, kind, case["dtype"], str(case["batch"])), []).append(case)
    if not parts:
        return ["Nothing has been measured yet."]
    return [tables.overview(("machine", "kind", "dtype", "batch"), parts)]


def conditions(run: Run) -> str:
    """On what a run was made, in one line."""
    told = run["conditions"]
    versions = {
        "driver": "driver",
        "Python": "python",
        "torch": "torch",
        "Triton": "triton",
        "CUDA": "cuda",
        "cuDNN": "cudnn",
        "oneDNN": "onednn",
        "OpenVINO": "openvino",
        "ONNX Runtime": "onnxruntime",
        "timm": "timm",
        "regnet_fast": "regnet_fast",
    }
    parts = [str(told["machine"])]
    parts += [f"{title} {told[key]}" for title, key in versions.items() if told.get(key) is not None]
    if told.get("commit"):
        parts.append(f"commit {told['commit'][:9]}" + (" with uncommitted changes" if told.get("dirty") else ""))
    elif told.get("sources"):
        parts.append(f"sources {told['sources']}")
    parts.append(str(run.get("started"))[:10] + ("" if run.get("finished") else ", not finished"))
    return ", ".join(parts)


def _filled(folder: Path, results: Results) -> dict[Path, str]:
    """The Markdown files of the repository that have markers, with what belongs between them."""
    if folder.parts[-2:] != ("bench", "results"):
        return {}
    top = folder.parent.parent
    files = {}
    for path in [*sorted(top.glob("*.md")), *sorted((top / "docs").rglob("*.md"))]:
        text = path.read_bytes().decode()

        def content(name: str, machine: str, path: Path = path) -> str:
            return _between(name, machine, results, os.path.relpath(folder, path.parent))

        filled = fill(text, str(path.relative_to(top)), content)
        if filled != text:
            files[path] = filled
    return files


def _between(name: str, machine: str, results: Results, results_url: str) -> str:
    """What a marker stands for: `summary`, of all machines, or `families`, the short table of models of one."""
    if name == "summary":
        if machine:
            raise ReportError("the summary is of all machines and takes no name")
        links = ", ".join(_link(escape(each), each, results_url) for each in results)
        return render(summary(results)) + (f"\nEvery variant and case: {links}\n" if links else "")
    if name != "families":
        raise ReportError("no such table; there are summary and families")
    with_models = [each for each, runs in results.items() if "models" in runs]
    if machine not in with_models:
        raise ReportError(f"no machine {machine!r} has models; there are {', '.join(with_models) or 'none yet'}")
    link = _link("Every variant and case", machine, results_url)
    return f"{render(_families(results[machine]['models']))}\n{link}\n"


def _families(run: Run) -> list[Block]:
    cases = tables.with_ours(run)
    means = [f"over {REFERENCES[key]} {found}" for key in REFERENCES if (found := tables.mean(cases, key))]
    means += [
        f"frozen over {REFERENCES[key]} {frozen}"
        for key in ("compile", "runtime")
        if (frozen := tables.mean(cases, key, tables.FROZEN))
    ]
    blocks: list[Block] = [tables.families(cases)] if cases else ["No case has a time of ours."]
    if means:
        blocks.append(f"Geometric means: {'; '.join(means)}.")
    without = len(run["cases"]) - len(cases)
    if without:
        blocks.append(f"Not in the table, because they failed, our result was wrong or ours did not run: {without}.")
    return [*blocks, f"{conditions(run)}."]


def _link(text: str, machine: str, results_url: str) -> str:
    return f"[{text}]({quote(f'{results_url}/{machine}/report.md')})"
