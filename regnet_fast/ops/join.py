"""The end of a block whose last convolution is gated or added to behind its norm: `activation(x * gate + residual)`."""

from __future__ import annotations

from torch import Tensor

from ..backends import JoinProblem, Run
from ..trials.serving import Serving
from .packed import Packed


class PackedJoin(Packed):
    """The end of a block, in the memory of x where the backend likes."""

    def __init__(self, activation: str):
        super().__init__()
        self.activation = activation

    def key(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> tuple:
        return x.shape, x.dtype, gate is None, residual is None

    def problem(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> JoinProblem:
        operands = gate is not None, residual is not None
        return JoinProblem(tuple(x.shape), self.activation, *operands, x.dtype, str(x.device))

    def bind(self, problem: JoinProblem, by: Serving) -> Run:
        return by.module.prepare_join(problem)

    def __call__(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return self.run_for(x, gate, residual)(x, gate, residual, True)
