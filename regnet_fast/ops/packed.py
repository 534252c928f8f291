"""Folded weights that a backend binds on first use."""

from __future__ import annotations

from typing import Any

from ..backends import Problem, Run

_KEPT = 8
"""For how many kinds of input what was bound is kept."""


class Packed:
    """Folded weights, bound by the chosen backend to each kind of input on first use.

    The backend that is forced then serves ever after: whoever keeps weights while this changes keeps one of these for
    each. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple, Run] = {}

    def key(self, *operands: Any) -> tuple:
        """What a run is kept under: all of a call that a backend decides on."""
        raise NotImplementedError

    def problem(self, *operands: Any) -> Problem:
        """The problem that a call poses."""
        raise NotImplementedError

    def bind(self, problem: Problem) -> Run:
        """The weights bound by the backend that serves a problem."""
        raise NotImplementedError

    def run_for(self, *operands: Any) -> Run:
        """What serves a call."""
        key = self.key(*operands)
        return self._runs.get(key) or self._kept(key, self.bind(self.problem(*operands)))

    def _kept(self, key: tuple, run: Run, most: int = _KEPT) -> Run:
        """The run, kept with the last few in a new dictionary, since other threads may be reading this one."""
        runs = {**self._runs, key: run}
        if len(runs) > most:
            del runs[next(iter(runs))]
        self._runs = runs
        return run

    def explain(self, *operands: Any) -> tuple[Problem, str]:
        """The problem that a call poses, and what serves it."""
        return self.problem(*operands), self.run_for(*operands).label

    def pin(self) -> Any:
        """What keeps the memory of the packed weights from being freed, as long as it is held."""
        return self._runs
