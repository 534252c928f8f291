"""Blocks that run one after another: the output of each belongs to the next, which may write its own result into it.

A residual block alone has to allocate its result, since the caller may still use the input. Inside a stage nobody but
the next block sees a block's output, and adding into it touches less memory than a fresh result beside it would.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fused import Fused, hooked


class Chain:
    """Mixin before a host's container of blocks, whose forward is one child after another. Subclasses set `host`.

    Only what a fused block returned is given away, and only without gradients; a child that somebody listens to is
    called as ever, and so is everything under tracing and compilation.
    """

    host: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        if self.training or type(x) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        own = False
        for child in self.children():
            if isinstance(child, Fused) and not hooked(child) and "forward" not in child.__dict__:
                x, own = child.step(x, own)
            else:
                x, own = child(x), False
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the host's own container, which shares the children."""
        plain = object.__new__(type(self).host)
        plain.__dict__ = self.__dict__
        return plain
