"""What all kernels share: how they are launched, activations, alignment, and what an architecture offers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from ..observer import observer
from ..settings import settings
from .tables import TooLargeError

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may use, by compute capability."""

ARCHITECTURES = tuple(SHARED_BYTES)

INTERPRETED = (90, 1)
"""What the interpreter stands in for: an architecture, and one processor, so that tiles are large and programs few."""


def too_large(needed: int, arch: int) -> str | None:
    """Why so many bytes of shared memory do not fit, or None."""
    there = SHARED_BYTES[arch]
    return None if needed <= there else f"it needs {needed} bytes of shared memory, sm_{arch} has {there}"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return knobs.runtime.interpret


def machine(device: torch.device) -> tuple[int, int]:
    """The compute capability whose limits hold for a device, the nearest known one that is not newer, and how many
    processors it has.
    """
    if interpreting():
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    return max(known for known in ARCHITECTURES if known <= capability), found.multi_processor_count


LIMITS = {"maxnreg": 255}
"""A compiler option: left to itself, ptxas would rather spill a few bytes than use its registers."""


def new_output(size: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised channels_last tensor for a kernel to write."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def unit(channels: int) -> int:
    """The largest of 8, 4, 2, 1 that divides a number of channels.

    A kernel gets `channels // unit` and multiplies again, which tells the compiler how far rows are aligned without a
    specialisation for each width.
    """
    return next(size for size in (8, 4, 2, 1) if channels % size == 0)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 in full, unless torch's own convolutions may use TF32."""
    return "tf32" if dtype == torch.float32 and settings().conv_tf32 else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """`kernel[grid](*arguments, **options)`, the one way in which kernels start first. What Triton compiled, or None.

    Raises TooLargeError, before anything runs, where the compiled kernel takes more shared memory, tensor memory or
    threads than the device has.
    """
    told = observer.get()
    if told is not None:
        title = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        if not told.launch(title, {**dict(zip(kernel.arg_names, arguments, strict=False)), **options}):
            return None
    try:
        return kernel[grid](*arguments, **options)
    except triton.OutOfResources as error:
        text = f"it needs {error.required} of {error.name}, the device has {error.limit}"
        raise TooLargeError(text) from None


class Launch:
    """`launch(kernel, grid, *tensors, *sizes, **constants)` for tensors of the same shapes, dtypes and device.

    Triton finds a binary by all its arguments, which takes longer than many a kernel. That happens once: from then on
    what it compiled is launched as it is (`CompiledKernel.__getitem__`). A binary depends on types, on constants and on
    which tensors are aligned to 16 bytes, as torch allocates them (`SIZES`); for tensors that are not, or where a
    version of Triton does not return what it compiled, Triton looks again.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], sizes: tuple[float, ...], warps: int, **constants: Any):
        self.kernel, self.grid, self.sizes = kernel, (*grid, 1, 1)[:3], sizes
        self.options = {**constants, "num_warps": warps, **LIMITS}
        self.behind = (*sizes, *(constants[name] for name in kernel.arg_names if name in constants))
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start it. Raises TooLargeError as `launch` does."""
        address = 0
        for t in tensors:
            if t is not None:
                address |= t.data_ptr()
        if self.compiled is not None and not address & 15 and observer.get() is None:
            self.compiled(*tensors, *self.behind)
            return
        found = launch(self.kernel, self.grid, *tensors, *self.sizes, **self.options)
        if not address & 15 and isinstance(found, CompiledKernel):
            self.compiled = found[self.grid]


SIZES = (
    *("pixels", "other_pixels", "image_pixels", "tile_pixels", "images", "tiles", "all_tiles", "share"),
    *("out_area", "out_width", "out_columns", "out_height", "in_area", "in_width", "height", "columns"),
    *("channel_units", "out_units", "other_units", "hidden_units", "column_units"),
)
"""What kernels are not compiled anew for: `@triton.jit(do_not_specialize=SIZES)`. Triton otherwise makes one binary for
numbers divisible by 16, one for 1, and one for the rest; what an alignment rests on is a compile-time `UNIT`.
"""


@triton.jit
def _from_0_to_6(x):
    return tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Of float32; NaN stays."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu6":
        x = _from_0_to_6(x)
    elif ACTIVATION == "hardswish":
        x = x * (_from_0_to_6(x + 3.0) * (1.0 / 6.0))
    elif ACTIVATION == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == "hardsigmoid":
        x = _from_0_to_6(x + 3.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACTIVATION == "none", "an activation that the kernels do not have")
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 rounded to the nearest value of a dtype. The interpreter cuts bfloat16 off instead."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b + accumulator. The interpreter multiplies bfloat16 wrongly, so that there both are widened first."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
