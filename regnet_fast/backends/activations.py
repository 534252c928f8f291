"""The activations: what each computes, what oneDNN calls it, and whether the kernels have it.

A name that is not in `ACTIVATIONS` raises wherever it is used; nothing falls through to another function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """One elementwise function.

    Attributes: `function` of a tensor, and `in_place` for the same in the tensor's own memory; `post_op`, oneDNN's name
    for it with scalars and algorithm; `code`, its number in csrc/ and kernels/, or None where these do not have it;
    `trains`, whether the passes of training have it; `from_output`, whether its derivative is known from its result;
    `twice`, the same function where torch cannot differentiate `function` twice.
    """

    function: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    post_op: tuple[str, tuple[float, ...], str]
    code: int | None = None
    trains: bool = False
    from_output: bool = False
    twice: Callable[[Tensor], Tensor] | None = None

    def gradient(self, dy: Tensor, z: Tensor) -> Tensor:
        """dL/dz from dL/dy for y = function(z); differentiable in both where gradients are enabled."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            z = z if again and z.requires_grad else z.detach().requires_grad_()
            y = self.twice(z) if again and self.twice else self.function(z)
            (dz,) = torch.autograd.grad(y, z, dy, create_graph=again)
        return dz


def _itself(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(_itself, _itself, ("none", (), ""), 0, True, from_output=True),
    "relu": Activation(F.relu, torch.relu_, ("relu", (), ""), 1, True, from_output=True),
    "silu": Activation(F.silu, partial(F.silu, inplace=True), ("swish", (), ""), 2, True),
    "relu6": Activation(F.relu6, partial(F.relu6, inplace=True), ("hardtanh", (0.0, 6.0), ""), 3),
    "leaky_relu": Activation(F.leaky_relu, partial(F.leaky_relu, inplace=True), ("leaky_relu", (0.01,), "")),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_, ("gelu", (), "none")),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_, approximate="tanh"), ("gelu", (), "tanh")
    ),
    "hardswish": Activation(F.hardswish, partial(F.hardswish, inplace=True), ("hardswish", (), ""), 4),
    "hardsigmoid": Activation(
        F.hardsigmoid,
        partial(F.hardsigmoid, inplace=True),
        ("hardsigmoid", (), ""),
        6,
        twice=lambda z: F.relu6(z + 3) / 6,
    ),
    "sigmoid": Activation(torch.sigmoid, torch.sigmoid_, ("sigmoid", (), ""), 5),
}
"""By name. `leaky_relu` has the slope 0.01; `gelu` is x * Phi(x), `gelu_tanh` its approximation with tanh."""


def refuse(name: str) -> str | None:
    """Why the kernels of csrc/ and kernels/ cannot compute an activation, or None."""
    return f"the kernels have no {name}" if ACTIVATIONS[name].code is None else None


def refuse_gate(name: str) -> str | None:
    """Why the kernels cannot compute a gate by an activation, or None."""
    known = ("sigmoid", "hardsigmoid")
    return None if name in known else f"the kernels make a gate by a {' or a '.join(known)}, not by {name}"
