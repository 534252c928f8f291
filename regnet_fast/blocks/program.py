"""Blocks on a CPU as one program of csrc/cpu: what their forms do is recorded once, and run by one call.

A form is bound to units that compute nothing: each notes a step between numbered buffers and gives the map that the
step would make. So a program does what the form's own `run` says, whatever the form. The buffers share one arena, where
one that is not read any more makes room for the next. A batch goes through each stage in parts that fit the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import ConvProblem, Geometry, NormActProblem, native
from ..backends.cpu_library import Step
from ..ops.convolution import PackedConv
from ..ops.join import PackedJoin
from ..ops.norm_act import PackedNormAct
from ..ops.squeeze_excite import PackedSqueezeExcite
from .forms import Form, Head, Stem
from .units import ActivationUnit, Bordered, Borders, LinearUnit, PackedChannelConv, Refused, Unit

_INPUT, _OUTPUT = 0, 1
_BEHIND = 256  # bytes behind a buffer

_BYTES_PER_THREAD = 5e6
"""How large a map may be for the maps before and after it to be still in the cache when they are needed: measured on
two threads with 1 MB of second-level cache each and 32 MB of third-level cache (docs/cpu.md).
"""

_BYTES_BESIDE_MATRIX_UNIT = 2.5e6
"""The same beside the matrix unit, which is so fast that only the second-level cache, 2 MB there, is near enough."""


def images(form: Form, shape: Sequence[int], dtype: torch.dtype) -> int:
    """How many images of a batch on a CPU go through a stage at a time, so that the widest map of its first form, which
    is the stage's widest, fits.
    """
    if shape[0] == 1:
        return 1
    room = _BYTES_PER_THREAD * torch.get_num_threads()
    if form.dense and dtype.itemsize == 2:
        room *= 2  # arithmetic and not memory is short there, and it is faster on more images
    fit = int(room / (form.widest(*shape[1:]) * dtype.itemsize))
    return min(1 << max(fit, 1).bit_length() - 1, shape[0])


def _beside_the_matrix_unit(steps: Sequence[Step]) -> int | None:
    """How many images go through the steps of a stage at a time, so that its widest map fits near the matrix unit; None
    where that computes none of them, or where their weights, which every part reads anew, do not fit as well.
    """
    own = [step for step in steps if step.kind == native.CONV and step.way == native.MATRIX]
    weights = sum(2 * s.out_channels * s.channels // s.groups * s.kernel[0] * s.kernel[1] for s in own)
    room = _BYTES_BESIDE_MATRIX_UNIT * torch.get_num_threads()
    if not own or weights > room:
        return None
    widest = max(max(s.channels * s.height * s.width, s.out_channels * s.out_height * s.out_width) for s in own)
    return 1 << max(int(room / (2 * widest)), 1).bit_length() - 1


def counts(batch: int, most: int) -> list[int]:
    """The images of each part of a batch, with so many in one at most, as even as can be."""
    count = -(-batch // most)
    return [batch // count + (i < batch % count) for i in range(count)]


@dataclass(eq=False)
class Map:
    """A map that a step will have made, or the affine map with activation of one, which its readers compute."""

    buffer: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    affine: PackedNormAct | None = None
    gate: Gate | None = None
    planar: bool = False  # an image in NCHW, which a convolution alone reads
    readers: list[Step] = field(default_factory=list)  # the steps that compute the affine map as they read


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


class View(NamedTuple):
    """A buffer that is a part of another one, from a byte on."""

    base: int
    offset: int


class Recorder:
    """What the units of a form are called on to note their steps.

    `weights` are what was packed for these forms before, in a program for another shape.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, planar: bool = False, weights: native.Packing | None = None
    ):
        self.steps: list[Step] = []
        self.kept: list[Any] = []
        self.sizes: dict[int, int] = {_INPUT: 0, _OUTPUT: 0}
        self.views: dict[int, View] = {}
        self.weights = native.Packing() if weights is None else weights
        self.input = Map(_INPUT, tuple(shape), dtype, planar=planar)

    def run(self, stages: Sequence[Sequence[Form]], x: Map) -> Map:
        """What stages make of x. Neighbours that take as many images at a time are one, so that the map between them is
        still in the cache when it is read.
        """
        probe = Recorder(x.shape, x.dtype, x.planar, self.weights)
        behind, together = probe.input, []
        for forms in stages:
            own, begin = probe._images(forms, behind), len(probe.steps)
            behind = probe._through([probe.bound(form) for form in forms], behind)
            own = min(own, _beside_the_matrix_unit(probe.steps[begin:]) or own)
            if together and together[-1][1] == own:
                together[-1][0].extend(forms)
            else:
                together.append(([*forms], own))
        for forms, own in together:
            x = self._stage(forms, x, own)
        return self.value(x)

    def _stage(self, forms: Sequence[Form], x: Map, most: int) -> Map:
        """What a stage makes of x, in parts of the batch of so many images at most."""
        bound, parts = [self.bound(form) for form in forms], counts(x.shape[0], most)
        if len(parts) == 1:
            return self.value(self._through(bound, x))
        whole, done = None, 0
        for count in parts:
            begin = len(self.steps)
            y = self.value(self._through(bound, self._part(x, done, count)))
            if y.buffer in self.views:
                raise Refused("it gives its input")
            if whole is None:
                whole = Map(self.buffer(x.shape[0], *y.shape[1:], dtype=y.dtype), (x.shape[0], *y.shape[1:]), y.dtype)
            self.rename(y.buffer, self._part(whole, done, count).buffer, begin)
            done += count
        return whole

    def _images(self, forms: Sequence[Form], x: Map) -> int:
        """A stem goes with the stage behind it, whose maps are wider."""
        most = images(forms[0], x.shape, x.dtype)
        if len(forms) > 1 and x.shape[1] <= native.FEW_CHANNELS:
            probe = Recorder(x.shape, x.dtype, x.planar, self.weights)
            behind = probe._through([probe.bound(forms[0])], probe.input)
            most = min(most, images(forms[1], behind.shape, x.dtype))
        return most

    @staticmethod
    def _through(bound: Sequence[Form], x: Map) -> Map:
        own = False
        for form in bound:
            try:
                x, own = form.run(x, own), True
            except (TypeError, AttributeError) as error:  # it calls what is no unit
                raise Refused(f"a {type(form).__name__} computes more than csrc/cpu has: {error}") from error
        return x

    def _part(self, x: Map, first: int, count: int) -> Map:
        """Some images of a map."""
        self.sizes[len(self.sizes)] = 0
        number = len(self.sizes) - 1
        self.views[number] = View(x.buffer, first * torch.Size(x.shape[1:]).numel() * x.dtype.itemsize)
        return Map(number, (count, *x.shape[1:]), x.dtype, planar=x.planar)

    def rename(self, old: int, new: int, begin: int = 0) -> None:
        """Put a buffer in the place of another one in all steps from one on."""
        for step in self.steps[begin:]:
            for name in {*_READ, *_WRITTEN}:
                if getattr(step, name) == old:
                    setattr(step, name, new)
        self.views = {i: view._replace(base=new) if view.base == old else view for i, view in self.views.items()}

    def bound(self, form: Form) -> Form:
        """The form over units that note what they are called for."""
        bound = form.bind(self._unit)
        for name in ("pool", "blur"):
            if isinstance(getattr(form, name, None), nn.Module):
                setattr(bound, name, self._layer(getattr(form, name)))
        if isinstance(form, Stem):
            bound.rest = tuple(map(self._layer, form.rest))
        if isinstance(form, Head):
            bound.pool = self._average
            bound.as_map = lambda means: replace(means, shape=(*means.shape, 1, 1))
            bound.as_rows = lambda x: replace(x, shape=x.shape[:2])
        return bound

    def _layer(self, layer: nn.Module) -> Callable[[Map], Map]:
        """A host's layer without weights."""
        if type(layer) is nn.Identity:
            return self.value
        kind = _window_kind(layer)
        if kind is None:
            raise Refused(f"a {type(layer).__name__} is no operation of csrc/cpu")

        def pooled(x: Map) -> Map:
            window = [nn.modules.utils._pair(getattr(layer, name, 1)) for name in _WINDOW]
            try:
                shape = _pooled(layer, torch.empty(x.shape, dtype=torch.float32, device="meta")).shape
            except RuntimeError as error:
                raise Refused(f"a {type(layer).__name__} of such a window has no result: {error}") from error
            x, y = self.value(x), self.buffer(*shape, dtype=x.dtype)
            self.steps.append(native.window_step(kind, x.shape, shape, x.dtype, window, x.buffer, y))
            return Map(y, tuple(shape), x.dtype)

        return pooled

    def _average(self, x: Map) -> Map:
        """The means of a map, in its dtype."""
        _check(NormActProblem(x.shape, "none", False, x.dtype, "cpu"))
        x = x if x.gate is None and not x.planar else self.value(x)
        y = self.buffer(*x.shape[:2], dtype=x.dtype)
        step = native.average_step(x.shape, x.dtype, x.buffer, y)
        if x.affine is not None:
            self._read_through(step, x)
        self.steps.append(step)
        return Map(y, x.shape[:2], x.dtype)

    def _unit(self, unit: Unit) -> Callable:
        if isinstance(unit, LinearUnit):
            return Noted(unit, self._classified)
        packed = self.weights.get(unit)
        if packed is None:
            packed = self.weights[unit] = unit.pack(self.input.dtype)
        if isinstance(packed, Bordered):
            return Noted(packed.conv, partial(self._conv, borders=packed.unit.borders))
        for kind, note in (
            (PackedConv, self._conv),
            (PackedNormAct, self._affine),
            (PackedSqueezeExcite, self._gate),
            (PackedChannelConv, self._gate_along_channels),
            (ActivationUnit, self._activated),
            (PackedJoin, self._joined),
        ):
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
        borders: Callable[[Sequence[int]], Borders] | None = None,
    ) -> Map | tuple[Map, Means]:
        if x.shape[1] != conv.weight.shape[1] * conv.geometry.groups:
            raise Refused(f"a map of {x.shape[1]} channels meets a weight of the shape {tuple(conv.weight.shape)}")
        residual = None if residual is None else self.value(residual)
        x = x if gate is None else self.value(x)  # a step has one gate
        if x.planar and x.shape[1] > native.FEW_CHANNELS:
            raise Refused("an image in NCHW has few channels")
        facts = conv.activation, gate is not None, residual is not None, x.dtype, "cpu"
        out_channels, _, *kernel = conv.weight.shape
        problem = ConvProblem(x.shape, out_channels, tuple(kernel), conv.geometry, *facts)
        shape = problem.output_shape
        if borders is not None:  # of which those behind may be larger than those before
            around = borders(x.shape[2:])
            problem = replace(problem, geometry=conv.geometry._replace(padding=tuple(first for first, _ in around)))
            size = (n + sum(both) for n, both in zip(x.shape[2:], around, strict=True))
            shape = (*shape[:2], *conv.geometry.output_size([*size], kernel))
        _check(problem)
        if residual is not None and residual.shape != shape:
            raise Refused(f"a map of the shape {residual.shape} is added to one of the shape {shape}")
        y = residual.buffer if into_residual else self.buffer(*shape, dtype=x.dtype)
        step = native.conv_step(problem, x.buffer, y, -1 if residual is None else residual.buffer)
        step.out_height, step.out_width = shape[2:]
        if gate is not None:
            step.gate = gate.buffer
        if x.affine is not None:
            self._read_through(step, x)
        step.planar = x.planar
        self._give_weights((conv, 0), step, conv.folded)
        if means:
            step.sums = _OUTPUT  # any: the bands are others where there are sums
            step.sums = self.buffer(shape[0], native.bands_of(step), shape[1])
        self.steps.append(step)
        made = Map(y, shape, x.dtype)
        return (made, self._means(step, shape)) if means else made

    def _give_weights(self, key: tuple, step: Step, folded: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        found = self.weights.get(key)
        if found is None:
            found = self.weights[key] = native.Weights(step, *folded(), self.weights.room)
        if not found.serves(step):
            raise Refused("its weights are laid out for a convolution that reads a map as it is")
        self.kept.append(found)
        found.give(step)

    def _read_through(self, step: Step, x: Map) -> None:
        """The step computes the affine map of x as it reads."""
        scale, shift = self._vectors(x.affine)
        step.scale, step.shift = scale.data_ptr(), shift.data_ptr()
        step.before = native.ACTIVATION_CODES[x.affine.activation]
        if x.gate is not None:
            step.gate = x.gate.buffer
        x.readers.append(step)

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

    def _activated(self, unit: ActivationUnit, x: Map, *, consume: bool = False) -> Map:
        if x.affine is None and unit.activation != "none":
            ones = torch.ones(x.shape[1], dtype=torch.float32, device="cpu")
            return self._affine(PackedNormAct(ones, torch.zeros_like(ones), unit.activation), x, consume=consume)
        raise Refused(f"{unit.path} is an activation of a map that has one")

    def _joined(self, join: PackedJoin, x: Map, gate: Gate | None = None, residual: Map | None = None) -> Map:
        problem = NormActProblem(x.shape, join.activation, gate is not None, x.dtype, "cpu")
        _check(problem)
        x, residual = self.value(x), None if residual is None else self.value(residual)
        if residual is not None and residual.shape != x.shape:
            raise Refused(f"a map of the shape {residual.shape} is added to one of the shape {x.shape}")
        ones = torch.ones(x.shape[1], dtype=torch.float32, device="cpu")
        vectors = native.padded(ones), native.padded(torch.zeros_like(ones))
        self.kept.append(vectors)
        buffers = (-1 if gate is None else gate.buffer), (-1 if residual is None else residual.buffer)
        self.steps.append(native.affine_step(problem, *vectors, x.buffer, x.buffer, *buffers))
        return x

    def value(self, x: Map, consume: bool = False) -> Map:
        """x itself, once the affine map that it may be of is computed."""
        if x.planar:
            raise Refused("an image in NCHW is read by a convolution alone")
        if x.affine is None:
            return x
        y = x.buffer if consume and not x.readers else self.buffer(*x.shape, dtype=x.dtype)
        problem = NormActProblem(x.shape, x.affine.activation, x.gate is not None, x.dtype, "cpu")
        gate = -1 if x.gate is None else x.gate.buffer
        step = native.affine_step(problem, *self._vectors(x.affine), x.buffer, y, gate)
        self.steps.insert(self.steps.index(x.readers[0]) if x.readers else len(self.steps), step)
        for reader in x.readers:  # nor need they compute it again
            reader.x, reader.gate, reader.scale, reader.shift, reader.before = y, -1, None, None, 0
        x.buffer, x.affine, x.gate, x.readers = step.y, None, None, []
        return x

    def _gate(self, excite: PackedSqueezeExcite, means: Means, dtype: torch.dtype | None = None) -> Gate:
        hidden, names = means, (excite.activation, excite.gate_activation)
        for i, name in enumerate(names):
            weight, bias = excite.weights[2 * i : 2 * i + 2]
            hidden = self._linear((excite, i), hidden, weight, bias, name)
        return Gate(hidden.buffer)

    def _gate_along_channels(self, conv: PackedChannelConv, means: Means, dtype: torch.dtype | None = None) -> Gate:
        (n, channels), size = means.shape, conv.weight.shape[2]
        facts = Geometry(padding=(0, size // 2)), conv.gate_activation, False, False, torch.float32, "cpu"
        problem = ConvProblem((n, 1, 1, channels), 1, (1, size), *facts)
        _check(problem)
        step = native.conv_step(problem, means.buffer, self.buffer(n, channels))
        self._give_weights((conv, 0), step, lambda: (conv.weight[:, :, None], None))
        self.steps.append(step)
        return Gate(step.y)

    def _classified(self, unit: LinearUnit, means: Map) -> Map:
        weight = unit.linear.weight.detach().flatten(1)
        return self._linear((unit, 0), means, weight, unit.linear.bias, "none")

    def _linear(self, key: tuple, x: Map | Means, weight: Tensor, bias: Tensor | None, activation: str) -> Map:
        """`activation(x @ weight.t() + bias)`, in the dtype of x."""
        out, channels = weight.shape
        problem = native.linear(x.shape[0], out, channels, activation, x.dtype)
        _check(problem)
        step = native.conv_step(problem, x.buffer, self.buffer(x.shape[0], out, dtype=x.dtype))
        self._give_weights(key, step, lambda: (weight[:, :, None, None], bias))
        self.steps.append(step)
        return Map(step.y, (x.shape[0], out), x.dtype)


class Noted:
    """A unit of a form that notes its call."""

    def __init__(self, packed: Any, note: Callable):
        self._packed, self._note = packed, note

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._note(self._packed, *arguments, **options)

    def beside(self, other: Any, x: Map) -> None:
        """Never: each convolution reads for itself."""

    def ahead(self, second: Any, x: Map, means: bool) -> None:
        """Never: each convolution writes its map."""


_WINDOW = ("kernel_size", "stride", "padding", "dilation")


def _pooled(layer: nn.MaxPool2d | nn.AvgPool2d, x: Tensor) -> Tensor:
    """What a pooling gives, whatever stands in the place of its forward."""
    facts = layer.kernel_size, layer.stride, layer.padding
    if type(layer) is nn.MaxPool2d:
        return F.max_pool2d(x, *facts, layer.dilation, layer.ceil_mode)
    return F.avg_pool2d(x, *facts, layer.ceil_mode, layer.count_include_pad)


def _window_kind(layer: nn.Module) -> int | None:
    """The kind of step that a pooling is, or None."""
    if type(layer) is nn.MaxPool2d and not layer.return_indices:
        return native.LARGEST
    if type(layer) is not nn.AvgPool2d or layer.divisor_override is not None:
        return None
    counts_padding = layer.count_include_pad and nn.modules.utils._pair(layer.padding) != (0, 0)
    return None if counts_padding else native.WINDOW_MEAN


def _check(problem: ConvProblem | NormActProblem) -> None:
    reason = native.refuse(problem)
    if reason is not None:
        raise Refused(reason)


class Program:
    """Stages one after another, each of several forms, for images of a shape and dtype: `program(x)`, or
    `program(x, check)`, which gives None where `check()` says that it does not count, and asks that meanwhile.

    Args:
        stages: the forms of each; a batch goes through each in parts.
        shape, dtype: of the images.
        planar: that they come in NCHW, as few channels may; else they are laid out in channels_last where they are not.
        weights: of these very forms, which programs for several shapes share.

    Attributes: `shape` of the result. Raises `Refused` where csrc/cpu has not all that the forms compute.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Form]],
        shape: Sequence[int],
        dtype: torch.dtype,
        planar: bool = False,
        weights: native.Packing | None = None,
    ):
        recorder = Recorder(shape, dtype, planar, weights)
        with torch.inference_mode(False), torch.no_grad():
            x = recorder.run(stages, recorder.input)
        if x.buffer == _INPUT:
            raise Refused("it gives its input")
        recorder.rename(x.buffer, _OUTPUT)
        places, size = _placed(recorder)
        self.shape, self.dtype, self._planar = torch.Size(x.shape), dtype, planar
        self._layout = torch.channels_last if len(x.shape) == 4 else torch.contiguous_format
        self._run = native.Program(recorder.steps, recorder.kept, places, size)

    def __call__(self, x: Tensor, check: Callable[[], bool] | None = None) -> Tensor | None:
        x, y = self._maps(x)
        return y if self._run([x.data_ptr(), y.data_ptr()], check) else None

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input as it is read, and room for the result."""
        x = x.contiguous(memory_format=torch.contiguous_format if self._planar else torch.channels_last)
        return x, torch.empty(self.shape, dtype=self.dtype, device="cpu", memory_format=self._layout)

    def timed(self, x: Tensor) -> list[tuple[Step, float]]:
        """The steps of one run with their seconds."""
        x, y = self._maps(x)
        return [*zip(self._run.steps, self._run.seconds([x.data_ptr(), y.data_ptr()]), strict=True)]


_READ, _WRITTEN = ("x", "residual", "gate", "sums"), ("y", "sums")


def _placed(recorder: Recorder) -> tuple[list[native.Place], int]:
    """Where each buffer lies, and the size of the arena.

    Two buffers share memory where no step stands between the first that writes and the last that reads of both.
    """
    sizes, views = recorder.sizes, recorder.views
    lives: dict[int, list[int]] = {}
    for i, step in enumerate(recorder.steps):
        for name in (*_READ, *_WRITTEN):
            buffer = getattr(step, name)
            buffer = views[buffer].base if buffer in views else buffer
            if buffer > _OUTPUT:
                lives.setdefault(buffer, [i, i])[1] = i
    taken: list[set[tuple[int, int]]] = [set() for _ in recorder.steps]  # while each step runs
    places = [native.Place(i) if i in (_INPUT, _OUTPUT) else native.Place(None) for i in sizes]
    for buffer, (first, last) in sorted(lives.items(), key=lambda item: -sizes[item[0]]):
        need = -(-(sizes[buffer] + _BEHIND) // native.LINE) * native.LINE
        start, meanwhile = 0, taken[first : last + 1]
        for begin, end in sorted(set().union(*meanwhile)):
            if begin - start >= need:
                break
            start = max(start, end)
        for places_taken in meanwhile:
            places_taken.add((start, start + need))
        places[buffer] = native.Place(None, start)
    for number, (base, offset) in views.items():
        places[number] = places[base]._replace(offset=places[base].offset + offset)
    return places, max((end for ends in taken for _, end in ends), default=0)
