"""Whether a module is still the one that something was derived from: its structure, settings, hooks and tensors."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.hooks import RemovableHandle

_CONFIG = (
    *("stride", "padding", "dilation", "groups", "padding_mode", "eps", "kernel_size", "ceil_mode", "return_indices"),
    *("add_maxpool", "pool_type", "input_fmt", "output_size", "start_dim", "end_dim"),
    *("negative_slope", "approximate", "min_val", "max_val"),
)
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
PLAIN = (Tensor, nn.Parameter)
_COUNTER = "num_batches_tracked"

# Read of every module or tensor in each call of a model: without a Python function for each.
_CLASS, _MODE = attrgetter("__class__"), itemgetter("training")
_VERSION, _POINTER, _STRIDE = attrgetter("_version"), methodcaller("data_ptr"), methodcaller("stride")


class Structure:
    """What a module is but for its tensors: the structure below it, the settings of its layers, hooks, training flags.

    Attributes and hooks of the module itself are not looked at.
    """

    def __init__(self, module: nn.Module):
        self._modules = list(module.modules())
        self._inner = self._modules[1:]
        self._states, self._inner_states = [m.__dict__ for m in self._modules], [m.__dict__ for m in self._inner]
        self._children = [state["_modules"] for state in self._states if state["_modules"]]
        named = [(state, names) for state in self._states if (names := [n for n in _CONFIG if n in state])]
        self._configured, self._settings = [state for state, _ in named], [itemgetter(*names) for _, names in named]
        self._tables = [table for m in self._modules for table in (m._parameters, m._buffers) if table]
        self._loose = [
            (state, name) for state in self._states for name, value in [*state.items()] if isinstance(value, Tensor)
        ]
        self._hooks_seen, self._hooked = RemovableHandle.next_id, any(map(hooked, self._inner))
        self._classes, self._modes, self._sizes, self._values = self._read_structure()
        self._kept_children = [dict(children) for children in self._children]

    def of(self, module: nn.Module) -> bool:
        """Whether this was read from that very module, and not from one whose attributes were copied."""
        return self._modules[0] is module

    def _read_structure(self) -> tuple[list, ...]:
        """Class, mode and settings of every module, and how many attributes each has: one that was added may be a
        replaced method. The module's own attributes hold what was derived from it and are not counted.
        """
        return (
            [*map(_CLASS, self._modules)],
            [*map(_MODE, self._states)],
            [*map(len, self._inner_states)],
            [*map(itemgetter.__call__, self._settings, self._configured)],
        )

    def _read_tensors(self) -> list[Tensor | None]:
        """Every tensor that the forwards below read as an attribute of a module: Parameters, buffers, and those that
        stand in a module's `__dict__` in their place, as replicas and computed weights do.
        """
        held = [*chain.from_iterable(map(dict.values, self._tables))]
        return held + [state.get(name) for state, name in self._loose] if self._loose else held

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same with their names."""
        for path, m in self._modules[0].named_modules():
            for table in (m._parameters, m._buffers, m.__dict__):
                for name, t in [*table.items()]:
                    if isinstance(t, Tensor):
                        yield f"{path}.{name}" if path else name, t

    def odd(self) -> str | None:
        """Which tensor computes in a way of its own: quantised and distributed ones, other subclasses of Tensor."""
        if all(t is None or _plain(t) for t in self._read_tensors()):
            return None
        name, t = next((name, t) for name, t in self.named_tensors() if not _plain(t))
        kind = f"class {type(t).__name__}" if type(t) not in PLAIN else f"layout {t.layout}"
        return f"{name} is a tensor of the {kind}, which computes in a way of its own"

    def current(self) -> bool:
        """Whether everything is as it was."""
        if RemovableHandle.next_id != self._hooks_seen or self._hooked:
            seen = RemovableHandle.next_id
            if any(map(hooked, self._inner)) != self._hooked:
                return False
            self._hooks_seen = seen
        structure = self._classes, self._modes, self._sizes, self._values
        return self._children == self._kept_children and self._read_structure() == structure


_LISTS = (
    *("_modules", "_inner", "_states", "_inner_states", "_children", "_kept_children", "_configured", "_settings"),
    *("_classes", "_modes", "_sizes", "_values"),
    *("_tables", "_loose", "_held", "tensors", "_matrices", "_versions", "_pointers", "_strides", "_probes", "_probed"),
)
"""What a `Watch` reads and compares, item by item."""


