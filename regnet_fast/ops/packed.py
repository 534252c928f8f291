"""Folded weights that a backend binds on first use."""

from __future__ import annotations

from typing import Any

from ..backends import Problem, Run
from ..recorder import recorded_elsewhere
from ..trials.serving import Serving, noted, serving
from ..trials.session import session

KEPT = 8
"""For how many kinds of input what was bound is kept."""


class Packed:
    """Folded weights, bound by the chosen backend to each kind of input on first use.

    The backend that is forced then serves ever after: whoever keeps weights while this changes keeps one of these for
    each. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple, Run] = {}
        self._provisional: dict[tuple, tuple[int, Run]] = {}

    def key(self, *operands: Any) -> tuple:
        """What a run is kept under: all of a call that a backend decides on."""
        raise NotImplementedError

    def problem(self, *operands: Any) -> Problem:
        """The problem that a call poses."""
        raise NotImplementedError

    def bind(self, problem: Problem, by: Serving) -> Run:
        """The weights bound by what serves a problem."""
        raise NotImplementedError

    def run_for(self, *operands: Any) -> Run:
        """What serves a call: until a trial has decided, what served the last one.

        What is packed while somebody records the stream is in the graph alone, and is not kept.
        """
        key = self.key(*operands)
        run = self._runs.get(key)
        if run is not None:
            return run
        generation, run = self._provisional.get(key, (-1, None))
        if run is not None and generation == session.generation:
            return run
        problem = self.problem(*operands)
        by = serving(problem)
        if recorded_elsewhere(operands[0]):
            return self.bind(problem, by)
        if by.settled:
            self._provisional = {other: one for other, one in self._provisional.items() if other != key}
            return self._kept(key, self.bind(problem, by))
        if run is None or generation >= 0:
            run = self.bind(problem, by)
        self._provisional = _with(self._provisional, key, (noted(problem), run), KEPT)
        return run

    def _kept(self, key: tuple, run: Run, most: int = KEPT) -> Run:
        """The run, kept with the last few."""
        self._runs = _with(self._runs, key, run, most)
        return run

    def explain(self, *operands: Any) -> tuple[Problem, str]:
        """The problem that a call poses, and what serves it."""
        return self.problem(*operands), self.run_for(*operands).label

    def pin(self) -> Any:
        """What keeps the memory of the packed weights from being freed, as long as it is held."""
        return self._runs, self._provisional


def _with(kept: dict, key: tuple, value: Any, most: int) -> dict:
    """A new dictionary with one entry more, and the oldest ones left out: other threads may be reading this one."""
    found = {**kept, key: value}
    while len(found) > most:
        del found[next(iter(found))]
    return found
