"""Whether a module is still the one that something was derived from: its structure, settings, hooks and tensors."""

from __future__ import annotations

from operator import is_, itemgetter

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils.hooks import RemovableHandle

_CONFIG = ("stride", "padding", "dilation", "groups", "padding_mode", "eps")


class Structure:
    """What a module is but for its tensors: the structure below it, the settings of its layers, hooks, training flags.

    Attributes and hooks of the module itself are not looked at.
    """

    def __init__(self, module: nn.Module):
        self._modules = list(module.modules())
        self._states = [m.__dict__ for m in self._modules]
        self._children = [state["_modules"] for state in self._states if state["_modules"]]
        self._settings = [
            (state, itemgetter(*names)) for state in self._states if (names := [n for n in _CONFIG if n in state])
        ]
        self._hooks_seen, self._hooked = RemovableHandle.next_id, any(hooked(m) for m in self._modules[1:])
        self._structure = self._read_structure()
        self._kept_children = [dict(children) for children in self._children]

    def _read_structure(self) -> tuple[list, ...]:
        """Class, mode and settings of every module, and how many attributes each has: one that was added may be a
        replaced forward. The module's own attributes hold what was derived from it and are not counted.
        """
        return (
            [m.__class__ for m in self._modules],
            [state["training"] for state in self._states],
            [*map(len, self._states[1:])],
            [get(state) for state, get in self._settings],
        )

    def current(self) -> bool:
        """Whether everything is as it was."""
        if RemovableHandle.next_id != self._hooks_seen or self._hooked:
            seen = RemovableHandle.next_id
            if any(hooked(m) for m in self._modules[1:]) != self._hooked:
                return False
            self._hooks_seen = seen
        return self._children == self._kept_children and self._read_structure() == self._structure

    @property
    def inner_hooks(self) -> bool:
        """Whether somebody listened to a module below when this was made."""
        return self._hooked


class Watch(Structure):
    """The facts that packed weights and recorded calls of a module rest on.

    `current()` is the whole of cache invalidation: the structure, and the identity, memory and version of every
    parameter and buffer.

    Attributes: `parameters` of the module; `tensors`, them and its buffers; `blind`, whether some of these were made in
    inference mode, where changes to them cannot be seen.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        tables = [table for m in self._modules for table in (m._parameters, m._buffers) if table]
        self._tables = tables
        self._held = [t for table in tables for t in table.values()]
        self.tensors: list[Tensor] = [
            t for table in tables for name, t in table.items() if t is not None and name != "num_batches_tracked"
        ]
        self.parameters = [t for t in self.tensors if isinstance(t, nn.Parameter)]
        self.blind = any(t.is_inference() for t in self.tensors)
        if self.blind:
            self.tensors = []
        self._versions = [t._version for t in self.tensors]
        self._pointers = [t.data_ptr() for t in self.tensors]

    def current(self) -> bool:
        return super().current() and self.tensors_current()

    def tensors_current(self) -> bool:
        """Whether every parameter and buffer is the one that it was, unchanged."""
        held = [t for table in self._tables for t in table.values()]
        return (
            len(held) == len(self._held)
            and all(map(is_, held, self._held))
            and [t._version for t in self.tensors] == self._versions
            and [t.data_ptr() for t in self.tensors] == self._pointers
        )


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def global_hooks() -> bool:
    """Whether somebody listens to every module."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )
