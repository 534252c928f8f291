"""The tables of the reports: what a run's cases say, as plain text in cells, for Markdown and HTML alike."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Case = dict[str, Any]
Run = dict[str, Any]
Results = dict[str, dict[str, Run]]
"""Runs by machine (the name of its folder) and kind."""

KINDS = {"models": "Models, inference", "train": "Training steps", "blocks": "Blocks", "ops": "Operations"}
FAMILIES = (
    *("regnetx_032", "regnety_016", "regnetz_b16", "regnetv_040", "repvgg_a2", "resnetv2_50"),
    *("resnet50", "resnext50_32x4d", "seresnet50", "efficientnet_b0", "mobilenetv3_large_100", "mobileone_s1"),
)
"""One model of each family."""

OURS = "regnet_fast"
FROZEN = "regnet_fast frozen"
REFERENCES = {
    "eager": "the fastest eager variant",
    "compile": "the fastest compiled variant",
    "runtime": "the fastest runtime",
    "peer": "the best peer",
}
_OVER = {key: f"over best {key}" for key in REFERENCES}
ABSENT = "-"

_SPLIT = {"models": ("name", "model"), "train": ("name", "model"), "blocks": ("model", "model"), "ops": ("op", "op")}
_NUMBER = re.compile(r"\d[\d.]*(x.*| %)?")  # 12, 1.5x (1.4-1.6), 224x224, 3.1 %
_NAMED_CASES = 4


@dataclass(frozen=True)
class Table:
    """Titles and rows of text; ABSENT where there is nothing to say."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which are read from the right."""
        cells = [row[column] for row in self.rows if row[column] not in (ABSENT, "failed", "skipped")]
        return bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)


Column = tuple[str, Callable[[Case], str]]


def table(cases: Iterable[Case], columns: Sequence[Column]) -> Table:
    """A row for each case, without the columns in which none has anything."""
    return _filled([title for title, _ in columns], [[text(case) for _, text in columns] for case in cases])


