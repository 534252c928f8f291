"""What runs for each layer of a model, on which backend, and why not otherwise: in evaluation or in a training step."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends import ConvProblem, Problem, forced_backend, onednn, select
from ..backends.passes import describe
from ..blocks.fused import Freezable, Fused, Plan, freeze
from ..blocks.network import Network, may_be_program
from ..blocks.training import compute_dtype
from ..blocks.units import Bordered, ChannelConvUnit, HostNormUnit, LinearUnit, PackedConvThenNorm, PackedUnit, Unit
from ..hosts.registry import candidates
from ..models import why_not
from ..observer import observing
from ..ops.join import PackedJoin
from ..ops.norm_act import PackedNormAct
from ..ops.packed import Packed
from ..ops.squeeze_excite import PackedSqueezeExcite
from ..trials import cpu
from ..trials.serving import serving, why
from .counting import Kernel, KernelCounter

_TORCH = "torch", "torch", "too little to have a kernel of its own"
_OPERANDS = {PackedUnit: 3, PackedJoin: 3, PackedNormAct: 2, PackedSqueezeExcite: 1}
"""How many operands a problem is posed by: x, gate and residual; x and gate; means."""

_SILENT = (nn.Identity, nn.Dropout, nn.Flatten)


@dataclass(frozen=True)
class Row:
    """One layer: what it computes, what computes it, why nothing else does, and what that takes.

    A stage may take a large batch in parts, on a CPU: `shape` is then that of a part and `times` says how many there
    were; the counts are of all of them.

    Where `operation` is "host", the host's own module runs and `reason` says why. `flops` counts two per
    multiply-accumulate. `launches` are the kernels that ran for the layer, as `counting` counts them; what runs inside
    another layer's kernel, or a norm inside a unit, stands with that. `bytes` is what they move.

    In a training step a fused layer is a block and `operation` its class; `label` says what computes it, `backward`
    what computes its gradient ("" where none is asked for), and nothing is counted.
    """

    layer: str
    operation: str
    shape: str
    backend: str
    label: str
    reason: str
    flops: int = 0
    launches: tuple[Kernel, ...] = ()
    backward: str = ""
    times: int = 1

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.launches)


def explain(
    model: nn.Module, input_size: tuple[int, int, int, int] = (1, 3, 224, 224), train: bool = False
) -> list[Row]:
    """Run a model once on random data and report every layer in the order of execution.

    Args:
        model: any module. Outside the families that are known here every layer is the host's own.
        input_size: (N, C, H, W) of the input, in the model's own dtype and on its device.
        train: a training step, forward and backward of `model(x).square().mean()`, instead of evaluation. A model that
            is in training mode keeps the modes of its modules, such as norms that are left in evaluation.

    In evaluation the kernels of Triton and csrc/ are left out where they would be launched, since only the sizes of
    what they compute matter here. A training step runs whole, on copies of parameters and buffers.

    Parameters, buffers, gradients, modes, the promise of `freeze` and the state of random numbers are as before, but
    hooks are called. Raises what the model itself raises for such an input.
    """
    first = next(model.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    inference = torch.is_inference_mode_enabled() and not train
    with (
        torch.random.fork_rng([first.device] if first.is_cuda else []),
        _mode(model, train),
        torch.inference_mode(inference),
    ):
        x = torch.rand(input_size, dtype=first.dtype, device=first.device)
        return _training(model, x) if train else _evaluation(model, x)


@contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    """The model in training or in evaluation, and afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [module for module, _ in modes if isinstance(module, Freezable) and module.is_frozen]
    try:
        if not (train and model.training):
            model.train(train)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module in frozen:
            freeze(module)


