"""Whether candidates are tried here and now."""

from __future__ import annotations

import os
from contextvars import ContextVar, Token
from types import TracebackType

import torch

MODES = ("on", "stored", "off")
"""`on` tries what was not tried before, `stored` uses the verdicts that there are, `off` none."""

_mode: ContextVar[str | None] = ContextVar("regnet_fast_trials", default=None)


class mode:
    """Set the mode in this thread or task from here on, or inside a `with` block alone.

    The environment's REGNET_FAST_TRIALS is the mode of whatever sets none. Raises ValueError for an unknown one.
    """

    def __init__(self, name: str):
        self._token: Token | None = _mode.set(_checked(name))

    def __enter__(self) -> mode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _mode.reset(self._token)


def current_mode() -> str:
    """The mode here and now."""
    return _mode.get() or _checked(os.environ.get("REGNET_FAST_TRIALS") or "on")


def _checked(name: str) -> str:
    if name not in MODES:
        raise ValueError(f"Unknown mode of trials {name!r} (REGNET_FAST_TRIALS); choose one of: {', '.join(MODES)}.")
    return name


def budget(otherwise: float) -> float:
    """Seconds that trials may take: REGNET_FAST_TRIALS_BUDGET. Raises ValueError where that is no number."""
    text = os.environ.get("REGNET_FAST_TRIALS_BUDGET")
    if not text:
        return otherwise
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not seconds >= 0:
        raise ValueError(f"REGNET_FAST_TRIALS_BUDGET is {text!r}; it is a number of seconds, such as 60")
    return seconds


def watched() -> bool:
    """Whether somebody records or replaces what is computed here, who must not see trials: a compiler, a tracer, a
    dispatch mode, a stream that is captured.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )
