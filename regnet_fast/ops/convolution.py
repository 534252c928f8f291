"""What the three convolutions share: packed weights, the operands in the compute dtype, the fake and the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import ACTIVATIONS, ConvProblem, aten, forced_backend, select
from ..backends.deferred import Deferred, computed
from . import checks
from .fold import BatchNorm, fold_to

_SHAPES_KEPT = 8
_SHARED_KEPT = 32
"""Of how many input shapes what was prepared is kept: each with weights of its own, or with shared ones."""

_SHAPES_PACKED = 4
"""Up to how many input shapes are served from packed weights: with more the sizes are taken to change all the time."""


def with_run(runs: dict, key: tuple, run: Callable, most: int = _SHAPES_KEPT) -> dict:
    """The last few prepared runs with one more: a new dictionary, since other threads may be reading this one."""
    runs = {**runs, key: run}
    if len(runs) > most:
        del runs[next(iter(runs))]
    return runs


def channels_last(y: Tensor) -> Tensor:
    """y with exactly the strides of a fresh channels_last tensor, which fakes promise (sizes of one hide others)."""
    n, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    return torch.empty((n, c, h, w), dtype=y.dtype, device=y.device, memory_format=torch.channels_last).copy_(y)


def empty_output(x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """An uninitialised channels_last output of the convolution: what a fake returns."""
    size = [
        checks.output_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2)
    ]
    return torch.empty(
        (x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


class PackedConv:
    """A convolution with its weights folded, and packed by the chosen backend on first use.

    Made by `regnet_fast.functional.pack_conv`, and by the blocks for their own layers. The weight is of the compute
    dtype, the bias of that or float32, and neither is written to. Safe to share between threads.

    A few input shapes whose weights are packed alike share them, and two may have weights of their own. With more, all
    are served from weights that are not packed, which serve every shape, to the same bits.
    """

    def __init__(
        self,
        op: str,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups: int = 1,
        activation: str = "none",
    ):
        self.op, self.weight, self.bias = op, weight, bias
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.activation = activation
        self._runs: dict[tuple, Callable] = {}
        self._unpacked: dict[tuple, Callable] = {}

    def problem(self, x: Tensor, gate: bool, residual: bool) -> ConvProblem:
        """The problem that this convolution poses for an input."""
        return ConvProblem(
            self.op,
            tuple(x.shape),
            self.weight.shape[0],
            tuple(self.weight.shape[2:]),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.activation,
            gate,
            residual,
            x.dtype,
            str(x.device),
        )

    def explain(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> tuple[ConvProblem, str]:
        """The problem that the last such call posed, and what served it."""
        key = (x.shape, gate is None, residual is None, forced_backend())
        run = self._runs.get(key) or self._prepare(key, x, residual)
        return self.problem(x, gate is not None, residual is not None), run.label

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias to pack for another input shape."""
        return self.weight, self.bias

    def laid_out(self, x: Tensor) -> Tensor:
        """x in a layout that the backend reads: channels_last, or as it is where a kernel reads images as they come."""
        if x.is_contiguous(memory_format=torch.channels_last):
            return x
        any_layout = getattr(self._plain_run(x), "any_layout", False) and x.is_contiguous()
        return x if any_layout else x.contiguous(memory_format=torch.channels_last)

    def beside(self, other: Callable, x: Tensor | Deferred) -> tuple[Tensor, Tensor] | None:
        """`self(x)` and `other(x)` where the backend computes both from one read of x, else None."""
        run = self._plain_run(x)
        if not hasattr(run, "beside") or not isinstance(other, PackedConv):
            return None
        partner = other._plain_run(x)
        return run.beside(partner, x) if type(partner) is type(run) else None

    def _plain_run(self, x: Tensor | Deferred) -> Callable:
        """What the backend prepared for x alone."""
        key = (x.shape, True, True, forced_backend())
        return self._runs.get(key) or self._prepare(key, x)

    def _prepare(self, key: tuple, x: Tensor | Deferred, residual: Tensor | Deferred | None = None) -> Callable:
        """What serves an input shape that nothing was prepared for."""
        problem = self.problem(x, not key[1], residual is not None)
        if residual is not None and residual.shape != problem.output_shape:
            shapes = f"{tuple(residual.shape)} to a result of shape {problem.output_shape}"
            raise RuntimeError(f"{self.op}: cannot add a residual of shape {shapes}")
        chosen = select(problem)
        way = aten.way(problem) if chosen.name == aten.NAME else None
        if way is not None:
            return self._share(key, problem, way)
        run = chosen.module.prepare_conv(problem, *self.folded())
        self._runs = with_run(self._runs, key, run)
        return run

    def _share(self, key: tuple, problem: ConvProblem, way: type) -> Callable:
        """What serves an input shape, with the weights of other shapes where it can."""
        use = way, *key[1:]
        run = self._unpacked.get(use)
        if run is None:
            packed = {other: run for other, run in self._runs.items() if (type(run), *other[1:]) == use and run.shape}
            kinds = {run.layout: run for run in packed.values()}
            if len(packed) < _SHAPES_PACKED:
                run = next((one for one in kinds.values() if one.fits(problem)), None)
            if run is None or len(kinds) > 1:
                run = aten.prepare_conv(problem, *self.folded(), len(packed) < 2)
            if getattr(run, "shape", None) is None:
                self._unpacked = {**self._unpacked, use: run}
                self._runs = {other: run for other, run in self._runs.items() if other not in packed}
        self._runs = with_run(self._runs, key, run, _SHARED_KEPT)
        return run

    def pin(self) -> tuple:
        """What keeps the memory of the packed weights from being freed, as long as it is held."""
        return self._runs, self._unpacked

    def __call__(
        self,
        x: Tensor | Deferred,
        gate: Tensor | None = None,
        residual: Tensor | Deferred | None = None,
        *,
        means: bool = False,
        consume: bool = False,
        into_residual: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`activation(conv(x * gate) + bias + residual)`, with its float32 channel means where `means` is asked.

        They are (N, K), or (N, T, K) parts whose sum over T they are where the backend computes these on the way.

        `consume` allows the backend to overwrite x, `into_residual` the residual. x and the residual are channels_last.
        Deferred ones are computed first where the backend cannot normalise what it reads. No argument is checked and
        autocast is off: the callers saw to that.
        """
        key = (x.shape, gate is None, residual is None, forced_backend())
        run = self._runs.get(key)
        if run is None:
            run = self._prepare(key, x, residual)
        if (x.__class__ is Deferred or residual.__class__ is Deferred) and not hasattr(run, "takes_deferred"):
            x, residual = computed(x), computed(residual)
        if means and hasattr(run, "with_parts"):
            return run.with_parts(x)
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
    if y.dtype != torch.bfloat16 or not y.is_cpu:
        return y.mean((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))
    # on a CPU torch's own mean converts the whole map to float32 first, which is slower (docs/cpu.md)
    return y.sum((2, 3)).float().mul_(1 / (y.shape[2] * y.shape[3]))


def call_packed(
    op: str, packed: PackedConv, x: Tensor, gate: Tensor | None, residual: Tensor | None, means: bool = False
):
    """A public operation called with packed weights: check what is left to check, then run."""
    if packed.op != op:
        raise ValueError(f"{op}: the packed weights were made for {packed.op}")
    checks.check_operands(
        op,
        x,
        packed.weight,
        packed.bias,
        gate,
        residual,
        packed.stride,
        packed.padding,
        packed.dilation,
        packed.groups,
        packed.activation,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gate, residual)):
        raise ValueError(
            f"{op}: packed weights are for inference; pass plain weights where a gradient is needed, "
            "or use torch.no_grad()"
        )
    if x.numel() == 0:
        y = empty_output(x, packed.weight, packed.stride, packed.padding, packed.dilation)
        return (y, pixel_means(y)) if means else y
    y, found = _run_packed(packed, x, gate, residual, means)
    return (y, found) if means else y


def _run_packed(
    packed: PackedConv, x: Tensor, gate: Tensor | None, residual: Tensor | None, means: bool
) -> tuple[Tensor, Tensor | None]:
    """The result and its channel means, or None where they are not asked."""
    x = x.contiguous(memory_format=torch.channels_last)
    if not means:
        return channels_last(without_autocast(packed, x, gate, residual)), None
    y, found = without_autocast(packed, x, gate, residual, means=True)
    return channels_last(y), found.sum(1) if found.dim() == 3 else found


def in_compute_dtype(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm | None,
    gate: Tensor | None,
    residual: Tensor | None,
):
    """The operands in the dtype to compute in: autocast's where it is on, else x's; weights folded in float64 first."""
    for operand in (weight, gate, residual):
        checks.check_operand(op, x, operand)
    checks.check_vectors(
        op, x, weight.shape[0], bias, *(() if norm is None else (norm.mean, norm.var, norm.weight, norm.bias))
    )
    autocast = autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not autocast and weight.dtype != dtype:
        raise TypeError(
            f"{op}: the input is {x.dtype}, the weight {weight.dtype}; convert one of them or use torch.autocast"
        )
    gate, residual = (None if t is None else t.to(dtype) for t in (gate, residual))
    return x.to(dtype), fold_to(dtype, weight, bias, norm), gate, residual


def run_operator(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    activation: str,
    means: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What the registered operators do: choose a backend for plain weights and run it once, with the channel means
    where they are asked.
    """
    stride, padding, dilation = tuple(stride), tuple(padding), tuple(dilation)
    if x.numel() == 0 or weight.shape[0] == 0:
        y = empty_output(x, weight, stride, padding, dilation)
        return y, pixel_means(y) if means else None
    packed = PackedConv(
        op, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation
    )
    return _run_packed(packed, x, gate, residual, means)


def activation_gradient(dy: Tensor, y: Tensor, before: Tensor | None, activation: str) -> Tensor:
    """dL/dz for `y = activation(z)`: from y for ReLU, from z (`before`) where `needs_input`."""
    if activation == "relu":
        return torch.where(y <= 0, torch.zeros_like(dy), dy)  # NaN lets it pass, as in torch
    if activation == "silu":
        if not torch.is_grad_enabled():  # one pass, rounded once; but it cannot be differentiated again
            return torch.ops.aten.silu_backward(dy, before)
        s = torch.sigmoid(before)
        return dy * (s * (1 + before * (1 - s)))
    return dy if activation == "none" else ACTIVATIONS[activation].gradient(dy, before)


def needs_input(activation: str) -> bool:
    """Whether an activation's gradient takes its input, not its result."""
    return not ACTIVATIONS[activation].from_output


def conv_gradients(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    activation: str,
    needs: dict[str, bool],
) -> dict[str, Tensor | None]:
    """Gradients of `y = activation(conv(x * gate) + bias + residual)` by name. Where the activation's gradient takes
    its input, that is computed again.
    """
    gated = x if gate is None else x * gate[:, :, None, None]
    before = None
    if needs_input(activation):
        before = torch.nn.functional.conv2d(gated, weight, bias, stride, padding, dilation, groups)
        before = before if residual is None else before + residual
    dz = activation_gradient(dy, y, before, activation)
    want = [needs["x"] or needs["gate"], needs["weight"], needs["bias"] and bias is not None]
    d_gated = d_weight = d_bias = None
    if any(want):
        d_gated, d_weight, d_bias = torch.ops.aten.convolution_backward(
            dz,
            gated,
            weight,
            [weight.shape[0]] if bias is not None else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            want,
        )
    grads = {
        "x": d_gated,
        "weight": d_weight,
        "bias": d_bias,
        "residual": dz if residual is not None else None,
        "gate": None,
    }
    if gate is not None and d_gated is not None:
        grads["x"] = d_gated * gate[:, :, None, None] if needs["x"] else None
        grads["gate"] = (d_gated * x).sum((2, 3)) if needs["gate"] else None
    return grads