@contextmanager
def _hearing_host(
    model: nn.Module, train: bool, rows: list[Row], counter: KernelCounter, taken: Container[nn.Module] = ()
) -> Iterator[None]:
    """A row for each of the host's own modules that runs inside the `with` block and is not `taken` into another."""
    hooks = []
    for path, module, reason in _host_modules(model, train, taken):
        counted = not train and not any(isinstance(inner, Fused) for inner in module.modules())

        def enter(*_: Any, counted: bool = counted) -> None:
            if counted:
                counter.take()
                counter.__enter__()

        def leave(module: nn.Module, inputs: tuple, output: Any, path=path, reason=reason, counted=counted) -> None:
            if counted:
                counter.__exit__(None, None, None)
            row = _host_row(path, module, inputs, output, reason, counter.take(path) if counted else ())
            asked = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(output))
            rows.append(replace(row, backward="torch autograd") if asked else row)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _host_modules(model: nn.Module, train: bool, taken: Container[nn.Module]) -> list[tuple[str, nn.Module, str]]:
    """The modules that run as the host's own, outermost blocks or single layers, each with the reason; none of those
    that are `taken` into a block.
    """
    kept = {id(module): why_not(module, cls) for _, module, cls in candidates(model)}
    by_reference = train and forced_backend() == "reference"
    networks = [module for module in model.modules() if isinstance(module, Network)]
    loose = {layer for network in networks for layer in network.could_take_in()}
    found = []

    def walk(path: str, module: nn.Module) -> None:
        if isinstance(module, Fused):
            if by_reference:
                found.append((path, module, "the reference of a training step is the host's own forward"))
            elif train and not module.trains:
                found.append((path, module, f"{module.host.__name__} has no fused form in training mode"))
        elif id(module) in kept:
            found.append((path, module, kept[id(module)] or "not rebuilt yet: call regnet_fast.rebuild(model)"))
        elif module._parameters or not module._modules:  # a norm may have its activation for a child
            if not isinstance(module, _SILENT) and module not in taken:
                known = "; on a CPU it may be a step of the network's program" if module in loose else ""
                found.append((path, module, f"{type(module).__name__} is no part of a fused block{known}"))
        else:
            for name, child in module.named_children():
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def _host_row(
    path: str, module: nn.Module, inputs: tuple, output: Any, reason: str, launches: tuple[Kernel, ...] = ()
) -> Row:
    shape = " -> ".join(_size(t.shape) for t in (*inputs, output) if isinstance(t, Tensor))
    flops = sum(kernel.flops for kernel in launches)
    return Row(path, "host", shape, "host", type(module).__name__, reason, flops, launches)


def _size(shape: torch.Size | tuple) -> str:
    return "x".join(map(str, shape))


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in model.named_modules()}


# A training step


