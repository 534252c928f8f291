"""Blocks on a CPU as one program of csrc/cpu: what their forms do is recorded once, and run by one call.

A form is bound to units that compute nothing: each notes a step between numbered buffers and gives the map that the
step would make. So a program does what the form's own `run` says, whatever the form. The buffers share one arena, where
one that is not read any more makes room for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import ConvProblem, NormActProblem, native
from ..backends.cpu_library import Step
from ..ops.convolution import PackedConv
from ..ops.norm_act import PackedNormAct
from ..ops.squeeze_excite import PackedSqueezeExcite
from .forms import Form
from .units import Refused, Unit

_INPUT, _OUTPUT = 0, 1
_BEHIND = 256  # bytes behind a buffer


@dataclass(eq=False)
class Map:
    """A map that a step will have made, or the affine map with activation of one, which its readers compute."""

    buffer: int
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    affine: PackedNormAct | None = None
    gate: Gate | None = None


@dataclass(eq=False)
class Means:
    """Channel means that a step will have made, in float32."""

    buffer: int
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32


@dataclass(eq=False)
class Gate:
    """Factors for each image and channel that a step will have made, in float32."""

    buffer: int


class Recorder:
    """What the units of a form are called on to note their steps."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype):
        self.steps: list[Step] = []
        self.kept: list[Any] = []
        self.sizes: dict[int, int] = {_INPUT: 0, _OUTPUT: 0}
        self.input = Map(_INPUT, tuple(shape), dtype)

    def bound(self, form: Form) -> Form:
        """The form over units that note what they are called for."""
        return form.bind(self._unit)

    def _unit(self, unit: Unit) -> Callable:
        packed = unit.pack(self.input.dtype)
        for kind, note in ((PackedConv, self._conv), (PackedNormAct, self._affine), (PackedSqueezeExcite, self._gate)):
            if isinstance(packed, kind):
                return Noted(packed, note)
        raise Refused(f"{unit.path} is no operation of csrc/cpu")

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        """A buffer for so many numbers."""
        self.sizes[len(self.sizes)] = torch.Size(shape).numel() * dtype.itemsize
        return len(self.sizes) - 1

    def _conv(
        self,
        conv: PackedConv,
        x: Map,
        gate: Gate | None = None,
        residual: Map | None = None,
        *,
        means: bool = False,
        consume: bool = False,
        into_residual: bool = False,
    ) -> Map | tuple[Map, Means]:
        if x.shape[1] != conv.weight.shape[1] * conv.geometry.groups:
            raise Refused(f"a map of {x.shape[1]} channels meets a weight of the shape {tuple(conv.weight.shape)}")
        residual = None if residual is None else self.value(residual)
        x = x if gate is None else self.value(x)  # a step has one gate
        facts = conv.activation, gate is not None, residual is not None, x.dtype, "cpu"
        out_channels, _, *kernel = conv.weight.shape
        problem = ConvProblem(x.shape, out_channels, tuple(kernel), conv.geometry, *facts)
        shape = problem.output_shape
        _check(problem)
        if residual is not None and residual.shape != shape:
            raise Refused(f"a map of the shape {residual.shape} is added to one of the shape {shape}")
        y = residual.buffer if into_residual else self.buffer(*shape, dtype=x.dtype)
        step = native.conv_step(problem, x.buffer, y, -1 if residual is None else residual.buffer)
        if gate is not None:
            step.gate = gate.buffer
        if x.affine is not None:
            self._read_through(step, x)
        self._give_weights(step, *conv.folded())
        if means:
            step.sums = self.buffer(shape[0], native.bands_of(step), shape[1])
        self.steps.append(step)
        made = Map(y, shape, x.dtype)
        return (made, self._means(step, shape)) if means else made

    def _give_weights(self, step: Step, weight: Tensor, bias: Tensor | None) -> None:
        weights = native.Weights(step, weight, bias)
        self.kept.append(weights)
        weights.give(step)

    def _read_through(self, step: Step, x: Map) -> None:
        """The step computes the affine map of x as it reads."""
        scale, shift = self._vectors(x.affine)
        step.scale, step.shift = scale.data_ptr(), shift.data_ptr()
        step.before = native.ACTIVATION_CODES[x.affine.activation]
        if x.gate is not None:
            step.gate = x.gate.buffer

    def _vectors(self, affine: PackedNormAct) -> tuple[Tensor, Tensor]:
        vectors = native.padded(affine.scale), native.padded(affine.shift)
        self.kept.append(vectors)
        return vectors

    def _means(self, step: Step, shape: tuple[int, ...]) -> Means:
        means = self.buffer(*shape[:2])
        self.steps.append(native.means_step(shape, native.bands_of(step), step.sums, means))
        return Means(means, shape[:2])

    def _affine(
        self, affine: PackedNormAct, x: Map, gate: Gate | None = None, *, consume: bool = False, defer: bool = False
    ) -> Map:
        if x.shape[1] != affine.scale.numel():
            raise Refused(f"a map of {x.shape[1]} channels meets a norm of {affine.scale.numel()}")
        _check(NormActProblem(x.shape, affine.activation, gate is not None, x.dtype, "cpu"))
        x = self.value(x)
        made = Map(x.buffer, x.shape, x.dtype, affine=affine, gate=gate)
        return made if defer else self.value(made, consume)

    def value(self, x: Map, consume: bool = False) -> Map:
        """x itself, once the affine map that it may be of is computed."""
        if x.affine is None:
            return x
        y = x.buffer if consume else self.buffer(*x.shape, dtype=x.dtype)
        problem = NormActProblem(x.shape, x.affine.activation, x.gate is not None, x.dtype, "cpu")
        gate = -1 if x.gate is None else x.gate.buffer
        step = native.affine_step(problem, *self._vectors(x.affine), x.buffer, y, gate)
        self.steps.append(step)
        x.buffer, x.affine, x.gate = step.y, None, None
        return x

    def _gate(self, excite: PackedSqueezeExcite, means: Means, dtype: torch.dtype | None = None) -> Gate:
        fc1, bias1, fc2, bias2 = excite.weights
        hidden = self._linear(means.buffer, means.shape[0], fc1, bias1, excite.activation)
        return Gate(self._linear(hidden, means.shape[0], fc2, bias2, excite.gate_activation))

    def _linear(self, x: int, rows: int, weight: Tensor, bias: Tensor, activation: str) -> int:
        """`activation(x @ weight.t() + bias)`, in float32."""
        out, channels = weight.shape
        problem = native.linear(rows, out, channels, activation)
        _check(problem)
        step = native.conv_step(problem, x, self.buffer(rows, out))
        self._give_weights(step, weight[:, :, None, None], bias)
        self.steps.append(step)
        return step.y


