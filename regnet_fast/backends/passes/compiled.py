"""The passes of a training step compiled from csrc/cpu, for float32 on a CPU.

Each reads every map once: a map is normalised, activated and gated on its way into a convolution, and its gradient goes
back through all three while the norm's sums are made. The convolutions are the framework's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_void_p
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import cpu_library
from ..activations import ACTIVATIONS
from ..cpu_library import RawTerm
from .operands import Excite, Norm, OutputNorm, Sums, Term
from .parts import ALL, of
from .sums import summed
from .torch import Gate, Passes, is_shared, known_means

_LAST = torch.channels_last
_library = partial(cpu_library.library, "passes")
_VECTOR = 16
_ROW = 128
"""The floats of a processor's vector at most, and how many a row has at least."""


def refuse(x: Tensor) -> str | None:
    """Why the passes over maps like x are not compiled ones, or None."""
    if not x.is_cpu or x.dtype != torch.float32 or not x.numel():
        return f"csrc/cpu has passes over float32 maps on a CPU, and these are {x.dtype} on {x.device}"
    if type(x) not in (Tensor, Parameter) or is_in_torch_dispatch_mode():
        return "csrc/cpu works on memory, which subclasses of Tensor and dispatch modes (tracing, counting) do not see"
    return cpu_library.refuse("passes")


