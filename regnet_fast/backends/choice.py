"""Which of csrc/ and Triton is asked first for a grouped convolution, where a user leaves it open: `cuda|triton`.

A table has times of both for each group width, stride and step, and says where they come from. What `regnet-fast tune`
has measured on a GPU lies beside the tables of its Triton kernels (`kernels.tables`), as `choices.json`. All else is
decided by the file of that name beside this one, which `python -m bench.cuda_choice` has modelled for two GPUs.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import tables
from . import cuda_launch
from .cuda_plans import SHARED_BYTES
from .problem import ConvProblem, Problem

NAME = "choices.json"
FILE = Path(__file__).with_name(NAME)
STEPS = ("inference", "forward", "backward")
"""What a convolution is computed for: inference, and the two halves of a training step."""
COMPARED = ("cuda", "triton")


_listener: ContextVar[Callable[[ConvProblem], object] | None] = ContextVar("regnet_fast_ranked", default=None)


@contextmanager
def listening(listen: Callable[[ConvProblem], object]) -> Iterator[None]:
    """Call `listen(problem)` for each convolution ranked inside the `with` block, in this thread or task alone."""
    token = _listener.set(listen)
    try:
        yield
    finally:
        _listener.reset(token)


class Ranking(NamedTuple):
    """Both backends, the one to ask first before the other, and why, or ''."""

    names: tuple[str, str]
    reason: str


def ranked(problem: Problem, step: str = "inference") -> Ranking:
    """Both backends in the order in which they are asked: csrc/ first where nothing is known."""
    if not isinstance(problem, ConvProblem) or problem.groups == 1 or cuda_launch.refuse_device(problem.device):
        return Ranking(COMPARED, "")
    listen = _listener.get()
    if listen is not None:
        listen(problem)
    width, arch = problem.input_shape[1] // problem.groups, cuda_launch.target(problem.device).arch
    return _ranked(gpu(problem.device), arch, step, width, problem.stride[0])


def gpu(device: str) -> str | None:
    """The folder of a GPU's tables, or None where there is none."""
    return tables.slug(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None


@functools.lru_cache(maxsize=1024)
def _ranked(gpu: str | None, arch: int, step: str, width: int, stride: int) -> Ranking:
    """By what was measured on the GPU, else by the model of the one with the nearest shared memory and of the nearest
    width.
    """
    for table in () if gpu is None else measured(gpu):
        for entry in table["entries"]:
            if (entry["step"], entry["width"], entry["stride"]) == (step, width, stride):
                return _decided(table, entry)
    table = min(_modelled(), key=lambda table: abs(SHARED_BYTES[table["arch"]] - SHARED_BYTES[arch]))
    known = [entry for entry in table["entries"] if (entry["step"], entry["stride"]) == (step, stride)]
    if not known or width < min(entry["width"] for entry in known):
        return Ranking(COMPARED, "")
    return _decided(table, min(known, key=lambda entry: abs(entry["width"] - width)))


def _decided(table: dict[str, Any], entry: dict[str, Any]) -> Ranking:
    first, second = sorted(COMPARED, key=entry.__getitem__)
    times = entry[second] / entry[first]
    where = f"{table['machine']}, {entry['step']}"
    return Ranking((first, second), f"{table['provenance']} to take {times:.2f} times as long as {first} ({where})")


@functools.lru_cache(maxsize=1)
def _modelled() -> list[dict[str, Any]]:
    return read(FILE)


@functools.lru_cache(maxsize=16)
def measured(gpu: str) -> list[dict[str, Any]]:
    """What was measured on a GPU, the user's before what is shipped. Warns where a table cannot be used."""
    found = []
    for root in (tables.user_folder(), tables.SHIPPED):
        try:
            found += read(root / gpu / NAME)
        except tables.TableError as error:
            warnings.warn(f"{error}; until then it is left aside", tables.TableWarning, stacklevel=2)
    return found


def forget() -> None:
    """Read the tables again when they are next needed."""
    _ranked.cache_clear()
    measured.cache_clear()


def read(path: Path) -> list[dict[str, Any]]:
    """The tables of a file, none where there is no file. Raises `tables.TableError` for one that cannot be used."""
    try:
        if not path.exists():
            return []
        content = json.loads(path.read_bytes())
        for table in content:
            _check(table)
    except OSError as error:
        raise tables.TableError(f"{path}: this table cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise tables.TableError(f"{path}: this table cannot be used: {error!r}. Move it away and tune again") from None
    return content


def _check(table: Any) -> None:
    """Raise ValueError, KeyError or TypeError for what is no table."""
    if not all(type(table[field]) is str for field in ("machine", "provenance")) or type(table["entries"]) is not list:
        raise ValueError(f"a table is {str(table)[:80]}")
    for entry in table["entries"]:
        if entry["step"] not in STEPS or {type(entry["width"]), type(entry["stride"])} != {int}:
            raise ValueError(f"an entry is {str(entry)[:80]}")
        if not all(type(entry[name]) is float and 0 < entry[name] < math.inf for name in COMPARED):
            raise ValueError("a time is no positive number")


def text(tables: list[dict[str, Any]]) -> str:
    """Tables as a file has them, a line for each entry."""
    parts = []
    for table in tables:
        head = json.dumps({field: value for field, value in table.items() if field != "entries"})
        lines = ",\n  ".join(json.dumps(entry) for entry in table["entries"])
        parts.append(head.removesuffix("}") + ', "entries": [\n  ' + lines + "\n ]}")
    return "[\n " + ",\n ".join(parts) + "\n]\n"
