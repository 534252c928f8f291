"""A child that does what its questions name, in place of trying kernels: without torch, so that it starts at once."""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

PROCESS = runpy.run_path(str(Path(__file__).parents[2] / "regnet_fast" / "trials" / "process.py"))


def leave_behind(say):
    """A process of its own that holds every descriptor it can, and outlives the child that started it."""
    held = subprocess.Popen(["sleep", "600"])
    return {"pid": held.pid}


def dies_later(say):
    """Answers well, and then a signal of a thread ends it."""
    import threading

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSEGV)).start()
    return {}


def shout(say):
    print('{"id": 1, "status": "ok", "forged": true}' * 50, flush=True)
    print("garbage", file=sys.stderr, flush=True)
    return {}


def close_pipe(say):
    os.closerange(3, 256)
    time.sleep(600)


def phases(say):
    say("compile")
    say("verify")
    return {}


def chatter(say):
    """Always in a phase that has just begun."""
    for _ in range(200):
        say("verify")
        time.sleep(0.05)
    return {}


def unknown_phase(say):
    say("dance")
    time.sleep(600)


DEEDS = {
    "answer": lambda say: {},
    "phases": phases,
    "raise": lambda say: 1 / 0,
    "segfault": lambda say: ctypes.string_at(0),
    "abort": lambda say: os.abort(),
    "exit": lambda say: os._exit(0),
    "exit 3": lambda say: os._exit(3),
    "killed": lambda say: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda say: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": lambda say: [None for _ in iter(int, 1)],
    "hang in C": lambda say: ctypes.PyDLL(None).sleep(600),
    "die later": dies_later,
    "leave behind": leave_behind,
    "shout": shout,
    "close pipe": close_pipe,
    "chatter": chatter,
    "unknown phase": unknown_phase,
    "nonsense": lambda say: os.write(WRITE.fileno(), b"\x00\xffnonsense\n") and time.sleep(600),
    "a list": lambda say: os.write(WRITE.fileno(), b"[1, 2]\n") and time.sleep(600),
    "no end": lambda say: [os.write(WRITE.fileno(), b"x" * 65536) for _ in iter(int, 1)],
    "another's answer": lambda say: {"id": 99},
}


def answer(question, say):
    return {"status": "ok", **DEEDS[question["do"]](say)}


if __name__ == "__main__":
    if "broken" in sys.argv:
        raise ImportError("no such library")
    if "slow" in sys.argv:
        time.sleep(600)
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    READ, WRITE = PROCESS["descriptors"](sys.argv[1:])
    PROCESS["serve"](READ, WRITE, answer)
