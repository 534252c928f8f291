"""What a machine reaches at most, and what its ceilings leave of a network under three executions.

    python -m bench.roofline regnety_016 repvgg_a2 --batch 256
    python -m bench.roofline regnety_016 --blocks --train
    python -m bench.roofline regnety_016 --bandwidth 4.3e12 --peak 7.9e14 --launch 1.5e-6

Bytes, kernels and operations are counted by `bench.roofline.model` without running anything. The ceilings are those
of the device it runs on, measured first, or those that are given.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch

from regnet_fast.hosts.registry import candidates
from regnet_fast.inspect.counting import Kernel
from regnet_fast.inspect.verify import check_name

from ..cases import DTYPES
from ..report.tables import ABSENT, number
from .ceilings import measure_ceilings
from .model import EXECUTIONS, Ceilings, count, kernels
from .recording import record

_TITLES = ("GFLOP", *(f"{e} {unit}" for unit in ("MB", "kernels", "ms") for e in EXECUTIONS))
_TITLES += ("eager / ideal", "compiled / ideal")


def compare(found: dict[str, list[Kernel]], ceilings: Ceilings) -> tuple[str, ...]:
    """The cells of a row: work, kernels and modelled milliseconds of each execution, and how the times compare."""
    counts = [count(some) for some in found.values()]
    times = {execution: 1e3 * ceilings.seconds(some) for execution, some in found.items()}
    cells = [number(counts[0].flops / 1e9)]
    cells += [number(one.bytes / 1e6) for one in counts]
    cells += [str(one.kernels) for one in counts]
    cells += [number(ms) for ms in times.values()]
    ratios = [times[execution] / times["ideal"] if times["ideal"] else None for execution in ("eager", "compiled")]
    return (*cells, *(ABSENT if ratio is None else f"{ratio:.2f}" for ratio in ratios))


def by_block(found: dict[str, list[Kernel]], blocks: list[str]) -> dict[str, dict[str, list[Kernel]]]:
    """The kernels of each execution by the block that called them, in the order of the blocks; "" has the rest."""
    parts: dict[str, dict[str, list[Kernel]]] = {
        block: {execution: [] for execution in found} for block in (*blocks, "")
    }
    for execution, some in found.items():
        for kernel in some:
            path = kernel.path
            while path and path not in parts:
                path = path.rpartition(".")[0]
            parts[path][execution].append(kernel)
    return parts


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table that is aligned as text too."""
    lines = [list(titles), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m bench.roofline", description="Networks under three executions.")
    root.add_argument("models", nargs="+", metavar="MODEL", help="a timm model name")
    root.add_argument("--batch", type=positive(int), default=256, metavar="N", help="images [256]")
    root.add_argument("--size", type=positive(int), default=224, metavar="N", help="height and width [224]")
    root.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    root.add_argument("--train", action="store_true", help="forward and backward, instead of inference")
    root.add_argument("--blocks", action="store_true", help="a table for each model, with a row for each block")
    root.add_argument("--device", default="cpu", help="whose ceilings are measured: cpu, cuda or cuda:1 [cpu]")
    given = positive(float)
    root.add_argument("--bandwidth", type=given, metavar="B/S", help="bytes per second, instead of measuring")
    root.add_argument("--peak", type=given, metavar="FLOP/S", help="operations per second, instead of measuring")
    root.add_argument("--launch", type=given, metavar="S", help="seconds that each kernel costs, instead of measuring")
    return root


def positive(kind: type) -> Callable[[str], Any]:
    """What reads a positive number from the command line."""

    def number_of(text: str) -> Any:
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return kind(text)

    return number_of


def main(arguments: list[str] | None = None) -> int:
    """Print the tables. Exit status 2 for a request that cannot be served."""
    options = parser().parse_args(arguments)
    try:
        for name in options.models:
            check_name(name)
        _print(options)
    except (ValueError, RuntimeError) as error:
        print(f"bench.roofline: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def _print(options: argparse.Namespace) -> None:
    ceilings, rows = _ceilings(options), []
    print(
        f"{'Training' if options.train else 'Inference'}, batch {options.batch}, {options.size}x{options.size}, "
        f"{options.dtype}; {number(ceilings.bytes_per_s / 1e9)} GB/s, {number(ceilings.flops_per_s / 1e12)} TFLOP/s, "
        f"{number(ceilings.launch_s * 1e6)} us a kernel\n"
    )
    for name in options.models:
        with torch.device("meta"):
            model = timm.create_model(name)
        size = (options.batch, 3, options.size, options.size)
        recording = record(model, size, getattr(torch, options.dtype), options.train)
        found = {execution: kernels(recording, execution) for execution in EXECUTIONS}
        rows.append((name, *compare(found, ceilings)))
        if options.blocks:
            parts = by_block(found, [path for path, _, _ in candidates(model)])
            blocks = [(path or "the rest", *compare(some, ceilings)) for path, some in parts.items() if some["eager"]]
            print(markdown((name, *_TITLES), [*blocks, ("in all", *rows[-1][1:])]), end="\n\n")
    if not options.blocks:
        print(markdown(("model", *_TITLES), rows))


def _ceilings(options: argparse.Namespace) -> Ceilings:
    """Those that are given, and the device's where one is not."""
    given = (options.bandwidth, options.peak, options.launch)
    if None in given:
        measured = measure_ceilings(options.device, [options.dtype])
        values = (measured["bytes_per_s"], measured["flops_per_s"][options.dtype], measured["launch_s"])
        given = tuple(value if one is None else one for one, value in zip(given, values, strict=True))
    return Ceilings(*given)


if __name__ == "__main__":
    sys.exit(main())
