"""One case measured: ours checked first, then all peers timed side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from regnet_fast.backends import BackendError, forced_backend, select
from regnet_fast.blocks.network import serving
from regnet_fast.inspect import runtimes
from regnet_fast.inspect.compare import edges, find_fault
from regnet_fast.inspect.timing import (
    Announce,
    Timed,
    describe,
    frozen_compilation,
    interleave,
    synchronize,
    tuned_cudnn,
)
from regnet_fast.observer import observing

from . import peers, record, spread, subjects
from .cases import Case
from .peers import OURS, Peer, Step
from .roofline.model import work
from .steps import timed_steps
from .subjects import Subject


class WrongResult(Exception):
    """A result of ours misses the rule of `regnet_fast.inspect.judging`; the message says where and by how much."""


class NothingFused(Exception):
    """All that is to be measured of ours would run the host's own forward; the message says why."""


def measure(case: Case, device: str, chosen: Sequence[Peer], rounds: int, announce: Announce) -> dict[str, Any]:
    """The record of a case, as bench/record.py keeps it. A result that is wrong is not timed, nor is the host as ours.

    Whatever a peer raises is recorded as its failure, and so is a wrong result of a runtime; whatever ours raises is
    the failure of the case.
    """
    found = record.empty_case(case)
    try:
        with torch.set_grad_enabled(case.kind == "train"), tuned_cudnn():
            _measure(case, device, chosen, rounds, announce, found)
    except WrongResult as error:
        found.update(status="wrong", reason=str(error))
    except Exception as error:  # of building or of ours: a case fails alone
        found.update(status="failed", reason=describe(error))
    return found


def _measure(
    case: Case, device: str, chosen: Sequence[Peer], rounds: int, announce: Announce, found: dict[str, Any]
) -> None:
    subject = subjects.build(case, device, announce)
    found["size"] = subject.details.get("size")
    found["details"] |= {key: value for key, value in subject.details.items() if key != "size"}
    found["work"] = _work(case, subject)
    eager = eager_results(subject)
    timed: list[tuple[Peer, Timed]] = []
    frozen: dict[str, nn.Module] = {}
    for peer in (chosen[-1], *chosen[:-1]):  # ours first: where it is wrong the others need not be compiled
        name = peers.shown_name(peer, case.kind)
        refused = _refuse(peer, subject)
        if refused:
            found["variants"][name] = {"status": "skipped", "reason": refused}
            continue
        announce(f"first result of {name}")
        try:
            one, module = peers.make(peer, subject, name)
            result, heard = _first(one, peer, subject)
            if peer.group == "runtime":
                check_runtime(result, *eager["__call__"])
            elif peer.group == "ours":
                served = _served(one, module, subject, heard)
                if peer.name == OURS:
                    found["details"]["auto"] = served
                check(one, module, subject, result, eager)
                if subject.training:
                    with one.around():
                        check_gradients(one.name, subject)
        except BackendError as error:
            status = "skipped" if case.kind == "ops" else "failed"  # another operation may be what it is for
            found["variants"][name] = {"status": status, "reason": describe(error)}
            continue
        except NothingFused as error:
            status = "skipped" if peer.backend == "auto" else "failed"
            found["variants"][name] = {"status": status, "reason": str(error)}
            continue
        except Exception as error:
            if peer.name == OURS or (peer.group == "ours" and isinstance(error, WrongResult)):
                raise
            found["variants"][name] = {"status": "failed", "reason": describe(error)}
            if subject.device == "cuda":
                torch.cuda.empty_cache()
            continue
        timed.append((peer, one))
        if peer.frozen:
            frozen[name] = module
    timed = [*timed[1:], timed[0]] if timed and timed[0][0].name == OURS else timed
    interleave([one for _, one in timed], rounds, announce)
    variants = found["variants"]
    variants |= {one.name: _result(one, peer, subject) for peer, one in timed}
    for name, module in frozen.items():
        if (program := serving(module)) is not None:
            announce(f"steps of {name}")
            variants[name]["steps"] = timed_steps(program, *subject.inputs, rounds)
    for peer, one in timed:
        if peer.name == OURS:
            found["ratios"] = spread.ratios(variants, one.name)
        elif peer.group == "ours":
            variants[one.name]["ratios"] = spread.ratios(variants, one.name)
    found["status"] = "timed"


def _refuse(peer: Peer, subject: Subject) -> str | None:
    """Why a peer cannot run here, or must not beside others in one process; or nothing."""
    if peer.group == "runtime":
        return runtimes.refuse(peer.name, subject.inputs[0].dtype)
    return _corrupts_in_channels_last(subject) if peer.channels_last and peer.group != "ours" else ""


def _corrupts_in_channels_last(subject: Subject) -> str:
    """Why the host must not train in channels_last beside others in one process, or ''."""
    strided = (c for c in subject.base.modules() if isinstance(c, nn.Conv2d) and c.kernel_size == (1, 1) < c.stride)
    if subject.training and subject.device == "cpu" and any(conv.in_channels == 3 for conv in strided):
        return "oneDNN writes beyond its memory in the backward pass of the strided 1x1 stem (docs/training.md)"
    return ""


def _first(one: Timed, peer: Peer, subject: Subject) -> tuple[Any, list[str | None]]:
    """The first result, timed with all that is packed or compiled for it; why each block ran the host's, or None."""
    heard: dict[int, str | None] = {}  # by block, which may run several times for parts of a batch
    compiling = frozen_compilation(peer.channels_last and subject.device == "cuda")
    with compiling if peer.compile else nullcontext(), one.around():
        start = time.perf_counter()
        with observing(block=lambda block, x, plan, reason: heard.update({id(block): reason})):
            result = one.call()
        synchronize(subject.device)
        one.first_seconds = time.perf_counter() - start
    return result, list(heard.values())


