"""What was found about a problem's candidates, in memory and on disk.

A problem is a layer, whose candidates are backends and their variants, or a shape of a Triton kernel, whose candidates
are the kernel's configurations. A verdict is one file, `verdicts/<environment>/<problem>` in the cache folder, so that
processes lose nothing of each other's. Another device, library, driver, number of threads or kernel is another folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import store

SCHEMA = 1

STATUSES = ("verified", "wrong", "crashed", "hung", "refused", "out of memory", "noisy", "suspect")
"""What may become of a candidate: only one that is `verified` is ever used."""


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate. `us` is its time in microseconds where it was timed, `reason` says more, `peer_us` is
    the peer's time in the same process.
    """

    status: str
    us: float | None = None
    reason: str = ""
    peer_us: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The candidate that serves a problem, and what became of each that was tried, by name."""

    problem: str
    chosen: str
    outcomes: dict[str, Outcome]

    def gain(self, peer: str) -> float | None:
        """How many times as fast the chosen candidate is as another one."""
        mine, other = (self.outcomes[name].us if name in self.outcomes else None for name in (self.chosen, peer))
        return other / mine if mine and other else None


class VerdictError(ValueError):
    """A file of verdicts cannot be used; the message says why."""


def folder() -> Path:
    """Where verdicts of all environments lie."""
    return store.user_folder("verdicts")


_again: ContextVar[bool] = ContextVar("regnet_fast_again", default=False)


@contextmanager
def again() -> Iterator[None]:
    """Inside the `with` block a verdict that is looked for is removed before, where nobody asked for it yet; in this
    thread or task alone.
    """
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)


class Verdicts:
    """The verdicts of one environment."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.folder = folder() / store.key(json.dumps(environment, sort_keys=True))[:16]
        self._known: dict[str, Verdict | None] = {}

    def __iter__(self) -> Iterator[Verdict]:
        """Every verdict on disk."""
        return (verdict for _, verdict, _ in _read(self.folder.glob("*")))

    def find(self, problem: str) -> Verdict | None:
        """The verdict on a problem; read from its file once, and again after `forget`."""
        if problem not in self._known:
            if _again.get():
                with suppress(OSError):
                    self._path(problem).unlink()
            content = store.read(self._path(problem))
            self._known[problem] = None if content is None else _parsed(content, problem)
        return self._known[problem]

    def forget(self, problem: str) -> None:
        """Read a verdict again when it is next asked for: another process may have kept one."""
        self._known.pop(problem, None)

    def keep(self, verdict: Verdict) -> Verdict:
        """Keep a verdict beside what others found of other candidates meanwhile."""

        def merged(content: bytes | None) -> bytes:
            before = None if content is None else _parsed(content, verdict.problem)
            outcomes = {**(before.outcomes if before else {}), **verdict.outcomes}
            self._known[verdict.problem] = now = Verdict(verdict.problem, verdict.chosen, outcomes)
            return json.dumps({"schema": SCHEMA, **asdict(now), "environment": self.environment}, indent=1).encode()

        store.updated(self._path(verdict.problem), merged)
        return self._known[verdict.problem]

    def _path(self, problem: str) -> Path:
        return self.folder / store.key(problem)[:32]


def _parsed(content: bytes, problem: str | None = None) -> Verdict | None:
    """A verdict from its file, or None where it is of another form or problem: it is found again."""
    try:
        found = json.loads(content)
        outcomes = {name: Outcome(**facts) for name, facts in found["outcomes"].items()}
        verdict = Verdict(found["problem"], found["chosen"], outcomes)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    good = found.get("schema") == SCHEMA and problem in (None, verdict.problem)
    good = good and all(outcome.status in STATUSES for outcome in outcomes.values())
    served = outcomes.get(verdict.chosen)
    return verdict if good and served is not None and served.status == "verified" else None


def entries() -> Iterator[tuple[dict[str, str], Verdict, Path]]:
    """Every verdict on disk with its environment and file."""
    return _read(folder().glob("*/*"))


def _read(paths: Iterable[Path]) -> Iterator[tuple[dict[str, str], Verdict, Path]]:
    for path in sorted(paths):
        content = store.read(path)
        verdict = None if content is None else _parsed(content)
        if verdict is not None:
            yield json.loads(content).get("environment", {}), verdict, path


def forget() -> int:
    """Remove every verdict of this user; how many there were."""
    count = 0
    for path in sorted(folder().glob("*/*")):
        count += store.read(path) is not None
        path.unlink(missing_ok=True)
    return count


def listing(found: Iterable[tuple[dict[str, str], Verdict]]) -> dict[str, Any]:
    """Verdicts, each with its environment, as one JSON object."""
    verdicts = [{"environment": environment, **asdict(verdict)} for environment, verdict in found]
    return {"schema": SCHEMA, "verdicts": verdicts}


def listed(content: Any) -> list[tuple[dict[str, str], Verdict]]:
    """The verdicts of such an object. Raises VerdictError where one is none."""
    if (
        not isinstance(content, dict)
        or content.get("schema") != SCHEMA
        or not isinstance(content.get("verdicts"), list)
    ):
        raise VerdictError(f"an object of schema {SCHEMA} with a list of verdicts is expected")
    found = []
    for entry in content["verdicts"]:
        environment = entry.pop("environment", None) if isinstance(entry, dict) else None
        verdict = _parsed(json.dumps({"schema": SCHEMA, **entry}).encode()) if isinstance(environment, dict) else None
        if verdict is None or not all(isinstance(v, str) for v in [*environment, *environment.values()]):
            raise VerdictError(f"this is no verdict: {str(entry)[:200]}")
        found.append((environment, verdict))
    return found


def exported() -> dict[str, Any]:
    """All verdicts as one JSON object, for a container image or other machines of the same kind."""
    return listing((environment, verdict) for environment, verdict, _ in entries())


def imported(content: Any) -> int:
    """Keep the verdicts of such an object; how many. They hold only where every fact of their environment does.

    Raises VerdictError, before anything is kept, where one is not a verdict.
    """
    found = listed(content)
    for environment, verdict in found:
        Verdicts(environment).keep(verdict)
    return len(found)