@lru_cache(maxsize=1024)
def _row(channels: int) -> int:
    """The floats of a row: pixels side by side until they fill whole vectors, and loops are worth their beginning."""
    pixels = _VECTOR // math.gcd(channels, _VECTOR)
    return channels * pixels * -(-_ROW // (channels * pixels)) if channels < _ROW else channels


@lru_cache(maxsize=4096)
def _sizes(shape: torch.Size, threads: int) -> tuple[int, int, int, int, int]:
    """A map as the library takes it."""
    n, c, h, w = shape
    return n, c * h * w, c, _row(c), threads


def _floats(*size: int) -> Tensor:
    """Memory of the library's own type, whatever torch's defaults are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def _doubles(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device="cpu")


def _vectors(size: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """Parameters and statistics of so many values as the library takes them, in float32 and dense."""
    found = []
    for t in tensors:
        if t is not None:
            if t.numel() != size:
                raise RuntimeError(
                    f"a norm or a gate has {t.numel()} values of the shape {tuple(t.shape)}, expected {size}"
                )
            if t.dtype != torch.float32 or not t.is_contiguous():
                t = t.detach().float().contiguous()
        found.append(t)
    return found


def _at(*tensors: Tensor | None) -> list[int | None]:
    """Where the memory of tensors is. Raises RuntimeError where one has none here."""
    found = []
    for t in tensors:
        pointer = None
        if t is not None:
            pointer = t.data_ptr() if t.is_cpu else 0
            if not pointer:
                raise RuntimeError(
                    f"a tensor of the shape {tuple(t.shape)} has no memory on the CPU: it is on {t.device}"
                )
        found.append(pointer)
    return found


def _norm_rows(norm: Norm | None, channels: int) -> Tensor:
    """How a map is read: four rows."""
    width = _row(channels)
    if norm is None:
        return torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float32, device="cpu")[:, None].repeat(1, width)
    rows, vectors = _floats(4, width), _vectors(channels, *norm[:4])
    _library().norm_rows(*_at(*vectors, rows), norm.eps, channels, width)
    return rows


class _Memory:
    """Memory for some images after the others: the first ones are the most."""

    kept: Tensor | None = None

    def like(self, x: Tensor) -> Tensor:
        """For images such as x, until the next call."""
        if self.kept is None or self.kept.shape[0] < x.shape[0]:
            self.kept = torch.empty_like(x, memory_format=_LAST)
        return self.kept if self.kept.shape[0] == x.shape[0] else self.kept[: x.shape[0]]


class CompiledReader:
    """`torch.Reader`."""

    factor: Tensor | None = None

    def __init__(self, x: Tensor, norm: Norm | None, excite: Excite | None):
        self.x, self.excite = x, excite
        self.rows = None if norm is None and excite is None else _norm_rows(norm, x.shape[1])
        self.activation = 0 if norm is None else ACTIVATIONS[norm.activation].code
        self.memory = _Memory()

    def read(self, part: slice) -> Tensor:
        """Some images as they are read, until the next ones are."""
        self.raw = x = of(self.x, part).contiguous(memory_format=_LAST)
        if self.rows is None:
            return x
        if self.excite is not None:
            self.gate = Gate(self._means(x, part), self.excite)
            (self.factor,) = _vectors(x.shape[0] * x.shape[1], self.gate.gate)
        e, sizes = self.memory.like(x), _sizes(x.shape, torch.get_num_threads())
        _library().read_map(*_at(x, e, self.rows, self.factor), self.activation, *sizes)
        return e

    def _means(self, x: Tensor, part: slice) -> Tensor:
        """The channel means of what is read of every image."""
        means = self._sums(x, None, 1.0 / (x.shape[2] * x.shape[3]))
        if self.excite.means is not None:
            self.excite.means.append(means)
        return means

    def _sums(self, x: Tensor, grad: Tensor | None, factor: float) -> Tensor:
        """Over the pixels of every image, of what is read, times grad where there is one."""
        found, sizes = _floats(*x.shape[:2]), _sizes(x.shape, torch.get_num_threads())
        _library().sums_of_images(*_at(x, grad, found, self.rows), self.activation, factor, *sizes)
        return found


class CompiledBackwardReader(CompiledReader):
    """`torch.BackwardReader`."""

    sums: Tensor | None = None
    excited: list[tuple[Tensor, ...]] | None = None

    def _means(self, x: Tensor, part: slice) -> Tensor:
        means = known_means(self.excite, part)
        return super()._means(x, part) if means is None else means

    def back(self, grad: Tensor, out: Tensor, through: bool) -> None:
        """`torch.BackwardReader.back`."""
        if self.excite is None and not through:
            if out is not grad:
                out.copy_(grad)
            return
        x, dmeans = self.raw, None
        if self.excite is not None:
            dmeans, found = self.gate.backward(self._sums(x, grad, 1.0))
            (dmeans,) = _vectors(x.shape[0] * x.shape[1], dmeans / (x.shape[2] * x.shape[3]))
            self.excited = [*(self.excited or ()), found]
        if through and self.sums is None:
            self.sums = _doubles(2, x.shape[1]).zero_()
        sums = self.sums if through else _doubles(2, x.shape[1])
        pointers = _at(x, grad, out, self.rows, self.factor, dmeans, sums)
        activation, sizes = self.activation if through else 0, _sizes(x.shape, torch.get_num_threads())
        _library().gradient_through(*pointers, activation, *sizes)

    def totals(self) -> tuple[Sums | None, tuple[Tensor, ...] | None]:
        """`torch.BackwardReader.totals`."""
        excited = None if self.excited is None else tuple(map(summed, zip(*self.excited, strict=True)))
        return _narrow(self.sums), excited


def _narrow(found: Tensor | None) -> Sums | None:
    """The library's sums of a norm as those of torch's calls, each in memory of its own."""
    return None if found is None else Sums(found[0].float(), found[1].float())


class CompiledGradientReader:
    """`torch.GradientReader`."""

    def __init__(self, grad: Tensor, norm: OutputNorm | None, y: Tensor | None):
        self.grad, self.y, self.rows = grad, y, None
        if norm is None:
            return
        self.memory, channels, width = _Memory(), grad.shape[1], _row(grad.shape[1])
        self.rows, sums = _floats(3, width), norm.sums
        if sums is None:
            self.y, sums = None, (None, None)
        vectors = _vectors(channels, *norm[:3], *sums)
        _library().raw_gradient_rows(*_at(*vectors, self.rows), norm.eps, norm.count, channels, width)

    def read(self, part: slice, plus: Tensor | None = None) -> Tensor:
        """`torch.GradientReader.read`, in any layout where there is no norm."""
        grad = of(self.grad, part)
        if self.rows is None:
            return grad
        maps = []
        for t in (grad, of(self.y, part), of(plus, part)):
            maps.append(None if t is None else t.contiguous(memory_format=_LAST))
        out, sizes = self.memory.like(grad), _sizes(grad.shape, torch.get_num_threads())
        _library().gradient_of_raw(*_at(*maps, out, self.rows), *sizes)
        return out


class CompiledMoments:
    """`sums.Moments`."""

    state: Tensor | None = None
    count = 0

    def add(self, x: Tensor, copy: Tensor | None = None) -> None:
        """Take some images, in channels_last, and copy them where a copy is wanted."""
        first = self.state is None
        if first:
            self.state = _doubles(3, x.shape[1])
        _library().add_moments(*_at(x, copy, self.state), first, *_sizes(x.shape, torch.get_num_threads()))
        self.count += x.numel() // x.shape[1]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of all images."""
        channels = self.state.shape[1]
        mean, var = _floats(channels), _floats(channels)
        _library().finished_moments(*_at(self.state, mean, var), self.count, channels)
        return mean, var


def _fit(terms: Sequence[Term]) -> bool:
    """Whether the terms are maps of one kind; torch adds others too, or says why it cannot."""
    first = terms[0].x
    for x, _, factor in terms:
        if x.shape != first.shape or x.dtype != first.dtype:
            return False
        if factor is not None and factor.shape != (x.shape[0], 1, 1, 1):
            return False
    return True


class _Terms:
    """The terms of a join as the library takes them."""

    def __init__(self, terms: Sequence[Term]):
        self.maps, self.kept, raw = [], [], []
        for x, norm, factor in terms:
            x = x.contiguous(memory_format=_LAST)
            rows = None if norm is None else _norm_rows(norm, x.shape[1])
            factor = None if factor is None else _vectors(x.shape[0], factor)[0]
            self.maps.append(x)
            self.kept += rows, factor
            raw.append(RawTerm(*_at(x, rows, factor), 0 if norm is None else ACTIVATIONS[norm.activation].code))
        self.array = (RawTerm * len(raw))(*raw)


class CompiledPasses(Passes):
    """The passes of csrc/cpu."""

    reader = CompiledReader
    backward_reader = CompiledBackwardReader
    gradient_reader = CompiledGradientReader
    moments = CompiledMoments

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.moments()
        found.add(x.contiguous(memory_format=_LAST))
        return found.merged()

    def join(self, terms: Sequence[Term], activation: str) -> Tensor:
        if not _fit(terms):
            return super().join(terms, activation)
        given = _Terms(terms)
        y = torch.empty_like(given.maps[0], memory_format=_LAST)
        sizes = _sizes(y.shape, torch.get_num_threads())
        _library().join_terms(given.array, len(terms), ACTIVATIONS[activation].code, *_at(y), *sizes)
        return y

    def join_backward(
        self, grad: Tensor, y: Tensor | None, terms: Sequence[Term], activation: str, needs: Sequence[bool]
    ) -> list[tuple[Tensor | None, Sums | None]]:
        if not _fit(terms):
            return super().join_backward(grad, y, terms, activation, needs)
        given, grad = _Terms(terms), grad.contiguous(memory_format=_LAST)
        y = None if y is None else y.contiguous(memory_format=_LAST)
        shared, written, results, sums = grad if activation == "none" else None, [], [], []
        for term, need in zip(terms, needs, strict=True):
            alone = need and not is_shared(term)
            if need and not alone and shared is None:
                shared = torch.empty_like(grad, memory_format=_LAST)
            written.append(torch.empty_like(grad, memory_format=_LAST) if alone else None)
            results.append(written[-1] if alone else shared if need else None)
            sums.append(_doubles(2, grad.shape[1]).zero_() if need and term.norm is not None else None)
        pointers = [(c_void_p * len(terms))(*_at(*tensors)) for tensors in (written, sums)]
        at_grad, at_y, at_shared = _at(grad, y, shared)
        sizes, code = _sizes(grad.shape, torch.get_num_threads()), ACTIVATIONS[activation].code
        _library().join_gradients(at_grad, at_y, given.array, len(terms), code, at_shared, *pointers, *sizes)
        return [(dx, _narrow(one)) for dx, one in zip(results, sums, strict=True)]

    def entered_backward(self, grad: Tensor, norm: OutputNorm, x: Tensor, identity: Tensor | None) -> Tensor:
        return self.gradient_reader(grad, norm, x).read(ALL, identity)
