"""Trials in another process: problems wait until a model is called for the second time, and are tried then, all in one
session, in a process that may crash, hang or be wrong.

The first call of a shape is served by the peer at once, and so is every call that is captured, compiled or traced. A
script that calls a model once pays nothing.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import store
from ..backends import Problem
from ..settings import settings
from ..store.environment import card, environment
from ..store.verdicts import Outcome, Verdict, Verdicts, folder
from .candidate import Candidate, candidates, to_json
from .cpu import words
from .modes import budget, current_mode, watched
from .process import PHASES, Child, Fault, StartError

BUDGET_S = 60.0
"""Seconds of trials in a process, unless REGNET_FAST_TRIALS_BUDGET says otherwise."""

ROUNDS = 9
_AGAIN_S = 1.0  # after which it is looked again for what another process has found; the next time after twice as long
_SHAPES = 8  # so many shapes that differ in their size alone are tried in a process
_ROOT = str(Path(__file__).resolve().parents[2])
_MARGIN = 1.03
_NOISY = 0.1


class TrialWarning(UserWarning):
    """Candidates cannot be tried here; the peers serve."""


class Session:
    """What waits to be tried, and the process that tries it.

    Attributes: `waiting`, the problems that wait; `devices`, the kinds of devices whose problems are tried here;
    `generation`, which grows whenever a verdict may be another one.
    """

    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-m", "regnet_fast.trials.worker"),
        modules: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        phases: dict[str, float] = PHASES,
        devices: Sequence[str] = ("cuda",),
    ):
        self.command, self.modules, self.clock, self.phases = command, list(modules), clock, phases
        self.devices = devices
        self.waiting: dict[Problem, None] = {}
        self.generation = 0
        self._lock = threading.RLock()
        self._verdicts: dict[str, Verdicts] = {}
        self._spent, self._broken, self._look_again, self._apart = 0.0, False, float("-inf"), _AGAIN_S
        self._taken: set[Problem] = set()
        self._shapes: dict[Problem, int] = {}
        self._owner = os.getpid()

    def chosen(self, problem: Problem) -> Candidate | None:
        """The candidate that a verdict names; None where there is none, and the problem waits for one."""
        return self.look(problem)[0]

    def look(self, problem: Problem) -> tuple[Candidate | None, bool]:
        """`chosen`, and whether that stays so in this process."""
        if not self.applies(problem) or settings().deterministic:
            return None, True
        able = [*map(str, candidates(problem))]
        if len(able) == 1:
            return None, True
        verdict = self.verdicts(problem).find(words(problem))
        untried = verdict is None or not set(able) <= set(verdict.outcomes)
        undecided = untried and current_mode() == "on" and self._may_try(problem)
        if undecided and not watched():
            with self._lock:
                if problem not in self.waiting:
                    self.waiting[problem] = None
                    self._shapes[_of_any_size(problem)] = self._shapes.get(_of_any_size(problem), 0) + 1
        served = verdict is not None and verdict.chosen in able
        return Candidate.named(verdict.chosen) if served else None, not undecided

    def applies(self, problem: Problem) -> bool:
        """Whether verdicts are asked for the device of a problem."""
        return problem.device.partition(":")[0] in self.devices and current_mode() != "off"

    def _may_try(self, problem: Problem) -> bool:
        if self._broken or problem in self._taken or os.getpid() != self._owner:
            return False
        return problem in self.waiting or self._shapes.get(_of_any_size(problem), 0) < _SHAPES

    def verdicts(self, problem: Problem) -> Verdicts:
        """Those of the device of a problem."""
        found = self._verdicts.get(problem.device)
        if found is None:
            found = self._verdicts[problem.device] = Verdicts(environment(problem.device))
        return found

    def settle(self, limit: float | None = None, told: Callable[[Verdict], object] = lambda verdict: None) -> None:
        """Try everything that waits, the largest first, within the budget, or for `limit` more seconds; what is left
        waits for the next process.

        Another process that tries for this user is not waited for: its verdicts are used when they are there. Of
        processes that train together the first one of a machine tries alone. Never raises: where nothing can be tried
        one warning says why. Ctrl-C ends the trials alone.
        """
        if not self.waiting or watched() or current_mode() != "on" or self.clock() < self._look_again:
            return
        if not self._lock.acquire(blocking=False):
            return
        try:
            limit = budget(BUDGET_S) if limit is None else self._spent + limit
            with ExitStack() as stack:
                if _follows() or not stack.enter_context(_alone()):
                    self._take_up()
                    return
                waiting = sorted(self.waiting, key=lambda problem: -problem.bytes)
                self._taken.update(waiting)
                self.waiting.clear()
                try:
                    self._settle(waiting, limit, told)
                finally:
                    self.generation += 1
        except KeyboardInterrupt:
            self._broken = True
            self._warn("interrupted")
        except StartError as error:
            self._broken = True
            self._warn(str(error))
        finally:
            self._lock.release()

    def _take_up(self) -> None:
        """Use what another process has found meanwhile, and look again later and later."""
        found = [problem for problem in self.waiting if self._found(problem)]
        self._taken.update(found)
        for problem in found:
            del self.waiting[problem]
        self.generation += bool(found)
        self._look_again = self.clock() + self._apart
        self._apart *= 2

    def _found(self, problem: Problem) -> bool:
        verdicts = self.verdicts(problem)
        verdicts.forget(words(problem))
        return verdicts.find(words(problem)) is not None

    def _settle(self, waiting: list[Problem], limit: float, told: Callable[[Verdict], object]) -> None:
        trial, gained = _Trial(self, limit), 0
        _say(f"trying kernels for {len(waiting)} shapes, {max(0.0, limit - self._spent):.0f} s at most")
        try:
            for problem in waiting:
                if trial.over():
                    break
                verdict = trial.of(problem)
                gained += verdict.chosen != str(candidates(problem)[0])
                told(verdict)
        finally:
            trial.end()
            _say(f"{gained} of {len(waiting)} shapes have a faster kernel now; regnet-fast verdicts shows them")

    def _warn(self, reason: str) -> None:
        warnings.warn(f"no kernels are tried here, and {_PEERS}: {reason}", TrialWarning, stacklevel=4)


_PEERS = "the framework's own serve"


class _Trial:
    """One session's process, and who is to blame where it dies."""

    def __init__(self, session: Session, limit: float):
        self._session, self._limit = session, limit
        self._child: Child | None = None
        self._last: tuple[Problem, Candidate] | None = None
        self._outcomes: dict[Problem, dict[str, Outcome]] = {}

    def over(self) -> bool:
        """Whether the time is."""
        return self._session._spent >= self._limit

    def of(self, problem: Problem) -> Verdict:
        """Try every candidate of a problem that was not tried before, while there is time."""
        peer, *others = candidates(problem)
        verdicts = self._session.verdicts(problem)
        verdicts.forget(words(problem))
        before = verdicts.find(words(problem))
        outcomes = self._outcomes[problem] = dict(before.outcomes) if before is not None else {}
        outcomes.setdefault(str(peer), Outcome("verified"))
        for candidate in others:
            if str(candidate) not in outcomes and not self.over():
                outcome = self._outcome(problem, candidate, peer)
                outcomes[str(candidate)] = outcome
        return self._kept(problem)

    def _kept(self, problem: Problem) -> Verdict:
        outcomes, peer = self._outcomes[problem], str(candidates(problem)[0])
        found = Verdict(words(problem), _fastest(outcomes, peer), dict(outcomes))
        return self._session.verdicts(problem).keep(found)

    def _outcome(self, problem: Problem, candidate: Candidate, peer: Candidate) -> Outcome:
        s, start = self._session, self._session.clock()
        names = {"candidate": str(candidate), "peer": str(peer)}
        facts = {"problem": to_json(problem), **names, "settings": settings(), "card": card(problem.device)}
        try:
            with _journal(problem, candidate) as suspect:
                if suspect:
                    return Outcome("suspect", reason="the process that tried it last ended with the one that asked")
                for _ in range(2):
                    try:
                        answer = self._process().ask({**facts, "rounds": ROUNDS, "modules": s.modules}, s.phases)
                        if answer["status"] == "unable":
                            raise StartError(str(answer.get("reason")))
                        self._last = problem, candidate
                        return _read(answer)
                    except Fault as fault:
                        self._child = None
                        if fault.before and self._last is not None:
                            self._blame(fault)
                            continue
                        kind = fault.kind if fault.kind != "garbled" else "crashed"
                        return Outcome(kind, reason=str(fault))
                return Outcome("crashed", reason="the process died twice before it began")
        finally:
            s._spent += s.clock() - start

    def _process(self) -> Child:
        if self._child is None:
            if getattr(sys, "frozen", False) or not self._session.command[0]:
                raise StartError("a program without an interpreter beside it cannot start one")
            path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
            self._child, self._last = Child(self._session.command, {"PYTHONPATH": path}), None
            self._child.started()
        return self._child

    def _blame(self, fault: Fault) -> None:
        """The candidate that was answered for last killed the process after that."""
        problem, candidate = self._last
        self._last = None
        self._outcomes[problem][str(candidate)] = Outcome("crashed", reason=f"after its trial: {fault}")
        self._kept(problem)

    def end(self) -> None:
        if self._child is None:
            return
        try:
            self._child.end()
        except Fault as fault:
            if self._last is not None and fault.kind == "crashed":  # a slow end, on a busy machine, is nobody's fault
                self._blame(fault)
        self._child = None


