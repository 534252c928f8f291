"""The plans of csrc/grouped_conv_forward.cu, and of csrc/merged_moments.cu, which ends its statistics."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .grouped import (
    BYTES_PER_CLOCK,
    FEW,
    MANY,
    PRODUCTS_PER_CLOCK,
    TILE_CLOCKS,
    Config,
    GroupedConv,
    check,
    pitch,
    resident_blocks,
    sectors,
)
from .launch import ACTIVATIONS, H200, SHARED_BYTES, TYPES, Launch, Target, cdiv


@dataclass(frozen=True)
class ForwardConfig(Config):
    """The compile-time sizes of `grouped_conv_forward`."""

    def halo(self, stride: int) -> int:
        """Pixels that a tile is computed from."""
        return ((self.tile_h - 1) * stride + 3) * ((self.tile_w - 1) * stride + 3)

    def shared_bytes(self, width: int, stride: int, moments: bool = False, in_channels: int = 0) -> int:
        """Dynamic shared memory: pixels and weights in flight, resident weights, results, and sums of columns; and the
        weights and the tile of what a convolution in front makes.
        """
        halo = self.halo(stride) * pitch(self.groups * self.chunk // 8)
        weights = self.groups * self.out_tile * pitch(9 * self.chunk // 8)
        sixteens = cdiv(self.tile_h * self.tile_w, 16 * self.warps_m)
        results = self.warps_m * self.warps_n * sixteens * 16 * pitch(self.unit)
        held = (weights, 0) if self.chunk >= width else (0, weights)
        sums = 4 * self.warps_m * (self.groups * self.out_tile * (1 + moments) + moments)
        made = 0
        if in_channels:
            row = pitch(in_channels // 8)
            rows = cdiv(self.groups * self.out_tile // 8, self.warps_n) * self.warps_n * 8
            halo, made = self.halo(stride) * row, halo + rows * row
        return self.stages * (halo + held[1]) + held[0] + made + results + sums

    def copies(self, stride: int, in_channels: int = 0) -> int:
        """Copies of pixels of each thread for a step, for which it keeps places in registers and bits in a word."""
        row = pitch((in_channels or self.groups * self.chunk) // 8)
        return cdiv(self.halo(stride) * row // 16, 32 * self.warps_m * self.warps_n)


_TILES = ((8, 16), (8, 14), (8, 8), (7, 7), (4, 14), (4, 8), (4, 4))
_ACCUMULATORS = 64  # of a thread at most, in whole tiles of 16x8
_COPIES = 24  # of a thread at most
_MADE = 128  # pixels behind a convolution in front for each of the warps that share them, in whole passes


def _configs(width: int, groups: int) -> Iterator[ForwardConfig]:
    """Whole groups with their weights in shared memory; and parts of one group, with weights for each step."""
    eights = width // 8
    for tile in _TILES:
        sixteens = cdiv(tile[0] * tile[1], 16)
        for warps_m in (1, 2, 4, 8):
            held = cdiv(sixteens, warps_m)
            if warps_m > sixteens or held > 4:
                continue
            for slab in (
                range(1, min(groups, 72 // width) + 1) if eights <= 8 and held * eights * 4 <= _ACCUMULATORS else ()
            ):
                for warps_n in {min(slab, 3), min(slab, 4)}:
                    for stages in (3, 2):
                        yield ForwardConfig(slab, width, width, eights, *tile, warps_m, warps_n, stages)
            for unit in range(3, 9):
                for warps_n in (1, 2, 4):
                    if held * unit * 4 > _ACCUMULATORS or unit * (warps_n - 1) >= eights:
                        continue
                    for chunk in (16, 24, 32):
                        if chunk < width:
                            yield ForwardConfig(1, chunk, 8 * unit * warps_n, unit, *tile, warps_m, warps_n, 2)


def _cost(config: ForwardConfig, problem: GroupedConv, arch: int, processors: int) -> tuple[float, int]:
    """Clocks of the busiest processor, modelled, and shared memory where they are equal."""
    c, p, (out_height, out_columns) = config, problem, problem.out_size
    tiles = cdiv(out_height, c.tile_h) * cdiv(out_columns, c.tile_w)
    slabs = cdiv(p.groups, c.groups) * cdiv(p.width, c.out_tile)
    shared, threads = c.shared_bytes(p.width, p.stride, False, p.in_channels), 32 * c.warps_m * c.warps_n
    halo = min(p.height, (c.tile_h - 1) * p.stride + 3) * min(p.columns, (c.tile_w - 1) * p.stride + 3)
    pixels = min(out_height, c.tile_h) * min(out_columns, c.tile_w)
    depth = cdiv(p.width, c.chunk) * c.chunk
    bytes_moved = pixels * sectors(c.groups * min(c.out_tile, p.width))
    if p.in_channels:  # once from memory, for each other slab from the L2 cache
        bytes_moved += halo * p.in_channels * (1 + 1 / slabs)
    else:
        bytes_moved += halo * sectors(c.groups * p.width)
    if c.chunk < p.width:
        bytes_moved += c.out_tile * 9 * depth  # from the L2 cache, at twice the rate
    units = cdiv(c.groups * c.out_tile // (8 * c.unit), c.warps_n) * c.warps_n * c.unit * 8
    products = cdiv(c.tile_h * c.tile_w, 16 * c.warps_m) * 16 * c.warps_m * units * 9 * depth
    products += cdiv(c.halo(p.stride), 32 * c.warps_m) * 32 * c.warps_m * p.in_channels * c.groups * c.out_tile
    busy = max(bytes_moved / BYTES_PER_CLOCK, products / PRODUCTS_PER_CLOCK)
    count = cdiv(p.images * tiles * slabs, processors)
    together = min(count, resident_blocks(shared, threads, arch, _registers(p, threads)))
    warps = min(1.0, together * threads / 256)  # fewer than eight warps do not keep a processor busy
    return count * (busy / warps + TILE_CLOCKS / min(together, 2)), shared


def _registers(problem: GroupedConv, threads: int) -> int:
    """Of a thread at most: as the kernel's launch bounds have it."""
    return 255 if problem.in_channels and threads <= 128 else 168


