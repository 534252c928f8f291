"""The reports of the benchmarks: what the tables say, the markers, losses, figures, and that no text breaks out."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bench import record, report
from bench.record import RecordError
from bench.report import figures, page, tables

CPU, GPU = "cpu-test-2-threads", "test-gpu"
HOSTILE = "a | b <i onclick=alert(1)>\n\n<!-- /bench:summary -->\n# `c` $d$ [e](javascript:f) \\| &amp;"


def variant(ms, batch=1, **more):
    spread = {"q1_ms": 0.9 * ms, "q3_ms": 1.1 * ms, "samples_ms": [ms] * 7, "iterations": 2}
    known = {"images_per_s": 1e3 * batch / ms, "first_s": 0.5, "working_mib": None, "kernels": None}
    return {"status": "timed", "median_ms": ms, **spread, **known, **more}


def ratio(peer, value, spread=0.01):
    return {"peer": peer, "ratio": value, "low": value - spread, "high": value + spread}


def case(name="regnetx_002", batch=1, dtype="float32", eager=15.0, compiled=12.0, ours=10.0, **more):
    times = {"timm": 1.5 * eager, "timm channels_last": eager, "compile": compiled, "regnet_fast": ours}
    best = "compile" if compiled < eager else "timm channels_last"
    return {
        "id": f"{name}/b{batch}/{dtype}",
        "name": name,
        "batch": batch,
        "size": [224, 224],
        "dtype": dtype,
        "details": {},
        "status": "timed",
        "reason": "",
        "work": None,
        "variants": {variant_name: variant(ms, batch) for variant_name, ms in times.items()},
        "ratios": {
            "eager": ratio("timm channels_last", eager / ours),
            "compile": ratio("compile", compiled / ours),
            "peer": ratio(best, min(eager, compiled) / ours),
        },
        **more,
    }


def untimed(status, reason, **more):
    return case(**more) | {"status": status, "reason": reason, "variants": {}, "ratios": {}}


def work(flops, ideal_bytes):
    amounts = {"eager": 3 * ideal_bytes, "compiled": 2 * ideal_bytes, "ideal": ideal_bytes}
    return {"flops": flops, "bytes": amounts, "kernels": {"eager": 9, "compiled": 5, "ideal": 3}}


def run(kind, *cases, machine="Test CPU, 2 threads", **more):
    conditions = {"device": "cpu", "machine": machine, "threads": 2, "driver": None, "cuda": None, "cudnn": None}
    versions = {"python": "3.11.7", "torch": "2.15.0", "triton": None, "timm": "1.0.31", "regnet_fast": "0.1.0"}
    return {
        "schema": record.SCHEMA,
        "kind": kind,
        "command": f"python -m bench {kind} --batch 1",
        "conditions": {**conditions, **versions, "commit": "0123456789abcdef", "dirty": False},
        "started": "2026-11-20T13:00:00+00:00",
        "finished": "2026-11-20T13:10:00+00:00",
        "ceilings": {"bytes_per_s": 2e10, "launch_s": 5e-6, "flops_per_s": {"float32": 2e11, "bfloat16": 4e11}},
        "cases": list(cases),
        **more,
    }


def operation(op, channels, **more):
    details = {"op": op, "in": channels, "out": channels, "hw": 28, "models": {"regnetx_002": 3, "regnety_002": 1}}
    return case(f"{op}/{channels}", details={**details, "auto": "aten: direct"}, **more)


def every_kind():
    """Two machines, all four kinds: failed and skipped peers, a wrong case, a failed one, missing ratios."""
    failed = case("repvgg_a0", 8)
    failed["variants"]["compile"] = {"status": "failed", "reason": "CompileError: no compiler"}
    failed["variants"]["regnet_fast aten"] = {"status": "skipped", "reason": "nothing fused"}
    failed["ratios"] = {"eager": ratio("timm channels_last", 1.5), "peer": ratio("timm channels_last", 1.5)}
    alone = case("resnetv2_50", dtype="bfloat16", ratios={})
    alone["variants"] = {"regnet_fast": alone["variants"]["regnet_fast"]}
    models = run(
        "models",
        case("regnetx_002", 8, work=work(4e9, 1e8)),
        case("regnetx_002", 1, compiled=9.0),
        failed,
        alone,
        untimed("wrong", "logits: max error 3, eager's 1", name="regnety_002"),
        untimed("failed", "RuntimeError: no memory", name="regnety_320"),
    )
    step = case("regnetx_002", 32)
    for name, one in step["variants"].items():
        step["variants"][name] = {**one, "forward_ms": 0.25 * one["median_ms"], "backward_ms": 0.5 * one["median_ms"]}
    large = case("regnetx_002", 256)
    for share, one in enumerate(large["variants"].values()):
        one.update(working_mib=100.0 * (4 - share), kernels=70 - share)
    block = case("regnety_002/s2.b1", details={"model": "regnety_002", "path": "s2.b1", "input": [1, 48, 56, 56]})
    ops = [operation("grouped_conv", 24, work=work(1e8, 1e6)), operation("pointwise_conv", 24, ours=20.0)]
    return {
        CPU: {"models": models, "train": run("train", step), "blocks": run("blocks", block), "ops": run("ops", *ops)},
        GPU: {"models": run("models", large, case("regnetx_002", 1), machine="Test GPU")},
    }


def save(folder, results):
    for machine, runs in results.items():
        for kind, content in runs.items():
            path = folder / machine / f"{kind}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A repository's folder of results, of which no figures are drawn."""
    monkeypatch.setattr(figures, "draw", lambda runs: None)
    return save(tmp_path / "bench" / "results", every_kind())