def _training(model: nn.Module, x: Tensor) -> list[Row]:
    rows: list[Row] = []
    paths = _paths(model)

    def hear_block(block: Fused, x: Tensor, plan: None, reason: str | None) -> None:
        path = paths.get(id(block), "")
        asked = x.requires_grad or any(p.requires_grad for p in block.parameters())
        if reason is not None:
            row = _host_row(path, block, (x,), None, reason)
            rows.append(replace(row, backward="torch autograd") if asked else row)
            return
        grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in block.modules())
        tried = block.tried(x)
        served = describe(x.to(compute_dtype(x)), grouped, tried and tried.names)
        backward = served.backward if asked else ""
        kind = block.host.__name__
        reason = tried.reason if tried else served.reason
        rows.append(Row(path, kind, _size(x.shape), served.backend, served.forward, reason, backward=backward))

    state = {name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    state |= {name: t.detach().clone() for name, t in model.named_buffers()}
    with torch.enable_grad(), _hearing_host(model, True, rows, KernelCounter()):
        with observing(block=hear_block):
            y = torch.func.functional_call(model, state, (x,))
        results = [t for t in tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
        if results:
            torch.stack([t.float().square().mean() for t in results]).sum().backward()
    return rows


# Evaluation


def _evaluation(model: nn.Module, x: Tensor) -> list[Row]:
    rows: list[Row] = []
    paths = _paths(model)
    counter = KernelCounter()

    def hear_block(block: Fused, x: Tensor, plan: Plan | None, reason: str | None) -> None:
        path = paths.get(id(block))
        if path is None:  # a block around layers that stand elsewhere
            path = paths.get(id(next(block.children())), "").rpartition(".")[0]
        if reason is not None:
            counter.take()
            with observing(block=lambda *_: None), counter:
                y = block.host.forward(block, x)
            rows.append(_host_row(path, block, (x,), y, reason, counter.take(path)))
            return
        start, stage = len(rows), plan.stage if forced_backend() == "native" else None
        form = plan.unbound.bind(lambda unit: _Recorded(path, unit, x.dtype, rows, counter))
        block._run(form, x)  # which packs the weights
        del rows[start:]
        counter.take()
        with counter:
            block._run(form, x)
        if rows[start:]:  # a pooling head without a classifier has no row of its own
            last = rows[-1]
            rows[-1] = replace(last, launches=last.launches + counter.take(last.layer, 0))
        if stage is not None:
            words = "a step of the stage's program"
            reason = "; ".join(filter(None, (words, cpu.why(stage))))
            rows[start:] = [replace(row, reason=reason) if row.backend == "native" else row for row in rows[start:]]

    events = observing(block=hear_block, launch=counter.hear)
    hearing = _hearing_host(model, False, rows, counter, _taken(model, x))
    with torch.no_grad(), events, hearing:
        model(x)
    return _summed(rows)


def _taken(model: nn.Module, x: Tensor) -> set[nn.Module]:
    """The layers in whose place networks call blocks of their own, as none does where somebody listens to a layer."""
    networks = [module for module in model.modules() if isinstance(module, Network)]
    if may_be_program(x) or not any(True for network in networks for _ in network.could_take_in()):
        return set()
    called = set()
    with torch.no_grad(), observing(block=lambda block, *_: called.add(block), launch=lambda *_: False):
        model(x)
    pieces = [piece for network in networks for piece in network.pieces() if piece in called]
    model.eval()  # the next call is a first one again, in which nothing is tried
    return {layer for piece in pieces for layer in piece.modules()}


def _summed(rows: list[Row]) -> list[Row]:
    """One row for the same layer on every part of a batch of the same size."""
    found: dict[Row, list[Row]] = {}
    for row in rows:
        found.setdefault(replace(row, launches=()), []).append(row)
    return [
        replace(
            row,
            times=len(same),
            flops=sum(one.flops for one in same),
            launches=tuple(kernel for one in same for kernel in one.launches),
        )
        for row, same in found.items()
    ]


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
        y, tuned = self._run(self.packed, *args, **kwargs)
        first, *others = self._rows(args, kwargs, y, tuned)
        self.rows += [replace(first, launches=self.counter.take(self.layer, first.flops)), *others]
        return y

    def laid_out(self, x: Tensor) -> Tensor:
        return self.packed.laid_out(x)

    def beside(self, other: _Recorded, x: Tensor) -> tuple[Tensor, Tensor] | None:
        both, tuned = self._run(self.packed.beside, other.packed, x)
        if both is not None:
            first, second = (unit._rows((x,), {}, None, tuned)[0] for unit in (self, other))
            launches = self.counter.take(self.layer, first.flops + second.flops)
            self.rows += [replace(first, launches=launches), second]
        return both

    def ahead(self, second: _Recorded, x: Tensor, means: bool) -> tuple[Tensor, Tensor | None] | None:
        both = self.packed.ahead(second.packed, x, means)
        if both is not None:
            problem, label = self.packed.both.explain(x, means)
            rows = [
                Row(one.layer, of.op, _shape(of), "cuda", label, why(problem), of.flops)
                for one, of in zip((self, second), problem.both, strict=True)
            ]
            launches = self.counter.take(self.layer, problem.flops)
            self.rows += [replace(rows[0], launches=launches), rows[1]]
        return both

    @staticmethod
    def _run(call: Callable, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """The result, and whether a table chose how it was computed."""
        tuned: list[bool] = []
        with observing(choice=lambda choice: tuned.append(choice.tuned)):
            return call(*args, **kwargs), any(tuned)

    def _rows(self, args: tuple, kwargs: dict, y: Any, tuned: bool) -> list[Row]:
        packed, norm = self.packed, None
        if isinstance(packed, Bordered):
            packed, args = packed.conv, (packed.unit.bordered(args[0]), *args[1:])
        if isinstance(packed, PackedConvThenNorm):
            packed, norm = packed.conv, packed.norm
        if isinstance(self.unit, LinearUnit):
            features = self.unit.linear.weight.shape[0]
            shape = f"{_size(args[0].shape)} -> {features}"
            return [Row(self.layer, "linear", shape, "torch", "torch linear", "", 2 * args[0].numel() * features)]
        if isinstance(self.unit, ChannelConvUnit):
            (n, channels), size = args[0].shape[:: args[0].dim() - 1], self.unit.conv.weight.shape[2]
            return [Row(self.layer, "channel_conv", f"{n}x{channels}, {size}", *_TORCH, 2 * n * channels * size)]
        if isinstance(self.unit, HostNormUnit):
            return [_host_row(self.layer, packed.norm, (args[0],), y, _norm_reason(packed.norm))]
        if not isinstance(packed, Packed):
            return [Row(self.layer, type(self.unit).__name__.removesuffix("Unit").lower(), _size(y.shape), *_TORCH, 0)]
        count = 2 if norm is not None else _OPERANDS[type(packed)]  # the host's norm stands before the residual
        operands = args[:count]
        if norm is None and kwargs.get("means"):
            operands = (*(*args, None, None)[:3], True)
        problem, label = packed.explain(*operands)
        label += ", tuned" if tuned else ""
        selection, by = select(problem), serving(problem)
        reasons = [f"{name}: {it}" for name, it in selection.refused.items() if by.name == selection.name]
        reasons.append(cpu.why(problem) if by.module is onednn else why(problem))
        reason = "; ".join(filter(None, reasons))
        row = Row(self.layer, problem.op, _shape(problem), by.name, label, reason, problem.flops)
        if norm is None:
            return [row]
        inner = y[0] if isinstance(y, tuple) else y
        return [row, _host_row(self.layer + " norm", norm, (inner,), None, _norm_reason(norm))]


def _norm_reason(norm: nn.Module) -> str:
    return f"{type(norm).__name__} depends on the image, so it cannot be folded into a convolution"
