"""The simulator behind a stand-in for the CUDA driver: the package's own launching code runs on a CPU.

Inside `with driven():` tensors of the CPU stand for those of a GPU, and nothing is replaced between the backend `cuda`
and the calls of the driver: how a kernel is found, loaded and granted shared memory, what it is given, on which stream.
The host's compiler stands for NVRTC.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from regnet_fast.backends.cuda import driver, extension, launcher, nvrtc
from regnet_fast.backends.cuda.plans import SHARED_BYTES, Target
from regnet_fast.observer import observing

from . import machine
from .stand_in import TARGET, WRITTEN

STREAM = 4096
"""The handle of the current stream of device 0; that of device 1 is the next one."""


@functools.cache
def _path() -> Path:
    source = machine.HERE / "driver.cpp"
    command = [machine.COMPILER, *machine.FLAGS, "-shared", str(source), "-ldl", "-o"]
    return machine.built(".so", source.read_text(), lambda out: [*command, out])


class StandIn:
    """The driver's library as the tests see it."""

    def __init__(self):
        self.library = ctypes.CDLL(str(_path()))
        self.library.stand_in_calls.restype = ctypes.c_char_p

    def refuse(self, call: str, code: int) -> None:
        """Let the next call of a name fail."""
        self.library.stand_in_refuse(call.encode(), code)

    @property
    def calls(self) -> list[str]:
        """What was called: a name, and facts behind it."""
        return self.library.stand_in_calls().decode().splitlines()

    def watch(self, name: str, tensors: dict[str, Tensor | None]) -> bool:
        """Let the next launch of this thread reach the tensors it names, and no more; what it is to write starts as
        NaN.
        """
        written = WRITTEN[f"{name.partition('.')[0]}.cu"]
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for key in written:
            if key in given and not hasattr(given[key], "spoilt"):
                given[key].fill_(torch.nan).spoilt = True
        buffers = [
            machine.Buffer(tensor.data_ptr(), tensor.numel() * tensor.element_size(), key in written, key.encode())
            for key, tensor in given.items()
        ]
        self.library.stand_in_watch((machine.Buffer * len(buffers))(*buffers), len(buffers))
        return True


def _compiled(source: str, kernel: str, arch: int) -> nvrtc.Compiled:
    """As `nvrtc.compiled`, with the path of a library of the simulator for machine code."""
    return nvrtc.Compiled(kernel, str(machine.library_path(machine.flattened(source), kernel)).encode())


@contextmanager
def driven(target: Target = TARGET) -> Iterator[StandIn]:
    """Every launch goes through the launching code to the stand-in driver."""
    stand_in = StandIn()
    stand_in.library.stand_in_reset(SHARED_BYTES[target.arch])
    caches = driver.library, driver.version, driver._context, launcher._function, launcher.kernel, extension.kernels
    properties = SimpleNamespace(multi_processor_count=target.processors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "LIBRARY", str(_path()))
        patch.setattr(nvrtc, "compiled", _compiled)
        patch.setattr(nvrtc, "refuse", lambda arch=None: None)
        patch.setattr(extension, "FOLDER", machine.HERE)
        patch.setattr(launcher, "refuse_device", lambda device: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(target.arch, 10))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
        for cache in caches:
            cache.cache_clear()
        try:
            with observing(launch=stand_in.watch):
                yield stand_in
        finally:
            for cache in caches:
                cache.cache_clear()
