"""Blocks that run one after another: a stage. Its weights are checked once, its batch is cut into parts that fit the
cache, and the output of each block belongs to the next, which may write its own result into it.

A residual block alone has to allocate its result, since the caller may still use the input. Inside a stage nobody but
the next block sees a block's output, and adding into it touches less memory than a fresh result beside it would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import backend, forced_backend, native
from ..observer import observer
from ..ops.convolution import autocast_enabled
from ..trials import cpu
from ..trials.session import session, waiting
from .fused import Fused, Plan, unfit
from .program import Program, counts, images
from .units import Refused
from .watch import not_derived, only_forwards, transformed

_LAST = torch.channels_last
_PROGRAMS_KEPT = 8
"""For how many shapes of images programs are kept."""


class Chain:
    """Mixin before a host's container of blocks, whose forward is one child after another. Subclasses set `host`.

    Only what a fused block returned is given away, and only without gradients; a child that somebody listens to is
    called as ever, and so is everything under tracing and compilation.
    """

    host: type[nn.Module]

    def links(self) -> Iterable[nn.Module]:
        """The blocks in the order of their calls: a Sequential calls one that stands in it twice for each place."""
        if isinstance(self, nn.Sequential):
            return self
        return [child for child in dict.fromkeys(self._modules.values()) if child is not None]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled() or type(x) is not Tensor:
            return super().forward(x)
        if transformed() is not None:
            return super().forward(x)
        links = list(self.links())
        plans = self._plans(links, x)
        if plans is None:
            return self._one_by_one(links, x)
        y = self._by_program(links, plans, x)
        if y is not None:
            return y
        count = 1 if x.shape[0] == 1 else self._parts(plans, x)
        if count == 1:
            return self._run(links, plans, x)
        return _in_parts(x, count, lambda part: self._run(links, plans, part))

    @staticmethod
    def _by_program(links: list[nn.Module], plans: list[Plan], x: Tensor) -> Tensor | None:
        """The result by a program of csrc/cpu; None where another way serves."""
        if not x.is_cpu or forced_backend() not in (None, "native"):
            return None
        program, stage = made([plans], x)
        if program is None:
            return None
        ways = {"program": lambda: program, "blocks": lambda: _fresh(plans, x)}
        if forced_backend() is None and not cpu.by_program(stage, lambda way: ways[way]()):
            return None
        return program(x) if observer.get() is None else told(links, plans, stage, x)

    @staticmethod
    def _parts(plans: list[Plan], x: Tensor) -> int:
        """Into how many parts to cut the batch: by the images that a trial found fastest, else by `images`."""
        if not x.is_cpu or forced_backend() is not None:
            return parts(plans[0], x)

        def bind() -> Callable[[int], Tensor]:
            run = _fresh(plans, x)
            return lambda count: _in_parts(x, -(-x.shape[0] // count), run)

        count = cpu.images(_stage(plans, x.shape[1:], x.dtype), _images(plans[0], x), x.shape[0], bind)
        return -(-x.shape[0] // count)

    @staticmethod
    def _plans(links: Iterable[nn.Module], x: Tensor) -> list[Plan] | None:
        """The current plan of every child, called once more; None where not all of them run fused and unobserved."""
        plans = current_plans(links, x)
        if waiting and plans and plans[0].calls:
            session.settle()
        for plan in plans or ():
            plan.calls += 1
        return plans

    @staticmethod
    def _run(links: list[nn.Module], plans: list[Plan], x: Tensor) -> Tensor:
        """One pass through all blocks."""
        told, dtype, own = observer.get(), x.dtype, False
        x = x.contiguous(memory_format=_LAST)
        for child, plan in zip(links, plans, strict=True):
            if plan.in_channels not in (None, x.shape[1]) or x.dtype != dtype:
                x, own = child.step(x, own)
                continue
            if told is not None:
                told.block(child, x, plan, None)
            x, own = plan.form.run(x, own), True
        return x

    @staticmethod
    def _one_by_one(links: list[nn.Module], x: Tensor) -> Tensor:
        own = False
        for child in links:
            if is_fused(child):
                x, own = child.step(x, own)
            else:
                x, own = child(x), False
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the host's own container, which shares the children."""
        plain = object.__new__(type(self).host)
        plain.__dict__ = self.__dict__
        return plain


