"""A process that measures cases one after another: a crash, or too little memory, costs one case and not the run."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any


def serve(pipe: Connection, kind: str, device: str, patterns: list[str] | None, rounds: int, cache: str | None) -> None:
    """Answer every case that comes through the pipe with ("said", text) any number of times and ("done", record)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runner, which ends this process
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    from . import measure, peers
    from .cases import Case

    chosen = peers.choose(patterns, device.partition(":")[0], kind)
    while True:
        try:
            facts: dict[str, Any] | None = pipe.recv()
        except EOFError:
            return
        if facts is None:
            return
        record = measure.measure(Case(**facts), device, chosen, rounds, lambda text: pipe.send(("said", text)))
        pipe.send(("done", record))
