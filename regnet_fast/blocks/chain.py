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

from ..backends import backend, forced_backend
from ..observer import observer
from ..ops.convolution import autocast_enabled
from ..trials import cpu
from ..trials.session import session, waiting
from .fused import Fused, Plan, unfit
from .program import Program
from .units import Refused
from .watch import only_forwards, transformed

_BYTES_PER_THREAD = 5e6
"""How large a map may be for the maps before and after it to be still in the cache when they are needed: measured on
two threads with 1 MB of second-level cache each and 32 MB of third-level cache (docs/cpu.md).
"""

_LAST = torch.channels_last
_PROGRAMS_KEPT = 8
"""For how many shapes of images a stage keeps its programs."""


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
        """The result by programs of csrc/cpu, one for each part of the batch; None where another way serves."""
        if not x.is_cpu or forced_backend() not in (None, "native"):
            return None
        counts = _counts(x.shape[0], images(plans[0], x))
        made = [_made(plans, (count, *x.shape[1:]), x.dtype) for count in counts]
        if any(one.program is None for one in made):
            return None
        program, stage = made[0].program, made[0].stage
        forced = forced_backend() is not None
        if not forced and not cpu.by_program(stage, lambda way: program if way == "program" else _fresh(plans, x)):
            return None
        told = observer.get()
        if len(counts) == 1 and told is None:
            return program(x)
        for plan in plans:
            plan.stage = stage
        y = torch.empty((x.shape[0], *program.shape[1:]), dtype=x.dtype, device=x.device, memory_format=_LAST)
        for one, part, out in zip(made, x.split(counts), y.split(counts), strict=True):
            if told is None:
                one.program(part, out)
            else:
                out.copy_(Chain._told(links, plans, part))
        return y

    @staticmethod
    def _told(links: list[nn.Module], plans: list[Plan], x: Tensor) -> Tensor:
        """What a program gives, by the same kernels block after block, for whoever listens."""
        with backend("native"):
            for child, plan in zip(links, plans, strict=True):
                x = x.contiguous(memory_format=_LAST)
                observer.get().block(child, x, plan, None)
                x = _fresh([plan], x)(x)
        return x

    @staticmethod
    def _parts(plans: list[Plan], x: Tensor) -> int:
        """Into how many parts to cut the batch: by the images that a trial found fastest, else by `images`."""
        if not x.is_cpu or forced_backend() is not None:
            return parts(plans[0], x)

        def bind() -> Callable[[int], Tensor]:
            run = _fresh(plans, x)
            return lambda count: _in_parts(x, -(-x.shape[0] // count), run)

        count = cpu.images(_stage(plans, x.shape[1:], x.dtype), images(plans[0], x), x.shape[0], bind)
        return -(-x.shape[0] // count)

    @staticmethod
    def _plans(links: list[nn.Module], x: Tensor) -> list[Plan] | None:
        """The current plan of every child; None where not all of them run fused and unobserved."""
        if unfit(x) is not None or autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return None
        plans = []
        for child in links:
            if not isinstance(child, Fused) or not only_forwards(child):
                return None
            plan = child.plan(x)
            if plan is None:
                return None
            plans.append(plan)
        if waiting and plans and plans[0].calls:
            session.settle()
        for plan in plans:
            plan.calls += 1
        return plans or None

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
            if isinstance(child, Fused) and only_forwards(child):
                x, own = child.step(x, own)
            else:
                x, own = child(x), False
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the host's own container, which shares the children."""
        plain = object.__new__(type(self).host)
        plain.__dict__ = self.__dict__
        return plain


def _counts(batch: int, most: int) -> list[int]:
    """The images of each part of a batch, with so many in one at most, as even as can be."""
    count = -(-batch // most)
    return [batch // count + (i < batch % count) for i in range(count)]


class _Made(NamedTuple):
    """The program of blocks for images of a shape, kept with the first one's plan; None where csrc/cpu cannot serve."""

    others: list[Plan]
    program: Program | None
    stage: cpu.Stage


def _made(plans: list[Plan], shape: tuple[int, ...], dtype: torch.dtype) -> _Made:
    """What is kept with the first block, as long as all plans are the same."""
    kept, others = plans[0].programs, plans[1:]
    found = kept.get(shape)
    if found is not None and (len(found.others) != len(others) or not all(map(is_, found.others, others))):
        kept, found = {}, None  # none of what was made with blocks that have changed
    if found is None:
        try:
            program = Program([plan.unbound for plan in plans], shape, dtype)
        except Refused:
            program = None
        found = _Made(others, program, _stage(plans, shape[1:], dtype, shape[0]))
        plans[0].programs = {**(kept if len(kept) < _PROGRAMS_KEPT else {}), shape: found}
    return found


def parts(first: Plan, x: Tensor) -> int:
    """Into how many parts to cut the batch where nothing was tried."""
    return -(-x.shape[0] // images(first, x))


def images(first: Plan, x: Tensor) -> int:
    """How many images go through a stage at a time, so that the widest map of the first block, a stage's widest, fits.

    Triton's interpreter stands in for a GPU, which takes a batch whole.
    """
    if not x.is_cpu or x.shape[0] == 1 or forced_backend() == "triton":
        return x.shape[0]
    room = _BYTES_PER_THREAD * torch.get_num_threads()
    if first.unbound.dense and x.element_size() == 2:
        room *= 2  # arithmetic and not memory is short there, and it is faster on more images
    fit = int(room / (first.unbound.widest(*x.shape[1:]) * x.element_size()))
    return 1 << max(fit, 1).bit_length() - 1


def _stage(plans: list[Plan], image: Sequence[int], dtype: torch.dtype, batch: int = 0) -> cpu.Stage:
    return cpu.Stage(" ".join([plan.described for plan in plans]), tuple(image), dtype, batch)


def _fresh(plans: list[Plan], x: Tensor) -> Callable[[Tensor], Tensor]:
    """What runs a stage block by block, with weights that are packed for it alone."""
    forms = [plan.unbound.bind(lambda unit: unit.pack(x.dtype)) for plan in plans]

    def run(x: Tensor) -> Tensor:
        x, own = x.contiguous(memory_format=_LAST), False
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
