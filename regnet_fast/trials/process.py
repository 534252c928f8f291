"""A process that may crash, hang or answer nonsense: started, asked with deadlines, and put to death in words.

The parent writes one JSON line for each question and reads JSON lines back, on descriptors of their own: whatever the
child prints goes to a log. The child first says that it has a question, then may say in which phase it is, then
answers. Each phase has its deadline; what follows ": " in its name only says more. A process that dies before it says
that it has the next question died of the one before, so that nobody else is blamed.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

START_S = 120.0
"""How long a child may take to import what it needs."""

END_S = 10.0
"""How long a child may take to end when it is asked to."""

PHASES = {"start": 60.0, "compile": 60.0, "verify": 20.0, "time": 10.0}
"""Seconds for each phase of a trial."""

_LINE = 1 << 20  # no answer is as long
_SHOWN = 400  # characters of the log that an error quotes


class Fault(RuntimeError):
    """What became of a child that did not answer.

    Attributes: `kind`, "crashed", "hung" or "garbled"; `before`, whether it died of the question before this one.
    """

    def __init__(self, kind: str, reason: str, before: bool = False):
        super().__init__(reason)
        self.kind, self.before = kind, before


class StartError(RuntimeError):
    """No child can be started here."""


class Child:
    """A process in a process group of its own.

    Args:
        command: what to start; " --read-fd N --write-fd M" are added.
        environment: variables beside those of this process.

    Raises StartError where none can be started. Use it as a context: leaving it ends the whole group.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._asked, self._unread = 0, b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        words = [*command, "--read-fd", str(theirs_in), "--write-fd", str(theirs_out)]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            os.close(self._out)
            os.close(self._in)
            self._log.close()
            raise StartError(f"no process can be started: {error}") from error
        finally:
            os.close(theirs_in)
            os.close(theirs_out)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def started(self) -> None:
        """Wait until the child can take questions. Raises StartError where it never does."""
        try:
            line = self._line(time.monotonic() + START_S, "its start")
        except Fault as fault:
            self.kill()
            raise StartError(f"the process that tries kernels did not start: {fault}") from fault
        if line != {"ready": True}:
            self.kill()
            raise StartError(f"the process that tries kernels did not start: it said {line}")

    def ask(
        self,
        question: Mapping[str, Any],
        deadlines: Mapping[str, float],
        heard: Callable[[str], object] = lambda phase: None,
        limit: float = math.inf,
    ) -> dict[str, Any]:
        """The answer to a question. `deadlines` are seconds for each phase, `limit` for all of them together, and
        `heard` is told of each phase.

        Raises Fault where there is none, and the child is dead then.
        """
        self._asked += 1
        deadlines = {"start": END_S, **deadlines}
        mine, phase, begun = self._asked, "start", False
        end = time.monotonic() + limit
        try:
            os.write(self._out, json.dumps({"id": mine, **question}).encode() + b"\n")
            until = time.monotonic() + END_S
            while True:
                line = self._line(until, f"the phase {phase!r}" if begun else "the end of the trial before")
                if line.get("id") != mine:
                    raise Fault("garbled", f"it answered {_shortened(line)} to question {mine}", before=not begun)
                if "status" in line:
                    return line
                phase, begun = str(line.get("phase")), True
                kind = phase.partition(": ")[0]
                if kind not in deadlines:
                    raise Fault("garbled", f"it is in a phase {phase!r}, which nobody knows")
                until = min(time.monotonic() + deadlines[kind], end)
                heard(phase)
        except Fault as fault:
            self.kill()
            raise Fault(fault.kind, str(fault), before=not begun) from None
        except BrokenPipeError:
            reason = self._death()
            self.kill()
            raise Fault("crashed", reason, before=True) from None
        except BaseException:
            self.kill()
            raise

    def end(self) -> None:
        """Ask the child to end, and see that it does. Raises Fault where it dies of its last question instead."""
        try:
            os.close(self._out)
            self._out = -1
            self._process.wait(END_S)
            if self._process.returncode:
                raise Fault("crashed", self._death(), before=True)
        except subprocess.TimeoutExpired:
            raise Fault("hung", "the process did not end", before=True) from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End the child and whatever it has started in its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for descriptor in (self._in, self._out):
            if descriptor >= 0:
                os.close(descriptor)
        self._in = self._out = -1
        self._log.close()

    def _line(self, until: float, during: str) -> dict[str, Any]:
        """The next line that the child writes."""
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise Fault("hung", f"nothing came in time in {during}")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise Fault("crashed", self._death())
            self._unread += data
            if len(self._unread) > _LINE:
                raise Fault("garbled", "its answer has no end")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Fault("garbled", f"it answered {_shortened(line)}")
        return found

    def _death(self) -> str:
        """How the child ended, with the last lines that it printed."""
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe and went on"
        return death(code) + self._printed()

    def _printed(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _SHOWN))
        text = " ".join(self._log.read().decode(errors="replace").split())
        return f"; it printed: {text}" if text else ""


def death(code: int) -> str:
    """The end of a process in words, from its status as `subprocess` gives it."""
    if code >= 0:
        return f"the process ended with status {code}"
    name = signal.Signals(-code).name
    return f"the process was ended by {name}" + (": probably too little memory" if name == "SIGKILL" else "")


def _shortened(what: object) -> str:
    text = repr(what)
    return text if len(text) <= 80 else text[:77] + "..."


# In the child


def serve(read: BinaryIO, write: BinaryIO, answer: Callable[[dict[str, Any], Callable], Mapping[str, Any]]) -> None:
    """Answer every question that is read: `answer(question, say)` is the rest of its answer, `say(phase)` announces a
    phase. Returns where there are no more.
    """

    def put(line: Mapping[str, Any]) -> None:
        write.write(json.dumps(line).encode() + b"\n")
        write.flush()

    put({"ready": True})
    for question in _questions(read):
        mine = {"id": question.pop("id")}
        put({**mine, "phase": "start"})
        put({**mine, **answer(question, lambda phase, mine=mine: put({**mine, "phase": phase}))})


def _questions(read: BinaryIO) -> Iterator[dict[str, Any]]:
    while line := read.readline():
        yield json.loads(line)


def descriptors(arguments: Sequence[str]) -> tuple[BinaryIO, BinaryIO]:
    """The pipes of a child from its command line; nothing that it starts inherits them.

    The child ends with its parent from here on, where the system can do that.
    """
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--read-fd", type=int, required=True)
    parser.add_argument("--write-fd", type=int, required=True)
    options, _ = parser.parse_known_args(arguments)
    for descriptor in (options.read_fd, options.write_fd):
        os.set_inheritable(descriptor, False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    return os.fdopen(options.read_fd, "rb"), os.fdopen(options.write_fd, "wb")
