"""The simulator in the place of a GPU: inside `with simulated():` the backend `cuda` computes on the CPU."""

import shutil
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from regnet_fast.backends.cuda import launcher
from regnet_fast.backends.cuda.plans import Launch, Target

from . import machine

GRADIENTS, RESULTS = ("dx", "sums", "parts"), ("y", "parts", "moments")
WRITTEN = {
    "grouped_conv_forward.cu": RESULTS,
    "depthwise_conv_forward.cu": RESULTS,
    "grouped_conv_backward.cu": GRADIENTS,
    "depthwise_conv_backward.cu": GRADIENTS,
    "ordered_sum.cu": ("dweight",),
    "merged_moments.cu": ("mean", "var"),
    "squeeze_excite.cu": ("hidden", "gate"),
}
TARGET = Target(90, 3)


def simulate(launch: Launch, tensors: dict[str, Tensor | None]) -> None:
    """Run a launch on the CPU; what none of the launches for a tensor writes stays NaN."""
    if shutil.which(machine.COMPILER) is None:
        pytest.skip("the simulator needs a C++ compiler")
    outputs = {name: t for name, t in tensors.items() if name in WRITTEN[launch.source]}
    for tensor in outputs.values():
        if tensor is not None and not hasattr(tensor, "spoilt"):
            tensor.fill_(torch.nan).spoilt = True
    machine.run(launch, {name: t for name, t in tensors.items() if name not in outputs}, outputs)


def simulated(target: Target = TARGET) -> AbstractContextManager:
    """Every launch runs in the simulator, planned for a machine that stands for every device."""
    return launcher.standing_in(simulate, target)
