"""What `regnet_fast.inspect.tuner` finds in its process: two kernels in place of a model, few configurations, an
invented clock, and the fault that TUNING_FAULT names.
"""

import ctypes
import os
import sys
import time

import torch

from regnet_fast.kernels import norm_act, squeeze_excite, tables

squeeze_excite.CONFIGS = squeeze_excite.Config(16, 32, 16, 4, True), squeeze_excite.Config(16, 32, 32, 4, False)
norm_act.CONFIGS = norm_act.Config(8, 32, 4), norm_act.Config(16, 32, 4)
FAST = {squeeze_excite.CONFIGS[1], norm_act.CONFIGS[1]}
FAULT = os.environ["TUNING_FAULT"]
PROGRAM = sys.modules["__main__"]


def model(x):
    if FAULT == "model":
        os.abort()
    weights = torch.randn(8, 16), torch.randn(8), torch.randn(16, 8), torch.randn(16)
    squeeze_excite.squeeze_excite(torch.randn(2, 1, 16), *weights, activation="relu", dtype=torch.float32)
    norm_act.norm_act(x, torch.randn(16), torch.randn(16))


def built(subject):
    return model, torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)


def clock(device):
    return lambda calls, rounds: [[5.0 if call.args[0] in FAST else 10.0] * rounds for call in calls]


def failed(run, config, expected):
    if config == squeeze_excite.CONFIGS[1]:
        if FAULT == "crash":
            ctypes.string_at(0)
        if FAULT == "hang":
            time.sleep(600)
        if FAULT == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nand more")
    return right(run, config, expected)


def default(kernel, shape, device):
    if FAULT == "heuristic" and kernel is squeeze_excite and "_measure" in sys._getframe(1).f_code.co_name:
        os.abort()
    return usual(kernel, shape, device)


if hasattr(PROGRAM, "Tuner"):  # the process that measures
    right, usual = PROGRAM._failed, tables.default
    PROGRAM._failed, PROGRAM.timer, PROGRAM.Subject.built, tables.default = failed, clock, built, default
