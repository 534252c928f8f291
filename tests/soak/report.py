"""docs/robustness.md and its figure, from what a run of the soak tests left: `python tests/soak/report.py`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from amount import RESULTS

from regnet_fast.inspect.info import conditions

DOCS = Path(__file__).parents[2] / "docs"
DATA = DOCS / "figures" / "robustness.json"
FIGURE = DOCS / "figures" / "robustness.svg"
PAGE = DOCS / "robustness.md"

SUBJECTS = {
    "test_evaluation": "random networks and images in evaluation, float32 and bfloat16: timm's numbers",
    "test_training_in_float64": "random networks in training, float64: output, gradients and statistics are timm's",
    "test_training_in_float32": "random networks in training, float32: gradients as near to float64's as timm's",
    "test_programs": "random programs of what users do to a model, compared with timm's twin after each action",
    "test_one_model_under_different_backends": "six threads, one model, three backends: the serial results",
    "test_autocast_in_some_threads": "six threads, half of them under autocast: the serial results",
    "test_many_models_train_in_many_threads": "six threads train a model each: the serial gradients",
    "test_weights_change_between_calls_of_threads": "weights change between calls of six threads",
    "test_forked_workers": "forked data-loader workers run a model that was packed before",
    "test_damaged_bytes": "checkpoint files with random damage: refused, or loaded as the file says",
    "test_changed_entries": "checkpoint files with random entries changed: refused, or loaded as the file says",
    "test_inference": "memory over inference of changing sizes, dtypes and backends",
    "test_training": "memory over training of changing sizes and dtypes, with evaluations between",
    "test_models_come_and_go": "memory over models that are made, trained, run and dropped",
}
"""What each test that counts its inputs is about, in the order of the page."""

VERSIONS = ("torch", "timm", "regnet_fast")

HEAD = """# Robustness

Tests that try random inputs, many threads and many calls. `make test` runs a short form of them, the same inputs every
time. `make soak` runs `SOAK` times as much with new random inputs, and writes this page from what it found. The figures
of a test that was run again, after a fix, are those of its last run.

- **Numbers.** Random RegNets, ResNetV2s and ByobNets (widths, groups, squeeze-excite, activations, norms, shortcuts,
  strides, dilations, pre-activation, linear ends, stochastic depth, dropout), random sizes, layouts and dtypes of
  images. In evaluation the rule of [how it works](how-it-works.md#what-the-same-function-means), training in float64
  and float32. What timm refuses is refused with the same error. An image that misses the rule is judged with eight
  more: some networks amplify the rounding of one early value to most of the error of a small map.
- **Programs.** Three to eight actions on a random network and timm's twin of it: evaluation, steps of all of torch's
  optimizers, weights that are loaded, written through `.data`, exchanged, computed or given for one call, layers and
  hooks that come and go, copies, pickles, dtypes, sizes, modes, freezing. Outputs, gradients and buffers are compared
  after each; a gradient that differs is judged by float64.
- **Threads and forks.** Results are equal to the bit to those of one thread.
- **Files.** Truncated, flipped, overwritten, shifted and doubled bytes; entries missing, renamed, exchanged, of other
  shapes, dtypes and kinds. A file is refused with a `CheckpointError` and the model is as it was, or the weights are
  exactly those that the library of its format reads from it.
- **Memory.** What the process holds, after every kind of call was made once. A test fails where the last half of its
  calls adds more than 8 MB.

Found by them, and fixed: torch.load of a file with damaged directory bits gave uninitialised memory as weights; a
classifier's weight without dimensions ended in an error of Python's; sums of nearly constant gradients lost digits
([training](training.md#on-a-cpu-parts-of-the-batch)).
"""


def run() -> dict:
    """What the last run left, and the machine."""
    tests = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not tests:
        raise SystemExit(f"there are no results in {RESULTS}: run `make soak`")
    return {"conditions": conditions("cpu"), "tests": tests}


def table(tests: list[dict]) -> str:
    by_subject = defaultdict(list)
    for test in tests:
        by_subject[test["test"].split("[")[0]].append(test)
    rows = ["| subject | tried | of these | failures | seconds |", "| --- | ---: | --- | ---: | ---: |"]
    for name, subject in SUBJECTS.items():
        found = by_subject.pop(name, [])
        if not found:
            continue
        counts = defaultdict(int)
        for test in found:
            for what, number in test["counts"].items():
                counts[what] += number
        unit = next(what for what in ("inputs", "calls", "steps") if what in counts)
        tried = f"{counts.pop(unit):,} {unit}"
        others = ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))
        failures = sum(test["failure"] is not None for test in found)
        rows.append(f"| {subject} | {tried} | {others} | {failures} | {sum(t['seconds'] for t in found):.0f} |")
    return "\n".join(rows)


def failures(tests: list[dict]) -> str:
    failed = [test for test in tests if test["failure"] is not None]
    lines = [f"- `{test['test']}`: {test['failure'].splitlines()[0]}" for test in failed]
    return "\n".join(["## Failures", "", *lines, ""]) if failed else ""


def growth(tests: list[dict]) -> str:
    rows = ["| what | calls | MB after half | MB at the end | grown |", "| --- | ---: | ---: | ---: | ---: |"]
    for test in tests:
        for name, points in test["series"].items():
            half = next(size for calls, size in points if calls >= points[-1][0] // 2)
            rows.append(
                f"| {name} | {points[-1][0]:,} | {half:.1f} | {points[-1][1]:.1f} | {points[-1][1] - half:+.2f} |"
            )
    return "\n".join(rows)


def plot(tests: list[dict], file: Path) -> None:
    """Memory beyond what was held before the first counted call."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "regnet_fast"
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for test in tests:
        for name, points in test["series"].items():
            axes.plot([calls for calls, _ in points], [size - points[0][1] for _, size in points], label=name)
    axes.set(xlabel="calls", ylabel="MB more than before")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    file.write_text(re.sub(r"[ \t]+$", "", file.read_text(), flags=re.MULTILINE))
    pyplot.close(figure)


def page(found: dict) -> str:
    tests = found["tests"]
    minutes = sum(test["seconds"] for test in tests) / 60
    factor = ", ".join(sorted({f"{test['factor']:g}" for test in tests}))
    wrong = sum(test["failure"] is not None for test in tests)
    ran = (
        f"`make soak SOAK={factor}`: {len(tests)} tests ran for {minutes:.1f} minutes, added up over its processes; "
        f"{wrong or 'none'} failed."
    )
    facts = found["conditions"]
    where = ", ".join([facts["cpu"], *(f"{name} {facts[name]}" for name in VERSIONS), facts["date"][:10]])
    parts = [
        HEAD,
        "## The last run",
        "",
        ran,
        "",
        table(tests),
        "",
        failures(tests),
        "## Memory",
        "",
        f"![memory over calls](figures/{FIGURE.name})",
        "",
        growth(tests),
        "",
        f"{where}. All figures: [{DATA.name}](figures/{DATA.name}).",
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"


def main() -> None:
    found = run()
    DATA.parent.mkdir(parents=True, exist_ok=True)
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    plot(found["tests"], FIGURE)
    PAGE.write_text(page(found))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
