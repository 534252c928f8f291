"""What serves a problem here and now: a forced backend, what trials have chosen, or the framework's own library."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from ..backends import Problem, forced_backend, library, select
from ..store.verdicts import Outcome, Verdict
from .cpu import words
from .session import session


class Serving(NamedTuple):
    """What serves a problem: a backend's module with options for its `prepare_*`, and whether that stays so."""

    name: str
    module: ModuleType
    options: dict[str, str]
    settled: bool


def serving(problem: Problem) -> Serving:
    """What serves a problem: the forced backend, what a verdict names, or where there is none `select(problem)`.

    Raises BackendError as that does.
    """
    if forced_backend() is None:
        candidate, settled = session.look(problem)
        if candidate is not None:
            options = {"variant": candidate.variant} if candidate.variant else {}
            return Serving(candidate.backend, library(candidate.backend, problem.device), options, settled)
    else:
        settled = True
    found = select(problem)
    return Serving(found.name, found.module, {}, settled)


def noted(problem: Problem) -> int:
    """The generation for which a run holds that is not settled; none where the problem does not even wait."""
    return session.generation if problem in session.waiting else -1


def why(problem: Problem) -> str:
    """What trials found about a problem, in words; '' where there were none."""
    if not session.applies(problem):
        return ""
    verdict = session.verdicts(problem).find(words(problem))
    if verdict is None:
        return "not tried yet" if problem in session.waiting else ""
    return told(verdict)


def told(verdict: Verdict) -> str:
    """A verdict in words: what was chosen, and why each other candidate lost."""
    mine = verdict.outcomes[verdict.chosen]
    gain = f", {mine.peer_us / mine.us:.2f} times as fast as the peer" if mine.us and mine.peer_us else ""
    others = (f"{name} {_lost(outcome)}" for name, outcome in verdict.outcomes.items() if name != verdict.chosen)
    return f"a trial: {'; '.join([verdict.chosen + gain, *others])}"


def _lost(outcome: Outcome) -> str:
    """Why a candidate does not serve."""
    if outcome.status != "verified":
        return f"{outcome.status}: {outcome.reason}"
    if outcome.us is None or outcome.peer_us is None:
        return "the peer"
    return f"{outcome.us:.0f} us against the peer's {outcome.peer_us:.0f}"
