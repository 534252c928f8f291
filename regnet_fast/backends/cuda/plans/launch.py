"""What a kernel of csrc/ is launched with, and on which machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Dynamic shared memory that one block may have."""

RESERVED_BYTES = 1024
"""What CUDA takes of a processor's shared memory for each block, beside the block's own: the largest one fills it."""

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}

TYPES = {"bfloat16": "BFloat16", "float16": "Float16"}

ACTIVATIONS = {name: name.upper() for name in ("none", "relu", "silu", "relu6", "hardswish", "sigmoid", "hardsigmoid")}
"""In the order of their numbers."""

MOST = 2**31 - 2**16  # of what kernels count in 32 bits, with room for the last tile
MOST_SLABS = 65535  # of blocks in a grid's second dimension


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `kernel` is a C++ name expression in `source`; `grid` is (x, y, z)."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[str | int | float, ...]
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if self.grid[0] > MOST or self.grid[1] > MOST_SLABS:
            raise ValueError(f"{self.kernel}: a grid of {self.grid}")


@dataclass(frozen=True)
class Target:
    """The machine: compute capability times ten, and its processors."""

    arch: int = 90
    processors: int = 132


H200 = Target()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def ordered_sum(count: int, shape: tuple[int, ...]) -> Launch:
    """dweight of that shape, the sum of so many parts."""
    length = math.prod(shape)
    arguments = ("parts", "dweight", count, length)
    return Launch(
        "ordered_sum.cu", "ordered_sum<256>", (cdiv(length, 1024), 1, 1), 256, 0, arguments, {"dweight": shape}
    )
