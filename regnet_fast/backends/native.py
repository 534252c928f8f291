"""The kernels of csrc/cpu for networks in evaluation, compiled at first use: single operations, and programs of many.

Convolutions in float32 and bfloat16 with float32 sums, whose prologue (gate, or scale, shift and activation) is computed
as they read, and whose epilogue adds bias and residual and makes the channel means on the way; everything in
channels_last, a stem's image also in NCHW. Weights are laid out once, for every input shape.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import cpu_library
from .cpu_library import Step
from .problem import Apart, ConvProblem, Geometry, NormActProblem, Problem, Run, SqueezeExciteProblem

CONV, MEANS, AFFINE = range(3)
"""The kinds of steps."""

ACTIVATION_CODES = {"none": 0, "relu": 1, "silu": 2, "sigmoid": 3}
"""The activations of csrc/cpu."""

_library = partial(cpu_library.library, "program")
_FEW = 4  # channels of an image that is read in NCHW
LINE = 64  # bytes, which memory begins at a multiple of


def refuse(problem: Problem) -> str | None:
    """Why csrc/cpu cannot serve here, or None."""
    if problem.device != "cpu":
        return f"csrc/cpu computes on a CPU, not on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"csrc/cpu computes in float32 and bfloat16, not in {problem.dtype}"
    for name in (problem.activation, getattr(problem, "gate_activation", "none")):
        if name not in ACTIVATION_CODES:
            return f"csrc/cpu has no {name}"
    if isinstance(problem, ConvProblem):
        reason = _refuse_groups(problem.input_shape[1], problem.out_channels, problem.geometry.groups)
        if reason is not None:
            return reason
    if is_in_torch_dispatch_mode():
        return "csrc/cpu works on memory, which dispatch modes (tracing, counting) do not see"
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


class Weights:
    """A convolution's weight and bias as csrc/cpu lays them out; `give` points a step to them."""

    def __init__(self, step: Step, weight: Tensor, bias: Tensor | None):
        lib = _library()
        self.packed = aligned(lib.packed_size(step))
        given = weight.detach().float().contiguous()
        lib.pack_weight(step, given.data_ptr(), self.packed.data_ptr())
        self.bias = padded(torch.zeros(weight.shape[0], device="cpu") if bias is None else bias)

    def give(self, step: Step) -> Step:
        step.weight, step.bias = self.packed.data_ptr(), self.bias.data_ptr()
        return step


def aligned(size: int) -> Tensor:
    """So many bytes that begin where a line of the cache does."""
    memory = torch.empty(size + LINE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % LINE
    return memory[start : start + size]


def padded(vector: Tensor) -> Tensor:
    """A vector in float32 behind which a kernel may read whole vectors."""
    made = torch.zeros(vector.numel() + 128, dtype=torch.float32, device="cpu")
    made[: vector.numel()] = vector.detach().flatten()
    return made


class Program:
    """Steps over numbered buffers, run by one call.

    Args:
        steps: in their order.
        keep: what the steps point to.
        offsets: where each buffer begins in the program's own memory, None for those that a call gives.
        size: bytes of that memory.
        shape: of the result.

    `program(pointers)` runs it with torch's number of threads, on the addresses of the buffers that the call gives, the
    first ones. Safe to share between threads.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        keep: object,
        offsets: Sequence[int | None],
        size: int = 0,
        shape: Sequence[int] = (),
    ):
        self._keep, self._lib, self._offsets, self._size, self.shape = keep, _library(), offsets, size, torch.Size(shape)
        self.steps = len(steps)
        self._handle = self._lib.new_program((Step * len(steps))(*steps), len(steps))
        if not self._handle:
            raise MemoryError("There is no memory for a program of csrc/cpu.")
        weakref.finalize(self, self._lib.free_program, self._handle)
        self._scratch = self._lib.scratch_size(self._handle)
        self._free: list[tuple[int, Tensor, ctypes.Array]] = []

    def __call__(self, pointers: Sequence[int | None]) -> None:
        threads = torch.get_num_threads()
        try:
            held = self._free.pop()
        except IndexError:
            held = (0, None, None)
        if held[0] < threads:
            memory = aligned(self._size + threads * self._scratch)
            start = memory.data_ptr()
            places = (None if offset is None else start + offset for offset in self._offsets)
            held = threads, memory, (ctypes.c_void_p * len(self._offsets))(*places)
        array = held[2]
        for i, pointer in enumerate(pointers):
            array[i] = pointer
        self._lib.run_program(self._handle, array, held[1].data_ptr() + self._size, threads)
        self._free.append(held)


def bands_of(step: Step) -> int:
    """Into how many sums for each image and channel a convolution adds its results."""
    return _library().bands_of(step)


class Conv(Run):
    """A convolution with weights laid out for every input shape."""

    label = "csrc/cpu"

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None):
        self.problem, self.any_layout = problem, problem.input_shape[1] <= _FEW and not problem.gate
        self.weights = Weights(conv_step(problem), weight, bias)
        self._plain = self._program(False)
        self._planar = self._program(False, True) if self.any_layout else None
        self._with_means = self._program(True)

    def _program(self, means: bool, planar: bool = False) -> Program:
        p = self.problem
        residual, gate = 2 if p.residual else -1, 3 if p.gate else -1
        step = self.weights.give(conv_step(p, 0, 1, residual, gate, 4 if means else -1))
        step.planar = planar
        if not means:
            return Program([step], self.weights, [None] * 4)
        self._bands = bands_of(step)
        return Program([step, means_step(p.output_shape, self._bands, 4, 5)], self.weights, [None] * 6)

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        y = self._result(residual if into_residual else None)
        gate = None if gate is None else gate.float().contiguous()
        last = self._planar is None or x.is_contiguous(memory_format=torch.channels_last)
        (self._plain if last else self._planar)([x.data_ptr(), y.data_ptr(), _at(residual), _at(gate)])
        return y

    def with_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result and its means, (N, K) in float32."""
        n, k = self.problem.output_shape[:2]
        y = self._result(None)
        sums = torch.empty(n * self._bands * k + 2 * LINE, dtype=torch.float32, device="cpu")
        means = torch.empty((n, k), dtype=torch.float32, device="cpu")
        self._with_means([x.data_ptr(), y.data_ptr(), None, None, sums.data_ptr(), means.data_ptr()])
        return y, means

    def _result(self, given: Tensor | None) -> Tensor:
        p = self.problem
        if given is not None:
            return given
        return torch.empty(p.output_shape, dtype=p.dtype, device="cpu", memory_format=torch.channels_last)


def means_step(shape: Sequence[int], bands: int, sums: int, means: int) -> Step:
    """The channel means of a map from the sums of its bands."""
    n, k, h, w = shape
    return Step(kind=MEANS, images=n, channels=k, height=bands, width=h * w, x=sums, y=means, residual=-1, gate=-1)


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def prepare_conv(problem: ConvProblem, weight: Tensor, bias: Tensor | None) -> Conv:
    """The convolution bound to its weights."""
    return Conv(problem, weight, bias)
