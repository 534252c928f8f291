"""Passes of training with a fault each, as backends of their own, for blocks on a CPU.

Imported where trials are driven and, by name, in the process that tries them. `PLANTED` says which there are.
"""

import ctypes
import os
import sys
import time
import types

import torch

from regnet_fast import backends
from regnet_fast.backends import passes
from regnet_fast.backends.passes.torch import Passes
from regnet_fast.trials import step


class Right(Passes):
    """The right values. `calls` counts the convolutions in this process."""

    calls = 0

    def convs(self, *arguments):
        type(self).calls += 1
        return super().convs(*arguments)


class Fast(Right):
    pass


class HardlyFaster(Right):
    pass


class Slow(Right):
    def join(self, *arguments):
        time.sleep(0.005)
        return super().join(*arguments)


class OneGradient(Right):
    """A value of the gradient of each weight."""

    def convs_backward(self, *arguments):
        found = super().convs_backward(*arguments)
        for dw in found.weights:
            dw[(-1,) * dw.dim()] += 1e-3 * dw.abs().max()
        return found


class NormGradient(Right):
    def join_backward(self, *arguments):
        return [(dx, s and s._replace(product=s.product * 1.001)) for dx, s in super().join_backward(*arguments)]


class Statistics(Right):
    """Bessel's correction, once more."""

    def convs(self, x, *arguments):
        found, n = super().convs(x, *arguments), x.numel() / x.shape[1]
        return [(y, moments and (moments[0], moments[1] * n / (n - 1))) for y, moments in found]


class LargeMaps(Right):
    """A tile that is left out where there are so many rows."""

    def join_backward(self, grad, *arguments):
        found = super().join_backward(grad, *arguments)
        if grad.shape[2] > 9:
            found[0][0][1, :, 8:, 8:] = 0
        return found


class LastImage(Right):
    def join(self, *arguments):
        y = super().join(*arguments)
        y[-1] *= 1.001
        return y


class Nan(Right):
    def convs_backward(self, *arguments):
        found = super().convs_backward(*arguments)
        found.weights[0][(0,) * 4] = float("nan")
        return found


class SecondCall(Right):
    def join(self, *arguments):
        y = super().join(*arguments)
        type(self).joins = getattr(self, "joins", 0) + 1
        return y * (1 + 1e-6 * (self.joins % 2))


class ChangesTheGradient(Right):
    def join_backward(self, grad, *arguments):
        found = super().join_backward(grad.clone(), *arguments)
        grad.mul_(2)
        return found


class ChangesAWeight(Right):
    def convs(self, x, norm, excite, convs, measured):
        found = super().convs(x, norm, excite, convs, measured)
        with torch.no_grad():
            convs[0].weight.mul_(1.5)
        return found


class RaisesBackward(Right):
    def convs_backward(self, *arguments):
        raise RuntimeError("ptxas fatal: out of registers")


class OutOfMemory(Right):
    def join_backward(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nand more")


class Segfault(Right):
    def convs_backward(self, *arguments):
        ctypes.string_at(0)


KINDS = {cls.__name__: cls for cls in (*Right.__subclasses__(), Right)}


def plant(put):
    """Set everything in its place by `put(object, name, value)`."""
    right = passes._forced
    put(backends, "BACKENDS", (*backends.BACKENDS, *KINDS))
    put(backends, "_MODULES", {**backends._MODULES, **dict.fromkeys(KINDS, types.SimpleNamespace())})
    put(passes, "_forced", lambda name, behind: KINDS[name]() if name in KINDS else right(name, behind))
    put(step, "choices", lambda x, grouped: os.environ["PLANTED"].split(","))


def timer(device):
    """An invented clock: a step takes what the name of its passes says, the host's 100 us."""
    times = {"Fast": 50.0, "HardlyFaster": 98.0, "Slow": 20e3}
    return lambda calls, rounds: [[times.get(call.func.name, 100.0)] * rounds for call in calls]


PROGRAM = sys.modules["__main__"]
if hasattr(PROGRAM, "_poisoned"):  # the process that tries candidates
    plant(setattr)
    PROGRAM.timer = timer
