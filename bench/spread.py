"""Ratios with their spread: how far off another run of the same comparison may be.

Samples are kept by process, since that is what differs most between two runs: where a process happens to lie in memory
is the same for all of its rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from regnet_fast.inspect.timing import quartiles

from .peers import OURS

GROUPS = {
    "eager": ("eager",),
    "compile": ("compile",),
    "runtime": ("runtime",),
    "peer": ("eager", "compile", "runtime"),
}
# Student's t for 95 % of a mean of 2, 3, ... values
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def ratios(variants: dict[str, dict[str, Any]], ours: str) -> dict[str, Any]:
    """A variant of ours against the fastest eager, the fastest compiled, the fastest runtime and the fastest of all."""
    found = {}
    for key, groups in GROUPS.items():
        peers = {name: v for name, v in variants.items() if v["status"] == "timed" and v["group"] in groups}
        if peers:
            name = min(peers, key=lambda name: peers[name]["median_ms"])
            found[key] = {"peer": name, **ratio(peers[name]["samples_ms"], variants[ours]["samples_ms"])}
    return found


def ratio(peer: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times faster ours is, from the samples of each process, with `low` and `high`.

    Of several processes: the geometric mean of their quotients of medians, with its 95 % confidence interval. Of one:
    the median of the quotients within its rounds, with their quartiles.
    """
    if len(ours) == 1:
        low, middle, high = quartiles([a / b for a, b in zip(peer[0], ours[0], strict=True)])
        return {"ratio": middle, "low": low, "high": high}
    logs = [math.log(statistics.median(a) / statistics.median(b)) for a, b in zip(peer, ours, strict=True)]
    mean = statistics.mean(logs)
    student = _STUDENT[min(len(logs), len(_STUDENT) + 1) - 2]
    half = student * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def pooled(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of a case that was measured in several processes. Where it failed in one, that one's."""
    for record in records:
        if record["status"] != "timed":
            return record
    first = records[0]
    variants = {name: _variant([record["variants"][name] for record in records]) for name in first["variants"]}
    for name, variant in variants.items():
        if variant["status"] == "timed" and "ratios" in variant:
            variant["ratios"] = ratios(variants, name)
    timed = {name: v for name, v in variants.items() if v["status"] == "timed"}
    return {**first, "variants": variants, "ratios": ratios(variants, OURS) if OURS in timed else {}}


def _variant(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for variant in same:
        if variant["status"] != "timed":
            return variant
    first = same[0]
    samples = [process for variant in same for process in variant["samples_ms"]]
    q1, median, q3 = quartiles([sample for process in samples for sample in process])
    images = first["images_per_s"] * first["median_ms"]
    found = {**first, "median_ms": median, "q1_ms": q1, "q3_ms": q3, "images_per_s": images / median}
    for key in ("forward_ms", "backward_ms"):
        if key in first:
            found[key] = statistics.median(variant[key] for variant in same)
    return {**found, "samples_ms": samples}