class Noted:
    """A unit of a form that notes its call."""

    def __init__(self, packed: Any, note: Callable):
        self._packed, self._note = packed, note

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._note(self._packed, *arguments, **options)

    def beside(self, other: Any, x: Map) -> None:
        """Never: each convolution reads for itself."""


def _check(problem: ConvProblem | NormActProblem) -> None:
    reason = native.refuse(problem)
    if reason is not None:
        raise Refused(reason)


class Program:
    """Several forms one after another for images of a shape and dtype: `program(x)`, or `program(x, y)` into a map in
    channels_last. Attributes: `shape` of the result.

    Raises `Refused` where csrc/cpu has not all that the forms compute.
    """

    def __init__(self, forms: Sequence[Form], shape: Sequence[int], dtype: torch.dtype):
        recorder = Recorder(shape, dtype)
        x, own = recorder.input, False
        with torch.inference_mode(False), torch.no_grad():
            for form in forms:
                try:
                    x, own = recorder.bound(form).run(x, own), True
                except (TypeError, AttributeError) as error:  # it calls what is no unit
                    raise Refused(f"a {type(form).__name__} computes more than csrc/cpu has: {error}") from error
            x = recorder.value(x)
        if x.buffer == _INPUT:
            raise Refused("it gives its input")
        _rename(recorder.steps, x.buffer, _OUTPUT)
        offsets, size = _placed(recorder.steps, recorder.sizes)
        self.shape, self.dtype = torch.Size(x.shape), dtype
        self._run = native.Program(recorder.steps, recorder.kept, offsets, size)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if y is None:
            y = torch.empty(self.shape, dtype=self.dtype, device="cpu", memory_format=torch.channels_last)
        self._run([x.data_ptr(), y.data_ptr()])
        return y


_READ, _WRITTEN = ("x", "residual", "gate", "sums"), ("y", "sums")


def _rename(steps: Sequence[Step], old: int, new: int) -> None:
    for step in steps:
        for name in {*_READ, *_WRITTEN}:
            if getattr(step, name) == old:
                setattr(step, name, new)


def _placed(steps: Sequence[Step], sizes: dict[int, int]) -> tuple[list[int | None], int]:
    """Where in an arena each buffer begins, None for the input and the result; and the size of the arena.

    Two buffers share memory where no step stands between the first that writes and the last that reads of both.
    """
    lives: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        for name in (*_READ, *_WRITTEN):
            buffer = getattr(step, name)
            if buffer > _OUTPUT:
                lives.setdefault(buffer, [i, i])[1] = i
    placed: list[tuple[int, int, int, int]] = []
    offsets: list[int | None] = [None] * len(sizes)
    for buffer, (first, last) in sorted(lives.items(), key=lambda item: -sizes[item[0]]):
        need = -(-(sizes[buffer] + _BEHIND) // native.LINE) * native.LINE
        start = 0
        for begin, end, since, until in sorted(placed):
            if since <= last and first <= until:
                if begin - start >= need:
                    break
                start = max(start, end)
        placed.append((start, start + need, first, last))
        offsets[buffer] = start
    return offsets, max((end for _, end, _, _ in placed), default=0)
