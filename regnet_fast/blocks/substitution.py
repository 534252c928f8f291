"""A form over other tensors than its modules': what a gradient is computed through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from torch import Tensor, nn

from .forms import Form
from .units import Unit


def with_tensors(form: Form, instead: Mapping[int, Tensor]) -> Form:
    """The form over copies of its modules, as they are now, in which the tensors whose `id` is given are replaced.

    The modules themselves are left alone, so that other threads may use them. A tensor or a module that stands in
    several places is replaced by the same one in all of them.
    """
    copies: dict[int, nn.Module] = {}

    def module(m: nn.Module) -> nn.Module:
        if id(m) not in copies:
            copies[id(m)] = copy = object.__new__(type(m))
            vars(copy).update(
                {name: tensor(value) for name, value in [*vars(m).items()]},
                _parameters={name: tensor(t) for name, t in [*m._parameters.items()]},
                _buffers={name: tensor(t) for name, t in [*m._buffers.items()]},
                _modules={name: part(child) for name, child in [*m._modules.items()]},
            )
        return copies[id(m)]

    def tensor(value):
        return instead.get(id(value), value) if isinstance(value, Tensor) else value

    def part(value):
        if isinstance(value, nn.Module):
            return module(value)
        if isinstance(value, tuple):
            parts = map(part, value)
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, (Unit, Form)):
            return replace(value, **{f.name: part(getattr(value, f.name)) for f in fields(value) if f.init})
        return value

    return part(form)
