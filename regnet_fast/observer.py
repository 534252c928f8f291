"""Who is told what runs: one `Observer` for each thread or task, and none as a rule.

block(block, x, plan, reason)     a fused block is about to run: over a plan in evaluation, over none in training;
                                  with a reason it is left to the host
launch(name, arguments)           a kernel of kernels/ or csrc/ is about to start, with its arguments by name; it
                                  starts only where True is returned
choice(choice)                    a configuration was chosen for a Triton kernel (`kernels.tables.Choice`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


def _unheard(*event: Any) -> bool:
    return True


@dataclass(frozen=True)
class Observer:
    """What is called with each event."""

    block: Callable[..., object] = _unheard
    launch: Callable[[str, dict[str, Any]], bool] = _unheard
    choice: Callable[[Any], object] = _unheard


observer: ContextVar[Observer | None] = ContextVar("regnet_fast_observer", default=None)


@contextmanager
def observing(**events: Callable[..., Any]) -> Iterator[None]:
    """Call functions with the events of their names inside the `with` block, in this thread or task alone.

    Events that are not named go to whoever was told before.
    """
    token = observer.set(replace(observer.get() or Observer(), **events))
    try:
        yield
    finally:
        observer.reset(token)
