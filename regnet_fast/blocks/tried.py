"""Which passes take the training step of a block where nobody trusts them unseen, on a GPU: those that trials chose.

The host answers a block's first step with an input of a kind, and trials note it. They are made before the second one
(trials/session.py), and passes that were verified and faster than the host serve from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends import forced_backend
from ..observer import observer
from ..settings import settings
from ..trials.cpu import words
from ..trials.modes import current_mode
from ..trials.serving import told
from ..trials.session import session
from ..trials.step import PEER, StepProblem, pose
from .training import Training, compute_dtype

if TYPE_CHECKING:
    from .fused import Fused

_KINDS = 32
"""Of how many kinds of inputs a block keeps what serves them."""


def asked(x: Tensor) -> bool:
    """Whether trials say what serves a step on x."""
    return x.is_cuda and forced_backend() is None


class Chosen(NamedTuple):
    """The backends whose passes serve, None for the host's own step; and why, in words."""

    names: tuple[str, ...] | None
    reason: str


class _Kept(NamedTuple):
    """What serves a kind of input, as of a generation of the session; there is no problem that cannot be posed."""

    problem: StepProblem | None
    generation: int
    serving: Chosen


class Tried:
    """What serves the steps of a block.

    Args:
        block: whose steps they are. training: what computes them.
        tensors: reads those of the block.
    """

    def __init__(self, block: Fused, training: Training, tensors: Callable[[], list[Tensor | None]]):
        self._block, self._training, self._tensors = block, training, tensors
        self._kept: dict[tuple, _Kept] = {}

    def serving(self, x: Tensor) -> Chosen:
        """What serves a step on x now."""
        needs = tuple(t is not None and t.requires_grad for t in self._tensors())
        reason = self._refusal(x, needs)
        if reason is not None:
            return Chosen(None, reason)
        facts = x.shape, x.dtype, x.device, x.is_contiguous(memory_format=torch.channels_last), x.requires_grad
        key = *facts, compute_dtype(x), needs, settings(), current_mode()
        found = self._kept.get(key)
        if found is not None and session.waiting and observer.get() is None:
            session.settle()
        if found is None:
            found = self._posed(x)
        elif found.problem is not None and found.generation != session.generation:
            found = _served(found.problem)
        if self._kept.get(key) is not found:
            self._kept = {**(self._kept if len(self._kept) < _KINDS else {}), key: found}
        return found.serving

    def _posed(self, x: Tensor) -> _Kept:
        try:
            problem = pose(self._block, x, compute_dtype(x))
        except Exception as error:
            reason = f"it cannot be told to another process: {type(error).__name__}: {error}"
            return _Kept(None, session.generation, Chosen(None, reason))
        return _served(problem)

    def _refusal(self, x: Tensor, needs: tuple[bool, ...]) -> str | None:
        """Why a step is the host's whatever trials found, or None."""
        if not torch.is_grad_enabled() or not (x.requires_grad or any(needs)):
            return "no gradient is asked for"
        if settings().deterministic:
            return "trials choose nothing where deterministic algorithms are asked for"
        if self._training.in_processes():
            return "its norms are those of several processes, which must all take the same way"
        if getattr(self._block, "_is_replica", False):
            return "it is a replica for one call"
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return "what is saved for the gradient is seen, so that the way has to stay the same"
        if torch._C._current_graph_task_id() >= 0:
            return "it is computed again in a backward pass, by the way that it took before"
        return None


def _served(problem: StepProblem) -> _Kept:
    return _Kept(problem, session.generation, _chosen(problem))


def _chosen(problem: StepProblem) -> Chosen:
    candidate = session.chosen(problem)
    verdict = None if current_mode() == "off" else session.verdicts(problem).find(words(problem))
    if candidate is None or verdict is None:
        return Chosen(None, "its step was not tried on this device" + (" yet" if current_mode() == "on" else ""))
    names = None if candidate.backend == PEER else tuple(candidate.backend.split(","))
    return Chosen(names, told(verdict))
