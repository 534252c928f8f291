"""The kernels that really run: ATen's, as a dispatch mode sees them, Triton's and csrc/'s, heard as they are launched.

The bytes of a kernel are those of the tensors that it reads and writes:

- A kernel of ATen reads each operand once and writes each result once. What is overwritten in place is both; what is
  given as `out` is written.
- A kernel of Triton or csrc/ reads or writes each of its arguments once, whole. Only of a 1x1 convolution with a stride
  is it certain that it reads less: the pixels of `x` that it picks.
- An expanded tensor is as small as its memory.
- What a tile's mask leaves out does not count, nor what a second program reads again: that is in a cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "as_strided"}
_UNREAD = {"max_pool2d_with_indices_backward": 1, "avg_pool2d_backward": 1, "zeros_like": 0, "ones_like": 0}
"""By operation, the operand that is there for its shape alone."""


@dataclass(frozen=True)
class Kernel:
    """What one kernel moves and computes, called by which module; `flops` counts two per multiply-accumulate."""

    path: str
    name: str
    bytes: int
    flops: int


class KernelCounter(TorchDispatchMode):
    """Collects the kernels that ATen runs while this mode is active, and the launches that `hear` is told."""

    def __init__(self) -> None:
        super().__init__()
        self._kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if launches(func):
            results = (t for t in tree_leaves(out) if isinstance(t, Tensor))
            size = _size((*operands(func, args, kwargs), *results))
            formula = flop_registry.get(func._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
            self._kernels.append(Kernel("", name(func), size, flops))
        return out

    def hear(self, name: str, arguments: dict[str, Any]) -> bool:
        """Collect a launch; False, so that the kernel does not run: its tensors tell what it moves."""
        self._kernels.append(Kernel("", name, launch_bytes(arguments), 0))
        return False

    def take(self, path: str = "", flops: int | None = None) -> tuple[Kernel, ...]:
        """The kernels since this was last asked, as those of a layer; the largest of them does its operations, where
        they are given.
        """
        taken, self._kernels = [replace(k, path=path) for k in self._kernels], []
        if flops is None:
            return tuple(taken)
        largest = max(range(len(taken)), key=lambda i: taken[i].bytes, default=None)
        return tuple(replace(k, flops=flops if i == largest else 0) for i, k in enumerate(taken))


def launches(func: Any) -> bool:
    """Whether an ATen operator runs a kernel: it is no view, no allocation, and has a tensor as its result."""
    if func.is_view or name(func) in _FREE:
        return False
    return any("Tensor" in str(result.type) for result in func._schema.returns)


def operands(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an ATen operator reads, each once: none that is given for its shape, or as `out` to write."""
    given = [a for i, a in enumerate(args) if _UNREAD.get(name(func)) != i]
    given += [a for key, a in kwargs.items() if key != "out"]
    return list({id(t): t for t in tree_leaves(given) if isinstance(t, Tensor)}.values())


def name(func: Any) -> str:
    """The name of an ATen operator, the same in place."""
    return func._schema.name.partition("::")[2].rstrip("_")


def launch_bytes(arguments: dict[str, Any]) -> int:
    """What a kernel of Triton or csrc/ moves, by its arguments."""
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    if arguments.get("STRIDE", 1) == 1:
        return _size(tensors.values())
    x = tensors.pop("x")
    return _size(tensors.values()) + _bytes(x) * prod(tensors["y"].shape[2:]) // prod(x.shape[2:])


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(map(_bytes, tensors))


def _bytes(t: Tensor) -> int:
    size = t.numel() * t.element_size()
    return min(size, t.untyped_storage().nbytes()) if t.layout is strided else size
