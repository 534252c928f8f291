"""The ideal execution of a recorded network: convolutions, matrix products and pooling are its only kernels.

Feature maps are what costs: one kernel writes a map, others read it. Everything else rides with them.

- A pointwise operation rides in the epilogue of the kernel that makes its operand, if all else that it needs is there
  by then; if not, in the prologue of every kernel that reads its result. So do a squeeze-excite gate, and a norm over
  statistics that are only known when a kernel has finished.
- A sum over pixels rides in the epilogue that makes the map; over a map that exists in prologues only it takes a pass
  of its own. Backward it never does: what is linear in the gradient can be put together from partial sums.
- A sum of maps that cannot ride in an epilogue, such as a residual join behind a BatchNorm in training, is written by
  the first kernel that reads it.
- A convolution reads the pixels that it needs: a quarter for a 1x1 of stride 2.
- The matrix products of squeeze-excite ride with the pooling before them. Vectors (per channel, or per image and
  channel) are not counted otherwise, nor is what prepares weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import compress

from regnet_fast.inspect.counting import Kernel

from .recording import LIBRARY, REDUCTIONS, Op, Recording, Value

_INPUT_SIDE = {"convolution": 0, "wgrad": 1}  # the operand of which a strided 1x1 convolution needs a part


def ideal(recording: Recording) -> list[Kernel]:
    """The kernels of the ideal execution."""
    return _Ideal(recording).kernels()


@dataclass(eq=False)
class _Map:
    """A feature map. Without a kernel it is a sum of `parts` that its first reader computes, and writes.

    `needed` tells that another kernel reads it, so that it has to be written. `path` and `flops` are those of the sum.
    """

    bytes: int
    kernel: int | None = None
    parts: frozenset[_Map] = frozenset()
    path: str = ""
    flops: int = 0
    needed: bool = False


@dataclass(frozen=True)
class _State:
    """How a value is had: computed from `maps`, when kernel number `after` has finished.

    `varies` tells activations from weights and what is made of weights alone.
    """

    maps: frozenset[_Map] = frozenset()
    after: int = -1
    varies: bool = True


_WEIGHT = _State(varies=False)


@dataclass(eq=False)
class _Draft:
    """A kernel to which more may still be added.

    `bytes` are those of weights, `reads` those of maps. `given` is the place of an input among the kernels. `behind` is
    set for a matrix product of vectors: the kernel that it waits for.
    """

    path: str
    name: str
    bytes: int = 0
    flops: int = 0
    reads: dict[_Map, int] = field(default_factory=dict)
    given: bool = False
    behind: int | None = None


class _Ideal:
    """Places one recorded operation after another."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.drafts: list[_Draft] = []
        self.maps: list[_Map] = []
        self.states: dict[Value, _State] = {}
        self.gates: set[str] = set()  # the modules of squeeze-excite's matrix products

    def kernels(self) -> list[Kernel]:
        """Place everything and return what it made."""
        self._give(self.recording.input, self.recording.image)
        for op in self.recording.ops:
            if not op.backward:
                self._place(op)
        are_maps = [bool(self._state(value).maps) for value in self.recording.results]
        for value in compress(self.recording.results, are_maps):
            self._stored(value).needed = True
        for gradient, is_map in zip(self.recording.gradients, are_maps, strict=False):
            self._give(gradient, is_map)
        for op in self.recording.ops:
            if op.backward:
                self._place(op)
        return self._finished()

    def _finished(self) -> list[Kernel]:
        for m in self.maps:
            if m.needed and m.kernel is not None:
                self.drafts[m.kernel].bytes += m.bytes
        found: list[Kernel] = []
        for draft in self.drafts:
            if draft.given:
                continue
            size = draft.bytes + sum(draft.reads.values())
            if draft.behind is not None and draft.path in self.gates and found:
                last = found.pop()
                found.append(Kernel(last.path, last.name, last.bytes + size, last.flops + draft.flops))
            else:
                found.append(Kernel(draft.path, draft.name, size, draft.flops))
        return found

    def _draft(self, path: str, name: str, bytes: int = 0, flops: int = 0, **options: bool) -> int:
        self.drafts.append(_Draft(path, name, bytes, flops, **options))
        return len(self.drafts) - 1

    def _map(self, bytes: int, kernel: int | None, **options) -> frozenset[_Map]:
        self.maps.append(_Map(bytes, kernel, **options))
        return frozenset({self.maps[-1]})

    def _give(self, value: Value, is_map: bool) -> None:
        number = self._draft("", "given", given=True)
        self.states[value] = _State(self._map(value.bytes, number)) if is_map else _State(after=number)

    def _state(self, value: Value) -> _State:
        return self.states.get(value, _WEIGHT)

    def _place(self, op: Op) -> None:
        operands = [self._state(value) for value in op.reads]
        maps = frozenset().union(*(state.maps for state in operands))
        after = max((state.after for state in operands), default=-1)
        if not any(state.varies for state in operands):
            result = _WEIGHT
        elif op.name in LIBRARY:
            return self._library(op, operands, maps, after)
        elif not maps:
            result = _State(after=after)
        elif op.name in REDUCTIONS:
            result = _State(after=self._sum(op, maps, after))
        else:
            result = self._pointwise(op, operands, maps, after)
        self.states.update(dict.fromkeys(op.writes, result))

    def _library(self, op: Op, operands: list[_State], maps: frozenset[_Map], after: int) -> None:
        number = self._draft(op.path, op.name, flops=op.flops)
        draft = self.drafts[number]
        for i, (value, state) in enumerate(zip(op.reads, operands, strict=True)):
            self._read(number, state.maps, op.part if _INPUT_SIDE.get(op.name) == i else 1.0)
            draft.bytes += 0 if state.maps else value.packed_bytes
        if not maps:
            draft.behind = after
        for value in op.writes:
            if maps and op.name != "wgrad":
                size = int(value.packed_bytes * (op.part if op.name == "dgrad" else 1.0))
                self.states[value] = _State(self._map(size, number))
            else:
                draft.bytes += value.packed_bytes
                self.states[value] = _State(after=number)

    def _pointwise(self, op: Op, operands: list[_State], maps: frozenset[_Map], after: int) -> _State:
        if not op.backward:
            for state in operands:
                self._note_gate(state)
        size = max(value.packed_bytes for value in op.writes)
        home = self._home(maps)
        if home is not None and after < home:
            others = frozenset(m for m in maps if m.kernel != home)
            self._read(home, others)
            return _State(self._map(size, home) if others else maps)
        if op.name == "add" and len(maps) > max(len(state.maps) for state in operands):
            maps = self._map(size, None, parts=maps, path=op.path)
        return _State(maps, after)

    def _note_gate(self, state: _State) -> None:
        """Matrix products whose result meets a feature map are squeeze-excite's."""
        number = -1 if state.maps else state.after
        while number >= 0 and self.drafts[number].behind is not None:
            self.gates.add(self.drafts[number].path)
            number = self.drafts[number].behind

    def _sum(self, op: Op, maps: frozenset[_Map], after: int) -> int:
        """Sum over the pixels; the number of the kernel after which the result is there."""
        home = self._home(maps)
        partial = op.backward and all(m.kernel is not None for m in maps)
        if home is None or not (partial or after < home):
            home = self._draft(op.path, op.name)
        self._read(home, maps)
        return max(home, after)

    def _home(self, maps: Iterable[_Map]) -> int | None:
        """The kernel that makes the last of the maps: the one with which an operation on all of them can ride."""
        home = max((m.kernel for m in maps if m.kernel is not None), default=None)
        return None if home is None or self.drafts[home].given else home

    def _read(self, number: int, maps: Iterable[_Map], part: float = 1.0) -> None:
        draft = self.drafts[number]
        for m in maps:
            if m.kernel is None:
                self._read(number, m.parts)
                m.kernel, m.needed = number, True
                draft.flops += m.flops
            elif m.kernel != number:
                m.needed = True
                draft.reads[m] = max(draft.reads.get(m, 0), int(m.bytes * part))

    def _stored(self, value: Value) -> _Map:
        """A map in memory that a value is, or is computed from alone; a pass writes it where there is none."""
        state = self._state(value)
        (one, *others) = state.maps
        if not others and one.kernel is not None and state.after < one.kernel:
            return one
        number = self._draft(one.path, "pass")
        self._read(number, state.maps)
        written = [m for m in state.maps if m.kernel == number] or [*self._map(value.packed_bytes, number)]
        return written[0]
