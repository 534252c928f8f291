"""The grouped 3x3 convolutions that csrc/ has kernels for, and a rough model of the machine that runs them."""

from __future__ import annotations

from dataclasses import dataclass

from .launch import MOST, MOST_SLABS, RESERVED_BYTES, SHARED_BYTES, TYPES, cdiv

WIDEST = 264
_TALLEST = 18  # rows of a tile with its halo, which are counted whether the image has them or not


@dataclass(frozen=True)
class GroupedConv:
    """A 3x3 convolution with padding 1 of (images, height, columns, groups * width), as wide as its result. With
    `in_channels` that map is what a 1x1 convolution makes of one with so many channels.
    """

    images: int
    height: int
    columns: int
    groups: int
    width: int
    stride: int
    dtype: str
    in_channels: int = 0

    @property
    def channels(self) -> int:
        return self.groups * self.width

    @property
    def out_size(self) -> tuple[int, int]:
        return cdiv(self.height, self.stride), cdiv(self.columns, self.stride)


@dataclass(frozen=True)
class Config:
    """The sizes that a kernel is compiled for.

    A block takes `groups` groups, `chunk` of their input channels at a time, and makes `out_tile` of the channels of
    each, for `tile_h` by `tile_w` pixels. Its warps share out the pixels (`warps_m`) and the channels (`warps_n`, in
    units of `unit` eights); `stages` chunks are in flight.
    """

    groups: int
    chunk: int
    out_tile: int
    unit: int
    tile_h: int
    tile_w: int
    warps_m: int
    warps_n: int
    stages: int


def refuse(
    problem: GroupedConv,
    *,
    kernel: tuple[int, int] = (3, 3),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    arch: int = 90,
) -> str | None:
    """Why csrc/ has no grouped convolution for a problem, or None."""
    if arch < 80:
        return "the kernels need a GPU of compute capability 8.0 or newer"
    if problem.dtype not in TYPES:
        return f"the kernels compute in {' and '.join(TYPES)}, not in {problem.dtype}"
    if kernel != (3, 3) or padding != (1, 1):
        return f"a kernel of {kernel} with padding {padding}: only 3x3 with padding 1"
    if dilation != (1, 1):
        return f"a dilation of {dilation}"
    if problem.stride not in (1, 2):
        return f"a stride of {problem.stride}"
    if problem.width % 8 or not 8 <= problem.width <= WIDEST:
        return f"groups of {problem.width} channels: only multiples of 8 from 8 to {WIDEST}"
    if min(problem.images, problem.height, problem.columns, problem.groups) < 1:
        return "an empty map"
    if problem.in_channels % 8:
        return f"a convolution in front of {problem.in_channels} channels: only multiples of 8"
    if max(problem.height, _TALLEST) * problem.columns * max(problem.channels, problem.in_channels) > MOST:
        return "an image of too many elements to count in 32 bits"
    if problem.images * problem.height * problem.columns > MOST:
        return "too many pixels to count in 32 bits"
    if problem.groups * cdiv(problem.width, 16) ** 2 > MOST_SLABS:
        return f"{problem.groups} groups: more than a grid takes"
    return None


def check(problem: GroupedConv) -> None:
    """Raise ValueError where there is no kernel for a problem."""
    reason = refuse(problem)
    if reason is not None:
        raise ValueError(f"no kernel for {problem}: {reason}")


def pitch(chunks: int) -> int:
    """Bytes between neighbours of so many 16-byte chunks: an odd number of these."""
    return (chunks | 1) * 16


BYTES_PER_CLOCK, PRODUCTS_PER_CLOCK, TILE_CLOCKS = 19, 1320, 400  # of one H200 processor, roughly

FEW, MANY = 1, 256
"""The batches that kernels are made for; the faster of the two serves every other one."""


def resident_blocks(shared: int, threads: int, arch: int, registers: int = 168) -> int:
    """Blocks of a processor at once, by shared memory and by registers."""
    held = (SHARED_BYTES[arch] + RESERVED_BYTES) // (shared + RESERVED_BYTES)
    return max(1, min(held, 65536 // (registers * threads)))


def sectors(channels: int) -> int:
    """Bytes moved for so many channels of a pixel, in sectors of 32, wherever the first of them lies."""
    return 2 * channels if channels % 16 == 0 else 2 * channels + 16
