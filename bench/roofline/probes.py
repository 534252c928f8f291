"""probes.cpp compiled for this machine's processor: products in registers, a stream through memory, on all threads."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from regnet_fast.backends import cpu_library

_SOURCE = Path(__file__).with_suffix(".cpp")
_FUNCTIONS = {
    "multiply_adds": ((c_int64, c_int, c_float, c_float, POINTER(c_float)), c_double),
    "pair_products": ((c_int64, c_int, c_uint32, c_uint32, POINTER(c_float)), c_double),
    "triad": ((c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int), None),
}
_ONES = 0x3F803F80  # two in bfloat16


class ProbesError(RuntimeError):
    """probes.cpp cannot be compiled or loaded here; the message says why."""


class Probes:
    """The compiled functions. Raises ProbesError where there are none."""

    def __init__(self) -> None:
        self._library = _library()

    def multiply_adds(self, rounds: int) -> float:
        """So many rounds of fused multiply-adds in float32; how many operations that is."""
        return self._library.multiply_adds(rounds, torch.get_num_threads(), 0.5, 0.5, byref(c_float()))

    def pair_products(self, rounds: int) -> float:
        """So many rounds of products of pairs in bfloat16; how many operations that is, 0 where the CPU has none."""
        return self._library.pair_products(rounds, torch.get_num_threads(), _ONES, _ONES, byref(c_float()))

    def triad(self, y: Tensor, a: Tensor, b: Tensor) -> None:
        """y = a + 2 b, of contiguous float32."""
        pointers = (t.data_ptr() for t in (y, a, b))
        self._library.triad(*pointers, 2.0, y.numel(), torch.get_num_threads())


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder) / "probes.so")
        try:
            compiler, *given = cpu_library.compiler()
            options = (*cpu_library.OPTIONS, "-ffp-contract=fast", f"-I{cpu_library.FOLDER / 'cpu'}")
            command = [compiler, *options, *cpu_library.LINKED, *given, "-o", made, str(_SOURCE)]
            subprocess.run(command, capture_output=True, timeout=cpu_library.PATIENCE, check=True)
            library = ctypes.CDLL(made)
        except (cpu_library.LibraryError, OSError, subprocess.SubprocessError) as error:
            raise ProbesError(f"{_SOURCE.name} is not compiled or loaded: {error}") from None
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
