"""What a network computes, recorded operation by operation on meta tensors: nothing is allocated, nothing is computed.

An `Op` is what a GPU runs as one kernel where nothing is fused: an ATen operation, or a part of one. A convolution's
bias is an addition of its own, as it is with cuDNN. A norm over its input's own statistics is a pass that reduces and
a pass that applies, forward and backward. A convolution's backward is a dgrad, a wgrad and a sum for the bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regnet_fast.inspect.counting import launches, name, operands
from regnet_fast.models import restore

POOLS = {"max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward"}
LIBRARY = {"convolution", "dgrad", "wgrad", "mm", "addmm", "bmm"} | POOLS
"""Operations that a library serves, and that nothing is fused with."""
REDUCTIONS = {"mean", "sum", "amax", "var", "var_mean", "std", "std_mean", "linalg_vector_norm"}
REDUCTIONS |= {"norm statistics", "norm backward sums", "bias gradient"}


@dataclass(frozen=True)
class Value:
    """The contents of a tensor at one moment: a storage, and how often it was written before.

    `bytes` are what an access touches: never more than the tensor has, nor than its storage. `index` tells the int64
    positions that max pooling keeps.
    """

    storage: int
    version: int
    bytes: int = field(compare=False)
    index: bool = field(compare=False, default=False)

    @property
    def packed_bytes(self) -> int:
        """The bytes with one for each index, which is enough for a place in a window."""
        return self.bytes // 8 if self.index else self.bytes


@dataclass(frozen=True)
class Op:
    """One operation. `flops` counts two per multiply-accumulate of convolutions and matrix products, and nothing else.

    `path` is the module that called it, also for what its backward does. `part` is the share of the pixels on a
    convolution's input side that take part in it: 1/4 for a 1x1 convolution of stride 2.
    """

    path: str
    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    flops: int = 0
    backward: bool = False
    part: float = 1.0


@dataclass(frozen=True)
class Recording:
    """The operations of a forward pass, or of a forward and a backward pass, in order.

    `input` is given, an image or feature map where `image` says so; `results` are returned, and their `gradients` given
    to the backward pass; `kept` is everything that outlives the run.
    """

    ops: tuple[Op, ...]
    input: Value
    image: bool
    results: tuple[Value, ...]
    gradients: tuple[Value, ...]
    kept: frozenset[Value]


def record(
    model: nn.Module, input_size: tuple[int, ...], dtype: torch.dtype = torch.float32, train: bool = False
) -> Recording:
    """Record a model's own forward pass in evaluation, or its forward and backward pass in training.

    Args:
        model: a module of one input. It is not changed; a fused block is recorded as the host's.
        input_size: (N, C, H, W) of the input, which needs no gradient.
        dtype: of the input, the parameters and the floating-point buffers.
        train: False for evaluation, with RepVGG blocks reparameterised; True for training mode, with the backward pass
            from given gradients of the results, and no optimizer.

    Raises what the model raises for meta tensors of such a size.
    """
    twin = _meta_twin(model, dtype).train(train)
    twin = twin if train else _reparameterized(twin)
    recorder = _Recorder()
    recorder.follow(twin)
    x = torch.empty(input_size, dtype=dtype, device="meta")
    given = recorder.value(x)
    with torch.set_grad_enabled(train), recorder:
        y = twin(x)
    found = [t for t in tree_leaves(y) if isinstance(t, Tensor) and (t.requires_grad or not train)]
    results, gradients = recorder.values(found), ()
    if train:
        seeds = [torch.empty_like(t) for t in found]
        gradients = recorder.values(seeds)
        with recorder:
            recorder.backward = True
            torch.autograd.backward(found, seeds)
    state = [*twin.parameters(), *twin.buffers(), *(p.grad for p in twin.parameters())]
    kept = frozenset((*results, *recorder.values(state)))
    return Recording(tuple(recorder.ops), given, x.dim() == 4, results, gradients, kept)


def _meta_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module with meta tensors of the given dtype in place of its own, to which nobody listens."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        twin = torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="meta")
        memo[id(t)] = nn.Parameter(twin, t.requires_grad) if isinstance(t, nn.Parameter) else twin
    copied = restore(copy.deepcopy(model, memo))
    for module in copied.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
        for registered in hooks:
            registered.clear()
    return copied


def _reparameterized(model: nn.Module) -> nn.Module:
    """The model as `timm.utils.reparameterize_model` leaves it, which looks below a module only."""
    from timm.utils import reparameterize_model

    with torch.device("meta"), torch.no_grad():
        return reparameterize_model(nn.Sequential(model), inplace=True)[0]


class _Recorder(TorchDispatchMode):
    """Appends an `Op` for everything that is computed while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.backward = False
        self._path = ""
        self._modules: list[str] = []
        self._path_of_node: dict[int, str] = {}
        self._nodes = torch._C._autograd._get_sequence_nr()
        self._storages: list[Any] = []  # kept, so that no address is used twice
        self._numbers: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._parts: dict[str, Callable[..., None]] = {
            "convolution": self._convolution,
            "convolution_backward": self._convolution_backward,
            "native_batch_norm": self._batch_norm,
            "native_batch_norm_backward": self._batch_norm_backward,
            "native_group_norm": self._group_norm,
            "native_group_norm_backward": self._group_norm_backward,
        }

    def follow(self, model: nn.Module) -> None:
        """Take the paths of the model's modules for what they call."""
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda _, __, path=path: self._modules.append(path))
            module.register_forward_hook(lambda _, __, ___: self._leave())

    def _leave(self) -> None:
        self._modules.pop()

    def value(self, t: Tensor) -> Value:
        """What a tensor holds now."""
        storage = t.untyped_storage()
        number = self._number(t)
        elements = min(t.numel(), storage.nbytes() // t.element_size())
        index = t.dtype == torch.int64 and t.dim() == 4
        return Value(number, self._versions.get(number, 0), elements * t.element_size(), index)

    def values(self, tensors: Iterable[Any]) -> tuple[Value, ...]:
        """The values of the tensors among the arguments, each once."""
        return tuple(dict.fromkeys(self.value(t) for t in tensors if isinstance(t, Tensor)))

    def _number(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = len(self._storages)
            self._storages.append(storage)
        return self._numbers[storage._cdata]

    def _overwrite(self, tensors: Iterable[Any]) -> None:
        for number in {self._number(t) for t in tensors if isinstance(t, Tensor)}:
            self._versions[number] = self._versions.get(number, 0) + 1

    def _caller(self) -> str:
        """The module at work. Autograd numbers its nodes, so a node of the backward pass leads back to its module."""
        if self.backward:
            node = torch._C._current_autograd_node()
            return "" if node is None else self._path_of_node.get(node._sequence_nr(), "")
        path = self._modules[-1] if self._modules else ""
        before, self._nodes = self._nodes, torch._C._autograd._get_sequence_nr()
        self._path_of_node.update(dict.fromkeys(range(before, self._nodes), path))
        return path

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._path, called = self._caller(), name(func)
        reads = self.values(operands(func, args, kwargs))
        out = func(*args, **kwargs)
        if called in self._parts:
            self._parts[called](out, *args)
        elif launches(func):
            slots = zip(func._schema.arguments, args, strict=False)
            self._overwrite(a for slot, a in slots if slot.alias_info is not None and slot.alias_info.is_write)
            self._append(called, reads, self.values(tree_leaves(out)), _product_flops(called, out, args))
        return out

    def _append(
        self, name: str, reads: tuple[Value, ...], writes: tuple[Value, ...], flops: int = 0, part: float = 1.0
    ) -> None:
        self.ops.append(Op(self._path, name, reads, writes, flops, self.backward, part))

    def _add(self, name: str, reads: Iterable, writes: Iterable, flops: int = 0, part: float = 1.0) -> None:
        self._append(name, self.values(reads), self.values(writes), flops, part)

    def _convolution(self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> None:
        self._add("convolution", (x, weight), (y,), _conv_flops(y, weight), _part_read(x, y, weight))
        if bias is not None:
            product = self.values((y, bias))
            self._overwrite((y,))
            self._append("bias", product, self.values((y,)))

    def _convolution_backward(self, out: tuple, dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> None:
        flops, part = _conv_flops(dy, weight), _part_read(x, dy, weight)
        dx, d_weight, d_bias = out
        if dx is not None:
            self._add("dgrad", (dy, weight), (dx,), flops, part)
        if d_weight is not None:
            self._add("wgrad", (dy, x), (d_weight,), flops, part)
        if d_bias is not None:
            self._add("bias gradient", (dy,), (d_bias,))

    def _batch_norm(
        self, out: tuple, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any
    ) -> None:
        y, *statistics = out
        if training:
            reads = self.values((x, mean, var))
            self._overwrite((mean, var))
            self._append("norm statistics", reads, self.values((*statistics, mean, var)))
        else:
            statistics = [mean, var]
        self._add("norm", (x, weight, bias, *statistics), (y,))

    def _batch_norm_backward(self, out: tuple, dy: Tensor, x: Tensor, weight: Any, *rest: Any) -> None:
        mean, var, saved_mean, saved_invstd, training, *_ = rest
        dx, *sums = out
        statistics = (saved_mean, saved_invstd) if training else (mean, var)
        self._add("norm backward sums", (dy, x, *statistics), sums)
        if dx is not None:
            self._add("norm backward", (dy, weight, *statistics, *((x, *sums) if training else ())), (dx,))

    def _group_norm(self, out: tuple, x: Tensor, weight: Any, bias: Any, *_: Any) -> None:
        y, *statistics = out
        self._add("norm statistics", (x,), statistics)
        self._add("norm", (x, weight, bias, *statistics), (y,))

    def _group_norm_backward(self, out: tuple, dy: Tensor, x: Tensor, mean: Any, invstd: Any, weight: Any, *_: Any):
        dx, *sums = out
        self._add("norm backward sums", (dy, x, mean, invstd), sums)
        if dx is not None:
            self._add("norm backward", (dy, x, mean, invstd, weight, *sums), (dx,))


def _conv_flops(y: Tensor, weight: Tensor) -> int:
    return 2 * y.numel() * weight[0].numel()


def _product_flops(name: str, out: Any, args: tuple) -> int:
    if name not in ("mm", "addmm", "bmm"):
        return 0
    return 2 * out.numel() * args[1 if name == "addmm" else 0].shape[-1]


def _part_read(x: Tensor, y: Tensor, weight: Tensor) -> float:
    """The share of a convolution's input pixels that its windows can cover."""
    part = 1.0
    for i in range(2, x.dim()):
        part *= min(1.0, y.shape[i] * weight.shape[i] / x.shape[i])
    return part
