"""Which configuration a kernel takes: the given one, else one that was measured on this GPU, else its heuristic's.

A kernel is a module of this package with `Shape`, `Config`, `CONFIGS`, `EXTENTS`, `heuristic(shape)` and
`config_supports(config, shape)`. `EXTENTS` names the fields of a shape that say how much there is to compute; the rest
says what, but for `arch` and `processors`, which a table leaves out: it belongs to one model of GPU.

Tables are `<gpu>/<kernel>.json` in the folder `tuned` beside this file and in the user's cache directory, whose entries
win. They are read when a kernel is first launched on a GPU. Nothing of Triton is imported here.

How much of a GPU a configuration takes is the compiler's to say, and another version says something else. Where it is
more than there is, which shows when the kernel is first launched, a smaller configuration takes its place: `fitting`.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch

from ..observer import observer

KERNELS = (
    *("pointwise_conv", "pointwise_pair", "implicit_gemm", "depthwise_conv", "squeeze_excite", "norm_act"),
    *("channel_tiles", "grouped_input_gradient", "grouped_weight_gradient"),
)
SHIPPED = Path(__file__).parent / "tuned"
SCHEMA = 1
FARTHEST = 4  # so many times as much to compute, or as little, is still near
LARGEST = 1 << 24  # bytes; a table is some KB
MACHINE = ("arch", "processors")

Key = tuple[tuple[str, int], ...]


class TableError(ValueError):
    """A table cannot be used; the message names the file and says why."""


class TableWarning(UserWarning):
    """A table is left aside, and the kernels run without it."""


class TooLargeError(ValueError):
    """What the compiler made of a configuration takes more of the GPU than there is; the message says what."""


class SmallerWarning(UserWarning):
    """A smaller configuration runs than was chosen, which may be slower."""


@dataclass(frozen=True)
class Entry:
    """What was measured for a shape: the fastest configuration, None where that is the heuristic's, its time and the
    heuristic's, and the conditions: the GPU, the versions, the date.
    """

    config: Any
    microseconds: float
    heuristic: Any
    heuristic_microseconds: float
    conditions: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A launch whose configuration was chosen here, by a table where it is `tuned`. `run(config)` launches it again."""

    kernel: ModuleType
    shape: Any
    config: Any
    tuned: bool
    run: Callable[[Any], Any]


def choose(kernel: str, shape: Any, device: torch.device, config: Any, run: Callable[[Any], Any]) -> Any:
    """The configuration for a launch.

    Args:
        kernel: the module's `__name__`.
        shape: its `Shape`.
        device: where it is launched.
        config: the given configuration, or None.
        run: launches the same with a given configuration, for an observer.

    Raises ValueError where the configuration cannot serve. The caller is decorated with `fitting`.
    """
    if config is not None:
        _check(sys.modules[kernel], config, shape)
        _choice.set(None)
        return config
    config, tuned = _chosen(kernel, shape, device)
    told = observer.get()
    if told is not None:
        told.choice(Choice(sys.modules[kernel], shape, config, tuned, run))
    _choice.set((kernel, shape, device, config))
    return config


_choice: ContextVar[tuple[str, Any, torch.device, Any] | None] = ContextVar("regnet_fast_choice", default=None)
"""What was chosen last: the kernel, its shape, the device and the configuration; None where that was given."""

_too_large: dict[tuple[str, Any, torch.device], dict[Any, str]] = {}
"""Configurations of a kernel for a shape that the compiler makes too large for a device, and what it said."""


