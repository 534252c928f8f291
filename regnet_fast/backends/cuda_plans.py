"""What the CUDA C++ kernels of csrc/ are launched with: pure Python, for the extension module, NVRTC and the simulator.

A `Launch` names a source file of csrc/ and a template instantiation in it, and holds grid, threads of a block, bytes of
dynamic shared memory and arguments. An argument that is a string names a tensor, whose address is passed as 64 bits (a
null pointer where the option that would use it is off); an int is passed as int32, a float as float32. All tensors are
dense; feature maps are NHWC and, like all of them, 16-byte aligned.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Dynamic shared memory that one block may have."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `kernel` is a C++ name expression in `source`; `grid` is (x, y, z)."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[str | int | float, ...]
