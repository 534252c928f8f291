"""A convolution with packed weights, and what the operations share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..backends import (
    ACTIVATIONS,
    BackendError,
    BackToBackProblem,
    ConvProblem,
    Deferred,
    Geometry,
    PairProblem,
    Run,
    computed,
    forced_backend,
    native,
    onednn,
    pixel_means,
)
from ..settings import settings
from ..trials import cpu
from ..trials.modes import current_mode, watched
from ..trials.serving import Serving
from ..trials.session import session
from .packed import KEPT, Packed

_SHARED_KEPT = 32
"""Of how many input shapes what shares its weights is kept."""

_SHAPES_PACKED = 4
"""Up to how many input shapes are served from packed weights: with more the sizes are taken to change all the time."""


class PackedConv(Packed):
    """A convolution with its weights folded, and packed by the chosen backend on first use.

    Made by `regnet_fast.functional.pack_conv`, and by the blocks for their own layers. The weight is of the compute
    dtype, the bias of that or float32, and neither is written to.

    A few input shapes whose weights are packed alike share them, and two may have weights of their own. With more, all
    are served from weights that are not packed, which serve every shape, to the same bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str = "none"):
        super().__init__()
        self.weight, self.bias, self.geometry, self.activation = weight, bias, geometry, activation
        self._unpacked: dict[tuple, Run] = {}
        self._here: dict[tuple, PackedConv] = {}
        self.both: BackToBack | None = None

    @property
    def op(self) -> str:
        """The narrowest public operation that serves it."""
        return self.geometry.op(self.weight.shape[2:])

    def here(self, x: Tensor) -> PackedConv:
        """The same weights for the backend that is forced and, on a GPU, for torch's settings here and now."""
        facts = forced_backend(), settings() if _decides(x) else None
        if facts == (None, None):
            return self
        one = self._here.get(facts)
        if one is None:
            one = copy.copy(self)
            one._runs, one._provisional, one._unpacked, one.both = {}, {}, {}, None
            self._here = {**self._here, facts: one}
        return one

    def key(
        self,
        x: Tensor | Deferred,
        gate: Tensor | None = None,
        residual: Tensor | Deferred | None = None,
        means: bool = False,
    ) -> tuple:
        key = x.shape, gate is None, residual is None
        return (*key, means) if means and _decides(x) else key

    def problem(
        self,
        x: Tensor | Deferred,
        gate: Tensor | None = None,
        residual: Tensor | Deferred | None = None,
        means: bool = False,
    ) -> ConvProblem:
        out_channels, _, *kernel = self.weight.shape
        facts = self.activation, gate is not None, residual is not None, x.dtype, str(x.device), means and _decides(x)
        return ConvProblem(tuple(x.shape), out_channels, tuple(kernel), self.geometry, *facts)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias to pack for another input shape."""
        return self.weight, self.bias

    def run_for(
        self,
        x: Tensor | Deferred,
        gate: Tensor | None = None,
        residual: Tensor | Deferred | None = None,
        means: bool = False,
    ) -> Run:
        key = self.key(x, gate, residual, means)
        run = self._runs.get(key)
        if run is not None:
            return run
        if residual is not None:
            shape = self.problem(x, gate, residual).output_shape
            if residual.shape != shape:
                shapes = f"{tuple(residual.shape)} to a result of shape {shape}"
                raise RuntimeError(f"{self.op}: cannot add a residual of shape {shapes}")
        return super().run_for(x, gate, residual, means)

    def bind(self, problem: ConvProblem, by: Serving) -> Run:
        if by.module is onednn:
            return self._share(problem)
        if by.module is native:  # whose weights serve every input shape
            use = native.Conv, not problem.gate, not problem.residual
            if use not in self._unpacked:
                self._unpacked = {**self._unpacked, use: native.prepare_conv(problem, *self.folded())}
            return self._unpacked[use]
        return by.module.prepare_conv(problem, *self.folded(), **by.options)

    def _share(self, problem: ConvProblem) -> Run:
        """What serves an input shape on a CPU, with the weights of other shapes where it can."""
        variant = cpu.conv_variant(problem, self.folded)
        use = onednn.CONVS[variant], not problem.gate, not problem.residual
        run = self._unpacked.get(use)
        if run is None:
            packed = {other: run for other, run in self._runs.items() if (type(run), *other[1:]) == use and run.shape}
            kinds = {run.layout: run for run in packed.values()}
            if len(packed) < _SHAPES_PACKED:
                run = next((one for one in kinds.values() if one.fits(problem)), None)
            if run is None or len(kinds) > 1:
                run = onednn.prepare_conv(problem, *self.folded(), len(packed) < 2, variant)
            if run.shape is None:
                self._unpacked = {**self._unpacked, use: run}
                self._runs = {other: run for other, run in self._runs.items() if other not in packed}
        return run

    def _kept(self, key: tuple, run: Run, most: int = KEPT) -> Run:
        return super()._kept(key, run, _SHARED_KEPT if isinstance(run, (onednn.Convolution, native.Conv)) else most)

    def laid_out(self, x: Tensor) -> Tensor:
        """x in a layout that the backend reads: channels_last, or as it is where a kernel reads images as they come."""
        if x.is_contiguous(memory_format=torch.channels_last) or (self.run_for(x).any_layout and x.is_contiguous()):
            return x
        return x.contiguous(memory_format=torch.channels_last)

    def beside(self, other: object, x: Tensor | Deferred) -> tuple[Tensor, Tensor] | None:
        """`self(x)` and `other(x)` where the backend computes both from one read of x, else None."""
        run = self.run_for(x)
        if run.beside is None or not isinstance(other, PackedConv):
            return None
        partner = other.run_for(x)
        return run.beside(partner, x) if type(partner) is type(run) and beside_allowed(self, other, x) else None

    def ahead(self, second: object, x: Tensor | Deferred, means: bool) -> tuple[Tensor, Tensor | None] | None:
        """`second(self(x))`, and its means where they are asked, where the backend computes both without a map between
        them; else None.
        """
        if x.__class__ is Deferred or (x.device.type == "cpu" and forced_backend() is None):
            return None
        both = self.both
        if both is None or both.second is not second:
            both = self.both = BackToBack(self, second)
        return both(x, means)

    def pin(self) -> tuple:
        return super().pin(), self._unpacked, self.both and self.both.pin()

    def __call__(
        self,
        x: Tensor | Deferred,
        gate: Tensor | None = None,
        residual: Tensor | Deferred | None = None,
        *,
        means: bool = False,
        consume: bool = False,
        into_residual: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`activation(conv(x * gate) + bias + residual)`, with its float32 channel means where `means` is asked.

        They are (N, K), or (N, T, K) parts whose sum over T they are where the backend computes these on the way.

        `consume` allows the backend to overwrite x, `into_residual` the residual. x and the residual are channels_last.
        Deferred ones are computed first where the backend cannot normalise what it reads. No argument is checked and
        autocast is off: the callers saw to that.
        """
        key = x.shape, gate is None, residual is None
        run = self._runs.get((*key, True) if means and x.device.type != "cpu" else key)
        run = run or self.run_for(x, gate, residual, means)
        if not run.takes_deferred and (x.__class__ is Deferred or residual.__class__ is Deferred):
            x, residual = computed(x), computed(residual)
        if means and run.with_parts is not None:
            return run.with_means(x, gate, residual, consume, into_residual)
        y = run(x, gate, residual, consume, into_residual)
        return (y, pixel_means(y)) if means else y