class Watch(Structure):
    """The facts that packed weights and recorded calls of a module rest on.

    `current()` is the whole of cache invalidation: the structure; the identity, memory, layout and version of every
    tensor that the forward reads; and whether an optimizer stepped over one of them, since torch's fused optimizers,
    and those that write through `.data`, leave the version as it is. Of other writes through `.data` one element of
    the largest matrix tells.

    Attributes: `tensors`, each once, without the counters of batches; `blind`, why changes to them cannot be seen, or
    None: there are no tensors then.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.stepped = False
        self._held = self._read_tensors()
        counters = {id(table[_COUNTER]) for table in self._tables if _COUNTER in table}
        unique = {id(t): t for t in self._held if t is not None and id(t) not in counters}
        self.tensors: list[Tensor] = list(unique.values())
        self.blind = self.odd()
        if self.blind is None and any(t.is_inference() for t in self.tensors):
            self.blind = "its weights were made in inference mode, where changes to them cannot be seen"
        if self.blind is not None:
            self.tensors = []
        self._matrices = [t for t in self.tensors if t.dim() > 1]
        self._memory = [t.detach() for t in self.tensors]  # as long as it is held no other tensor can be put there
        self._versions, self._pointers, self._strides = self._read_memory()
        probe = _largest(max((t for t in self._memory if t.dim() > 1), key=Tensor.numel, default=None))
        self._probes = [] if probe is None else [probe]
        self._probed = [*map(Tensor.item, self._probes)]
        self.storages = frozenset(map(_storage, self.tensors))
        _STEPS.watch(self)

    def _read_memory(self) -> tuple[list, list, list]:
        tensors = self.tensors
        return [*map(_VERSION, tensors)], [*map(_POINTER, tensors)], [*map(_STRIDE, self._matrices)]

    def current(self) -> bool:
        """Whether everything is as it was, and every tensor unchanged as far as torch counts changes."""
        if self.stepped or not super().current():
            return False
        held = self._read_tensors()
        return (
            len(held) == len(self._held)
            and all(map(is_, held, self._held))
            and [*map(_VERSION, self.tensors)] == self._versions
            and self.memory_current()
        )

    def memory_current(self) -> bool:
        """Whether every tensor's memory is the one that it was, which `t.data = ...` changes, and on a CPU the largest
        element of the largest matrix, which most writes through `.data` to all weights change.
        """
        return (
            [*map(_POINTER, self.tensors)] == self._pointers
            and [*map(_STRIDE, self._matrices)] == self._strides
            and [*map(Tensor.item, self._probes)] == self._probed
        )


class Joined(Watch):
    """Watches as one, current where all of them are: a few long lists are read faster than many short ones. Nobody
    listened to what they watch when they were made.
    """

    def __init__(self, watches: Sequence[Watch]):
        for name in _LISTS:
            setattr(self, name, [*chain.from_iterable(getattr(watch, name) for watch in watches)])
        self._hooks_seen, self._hooked = min((w._hooks_seen for w in watches), default=0), False
        self.storages = frozenset().union(*(watch.storages for watch in watches))
        self.stepped = False
        _STEPS.watch(self)
        self.stepped |= any(watch.stepped for watch in watches)  # before it was told of steps


def _largest(t: Tensor | None) -> Tensor | None:
    """A view of the element of largest magnitude on a CPU, or None, also where it is NaN."""
    if t is None or not t.is_cpu or not t.numel():
        return None
    index = torch.unravel_index(t.abs().argmax(), t.shape)
    found = t[tuple(int(i) for i in index)]
    return None if found.isnan() else found


def _plain(t: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in memory."""
    return type(t) in PLAIN and t.layout is torch.strided


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class _Steps:
    """Tells every `Watch` when an optimizer of torch has stepped over memory that it watches."""

    def __init__(self) -> None:
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._handle: RemovableHandle | None = None

    def watch(self, watch: Watch) -> None:
        with self._lock:
            if self._handle is None:
                self._handle = register_optimizer_step_post_hook(self._stepped)
            self._watches.add(watch)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with self._lock:
            watches = [watch for watch in self._watches if not watch.stepped]
        if not watches:
            return
        written = {_storage(p) for group in optimizer.param_groups for p in group["params"] if _plain(p)}
        for watch in watches:
            if not watch.storages.isdisjoint(written):
                watch.stepped = True


_STEPS = _Steps()


def hooks(module: nn.Module) -> tuple[dict, ...]:
    """Where those stand who listen to a module."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module."""
    return any(hooks(module))


def only_forwards(module: nn.Module) -> bool:
    """Whether `module(x)` is its class's `forward(x)` and nothing else: no hook, no replaced forward, not compiled."""
    return not (
        any(hooks(module))
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or not calls_forward(type(module))
    )


def calls_forward(cls: type[nn.Module]) -> bool:
    """Whether calls of a class are torch's, of its `forward`."""
    return cls.__call__ is _CALL


def not_derived(module: nn.Module) -> bool:
    """Whether a rebuilt module's class is the one that it was given, and none that somebody derived from that."""
    return "host" in vars(type(module))


def transformed() -> str | None:
    """What stands between a call and plain computation here, or None: whoever it is must see every module's call and
    every operation, as the host makes them.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a dispatch mode or a functorch transform is active"
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return "a mode that sees torch's functions is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if (
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    ):
        return "a global module hook is registered"
    if nn.Module.__call__ is not _CALL or nn.Module._call_impl is not _CALL_IMPL:
        return "torch.nn.Module's call was replaced"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace and the ONNX exporter record the host's own forward"
    return None
