"""What runs for each layer of a model, on which backend, why not otherwise, and what timm eager runs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from .backends import ConvProblem, Problem, cuda_launch, select, triton
from .blocks.fused import Fused, Plan, listening
from .blocks.units import LinearUnit, PackedConvThenNorm, PackedUnit, Unit
from .counting import KernelCounter
from .hosts.registry import candidates
from .kernels import tables
from .models import why_not
from .ops.norm_act import PackedNormAct
from .ops.packed import Packed
from .ops.squeeze_excite import PackedSqueezeExcite
from .recording import Kernel
from .roofline import Ceilings, Count, count, kernels, record

_OPERANDS = {PackedUnit: 3, PackedNormAct: 2, PackedSqueezeExcite: 1}
"""How many operands a problem is posed by: x, gate and residual; x and gate; means."""

_SILENT = (nn.Identity, nn.Dropout, nn.Flatten)


@dataclass(frozen=True)
class Row:
    """One layer: what it computes, what computes it, what that takes, and what it takes elsewhere.

    A stage may take a large batch in parts, on a CPU: `shape` is then that of a part and `times` says how many there
    were; the counts are of all of them.

    `flops` counts two per multiply-accumulate; `bytes` reads inputs and weights and writes outputs once. Where
    `operation` is "host", the host's own module runs and `reason` says why. `launched` are the kernels that ran for the
    layer, as `regnet_fast.counting` counts them; a norm that runs inside a unit stands with its convolution. It is None
    for the host's own modules.

    `ours` sums them up. `eager` and `ideal` count the layer, with its norm and activation, under these executions of
    `regnet_fast.roofline`: timm's own forward (RepVGG reparameterised), and the least there can be. They are None where
    the model does not run on meta tensors. For the host's own modules `ours` is `eager`.
    """

    layer: str
    operation: str
    shape: str
    backend: str
    label: str
    reason: str
    flops: int
    bytes: int
    launched: tuple[Kernel, ...] | None = None
    ours: Count | None = None
    eager: Count | None = None
    ideal: Count | None = None
    times: int = 1


def explain(
    model: nn.Module,
    input_size: tuple[int, int, int, int] = (1, 3, 224, 224),
    ceilings: Ceilings | None = None,
) -> list[Row]:
    """Run a model once in evaluation on random data and report every layer in the order of execution.

    Args:
        model: any module. Outside the families that are known here every layer is the host's own.
        input_size: (N, C, H, W) of the input, in the model's own dtype and on its device.
        ceilings: what the machine reaches at most; the counts then have a modelled time.

    The kernels of Triton and csrc/ are launched as ever but left out, since only the sizes of what they compute matter
    here.

    The model's mode is restored. Raises what the model itself raises for such an input.
    """
    rows: list[Row] = []
    paths = {id(module): path for path, module in model.named_modules()}
    first = next(model.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    training = {module: module.training for module in model.modules()}
    counter = KernelCounter()

    def hear_block(block: Fused, x: Tensor, plan: Plan | None, reason: str | None) -> None:
        path = paths.get(id(block), "")
        if reason is not None:
            rows.append(_host_row(path, block, (x,), None, reason))
            return
        start = len(rows)
        form = plan.unbound.bind(lambda unit: _Recorded(path, unit, x.dtype, rows, counter))
        with torch.no_grad():
            block._run(form, x)  # which packs the weights
            del rows[start:]
            counter.take()
            with counter:
                block._run(form, x)
        if rows and rows[-1].launched is not None:  # a pooling head without a classifier has no row of its own
            last = rows[-1]
            rows[-1] = replace(last, launched=last.launched + counter.take(last.layer))

    hooks = [
        module.register_forward_hook(_hear_module(path, reason, rows)) for path, module, reason in _host_modules(model)
    ]
    try:
        model.eval()
        heard = triton.listening(str(first.device), counter.hear), cuda_launch.standing_in(counter.hear_cuda)
        with torch.no_grad(), listening(hear_block), heard[0], heard[1]:
            model(torch.rand(input_size, dtype=first.dtype, device=first.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return _compared(_summed(rows), model, input_size, first.dtype, ceilings)


def _summed(rows: list[Row]) -> list[Row]:
    """One row for the same layer on every part of a batch of the same size."""
    found: dict[Row, list[Row]] = {}
    for row in rows:
        found.setdefault(replace(row, launched=None), []).append(row)
    return [
        replace(
            row,
            times=len(same),
            flops=sum(one.flops for one in same),
            bytes=sum(one.bytes for one in same),
            launched=None if same[0].launched is None else tuple(k for one in same for k in one.launched),
        )
        for row, same in found.items()
    ]


def _compared(
    rows: list[Row], model: nn.Module, input_size: tuple, dtype: torch.dtype, ceilings: Ceilings | None
) -> list[Row]:
    """The rows with the counts of what ran, of timm eager and of the ideal execution."""
    rows = [row if row.launched is None else replace(row, ours=count(row.launched, ceilings)) for row in rows]
    if not rows:
        return rows
    try:
        recording = record(model, input_size, dtype)
    except (NotImplementedError, RuntimeError):  # an operation that meta tensors do not have
        return rows
    shares = [_shares(rows, kernels(recording, execution)) for execution in ("eager", "ideal")]
    found = []
    for row, *share in zip(rows, *shares, strict=True):
        eager, ideal = (count(some, ceilings) for some in share)
        flops = eager.flops if row.operation == "host" else row.flops
        found.append(replace(row, ours=row.ours or eager, eager=eager, ideal=ideal, flops=flops))
    return found


def _shares(rows: list[Row], found: list[Kernel]) -> list[list[Kernel]]:
    """What each row has of some kernels. A kernel belongs to the layer whose path is most like its own; of several, to
    the one that the kernel before it belongs to.
    """
    paths = [row.layer.split(".") for row in rows]
    shares: list[list[Kernel]] = [[] for _ in rows]
    last = 0
    for kernel in found:
        path = kernel.path.split(".")
        alike = [_common(path, other) for other in paths]
        likely = [i for i, length in enumerate(alike) if length == max(alike)]
        last = last if last in likely else likely[0]
        shares[last].append(kernel)
    return shares


def _common(path: list[str], other: list[str]) -> int:
    """How many parts two paths begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False)))


