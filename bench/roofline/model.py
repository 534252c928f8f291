"""Bytes, operations and kernels of a network under three executions.

    eager     every recorded operation is a kernel, each operand read from memory and each result written to it
    compiled  convolutions, matrix products and pooling are calls of a library; the pointwise operations and reductions
              between them are fused, and a reduction ends a kernel for those that need its result
    ideal     convolutions, matrix products and pooling are the only kernels: what is pointwise rides in the epilogue of
              the kernel before it or the prologue of the one after, and so do sums over pixels, squeeze-excite and the
              statistics of a norm (`bench.roofline.ideal`)

No operand is found in a cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from regnet_fast.inspect.counting import Kernel

from .ideal import ideal
from .recording import LIBRARY, REDUCTIONS, Op, Recording, Value, record


@dataclass(frozen=True)
class Count:
    """Sums over kernels."""

    flops: int
    bytes: int
    kernels: int


def kernels(recording: Recording, execution: str) -> list[Kernel]:
    """The kernels of a recorded network under one of `EXECUTIONS`, in order. Raises ValueError for any other name."""
    if execution not in EXECUTIONS:
        raise ValueError(f"unknown execution {execution!r}; choose one of {', '.join(EXECUTIONS)}")
    return EXECUTIONS[execution](recording)


def count(some: Collection[Kernel]) -> Count:
    """The sums over some kernels."""
    return Count(sum(k.flops for k in some), sum(k.bytes for k in some), len(some))


def work(
    model: nn.Module, input_size: tuple[int, ...], dtype: torch.dtype = torch.float32, train: bool = False
) -> dict[str, int | dict[str, int]]:
    """What a model has to do: its flops, and bytes and kernels by execution. Arguments and errors as in `record`."""
    recording = record(model, input_size, dtype, train)
    counts = {execution: count(kernels(recording, execution)) for execution in EXECUTIONS}
    return {
        "flops": counts["eager"].flops,
        "bytes": {execution: found.bytes for execution, found in counts.items()},
        "kernels": {execution: found.kernels for execution, found in counts.items()},
    }


def eager(recording: Recording) -> list[Kernel]:
    """One kernel for each operation."""
    return [Kernel(op.path, op.name, sum(v.bytes for v in (*op.reads, *op.writes)), op.flops) for op in recording.ops]


def compiled(recording: Recording) -> list[Kernel]:
    """One kernel for each library call, and one for each group of fused operations between them."""
    groups = _groups(recording)
    readers = defaultdict(set)
    for i, op in enumerate(recording.ops):
        for value in op.reads:
            readers[value].add(groups[i])
    members = defaultdict(list)
    for i, op in enumerate(recording.ops):
        members[groups[i]].append(op)
    found = []
    for group, ops in members.items():
        made = dict.fromkeys(value for op in ops for value in op.writes)
        reads = dict.fromkeys(value for op in ops for value in op.reads if value not in made)
        writes = [value for value in made if value in recording.kept or readers[value] - {group}]
        size = sum(value.packed_bytes for value in (*reads, *writes))
        found.append(Kernel(ops[0].path, " ".join(op.name for op in ops), size, sum(op.flops for op in ops)))
    return found


def _groups(recording: Recording) -> list[int]:
    """The fused kernel of each operation, by the number of its first one.

    Operations of one level are fused where one reads what another wrote, or both read the same value.
    """
    ops, levels = recording.ops, _levels(recording)
    group = list(range(len(ops)))
    beside: dict[tuple[Value, int], int] = {}

    def first(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    for i, op in enumerate(ops):
        if op.name in LIBRARY:
            continue
        for value in (*op.reads, *op.writes):
            low, high = sorted((first(i), first(beside.setdefault((value, levels[i]), i))))
            group[high] = low
    return [first(i) for i in range(len(ops))]


def _levels(recording: Recording) -> list[int]:
    """How many kernels have to finish one after another before each operation runs, in its pass, forward or backward.

    An operation runs as early as it can; but a pointwise one runs with the first that needs it, if that can be fused
    with it.
    """
    ops = recording.ops
    levels, start = [0] * len(ops), 0
    writer: dict[Value, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    for i, op in enumerate(ops):
        if op.backward and not ops[i - 1].backward:
            start = max(levels) + 1
        levels[i] = start
        for p in {writer[value] for value in op.reads if value in writer}:
            readers[p].append(i)
            ends = not {ops[p].name, op.name}.isdisjoint(LIBRARY) or ops[p].name in REDUCTIONS
            levels[i] = max(levels[i], levels[p] + ends)
        writer.update(dict.fromkeys(op.writes, i))
    for i in reversed(range(len(ops))):
        fixed = ops[i].name in LIBRARY | REDUCTIONS or not recording.kept.isdisjoint(ops[i].writes)
        if readers[i] and not fixed and all(_fuses(ops[i], ops[r]) for r in readers[i]):
            levels[i] = min(levels[r] for r in readers[i])
    return levels


def _fuses(op: Op, reader: Op) -> bool:
    return reader.name not in LIBRARY and reader.backward == op.backward


EXECUTIONS = {"eager": eager, "compiled": compiled, "ideal": ideal}