def put(folder, path, text):
    """A file of the repository that holds the results."""
    file = folder.parent.parent / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def parse_tables(text):
    """The tables of a Markdown text: a list of rows by title each. Every row has as many cells as the titles."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        titles, rule, *rows = map(cells, lines.splitlines())
        assert all(re.fullmatch("-+:?", cell) for cell in rule)
        assert {len(row) for row in (rule, *rows)} <= {len(titles)}, lines
        found.append([dict(zip(titles, row, strict=True)) for row in rows])
    return found


def section(text, heading):
    """What stands under a heading, up to the next of its level or above."""
    level = heading.partition(" ")[0]
    return re.split(rf"^#{{1,{len(level)}}} ", text.split(f"\n{heading}\n")[1], flags=re.MULTILINE)[0]


def report_of(results, machine=CPU):
    report.write(results)
    return (results / machine / "report.md").read_text()


# What the tables say


def test_times_and_ratios_of_models(results):
    models = section(report_of(results), "## Models, inference")
    rows = parse_tables(section(models, "### Times"))[0]
    assert [(row["model"], row["batch"], row["dtype"]) for row in rows] == [
        ("regnetx_002", "1", "float32"),
        ("regnetx_002", "8", "float32"),
        ("repvgg_a0", "8", "float32"),
        ("resnetv2_50", "1", "bfloat16"),
    ]
    slower, faster, failed, alone = rows
    assert faster["timm, ms"] == "22.50" and faster["timm channels_last, ms"] == "15.00"
    assert faster["regnet_fast, ms"] == "10.00" and faster["over best eager"] == "1.50x (1.49-1.51)"
    assert slower["over best compile"] == "0.90x (0.89-0.91)" and slower["best peer"] == "compile"
    assert failed["compile, ms"] == "failed" and failed["regnet_fast aten, ms"] == "skipped"
    assert failed["over best compile"] == "-" and failed["best peer"] == "timm channels_last"
    assert alone["timm, ms"] == alone["over best peer"] == "-"


def test_geometric_means_with_extremes(results):
    rows = parse_tables(section(section(report_of(results), "## Models, inference"), "### Geometric means"))[0]
    eager, compiled, peer = rows
    assert eager["geometric mean"] == "1.50x" and eager["cases"] == "3" and eager["slower in"] == "0"
    assert compiled["geometric mean"] == f"{math.sqrt(1.2 * 0.9):.2f}x" and compiled["slower in"] == "1"
    assert compiled["smallest"] == "0.90x regnetx_002/b1/float32"
    assert compiled["largest"] == "1.20x regnetx_002/b8/float32"
    assert peer["cases"] == "3" and peer["largest"] == "1.50x repvgg_a0/b8/float32"


def test_what_was_not_timed_is_listed_with_its_reason(results):
    rows = parse_tables(section(section(report_of(results), "## Models, inference"), "### Not timed"))[0]
    assert [tuple(row.values()) for row in rows] == [
        ("regnety_002/b1/float32", "regnet_fast", "wrong", "logits: max error 3, eager's 1"),
        ("regnety_320/b1/float32", "regnet_fast", "failed", "RuntimeError: no memory"),
        ("repvgg_a0/b8/float32", "compile", "failed", "CompileError: no compiler"),
        ("repvgg_a0/b8/float32", "regnet_fast aten", "skipped", "nothing fused"),
    ]


def test_use_of_the_machine_beside_its_ceilings(results):
    rows = parse_tables(section(section(report_of(results), "## Models, inference"), "### Use of the machine"))[0]
    with_work = next(row for row in rows if row["batch"] == "8" and row["model"] == "regnetx_002")
    # 4e9 operations at 2e11 per second are 20 ms; 1e8 bytes at 2e10 per second are 5 ms
    assert with_work["at least, ms"] == "20.0"
    assert with_work["regnet_fast % of roofline"] == "200" and with_work["eager % of roofline"] == "133"
    assert with_work["GB/s"] == "10.0" and with_work["TFLOP/s"] == "0.400" and with_work["images/s"] == "800.0"
    assert with_work["compile first result, s"] == "0.500"
    assert rows[0]["at least, ms"] == rows[0]["GB/s"] == "-"
    assert not any("MiB" in title or title == "eager kernels" for title in rows[0])


def test_steps_beside_the_peak():
    plain, frozen = case("regnetx_002"), case("regnety_002", 8)
    steps = [
        {"what": "1x1", "steps": 26, "ms": 6.0, "flops": 900_000_000},
        {"what": "means", "steps": 13, "ms": 2.0, "flops": 0},
    ]
    frozen["variants"]["regnet_fast frozen"] = variant(8.2, steps=steps)
    assert not tables.steps([plain], {}).rows
    # 9e8 operations at 2e11 per second are 4.5 ms, of 6 in the class and of 8 in all
    found = [row[4:] for row in tables.steps([plain, frozen], run("models")["ceilings"]).rows]
    assert found == [
        ("all", "39", "8.00", "100", "56"),
        ("1x1", "26", "6.00", "75", "75"),
        ("means", "13", "2.00", "25", "-"),
    ]
    assert "% of peak" not in tables.steps([frozen], {}).titles


def test_no_lower_bound_without_a_ceiling_for_the_dtype():
    ceilings = run("models")["ceilings"]
    # 1e9 bytes at 2e10 per second are 50 ms
    assert tables.lower_bound_ms(case(work=work(4e9, 1e9)), ceilings) == pytest.approx(50)
    assert tables.lower_bound_ms(case(work=work(4e9, 1e9), dtype="float16"), ceilings) is None
    assert tables.lower_bound_ms(case(), ceilings) is None


def test_memory_and_kernels_where_they_are_known(results):
    rows = parse_tables(section(report_of(results, GPU), "### Use of the machine"))[0]
    unknown, known = rows
    assert known["eager working MiB"] == "300" and known["regnet_fast working MiB"] == "100"
    assert known["compile kernels"] == "68" and unknown["compile kernels"] == "-"


def test_forward_and_backward_apart(results):
    (row,) = parse_tables(section(report_of(results), "### Forward and backward"))[0]
    assert (row["eager forward, ms"], row["compile backward, ms"]) == ("3.750", "6.000")
    assert (row["regnet_fast forward, ms"], row["regnet_fast backward, ms"]) == ("2.500", "5.000")


def test_operations_and_blocks_in_groups(results):
    text = report_of(results)
    (row,) = parse_tables(section(text, "### pointwise_conv"))[0]
    assert (row["in"], row["hw"], row["used by"], row["auto"]) == ("24", "28", "regnetx_002 +1", "aten: direct")
    overview = parse_tables(section(text, "## Operations"))[1]
    assert [row["op"] for row in overview] == ["grouped_conv", "pointwise_conv"]
    assert overview[1]["over best peer"] == "0.60x, slower in 1 of 1"
    (block,) = parse_tables(section(text, "### regnety_002"))[0]
    assert (block["path"], block["input"]) == ("s2.b1", "1x48x56x56")


def test_ceilings(results):
    rows = parse_tables(section(report_of(results), "## Ceilings"))[0]
    assert {row["run"] for row in rows} == set(tables.KINDS)
    assert (rows[0]["GB/s"], rows[0]["launch, us"], rows[0]["bfloat16 TFLOP/s"]) == ("20.0", "5.00", "0.400")
    assert "measured by" not in rows[0]
    models = run("models")
    models["ceilings"]["measured_by"] = {"bytes_per_s": "a triad", "float32": "products"}
    found = tables.ceilings({"models": models})
    assert found.titles[-1] == "measured by" and found.rows[0][-1] == "GB/s: a triad; float32: products"


def test_conditions_tell_a_dirty_tree_and_an_unfinished_run():
    unfinished = run("models", finished=None)
    unfinished["conditions"]["dirty"] = True
    text = report.conditions(unfinished)
    assert "uncommitted" in text and "not finished" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.00"), (0.012345, "0.0123"), (9.996, "10.0"), (47.849, "47.8"), (12345.6, "12346")],
)
def test_numbers_have_three_significant_digits(value, text):
    assert tables.number(value) == text


def test_frozen_weights_have_a_ratio_of_their_own():
    one = case()
    one["variants"]["regnet_fast frozen"] = variant(8.0, ratios={"compile": ratio("compile", 1.5)})
    found = tables.times("models", [one])
    row = dict(zip(found.titles, found.rows[0], strict=True))
    assert row["frozen over best compile"] == "1.50x (1.49-1.51)"


def with_a_runtime(one):
    """A case as it is where OpenVINO was measured, in half of our time."""
    ours = one["variants"]["regnet_fast"]["median_ms"]
    one["variants"]["openvino"] = variant(ours / 2)
    one["ratios"] |= dict.fromkeys(("runtime", "peer"), ratio("openvino", 0.5))
    return one


def test_runtimes_have_columns_where_they_were_measured(results):
    cases = [with_a_runtime(case("regnetx_032", batch)) for batch in (1, 8)]
    save(results, {GPU: {"models": run("models", *cases, case("regnetx_002"), machine="Another CPU")}})
    families = [f"<!-- bench:families {machine} -->\n<!-- /bench:families -->\n" for machine in (CPU, GPU)]
    readme = put(results, "README.md", "".join(families))
    summary = put(results, "docs/x.md", "<!-- bench:summary -->\n<!-- /bench:summary -->\n")
    models = section(report_of(results, GPU), "## Models, inference")
    times = parse_tables(section(models, "### Times"))[0]
    assert times[0]["openvino, ms"] == "5.000" and times[0]["over best runtime"] == "0.50x (0.49-0.51)"
    assert times[0]["best peer"] == "openvino" and times[2]["over best runtime"] == "-"
    assert "the fastest runtime" in [row["over"] for row in parse_tables(section(models, "### Geometric means"))[0]]
    without = section((results / CPU / "report.md").read_text(), "## Models, inference")
    assert "runtime" not in without and "openvino" not in without
    first, second = parse_tables(readme.read_text())
    assert not first and "over OpenVINO" not in readme.read_text().split("Geometric means")[0]
    assert second[0]["over OpenVINO, ONNX Runtime, batch 8"] == "0.50x"
    rows = {(row["machine"], row["batch"]): row for row in parse_tables(summary.read_text())[0]}
    assert rows[GPU, "8"]["over best runtime"].startswith("0.50x") and rows[CPU, "8"]["over best runtime"] == "-"


def test_cases_that_ours_did_not_run(results):
    skipped = case("regnety_002")
    skipped["variants"]["regnet_fast"] = {"status": "skipped", "reason": "runs the host's own forward: training"}
    skipped["ratios"] = {}
    save(results, {CPU: {"train": run("train", skipped, case())}})
    text = section(report_of(results), "## Training steps")
    first, second = parse_tables(section(text, "### Times"))[0]
    assert (first["regnet_fast, ms"], second["regnet_fast, ms"]) == ("skipped", "10.00") and first[
        "timm, ms"
    ] == "22.50"
    assert parse_tables(section(text, "### Not timed"))[0][0]["reason"] == "runs the host's own forward: training"
    assert tables.with_ours(run("train", skipped, case()))[0]["name"] == "regnetx_002"


# Losses


def test_losses_are_sorted_and_tell_the_spread(results):
    near = case("repvgg_a0", compiled=9.95, details={"auto": "5 of 5 blocks fused"})
    save(results, {GPU: {"models": run("models", near, case("regnetx_002"), machine="Test GPU")}})
    report.write(results)
    (rows,) = parse_tables((results / "losses.md").read_text())
    assert [(row["machine"], row["kind"], row["case"]) for row in rows] == [
        (CPU, "ops", "pointwise_conv/24/b1/float32"),
        (CPU, "models", "regnetx_002/b1/float32"),
        (GPU, "models", "repvgg_a0/b1/float32"),
    ]
    assert [row["the spread"] for row in rows] == ["outside", "outside", "within"]
    assert [row["we take longer by"] for row in rows] == ["66.7 %", "11.1 %", "0.5 %"]
    assert [row["auto"] for row in rows] == ["aten: direct", "-", "5 of 5 blocks fused"]
    assert rows[1]["faster peer"] == "compile" and rows[1]["its time / ours"] == "0.90x (0.89-0.91)"


def test_no_losses():
    models = run("models", case(), untimed("wrong", "why"), case("alone", ratios={}))
    assert tables.losses({CPU: {"models": models}}).rows == ()


# Markers


def test_markers_are_filled_and_the_rest_is_kept(results):
    before, after = "# Title\r\n\ntext | <b>\n", "\nthe end, without a newline"
    readme = put(results, "README.md", f"{before}<!-- bench:families {CPU} -->\nold\n<!-- /bench:families -->{after}")
    page_of_docs = put(results, "docs/deep/x.md", "<!-- bench:summary -->\n<!-- /bench:summary -->\n")
    unmarked = put(results, "docs/other.md", "Say `<!-- bench:summary -->` where you want it.\n")
    written = report.write(results)
    text = readme.read_bytes().decode()
    assert text.startswith(before) and text.endswith(after) and "old" not in text
    assert "1.50x (3 cases, slower in 0)" in text
    assert f"](bench/results/{CPU}/report.md)" in text
    assert {readme, page_of_docs} < set(written) and unmarked not in written
    of_all = page_of_docs.read_text()
    assert all(f"[{machine}](../../bench/results/{machine}/report.md)" in of_all for machine in (CPU, GPU))
    rows = parse_tables(of_all)[0]
    assert {(row["machine"], row["kind"]) for row in rows} == {(CPU, kind) for kind in tables.KINDS} | {(GPU, "models")}
    assert rows[0]["batch"] == "1" and rows[0]["over best compile"] == "0.90x, slower in 1 of 1"


def test_families_marker(results):
    """A row for each family that was measured, from its own cases of one dtype."""
    first = [
        case("regnetx_032", 1, compiled=9.0),
        case("regnetx_032", 32),
        case("regnetx_032", 1, "bfloat16", ours=1.0),
    ]
    cases = [*first, case("resnetv2_50", 32, ours=20.0), case("regnetx_002", 32)]
    save(results, {CPU: {"models": run("models", *cases)}})
    readme = put(results, "README.md", f"<!-- bench:families {CPU} -->\n<!-- /bench:families -->\n")
    report.write(results)
    (rows,) = parse_tables(readme.read_text())
    assert [list(row.values()) for row in rows] == [
        ["regnetx_032", "1.50x", "1.50x", "0.90x", "1.20x"],
        ["resnetv2_50", "-", "0.75x", "-", "0.60x"],
    ]
    titles = "model, float32", "over timm, batch 1", "over timm, batch 32"
    assert tuple(rows[0])[:3] == titles and f"](bench/results/{CPU}/report.md)" in readme.read_text()


def test_the_families_are_shown_frozen_where_that_was_timed():
    one, other = case("regnetx_032", 1), case("regnetx_032", 8)
    one["variants"]["regnet_fast frozen"] = variant(8.0, ratios={"eager": ratio("eager", 1.9)})
    titles, rows = (found := tables.families([one, other])).titles, found.rows
    assert titles[1:3] == ("over timm, batch 1", "over timm, batch 8") and rows[0][1:3] == ("1.90x", "1.50x")
    assert tables.best_ratios(one)["eager"]["ratio"] == 1.9 and tables.best_ratios(other) is other["ratios"]


def test_results_elsewhere_have_no_markers_to_fill(results, tmp_path):
    elsewhere = results.rename(tmp_path / "bench" / "other")
    readme = put(elsewhere, "README.md", "<!-- bench:summary -->\n<!-- /bench:summary -->\n")
    assert readme not in report.write(elsewhere)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"\n<!-- bench:models {CPU} -->\n<!-- /bench:models -->", "line 2: .* are summary and families"),
        ("<!-- bench:families cpu -->\n<!-- /bench:families -->", f"no machine 'cpu' has models; .* {CPU}, {GPU}"),
        ("<!-- bench:families -->\n<!-- /bench:families -->", "no machine '' has models"),
        (f"<!-- bench:summary {GPU} -->\n<!-- /bench:summary -->", "takes no name"),
        ("x\n<!-- bench:summary -->\ny", "line 2: <!-- bench:summary --> has no end: add .* <!-- /bench:summary -->"),
        (
            "<!-- bench:summary -->\n<!-- bench:ops -->\n<!-- /bench:ops -->",
            "line 2: .* before the end of bench:summary",
        ),
        ("<!-- bench:summary -->\n<!-- /bench:ops -->", "line 2: <!-- /bench:ops --> ends nothing"),
        ("<!-- /bench:ops -->", "line 1: <!-- /bench:ops --> ends nothing"),
    ],
)
def test_markers_that_cannot_be_filled(results, text, told):
    put(results, "docs/page.md", text)
    before = {path: path.read_bytes() for path in results.parent.parent.rglob("*.*") if path.is_file()}
    with pytest.raises(report.ReportError, match=told) as error:
        report.write(results)
    assert str(error.value).startswith("docs/page.md, line ")
    assert before == {path: path.read_bytes() for path in results.parent.parent.rglob("*.*") if path.is_file()}


# Up to date or not


def test_check_finds_what_is_stale_and_writes_nothing(results):
    readme = put(results, "README.md", "<!-- bench:summary -->\nold\n<!-- /bench:summary -->\n")
    expected = [readme, results / CPU / "report.md", results / "losses.md", results / GPU / "report.md"]
    expected.append(results / page.FILE)
    assert set(report.write(results, check=True)) == set(expected)
    assert "old" in readme.read_text() and not (results / "losses.md").exists()
    assert set(report.write(results)) == set(expected)
    assert report.write(results, check=True) == report.write(results) == []
    (results / "losses.md").write_text("None!\n")
    assert report.write(results, check=True) == [results / "losses.md"]


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    other = save(tmp_path / "again" / "bench" / "results", every_kind())
    for folder in (results, other):
        put(folder, "README.md", "<!-- bench:summary -->\n<!-- /bench:summary -->\n")
        report.write(folder)
    written = [path.relative_to(results.parent.parent) for path in results.rglob("*.*")] + [Path("README.md")]
    for path in written:
        assert (results.parent.parent / path).read_bytes() == (other.parent.parent / path).read_bytes(), path


def test_this_repository_is_up_to_date():
    folder = Path(__file__).resolve().parents[2] / "bench" / "results"
    stale = report.write(folder, check=True)
    assert stale == [], "run python -m bench report"


# Results that cannot be read


def test_an_older_form_is_refused_by_name(results):
    file = results / CPU / "regnetx_002.json"
    file.write_text(json.dumps({"command": "regnet-fast compare", "conditions": {}, "cases": []}))
    with pytest.raises(RecordError, match=r"regnetx_002\.json: .*older form.*measure again"):
        report.load_results(results)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("models.json", "{", "models.json: is not JSON"),
        ("models.json", json.dumps({**run("models"), "schema": 99}), "models.json: .*schema 99"),
        ("models.json", json.dumps(run("ops")), "models.json: holds ops, not models"),
        ("more.json", json.dumps(run("ops")), "more.json: holds a run of ops, which belongs in ops.json"),
    ],
)
def test_other_files_are_refused_by_name(results, name, content, told):
    (results / GPU / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        report.write(results)


def test_json_that_is_no_run_is_left_alone(results):
    (results / GPU / "tuning.json").write_text('{"configurations": []}')
    assert list(report.load_results(results)[GPU]) == ["models"]


def test_no_folder(tmp_path):
    with pytest.raises(report.ReportError, match="is no folder"):
        report.write(tmp_path / "bench" / "results")


# Text that would break out


def hostile_results():
    bad = case(HOSTILE, ours=20.0, dtype=HOSTILE, details={HOSTILE: HOSTILE, "auto": HOSTILE})
    bad["variants"] |= {HOSTILE: variant(5.0), f"{HOSTILE} failed": {"status": "failed", "reason": HOSTILE}}
    bad["ratios"]["peer"]["peer"] = HOSTILE
    spoiled = run("models", bad, untimed("wrong", HOSTILE, name=HOSTILE), machine=HOSTILE, command=HOSTILE)
    spoiled["conditions"]["torch"] = HOSTILE
    op = operation(HOSTILE, 24, ours=20.0)
    return {CPU: {"models": spoiled, "ops": run("ops", op, machine=HOSTILE)}}


def test_no_text_breaks_out_of_markdown(results):
    save(results, hostile_results())
    readme = put(results, "README.md", "<!-- bench:summary -->\n<!-- /bench:summary -->\n\nkept\n")
    report.write(results)
    assert report.write(results, check=True) == []
    for path in (readme, results / CPU / "report.md", results / "losses.md"):
        text = path.read_text()
        parse_tables(text)
        assert "alert(1)" in text
        outside_code = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
        assert not re.search(r"<(?!!-- /?bench:summary -->$)", outside_code, re.MULTILINE)
        assert not re.search(r"(?<!\\)[`*]|(?<!\\)\[e", outside_code)
        assert text.count("\n<!-- /bench:summary -->\n") == (path == readme)
    assert readme.read_text().endswith("<!-- /bench:summary -->\n\nkept\n")


# The figure


def families(batches=(1, 8, 32), **more):
    cases = [case(name, batch, **more) for name in ("regnetx_002", "regnetx_032", "resnetv2_50") for batch in batches]
    return {"models": run("models", *cases)}


@pytest.fixture
def draw():
    pytest.importorskip("matplotlib")
    return figures.draw


def test_the_figure_has_the_smallest_and_the_largest_batch_of_one_model_of_each_family(draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw(families(eager=25.0))
    assert "regnetx_032" in drawn and "resnetv2_50" in drawn and "regnetx_002" not in drawn
    assert ">32<" in drawn and ">8<" not in drawn
    assert ">2.50<" in drawn and "over the fastest eager" in drawn and "float32" in drawn


def test_the_figure_has_runtimes_where_they_were_measured(draw):
    measured = families()
    assert "fastest runtime" not in draw(measured)
    for one in measured["models"]["cases"]:
        with_a_runtime(one)
    drawn = draw(measured)
    assert "over the fastest runtime" in drawn and ">0.50<" in drawn


def test_no_figure_without_data(draw):
    nothing = run("models", untimed("failed", "no memory", name="regnetx_032"))
    assert draw({"models": nothing}) is draw(families(ratios={})) is draw({}) is None


def test_tables_without_ours():
    skipped = {"status": "skipped", "reason": "runs the host's own forward"}
    cases = [case(batch=batch, work=work(1e9, 1e6)) for batch in (1, 8)]
    for one in cases:
        one["variants"]["regnet_fast"], one["ratios"] = skipped, {}
    rows = tables.times("models", cases).rows
    assert "skipped" in rows[0] and tables.use("models", cases, {}).titles[-2:] == ("dtype", "ideal kernels")


def test_the_figure_is_deterministic_and_in_a_style_of_its_own(draw):
    import matplotlib

    first = draw(families())
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.grid": True, "svg.fonttype": "path"}):
        assert draw(families()) == first
    assert not re.search("<dc:date>|Matplotlib v", first)


def test_the_figure_takes_any_text(draw):
    svg = draw({"models": run("models", case("regnetx_032"), machine="<i onclick=alert(1)> <!-- $d$")})
    assert "<i " not in svg and "<!-- $" not in svg
    assert "&lt;i onclick=alert(1)&gt;" in svg and "$d$" in svg


def test_a_figure_is_written_shown_and_removed(tmp_path, draw):
    folder = save(tmp_path / "results", {CPU: families(), GPU: every_kind()[GPU]})
    for machine in (CPU, GPU):
        (folder / machine / "figures").mkdir()
        (folder / machine / "figures" / "mine.svg").write_text("of somebody else")
        (folder / machine / "figures" / figures.FILE).write_text("of a run that is gone")
    report.write(folder)
    assert (folder / CPU / "figures" / figures.FILE).read_text() == draw(families())
    assert [path.name for path in (folder / GPU / "figures").iterdir()] == ["mine.svg"]
    shown = [re.findall(r"!\[.*\]\(figures/(.*)\)", (folder / one / "report.md").read_text()) for one in (CPU, GPU)]
    assert shown == [[figures.FILE], []]
    assert report.write(folder) == report.write(folder, check=True) == []


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="figures need matplotlib: pip install matplotlib"):
        figures.draw(families())
    folder = save(tmp_path / "results", every_kind())
    assert folder / CPU / "report.md" in report.write(folder)
    assert "figures need matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert not (folder / CPU / "figures").exists()


# The page of all models


def page_of(results):
    report.write(results)
    text = (results / page.FILE).read_text()
    (data,) = re.findall(r"^const \{.*?\} = (\{.*?\})$(?=\nconst form)", text, re.DOTALL | re.MULTILINE)
    return text, json.loads(data)


def test_the_page_has_every_case_and_needs_nothing_beside_itself(results):
    text, data = page_of(results)
    runs = report.load_results(results)
    expected = [(machine, c["id"]) for machine, of in runs.items() for c in tables.with_ours(of["models"])]
    assert [(c["machine"], f"{c['model']}/b{c['batch']}/{c['dtype']}") for c in data["cases"]] == expected
    assert set(data["conditions"]) == set(runs)
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(", text)


def test_the_page_takes_any_text(results):
    (results / CPU / "models.json").write_text(json.dumps(run("models", case(), machine=f"</script>{HOSTILE}")))
    text, data = page_of(results)
    assert text.count("</script>") == 1 and "<i onclick" not in text
    assert f"</script>{HOSTILE}" in data["conditions"][CPU]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("resnet50", "resnet"),
        ("resnetv2_50", "resnetv2"),
        ("mobilenetv3_large_100", "mobilenetv3"),
        ("regnety_016", "regnety"),
    ],
)
def test_a_family_is_the_name_without_its_size(model, family):
    assert page.family(model) == family


def test_no_page_without_models(results):
    for machine in (CPU, GPU):
        (results / machine / "models.json").unlink()
    report.write(results)
    assert not (results / page.FILE).exists()


def test_the_page_filters_in_a_browser(results, tmp_path):
    """Chromium draws a row for each model that is chosen, and ratios below 1 as slower."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium")
    cases = [case("resnet50", ours=30.0), case("regnety_016"), case("resnet50", 8), case("resnet50", dtype="bfloat16")]
    (results / CPU / "models.json").write_text(json.dumps(run("models", *cases)))
    text, _ = page_of(results)

    def rows(**chosen):
        given = "".join(f"form.elements.{name}.value = {value!r};" for name, value in chosen.items())
        html = tmp_path / "chosen.html"
        html.write_text(text.replace("\ndraw()\n", f"\n{given}\ndraw()\n"))
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
        )
        done = subprocess.run([browser, *options, html.as_uri()], capture_output=True, text=True, timeout=60)
        table = done.stdout.partition('<table id="rows"')[2].partition("</table>")[0]
        return re.findall(r"<th>(.*?)</th>", table), re.findall(r'class="(.*?)".*?<span>(.*?)</span>', table)

    as_created = {"machine": CPU, "ours": "as created"}
    assert rows(**as_created)[0] == ["resnet50", "regnety_016"]
    names, bars = rows(**as_created, family="resnet")
    assert names == ["resnet50"] and ("bar slower", "0.50x") in bars
    assert rows(**as_created, batch="8")[0] == ["resnet50"]
    assert rows(**as_created, family="regnety", dtype="bfloat16")[0] == []
