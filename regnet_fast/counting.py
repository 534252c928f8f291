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
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backends.cuda_plans import Launch
from .recording import Kernel, launches, name, operands


class KernelCounter(TorchDispatchMode):
    """Collects the kernels that ATen runs while this mode is active, and the launches that `hear` and `hear_cuda` are
    told.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if launches(func):
            results = (t for t in tree_leaves(out) if isinstance(t, Tensor))
            self._kernels.append(Kernel("", name(func), _size((*operands(func, args, kwargs), *results)), 0))
        return out

    def hear(self, kernel: Any, arguments: dict[str, Any]) -> bool:
        """Collect a launch; False, so that the kernel does not run: its tensors tell what it moves."""
        title = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        self._kernels.append(Kernel("", title, launch_bytes(arguments), 0))
        return False

    def hear_cuda(self, launch: Launch, tensors: dict[str, Tensor | None]) -> None:
        """Collect a launch of csrc/, in the place of running it."""
        title = f"{launch.source.partition('.')[0]}.{launch.kernel.partition('<')[0]}"
        self._kernels.append(Kernel("", title, _size(t for t in tensors.values() if t is not None), 0))

    def take(self, path: str = "", flops: int = 0) -> tuple[Kernel, ...]:
        """The kernels since this was last asked, as those of a layer, whose operations the largest of them does."""
        taken, self._kernels = self._kernels, []
        largest = max(range(len(taken)), key=lambda i: taken[i].bytes, default=None)
        return tuple(replace(k, path=path, flops=flops if i == largest else 0) for i, k in enumerate(taken))


def launch_bytes(arguments: dict[str, Any]) -> int:
    """What a Triton kernel moves, by its arguments."""
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
