"""The kernels of csrc/cpu for networks in evaluation, compiled at first use: single operations and programs of many.

Convolutions in float32 and bfloat16 with float32 sums, whose prologue (gate, or scale, shift and activation) is
computed as they read, and whose epilogue adds bias and residual and makes the channel means on the way; max pools and
global means. Everything is in channels_last, a stem's image also in NCHW. Weights are laid out once, for every shape of
input.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..observer import observer
from . import cpu_library, reference
from .cpu_library import CHECK, Step
from .problem import Apart, ConvProblem, Geometry, InTurn, NormActProblem, Problem, Run, SqueezeExciteProblem

CONV, MEANS, AFFINE, LARGEST, AVERAGE, WINDOW_MEAN = range(6)
"""The kinds of steps."""
DIRECT, WINOGRAD, DEPTHWISE, MATRIX = range(4)
"""The ways to compute a convolution."""

ACTIVATION_CODES = {
    name: code
    for code, name in enumerate(("none", "relu", "silu", "sigmoid", "relu6", "hardswish", "hardsigmoid", "leaky_relu"))
}
"""The activations of csrc/cpu."""

_library = partial(cpu_library.library, "program")
_KEPT = 32  # input shapes for which programs are kept
FEW_CHANNELS = 4
"""Up to how many channels an image is read in NCHW as well."""

LINE, LARGE_PAGE = 64, 2 << 20  # bytes, which memory begins at a multiple of
LEAST_PIECE, MOST_PIECE = 256 << 10, 16 << 20  # bytes for weights, taken from the system at once


def refuse(problem: Problem) -> str | None:
    """Why csrc/cpu cannot serve here, or None."""
    if problem.device != "cpu":
        return f"csrc/cpu computes on a CPU, not on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"csrc/cpu computes in float32 and bfloat16, not in {problem.dtype}"
    others = (getattr(problem, name, "none") for name in ("gate_activation", "first_activation"))
    for name in (problem.activation, *others):
        if name not in ACTIVATION_CODES:
            return f"csrc/cpu has no {name}"
    if isinstance(problem, ConvProblem):
        reason = _refuse_groups(problem.input_shape[1], problem.out_channels, problem.geometry.groups)
        if reason is not None:
            return reason
        if min(problem.output_shape) < 1:
            return f"the result would have the shape {problem.output_shape}"
    return cpu_library.refuse("program")


def _refuse_groups(channels: int, out_channels: int, groups: int) -> str | None:
    wide, out = channels // groups, out_channels // groups
    if groups == 1 or (wide == out and (wide % 8 == 0 or wide in (1, 2, 4))):
        return None
    return f"csrc/cpu has groups of 1, 2, 4 or a multiple of 8 channels, not of {wide} in and {out} out"


def conv_step(
    problem: ConvProblem, x: int = -1, y: int = -1, residual: int = -1, gate: int = -1, sums: int = -1
) -> Step:
    """A convolution between numbered buffers, without its weights."""
    n, c, h, w = problem.input_shape
    _, k, out_height, out_width = problem.output_shape
    g = problem.geometry
    step = Step(kind=CONV, activation=ACTIVATION_CODES[problem.activation], groups=g.groups)
    step.images, step.channels, step.height, step.width = n, c, h, w
    step.out_channels, step.out_height, step.out_width = k, out_height, out_width
    step.kernel, step.stride, step.padding, step.dilation = problem.kernel, g.stride, g.padding, g.dilation
    step.bfloat16 = problem.dtype == torch.bfloat16
    step.x, step.y, step.residual, step.gate, step.sums = x, y, residual, gate, sums
    return step


NARROW = 8
"""From how many channels on groups are computed by the matrix unit."""

DENSE_WINOGRAD, GROUP_WINOGRAD = 32, 16
"""From how many channels on a 3x3 convolution in float32 is by Winograd's F(2x2, 3x3): of all, or of each group."""


def _way(step: Step) -> int:
    """How a convolution is computed, which the layout of its weights follows."""
    if step.bfloat16 and _library().has_matrix_unit():
        width = min(step.channels, step.out_channels) // step.groups
        if step.groups == 1 or width >= NARROW:
            return MATRIX
    if _reads_through(step) or step.dilation[1] != 1:
        return DIRECT
    if step.groups == step.channels == step.out_channels >= _library().lanes():
        able = step.kernel[0] in (3, 5) and step.kernel[1] in (3, 5) and step.stride[1] in (1, 2)
        return DEPTHWISE if able else DIRECT
    channels = min(step.channels, step.out_channels) // step.groups
    able = step.kernel[:] == [3, 3] and step.stride[:] == step.dilation[:] == [1, 1] and not step.bfloat16
    return WINOGRAD if able and channels >= (DENSE_WINOGRAD if step.groups == 1 else GROUP_WINOGRAD) else DIRECT


def _reads_through(step: Step) -> bool:
    return step.gate >= 0 or bool(step.scale) or bool(step.planar)


class Weights:
    """A convolution's weight and bias as csrc/cpu lays them out for a step; `give` points one to them."""

    def __init__(self, step: Step, weight: Tensor, bias: Tensor | None, room: Room | None = None):
        lib = _library()
        self.way = step.way = _way(step)
        size = lib.packed_size(step)
        self.packed = aligned(size) if room is None else room.take(size)
        given = weight.detach().float().contiguous()
        lib.pack_weight(step, given.data_ptr(), self.packed.data_ptr(), torch.get_num_threads())
        self.bias = padded(torch.zeros(weight.shape[0], dtype=torch.float32, device="cpu") if bias is None else bias)

    def serves(self, step: Step) -> bool:
        """Whether the step can read them."""
        return self.way in (DIRECT, MATRIX) or not _reads_through(step)

    def give(self, step: Step) -> Step:
        step.way = self.way
        step.weight, step.bias = self.packed.data_ptr(), self.bias.data_ptr()
        return step


