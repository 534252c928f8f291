"""The CUDA driver through its C interface: it loads machine code and launches kernels, in torch's own contexts.

The library comes with a GPU's driver and torch has loaded it: nothing else has to be installed.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence

import torch

LIBRARY = "libcuda.so.1"
ORDINARY_SHARED = 48 << 10  # a function has to ask for more
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ARGUMENTS = {
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuLaunchKernel": (ctypes.c_void_p, *(ctypes.c_uint,) * 7, *(ctypes.c_void_p,) * 3),
}
"""Types of what is called with plain integers; they are addresses of 64 bits in part."""

Start = Callable[[Sequence[int | float], int], None]
"""`start(arguments, stream)`: tensors as their addresses, and a stream's handle."""

_asking = threading.Lock()


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The driver's library, or None where there is none."""
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    for name, types in _ARGUMENTS.items():
        getattr(found, name).argtypes = types
    return found


def refuse() -> str | None:
    """Why nothing can be launched, or None."""
    if library() is None:
        return f"the CUDA driver, {LIBRARY}, was not found"
    needed = torch.version.cuda.partition(".")[0]
    if int(version().partition(".")[0]) < int(needed):
        return (
            f"the driver is of CUDA {version()} and loads no machine code of CUDA {needed}, torch's: update the driver"
        )
    return None


@functools.lru_cache(maxsize=1)
def version() -> str:
    """The newest version of CUDA that the driver serves, such as "13.0"."""
    found = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(found))
    return f"{found.value // 1000}.{found.value % 1000 // 10}"


def _call(name: str, *arguments: object) -> None:
    _check(name, getattr(library(), name)(*arguments))


def _check(what: str, code: int) -> None:
    """Raise RuntimeError with the driver's words where a code is an error's."""
    if code:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        library().cuGetErrorName(code, ctypes.byref(name))
        library().cuGetErrorString(code, ctypes.byref(text))
        words = [found.value.decode() for found in (name, text) if found.value]
        raise RuntimeError(": ".join((what, *words)) if words else f"{what}: error {code}")


@functools.lru_cache(maxsize=64)
def _context(index: int) -> ctypes.c_void_p:
    """A device's primary context, which is torch's."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


class Function:
    """A kernel of some machine code, loaded on a device, where it stays; `title` is what errors call it.

    Raises RuntimeError with the driver's words where it cannot be loaded.
    """

    def __init__(self, title: str, code: bytes, name: str, index: int):
        self.title, self.context = title, _context(index)
        self._handle, module = ctypes.c_void_p(), ctypes.c_void_p()
        self._allowed = ORDINARY_SHARED
        _call("cuCtxSetCurrent", self.context)
        _call("cuModuleLoadData", ctypes.byref(module), code)
        _call("cuModuleGetFunction", ctypes.byref(self._handle), module, name.encode())

    def _allow(self, shared: int) -> None:
        """Ask once for as much dynamic shared memory as any launch takes: a later question for less would count."""
        with _asking:
            if shared > self._allowed:
                code = library().cuFuncSetAttribute(self._handle, _DYNAMIC_SHARED, shared)
                _check(f"{self.title}: {shared} bytes of shared memory", code)
                self._allowed = shared

    def bound(self, grid: tuple[int, int, int], threads: int, shared: int, slots: struct.Struct) -> Start:
        """Its launch with arguments that `slots` packs into eight bytes each, on a stream of its device.

        The device is the current one; a thread that has no context gets its own. Any number of threads may launch.
        """
        self._allow(shared)
        launch, enter, context = library().cuLaunchKernel, library().cuCtxSetCurrent, self.context
        title, facts = self.title, (self._handle, *grid, threads, 1, 1, shared)
        free: list[tuple[ctypes.Array, ctypes.Array]] = []  # one for each thread that launches at the same time

        def start(arguments: Sequence[int | float], stream: int) -> None:
            try:
                buffer, places = taken = free.pop()
            except IndexError:
                buffer, places = taken = _places(slots.size // 8)
            slots.pack_into(buffer, 0, *arguments)
            code = enter(context) or launch(*facts, stream, places, None)
            free.append(taken)
            _check(title, code)

        return start


def _places(count: int) -> tuple[ctypes.Array, ctypes.Array]:
    """Room for so many arguments, and the address of each."""
    buffer = (ctypes.c_uint64 * count)()
    first = ctypes.addressof(buffer)
    return buffer, (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
