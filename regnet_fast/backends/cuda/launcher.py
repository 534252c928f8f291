"""How a plan of plans gets to a GPU: by the extension module where it has the kernel, else by NVRTC and the driver.

Both launch the same kernel of the same sources on torch's current stream. `standing_in` puts a machine in the place of
both, such as the simulator of the tests.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ...observer import observer
from . import driver, extension, nvrtc
from .plans import SHARED_BYTES, Launch, Target

Run = Callable[[Launch, dict[str, Tensor | None]], object]
ALIGNMENT = 16

_SLOTS = {str: "Q", int: "i4x", float: "f4x"}
"""Eight bytes for each argument, by its type in a plan."""

_stand_in: ContextVar[tuple[Run, Target] | None] = ContextVar("regnet_fast_cuda_machine", default=None)


@contextmanager
def standing_in(run: Run, target: Target) -> Iterator[None]:
    """Call `run(launch, tensors)` instead of each launch inside the `with` block, in this thread or task alone.

    It stands for the target on every device, also where there is no GPU.
    """
    token = _stand_in.set((run, target))
    try:
        yield
    finally:
        _stand_in.reset(token)


def _imagined() -> Target | None:
    stand_in = _stand_in.get()
    return stand_in and stand_in[1]


def refuse_device(device: str) -> str | None:
    """Why nothing can be launched on a device, or None."""
    if _imagined() is not None:
        return None
    if device.partition(":")[0] != "cuda":
        return "the CUDA C++ kernels run on an NVIDIA GPU"
    if torch.version.hip is not None:
        return "this build of torch is for ROCm, which the kernels were not made for"
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if architecture(device) < 80:
        return "the kernels need a GPU of compute capability 8.0 or newer"
    return None


def architecture(device: str) -> int:
    """The compute capability of a GPU, times ten."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def target(device: str) -> Target:
    """The machine to plan for: the nearest known architecture that is not newer, and how many processors there are."""
    imagined = _imagined()
    if imagined is not None:
        return imagined
    arch = max(known for known in SHARED_BYTES if known <= architecture(device))
    return Target(arch, torch.cuda.get_device_properties(device).multi_processor_count)


def ways(arch: int | None = None) -> dict[str, str | None]:
    """Both ways in the order in which they are tried, each with the reason why it cannot be taken, or None."""
    return {"extension": extension.refuse(arch), "NVRTC": nvrtc.refuse(arch) or driver.refuse()}


def way(launch: Launch, device: str) -> str:
    """Which way a plan goes on a device: "extension", "NVRTC", or "stand-in"."""
    return "stand-in" if _imagined() is not None else _way(launch, architecture(device))[0]


def refuse(launch: Launch, device: str) -> str | None:
    """Why a plan cannot be launched on a device that nothing is said against, or None."""
    return None if _imagined() is not None else _way(launch, architecture(device))[1]


def _way(launch: Launch, arch: int) -> tuple[str, str | None]:
    """The way to a kernel, and why there is none."""
    refused = ways(arch)
    if refused["extension"] is None:
        if launch.kernel in extension.kernels():
            return "extension", None
        refused["extension"] = f"the extension module was built without {launch.kernel}"
    reason = "; ".join(f"{way}: {reason}" for way, reason in refused.items())
    return "NVRTC", refused["NVRTC"] and f"there is no way to the kernel: {reason}"


class Kernel:
    """A plan bound to a device: `kernel(x=..., y=..., ...)` launches it on the current stream.

    Its tensors are dense, on that device, 16-byte aligned, and None where the plan passes null. The first launch loads
    the kernel, compiled now where it has to be.

    A launch raises `nvrtc.CompileError` with the compiler's message, ValueError for a tensor that is not aligned,
    and RuntimeError where no way leads to the kernel or CUDA reports an error.
    """

    def __init__(self, launch: Launch, device: torch.device):
        self.launch, self._index = launch, device.index or 0  # what stands in for a GPU has none: it is the first
        self._names = [argument for argument in launch.arguments if isinstance(argument, str)]
        self._numbers = list(launch.arguments[len(self._names) :])
        self._start: driver.Start | None = None

    def __call__(self, **tensors: Tensor | None) -> None:
        told = observer.get()
        if told is not None:
            title = f"{self.launch.source.partition('.')[0]}.{self.launch.kernel.partition('<')[0]}"
            if not told.launch(title, tensors):
                return
        stand_in = _stand_in.get()
        if stand_in is not None:
            stand_in[0](self.launch, tensors)
        elif torch.cuda.current_device() == self._index:
            self._launched(tensors)
        else:
            with torch.cuda.device(self._index):
                self._launched(tensors)

    def _launched(self, tensors: dict[str, Tensor | None]) -> None:
        if self._start is None:
            self._start = _started(self.launch, self._index)
        addresses = [0 if (tensor := tensors[name]) is None else tensor.data_ptr() for name in self._names]
        if functools.reduce(operator.or_, addresses) % ALIGNMENT:
            name = next(name for name, at in zip(self._names, addresses, strict=True) if at % ALIGNMENT)
            raise ValueError(f"{self.launch.kernel}: the tensor {name!r} is not {ALIGNMENT}-byte aligned")
        self._start(addresses + self._numbers, torch._C._cuda_getCurrentRawStream(self._index))


@functools.lru_cache(maxsize=4096)
def kernel(launch: Launch, device: torch.device) -> Kernel:
    """A plan bound to a device, loaded once for all who launch it."""
    return Kernel(launch, device)


def _started(launch: Launch, index: int) -> driver.Start:
    """How a plan is launched on a device, the current one."""
    arch = architecture(f"cuda:{index}")
    way, reason = _way(launch, arch)
    if reason is not None:
        raise RuntimeError(f"{launch.kernel}: {reason}")
    slots = struct.Struct("=" + "".join(_SLOTS[type(argument)] for argument in launch.arguments))
    if way == "extension":
        start, facts = extension.module().launch, (launch.kernel, index, launch.grid, launch.threads, launch.shared)
        return lambda arguments, stream: start(*facts, stream, slots.pack(*arguments))
    return _function(launch.source, launch.kernel, index, arch).bound(launch.grid, launch.threads, launch.shared, slots)


@functools.lru_cache(maxsize=1024)
def _function(source: str, kernel: str, index: int, arch: int) -> driver.Function:
    compiled = nvrtc.compiled(source, kernel, arch)
    try:
        return driver.Function(kernel, compiled.cubin, compiled.name, index)
    except RuntimeError as error:
        made = f"what NVRTC {nvrtc.version()} made for sm_{arch}"
        raise RuntimeError(
            f"{kernel}: the driver, of CUDA {driver.version()}, does not load {made}: {error}"
        ) from error