def _fitting(problem: GroupedConv, target: Target, moments: bool) -> list[ForwardConfig]:
    p = problem
    return [
        config
        for config in _configs(p.width, p.groups)
        if config.shared_bytes(p.width, p.stride, moments, p.in_channels) <= SHARED_BYTES[target.arch]
        and 4 <= config.warps_m * config.warps_n <= 12
        and config.copies(p.stride, p.in_channels) <= _COPIES
        and (not p.in_channels or (config.chunk == p.width and config.halo(p.stride) <= _MADE * config.warps_m))
    ]


def _cheapest(configs: Iterable[ForwardConfig], problem: GroupedConv, target: Target) -> ForwardConfig:
    return min(configs, key=lambda config: _cost(config, problem, target.arch, target.processors))


@functools.lru_cache(maxsize=4096)
def _best(problem: GroupedConv, target: Target, moments: bool) -> ForwardConfig:
    fits = _fitting(problem, target, moments)
    if not fits:
        raise ValueError(f"no configuration for {problem} fits sm_{target.arch}")
    return _cheapest(fits, problem, target)


@functools.lru_cache(maxsize=4096)
def forward_config(problem: GroupedConv, target: Target, moments: bool = False) -> ForwardConfig:
    """The configuration that a rough model of the machine takes for the fastest, of the best one for few images and the
    best one for many: two kernels serve all batches. No measurement stands behind it.
    """
    ends = [_best(replace(problem, images=images), target, moments) for images in (FEW, MANY)]
    return _cheapest(ends, problem, target)


