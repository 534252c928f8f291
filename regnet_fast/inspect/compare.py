"""The time of a forward pass as timm, torch.compile and other runtimes run it, and rebuilt, on the same weights.

One process, variants interleaved forwards and backwards, the median of several rounds with its quartiles. The time to
the first result of a built model stands apart: it packs the weights or compiles; the first compilation of a process
loads the compiler as well. A result of ours or of a runtime that misses the rule of `judging` is not timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.utils
import torch
from torch import Tensor, nn

from ..hosts import named
from ..models import rebuild
from . import runtimes
from .judging import ERROR_RATIO, judge
from .timing import Announce, Timed, describe, frozen_compilation, interleave, ratio, silent, synchronize, tuned_cudnn
from .verify import host_model, input_size, randomize_norms

OURS = "regnet_fast"
EAGER = ("timm", "timm channels_last")
COMPILED = ("compile", "compile channels_last", "compile max-autotune")
_ABSENT = "-"
RATIOS = {
    "over_eager": ("the faster eager layout", EAGER),
    "over_compile": ("torch.compile", COMPILED),
    "over_runtime": ("the faster runtime", runtimes.RUNTIMES),
    "over_peer": ("the best peer", EAGER + COMPILED + runtimes.RUNTIMES),
}
"""What ours is compared with, by the key of the ratio: in words, and the variants."""


@dataclass
class Variant(Timed):
    """One way to run the model."""

    model: nn.Module | None = None
    x: Tensor | None = None
    compiled: bool = False
    force_layout: bool = False

    def first(self) -> Tensor | None:
        """The first result, timed with all that is packed or compiled for it; None where it fails, with `error` set."""
        with frozen_compilation(self.force_layout) if self.compiled else nullcontext():
            start = time.perf_counter()
            try:
                y = self.call()
                synchronize(self.device)
            except Exception as error:  # a missing compiler, too little memory: the others can still be measured
                if self.name == OURS:
                    raise
                self.error = describe(error)
                return None
            self.first_seconds = time.perf_counter() - start
        return y


def variants(
    base: nn.Module, x: Tensor, compile: bool, all_peers: bool, others: Sequence[str] = ()
) -> tuple[list[Variant], int]:
    """Every way to run the model, ours last, each with a copy of the weights; and how many modules were rebuilt.

    `others` are names of `runtimes.RUNTIMES`.
    """
    last = torch.channels_last

    def peer(name: str, **options: Any) -> Variant:
        model, data = copy.deepcopy(base), x
        if "channels_last" in name:
            model, data = model.to(memory_format=last), x.contiguous(memory_format=last)
        if name in COMPILED:
            mode = "max-autotune" if "max-autotune" in name else None
            model = torch.compile(model, dynamic=False, mode=mode)
        return variant(name, model, data, compiled=name in COMPILED, **options)

    def variant(name: str, model: nn.Module, data: Tensor, **options: Any) -> Variant:
        return Variant(name, lambda: model(data), x.device.type, model=model, x=data, **options)

    found = [peer(name) for name in EAGER]
    if compile or all_peers:
        found.append(peer("compile"))
    if all_peers:
        found += [peer("compile channels_last", force_layout=x.is_cuda), peer("compile max-autotune")]
    found += [Variant(name, runtimes.Call(name, base, x)) for name in others]
    report = rebuild(copy.deepcopy(base))
    return [*found, variant(OURS, report.model, x)], len(report.rebuilt)


def edges(images: int) -> list[int]:
    """The images that are held to float64: the first and the last."""
    return sorted({0, images - 1})


def find_fault(what: str, ours: Tensor, eager: Tensor, reference: Tensor, error_ratio: float = ERROR_RATIO) -> str:
    """Why a result of ours is not eager's (the host's in channels_last), or ''.

    `reference` is the float64 result for the images `edges` of the batch, which are held to the rule of `judging`. Of
    each other image the distance to eager may be what the triangle inequality then allows.
    """
    edge = edges(eager.shape[0])
    check = judge(what, ours[edge], eager[edge], reference, error_ratio)
    if not check.ok:
        return f"{what}: {check.failure}"
    allowed = (error_ratio + 1) * check.max_eager + check.floor
    distance = (ours.double() - eager.double()).abs().nan_to_num(nan=torch.inf).max().item()
    return "" if distance <= allowed else f"{what}: {distance:.3g} away from eager; allowed is {allowed:.3g}"


def expected_results(eager: Variant, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Features, where the model tells them, and logits: the host's in the layout of `eager`, and in float64 for the
    images `edges` of the batch.
    """
    reference, few = copy.deepcopy(eager.model).double(), x[edges(x.shape[0])].double()
    found = {}
    for what, forward in (("features", "forward_features"), ("logits", "__call__")):
        if hasattr(reference, forward):
            results = (getattr(eager.model, forward)(eager.x), getattr(reference, forward)(few))
            found[what] = tuple(map(named.logits, results))
    return found


