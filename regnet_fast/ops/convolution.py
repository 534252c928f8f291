"""What the three convolutions share: argument checks, packed weights, the fake and the gradient."""
from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import ACTIVATIONS, ConvProblem, forced_backend, select
from .fold import BatchNorm, fold_to

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SHAPES_KEPT = 8
_DROPPING = threading.Lock()  # of the module, since a lock can be neither copied nor pickled


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """An integer or a pair of them as a pair. Raises TypeError for anything else."""
    if isinstance(value, int):
        return (value, value)
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, int) for v in value):
        raise TypeError(f"{name} must be an integer or two integers, got {value!r}")
    return tuple(value)


def check_input(op: str, x: Tensor, channels: int, *others: Tensor | None) -> None:
    """Raise TypeError or ValueError unless x is a floating (N, C, H, W) tensor that matches the other tensors."""
    if x.dim() != 4:
        raise ValueError(f"{op}: the input must be (N, C, H, W), got {x.dim()} dimensions: {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: the input must be a floating-point tensor, got {x.dtype}; convert it with x.float()")
    if x.shape[1] != channels:
        raise ValueError(f"{op}: the input has {x.shape[1]} channels, the weights are for {channels}")
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"{op}: the input is on {x.device}, a weight or operand on {other.device}; move one of them")
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"{op}: the input is {x.dtype}, a weight or operand is {other.dtype}; convert one of them")


def check_operand(op: str, x: Tensor, operand: Tensor | None) -> None:
    """Raise TypeError or ValueError unless a weight or operand is floating-point and on x's device."""
    if operand is None:
        return
    if operand.device != x.device:
        raise ValueError(f"{op}: the input is on {x.device}, a weight or operand on {operand.device}; move one of them")
    if operand.dtype not in FLOATS:
        raise TypeError(f"{op}: a weight or operand is {operand.dtype}, which is no floating-point type; convert it")


def check_vectors(op: str, x: Tensor, channels: int, *vectors: Tensor | None) -> None:
    """Raise TypeError or ValueError unless each vector is a floating (channels,) tensor on x's device, or None."""
    for vector in vectors:
        check_operand(op, x, vector)
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{op}: bias and norm must have vectors of shape ({channels},), got {tuple(vector.shape)}")


def check_activation(op: str, activation: str) -> None:
    """Raise ValueError for an activation that has no fused form."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs along one axis of a convolution."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def channels_last(y: Tensor) -> Tensor:
    """y with exactly the strides of a fresh channels_last tensor, which fakes promise (sizes of one hide others)."""
    n, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    return torch.empty((n, c, h, w), dtype=y.dtype, device=y.device, memory_format=torch.channels_last).copy_(y)


def empty_output(x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """An uninitialised channels_last output of the convolution: what a fake returns."""
    size = [output_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2)]
    return torch.empty((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class PackedConv:
    """A convolution with its weights folded, and packed by the chosen backend on first use for each input shape.

    Made by `regnet_fast.functional.pack_conv`, and by the blocks for their own layers. The weight is of the compute
    dtype, the bias of that or float32, and neither is written to. Safe to share between threads; the last few input shapes are kept.
    """

    def __init__(self, op: str, weight: Tensor, bias: Tensor | None, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
                 groups: int = 1, activation: str = "none"):
        self.op, self.weight, self.bias = op, weight, bias
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.activation = activation
        self._runs: OrderedDict[tuple, object] = OrderedDict()

    def problem(self, x: Tensor, gate: bool, residual: bool) -> ConvProblem:
        """The problem that this convolution poses for an input."""
        return ConvProblem(self.op, tuple(x.shape), self.weight.shape[0], tuple(self.weight.shape[2:]), self.stride, self.padding,
                           self.dilation, self.groups, self.activation, gate, residual, x.dtype, x.device.type)

    def explain(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> tuple[ConvProblem, str]:
        """The problem that the last such call posed, and what served it."""
        run = self._runs[x.shape, gate is None, residual is None, forced_backend()]
        return self.problem(x, gate is not None, residual is not None), run.label

    def _prepare(self, key: tuple, x: Tensor, gate: bool, residual: bool):
        problem = self.problem(x, gate, residual)
        run = select(problem).module.prepare_conv(problem, self.weight, self.bias)
        with _DROPPING:
            self._runs[key] = run
            while len(self._runs) > _SHAPES_KEPT:
                self._runs.popitem(last=False)
        return run

    def __call__(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None, *, means: bool = False,
                 consume: bool = False, into_residual: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """`activation(conv(x * gate) + bias + residual)`, with its float32 channel means where `means` is asked.

        `consume` allows the backend to overwrite x, `into_residual` the residual. x and the residual are channels_last.
        No argument is checked and autocast is off: the callers saw to that.
        """
        key = (x.shape, gate is None, residual is None, forced_backend())
        run = self._runs.get(key)
        if run is None:
            run = self._prepare(key, x, gate is not None, residual is not None)
        y = run(x, gate, residual, consume, into_residual)
        return (y, pixel_means(y)) if means else y


def autocast_enabled(device: str) -> bool:
    """Whether torch.autocast is on for a type of device; never for meta, which torch refuses to be asked about."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(packed: Callable, x: Tensor, *arguments, **options):
    """`packed(x, ...)` in the arguments' own dtypes, which autocast would change once more."""
    if autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return packed(x, *arguments, **options)
    return packed(x, *arguments, **options)


