"""What runs for each layer of a model, on which backend, and why not otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends import ConvProblem, Problem, select
from .blocks.fused import Fused, Plan, listening
from .blocks.units import LinearUnit, PackedConvThenNorm, Unit
from .hosts import timm as host
from .models import why_not

_SILENT = (nn.Identity, nn.Dropout, nn.Flatten)


@dataclass(frozen=True)
class Row:
    """One layer: what it computes, what computes it, and the least work that is.

    `flops` counts two per multiply-accumulate; `bytes` reads inputs and weights and writes outputs once. Where
    `operation` is "timm", the host's own module runs and `reason` says why.
    """

    layer: str
    operation: str
    shape: str
    backend: str
    label: str
    reason: str
    flops: int
    bytes: int


def explain(model: nn.Module, input_size: tuple[int, int, int, int] = (1, 3, 224, 224)) -> list[Row]:
    """Run a model once in evaluation on random data and report every layer in the order of execution.

    Args:
        model: any module. Outside the families that are known here every layer is the host's own.
        input_size: (N, C, H, W) of the input, in the model's own dtype and on its device.

    The model's mode is restored. Raises what the model itself raises for such an input.
    """
    rows: list[Row] = []
    paths = {id(module): path for path, module in model.named_modules()}
    first = next(model.parameters(), torch.empty(0))
    training = {module: module.training for module in model.modules()}

    def hear_block(block: Fused, x: Tensor, plan: Plan | None, reason: str | None) -> None:
        path = paths.get(id(block), "")
        if reason is not None:
            rows.append(_host_row(path, block, (x,), None, reason))
            return
        form = plan.unbound.bind(lambda unit: _Recorded(path, unit, x.dtype, rows))
        with torch.no_grad():
            form.run(x.contiguous(memory_format=torch.channels_last))

    hooks = [
        module.register_forward_hook(_hear_module(path, reason, rows)) for path, module, reason in _host_modules(model)
    ]
    try:
        model.eval()
        with torch.no_grad(), listening(hear_block):
            model(torch.rand(input_size, dtype=first.dtype, device=first.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return rows


def _host_modules(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The modules that run as the host's own, outermost blocks or single layers, each with the reason."""
    kept = {id(module): why_not(module, cls) for _, module, cls in host.candidates(model)}
    found = []

    def walk(path: str, module: nn.Module) -> None:
        if isinstance(module, Fused):
            return
        if id(module) in kept:
            found.append((path, module, kept[id(module)] or "not rebuilt yet: call regnet_fast.rebuild(model)"))
        elif not any(True for _ in module.children()):
            if not isinstance(module, _SILENT):
                found.append((path, module, f"{type(module).__name__} is no part of a fused block"))
        else:
            for name, child in module.named_children():
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def _hear_module(path: str, reason: str, rows: list[Row]) -> Callable:
    def hear(module: nn.Module, inputs: tuple, output: Any) -> None:
        rows.append(_host_row(path, module, inputs, output, reason))

    return hear


def _size(shape: torch.Size | tuple) -> str:
    return "x".join(map(str, shape))


def _host_row(path: str, module: nn.Module, inputs: tuple, output: Any, reason: str) -> Row:
    shape = " -> ".join(_size(t.shape) for t in (*inputs, output) if isinstance(t, Tensor))
    return Row(
        path,
        "timm",
        shape,
        "host",
        type(module).__name__,
        reason,
        0,
        _tensor_bytes(*inputs, output, *module.parameters()),
    )


def _tensor_bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _shape(problem: Problem) -> str:
    if isinstance(problem, ConvProblem):
        kernel = _size(problem.kernel) + (f"/{problem.stride[0]}" if problem.stride != (1, 1) else "")
        groups = f" g{problem.groups}" if problem.groups > 1 else ""
        return f"{_size(problem.input_shape)} -> {_size(problem.output_shape)}, {kernel}{groups}"
    if problem.op == "squeeze_excite":
        return f"{problem.batch}x{problem.channels} -> {problem.hidden} -> {problem.channels}"
    return _size(problem.input_shape)


class _Recorded:
    """A unit that appends a row for what it is asked and then runs packed."""

    def __init__(self, block: str, unit: Unit, dtype: torch.dtype, rows: list[Row]):
        self.layer = ".".join(part for part in (block, unit.path) if part)
        self.unit, self.packed, self.rows = unit, unit.pack(dtype), rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.packed(*args, **kwargs)
        packed, norm = self.packed, None
        if isinstance(packed, PackedConvThenNorm):
            packed, norm = packed.conv, packed.norm
        if isinstance(self.unit, LinearUnit):
            features = self.unit.linear.weight.shape[0]
            self.rows.append(
                Row(
                    self.layer,
                    "linear",
                    f"{_size(args[0].shape)} -> {features}",
                    "torch",
                    "torch linear",
                    "",
                    2 * args[0].numel() * features,
                    _tensor_bytes(*args, *self.unit.linear.parameters(), y),
                )
            )
            return y
        if not hasattr(packed, "explain"):
            self.rows.append(_host_row(self.layer, packed.norm, (args[0],), y, _norm_reason(packed.norm)))
            return y
        residual = None if norm is not None else kwargs.get("residual", args[2] if len(args) > 2 else None)
        problem, label = packed.explain(args[0], None if len(args) < 2 else args[1], residual)
        selection = select(problem)
        reason = "; ".join(f"{name}: {why}" for name, why in selection.refused.items())
        self.rows.append(
            Row(self.layer, problem.op, _shape(problem), selection.name, label, reason, problem.flops, problem.bytes)
        )
        if norm is not None:
            self.rows.append(
                _host_row(self.layer + " norm", norm, (y[0] if isinstance(y, tuple) else y,), None, _norm_reason(norm))
            )
        return y


def _norm_reason(norm: nn.Module) -> str:
    return f"{type(norm).__name__} depends on the image, so it cannot be folded into a convolution"
