"""A kernel of kernels/ as it is compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Job:
    """A kernel with all its compile-time arguments: what the compiler compiles once."""

    kernel: str
    arch: int
    dtype: str
    warps: int
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    config: str


def make_job(
    kernel: str,
    config: Any,
    arch: int,
    dtype: str,
    pointers: dict[str, str],
    integers: Sequence[str],
    constants: dict[str, Any],
    floats: Sequence[str] = (),
) -> Job:
    """A job from the arguments by kind: the dtypes of pointers, integers, compile-time constants, floats."""
    arguments = {**{name: f"*{_SHORT[kind]}" for name, kind in pointers.items()}, **dict.fromkeys(integers, "i32")}
    arguments |= dict.fromkeys(floats, "fp32")
    tiles = [str(value) for name, value in vars(config).items() if name.startswith("block_")]
    stages = f", {config.stages} stages" if hasattr(config, "stages") else ""
    return Job(
        kernel,
        arch,
        dtype,
        config.warps,
        tuple(sorted(arguments.items())),
        tuple(sorted(constants.items())),
        "x".join(tiles) + stages,
    )
