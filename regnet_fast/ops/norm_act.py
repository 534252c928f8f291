"""Per-channel scale and shift, then an activation: an evaluation-mode BatchNorm that no convolution precedes.

y = activation(x * scale * gate + shift)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Deferred, NormActProblem, Run, onednn
from ..trials import cpu
from ..trials.serving import Serving
from .checks import check_activation, check_input, check_tensor, check_vectors
from .convolution import activation_gradient, channels_last, needs_input, without_autocast
from .fold import BatchNorm
from .packed import Packed


def norm_act(
    x: Tensor, norm: BatchNorm | tuple[Tensor, Tensor], *, activation: str = "none", gate: Tensor | None = None
) -> Tensor:
    """Evaluation-mode BatchNorm and activation, of a feature map that may first be gated by squeeze-excite.

    `activation(x * gate[:, :, None, None] * scale[:, None, None] + shift[:, None, None])`

    Args:
        x: (N, C, H, W), any memory format.
        norm: a `BatchNorm` over C channels, or its (scale, shift), each (C,).
        activation: a name of `ACTIVATIONS`, such as "none", "relu" or "silu".
        gate: (N, C), a factor for each image and channel.

    Returns a tensor like x in channels_last. Differentiable in every tensor. Raises ValueError and TypeError for
    arguments that do not fit together, and BackendError where a forced backend cannot serve.
    """
    check_activation("norm_act", activation)
    check_tensor("norm_act", x)
    check_input("norm_act", x, x.shape[min(1, x.dim() - 1)], gate)
    vectors = norm.vectors() if isinstance(norm, BatchNorm) else norm
    check_vectors("norm_act", x, x.shape[1], *vectors)
    scale, shift = norm.scale_shift() if isinstance(norm, BatchNorm) else norm
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    if gate is not None and gate.shape != x.shape[:2]:
        raise ValueError(f"norm_act: the gate must be (N, C) = {tuple(x.shape[:2])}, got {tuple(gate.shape)}")
    return torch.ops.regnet_fast.norm_act(x, scale, shift, gate, activation)


class PackedNormAct(Packed):
    """Scale, shift and activation, packed: `packed(x, gate)`.

    `consume` allows the backend to overwrite x, `defer` to leave the map to the convolutions that read it.
    """

    def __init__(self, scale: Tensor, shift: Tensor, activation: str):
        super().__init__()
        self.scale, self.shift, self.activation = scale, shift, activation

    def key(self, x: Tensor, gate: Tensor | None = None) -> tuple:
        return x.shape, gate is None

    def problem(self, x: Tensor, gate: Tensor | None = None) -> NormActProblem:
        return NormActProblem(tuple(x.shape), self.activation, gate is not None, x.dtype, str(x.device))

    def bind(self, problem: NormActProblem, by: Serving) -> Run:
        options = by.options
        if by.module is onednn:
            options = {"variant": cpu.norm_act_variant(problem, self.scale, self.shift)}
        return by.module.prepare_norm_act(problem, self.scale, self.shift, **options)

    def __call__(
        self, x: Tensor, gate: Tensor | None = None, *, consume: bool = False, defer: bool = False
    ) -> Tensor | Deferred:
        run = self.run_for(x, gate)
        return Deferred(run, x, gate) if defer and run.affine is not None else run(x, gate, consume)


@torch.library.custom_op("regnet_fast::norm_act", mutates_args=())
def _operator(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    if x.numel() == 0:
        return _fake(x, scale, shift, gate, activation)
    packed = PackedNormAct(scale, shift, activation)
    return channels_last(without_autocast(packed, x.contiguous(memory_format=torch.channels_last), gate))


@_operator.register_fake
def _fake(x, scale, shift, gate, activation):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup(ctx, inputs, output):
    x, scale, shift, gate, ctx.activation = inputs
    ctx.save_for_backward(x, scale, shift, gate, output)


def _backward(ctx, dy):
    x, scale, shift, gate, y = ctx.saved_tensors
    column = scale[None] if gate is None else scale * gate
    before = x * column[:, :, None, None] + shift[:, None, None] if needs_input(ctx.activation) else None
    dz = activation_gradient(dy, y, before, ctx.activation)
    d_column = (dz * x).sum((2, 3))
    d_scale = d_column.sum(0) if gate is None else (d_column * gate).sum(0)
    return dz * column[:, :, None, None], d_scale, dz.sum((0, 2, 3)), None if gate is None else d_column * scale, None


_operator.register_autograd(_backward, setup_context=_setup)
