"""The time of a forward pass as timm runs it, as torch.compile runs it, and rebuilt, on the same weights.

One process, variants interleaved forwards and backwards, the median of several rounds with its quartiles. The time to
the first result of a built model stands apart: it packs the weights or compiles; the first compilation of a process
loads the compiler as well. A result that misses the rule of `verify` is not timed.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import timm.utils
import torch
from torch import Tensor, nn

from .verify import ERROR_RATIO, Announce, host_model, input_size, judge, randomize_norms, rebuilt, silent

OURS = "regnet_fast"
EAGER = ("timm", "timm channels_last")
COMPILED = ("compile", "compile channels_last", "compile max-autotune")
_SAMPLE_SECONDS = {"cpu": 0.05, "cuda": 0.02}
_WARM_UPS = {"cpu": 3, "cuda": 10}


@dataclass
class Variant:
    """One way to run the model, and what was measured of it."""

    name: str
    model: nn.Module
    x: Tensor
    compiled: bool = False
    force_layout: bool = False
    first_seconds: float = 0.0
    iterations: int = 1
    samples: list[float] = field(default_factory=list)
    working_mib: float | None = None
    error: str = ""

    def first(self) -> Tensor | None:
        """The first result, timed with all that is packed or compiled for it; None where it fails, with `error` set."""
        with ExitStack() as stack:
            if self.compiled:
                for context in _fresh_frozen_compilation(self.force_layout):
                    stack.enter_context(context)
            start = time.perf_counter()
            try:
                y = self.model(self.x)
                _synchronize(self.x)
            except Exception as error:  # a missing compiler, too little memory: the others can still be measured
                if self.name == OURS:
                    raise
                message = str(error).strip().split("\n")[0]
                self.error = f"{type(error).__name__}: {message[:200]}"
                return None
            self.first_seconds = time.perf_counter() - start
        return y

    def sample(self, iterations: int) -> float:
        """Milliseconds of one forward pass, from several in a row."""
        if self.x.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(iterations):
                self.model(self.x)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / iterations
        begin = time.perf_counter()
        for _ in range(iterations):
            self.model(self.x)
        return 1e3 * (time.perf_counter() - begin) / iterations

    def as_dict(self) -> dict[str, Any]:
        if self.error:
            return {"error": self.error}
        q1, median, q3 = quartiles(self.samples)
        return {
            "median_ms": median,
            "q1_ms": q1,
            "q3_ms": q3,
            "images_per_s": 1e3 * self.x.shape[0] / median,
            "first_s": self.first_seconds,
            "iterations": self.iterations,
            "samples_ms": self.samples,
            **({} if self.working_mib is None else {"working_mib": self.working_mib}),
        }


def _fresh_frozen_compilation(force_layout: bool) -> Iterable[Any]:
    """The contexts to compile in: weights frozen into the graph, and nothing taken from the cache of earlier runs."""
    import torch._inductor.config as config
    from torch._inductor import utils

    yield utils.fresh_cache()
    yield config.patch(freezing=True, force_layout_optimization=force_layout)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, median, q3


def variants(base: nn.Module, x: Tensor, compile: bool, all_peers: bool) -> tuple[list[Variant], int]:
    """Every way to run the model, ours last, each with a copy of the weights; and how many modules were rebuilt."""
    last = torch.channels_last

    def peer(name: str, **options: Any) -> Variant:
        model, data = copy.deepcopy(base), x
        if "channels_last" in name:
            model, data = model.to(memory_format=last), x.contiguous(memory_format=last)
        if name in COMPILED:
            mode = "max-autotune" if "max-autotune" in name else None
            model = torch.compile(model, dynamic=False, mode=mode)
        return Variant(name, model, data, compiled=name in COMPILED, **options)

    found = [peer(name) for name in EAGER]
    if compile or all_peers:
        found.append(peer("compile"))
    if all_peers:
        found += [peer("compile channels_last", force_layout=x.is_cuda), peer("compile max-autotune")]
    report = rebuilt(copy.deepcopy(base))
    return [*found, Variant(OURS, report.model, x)], len(report.rebuilt)


def find_fault(ours: Variant, eager: Variant, ours_logits: Tensor) -> str:
    """Why our result is not timm's (eager in channels_last), or ''.

    The first and last image are held to the rule of `verify` against float64, features and logits. Of each other image
    the distance to eager may be what the triangle inequality then allows.
    """
    x = ours.x
    edge = sorted({0, x.shape[0] - 1})
    reference = copy.deepcopy(eager.model).double()
    for what, forward in (("features", "forward_features"), ("logits", "__call__")):
        if not hasattr(reference, forward):
            continue
        k = ours_logits if what == "logits" else getattr(ours.model, forward)(x)
        e, r = getattr(eager.model, forward)(eager.x), getattr(reference, forward)(x[edge].double())
        check = judge(what, k[edge], e[edge], r)
        if not check.ok:
            return f"{what}: {check.failure}"
        allowed = (ERROR_RATIO + 1) * check.max_eager + check.floor
        distance = (k.double() - e.double()).abs().nan_to_num(nan=torch.inf).max().item()
        if distance > allowed:
            return f"{what}: ours is {distance:.3g} away from timm eager; allowed is {allowed:.3g}"
    return ""


def measure(
    base: nn.Module,
    x: Tensor,
    rounds: int = 7,
    compile: bool = True,
    all_peers: bool = False,
    announce: Announce = silent,
) -> dict[str, Any]:
    """Time a model of timm's, in evaluation mode, on an input of its device and dtype, in every variant.

    Returns `correct`, `refused` (why it was not timed, or ''), `rebuilt` (modules), `variants` by name and the ratios
    of `ratios`.
    """
    if compile or all_peers:
        from torch import _dynamo

        _dynamo.reset()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with torch.no_grad(), torch.cuda.device_of(x):
            found, count = variants(base, x, compile, all_peers)
            *peers, ours = found
            announce("first result and its correctness")
            fault = find_fault(ours, peers[1], ours.first())
            if fault:
                return {"correct": False, "refused": fault, "rebuilt": count, "variants": {}}
            for peer in peers:
                announce(f"first result of {peer.name}")
                peer.first()
            _time([variant for variant in found if not variant.error], rounds, announce)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    measured = {variant.name: variant.as_dict() for variant in found}
    return {"correct": True, "refused": "", "rebuilt": count, "variants": measured, **ratios(found)}


def _time(found: list[Variant], rounds: int, announce: Announce) -> None:
    """Warm up, choose how often each variant runs in a sample, and sample all in turn, forwards and backwards."""
    announce("warming up")
    kind = found[0].x.device.type
    for variant in found:
        estimate = min(variant.sample(1) for _ in range(_WARM_UPS.get(kind, 3)))
        variant.iterations = max(1, math.ceil(1e3 * _SAMPLE_SECONDS.get(kind, 0.05) / max(estimate, 1e-3)))
        if variant.x.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            variant.sample(1)
            variant.working_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    for index in range(rounds):
        announce(f"round {index + 1} of {rounds}")
        for variant in found if index % 2 == 0 else reversed(found):
            variant.samples.append(variant.sample(variant.iterations))


def ratios(found: list[Variant]) -> dict[str, Any]:
    """How many times faster ours is than the best eager layout, the best compiled variant, and the best of all peers.

    Each is the quotient of the medians; `q1` and `q3` are the quartiles of the quotients within each round.
    """
    *peers, ours = found
    timed = {peer.name: peer for peer in peers if not peer.error}
    result: dict[str, Any] = {}
    for key, names in (("eager", EAGER), ("compile", COMPILED), ("peer", EAGER + COMPILED)):
        candidates = [timed[name] for name in names if name in timed]
        if not candidates:
            continue
        best = min(candidates, key=lambda variant: statistics.median(variant.samples))
        q1, _, q3 = quartiles([a / b for a, b in zip(best.samples, ours.samples, strict=True)])
        ratio = statistics.median(best.samples) / statistics.median(ours.samples)
        result[f"over_{key}"] = {"peer": best.name, "ratio": ratio, "q1": q1, "q3": q3}
    return result


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
    seed: int = 0,
    announce: Announce = silent,
) -> dict[str, Any]:
    """Time one model on random weights and a random input; RepVGG reparameterised everywhere.

    Args:
        name: a timm model name.
        batch: images.
        dtype: compute dtype of every variant.
        device: where to run.
        rounds: samples of each variant.
        compile: whether to measure torch.compile too (default mode, weights frozen, NCHW).
        size: height and width; by default those the model was trained for.
        all_peers: also torch.compile in channels_last and in the mode max-autotune.
        seed: of the weights and the input.
        announce: told what is about to run.

    Returns the case (model, batch, size, dtype, device) with what `measure` returns. Raises UnknownModelError.
    """
    dtype_name = str(dtype).removeprefix("torch.")

    def tell(text: str) -> None:
        announce(f"{name}, batch {batch}, {dtype_name}: {text}")

    tell("building")
    torch.manual_seed(seed)
    base = timm.utils.reparameterize_model(randomize_norms(host_model(name), seed), inplace=True)
    base = base.to(device, dtype)
    x = torch.randn(batch, *input_size(base, size)).to(device, dtype)
    case = {"model": name, "batch": batch, "size": list(x.shape[2:]), "dtype": dtype_name, "device": device}
    return {**case, **measure(base, x, rounds, compile, all_peers, tell)}


def geometric_means(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios over all timed cases, with the number of cases behind each."""
    means = {}
    for key in ("over_eager", "over_compile", "over_peer"):
        found = [case[key]["ratio"] for case in cases if key in case]
        if found:
            mean = statistics.geometric_mean(found)
            means[key] = {"ratio": mean, "cases": len(found), "slower": sum(ratio < 1 for ratio in found)}
    return means


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("model", lambda case: case["model"]),
    ("batch", lambda case: str(case["batch"])),
    ("dtype", lambda case: case["dtype"]),
    ("timm, ms", lambda case: _milliseconds(case, EAGER[0])),
    ("channels_last, ms", lambda case: _milliseconds(case, EAGER[1])),
    ("compile, ms", lambda case: _milliseconds(case, _compiled(case))),
    ("regnet_fast, ms", lambda case: _milliseconds(case, OURS)),
    ("over eager", lambda case: _ratio(case, "over_eager")),
    ("over compile", lambda case: _ratio(case, "over_compile")),
    ("first compile, s", lambda case: _first(case, _compiled(case))),
    ("first ours, s", lambda case: _first(case, OURS)),
)
"""The columns of a table of cases: their titles, and their text for a case."""


