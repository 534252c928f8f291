"""All models of all machines on one page that filters them: HTML that needs nothing beside itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tables import FROZEN, REFERENCES, Results, ratios, with_ours

FILE = "models.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_CLASSES = {key: title for key, title in REFERENCES.items() if key != "peer"}


def draw(results: Results, conditions: Mapping[str, str]) -> str | None:
    """The page; None where no models were measured. `conditions` says on what each machine's run was made."""
    cases = [_case(machine, case) for machine, runs in results.items() for case in with_ours(runs.get("models", _NONE))]
    if not cases:
        return None
    data = {"cases": cases, "classes": _CLASSES, "conditions": dict(conditions)}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # which could end the script
    return _TEMPLATE.read_text("utf-8").replace("DATA", text.replace('{"machine"', '\n{"machine"'), 1)


_NONE: dict[str, Any] = {"cases": []}


def _case(machine: str, case: dict[str, Any]) -> dict[str, Any]:
    ours = {"frozen": ratios(case, FROZEN), "as created": case["ratios"]}
    times = {name: one["median_ms"] for name, one in case["variants"].items() if one["status"] == "timed"}
    return {
        "machine": machine,
        "family": family(case["name"]),
        "model": case["name"],
        "dtype": case["dtype"],
        "batch": case["batch"],
        "ms": {name: float(f"{ms:.4g}") for name, ms in times.items()},
        "ratios": {
            name: {key: round(found[key]["ratio"], 3) for key in _CLASSES if key in found}
            for name, found in ours.items()
            if found
        },
    }


def family(model: str) -> str:
    """The beginning of an architecture's name without its size: `resnet` of `resnet50`, `resnetv2` of `resnetv2_50`."""
    return re.sub(r"(?<!v)\d+\w*$", "", model.partition("_")[0])