class BackToBack(Packed):
    """A 1x1 convolution and a grouped one of its result, where one launch computes both, with weights of their own."""

    _apart = Run()
    """What is kept where two launches are the way."""

    def __init__(self, first: PackedConv, second: object):
        super().__init__()
        self.first, self.second = first, second
        self._fits = isinstance(second, PackedConv) and first.op == "pointwise_conv" and second.op == "grouped_conv"

    def key(self, x: Tensor, means: bool) -> tuple:
        return x.shape, means

    def problem(self, x: Tensor, means: bool) -> BackToBackProblem | None:
        """None where they are not of this form."""
        first = self.first.problem(x)
        second = replace(self.second.problem(x), input_shape=first.output_shape, means=means)
        return BackToBackProblem.of(first, second)

    def run_for(self, x: Tensor, means: bool) -> Run:
        """`Packed.run_for`; two launches where they are not of this form."""
        if self.problem(x, means) is None:
            return self._kept(self.key(x, means), self._apart)
        return super().run_for(x, means)

    def bind(self, problem: BackToBackProblem, by: Serving) -> Run:
        if by.name != "cuda" or by.options.get("variant", "fused") != "fused":
            return self._apart
        return by.module.prepare_back_to_back(problem, *self.first.folded(), *self.second.folded(), **by.options)

    def __call__(self, x: Tensor, means: bool) -> tuple[Tensor, Tensor | None] | None:
        """The second one's result, and its means or parts of them where they are asked; None where nothing is fused."""
        if not self._fits:
            return None
        run = self._runs.get((x.shape, means))
        if run is None:
            try:
                run = self.run_for(x, means)
            except BackendError:  # one of them alone may have a backend, or a reason to tell
                return None
        if run is self._apart:
            return None
        return run(x) if means else (run(x), None)