def _filled(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    kept = [i for i in range(len(titles)) if any(row[i] != ABSENT for row in rows)]
    return Table(tuple(titles[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows))


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, never in scientific notation."""
    if value is None or not math.isfinite(value):
        return ABSENT if value is None else str(value)
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:.{min(9, max(0, digits - 1 - exponent))}f}"


def ratio_text(ratio: dict[str, Any] | None) -> str:
    """A ratio with its spread."""
    return f"{ratio['ratio']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ABSENT


def timed(run: Run) -> list[Case]:
    """The cases with times: by name and dtype in the order of the run, then by batch size."""
    found = [case for case in run["cases"] if case["status"] == "timed"]
    names, dtypes = (list(dict.fromkeys(case[key] for case in found)) for key in ("name", "dtype"))
    return sorted(found, key=lambda case: (names.index(case["name"]), dtypes.index(case["dtype"]), case["batch"]))


def with_ours(run: Run) -> list[Case]:
    """The cases in which ours has a time: it has none where it would run the host's own forward."""
    return [case for case in timed(run) if behind(case, "ours")]


def several_sizes(cases: Iterable[Case]) -> bool:
    """Whether any model was measured at more than one image size, so that its name does not tell the case."""
    pairs = {(case["name"], tuple(case["size"] or ())) for case in cases}
    return len(pairs) > len({name for name, _ in pairs})


def groups(kind: str, cases: Sequence[Case], by_dtype: bool = True) -> dict[tuple[str, ...], list[Case]]:
    """The cases of each model, or of each operation, in their order; of each dtype apart if asked."""
    found: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        label = _detail({**case, **case["details"]}.get(_SPLIT[kind][0], case["name"]))
        found.setdefault((label, case["dtype"]) if by_dtype else (label,), []).append(case)
    return found


def behind(case: Case, key: str) -> dict[str, Any]:
    """The timed variant behind a ratio (a key of `REFERENCES`), or ours ("ours"); empty where there is none."""
    name = OURS if key == "ours" else case["ratios"].get(key, {}).get("peer")
    variant = case["variants"].get(name, {})
    return variant if variant.get("status") == "timed" else {}


def ratios(case: Case, ours: str = OURS) -> dict[str, Any]:
    """The ratios of a variant of ours; empty where it was not timed."""
    return case["ratios"] if ours == OURS else case["variants"].get(ours, {}).get("ratios", {})


def best_ratios(case: Case) -> dict[str, Any]:
    """The ratios of ours frozen, as the weights of compiled peers and runtimes are; of ours where none was timed."""
    return ratios(case, FROZEN) or case["ratios"]


def lower_bound_ms(case: Case, ceilings: dict[str, Any]) -> float | None:
    """The least time that the ceilings allow: all bytes once at full bandwidth, or all operations at the peak."""
    work, bandwidth = case.get("work"), ceilings.get("bytes_per_s")
    peak = ceilings.get("flops_per_s", {}).get(case["dtype"])
    if not (work and bandwidth and peak):
        return None
    return 1e3 * max(work["bytes"]["ideal"] / bandwidth, work["flops"] / peak)


def times(kind: str, cases: Sequence[Case]) -> Table:
    """Milliseconds of every variant, and the ratios."""

    def milliseconds(name: str) -> Column:
        def text(case: Case) -> str:
            variant = case["variants"].get(name)
            if variant is None:
                return ABSENT
            return number(variant["median_ms"], 4) if variant["status"] == "timed" else variant["status"]

        return f"{name}, ms", text

    names = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    forced = [name for name in names if name.startswith(f"{OURS} ")]
    peers = [name for name in names if name != OURS and name not in forced]
    return table(
        cases,
        [
            *_case_columns(kind, cases),
            *map(milliseconds, [*peers, OURS, *forced]),
            *[(title, lambda case, key=key: ratio_text(case["ratios"].get(key))) for key, title in _OVER.items()],
            ("best peer", lambda case: case["ratios"].get("peer", {}).get("peer", ABSENT)),
            ("frozen over best compile", lambda case: ratio_text(ratios(case, FROZEN).get("compile"))),
            ("auto", lambda case: _detail(case["details"].get("auto"))),
        ],
    )


def passes(cases: Sequence[Case]) -> Table:
    """Forward and backward of training steps, apart."""
    columns = [
        (f"{title} {way}, ms", lambda case, key=key, way=way: number(behind(case, key).get(f"{way}_ms"), 4))
        for way in ("forward", "backward")
        for key, title in (("eager", "eager"), ("compile", "compile"), ("ours", OURS))
    ]
    found = table(cases, columns)
    return found if not found.titles else table(cases, [*_case_columns("train", cases), *columns])


def use(kind: str, cases: Sequence[Case], ceilings: dict[str, Any]) -> Table:
    """Ours and the fastest of each class beside the ceilings: memory, kernels; of whole models also first results."""

    def work(case: Case, *path: str) -> float | None:
        value = case.get("work")
        for key in path:
            value = None if value is None else value.get(key)
        return value

    def share(case: Case, key: str) -> str:
        bound, time = lower_bound_ms(case, ceilings), behind(case, key).get("median_ms")
        return number(100 * bound / time, 2) if bound is not None and time else ABSENT

    def rate(case: Case, unit: float, *path: str) -> str:
        amount, time = work(case, *path), behind(case, "ours").get("median_ms")
        return number(amount / time / unit) if amount is not None and time else ABSENT

    def each(what: str, text: Callable[[Case, str], str]) -> list[Column]:
        titles = (("eager", "eager"), ("compile", "compile"), ("runtime", "runtime"), ("ours", OURS))
        return [(f"{title} {what}", lambda case, key=key: text(case, key)) for key, title in titles]

    whole = [
        ("images/s", lambda case: number(behind(case, "ours").get("images_per_s"), 4)),
        *each("first result, s", lambda case, key: number(behind(case, key).get("first_s"))),
    ]
    columns = [
        ("at least, ms", lambda case: number(lower_bound_ms(case, ceilings))),
        *each("% of roofline", share),
        ("GB/s", lambda case: rate(case, 1e6, "bytes", "ideal")),
        ("TFLOP/s", lambda case: rate(case, 1e9, "flops")),
        *each("working MiB", lambda case, key: number(behind(case, key).get("working_mib"))),
        ("ideal kernels", lambda case: _count(work(case, "kernels", "ideal"))),
        *each("kernels", lambda case, key: _count(behind(case, key).get("kernels"))),
        *(whole if kind in ("models", "train") else []),
    ]
    found = table(cases, columns)
    return found if not found.titles else table(cases, [*_case_columns(kind, cases), *columns])


def steps(cases: Sequence[Case], ceilings: dict[str, Any]) -> Table:
    """Where the time of frozen networks goes, and what the classes of their steps reach of the peak."""
    rows, peaks = [], ceilings.get("flops_per_s", {})
    for case in cases:
        found, peak = case["variants"].get(FROZEN, {}).get("steps", ()), peaks.get(case["dtype"])
        whole = {key: sum(one[key] for one in found) for key in ("steps", "ms", "flops")}
        for one in [{"what": "all", **whole}, *found] if found else ():
            reached = one["flops"] and peak and number(100 * one["flops"] / (1e-3 * one["ms"] * peak), 2)
            share = number(100 * one["ms"] / whole["ms"], 2)
            where = (
                case["name"],
                str(case["batch"]),
                _detail(case["size"]),
                case["dtype"],
                one["what"],
                str(one["steps"]),
            )
            rows.append((*where, number(one["ms"]), share, reached or ABSENT))
    return _filled(("model", "batch", "size", "dtype", "steps", "how many", "ms", "% of the time", "% of peak"), rows)


def compact(kind: str, cases: Sequence[Case]) -> Table:
    """A short table of blocks or operations: one row for each model or operation and dtype."""
    return overview((_SPLIT[kind][1], "dtype"), groups(kind, cases))


def families(cases: Sequence[Case], dtype: str = "float32") -> Table:
    """The best ratios of one model of each family: a row for each, a column for each peer and batch size."""
    shown = [case for case in cases if case["name"] in FAMILIES and case["dtype"] == dtype]
    found = {(case["name"], case["batch"]): best_ratios(case) for case in shown}
    titles = {"eager": "over timm", "compile": "over torch.compile", "runtime": "over OpenVINO, ONNX Runtime"}
    known = {(key, batch) for (_, batch), of_case in found.items() for key in of_case}
    columns = [(key, batch) for key in titles for batch in sorted({case["batch"] for case in shown})]
    columns = [column for column in columns if column in known]

    def text(name: str, key: str, batch: int) -> str:
        ratio = found.get((name, batch), {}).get(key)
        return f"{ratio['ratio']:.2f}x" if ratio else ABSENT

    names = [name for name in FAMILIES if name in {case["name"] for case in shown}]
    rows = tuple((name, *[text(name, *column) for column in columns]) for name in names)
    return Table((f"model, {dtype}", *[f"{titles[key]}, batch {batch}" for key, batch in columns]), rows)


@dataclass(frozen=True)
class Mean:
    """The geometric mean of a ratio over cases, how many of them are below 1, and the extremes with their cases."""

    ratio: float
    cases: int
    slower: int
    smallest: tuple[float, str]
    largest: tuple[float, str]

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x ({self.cases} cases, slower in {self.slower})"


def mean(cases: Iterable[Case], key: str, ours: str = OURS) -> Mean | None:
    """Over the timed cases that have the ratio; None where none has."""
    found = [(ratios(case, ours)[key]["ratio"], case["id"]) for case in cases if key in ratios(case, ours)]
    if not found:
        return None
    values = [value for value, _ in found]
    return Mean(statistics.geometric_mean(values), len(found), sum(v < 1 for v in values), min(found), max(found))


def means(cases: Sequence[Case]) -> Table:
    """The geometric means over each class of peers, with the extremes."""
    rows = []
    for ours, (key, title) in itertools.product((OURS, FROZEN), REFERENCES.items()):
        if found := mean(cases, key, ours):
            extremes = (f"{ratio:.2f}x {case}" for ratio, case in (found.smallest, found.largest))
            rows.append((ours, title, f"{found.ratio:.2f}x", str(found.cases), str(found.slower), *extremes))
    return Table(("ours", "over", "geometric mean", "cases", "slower in", "smallest", "largest"), tuple(rows))


def overview(titles: tuple[str, ...], parts: dict[tuple[str, ...], list[Case]]) -> Table:
    """The geometric means of each group of timed cases, in a row of its own."""

    def text(found: Mean | None) -> str:
        return f"{found.ratio:.2f}x, slower in {found.slower} of {found.cases}" if found else ABSENT

    rows = [
        (*labels, str(len(cases)), *[text(mean(cases, key)) for key in REFERENCES]) for labels, cases in parts.items()
    ]
    return _filled((*titles, "cases", *_OVER.values()), rows)


def not_timed(run: Run) -> Table:
    """The cases without a time, and the variants without one in cases that have, with the reasons."""
    rows = [(case["id"], OURS, case["status"], case["reason"] or ABSENT) for case in run["cases"] if not _ok(case)]
    peers: dict[tuple[str, str, str], list[str]] = {}
    for case in timed(run):
        for name, variant in case["variants"].items():
            if not _ok(variant):
                peers.setdefault((name, variant["status"], variant.get("reason") or ABSENT), []).append(case["id"])
    for (name, status, reason), cases in peers.items():
        more = len(cases) - _NAMED_CASES
        named = ", ".join(cases[:_NAMED_CASES]) + (f" and {more} more" if more > 0 else "")
        rows.append((named, name, status, reason))
    return Table(("case", "variant", "status", "reason"), tuple(rows))


def ceilings(runs: dict[str, Run]) -> Table:
    """The ceilings that each run measured."""
    found = {kind: run.get("ceilings") or {} for kind, run in runs.items()}
    dtypes = dict.fromkeys(dtype for ceiling in found.values() for dtype in ceiling.get("flops_per_s", {}))

    def measured_by(ceiling: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for what, by in ceiling.get("measured_by", {}).items():
            yield {"bytes_per_s": "GB/s"}.get(what, what), by

    def scaled(value: float | None, scale: float) -> str:
        return ABSENT if value is None else number(value * scale)

    rows = [
        (
            kind,
            scaled(ceiling.get("bytes_per_s"), 1e-9),
            scaled(ceiling.get("launch_s"), 1e6),
            *[scaled(ceiling.get("flops_per_s", {}).get(dtype), 1e-12) for dtype in dtypes],
            "; ".join(f"{what}: {by}" for what, by in measured_by(ceiling)) or ABSENT,
        )
        for kind, ceiling in found.items()
        if ceiling
    ]
    return _filled(("run", "GB/s", "launch, us", *[f"{dtype} TFLOP/s" for dtype in dtypes], "measured by"), rows)


def losses(results: Results) -> Table:
    """Every timed case in which a peer is faster, the largest loss first."""
    found = []
    for machine, runs in results.items():
        for kind, run in runs.items():
            for case in timed(run):
                ratio = case["ratios"].get("peer")
                if ratio and ratio["ratio"] < 1:
                    found.append((ratio["ratio"], machine, kind, case["id"], ratio, case["details"].get("auto")))
    rows = tuple(
        (
            machine,
            kind,
            case,
            ratio["peer"],
            ratio_text(ratio),
            f"{100 / ratio['ratio'] - 100:.1f} %",
            "outside" if ratio["high"] < 1 else "within",
            ABSENT if auto is None else _detail(auto),
        )
        for _, machine, kind, case, ratio, auto in sorted(found, key=lambda loss: loss[:4])
    )
    titles = ("machine", "kind", "case", "faster peer", "its time / ours", "we take longer by", "the spread", "auto")
    return Table(titles, rows)


def _case_columns(kind: str, cases: Sequence[Case]) -> list[Column]:
    """What tells the cases of a kind apart: name, details, batch, size and dtype, as far as they say something."""
    elsewhere = (_SPLIT[kind][0], "auto")  # in a heading, in a column of its own
    details = dict.fromkeys(key for case in cases for key in case["details"] if key not in elsewhere)
    free: list[Column] = [
        ("used by" if key == "models" else key, lambda case, key=key: _detail(case["details"].get(key)))
        for key in details
    ]
    batch: Column = ("batch", lambda case: str(case["batch"]))
    dtype: Column = ("dtype", lambda case: case["dtype"])
    if kind not in ("models", "train"):
        return [*free, batch, dtype]
    size: Column = ("size", lambda case: _detail(case["size"]))
    return [("model", lambda case: case["name"]), batch, size, dtype, *free]


def _ok(record: dict[str, Any]) -> bool:
    return record["status"] == "timed"


def _count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0f}"


def _detail(value: Any) -> str:
    """A value of a case's details: sizes as 8x48x56x56, of many names the first and how many more."""
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return "x".join(map(str, value))
    if isinstance(value, (list, dict)):
        names = list(map(str, value))
        return ABSENT if not names else names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
    return ABSENT if value is None else str(value)
