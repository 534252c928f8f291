"""What the default plans of the CUDA C++ kernels move and multiply, and the modelled time beside cuDNN's implied one.

    python -m bench.cuda_modelled                         grouped convolutions of the models, batch 256, bfloat16
    python -m bench.cuda_modelled --model regnety_016     of other models
    python -m bench.cuda_modelled --write                 the table of docs/cuda.md

Everything is counted from the launches (`regnet_fast.backends.cuda_plans`) and what their kernels do with them; nothing
runs. docs/cuda.md says what is counted and what the machines are taken to reach.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from regnet_fast.backends.cuda_plans import (
    BackwardConfig,
    GroupedConv,
    Launch,
    Target,
    grouped_conv_backward,
    grouped_conv_forward,
)
from regnet_fast.recording import Kernel
from regnet_fast.roofline import Ceilings

from .cuda_compilation import Compiled, Job
from .cuda_compilation_page import PAGE
from .cuda_launches import TRAINING, grouped_convs
from .markdown import Heading, render
from .tables import Table, number

MODELS = (
    "regnety_002", "regnetx_008", "regnety_016", "regnetx_032", "regnety_080", "regnety_040", "regnety_120",
    "regnety_320",
)  # fmt: skip
BATCH = 256
_PLACE = re.compile(r"(?<=<!-- cuda-modelled -->\n).*(?=<!-- /cuda-modelled -->)", re.DOTALL)


@dataclass(frozen=True)
class Machine:
    """What a GPU reaches at most. `ceilings`: of a copy, of the best matrix product, and of a launch."""

    name: str
    target: Target
    ceilings: Ceilings
    mma_flops_per_s: float
    clock: float
    l2_bytes_per_s: float
    latency_s: float = 0.6e-6

    def blocks(self, launch: Launch) -> int:
        """Blocks of a launch on a processor at once."""
        return Compiled(Job(self.target.arch, launch), registers=_REGISTERS).blocks


H200 = Machine("H200", Target(90, 132), Ceilings(4.3e12, 790e12, 1.5e-6), 0.62 * 790e12, 1.83e9, 5.5e12)
RTX_4090 = Machine("RTX 4090", Target(89, 128), Ceilings(0.9 * 1008e9, 165e12, 1.5e-6), 165e12, 2.52e9, 5.0e12)
MACHINES = (H200, RTX_4090)
SHARED_BYTES_PER_CLOCK, _L2_BYTES_PER_CLOCK = 128, 64  # of one processor
_REGISTERS = 168  # of a thread
_TERMS_IN_FLIGHT = 16  # loads of `ordered_sum` before the first addition, and warps of `merged_moments`
_SUMS = {"ordered_sum.cu": 1, "merged_moments.cu": 3}  # terms of each

# Times its roofline, by the group width from which on: the lower end of what published results imply.
CUDNN = {8: 2.0, 24: 7.0, 40: 5.0, 64: 3.6, 112: 2.3}


@dataclass(frozen=True)
class Traffic:
    """What a launch moves and multiplies: bytes of memory, of the L2 cache, of shared memory and the L1 cache."""

    dram: int
    l2: int
    shared: int
    flops: int


@dataclass(frozen=True)
class _Plan:
    """A launch's compile-time facts, and the sizes that follow."""

    launch: Launch
    problem: GroupedConv
    config: BackwardConfig
    input: bool = False
    weight: bool = False
    affine: int = 0
    norm: bool = False
    sums: bool = False
    parts: bool = False
    moments: bool = False

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        (rows, columns), c = self.problem.out_size, self.config
        return -(-rows // c.tile_h) * -(-columns // c.tile_w)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First channel and number of channels of each part of a map that is summed over at once."""
        return self._slices(self.config.chunk)

    @property
    def outs(self) -> list[tuple[int, int]]:
        return self._slices(self.config.out_tile)

    def _slices(self, size: int) -> list[tuple[int, int]]:
        p, step = self.problem, self.config.groups
        found = []
        for group in range(0, p.groups, step):
            length = min(step, p.groups - group) * p.width
            length_of_slice = length if size >= p.width else size
            for first in range(0, length, length_of_slice):
                found.append((group * p.width + first, min(length_of_slice, length - first)))
        return found

    def bytes_of(self, slices: Sequence[tuple[int, int]]) -> int:
        """Sectors of 32 bytes that the slices of two neighbouring pixels lie in, in bytes, halved."""
        pixel, total = 2 * self.problem.channels, 0
        for base in (0, pixel % 32):
            total += sum(-(-(base + 2 * (c + n)) // 32) - (base + 2 * c) // 32 for c, n in slices)
        return 32 * total // 2

    def pixels(self, size: tuple[int, int], step: int, before: int, extent: tuple[int, int]) -> int:
        """Pixels of a map that the tiles of all images read: each starts `step` times its size, less `before`."""
        c, found = self.config, self.problem.images
        for tile, out, length, reach in zip((c.tile_h, c.tile_w), self.problem.out_size, size, extent, strict=True):
            starts = range(-before, -(-out // tile) * tile * step - before, tile * step)
            found *= sum(max(0, min(length, start + reach) - max(0, start)) for start in starts)
        return found


def _read(launch: Launch, problem: GroupedConv) -> _Plan:
    facts = launch.kernel.partition("<")[2].rstrip(">").split(", ")
    groups, chunk, out_tile, unit, _, *tile, warps_m, warps_n, stages = map(int, facts[2:12])
    config = BackwardConfig(groups, chunk, out_tile, unit, *tile, warps_m, warps_n, stages)
    if launch.source == "grouped_conv_forward.cu":
        parts, norm, moments = (facts[i] == "true" for i in (13, 14, 16))
        return _Plan(launch, problem, config, parts=parts, norm=norm, moments=moments)
    has = [fact == "true" for fact in facts[12:17]]
    return _Plan(launch, problem, config, has[0], has[1], int(facts[14]), has[3], has[4])


def traffic(launch: Launch, problem: GroupedConv) -> Traffic:
    """What a launch of a problem's plan moves and multiplies."""
    if launch.source in _SUMS:
        count, length = launch.arguments[-2:]
        size = 4 * length * (count * _SUMS[launch.source] + 1)
        return Traffic(size, size, 0, 0)
    plan = _read(launch, problem)
    return _forward(plan) if launch.source == "grouped_conv_forward.cu" else _backward(plan)


def _steps(plan: _Plan) -> int:
    """Tiles of all slabs, one for each part of the channels."""
    out_tiles = -(-plan.problem.width // plan.config.out_tile)
    return plan.problem.images * plan.tiles * len(plan.chunks) * out_tiles


def _weights(plan: _Plan) -> tuple[int, int]:
    """Bytes of the weights, and how much of them blocks copy."""
    p, (workers, _, _) = plan.problem, plan.launch.grid
    size = 2 * p.channels * 9 * p.width
    return size, size * (workers if plan.config.chunk >= p.width else p.images * plan.tiles)


def _products(plan: _Plan) -> tuple[int, int]:
    """Shared memory read and operations of `multiply` over all taps, in one step."""
    c = plan.config
    sixteens = -(-c.tile_h * c.tile_w // (16 * c.warps_m))
    calls = c.warps_m * c.groups * c.out_tile // (8 * c.unit)
    depth = 9 * c.chunk // 8
    return calls * depth * (128 * c.unit + 256 * sixteens), calls * depth * 2048 * sixteens * c.unit


def _results(plan: _Plan) -> int:
    """Bytes of one copy of a tile's results in shared memory."""
    c = plan.config
    return -(-c.tile_h * c.tile_w // (16 * c.warps_m)) * 16 * c.warps_m * 2 * c.groups * c.out_tile


def _forward(plan: _Plan) -> Traffic:
    c, p = plan.config, plan.problem
    out_tiles, images_tiles = -(-p.width // c.out_tile), p.images * plan.tiles
    extent = ((c.tile_h - 1) * p.stride + 3, (c.tile_w - 1) * p.stride + 3)
    maps = plan.pixels((p.height, p.columns), p.stride, 1, extent) * out_tiles * plan.bytes_of(plan.chunks)
    maps += p.images * p.out_size[0] * p.out_size[1] * plan.bytes_of(plan.outs)
    parts = 4 * images_tiles * p.channels * plan.parts + 12 * plan.launch.grid[0] * p.channels * plan.moments
    once, copied = _weights(plan)
    loaded, flops = _products(plan)
    streamed = c.out_tile * 9 * c.chunk * 2 if c.chunk < p.width else 0
    steps = _steps(plan)
    stored = extent[0] * extent[1] * c.groups * c.chunk * 2 * (7 if plan.norm else 1) + streamed  # read, made, written
    shared = steps * (stored + loaded) + images_tiles * plan.launch.grid[1] * 2 * _results(plan)
    return Traffic(maps + parts + once, maps + parts + copied, shared, steps * flops)


def _backward(plan: _Plan) -> Traffic:
    c, p = plan.config, plan.problem
    out_tiles, images_tiles = -(-p.width // c.out_tile), p.images * plan.tiles
    splits = 1 if plan.input else -(-p.width // c.chunk)
    before, halo = (1, 2) if p.stride == 1 else (0, 1)
    extent = (c.tile_h + halo, c.tile_w + halo)
    read_maps = 2 if plan.affine == 2 else 1
    maps = read_maps * plan.pixels(p.out_size, 1, before, extent) * out_tiles * plan.bytes_of(plan.chunks)
    area = p.images * p.height * p.columns * plan.bytes_of(plan.outs)
    maps += area * (plan.weight * splits + plan.input)  # x copied, dx
    parts = 4 * p.channels * 9 * p.width * plan.launch.grid[0] * plan.weight + 8 * images_tiles * p.channels * plan.sums
    once, copied = _weights(plan) if plan.input else (0, 0)

    steps, depth = _steps(plan), c.chunk // 8
    pixels, inputs = extent[0] * extent[1] * c.groups * c.chunk * 2, 2 * c.groups * c.out_tile * p.stride**2
    inputs *= c.tile_h * c.tile_w * plan.weight
    shared = pixels * read_maps + inputs
    if plan.affine:
        shared += pixels * (read_maps + 1 + 2 * (3 if plan.affine == 2 else 1))  # float coefficients from L1
    shared += inputs * plan.norm * (2 + 2 * 2)
    flops = 0
    if plan.input:
        loaded, flops = _products(plan)
        shared += loaded + (c.out_tile * 9 * c.chunk * 2 if c.chunk < p.width else 0)
    if plan.weight:
        products = -(-9 * depth // 2) if p.stride == 1 else -(-depth // 2) + 4 * depth
        mine = -(-products // c.warps_m)
        warps, sixteens = c.warps_m * c.warps_n, c.tile_h * c.tile_w // 16
        shared += warps * sixteens * (512 * mine + 256 * c.unit * (1 if p.stride == 1 else mine))
        flops += warps * sixteens * mine * c.unit * 4096
    finished = plan.input * p.stride**2 * (4 if plan.sums else 2) * _results(plan)
    again = area * plan.sums
    shared = steps * shared + images_tiles * plan.launch.grid[1] * finished
    return Traffic(
        maps + parts + once + again * (not plan.weight), maps + parts + copied + again, shared, steps * flops
    )


@dataclass(frozen=True)
class Modelled:
    """A time, and which ceiling takes most of it."""

    seconds: float
    bound: str


def modelled(launch: Launch, problem: GroupedConv, machine: Machine) -> Modelled:
    """The time of a launch: its waves of blocks, each as long as the tightest ceiling lets it be."""
    moved, ceilings, processors = traffic(launch, problem), machine.ceilings, machine.target.processors
    memory, clocks = moved.dram / ceilings.bytes_per_s, machine.clock
    if launch.source in _SUMS:
        return Modelled(max(memory, launch.arguments[-2] / _TERMS_IN_FLIGHT * machine.latency_s), "memory")
    l2 = moved.l2 / machine.l2_bytes_per_s
    alone = {  # if one processor had to do everything
        "L2": moved.l2 / (_L2_BYTES_PER_CLOCK * clocks),
        "shared": moved.shared / (SHARED_BYTES_PER_CLOCK * clocks),
        "products": moved.flops / machine.mma_flops_per_s * processors,
    }
    tiles, (workers, slabs, _) = problem.images * _read(launch, problem).tiles, launch.grid
    longest = -(-tiles // workers) / (tiles * slabs)  # block, as a share of everything
    left, found = workers * slabs, {}
    while left > 0:
        wave = min(left, machine.blocks(launch) * processors)
        share, busiest = min(1.0, wave * longest), longest * -(-wave // processors)
        times = {name: busiest * time for name, time in alone.items()}
        times["memory"], times["L2"] = share * memory, max(times["L2"], share * l2)
        bound = max(times, key=times.__getitem__)
        found[bound] = found.get(bound, 0.0) + times[bound]
        left -= wave
    return Modelled(sum(found.values()), max(found, key=found.__getitem__))


def ideal(problem: GroupedConv, backward: bool) -> Kernel:
    """Every operand read once and every result written once; forward's work, or both gradients' with all they read."""
    p, weights = problem, problem.channels * 9 * problem.width
    inputs, outputs = (2 * p.images * p.channels * h * w for h, w in ((p.height, p.columns), p.out_size))
    flops = outputs * 9 * p.width  # two for each element, which has two bytes
    if backward:  # dz, y, x, weight; dx, dweight
        return Kernel("", "backward", 2 * outputs + 2 * inputs + 2 * weights + 4 * weights, 2 * flops)
    return Kernel("", "forward", inputs + outputs + 2 * weights, flops)


def cudnn(problem: GroupedConv, backward: bool, machine: Machine) -> float:
    """Seconds that published results imply for cuDNN's convolution, or its two gradients, of which each reads two maps
    and the weight or makes its gradient."""
    factor = CUDNN[max(width for width in CUDNN if width <= problem.width)]
    kernel, ceilings = ideal(problem, False), machine.ceilings
    launches = 2 if backward else 1
    return launches * (factor * (ceilings.seconds([kernel]) - ceilings.launch_s) + ceilings.launch_s)


@dataclass(frozen=True)
class Row:
    """A convolution's pass on a machine."""

    problem: GroupedConv
    backward: bool
    machine: Machine
    launches: int
    traffic: Traffic
    ideal: Kernel
    ours: Modelled
    cudnn: float

    @property
    def ratio(self) -> float:
        return self.cudnn / self.ours.seconds

    @property
    def use(self) -> float:
        """The ideal bytes in our time, as a share of what a copy reaches."""
        return self.ideal.bytes / self.ours.seconds / self.machine.ceilings.bytes_per_s


def rows(models: Sequence[str], batch: int, machine: Machine) -> list[Row]:
    """Both passes of every distinct convolution of some models, by width."""
    found = []
    for conv in sorted(grouped_convs(models), key=lambda conv: (conv.width, -conv.size, conv.groups, -conv.stride)):
        problem = conv.problem(batch, "bfloat16")
        for backward in (False, True):
            if backward:
                launches = grouped_conv_backward(problem, activation=conv.activation, target=machine.target, **TRAINING)
            else:
                launches = (grouped_conv_forward(problem, conv.activation, True, machine.target),)
            found.append(_row(problem, backward, machine, launches))
    return found


def _row(problem: GroupedConv, backward: bool, machine: Machine, launches: Sequence[Launch]) -> Row:
    moved = [traffic(launch, problem) for launch in launches]
    total = Traffic(*(sum(getattr(one, name) for one in moved) for name in Traffic.__dataclass_fields__))
    times = [modelled(launch, problem, machine) for launch in launches]
    time = sum(one.seconds for one in times) + len(launches) * machine.ceilings.launch_s
    ours = Modelled(time, max(times, key=lambda one: one.seconds).bound)
    least = ideal(problem, backward)
    return Row(problem, backward, machine, len(launches), total, least, ours, cudnn(problem, backward, machine))


_PASSES = {False: "forward", True: "backward"}
_TITLES = (
    "groups x width", "input", "stride", "pass", "launches", "MB", "ideal MB", "GFLOP", "ideal GFLOP", "bound by",
    "ours, us", "roofline, us", "cuDNN implied, us", "implied / ours", "% of copy",
)  # fmt: skip


def table(found: Sequence[Row]) -> Table:
    """A row of text for each row."""
    lines = []
    for row in found:
        p, us = row.problem, 1e6
        lines.append((
            f"{p.groups}x{p.width}", f"{p.height}x{p.columns}", str(p.stride), _PASSES[row.backward],
            str(row.launches), number(row.traffic.dram / us), number(row.ideal.bytes / us),
            number(row.traffic.flops / 1e9), number(row.ideal.flops / 1e9), row.ours.bound,
            number(row.ours.seconds * us), number(row.machine.ceilings.seconds([row.ideal]) * us),
            number(row.cudnn * us), f"{row.ratio:.2f}", f"{100 * row.use:.0f}",
        ))  # fmt: skip
    return Table(_TITLES, tuple(lines))


def summary(found: Sequence[Row]) -> Table:
    """By machine, pass and width: the implied advantage over cuDNN, where there is none, and the use of the memory."""
    groups: dict[tuple[str, bool, int], list[Row]] = {}
    for row in found:
        groups.setdefault((row.machine.name, row.backward, row.problem.width), []).append(row)
    lines = []
    for (machine, backward, width), same in groups.items():
        ratios, uses = [row.ratio for row in same], [100 * row.use for row in same]
        slower = sum(ratio < 1 for ratio in ratios)
        lines.append((
            machine, _PASSES[backward], str(width), str(len(same)), f"{statistics.geometric_mean(ratios):.2f}",
            f"{min(ratios):.2f}", f"{max(ratios):.2f}", str(slower), f"{statistics.geometric_mean(uses):.0f}",
            f"{min(uses):.0f}", f"{max(uses):.0f}", str(sum(use >= 70 for use in uses)),
        ))  # fmt: skip
    titles = ("GPU", "pass", "width", "shapes", "implied / ours, mean", "least", "most", "slower than implied in")
    return Table((*titles, "% of copy, mean", "least %", "most %", "70 % or more in"), tuple(sorted(lines, key=_order)))


def _order(line: tuple[str, ...]) -> tuple:
    return line[0], line[1] == "backward", int(line[2])


def page(models: Sequence[str] = MODELS, batch: int = BATCH) -> str:
    """Summary and tables in Markdown."""
    found = {machine.name: rows(models, batch, machine) for machine in MACHINES}
    blocks = [summary([row for same in found.values() for row in same])]
    for name, same in found.items():
        blocks += [Heading(3, name), table(same)]
    return render(blocks)


def filled(text: str, lines: str) -> str:
    """A document with the tables in their place. Raises ValueError where it has none."""
    if not _PLACE.search(text):
        raise ValueError("the document has no place between <!-- cuda-modelled --> and <!-- /cuda-modelled -->")
    return _PLACE.sub(lambda _: lines, text)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or write them. Exit status 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_modelled", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help="images [256]")
    parser.add_argument("--write", action="store_true", help="into docs/cuda.md, instead of printing")
    options = parser.parse_args(arguments)
    try:
        lines = page(options.model, options.batch)
        if options.write:
            PAGE.write_text(filled(PAGE.read_text(), lines))
        else:
            print(lines, end="")
    except ValueError as error:
        print(f"bench.cuda_modelled: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