def aligned(size: int) -> Tensor:
    """So many bytes that begin where a line of the cache does, and from 2 MiB on where a large page does."""
    boundary = LARGE_PAGE if size >= LARGE_PAGE else LINE
    memory = torch.empty(size + boundary, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % boundary
    memory = memory[start : start + size]
    if boundary == LARGE_PAGE:
        _library().ask_for_large_pages(memory.data_ptr(), size)
    return memory


class Room:
    """Memory for the weights of a network, one after the other, so that they fill large pages. Safe between threads."""

    def __init__(self) -> None:
        self._piece, self._used, self._all, self._lock = aligned(0), 0, 0, threading.Lock()

    def take(self, size: int) -> Tensor:
        """So many bytes that begin where a line of the cache does. A new piece is as large as all before it."""
        with self._lock:
            start = -(-self._used // LINE) * LINE
            if start + size > self._piece.numel():
                start, self._piece = 0, aligned(max(size, min(max(LEAST_PIECE, self._all), MOST_PIECE)))
                self._all += self._piece.numel()
            self._used = start + size
            return self._piece[start : self._used]


class Packing(dict):
    """What was packed for the forms of a network, by key, and the room that its weights lie in."""

    def __init__(self) -> None:
        super().__init__()
        self.room = Room()


def padded(vector: Tensor) -> Tensor:
    """A vector in float32 behind which a kernel may read whole vectors."""
    made = torch.zeros(vector.numel() + 128, dtype=torch.float32, device="cpu")
    made[: vector.numel()] = vector.detach().flatten()
    return made


class Place(NamedTuple):
    """Where a buffer lies: in what a call gives, by its number, or in the program's own memory; and from which byte."""

    given: int | None
    offset: int = 0


class Program:
    """Steps over numbered buffers, run by one call.

    Args:
        steps: in their order.
        keep: what the steps point to.
        places: of each buffer.
        size: bytes of the program's own memory.

    It is cut for torch's number of threads when it is made. `program(pointers, check)` runs it with as many as there
    are then, on what the call gives, and says whether the result counts: what `check()` said, which is asked while the
    other threads begin. Safe to share between threads.

    Attributes: `steps`.
    """

    def __init__(self, steps: Sequence[Step], keep: object, places: Sequence[Place], size: int = 0):
        self.steps = steps
        self._keep, self._lib, self._places, self._size = keep, _library(), places, size
        self._given = [(i, place.given, place.offset) for i, place in enumerate(places) if place.given is not None]
        self._handle = self._lib.new_program((Step * len(steps))(*steps), len(steps), torch.get_num_threads())
        if not self._handle:
            raise MemoryError("There is no memory for a program of csrc/cpu.")
        weakref.finalize(self, self._lib.free_program, self._handle)
        self._scratch = self._lib.scratch_size(self._handle)
        self._free: list[tuple[int, Tensor, ctypes.Array]] = []

    def __call__(
        self,
        pointers: Sequence[int | None],
        check: Callable[[], bool] | None = None,
        seconds: ctypes.Array | None = None,
    ) -> bool:
        threads = torch.get_num_threads()
        try:
            held = self._free.pop()
        except IndexError:
            held = (0, None, None)
        if held[0] < threads:
            memory = aligned(self._size + threads * self._scratch)
            start = memory.data_ptr()
            own = (start + place.offset if place.given is None else None for place in self._places)
            held = threads, memory, (ctypes.c_void_p * len(self._places))(*own)
        array = held[2]
        for i, given, offset in self._given:
            pointer = pointers[given]
            array[i] = None if pointer is None else pointer + offset
        raised: list[BaseException] = []

        def checked() -> bool:
            try:
                return check()
            except BaseException as error:  # which cannot pass through C
                raised.append(error)
                return False

        asked = CHECK() if check is None else CHECK(checked)
        counts = self._lib.run_program(self._handle, array, held[1].data_ptr() + self._size, threads, asked, seconds)
        self._free.append(held)
        if raised:
            raise raised[0]
        return bool(counts)

    def seconds(self, pointers: Sequence[int | None]) -> list[float]:
        """The times of the steps of one run."""
        found = (ctypes.c_double * len(self.steps))()
        self(pointers, seconds=found)
        return list(found)


def bands_of(step: Step) -> int:
    """Into how many sums for each image and channel a convolution adds its results."""
    return _library().bands_of(step)


class Conv(Run):
    """A convolution with weights laid out for every input shape; of few channels also of an image in NCHW."""

    label = "csrc/cpu"
    shape = None  # that it serves alone

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None, packed: bool = True):
        self.problem, self.any_layout = problem, problem.input_shape[1] <= FEW_CHANNELS and not problem.gate
        self.weights = Weights(conv_step(problem, gate=0 if problem.gate else -1), weight, bias)
        self._programs: dict[tuple, Program] = {}

    def _program(self, x: Tensor, means: bool) -> tuple[Program, tuple[int, ...]]:
        planar = self.any_layout and not x.is_contiguous(memory_format=torch.channels_last)
        key = (x.shape, planar, means, torch.get_num_threads())
        found = self._programs.get(key)
        if found is None:
            problem = replace(self.problem, input_shape=tuple(x.shape))
            residual, gate = 2 if problem.residual else -1, 3 if problem.gate else -1
            steps = [self.weights.give(conv_step(problem, 0, 1, residual, gate, 4 if means else -1))]
            steps[0].planar = planar
            places, size = [*map(Place, range(4))], 0
            if means:
                n, k, _, _ = problem.output_shape
                bands = bands_of(steps[0])
                steps.append(means_step(problem.output_shape, bands, 4, 5))
                places, size = [*places, Place(None), Place(4)], -(-n * k * bands * 4 // LINE) * LINE
            found = Program(steps, self.weights, places, size), problem.output_shape
            self._programs = {**(self._programs if len(self._programs) < _KEPT else {}), key: found}
        return found

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        program, shape = self._program(x, False)
        y = residual if into_residual and residual is not None else _map(shape, x.dtype)
        gate = None if gate is None else gate.float().contiguous()
        if _starts("conv", x=x, gate=gate, residual=residual, weight=self.weights.packed, y=y):
            program([x.data_ptr(), y.data_ptr(), _at(residual), _at(gate)])
        return y

    def with_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result and its means, (N, K) in float32."""
        program, shape = self._program(x, True)
        y, means = _map(shape, x.dtype), _floats(*shape[:2])
        if _starts("conv", x=x, weight=self.weights.packed, y=y, means=means):
            program([x.data_ptr(), y.data_ptr(), None, None, means.data_ptr()])
        return y, means


class SqueezeExcite(Run):
    """The gate from the means, in float32."""

    label = "csrc/cpu"

    def __init__(self, problem: SqueezeExciteProblem, *weights: Tensor):
        names = problem.activation, problem.gate_activation
        self.layers = [
            Conv(linear(problem.batch, *weight.shape, name), weight[:, :, None, None], bias)
            for weight, bias, name in zip(weights[::2], weights[1::2], names, strict=True)
        ]

    def __call__(self, means: Tensor) -> Tensor:
        x = means.contiguous()
        for layer in self.layers:
            program, shape = layer._program(x.t()[None, :, :, None], False)
            y = _floats(means.shape[0], shape[1])
            if _starts("linear", x=x, weight=layer.weights.packed, y=y):
                program([x.data_ptr(), y.data_ptr(), None, None])
            x = y
        return x


def linear(rows: int, out: int, channels: int, activation: str, dtype: torch.dtype = torch.float32) -> ConvProblem:
    """`activation(x @ weight.t() + bias)` for so many rows of x, as a convolution of pixels."""
    facts = Geometry(), activation, False, False, dtype, "cpu"
    return ConvProblem((1, channels, rows, 1), out, (1, 1), *facts)


class NormAct(Run):
    """Scale, shift and activation in one pass."""

    label = "csrc/cpu"

    def __init__(self, problem: NormActProblem, scale: Tensor, shift: Tensor):
        vectors = padded(scale), padded(shift)
        step = affine_step(problem, *vectors, 0, 1, 2 if problem.gate else -1)
        self._program = Program([step], vectors, [*map(Place, range(3))])

    def __call__(self, x: Tensor, gate: Tensor | None, consume: bool) -> Tensor:
        y = x if consume else _map(x.shape, x.dtype)
        gate = None if gate is None else gate.float().contiguous()
        if _starts("norm_act", x=x, gate=gate, y=y):
            self._program([x.data_ptr(), y.data_ptr(), _at(gate)])
        return y


def affine_step(
    problem: NormActProblem, scale: Tensor, shift: Tensor, x: int, y: int, gate: int = -1, residual: int = -1
) -> Step:
    """`activation(x * gate * scale + shift + residual)`; the vectors are `padded`."""
    n, c, h, w = problem.input_shape
    step = Step(kind=AFFINE, activation=ACTIVATION_CODES[problem.activation], images=n, channels=c, height=h, width=w)
    step.bfloat16 = problem.dtype == torch.bfloat16
    step.scale, step.shift = scale.data_ptr(), shift.data_ptr()
    step.x, step.y, step.gate, step.residual, step.sums = x, y, gate, residual, -1
    return step


def means_step(shape: Sequence[int], bands: int, sums: int, means: int) -> Step:
    """The channel means of a map from the sums of its bands."""
    n, k, h, w = shape
    return Step(kind=MEANS, images=n, channels=k, height=bands, width=h * w, x=sums, y=means, residual=-1, gate=-1)


def window_step(
    kind: int,
    shape: Sequence[int],
    out: Sequence[int],
    dtype: torch.dtype,
    window: Sequence[Sequence[int]],
    x: int,
    y: int,
) -> Step:
    """`max_pool2d` of a map (LARGEST), or `avg_pool2d` that does not count the padding (WINDOW_MEAN); `window` is
    kernel, stride, padding and dilation.
    """
    n, c, h, w = shape
    step = Step(kind=kind, images=n, channels=c, height=h, width=w, out_height=out[2], out_width=out[3])
    step.kernel, step.stride, step.padding, step.dilation = map(tuple, window)
    step.bfloat16 = dtype == torch.bfloat16
    step.x, step.y, step.gate, step.residual, step.sums = x, y, -1, -1, -1
    return step


def average_step(shape: Sequence[int], dtype: torch.dtype, x: int, y: int) -> Step:
    """The channel means of a map, in its dtype."""
    n, c, h, w = shape
    step = Step(kind=AVERAGE, images=n, channels=c, height=h, width=w, bfloat16=dtype == torch.bfloat16)
    step.x, step.y, step.gate, step.residual, step.sums = x, y, -1, -1, -1
    return step


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _map(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _starts(name: str, **arguments: Tensor | None) -> bool:
    """Whether a kernel runs, of which whoever listens is told."""
    told = observer.get()
    return told is None or told.launch(name, {key: t for key, t in arguments.items() if t is not None})


prepare_conv = Conv
prepare_pair = Apart.by(prepare_conv)
prepare_back_to_back = InTurn.by(prepare_conv)
prepare_join = reference.join_in_place
prepare_squeeze_excite = SqueezeExcite
prepare_norm_act = NormAct
