"""Which is modelled faster for a grouped convolution, csrc/ or Triton's kernels: regnet_fast/backends/choices.json.

    python -m bench.cuda_choice                       a table of both, of the convolutions of all models at batch 256
    python -m bench.cuda_choice --write               into the file, and into docs/cuda.md

csrc/'s launches are timed by `bench.cuda_modelled`, each by its tightest ceiling. Triton's are timed in the same way
where the kernel is one, forward; of the passes that it takes besides, and of its two gradients, only the bytes, the
products and the copies that it cannot do without are counted. Nothing here was measured (docs/cuda.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from regnet_fast.backends import choice
from regnet_fast.backends.cuda_plans import GroupedConv, grouped_conv_backward, grouped_conv_forward, merged_moments

from .cuda_compilation_page import PAGE
from .cuda_launches import TRAINING, grouped_convs
from .cuda_modelled import MACHINES, SHARED_BYTES_PER_CLOCK, Machine, modelled
from .markdown import render
from .tables import Table

BATCH = 256
BEGIN, END = "<!-- cuda-choice -->\n", "<!-- /cuda-choice -->"


def _sectors(channels: int) -> int:
    """Bytes moved for so many channels of a pixel, in sectors of 32, wherever the first of them lies."""
    return 2 * channels if channels % 16 == 0 else 2 * channels + 16


def _bound(machine: Machine, dram: float, l2: float, shared: float, flops: float, rate: float) -> float:
    """Seconds of a launch at its tightest ceiling."""
    shared_rate = SHARED_BYTES_PER_CLOCK * machine.clock * machine.target.processors
    times = dram / machine.ceilings.bytes_per_s, l2 / machine.l2_bytes_per_s, shared / shared_rate, flops / rate
    return max(times) + machine.ceilings.launch_s


def _maps(problem: GroupedConv) -> tuple[int, int]:
    """Bytes of the input and of the result."""
    p = problem
    return tuple(2 * p.images * p.channels * h * w for h, w in ((p.height, p.columns), p.out_size))


def triton_forward(problem: GroupedConv, machine: Machine) -> float:
    """Seconds of `implicit_gemm` in its heuristic configuration."""
    from regnet_fast.kernels import implicit_gemm

    p, arch, (rows, columns) = problem, machine.target.arch, problem.out_size
    pixels, stride, depth = rows * columns, p.stride, 9 * p.width
    operands = (p.groups, p.width, p.width, 9, stride**2, 2, False, True, False)
    shape = implicit_gemm.Shape(p.images * pixels, pixels, *operands, arch, machine.target.processors)
    c = implicit_gemm.heuristic(shape)
    programs = p.images * -(-pixels // c.block_m) * p.groups * -(-p.width // c.block_n)
    down = min(p.height, (min(rows, (c.block_m + columns - 1) / columns) - 1) * stride + 3)
    across = min(p.columns, (min(c.block_m, columns) - 1) * stride + 3)
    maps = programs * down * across * _sectors(p.width) + p.images * pixels * p.groups * _sectors(p.width)
    steps, matrix = -(-depth // c.block_k), arch == 90 and c.block_m >= 64
    # the pixels come through the L1 cache, and both operands through shared memory; mma.sync reads weights in each warp
    moved = 3 * c.block_m + (3 if matrix else 2 + c.warps) * c.block_n
    shared = 2 * programs * steps * c.block_k * moved
    weights = 2 * p.channels * depth
    rate = machine.ceilings.flops_per_s if matrix else machine.mma_flops_per_s
    flops = 2 * programs * steps * c.block_m * c.block_n * c.block_k
    return _bound(machine, maps + weights, maps + 2 * programs * depth * c.block_n, shared, flops, rate)


def _passes(machine: Machine, moved: int, launches: int) -> float:
    return moved / machine.ceilings.bytes_per_s + launches * machine.ceilings.launch_s


def triton(problem: GroupedConv, step: str, machine: Machine) -> float:
    """Seconds of all that Triton's kernels launch for a step."""
    inputs, outputs = _maps(problem)
    if step == "inference":
        return triton_forward(problem, machine)
    if step == "forward":  # the map made first; the statistics, and their merging
        return triton_forward(problem, machine) + _passes(machine, 2 * inputs + outputs, 3)
    flops, rate = outputs * 9 * problem.width, machine.ceilings.flops_per_s
    taps = 3 * 9 * outputs  # each tap of a map through the L1 cache and shared memory
    gradient = _bound(machine, 2 * outputs + inputs, 0, 2 * taps, flops, rate)
    gradient += (problem.stride**2 - 1) * machine.ceilings.launch_s
    weight = _bound(machine, 2 * outputs + inputs, 0, taps, flops, rate)
    return gradient + weight + _passes(machine, 3 * inputs, 3)  # and the gradient through the activation, and sums