@functools.lru_cache(maxsize=4096)
def refuse_in_front(problem: GroupedConv, target: Target) -> str | None:
    """Why the 1x1 convolution in front of a problem had better be a launch of its own, or None.

    Together the two read x for every slab of channels, but neither write nor read the map between: the same model of
    the machine says which costs less.
    """
    p, alone = problem, replace(problem, in_channels=0)
    try:
        config = forward_config(p, target)
    except ValueError:
        return f"no tile that a 1x1 convolution of {p.in_channels} channels stands in front of fits sm_{target.arch}"
    model = target.arch, target.processors
    moved = 2 * p.images * p.height * p.columns * (p.in_channels + p.channels)
    apart = _cost(forward_config(alone, target), alone, *model)[0] + moved / BYTES_PER_CLOCK / target.processors
    if _cost(config, p, *model)[0] < apart:
        return None
    return f"its {p.in_channels} channels are read for every {config.groups} groups, and cost more than the map between"


def grouped_conv_forward(
    problem: GroupedConv,
    activation: str = "none",
    parts: bool = False,
    target: Target = H200,
    config: ForwardConfig | None = None,
    *,
    read: str | None = None,
    moments: bool = False,
) -> Launch:
    """`activation(conv(read(x)) + bias)`: tensors x, weight, bias (may be null), y; and, null where they are not asked
    for, scale and shift, in_weight and in_bias, parts, moments.

    The weight is (channels, 9 * width), tap by tap. With an activation for `read`, read(x) is that of x * scale +
    shift, or with `problem.in_channels` of the 1x1 convolution of x with in_weight, (channels, in_channels), and
    in_bias, which may be null. parts are (images, tiles, channels): their sum over tiles are the means of y over an
    image's pixels. moments are (workers, 3, channels), for `merged_moments`. There are either of them.
    """
    check(problem)
    config = config or forward_config(problem, target, moments)
    (out_height, out_columns), p, c = problem.out_size, problem, config
    tiles = cdiv(out_height, c.tile_h) * cdiv(out_columns, c.tile_w)
    slabs = cdiv(p.groups, c.groups) * cdiv(p.width, c.out_tile)
    shared = c.shared_bytes(p.width, p.stride, moments, p.in_channels)
    threads = 32 * c.warps_m * c.warps_n
    resident = resident_blocks(shared, threads, target.arch, _registers(p, threads))
    workers = min(p.images * tiles, max(1, resident * target.processors // slabs))
    facts = (
        TYPES[p.dtype], p.width, c.groups, c.chunk, c.out_tile, c.unit, p.stride, c.tile_h, c.tile_w, c.warps_m,
        c.warps_n, c.stages, ACTIVATIONS[activation], str(parts).lower(),
        str(read is not None and not p.in_channels).lower(), ACTIVATIONS[read or "none"], str(moments).lower(),
        p.in_channels // 8,
    )  # fmt: skip
    buffers = {"parts": (p.images, tiles, p.channels)} if parts else {}
    return Launch(
        "grouped_conv_forward.cu",
        f"grouped_conv_forward<{', '.join(map(str, facts))}>",
        (workers, slabs, 1),
        threads,
        shared,
        ("x", "scale", "shift", "in_weight", "in_bias", "weight", "bias", "y", "parts", "moments", p.images, p.height,
         p.columns, out_height, out_columns, p.groups),
        buffers | ({"moments": (workers, 3, p.channels)} if moments else {}),
    )  # fmt: skip


def merged_moments(parts: int, channels: int) -> Launch:
    """mean and var (channels), the biased one, of so many parts with their moments."""
    warps = 16
    buffers = dict.fromkeys(("mean", "var"), (channels,))
    return Launch(
        "merged_moments.cu", f"merged_moments<{warps}>", (cdiv(channels, 32), 1, 1), 32 * warps, 12 * 32 * warps,
        ("moments", "mean", "var", parts, channels), buffers,
    )  # fmt: skip
