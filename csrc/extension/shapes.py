"""The convolutions of the 75 architectures, at the image sizes that they were trained for, as operations by name.

Needs the standard library alone: a build has no torch.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

MODELS = (
    "regnetx_032",
    "regnety_002",
    "regnety_016",
    "regnetz_b16",
    "regnetv_040",
    "repvgg_a2",
    "resnetv2_50",
)
BATCHES = (1, 32, 256)
"""The models and batches that are measured on a GPU; the models are compiled for as well, unless others are named."""


def _convolutions() -> list[dict[str, str]]:
    with Path(__file__).with_name("conv_shapes.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def model_names() -> list[str]:
    """All architectures of the families."""
    return list(dict.fromkeys(row["model"] for row in _convolutions()))


def _operation(row: dict[str, str], activation: str) -> dict[str, Any] | None:
    """The operation behind a row of the table of convolutions; None for what no operation of ours computes."""
    c, k, size, stride, groups, hw = (int(row[key]) for key in ("in_ch", "out_ch", "k", "stride", "groups", "out_hw"))
    kind = row["kind"]
    if kind == "head":
        return None
    if kind == "se":
        return {"op": "squeeze_excite", "in": c, "out": k, "activation": "relu"} if k < c else None
    op = "pointwise_conv" if size == 1 else "grouped_conv" if groups > 1 and size == 3 else "dense_conv"
    return {
        "op": op,
        "in": c,
        "out": k,
        "kernel": size,
        "stride": stride,
        "groups": groups,
        "dilation": int(row["dilation"]),
        "hw": hw,
        "activation": "none" if kind == "shortcut" else activation,
    }


def _operation_name(details: dict[str, Any]) -> str:
    if details["op"] == "squeeze_excite":
        return f"squeeze_excite/{details['in']}-{details['out']}"
    shape = f"{details['in']}x{details['out']}-k{details['kernel']}s{details['stride']}g{details['groups']}"
    dilation = f"d{details['dilation']}" if details["dilation"] > 1 else ""
    activation = "" if details["activation"] == "none" else f"-{details['activation']}"
    return f"{details['op']}/{shape}{dilation}-{details['hw']}{activation}"


def operations() -> dict[str, dict[str, Any]]:
    """Every distinct operation of the 75 architectures by name, with the models that have it and how often."""
    found: dict[str, dict[str, Any]] = {}
    for row in _convolutions():
        details = _operation(row, "silu" if row["model"].startswith("regnetz") else "relu")
        if details is not None:
            models = found.setdefault(_operation_name(details), {**details, "models": {}})["models"]
            models[row["model"]] = models.get(row["model"], 0) + int(row["count"])
    return found