def _served(one: Timed, module: nn.Module, subject: Subject, heard: list[str | None]) -> str:
    """What served ours, in words. Raises NothingFused where it was the host's own forward, or plain torch unasked."""
    if hasattr(module, "explain"):
        with one.around():
            problem, label = module.explain(*subject.inputs)
            backend = select(problem).name
            if backend == "reference" and forced_backend() is None:
                raise NothingFused(f"no backend but the reference serves it: {select(problem).refused}")
        return f"{backend}: {label}"
    reasons = sorted({reason for reason in heard if reason is not None})
    fused = heard.count(None)
    if not fused:
        raise NothingFused(f"runs the host's own forward: {'; '.join(reasons) or 'no block of ours in it'}")
    return f"{fused} of {len(heard)} blocks fused" + (f"; {'; '.join(reasons)}" if reasons else "")


def eager_results(subject: Subject) -> dict[str, tuple[Tensor, Tensor]]:
    """By checked method: the host's result in channels_last, and in float64 for the first and the last image."""
    module = copy.deepcopy(subject.base).to(memory_format=torch.channels_last)
    reference = copy.deepcopy(subject.base).double()
    inputs = tuple(_channels_last(t) for t in subject.inputs)
    few = tuple(t[edges(subject.images)].double() for t in subject.inputs)
    return {what: (getattr(module, what)(*inputs), getattr(reference, what)(*few)) for what in subject.checked}


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def check(
    one: Timed, module: nn.Module, subject: Subject, result: Tensor, eager: dict[str, tuple[Tensor, Tensor]]
) -> None:
    for what, (expected, reference) in eager.items():
        with one.around():
            ours = result if what == "__call__" else getattr(module, what)(*subject.inputs)
        fault = find_fault({"__call__": "output"}.get(what, what), ours, expected, reference)
        if fault:
            raise WrongResult(f"{one.name}: {fault}")


def check_runtime(result: Tensor, eager: Tensor, reference: Tensor) -> None:
    fault = find_fault("output", result.to(eager.dtype), eager, reference, runtimes.ERROR_RATIO)
    if fault:
        raise WrongResult(fault)


def check_gradients(name: str, subject: Subject, images: int = 4) -> None:
    """Raise WrongResult unless our gradients of a step on a few images are as close to float64's as eager's, in the RMS
    over parameters of the relative error, times two.

    Eager is the host in the layout that is further off: on a CPU its statistics in channels_last, which ours are too,
    lose two digits, and then some values change their side of a ReLU. A gradient that is zero but for rounding, such as
    that of a shift before a norm, counts relative to the others.
    """

    def gradients(
        module: nn.Module, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
    ) -> list[Tensor]:
        torch.manual_seed(0)
        module = module.to(memory_format=layout)
        x, target = (t[:images] for t in subject.inputs)
        x = x.contiguous(memory_format=layout)
        autocast = subject.autocast if dtype == torch.float32 else None
        with torch.autocast(subject.device, autocast, enabled=autocast is not None):
            loss = nn.functional.cross_entropy(module(x.to(dtype)), target)
        loss.backward()
        return [p.grad.double() for p in module.parameters()]

    def error(found: list[Tensor]) -> float:
        shares = (float((a - b).square().mean()) / max(s, least) for a, b, s in zip(found, exact, sizes, strict=True))
        return statistics.fmean(shares) ** 0.5

    exact = gradients(copy.deepcopy(subject.base).double(), torch.float64)
    sizes = [float(b.square().mean()) for b in exact]
    least = 1e-6 * statistics.median(sizes)
    layouts = [torch.contiguous_format] + ([] if _corrupts_in_channels_last(subject) else [torch.channels_last])
    eager = max(error(gradients(copy.deepcopy(subject.base), torch.float32, layout)) for layout in layouts)
    ours = error(gradients(subject.fuse(copy.deepcopy(subject.base)), torch.float32))
    if not ours <= 2 * eager:
        raise WrongResult(f"{name}: gradients are {ours:.1e} from float64, eager's {eager:.1e}")


def _work(case: Case, subject: Subject) -> dict[str, Any]:
    dtype = subject.autocast or subject.inputs[0].dtype
    return work(subject.base, tuple(subject.inputs[0].shape), dtype, train=subject.training)


def _result(one: Timed, peer: Peer, subject: Subject) -> dict[str, Any]:
    found = {"status": "timed", "group": peer.group, **one.as_dict(subject.images), "kernels": _kernels(one)}
    found["samples_ms"] = [one.samples]  # of this process
    if peer.group == "runtime":
        found["settings"] = one.call.settings
    return {**found, **_phases(one)} if subject.training else found


def _kernels(one: Timed) -> int | None:
    """GPU kernels of one call; None on a CPU."""
    if one.device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found, one.around():
        one.call()
        torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if not event.key.startswith(("Memcpy", "Memset", "cuda")))


def _phases(one: Timed, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of forward and of backward, medians of their own rounds."""
    step: Step = one.call
    spent: dict[str, list[float]] = {"forward_ms": [], "backward_ms": []}
    for _ in range(rounds):
        marks = [_now(one.device)]
        loss = step.forward()
        marks.append(_now(one.device))
        loss.backward()
        marks.append(_now(one.device))
        step.optimizer.step()
        for key, begin, end in zip(spent, marks, marks[1:], strict=False):
            spent[key].append(1e3 * (end - begin))
    return {key: statistics.median(values) for key, values in spent.items()}


def _now(device: str) -> float:
    synchronize(device)
    return time.perf_counter()
