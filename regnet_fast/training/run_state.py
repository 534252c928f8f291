"""What an interrupted training run goes on from: one file, written whole or not at all, in which nothing is executed.

    last.pth.tar        after each epoch: weights, average, optimizer, loss scale, generators, history
    model_best.pth.tar  the same after the epoch with the best top-1

Keys and names are those of timm's checkpoints, so that timm and `load_checkpoint` take the weights from these files.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from ..weights.checkpoints import CheckpointError, read_content

LAST, BEST = "last.pth.tar", "model_best.pth.tar"
FORMAT = 1
_KEYS = ("epoch", "arch", "state_dict", "optimizer", "generators", "best", "history", "options")


def save(state: dict[str, Any], folder: Path, best: bool) -> None:
    """Write the state of a run after an epoch; `best` keeps it beside the last one as well. Raises OSError."""
    last = folder / LAST
    with _replacing(last) as new, new.open("wb") as file:
        try:
            torch.save({"regnet_fast": FORMAT, **state}, file)
        except RuntimeError as error:  # torch's writer hides what the disk said
            raise OSError(f"'{last}' cannot be written: {str(error).splitlines()[0]}") from error
        file.flush()
        os.fsync(file.fileno())
    if best:
        with _replacing(folder / BEST) as new:
            try:
                os.link(last, new)
            except OSError:  # a file system without links
                shutil.copyfile(last, new)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """The path of a new file that takes the place of another at once, when it is whole."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path, model: str) -> dict[str, Any]:
    """The state of a run of this model. Raises FileNotFoundError and CheckpointError."""
    state = read_content(path)
    if not isinstance(state, dict) or state.get("regnet_fast") != FORMAT or any(key not in state for key in _KEYS):
        raise CheckpointError(
            f"'{path}' is no state of a training run of regnet_fast; initial_checkpoint takes weights alone"
        )
    if state["arch"] != model:
        raise CheckpointError(f"'{path}' is of a run of {state['arch']}, not of {model}")
    return state


def generators(device: torch.device) -> list[dict[str, Any]]:
    """The states of every process's random generators, by rank. All processes call it together."""
    kind, keys, *rest = numpy.random.get_state()
    own = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    if not dist.is_initialized():
        return [own]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def set_generators(state: dict[str, Any], device: torch.device) -> None:
    """Let this process's random generators go on from a state."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
