"""The plans of csrc/grouped_conv_backward.cu."""

from __future__ import annotations

import functools
from collections.abc import Iterator
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
from .launch import ACTIVATIONS, H200, SHARED_BYTES, TYPES, Launch, Target, cdiv, ordered_sum


@dataclass(frozen=True)
class BackwardConfig(Config):
    """The compile-time sizes of `grouped_conv_backward`."""

    def shared_bytes(self, work: BackwardWork) -> int:
        """Dynamic shared memory: maps and weights in flight, resident weights, results, and sums of columns."""
        p, halo = work.problem, 2 if work.problem.stride == 1 else 1
        pixels, area = (self.tile_h + halo) * (self.tile_w + halo), self.tile_h * self.tile_w
        stage = (2 if work.affine == 2 else 1) * pixels * pitch(self.groups * self.chunk // 8)
        if work.weight:
            stage += area * p.stride**2 * pitch(self.groups * self.out_tile // 8)
        weights = work.input * self.groups * self.out_tile * pitch(9 * self.chunk // 8)
        streamed = work.input and self.chunk < p.width
        results = work.input * self.warps_m * self.warps_n * cdiv(area, 16 * self.warps_m) * 16 * pitch(self.unit)
        sums = 8 * self.warps_m * self.groups * self.out_tile * work.sums
        return self.stages * (stage + streamed * weights) + (not streamed) * weights + results + sums

    def accumulators(self, work: BackwardWork) -> int:
        """Floats of a thread that the sums take."""
        p, chunks = work.problem, self.chunk // 8
        held = cdiv(self.tile_h * self.tile_w, 16 * self.warps_m) * self.unit * 4
        classes = p.stride**2 if self.chunk < p.width else 1
        products = cdiv(9 * chunks, 2) if p.stride == 1 else cdiv(chunks, 2) + 4 * chunks
        return work.input * held * classes + work.weight * cdiv(products, self.warps_m) * self.unit * 4


@dataclass(frozen=True)
class BackwardWork:
    """What one launch of `grouped_conv_backward` computes: which gradients, with which prologue and epilogue."""

    problem: GroupedConv
    input: bool
    weight: bool
    affine: int
    norm: bool
    sums: bool


_TILES = ((8, 16), (8, 14), (8, 8), (4, 8), (4, 4))
_ACCUMULATORS = 112


def _configs(work: BackwardWork) -> Iterator[BackwardConfig]:
    width, groups = work.problem.width, work.problem.groups
    eights = width // 8
    for tile in _TILES:
        sixteens = tile[0] * tile[1] // 16
        for warps_m in (1, 2, 4, 8):
            if work.input and (warps_m > sixteens or cdiv(sixteens, warps_m) > 4):
                continue
            for slab in range(1, min(groups, 72 // width) + 1 if eights <= 8 else 1):
                for stages in (3, 2):
                    yield BackwardConfig(slab, width, width, eights, *tile, warps_m, slab, stages)
            if work.input and work.weight:
                continue
            for unit in range(2, 9):
                for warps_n in (1, 2, 4):
                    for chunk in (16, 24, 32):
                        if chunk < width and unit * (warps_n - 1) < eights:
                            yield BackwardConfig(1, chunk, 8 * unit * warps_n, unit, *tile, warps_m, warps_n, 2)


def _cost(config: BackwardConfig, work: BackwardWork, target: Target) -> tuple[float, int]:
    c, p, (out_height, out_columns) = config, work.problem, work.problem.out_size
    tiles, slabs = cdiv(out_height, c.tile_h) * cdiv(out_columns, c.tile_w), _slabs(config, work)
    shared, threads = c.shared_bytes(work), 32 * c.warps_m * c.warps_n
    halo = min(out_height, c.tile_h + 2) * min(out_columns, c.tile_w + 2)
    pixels = min(out_height, c.tile_h) * min(out_columns, c.tile_w) * p.stride**2
    depth = cdiv(p.width, c.chunk) * c.chunk if work.input else c.chunk
    outs = c.groups * min(c.out_tile, p.width)
    maps = work.input + work.weight + work.sums
    bytes_moved = (2 if work.affine == 2 else 1) * halo * sectors(c.groups * depth) + maps * pixels * sectors(outs)
    if work.input and c.chunk < p.width:
        bytes_moved += c.out_tile * 9 * depth
    area = c.tile_h * c.tile_w
    products = c.groups * c.out_tile * 9 * depth * area
    products = products * work.input + products * work.weight * (1 if p.stride == 1 else 1.5)
    busy = max(bytes_moved / BYTES_PER_CLOCK, products / PRODUCTS_PER_CLOCK)
    count = cdiv(p.images * tiles * slabs, target.processors)
    together = min(count, resident_blocks(shared, threads, target.arch))
    return count * (busy / min(1.0, together * threads / 256) + TILE_CLOCKS / min(together, 2)), shared


def _slabs(config: BackwardConfig, work: BackwardWork) -> int:
    p = work.problem
    splits = 1 if work.input else cdiv(p.width, config.chunk)
    return cdiv(p.groups, config.groups) * cdiv(p.width, config.out_tile) * splits


@functools.lru_cache(maxsize=4096)
def _best(work: BackwardWork, target: Target) -> BackwardConfig | None:
    fits = [
        config
        for config in _configs(work)
        if 4 <= config.warps_m * config.warps_n <= 12
        and config.accumulators(work) <= _ACCUMULATORS
        and config.shared_bytes(work) <= SHARED_BYTES[target.arch]
    ]
    return min(fits, key=lambda config: _cost(config, work, target), default=None)


@functools.lru_cache(maxsize=4096)
def backward_config(work: BackwardWork, target: Target) -> BackwardConfig | None:
    """As `forward_config`; None where nothing fits, which only a single pass can meet."""
    ends = [_best(replace(work, problem=replace(work.problem, images=images)), target) for images in (FEW, MANY)]
    return min(filter(None, ends), key=lambda config: _cost(config, work, target), default=None)


def grouped_conv_backward(
    problem: GroupedConv,
    *,
    needs_input: bool = True,
    needs_weight: bool = True,
    affine: int = 0,
    norm: bool = False,
    sums: bool = False,
    activation: str = "none",
    single_pass: bool = True,
    target: Target = H200,
    config: BackwardConfig | None = None,
) -> tuple[Launch, ...]:
    """The gradients of the input and of the weight; csrc/grouped_conv_backward.cu has the equations.

    Tensors, by name: dz, y (with `affine` 2), a (1 and 2), q, b (2); x (for the weight's gradient and with `sums`);
    scale, shift (with `norm` and `sums`), mean, invstd (`sums`); weight, (channels, 9 * width) with a row for each
    input channel, tap by tap; results dx, sums (images, tiles, 2, channels), parts, and dweight (channels, 9, width),
    all but dx in float32. Those that an option leaves out are null.

    `norm` and `sums` read the map through `activation(x * scale + shift)`. One launch makes both gradients where whole
    groups fit, two do otherwise, or without `single_pass`; the last one adds up the parts of the weight's gradient.
    """
    check(problem)
    single = BackwardWork(problem, needs_input, needs_weight, affine, norm and needs_weight, sums and needs_input)
    works = [single]
    if config is None and needs_input and needs_weight and (not single_pass or backward_config(single, target) is None):
        works = [
            BackwardWork(problem, True, False, affine, False, sums),
            BackwardWork(problem, False, True, affine, norm, False),
        ]
    launches = [_launch(work, config or backward_config(work, target), activation, target) for work in works]
    if needs_weight:
        launches.append(ordered_sum(launches[-1].buffers["parts"][0], (problem.channels, 9, problem.width)))
    return tuple(launches)


def _launch(work: BackwardWork, config: BackwardConfig | None, activation: str, target: Target) -> Launch:
    if config is None:
        raise ValueError(f"no configuration for {work} fits sm_{target.arch}")
    c, p, (out_height, out_columns) = config, work.problem, work.problem.out_size
    tiles, slabs = cdiv(out_height, c.tile_h) * cdiv(out_columns, c.tile_w), _slabs(config, work)
    shared, threads = c.shared_bytes(work), 32 * c.warps_m * c.warps_n
    resident = resident_blocks(shared, threads, target.arch)
    workers = min(p.images * tiles, max(1, resident * target.processors // slabs))
    switches = (work.input, work.weight, work.affine, work.norm, work.sums)
    facts = (
        TYPES[p.dtype], p.width, c.groups, c.chunk, c.out_tile, c.unit, p.stride, c.tile_h, c.tile_w, c.warps_m,
        c.warps_n, c.stages, *(str(s).lower() for s in switches), ACTIVATIONS[activation],
    )  # fmt: skip
    buffers = {"parts": (workers, p.channels, 9, p.width)} if work.weight else {}
    return Launch(
        "grouped_conv_backward.cu",
        f"grouped_conv_backward<{', '.join(map(str, facts))}>",
        (workers, slabs, 1),
        threads,
        shared,
        ("dz", "y", "a", "q", "b", "x", "scale", "shift", "mean", "invstd", "weight", "dx", "sums", "parts", p.images,
         p.height, p.columns, out_height, out_columns, p.groups),
        buffers | ({"sums": (p.images, tiles, 2, p.channels)} if work.sums else {}),
    )  # fmt: skip
