"""Candidates with a fault each, in the place of the backend `cuda`, for convolutions on a CPU.

Imported where trials are driven and, by name, in the process that tries them. `PLANTED` says which there are.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import types

import torch

from regnet_fast import backends
from regnet_fast.backends import reference
from regnet_fast.backends.problem import Run
from regnet_fast.settings import settings
from regnet_fast.trials import process

LABEL = "planted"


def refuse(problem):
    if not isinstance(problem, backends.ConvProblem | backends.PairProblem):
        return "planted for convolutions alone"
    return None if problem.device == "cpu" else "planted on a CPU alone"


def variants(problem):
    return tuple(os.environ["PLANTED"].split(","))


class Plain(Run):
    """The right values."""

    label = "planted"

    def __init__(self, problem, weight, bias):
        self.problem, self.weight, self.bias, self.calls = problem, weight, bias, 0
        self.right = reference.prepare_conv(problem, weight, bias)

    def __call__(self, x, gate, residual, consume, into_residual):
        self.calls += 1
        return self.changed(self.right(x, gate, residual, consume, into_residual), x)

    def changed(self, y, x):
        return y


class Segfault(Plain):
    def changed(self, y, x):
        ctypes.string_at(0)


class Abort(Plain):
    def changed(self, y, x):
        os.abort()


class Exit(Plain):
    def changed(self, y, x):
        os._exit(0)


class DiesLater(Plain):
    """Answers, and crashes before the next question is read."""

    def changed(self, y, x):
        process.json = types.SimpleNamespace(dumps=process.json.dumps, loads=lambda line: ctypes.string_at(0))
        return y


class Stops(Plain):
    def changed(self, y, x):
        os.kill(os.getpid(), signal.SIGSTOP)
        return y


class Loops(Plain):
    def changed(self, y, x):
        while True:
            pass


class HangsInC(Plain):
    def changed(self, y, x):
        ctypes.PyDLL(None).sleep(600)


class LeavesAChild(Plain):
    def changed(self, y, x):
        if self.calls == 1:
            subprocess.Popen(["sleep", "600"])
        return y


class OneValue(Plain):
    def changed(self, y, x):
        y = y.clone()
        y[0, 0, 1, 1] = y[0, 0, 1, 1] * 1.01 + 0.01
        return y


class MiddleImage(Plain):
    def changed(self, y, x):
        y = y.clone()
        if y.shape[0] > 2:
            y[1, 0, 1, 1] += 0.05
        return y


class NanAtTheBorder(Plain):
    def changed(self, y, x):
        y = y.clone()
        y[-1, -1, -1, -1] = float("nan")
        return y


class OddSizes(Plain):
    """Wrong where a tile of eight rows hangs over."""

    def changed(self, y, x):
        y = y.clone()
        whole = y.shape[2] // 8 * 8
        y[:, :, whole:] = 0
        return y


class SecondCall(Plain):
    def changed(self, y, x):
        return y if self.calls % 2 else y * 1.5


class AnotherThread(Plain):
    def changed(self, y, x):
        return y if threading.current_thread() is threading.main_thread() else y + 1


class Unwritten(Plain):
    def changed(self, y, x):
        found = torch.full_like(y, float("nan"))  # as fresh memory that was poisoned
        found[:, :, :-1] = y[:, :, :-1]
        return found


class WritesBeside(Plain):
    def changed(self, y, x):
        x.as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(1.0)
        return y


class ChangesAnInput(Plain):
    def changed(self, y, x):
        x[0, 0, 0, 0] = 7.0
        return y


class NotBitEqual(Plain):
    def changed(self, y, x):
        return y * (1 + 1e-7 * (self.calls % 5))


class Sticky(Plain):
    """An error after which nothing works in that process, as of a GPU's context."""

    def changed(self, y, x):
        PROGRAM._poisoned = lambda problem: True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class OutOfMemory(Plain):
    def changed(self, y, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nand more")


class Garbage(Plain):
    def changed(self, y, x):
        print('{"id": 1, "status": "verified"}' * 9, flush=True)
        os.write(2, b"\xff\x00garbage\n")
        return y


class CompileError(Plain):
    def changed(self, y, x):
        raise RuntimeError("ptxas fatal: out of registers")


class TellsSettings(Plain):
    def changed(self, y, x):
        raise RuntimeError(str(settings()))


class Slow(Plain):
    def changed(self, y, x):
        time.sleep(0.02)
        return y


class HardlyFaster(Plain):
    pass


class Fast(Plain):
    pass


class Parts(Plain):
    """The means on the way, in parts: one of each row."""

    factor = 1.0

    def with_parts(self, x):
        y = self(x, None, None, False, False)
        return y, y.float().sum(3).transpose(1, 2) * (self.factor / (y.shape[2] * y.shape[3]))


class WrongMeans(Plain):
    factor, with_parts = 1.01, Parts.with_parts


class MapWrongWithMeans(Plain):
    """Right by itself, but not where the means are computed on the way."""

    def with_parts(self, x):
        y, means = self.with_parts_of(x)
        return OneValue.changed(self, y, x), means

    factor, with_parts_of = 1.0, Parts.with_parts


FAULTS = {cls.__name__: cls for cls in (Plain, *Plain.__subclasses__())}


def prepare_conv(problem, weight, bias, variant):
    return FAULTS[variant](problem, weight, bias)


class Pair(Run):
    label = "planted"

    def __init__(self, problem, *weights):
        self.right = reference.prepare_pair(problem, *weights)

    def __call__(self, x):
        y, other = self.right(x)
        return y, self.changed(other)

    def changed(self, other):
        return other


class FastPair(Pair):
    pass


class WrongOther(Pair):
    """Wrong in the last column of the second result."""

    def changed(self, other):
        other = other.clone()
        other[..., -1] += 0.1
        return other


class OtherUnwritten(Pair):
    def changed(self, other):
        return torch.full_like(other, float("nan"))


class OtherInTheMiddle(Pair):
    def changed(self, other):
        other = other.clone()
        other[1:-1] += 0.1
        return other


class OneAlone(Pair):
    def __call__(self, x):
        return super().__call__(x)[:1]


PAIRS = {cls.__name__: cls for cls in (Pair, *Pair.__subclasses__())}


def prepare_pair(problem, *weights, variant):
    return PAIRS[variant](problem, *weights)


def _timer(device):
    """An invented clock: a call takes what its class says, the peer 100 us."""
    times = {"Fast": 50.0, "FastPair": 50.0, "HardlyFaster": 98.0, "Slow": 20e3}
    with_means = {"Parts": 60.0, "Fast": 100.0, "WrongMeans": 10.0, "MapWrongWithMeans": 10.0}

    def timed(calls, rounds):
        runs = [(call.func, times) for call in calls]
        runs = [(run.__self__, with_means) if hasattr(run, "__self__") else (run, known) for run, known in runs]
        return [[known.get(type(run).__name__, 100.0)] * rounds for run, known in runs]

    return timed


PROGRAM = sys.modules["__main__"]
if hasattr(PROGRAM, "_poisoned"):  # the process that tries candidates
    backends._MODULES["cuda"] = sys.modules[__name__]
    PROGRAM.timer = _timer