def _follows() -> bool:
    """Whether another process of this machine tries for this one: all but the first of those that train together."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def _of_any_size(problem: Problem) -> Problem:
    """What problems have in common that differ in the number or the size of their images."""
    if hasattr(problem, "input_shape"):
        return replace(problem, input_shape=(0, problem.input_shape[1], 0, 0))
    return replace(problem, batch=0)


def _read(answer: dict[str, Any]) -> Outcome:
    """An answer as an outcome; one that cannot be read is a crash."""
    try:
        if answer["status"] != "verified":
            return Outcome(str(answer["status"]), reason=str(answer.get("reason", ""))[:300])
        mine, peers = ([float(t) for t in answer[name]] for name in ("us", "peer_us"))
        us, peer_us = statistics.median(mine), statistics.median(peers)
        spread = max(_deviation(mine) / us, _deviation(peers) / peer_us)
        if not 0 < us < float("inf") or spread > _NOISY:
            return Outcome("noisy", us, f"its times differ by {100 * spread:.0f} %", peer_us)
        faster = peer_us > _MARGIN * us and peer_us - us > 2 * max(_deviation(mine), _deviation(peers))
        return Outcome("verified", us, "" if faster else "not faster than the peer", peer_us)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, statistics.StatisticsError):
        return Outcome("crashed", reason=f"its answer cannot be read: {str(answer)[:100]}")


def _deviation(samples: list[float]) -> float:
    """The median of the distances from the median."""
    middle = statistics.median(samples)
    return statistics.median(abs(t - middle) for t in samples)


def _fastest(outcomes: dict[str, Outcome], peer: str) -> str:
    """The candidate that beats the peer by most."""
    able = {
        name: outcome.us / outcome.peer_us
        for name, outcome in outcomes.items()
        if name != peer and outcome.status == "verified" and not outcome.reason and outcome.us and outcome.peer_us
    }
    return min(able, key=able.get, default=peer)


@contextmanager
def _alone() -> Iterator[bool]:
    """Whether no other process tries candidates meanwhile, as far as the cache folder tells."""
    with _held(folder() / "session.lock") as mine:
        yield mine


@contextmanager
def _journal(problem: Problem, candidate: Candidate) -> Iterator[bool]:
    """A file that is there while a candidate is tried. True where one was left by a process that died."""
    path = folder() / "inflight" / store.key(words(problem), str(candidate))[:32]
    left = path.exists()
    try:
        if not left:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                json.dump({"problem": words(problem), "candidate": str(candidate), "pid": os.getpid()}, file)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        pass  # nothing can be kept there: a machine that dies of it will die of it again
    try:
        yield left
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether a lock was free, which is held inside the `with` block then."""
    try:
        import fcntl

        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = path.open("ab")
    except (ImportError, OSError):
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _say(text: str) -> None:
    """Tell whoever waits at a terminal; a log otherwise."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"regnet_fast: {text}", file=sys.stderr, flush=True)
    else:
        logging.getLogger("regnet_fast").info(text)


session = Session()
"""What waits in this process."""

waiting = session.waiting
"""The same, for whoever looks in every call."""
