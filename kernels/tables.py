"""Which configuration a kernel takes: the given one, else one that was measured on this GPU, else its heuristic's.

A kernel is a module of this package with `Shape`, `Config`, `CONFIGS`, `EXTENTS`, `heuristic(shape)` and
`config_supports(config, shape)`. `EXTENTS` names the fields of a shape that say how much there is to compute; the rest
says what, but for `arch` and `processors`, which are left out: what was measured belongs to one model of GPU.

What was measured is kept as verdicts (store/verdicts.py): a problem is a kernel with its shape, a candidate a
configuration, both in words, and the peer is `HEURISTIC`. `tuned/<gpu>.json` beside this file has verdicts that are
shipped: measured on the same model of GPU, whatever its driver and libraries, they serve where nothing was measured
here. They are read when a kernel is first launched on a GPU. Nothing of Triton is imported here.

How much of a GPU a configuration takes is the compiler's to say, and another version says something else. Where it is
more than there is, which shows when the kernel is first launched, a smaller configuration takes its place: `fitting`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..observer import observer
from ..store.environment import environment
from ..store.verdicts import Verdict, VerdictError, Verdicts, listed

SHIPPED = Path(__file__).parent / "tuned"
FARTHEST = 4  # so many times as much to compute, or as little, is still near
HEURISTIC = "heuristic"
MACHINE = ("arch", "processors")
_TRITON = "triton "

Key = tuple[tuple[str, int], ...]


class TooLargeError(ValueError):
    """What the compiler made of a configuration takes more of the GPU than there is; the message says what."""


class SmallerWarning(UserWarning):
    """A smaller configuration runs than was chosen, which may be slower."""


@dataclass(frozen=True)
class Choice:
    """A launch whose configuration was chosen here, by what was measured where it is `tuned`. `run(config)` launches it
    again.
    """

    kernel: ModuleType
    shape: Any
    config: Any
    tuned: bool
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Chosen:
    """The configuration of a kernel, by its module's name, for a shape on a device; it may be given, or measured."""

    kernel: str
    shape: Any
    device: torch.device
    config: Any
    given: bool
    tuned: bool


def chosen(kernel: str, shape: Any, device: torch.device, config: Any) -> Chosen:
    """The configuration for a launch.

    Args:
        kernel: the module's `__name__`.
        shape: its `Shape`.
        device: where it is launched.
        config: the given configuration, or None.

    Raises ValueError where the configuration cannot serve.
    """
    if config is not None:
        _check(sys.modules[kernel], config, shape)
        return Chosen(kernel, shape, device, config, True, False)
    config, tuned = _chosen(kernel, shape, device)
    return Chosen(kernel, shape, device, config, False, tuned)


def announce(one: Chosen, run: Callable[[Any], Any]) -> None:
    """Say what is launched next; `run` launches the same with a given configuration, for an observer. The caller is
    decorated with `fitting`.
    """
    _choice.set(one)
    told = observer.get()
    if told is not None and not one.given:
        told.choice(Choice(sys.modules[one.kernel], one.shape, one.config, one.tuned, run))


_choice: ContextVar[Chosen] = ContextVar("regnet_fast_choice")
"""What was announced last."""

_kept: list[Any] = []
"""The caches of what rests on choices."""


def planned(plan: Callable[..., Any]) -> Callable[..., Any]:
    """A function of hashable facts, whose results are kept until a choice may be another."""
    kept = functools.lru_cache(maxsize=1 << 12)(plan)
    _kept.append(kept)
    return kept


_too_large: dict[tuple[str, Any, torch.device], dict[Any, str]] = {}
"""Configurations of a kernel for a shape that the compiler makes too large for a device, and what it said."""