def _decides(x: Tensor | Deferred) -> bool:
    """Whether it may be another backend that serves where means are asked: none on a CPU, where weights are shared."""
    return x.device.type != "cpu"


def beside_allowed(one: PackedConv, other: PackedConv, x: Tensor | Deferred) -> bool:
    """Whether two convolutions may be computed from one read of x: where a backend is forced, or by a verdict on the
    two. There is none for maps that are normalised as they are read.
    """
    if forced_backend() is not None:
        return True
    pair = None if x.__class__ is Deferred else PairProblem.of(one.problem(x), other.problem(x))
    return pair is not None and _beside(pair, session.generation, current_mode(), watched())


@lru_cache(maxsize=256)
def _beside(pair: PairProblem, *_: object) -> bool:
    """Whether a verdict names one launch for the two; asked again where one of the others has changed."""
    chosen = session.chosen(pair)
    return chosen is not None and chosen.variant == "beside"


def channels_last(y: Tensor) -> Tensor:
    """y with exactly the strides of a fresh channels_last tensor, which fakes promise (sizes of one hide others)."""
    n, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    return torch.empty((n, c, h, w), dtype=y.dtype, device=y.device, memory_format=torch.channels_last).copy_(y)


def autocast_enabled(device: str) -> bool:
    """Whether torch.autocast is on for a type of device; never for meta, which torch refuses to be asked about."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(packed: Callable, x: Tensor, *arguments, **options):
    """`packed(x, ...)` in the arguments' own dtypes, which autocast would change once more."""
    if autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return packed(x, *arguments, **options)
    return packed(x, *arguments, **options)


def activation_gradient(dy: Tensor, y: Tensor, before: Tensor | None, activation: str) -> Tensor:
    """dL/dz for `y = activation(z)`: from y for ReLU, from z (`before`) where `needs_input`."""
    if activation == "relu":
        return torch.where(y <= 0, torch.zeros_like(dy), dy)  # NaN lets it pass, as in torch
    if activation == "silu":
        if not torch.is_grad_enabled():  # one pass, rounded once; but it cannot be differentiated again
            return torch.ops.aten.silu_backward(dy, before)
        s = torch.sigmoid(before)
        return dy * (s * (1 + before * (1 - s)))
    return dy if activation == "none" else ACTIVATIONS[activation].gradient(dy, before)


def needs_input(activation: str) -> bool:
    """Whether an activation's gradient takes its input, not its result."""
    return not ACTIVATIONS[activation].from_output
