"""A process that answers as its questions name it, in place of a GPU's: without torch, so that it starts at once."""

import ctypes
import os
import runpy
import signal
import sys
import time
from pathlib import Path

PROCESS = runpy.run_path(str(Path(__file__).parents[2] / "regnet_fast" / "trials" / "process.py"))
MACHINE = {
    "conditions": {"device": "cuda", "machine": "Test GPU", "torch": "2.11", "commit": None, "sources": "1234"},
    "ceilings": {"bytes_per_s": 1e12, "launch_s": 1e-6, "flops_per_s": {"bfloat16": 1e14}, "measured_by": {}},
}


def dies_later(say):
    import threading

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSEGV)).start()
    return {}


def chatters(say):
    """Always about to be done."""
    for i in range(100):
        say(f"work: {i}")
        time.sleep(0.05)


DEEDS = {
    "answer": lambda say: {"pid": os.getpid()},
    "machine": lambda say: MACHINE,
    "where": lambda say: {"path": os.environ["PYTHONPATH"], "said": os.environ.get("SAID")},
    "hang": lambda say: time.sleep(600),
    "chatter": chatters,
    "crash": lambda say: ctypes.string_at(0),
    "exit": lambda say: os._exit(3),
    "die later": dies_later,
    "print": lambda say: print('{"id": 1, "status": "wrong"}\n' * 50, flush=True) or {},
    "garbage": lambda say: os.write(WRITE.fileno(), b"\x00\xffgarbage\n") and time.sleep(600),
}


def answer(question, say):
    say("work")
    return {"status": "answered", **DEEDS[question["do"]](say)}


if __name__ == "__main__":
    READ, WRITE = PROCESS["descriptors"](sys.argv[1:])
    PROCESS["serve"](READ, WRITE, answer)