def fitting(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that chooses once, and again with a smaller configuration where the compiler makes the chosen
    one too large, with a warning. A configuration that was given has no other, and raises TooLargeError.
    """

    @functools.wraps(launcher)
    def launch(*arguments: Any, **options: Any) -> Any:
        while True:
            try:
                return launcher(*arguments, **options)
            except TooLargeError as error:
                one = _choice.get()
                if one.given:
                    raise
                _replace(one, str(error))

    return launch


def _replace(one: Chosen, reason: str) -> None:
    """Never choose a configuration for a shape again. Raises TooLargeError where there is no smaller one."""
    what, kernel = (one.kernel, one.shape, one.device), name(sys.modules[one.kernel])
    _too_large.setdefault(what, {})[one.config] = reason
    _choose_again()
    smaller = _chosen(*what)[0]
    text = f"{kernel}: {one.config} is too large as it was compiled: {reason}. {smaller} runs instead"
    warnings.warn(text, SmallerWarning, stacklevel=2)


def _choose_again() -> None:
    for kept in (_chosen, *_kept):
        kept.cache_clear()


@functools.lru_cache(maxsize=1 << 14)
def _chosen(kernel: str, shape: Any, device: torch.device) -> tuple[Any, bool]:
    """The configuration, and whether it was measured to be the fastest."""
    module = sys.modules[kernel]
    found = find(module, known(device).get(name(module), {}), shape)
    config = next((config for config in module.CONFIGS if words(config) == found), None)
    if config is None or config in _too_large.get((kernel, shape, device), ()):
        return default(module, shape, device), found == HEURISTIC
    return config, True


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
    """A kernel's name: its module's."""
    return kernel.__name__.rpartition(".")[2]


def problem(kernel: ModuleType, shape: Any) -> str:
    """A kernel and a shape in the words that a verdict is known by."""
    return f"{_TRITON}{name(kernel)}: {words(shape)}"


def words(facts: Any) -> str:
    """A shape or a configuration in words, which leave the machine out."""
    return ", ".join(f"{field} {value}" for field, value in key(facts))


def key(facts: Any) -> Key:
    """The fields of a shape or a configuration but for those of the machine."""
    return tuple((field, int(value)) for field, value in vars(facts).items() if field not in MACHINE)


def parsed(problem: str) -> tuple[str, Key] | None:
    """The kernel's name and the key of a shape of such words; None where they are another problem's."""
    kernel, _, facts = problem.removeprefix(_TRITON).partition(": ")
    try:
        found = tuple((field, int(value)) for field, value in map(str.split, facts.split(", ")))
    except ValueError:
        return None
    return (kernel, found) if problem.startswith(_TRITON) else None


def here(device: torch.device) -> dict[str, str] | None:
    """The environment of a device; None in the interpreter, where nothing can be measured."""
    from .common import interpreting

    return None if interpreting() else environment(str(device))


@functools.lru_cache(maxsize=16)
def known(device: torch.device) -> dict[str, dict[Key, str]]:
    """The fastest configurations in words, by kernel and shape: those that are shipped, and before them those found in
    this environment. Raises VerdictError where what is shipped cannot be read.
    """
    facts, found = here(device), {}
    if facts is not None:
        for verdict in [*(verdict for _, verdict in shipped(facts["device"])), *Verdicts(facts)]:
            what = parsed(verdict.problem)
            if what is not None and measured(verdict):
                found.setdefault(what[0], {})[what[1]] = verdict.chosen
    return found


def measured(verdict: Verdict | None) -> bool:
    """Whether the configurations of a shape were tried to the end."""
    return verdict is not None and verdict.outcomes[verdict.chosen].us is not None


def shipped(gpu: str) -> list[tuple[dict[str, str], Verdict]]:
    """What is shipped for a model of GPU, by its name, and where that was measured. Raises VerdictError."""
    path = shipped_file(gpu)
    try:
        content = json.loads(path.read_bytes()) if path.exists() else None
        found = [] if content is None else listed(content)
    except ValueError as error:
        raise VerdictError(f"{path}: {error}") from None
    return [(facts, verdict) for facts, verdict in found if facts.get("device") == gpu]


def shipped_file(gpu: str) -> Path:
    """Where that is: under the GPU's name in lower case, its words joined by dashes."""
    return SHIPPED / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def forget() -> None:
    """Read what was measured again when it is next needed, and ask the compiler again."""
    _too_large.clear()
    _choose_again()
    known.cache_clear()


def find(kernel: ModuleType, known: dict[Key, str], shape: Any) -> str | None:
    """The configuration for a shape, or else for the nearest one that differs in its extents alone, each by a factor of
    `FARTHEST` at most; one that can serve.
    """
    wanted, configs = key(shape), {words(config): config for config in kernel.CONFIGS}
    distances = {other: _distance(wanted, other, kernel.EXTENTS) for other in known}
    for other in sorted((other for other in known if distances[other] is not None), key=distances.get):
        config = configs.get(known[other])
        if known[other] == HEURISTIC or (config is not None and kernel.config_supports(config, shape) is None):
            return known[other]
    return None


def _distance(wanted: Key, other: Key, extents: tuple[str, ...]) -> float | None:
    """How far two shapes are from each other, or None where one says nothing about the other."""
    if [field for field, _ in wanted] != [field for field, _ in other]:
        return None
    distance = 0.0
    for (field, a), (_, b) in zip(wanted, other, strict=True):
        if a == b:
            continue
        if field not in extents or max(a, b) > FARTHEST * min(a, b):
            return None
        distance += abs(math.log(a / b))
    return distance