def fitting(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that calls `choose` once, and again with a smaller configuration where the compiler makes the chosen
    one too large, with a warning. A configuration that was given has no other, and raises TooLargeError.
    """

    @functools.wraps(launcher)
    def launch(*arguments: Any, **options: Any) -> Any:
        while True:
            try:
                return launcher(*arguments, **options)
            except TooLargeError as error:
                if _choice.get() is None:
                    raise
                _replace(*_choice.get(), str(error))

    return launch


def _replace(kernel: str, shape: Any, device: torch.device, config: Any, reason: str) -> None:
    """Never choose a configuration for a shape again. Raises TooLargeError where there is no smaller one."""
    _too_large.setdefault((kernel, shape, device), {})[config] = reason
    _chosen.cache_clear()
    smaller = _chosen(kernel, shape, device)[0]
    text = f"{name(sys.modules[kernel])}: {config} is too large as it was compiled: {reason}. {smaller} runs instead"
    warnings.warn(text, SmallerWarning, stacklevel=2)


@functools.lru_cache(maxsize=1 << 14)
def _chosen(kernel: str, shape: Any, device: torch.device) -> tuple[Any, bool]:
    """The configuration, and whether it is a table's choice."""
    module, folder = sys.modules[kernel], gpu(device)
    entry = None if folder is None else find(module, entries(name(module), folder), shape)
    if entry is None or entry.config is None or entry.config in _too_large.get((kernel, shape, device), ()):
        return default(module, shape, device), entry is not None and entry.config is None
    _check(module, entry.config, shape)
    return entry.config, True


def default(kernel: ModuleType, shape: Any, device: torch.device) -> Any:
    """The heuristic's configuration; where the compiler made that too large, the largest with smaller tiles or fewer
    stages, and none more. Raises TooLargeError where there is none.
    """
    config, refused = kernel.heuristic(shape), _too_large.get((kernel.__name__, shape, device), {})
    _check(kernel, config, shape)
    if config not in refused:
        return config
    most, below = _sizes(config), []
    for other in kernel.CONFIGS:
        sizes = _sizes(other)
        if other not in refused and sizes != most and all(a <= b for a, b in zip(sizes, most, strict=True)):
            below += [other] if kernel.config_supports(other, shape) is None else []
    if not below:
        raise TooLargeError(f"{name(kernel)}: {refused[config]}, and no smaller configuration serves {shape}")
    return max(below, key=lambda other: (math.prod(1 + size for size in _sizes(other)), other.warps == config.warps))


def _sizes(config: Any) -> list[int]:
    """What a configuration's memory grows with: all but its warps."""
    return [value for field, value in vars(config).items() if field != "warps"]


def _check(kernel: ModuleType, config: Any, shape: Any) -> None:
    refusal = kernel.config_supports(config, shape)
    if refusal is not None:
        raise ValueError(f"this configuration cannot serve: {refusal}")


def name(kernel: ModuleType) -> str:
    """A kernel's name among `KERNELS`."""
    return kernel.__name__.rpartition(".")[2]


def gpu(device: torch.device) -> str | None:
    """The folder of a GPU's tables; None in the interpreter."""
    from .common import interpreting

    return None if interpreting() else slug(torch.cuda.get_device_name(device))


def slug(gpu_name: str) -> str:
    """A GPU's name in lower case, its words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def user_folder() -> Path:
    """Where `regnet-fast tune` keeps tables."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "regnet_fast" / "tuned"


@functools.lru_cache(maxsize=128)
def entries(kernel: str, gpu: str) -> dict[Key, Entry]:
    """All that is known of a kernel on a GPU, the user's before what is shipped. Warns where a table cannot be used."""
    module, found = importlib.import_module(f"{__package__}.{kernel}"), {}
    for root in (SHIPPED, user_folder()):
        try:
            found |= read(root / gpu / f"{kernel}.json", module)
        except TableError as error:
            warnings.warn(f"{error}; until then the kernels run without it", TableWarning, stacklevel=2)
    return found


def forget() -> None:
    """Read the tables again when they are next needed, and ask the compiler again."""
    _too_large.clear()
    _chosen.cache_clear()
    entries.cache_clear()


def key(shape: Any) -> Key:
    """What a table knows a shape by."""
    return tuple((field, value) for field, value in vars(shape).items() if field not in MACHINE)


def find(kernel: ModuleType, known: dict[Key, Entry], shape: Any) -> Entry | None:
    """The entry for a shape, or else for the nearest one that differs in its extents alone, each by a factor of
    `FARTHEST` at most, and whose configuration can serve.
    """
    wanted = key(shape)
    distances = {other: _distance(wanted, other, kernel.EXTENTS) for other in known}
    for other in sorted((other for other in known if distances[other] is not None), key=distances.get):
        config = known[other].config
        if config is None or kernel.config_supports(config, shape) is None:
            return known[other]
    return None


def _distance(wanted: Key, other: Key, extents: tuple[str, ...]) -> float | None:
    """How far two shapes are from each other, or None where one says nothing about the other."""
    distance = 0.0
    for (field, a), (_, b) in zip(wanted, other, strict=True):
        if a == b:
            continue
        if field not in extents or max(a, b) > FARTHEST * min(a, b):
            return None
        distance += abs(math.log(a / b))
    return distance


def read(path: Path, kernel: ModuleType) -> dict[Key, Entry]:
    """A kernel's table from its file, empty where there is none.

    Raises TableError unless every entry is a shape of this kernel and names one of its `CONFIGS` or none.
    """
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise ValueError(f"it is no file of at most {LARGEST >> 20} MB")
        return _parsed(json.loads(path.read_bytes()), kernel)
    except OSError as error:
        raise TableError(f"{path}: this table cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: this table cannot be used: {error}. Move it away and tune again") from None


def _parsed(content: Any, kernel: ModuleType) -> dict[Key, Entry]:
    content = _object(content, schema=int, kernel=str, provenance=list, entries=list)
    if content["schema"] != SCHEMA:
        raise ValueError(f"it has schema {content['schema']}, this version of regnet_fast reads {SCHEMA}")
    if content["kernel"] != name(kernel):
        raise ValueError(f"it is for the kernel {content['kernel'][:80]!r}")
    found = {}
    for entry in content["entries"]:
        times = dict(microseconds=float, heuristic_microseconds=float)
        entry = _object(entry, shape=dict, config=(dict, type(None)), heuristic=dict, provenance=int, **times)
        shape = _object(entry["shape"], **{f: t for f, t in get_type_hints(kernel.Shape).items() if f not in MACHINE})
        config, heuristic = (
            None if facts is None else kernel.Config(**_object(facts, **get_type_hints(kernel.Config)))
            for facts in (entry["config"], entry["heuristic"])
        )
        if config is not None and config not in kernel.CONFIGS:
            raise ValueError(f"{config} is none of the configurations of {name(kernel)}")
        if not all(0 < entry[field] < math.inf for field in times):
            raise ValueError("a time is no positive number")
        if not 0 <= entry["provenance"] < len(content["provenance"]):
            raise ValueError("an entry does not say where it was measured")
        measured = (config, entry["microseconds"], heuristic, entry["heuristic_microseconds"])
        found[tuple(shape.items())] = Entry(*measured, content["provenance"][entry["provenance"]])
    return found


def _object(content: Any, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON object with exactly these fields in this order, each of its own type: True is no number."""
    if not isinstance(content, dict) or content.keys() != types.keys():
        raise ValueError(f"an object with the fields {', '.join(types)} is expected, found {str(content)[:80]!r}")
    for field, expected in types.items():
        if type(content[field]) not in (expected if isinstance(expected, tuple) else (expected,)):
            raise ValueError(f"the field {field} is {str(content[field])[:80]!r}")
    return {field: content[field] for field in types}


def write(path: Path, kernel: ModuleType, known: dict[Key, Entry]) -> None:
    """Write a table in the place of what was there, all or nothing, one line for each entry."""
    provenance: list[dict[str, Any]] = []
    lines = []
    for shape, entry in sorted(known.items()):
        if entry.conditions not in provenance:
            provenance.append(entry.conditions)
        line = {
            "shape": dict(shape),
            "config": None if entry.config is None else vars(entry.config),
            "microseconds": entry.microseconds,
            "heuristic": vars(entry.heuristic),
            "heuristic_microseconds": entry.heuristic_microseconds,
            "provenance": provenance.index(entry.conditions),
        }
        lines.append(json.dumps(line))
    head = json.dumps({"schema": SCHEMA, "kernel": name(kernel), "provenance": provenance}, indent=1)
    replace(path, head.removesuffix("\n}") + ',\n "entries": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")


def replace(path: Path, text: str) -> None:
    """Write a file in the place of what was there, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