def find_model_fault(ours: Variant, logits: Tensor, expected: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Why our features or logits are not timm's, or ''."""
    for what, results in expected.items():
        found = logits if what == "logits" else ours.model.forward_features(ours.x)
        fault = find_fault(what, named.logits(found), *results)
        if fault:
            return fault
    return ""


def measure(
    base: nn.Module,
    x: Tensor,
    rounds: int = 7,
    compile: bool = True,
    all_peers: bool = False,
    announce: Announce = silent,
    *,
    with_runtimes: bool = True,
) -> dict[str, Any]:
    """Time a model of timm's, in evaluation mode, on an input of its device and dtype, in every variant.

    Returns `correct`, `refused` (why it was not timed, or ''), `rebuilt` (modules), `variants` by name, `left_out` (why
    a runtime was not even tried, by its name) and the ratios of `ratios`.
    """
    if compile or all_peers:
        from torch import _dynamo

        _dynamo.reset()
    considered = runtimes.RUNTIMES if with_runtimes and x.device.type == "cpu" else ()
    left_out = {name: reason for name in considered if (reason := runtimes.refuse(name, x.dtype))}
    with torch.no_grad(), torch.cuda.device_of(x), tuned_cudnn():
        others = [name for name in considered if name not in left_out]
        found, count = variants(base, x, compile, all_peers, others)
        *peers, ours = found
        announce("first result and its correctness")
        ours_logits = ours.first()
        expected = expected_results(peers[1], x)
        fault = find_model_fault(ours, ours_logits, expected)
        outcome = {"correct": not fault, "refused": fault, "rebuilt": count, "variants": {}, "left_out": left_out}
        if fault:
            return outcome
        for peer in peers:
            announce(f"first result of {peer.name}")
            logits = peer.first()
            if peer.name in others and logits is not None:
                eager, reference = expected["logits"]
                peer.error = find_fault("logits", logits.to(eager.dtype), eager, reference, runtimes.ERROR_RATIO)
        interleave([variant for variant in found if not variant.error], rounds, announce)
    measured = {one.name: {"error": one.error} if one.error else one.as_dict(x.shape[0]) for one in found}
    return {**outcome, "variants": measured, **ratios(found)}


def ratios(found: list[Variant]) -> dict[str, Any]:
    """Ours against the best variant of each of `RATIOS`: `ratio` of each."""
    *peers, ours = found
    of_each = {key: [peer for peer in peers if peer.name in names] for key, (_, names) in RATIOS.items()}
    return {key: best for key, some in of_each.items() if (best := ratio(some, ours)) is not None}


def compare(
    name: str,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 7,
    compile: bool = True,
    *,
    size: int | None = None,
    all_peers: bool = False,
    with_runtimes: bool = True,
    seed: int = 0,
    announce: Announce = silent,
) -> dict[str, Any]:
    """Time one model on random weights and a random input; RepVGG reparameterised everywhere.

    Args:
        name: a timm model name, or one of `hosts.named`.
        batch: images.
        dtype: compute dtype of every variant.
        device: where to run.
        rounds: samples of each variant.
        compile: whether to measure torch.compile too (default mode, weights frozen, NCHW).
        size: height and width; by default those the model was trained for.
        all_peers: also torch.compile in channels_last and in the mode max-autotune.
        with_runtimes: also those of `runtimes` that are installed, on a CPU.
        seed: of the weights and the input.
        announce: told what is about to run.

    Returns the case (model, batch, size, dtype, device) with what `measure` returns. Raises UnknownModelError.
    """
    dtype_name = str(dtype).removeprefix("torch.")

    def tell(text: str) -> None:
        announce(f"{name}, batch {batch}, {dtype_name}: {text}")

    tell("building")
    torch.manual_seed(seed)
    with torch.device("cpu"):  # where timm makes the new convolutions, whatever torch's default device is
        base = timm.utils.reparameterize_model(randomize_norms(host_model(name), seed), inplace=True)
    base = base.to(device, dtype)
    x = torch.randn(batch, *input_size(base, size), dtype=torch.float32, device="cpu").to(device, dtype)
    case = {"model": name, "batch": batch, "size": list(x.shape[2:]), "dtype": dtype_name, "device": device}
    return {**case, **measure(base, x, rounds, compile, all_peers, tell, with_runtimes=with_runtimes)}


def geometric_means(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios over all timed cases, with the number of cases behind each."""
    means = {}
    for key in RATIOS:
        found = [case[key]["ratio"] for case in cases if key in case]
        if found:
            mean = statistics.geometric_mean(found)
            means[key] = {"ratio": mean, "cases": len(found), "slower": sum(ratio < 1 for ratio in found)}
    return means


def _compiled(case: dict[str, Any]) -> str:
    """The compiled variant that a case shows: its fastest."""
    return case.get("over_compile", {}).get("peer", COMPILED[0])


def _milliseconds(case: dict[str, Any], name: str) -> str:
    timed = case["variants"].get(name)
    if timed is None:
        return _ABSENT
    return "failed" if "error" in timed else f"{timed['median_ms']:.2f}"


def _first(case: dict[str, Any], name: str) -> str:
    timed = case["variants"].get(name)
    return f"{timed['first_s']:.2f}" if timed and "error" not in timed else _ABSENT


def _ratio(case: dict[str, Any], key: str) -> str:
    if key not in case:
        return _ABSENT
    found = case[key]
    return f"{found['ratio']:.2f}x ({found['low']:.2f}-{found['high']:.2f})"


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("model", lambda case: case["model"]),
    ("batch", lambda case: str(case["batch"])),
    ("dtype", lambda case: case["dtype"]),
    ("timm, ms", lambda case: _milliseconds(case, EAGER[0])),
    ("channels_last, ms", lambda case: _milliseconds(case, EAGER[1])),
    ("compile, ms", lambda case: _milliseconds(case, _compiled(case))),
    *((f"{name}, ms", partial(_milliseconds, name=name)) for name in runtimes.RUNTIMES),
    ("regnet_fast, ms", lambda case: _milliseconds(case, OURS)),
    ("over eager", lambda case: _ratio(case, "over_eager")),
    ("over compile", lambda case: _ratio(case, "over_compile")),
    ("over runtimes", lambda case: _ratio(case, "over_runtime")),
    ("first compile, s", lambda case: _first(case, _compiled(case))),
    ("first ours, s", lambda case: _first(case, OURS)),
)


def table(cases: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cases in words: the titles, then a row for each, without the columns in which none has anything."""
    columns = [[title, *map(text, cases)] for title, text in _COLUMNS]
    return [list(row) for row in zip(*[c for c in columns if set(c[1:]) != {_ABSENT}], strict=True)]


def summary(cases: Sequence[dict[str, Any]]) -> list[str]:
    """The geometric means, and the cases that were refused or that a peer could not run, one line each."""
    lines = [
        f"Geometric mean over {RATIOS[key][0]}: "
        f"{mean['ratio']:.2f}x ({mean['cases']} cases, slower in {mean['slower']})"
        for key, mean in geometric_means(cases).items()
    ]
    for case in cases:
        label = f"{case['model']}, batch {case['batch']}, {case['dtype']}"
        if not case["correct"]:
            lines.append(f"{label}: not timed, the result is wrong: {case['refused']}")
        lines += [f"{label}: {name} failed: {v['error']}" for name, v in case["variants"].items() if "error" in v]
    left_out = dict.fromkeys(f"{name} left out: {why}" for case in cases for name, why in case["left_out"].items())
    return [*lines, *left_out]


def markdown(cases: Sequence[dict[str, Any]], conditions: str) -> str:
    """The cases as a Markdown table, with the summary and the conditions under it."""
    titles, *rows = table(cases)
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]
    notes = [*summary(cases), f"Median times, ratios with their quartiles over the rounds. {conditions}"]
    return "\n".join([*lines, "", *[f"{note}  " for note in notes]])