def pixel_means(y: Tensor) -> Tensor:
    """(N, C) means over the pixels of a channels_last tensor, float32 or wider."""
    if y.dtype != torch.bfloat16:
        return y.mean((2, 3), dtype=torch.float32 if y.dtype == torch.float16 else y.dtype)
    n, c, h, w = y.shape  # as one sum over rows of contiguous channels, which is 2 to 4 times faster than torch's mean
    return y.permute(0, 2, 3, 1).reshape(n, h * w, c).sum(1).float().mul_(1 / (h * w))


def call_packed(op: str, packed: PackedConv, x: Tensor, gate: Tensor | None, residual: Tensor | None, means: bool = False):
    """A public operation called with packed weights: check what is left to check, then run."""
    if packed.op != op:
        raise ValueError(f"{op}: the packed weights were made for {packed.op}")
    check_operands(op, x, packed.weight, packed.bias, gate, residual, packed.stride, packed.padding, packed.dilation,
                   packed.groups, packed.activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gate, residual)):
        raise ValueError(f"{op}: packed weights are for inference; pass plain weights where a gradient is needed, or use torch.no_grad()")
    if x.numel() == 0:
        y = empty_output(x, packed.weight, packed.stride, packed.padding, packed.dilation)
        return (y, pixel_means(y)) if means else y
    y = channels_last(without_autocast(packed, x.contiguous(memory_format=torch.channels_last), gate, residual))
    return (y, pixel_means(y)) if means else y


def check_not_given(op: str, **given: bool) -> None:
    """Raise ValueError for arguments given beside packed weights, which would be ignored."""
    names = [name for name, present in given.items() if present]
    if names:
        raise ValueError(f"{op}: {', '.join(names)} given beside packed weights, which hold their own; give it to pack_conv")


def check_weight(op: str, weight: Tensor, groups: int, x: Tensor) -> None:
    """Raise unless weight is (K, C / groups, R, S) with K a multiple of the groups, and x has C channels."""
    if weight.dim() != 4:
        raise ValueError(f"{op}: the weight must have 4 dimensions, got {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{op}: {weight.shape[0]} output channels cannot be divided into {groups} groups")
    check_input(op, x, weight.shape[1] * groups)


