"""What a forward pass of the Triton kernels moves and launches, beside timm eager, torch.compile and the ideal.

    python -m bench.roofline.modelled                                     every model
    python -m bench.roofline.modelled --model regnety_016 --batch 1

Ours is counted from what runs (`inspect.counting`): the rebuilt model's own forward with the backend forced, every
launch heard with its tensors and then left out, so that neither a GPU nor time is needed. The launches of a forward do
not depend on the batch, and their bytes grow evenly with it, so that two small batches tell those of a large one; its
tiles, on which the size of the parts of channel means depends, are those for a batch that fills the machine. The other
three are recorded on meta tensors (`bench.roofline`).

A kernel is beyond the ideal where the ideal has none at all for such an operation: whatever is no convolution, matrix
product or pooling.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

import regnet_fast
from regnet_fast.inspect.counting import Kernel
from regnet_fast.inspect.explanation import Row
from regnet_fast.inspect.verify import check_name, host_model

from ..compile.kernels import MODELS
from ..report.markdown import render
from ..report.tables import ABSENT, Table, number
from .model import EXECUTIONS, Count, count, kernels
from .recording import LIBRARY, record

DTYPE = torch.bfloat16
_COUNTED = (2, 3)  # images; not one, whose layout is ambiguous
_TITLES = ("model", *(f"{e} {unit}" for unit in ("GB", "launches") for e in (*EXECUTIONS, "ours")))
_TITLES += ("ours / compiled, GB", "ours / ideal, GB", "beyond the ideal, with its share of our bytes")


@dataclass(frozen=True)
class Modelled:
    """The counts of a model by execution, with "ours", and of ours the kernels beyond the ideal by name."""

    counts: dict[str, Count]
    beyond: dict[str, Count]


def modelled(name: str, batch: int, size: int) -> Modelled:
    """Count a model of timm's in bfloat16. It takes a GPU, or TRITON_INTERPRET=1 from the start of the process.

    Raises UnknownModelError, and BackendError where a block does not run on the kernels.
    """
    model = host_model(name).to(DTYPE)
    recording = record(model, (batch, 3, size, size), DTYPE)
    counts = {execution: count(kernels(recording, execution)) for execution in EXECUTIONS}
    few, many = (_ours(model, images, size) for images in _COUNTED)
    found = {what: _at(batch, few[what], many[what]) for what in few}
    return Modelled({**counts, "ours": found.pop("ours")}, found)


def _ours(model: nn.Module, images: int, size: int) -> dict[str, Count]:
    """What runs for so many images, and by name the kernels of it that are beyond the ideal."""
    with regnet_fast.backend("triton"):
        rows = regnet_fast.explain(regnet_fast.rebuild(model).model, (images, 3, size, size))
    found = {"ours": [kernel for row in rows for kernel in row.launches]}
    for row in rows:
        for title, kernel in _beyond(row):
            found.setdefault(title, []).append(kernel)
    return {title: count(some) for title, some in found.items()}


def _beyond(row: Row) -> Iterable[tuple[str, Kernel]]:
    for kernel in () if row.operation == "host" else row.launches:
        module, _, of_triton = kernel.name.partition(".")
        if kernel.name not in LIBRARY and not (of_triton and row.operation.endswith("_conv")):
            yield module, kernel


def _at(batch: int, few: Count, many: Count) -> Count:
    """The count at a batch, on the line through those of the two that were run."""
    assert few.kernels == many.kernels, "a launch depends on the batch"
    steps = (batch - _COUNTED[0]) / (_COUNTED[1] - _COUNTED[0])
    flops, size = (round(a + steps * (b - a)) for a, b in ((few.flops, many.flops), (few.bytes, many.bytes)))
    return replace(few, flops=flops, bytes=size)


def table(found: dict[str, Modelled]) -> str:
    """A row of Markdown for each model."""
    return render([Table(_TITLES, tuple((name, *_cells(one)) for name, one in found.items()))])


def _cells(one: Modelled) -> tuple[str, ...]:
    ours = one.counts["ours"].bytes
    sizes = [number(counted.bytes / 1e9) for counted in one.counts.values()]
    launches = [str(counted.kernels) for counted in one.counts.values()]
    ratios = [f"{ours / one.counts[execution].bytes:.2f}" for execution in ("compiled", "ideal")]
    beyond = sorted(one.beyond.items(), key=lambda item: -item[1].bytes)
    texts = (f"{counted.kernels} {title} {_share(counted.bytes / ours)}".strip() for title, counted in beyond)
    return (*sizes, *launches, *ratios, ", ".join(texts) or ABSENT)


def _share(share: float) -> str:
    return f"({100 * share:.0f} %)" if share >= 0.005 else ""


def main(arguments: list[str] | None = None) -> int:
    """Print the table. Exit status 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline.modelled", description="What a forward pass moves.")
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images [256]")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="height and width [224]")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # no kernel runs, and without a GPU none could be compiled
    try:
        for name in options.model:
            check_name(name)
        print(table({name: modelled(name, options.batch, options.size) for name in options.model}), end="")
    except (ValueError, RuntimeError) as error:
        print(f"bench.roofline.modelled: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