def cuda(problem: GroupedConv, step: str, activation: str, machine: Machine) -> float:
    """Seconds of csrc/'s launches for a step."""
    target = machine.target
    if step == "inference":
        launches = (grouped_conv_forward(problem, activation, True, target),)
    elif step == "forward":
        first = grouped_conv_forward(problem, target=target, read=activation, moments=True)
        launches = (first, merged_moments(first.grid[0], problem.channels))
    else:
        launches = grouped_conv_backward(problem, activation=activation, target=target, **TRAINING)
    return sum(modelled(one, problem, machine).seconds + machine.ceilings.launch_s for one in launches)


def entries(machine: Machine, widths: set[int] | None = None) -> Iterator[dict[str, Any]]:
    """The sums over the convolutions of each step, width and stride, in microseconds."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for conv in {conv[:4]: conv for conv in grouped_convs()}.values():  # a shape once, whatever its activation
        if conv.groups == 1 or (widths and conv.width not in widths):
            continue
        problem = conv.problem(BATCH, "bfloat16")
        for step in choice.STEPS:
            times = found.setdefault((step, conv.width, conv.stride), [0.0, 0.0])
            times[0] += cuda(problem, step, conv.activation, machine)
            times[1] += triton(problem, step, machine)
    order = sorted(found, key=lambda key: (choice.STEPS.index(key[0]), key))
    for (step, width, stride), (ours, theirs) in ((key, found[key]) for key in order):
        times = {"cuda": float(f"{1e6 * ours:.4g}"), "triton": float(f"{1e6 * theirs:.4g}")}
        yield {"step": step, "width": width, "stride": stride, **times}


def page(tables: list[dict[str, Any]]) -> str:
    """Triton's time as a multiple of csrc/'s in Markdown, by width, with stride 1 / 2."""
    columns = [(table["machine"], step) for table in tables for step in choice.STEPS]
    ratios: dict[int, dict[tuple, dict[int, str]]] = {}
    for table in tables:
        for entry in table["entries"]:
            cell = ratios.setdefault(entry["width"], {}).setdefault((table["machine"], entry["step"]), {})
            cell[entry["stride"]] = f"{entry['triton'] / entry['cuda']:.2f}"
    lines = [
        (str(width), *(" / ".join(found[column].get(stride, "-") for stride in (1, 2)) for column in columns))
        for width, found in sorted(ratios.items())
    ]
    return render([Table(("width", *(f"{machine}, {step}" for machine, step in columns)), tuple(lines))])


def filled(document: str, lines: str) -> str:
    """A document with the table in its place."""
    before, found, rest = document.partition(BEGIN)
    after = rest.partition(END)
    if not found or not after[1]:
        raise ValueError(f"the document has no place between {BEGIN.strip()} and {END}")
    return before + BEGIN + lines + END + after[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_choice", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the package and docs/cuda.md, instead of printing")
    options = parser.parse_args(arguments)
    facts = {"provenance": "modelled", "by": "python -m bench.cuda_choice", "batch": BATCH, "dtype": "bfloat16"}
    made = [
        {"arch": machine.target.arch, "machine": machine.name, **facts, "entries": list(entries(machine))}
        for machine in MACHINES
    ]
    if options.write:
        choice.FILE.write_text(choice.text(made))
        PAGE.write_text(filled(PAGE.read_text(), page(made)))
    else:
        print(page(made), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