def in_compute_dtype(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNorm | None, gate: Tensor | None,
                     residual: Tensor | None):
    """The operands in the dtype to compute in: autocast's where it is on, else x's; weights folded in float64 first."""
    for operand in (weight, gate, residual):
        check_operand(op, x, operand)
    check_vectors(op, x, weight.shape[0], bias, *(() if norm is None else (norm.mean, norm.var, norm.weight, norm.bias)))
    autocast = autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not autocast and weight.dtype != dtype:
        raise TypeError(f"{op}: the input is {x.dtype}, the weight {weight.dtype}; convert one of them or use torch.autocast")
    gate, residual = (None if t is None else t.to(dtype) for t in (gate, residual))
    return x.to(dtype), fold_to(dtype, weight, bias, norm), gate, residual


def check_operands(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None,
                   stride, padding, dilation, groups: int, activation: str) -> None:
    """Raise ValueError or TypeError unless all operands of a convolution fit together."""
    check_activation(op, activation)
    check_input(op, x, weight.shape[1] * groups, weight, bias, gate, residual)
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{op}: only the batch may be empty, got an input of {tuple(x.shape)}")
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(f"{op}: stride {stride} and dilation {dilation} must be positive, padding {padding} not negative")
    size = tuple(output_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2))
    if min(size) < 1:
        raise ValueError(f"{op}: an image of {tuple(x.shape[2:])} is too small for a kernel of {tuple(weight.shape[2:])}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: the bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if gate is not None and gate.shape != x.shape[:2]:
        raise ValueError(f"{op}: the gate must be (N, C) = {tuple(x.shape[:2])}, got {tuple(gate.shape)}")
    expected = (x.shape[0], weight.shape[0], *size)
    if residual is not None and tuple(residual.shape) != expected:
        raise ValueError(f"{op}: the residual must have the output's shape {expected}, got {tuple(residual.shape)}")


def run_operator(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None,
                 stride, padding, dilation, groups: int, activation: str) -> Tensor:
    """What the registered operators do: choose a backend for plain weights and run it once."""
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    if x.numel() == 0 or weight.shape[0] == 0:
        return empty_output(x, weight, stride, padding, dilation)
    packed = PackedConv(op, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation)
    return channels_last(without_autocast(packed, x.contiguous(memory_format=torch.channels_last), gate, residual))


def activation_gradient(dy: Tensor, y: Tensor, before: Tensor | None, activation: str) -> Tensor:
    """dL/dz for `y = activation(z)`: from y for ReLU, from z (`before`) for SiLU."""
    if activation == "relu":
        return torch.where(y > 0, dy, torch.zeros_like(dy))
    if activation == "silu":
        if not torch.is_grad_enabled():  # one pass, rounded once; but it cannot be differentiated again
            return torch.ops.aten.silu_backward(dy, before)
        s = torch.sigmoid(before)
        return dy * (s * (1 + before * (1 - s)))
    return dy


def conv_gradients(dy: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None,
                   residual: Tensor | None, stride, padding, dilation, groups: int, activation: str,
                   needs: dict[str, bool]) -> dict[str, Tensor | None]:
    """Gradients of `y = activation(conv(x * gate) + bias + residual)` by name; SiLU's input is computed again."""
    gated = x if gate is None else x * gate[:, :, None, None]
    before = None
    if activation == "silu":
        before = torch.nn.functional.conv2d(gated, weight, bias, stride, padding, dilation, groups)
        before = before if residual is None else before + residual
    dz = activation_gradient(dy, y, before, activation)
    want = [needs["x"] or needs["gate"], needs["weight"], needs["bias"] and bias is not None]
    d_gated = d_weight = d_bias = None
    if any(want):
        d_gated, d_weight, d_bias = torch.ops.aten.convolution_backward(
            dz, gated, weight, [weight.shape[0]] if bias is not None else None, stride, padding, dilation, False, [0, 0], groups, want
        )
    grads = {"x": d_gated, "weight": d_weight, "bias": d_bias, "residual": dz if residual is not None else None, "gate": None}
    if gate is not None and d_gated is not None:
        grads["x"] = d_gated * gate[:, :, None, None] if needs["x"] else None
        grads["gate"] = (d_gated * x).sum((2, 3)) if needs["gate"] else None
    return grads