def is_fused(child: nn.Module) -> bool:
    """Whether a call of a block is a step of it and nothing else."""
    return isinstance(child, Fused) and not_derived(child) and only_forwards(child)


def current_plans(links: Iterable[nn.Module], x: Tensor) -> list[Plan] | None:
    """The current plan of every block; None where not all of them run fused and unobserved, or there is none."""
    if unfit(x) is not None or autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return None
    plans = []
    for child in links:
        if not is_fused(child):
            return None
        plan = child.plan(x)
        if plan is None:
            return None
        plans.append(plan)
    return plans or None


class Made(NamedTuple):
    """The program of blocks for images of a shape, None where csrc/cpu cannot serve, and what its time depends on."""

    program: Program | None
    stage: cpu.Stage


class _Kept(NamedTuple):
    """What was made of blocks, kept with the first one's plan, as long as the others are the same."""

    others: list[Plan]
    weights: native.Packing
    made: dict[tuple, Made]


def made(stages: Sequence[Sequence[Plan]], x: Tensor, planar: bool = False) -> Made:
    """The program of stages for images like x, in NCHW where they are `planar`."""
    first, *others = (plan for plans in stages for plan in plans)
    kept = first.programs.get(len(others))
    if kept is None or not all(map(is_, kept.others, others)):
        kept = first.programs[len(others)] = _Kept(others, native.Packing(), {})
    key = (x.shape, planar, torch.get_num_threads())  # which it is cut for
    found = kept.made.get(key)
    if found is None:
        try:
            forms = [[plan.unbound for plan in plans] for plans in stages]
            program = Program(forms, x.shape, x.dtype, planar, kept.weights)
        except Refused:
            program = None
        found = Made(program, _stage([first, *others], x.shape[1:], x.dtype, x.shape[0]))
        if len(kept.made) >= _PROGRAMS_KEPT:
            kept.made.clear()
        kept.made[key] = found
    return found


def told(links: Iterable[nn.Module], plans: Sequence[Plan], stage: cpu.Stage, x: Tensor) -> Tensor:
    """What a program gives, by the same kernels block after block, for whoever listens."""
    results = []
    for plan in plans:
        plan.stage = stage
    with backend("native"):
        for part in x.split(counts(x.shape[0], images(plans[0].unbound, x.shape, x.dtype))):
            for child, plan in zip(links, plans, strict=True):
                observer.get().block(child, part, plan, None)
                part = _fresh([plan], part)(part)
            results.append(part)
    return results[0] if len(results) == 1 else torch.cat(results)


def parts(first: Plan, x: Tensor) -> int:
    """Into how many parts to cut the batch where nothing was tried."""
    return -(-x.shape[0] // _images(first, x))


def _images(first: Plan, x: Tensor) -> int:
    """How many images go through a stage at a time. Triton's interpreter stands in for a GPU: it takes all at once."""
    if not x.is_cpu or forced_backend() == "triton":
        return x.shape[0]
    return images(first.unbound, x.shape, x.dtype)


def _stage(plans: list[Plan], image: Sequence[int], dtype: torch.dtype, batch: int = 0) -> cpu.Stage:
    return cpu.Stage(" ".join([plan.described for plan in plans]), tuple(image), dtype, batch)


def _fresh(plans: list[Plan], x: Tensor) -> Callable[[Tensor], Tensor]:
    """What runs a stage block by block, with weights that are packed for it alone."""
    forms = [plan.unbound.bind(lambda unit: unit.pack(x.dtype)) for plan in plans]

    def run(x: Tensor) -> Tensor:
        x, own = forms[0].laid_out(x), False
        for form in forms:
            x, own = form.run(x, own), True
        return x

    return run


def _in_parts(x: Tensor, count: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run(x)`, of so many parts of the batch one after another."""
    if count == 1:
        return run(x)
    y, end = None, 0
    for part in x.tensor_split(count):
        part = run(part)
        start, end = end, end + part.shape[0]
        if y is None:
            layout = _LAST if part.dim() == 4 else torch.contiguous_format  # a head ends in logits
            shape = (x.shape[0], *part.shape[1:])
            y = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        y[start:end] = part
    return y
