"""The passes of a training step compiled from csrc/cpu, for float32 on a CPU: `passes` function by function.

Each reads every map once: a map is normalised, activated and gated on its way into a convolution, and its gradient goes
back through all three while the norm's sums are made. The convolutions are the framework's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import cpu_library, passes
from .activations import ACTIVATIONS
from .cpu_library import Term as RawTerm
from .operands import Excite, Norm, Own, Sums, Term

_LAST = torch.channels_last
_VECTOR = 16
_ROW = 128
"""The floats of a processor's vector at most, and how many a row has at least."""


def refuse(x: Tensor) -> str | None:
    """Why the passes over maps like x are not compiled ones, or None."""
    if not x.is_cpu or x.dtype != torch.float32 or not x.numel():
        return f"csrc/cpu has passes over float32 maps on a CPU, and these are {x.dtype} on {x.device}"
    if type(x) not in (Tensor, Parameter) or is_in_torch_dispatch_mode():
        return "csrc/cpu works on memory, which subclasses of Tensor and dispatch modes (tracing, counting) do not see"
    return cpu_library.refuse()


def _row(channels: int) -> int:
    """The floats of a row: pixels side by side until they fill whole vectors, and loops are worth their beginning."""
    pixels = _VECTOR // math.gcd(channels, _VECTOR)
    return channels * pixels * -(-_ROW // (channels * pixels)) if channels < _ROW else channels


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """A map as the library takes it."""
    n, c, h, w = x.shape
    return n, c * h * w, c, _row(c), torch.get_num_threads()


def _floats(*size: int) -> Tensor:
    """Memory of the library's own type, whatever torch's defaults are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def _doubles(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device="cpu")


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_LAST)


def _vector(t: Tensor | None, size: int) -> Tensor | None:
    """So many values of a parameter or a statistic as the library takes them, in float32 and dense."""
    if t is None:
        return t
    if t.numel() != size:
        raise RuntimeError(f"a norm or a gate has {t.numel()} values of the shape {tuple(t.shape)}, expected {size}")
    return t if t.dtype == torch.float32 and t.is_contiguous() else t.detach().float().contiguous()


def _at(t: Tensor | None) -> int | None:
    """Where the memory of a tensor is. Raises RuntimeError where it has none here."""
    if t is None:
        return None
    pointer = t.data_ptr() if t.is_cpu else 0
    if not pointer:
        raise RuntimeError(f"a tensor of the shape {tuple(t.shape)} has no memory on the CPU: it is on {t.device}")
    return pointer


def _norm_rows(norm: Norm | None, channels: int) -> Tensor:
    """How a map is read: four rows."""
    width = _row(channels)
    if norm is None:
        return torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float32, device="cpu")[:, None].repeat(1, width)
    rows = _floats(4, width)
    vectors = [_vector(t, channels) for t in norm[:4]]
    cpu_library.library().norm_rows(*map(_at, vectors), norm.eps, channels, width, _at(rows))
    return rows


class _Memory:
    """Memory for some images after the others: the first ones are the most."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def like(self, x: Tensor) -> Tensor:
        """For images such as x, until the next call."""
        if self.kept is None or self.kept.shape[0] < x.shape[0]:
            self.kept = torch.empty_like(x, memory_format=_LAST)
        return self.kept[: x.shape[0]]


class Reader:
    """`passes.Reader`."""

    def __init__(self, x: Tensor, norm: Norm | None, excite: Excite | None):
        self.x, self.norm, self.excite = x, norm, excite
        self.plain = norm is None and excite is None
        self.rows = None if self.plain else _norm_rows(norm, x.shape[1])
        self.activation = ACTIVATIONS["none" if norm is None else norm.activation].code
        self.memory = _Memory()

    def read(self, part: slice) -> Tensor:
        """Some images as they are read, until the next ones are."""
        self.raw = x = _laid_out(passes.of(self.x, part))
        if self.plain:
            return x
        sizes = _sizes(x)
        self.gate = None
        if self.excite is not None:
            self.gate = passes.Gate(self._means(x, part, sizes), self.excite)
            self.factor = _vector(self.gate.gate, x.shape[0] * x.shape[1])
        factor = None if self.gate is None else self.factor
        e = self.memory.like(x)
        arguments = (_at(x), _at(e), _at(self.rows), self.activation, _at(factor), *sizes)
        cpu_library.library().read_map(*arguments)
        return e

    def _means(self, x: Tensor, part: slice, sizes: tuple[int, ...]) -> Tensor:
        """The channel means of what is read of every image."""
        means = self._sums(x, None, sizes, 1.0 / (x.shape[2] * x.shape[3]))
        if self.excite.means is not None:
            self.excite.means.append(means)
        return means

    def _sums(self, x: Tensor, grad: Tensor | None, sizes: tuple[int, ...], factor: float) -> Tensor:
        """Over the pixels of every image, of what is read, times grad where there is one."""
        found = _floats(*x.shape[:2])
        arguments = (_at(x), _at(grad), _at(found), _at(self.rows), self.activation, factor, *sizes)
        cpu_library.library().sums_of_images(*arguments)
        return found


class BackwardReader(Reader):
    """`passes.BackwardReader`."""

    def __init__(self, x: Tensor, norm: Norm | None, excite: Excite | None):
        super().__init__(x, norm, excite)
        self.sums: Tensor | None = None
        self.excited: list[tuple[Tensor, ...]] = []

    def _means(self, x: Tensor, part: slice, sizes: tuple[int, ...]) -> Tensor:
        means = passes.known_means(self.excite, part)
        return super()._means(x, part, sizes) if means is None else means

    def back(self, grad: Tensor, out: Tensor, through: bool) -> None:
        """`passes.BackwardReader.back`."""
        if self.excite is None and not through:
            if out is not grad:
                out.copy_(grad)
            return
        x, sizes = self.raw, _sizes(self.raw)
        gate = dmeans = None
        if self.excite is not None:
            dmeans, found = self.gate.backward(self._sums(x, grad, sizes, 1.0))
            gate, dmeans = self.factor, _vector(dmeans / (x.shape[2] * x.shape[3]), x.shape[0] * x.shape[1])
            self.excited.append(found)
        if through and self.sums is None:
            self.sums = _doubles(2, x.shape[1]).zero_()
        sums = self.sums if through else _doubles(2, x.shape[1])
        activation = self.activation if through else 0
        maps = (_at(x), _at(grad), _at(out), _at(self.rows))
        cpu_library.library().gradient_through(*maps, activation, _at(gate), _at(dmeans), _at(sums), *sizes)

    def totals(self) -> tuple[Sums | None, tuple[Tensor, ...] | None]:
        """`passes.BackwardReader.totals`."""
        excited = tuple(map(passes.summed, zip(*self.excited, strict=True))) if self.excited else None
        return _sums(self.sums), excited


def _sums(found: Tensor | None) -> Sums | None:
    """The library's sums of a norm as those of `passes`, each in memory of its own."""
    return None if found is None else Sums(found[0].float(), found[1].float())


class Statistics:
    """`passes.Statistics`."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, copy: Tensor | None = None) -> None:
        """Take some images, in channels_last, and copy them where a copy is wanted."""
        first = self.state is None
        if first:
            self.state = _doubles(3, x.shape[1])
        cpu_library.library().add_moments(_at(x), _at(copy), _at(self.state), first, *_sizes(x))
        self.count += x.numel() // x.shape[1]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of all images."""
        channels = self.state.shape[1]
        mean, var = _floats(channels), _floats(channels)
        arguments = (_at(self.state), self.count, channels, _at(mean), _at(var))
        cpu_library.library().finished_moments(*arguments)
        return mean, var


def _own_rows(own: Own, channels: int) -> Tensor:
    """`Own.coefficients` along rows."""
    rows = _floats(3, _row(channels))
    mean, var, weight = (_vector(t, channels) for t in own[:3])
    sums = (None, None) if own.sums is None else [_vector(t, channels) for t in own.sums]
    arguments = (_at(mean), _at(var), _at(weight), own.eps, *map(_at, sums), own.count, channels, rows.shape[1])
    cpu_library.library().own_rows(*arguments, _at(rows))
    return rows


def _raw_gradients(own: Own) -> Callable[[Tensor, Tensor], Tensor]:
    rows, memory = None, _Memory()

    def make(grad: Tensor, y: Tensor | None) -> Tensor:
        nonlocal rows
        rows = _own_rows(own, grad.shape[1]) if rows is None else rows
        out = memory.like(grad)
        _raw_gradient(grad, None if own.sums is None else y, None, out, rows)
        return out

    return make


def _raw_gradient(grad: Tensor, y: Tensor | None, plus: Tensor | None, out: Tensor, rows: Tensor) -> None:
    """`a * grad + q * y + k + plus` into `out`, which is laid out; the others in any layout."""
    maps = [None if t is None else _laid_out(t) for t in (grad, y, plus)]
    cpu_library.library().gradient_of_raw(*map(_at, maps), _at(out), _at(rows), *_sizes(out))


CALLS = passes.Calls(Reader, BackwardReader, Statistics, _raw_gradients)


convs = partial(passes.convs, calls=CALLS)
convs_backward = partial(passes.convs_backward, calls=CALLS)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """`passes.statistics`."""
    found = Statistics()
    found.add(_laid_out(x))
    return found.merged()


def _fit(terms: Sequence[Term]) -> bool:
    """Whether the terms are maps of one kind; torch adds others too, or says why it cannot."""
    first = terms[0].x
    return all(
        x.shape == first.shape and x.dtype == first.dtype and (factor is None or factor.shape == (len(x), 1, 1, 1))
        for x, _, factor in terms
    )


class _Terms:
    """The terms of a join as the library takes them."""

    def __init__(self, terms: Sequence[Term]):
        self.maps = [_laid_out(x) for x, _, _ in terms]
        self.rows = [None if norm is None else _norm_rows(norm, x.shape[1]) for x, norm, _ in terms]
        self.factors = [_vector(factor, len(x)) for x, _, factor in terms]
        activations = [0 if norm is None else ACTIVATIONS[norm.activation].code for _, norm, _ in terms]
        facts = zip(self.maps, self.rows, self.factors, activations, strict=True)
        self.array = (RawTerm * len(terms))(
            *(RawTerm(_at(x), _at(rows), _at(factor), activation) for x, rows, factor, activation in facts)
        )


def join(terms: Sequence[Term], activation: str) -> Tensor:
    """`passes.join`."""
    if not _fit(terms):
        return passes.join(terms, activation)
    given = _Terms(terms)
    y = torch.empty_like(given.maps[0], memory_format=_LAST)
    arguments = (given.array, len(terms), ACTIVATIONS[activation].code, _at(y), *_sizes(y))
    cpu_library.library().join_terms(*arguments)
    return y


def join_backward(
    grad: Tensor, y: Tensor | None, terms: Sequence[Term], activation: str, needs: Sequence[bool]
) -> list[tuple[Tensor | None, Sums | None]]:
    """`passes.join_backward`."""
    if not _fit(terms):
        return passes.join_backward(grad, y, terms, activation, needs)
    given, grad, y = _Terms(terms), _laid_out(grad), None if y is None else _laid_out(y)
    shared = [factor is None and (norm is None or norm.activation == "none") for _, norm, factor in terms]
    wanted = any(need and same for need, same in zip(needs, shared, strict=True))
    summed = grad if activation == "none" else torch.empty_like(grad, memory_format=_LAST) if wanted else None
    results = [
        None if same or not need else torch.empty_like(grad, memory_format=_LAST)
        for need, same in zip(needs, shared, strict=True)
    ]
    sums = [
        _doubles(2, grad.shape[1]).zero_() if need and norm is not None else None
        for need, (_, norm, _) in zip(needs, terms, strict=True)
    ]
    pointers = [(c_void_p * len(terms))(*map(_at, tensors)) for tensors in (results, sums)]
    arguments = (_at(grad), _at(y), given.array, len(terms), ACTIVATIONS[activation].code, _at(summed), *pointers)
    cpu_library.library().join_gradients(*arguments, *_sizes(grad))
    found = zip(results, sums, shared, needs, strict=True)
    return [(summed if same and need else dx, _sums(s)) for dx, s, same, need in found]


def entered_backward(grad: Tensor, own: Own, x: Tensor, identity: Tensor | None) -> Tensor:
    """`passes.entered_backward`."""
    dx = torch.empty_like(x, memory_format=_LAST)
    _raw_gradient(grad, None if own.sums is None else x, identity, dx, _own_rows(own, x.shape[1]))
    return dx
