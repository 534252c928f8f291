"""How a plan of plans gets to a GPU: by the extension module where it has the kernel, else by NVRTC and cupy.

Both launch the same kernel of the same sources on torch's current stream. `standing_in` puts a machine in the place of
both, such as the simulator of the tests.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...observer import observer
from . import extension, nvrtc
from .plans import SHARED_BYTES, Launch, Target

Run = Callable[[Launch, dict[str, Tensor | None]], object]
ALIGNMENT = 16
_ORDINARY_SHARED = 48 << 10  # a kernel has to ask for more

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
    return {"extension": extension.refuse(arch), "NVRTC": nvrtc.refuse(arch) or _cupy()[1]}


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


@functools.lru_cache(maxsize=1)
def _cupy() -> tuple[Any, str | None]:
    """cupy, or why it is not there."""
    try:
        import cupy
    except ImportError as error:
        return None, f"cupy, which loads what NVRTC compiles, cannot be imported ({error}): pip install cupy-cuda13x"
    return cupy, None


class Kernel:
    """A plan bound to a device: `kernel(x=..., y=..., ...)` launches it on the current stream.

    Its tensors are dense, on that device, 16-byte aligned, and None where the plan passes null. The first launch loads
    the kernel, compiled now where it has to be.

    A launch raises `nvrtc.CompileError` with the compiler's message, ValueError for a tensor that is not aligned,
    and RuntimeError where no way leads to the kernel or CUDA reports an error.
    """

    def __init__(self, launch: Launch, device: torch.device):
        self.launch, self.device = launch, device
        self._start: Callable[[list[int | float], int], None] | None = None

    def __call__(self, **tensors: Tensor | None) -> None:
        told = observer.get()
        if told is not None:
            title = f"{self.launch.source.partition('.')[0]}.{self.launch.kernel.partition('<')[0]}"
            if not told.launch(title, tensors):
                return
        stand_in = _stand_in.get()
        if stand_in is not None:
            stand_in[0](self.launch, tensors)
            return
        if self._start is None:
            self._start = self._loaded()
        self._start(values(self.launch, tensors), torch.cuda.current_stream(self.device).cuda_stream)

    def _loaded(self) -> Callable[[list[int | float], int], None]:
        arch, index = architecture(str(self.device)), self.device.index
        way, reason = _way(self.launch, arch)
        if reason is not None:
            raise RuntimeError(f"{self.launch.kernel}: {reason}")
        return _by_extension(self.launch, index) if way == "extension" else _by_cupy(self.launch, index, arch)


@functools.lru_cache(maxsize=4096)
def kernel(launch: Launch, device: torch.device) -> Kernel:
    """A plan bound to a device, loaded once for all who launch it."""
    return Kernel(launch, device)


def values(launch: Launch, tensors: dict[str, Tensor | None]) -> list[int | float]:
    """The arguments of a launch, tensors as their addresses. Raises ValueError for one that is not aligned."""
    found: list[int | float] = []
    for argument in launch.arguments:
        if isinstance(argument, str):
            tensor = tensors[argument]
            argument = 0 if tensor is None else tensor.data_ptr()
            if argument % ALIGNMENT:
                raise ValueError(f"{launch.kernel}: the tensor {launch.arguments[len(found)]!r} is not 16-byte aligned")
        found.append(argument)
    return found


def _formats(launch: Launch, address: Any, integer: Any, number: Any) -> list[Any]:
    """One of three for each argument, by its type."""
    return [address if isinstance(a, str) else number if isinstance(a, float) else integer for a in launch.arguments]


def _by_extension(launch: Launch, index: int) -> Callable[[list[int | float], int], None]:
    start, slots = extension.module().launch, struct.Struct("=" + "".join(_formats(launch, "Q", "i4x", "f4x")))
    facts = (launch.kernel, index, launch.grid, launch.threads, launch.shared)
    return lambda arguments, stream: start(*facts, stream, slots.pack(*arguments))


def _by_cupy(launch: Launch, index: int, arch: int) -> Callable[[list[int | float], int], None]:
    import numpy

    function, cupy = _loaded(launch.source, launch.kernel, launch.shared, index, arch), _cupy()[0]
    types = _formats(launch, numpy.uint64, numpy.int32, numpy.float32)
    block = (launch.threads, 1, 1)

    def start(arguments: list[int | float], stream: int) -> None:
        given = tuple(kind(argument) for kind, argument in zip(types, arguments, strict=True))
        function(launch.grid, block, given, launch.shared, cupy.cuda.ExternalStream(stream, index))

    return start


@functools.lru_cache(maxsize=1024)
def _loaded(source: str, kernel: str, shared: int, index: int, arch: int) -> Any:
    """A kernel's function on a device; cupy's function keeps its module."""
    compiled, cupy = nvrtc.compiled(source, kernel, arch), _cupy()[0]
    with cupy.cuda.Device(index):
        loaded = cupy.cuda.Module()
        loaded.load(compiled.cubin)
        function = loaded.get_function(compiled.name)
        if shared > _ORDINARY_SHARED:
            limit = cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            cupy.cuda.driver.funcSetAttribute(function.ptr, limit, shared)
    return function
