"""The one thread on which calls are recorded as CUDA graphs.

torch keeps cuDNN's plans for each thread and lets them go when it ends, while a graph that was recorded on it may still
run their kernels. So there is a thread that lasts as long as the process. It starts with the first recording.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Recorder:
    """Runs one task at a time on a thread of its own, for callers that wait for it.

    A task never waits for a lock that a caller may hold: whoever calls a graphed model inside of one gets the model's
    own call.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._again()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._again)  # where there are no other threads

    def _again(self) -> None:
        self._thread = ThreadPoolExecutor(1, "regnet_fast recorder", initializer=self._begin)
        self._here.yes = False

    def _begin(self) -> None:
        self._here.yes = True

    @property
    def is_here(self) -> bool:
        """Whether this is its thread."""
        return getattr(self._here, "yes", False)

    def run(self, task: Callable[[], Result], device: str, *around: AbstractContextManager) -> Result:
        """The task's result, or what it raises.

        What the caller has set for its own thread or task holds inside: context variables, the gradient mode, autocast
        for a kind of device, the default device; and `around`, contexts that are entered there.

        Raises RuntimeError at the end of the process, where no thread can be started.
        """
        future = self._thread.submit(contextvars.copy_context().run, _as_here(task, device, around))
        try:
            return future.result()
        except BaseException:
            wait([future])  # an interrupted caller goes on when nothing is recorded any more
            raise
        finally:
            del future  # it holds the error, whose traceback holds this frame


def _as_here(
    task: Callable[[], Result], device: str, around: tuple[AbstractContextManager, ...]
) -> Callable[[], Result]:
    """A task that finds torch's settings of this thread in another one."""
    gradients = torch.enable_grad if torch.is_grad_enabled() else torch.no_grad
    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    default = torch.get_default_device() if torch._C._len_torch_function_stack() else None

    def run() -> Result:
        with ExitStack() as stack:
            for context in (default, torch.autocast(device, **autocast), gradients(), *around):
                if context is not None:
                    stack.enter_context(context)
            return task()

    return run


recorder = Recorder()
"""That of this process."""


def recorded_elsewhere(x: torch.Tensor) -> bool:
    """Whether somebody else records the current stream as a CUDA graph, while x is computed with."""
    if not torch.cuda.is_initialized() or x.device.type == "cpu":
        return False
    return torch.cuda.is_current_stream_capturing() and not recorder.is_here
