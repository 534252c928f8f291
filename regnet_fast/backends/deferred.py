"""A normalised map that is not computed yet, for kernels that normalise what they read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Deferred:
    """`activation(x * scale * gate + shift)`, for its readers to compute as they read x.

    Args:
        run: the affine map bound to `scale`, `shift` and `activation`, attributes that readers use: `run(x, gate,
            consume)`.
        x: (N, C, H, W), channels_last. gate: (N, C) or None.
    """

    def __init__(self, run: Callable[..., Tensor], x: Tensor, gate: Tensor | None):
        self.run, self.x, self.gate = run, x, gate
        self.shape: torch.Size = x.shape
        self.dtype, self.device = x.dtype, x.device
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The map itself, for readers that cannot normalise; computed once."""
        if self._value is None:
            self._value = self.run(self.x, self.gate, False)
        return self._value


def computed(x: Tensor | Deferred) -> Tensor:
    """x itself, or the value of a deferred one."""
    return x.value() if x.__class__ is Deferred else x