def _host_modules(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The modules that run as the host's own, outermost blocks or single layers, each with the reason."""
    kept = {id(module): why_not(module, cls) for _, module, cls in candidates(model)}
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
        "host",
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
        stride, _, _, groups = problem.geometry
        kernel = _size(problem.kernel) + (f"/{stride[0]}" if stride != (1, 1) else "")
        groups = f" g{groups}" if groups > 1 else ""
        return f"{_size(problem.input_shape)} -> {_size(problem.output_shape)}, {kernel}{groups}"
    if problem.op == "squeeze_excite":
        return f"{problem.batch}x{problem.channels} -> {problem.hidden} -> {problem.channels}"
    return _size(problem.input_shape)


class _Recorded:
    """A unit that appends a row for what it is asked and then runs packed."""

    def __init__(self, block: str, unit: Unit, dtype: torch.dtype, rows: list[Row], counter: KernelCounter):
        self.layer = ".".join(part for part in (block, unit.path) if part)
        self.unit, self.packed, self.rows, self.counter = unit, unit.pack(dtype), rows, counter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tuned: list[bool] = []
        with tables.listening(lambda choice: tuned.append(choice.tuned)):
            y = self.packed(*args, **kwargs)
        first, *others = self._rows(args, kwargs, y, any(tuned))
        launched = self.counter.take(self.layer, first.flops)
        self.rows += [replace(first, launched=launched), *(replace(row, launched=()) for row in others)]
        return y

    def laid_out(self, x: Tensor) -> Tensor:
        return self.packed.laid_out(x)

    def beside(self, other: _Recorded, x: Tensor) -> tuple[Tensor, Tensor] | None:
        tuned: list[bool] = []
        with tables.listening(lambda choice: tuned.append(choice.tuned)):
            both = self.packed.beside(other.packed, x)
        if both is not None:
            rows = [unit._rows((x,), {}, None, any(tuned))[0] for unit in (self, other)]
            launched = self.counter.take(self.layer, sum(row.flops for row in rows))
            self.rows += [replace(rows[0], launched=launched), replace(rows[1], launched=())]
        return both

    def _rows(self, args: tuple, kwargs: dict, y: Any, tuned: bool) -> list[Row]:
        packed, norm = self.packed, None
        if isinstance(packed, PackedConvThenNorm):
            packed, norm = packed.conv, packed.norm
        if isinstance(self.unit, LinearUnit):
            features = self.unit.linear.weight.shape[0]
            shape = f"{_size(args[0].shape)} -> {features}"
            size = _tensor_bytes(*args, *self.unit.linear.parameters(), y)
            return [Row(self.layer, "linear", shape, "torch", "torch linear", "", 2 * args[0].numel() * features, size)]
        if not isinstance(packed, Packed):
            return [_host_row(self.layer, packed.norm, (args[0],), y, _norm_reason(packed.norm))]
        count = 2 if norm is not None else _OPERANDS[type(packed)]  # the host's norm stands before the residual
        problem, label = packed.explain(*args[:count])
        label += ", tuned" if tuned else ""
        selection = select(problem)
        reason = "; ".join(f"{name}: {why}" for name, why in selection.refused.items())
        row = Row(self.layer, problem.op, _shape(problem), selection.name, label, reason, problem.flops, problem.bytes)
        if norm is None:
            return [row]
        inner = y[0] if isinstance(y, tuple) else y
        return [row, _host_row(self.layer + " norm", norm, (inner,), None, _norm_reason(norm))]


def _norm_reason(norm: nn.Module) -> str:
    return f"{type(norm).__name__} depends on the image, so it cannot be folded into a convolution"
