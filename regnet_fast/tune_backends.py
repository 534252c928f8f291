"""csrc/ and Triton measured against each other for a model's grouped convolutions, for `cuda|triton` to go by.

Every convolution that both can compute is timed on random operands of its size, since values do not decide: in
inference, and in both halves of a training step with everything that they take on each backend. The times of one group
width and stride are added up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends import ConvProblem, backend, choice, cuda, cuda_launch, triton
from .backends.cuda_passes import Passes
from .backends.operands import Arriving, Filter, Norm, Own, Sums
from .kernels import tables
from .timing import Announce, silent
from .tune import ROUNDS, GpuTimer, Timer, conditions, same

Pair = tuple[Callable[[], Any], Callable[[], Any]]
"""The same by csrc/ and by Triton."""


def convolutions(model: nn.Module, x: Tensor) -> list[ConvProblem]:
    """The distinct grouped convolutions of a rebuilt model in inference that both backends can compute."""
    found: dict[ConvProblem, None] = {}
    if cuda_launch.refuse_device(str(x.device)) is not None:
        return []
    with backend("cuda|triton"), torch.no_grad(), choice.listening(found.setdefault):
        model(x)
    return [p for p in found if p.groups > 1 and cuda.refuse(p) is None and triton.refuse(p) is None]


def pairs(problem: ConvProblem) -> Iterator[tuple[str, Pair]]:
    """Each step of `choice.STEPS`, on random operands."""
    from .backends import triton_passes

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float32, device=problem.device)
        return drawn.to(problem.dtype).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn.abs()

    channels, groups = problem.out_channels, problem.groups
    x, dz, y = random(*problem.input_shape), random(*problem.output_shape), random(*problem.output_shape)
    weight = random(channels, channels // groups, *problem.kernel).contiguous() / 8
    mean, var, scale, shift = (random(channels) for _ in range(4))
    runs = [module.prepare_conv(problem, weight, shift) for module in (cuda, triton)]
    yield "inference", tuple(partial(run, x, None, None, False, False) for run in runs)
    norm = Norm(mean, var + 1, scale, shift, 1e-5, problem.activation)
    own = Own(mean, var + 1, scale, 1e-5, Sums(shift, shift), y.numel() / channels)
    one = Filter(weight, (problem.stride, problem.padding, problem.dilation, groups))
    sides = (Passes(triton_passes), triton_passes)
    yield "forward", tuple(partial(side.convs, x, norm, None, [one], [True]) for side in sides)
    arriving = [Arriving(dz, own, y)]
    yield "backward", tuple(partial(s.convs_backward, arriving, x, norm, None, [one], True, [True]) for s in sides)


def measure(
    problems: list[ConvProblem], device: torch.device, timer: Timer | None = None, announce: Announce = silent
) -> list[dict[str, Any]]:
    """Entries of a table for some convolutions. Those whose results differ by more than rounding are left out."""
    found: dict[tuple[str, int, int], list[float]] = {}
    with torch.no_grad():
        timer = timer or GpuTimer(device)
        for problem in problems:
            for step, calls in pairs(problem):
                announce(f"csrc/ and Triton, {step} of {problem.groups} groups of {problem.input_shape[1]} channels")
                if step == "inference" and not same(*(call() for call in calls)):
                    break
                times = found.setdefault(
                    (step, problem.input_shape[1] // problem.groups, problem.stride[0]), [0.0, 0.0]
                )
                for i, samples in enumerate(timer(calls, ROUNDS)):
                    times[i] += statistics.median(samples)
    return [
        {"step": step, "width": width, "stride": stride}
        | {name: round(float(time), 2) for name, time in zip(choice.COMPARED, times, strict=True)}
        for (step, width, stride), times in sorted(found.items())
    ]


def tune(model: nn.Module, x: Tensor, folder: Path, timer: Timer | None = None, announce: Announce = silent) -> int:
    """Measure a model's convolutions, put the times into this GPU's table, in the place of those of the same width,
    stride and step, and return how many there are.

    Raises TableError for a table that cannot be used, which stays as it is.
    """
    problems = convolutions(model, x)
    entries = measure(problems, x.device, timer, announce) if problems else []
    if not entries:
        return 0
    facts = conditions(x.device)
    path = folder / choice.gpu(str(x.device)) / choice.NAME
    new = {(entry["step"], entry["width"], entry["stride"]) for entry in entries}
    known = choice.read(path)
    for table in known:
        table["entries"] = [e for e in table["entries"] if (e["step"], e["width"], e["stride"]) not in new]
    table = {"machine": facts["gpu"], "provenance": "measured", "batch": x.shape[0], "dtype": str(x.dtype)[6:], **facts}
    tables.replace(path, choice.text([{**table, "entries": entries}, *(table for table in known if table["entries"])]))
    choice.forget()
    return len(entries)