def _compiled(case: dict[str, Any]) -> str:
    """The compiled variant that a case shows: its fastest."""
    return case.get("over_compile", {}).get("peer", COMPILED[0])


def _milliseconds(case: dict[str, Any], name: str) -> str:
    timed = case["variants"].get(name)
    if timed is None:
        return "-"
    return "failed" if "error" in timed else f"{timed['median_ms']:.2f}"


def _first(case: dict[str, Any], name: str) -> str:
    timed = case["variants"].get(name)
    return f"{timed['first_s']:.2f}" if timed and "error" not in timed else "-"


def _ratio(case: dict[str, Any], key: str) -> str:
    if key not in case:
        return "-"
    found = case[key]
    return f"{found['ratio']:.2f}x ({found['q1']:.2f}-{found['q3']:.2f})"


def summary(cases: Sequence[dict[str, Any]]) -> list[str]:
    """The geometric means, and the cases that were refused or that a peer could not run, one line each."""
    titles = {"over_eager": "the faster eager layout", "over_compile": "torch.compile", "over_peer": "the best peer"}
    lines = [
        f"Geometric mean over {titles[key]}: {mean['ratio']:.2f}x ({mean['cases']} cases, slower in {mean['slower']})"
        for key, mean in geometric_means(cases).items()
    ]
    for case in cases:
        label = f"{case['model']}, batch {case['batch']}, {case['dtype']}"
        if not case["correct"]:
            lines.append(f"{label}: not timed, the result is wrong: {case['refused']}")
        lines += [f"{label}: {name} failed: {v['error']}" for name, v in case["variants"].items() if "error" in v]
    return lines


def markdown(cases: Sequence[dict[str, Any]], conditions: str) -> str:
    """The cases as a Markdown table, with the summary and the conditions under it."""
    titles = [title for title, _ in COLUMNS]
    rows = [[text(case) for _, text in COLUMNS] for case in cases]
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]
    notes = [*summary(cases), f"Median times, ratios with their quartiles over the rounds. {conditions}"]
    return "\n".join([*lines, "", *[f"{note}  " for note in notes]])
