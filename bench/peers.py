"""The ways to run a subject that a user could pick, as small records, and ours on each backend."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

import regnet_fast
from regnet_fast.inspect import runtimes
from regnet_fast.inspect.timing import Timed

from .cases import KINDS
from .subjects import Subject

OURS = "regnet_fast"
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Peer:
    """One way to run a module.

    Attributes:
        name: in tables and for `--peers`; "timm" stands for the host, which for operations is torch.
        group: "eager", "compile", "runtime" (another than torch, of this name) or "ours"; the ratios are against the
            fastest of a group.
        channels_last: the memory format of weights and input.
        compile: a mode of torch.compile.
        graph: replay a CUDA graph; ours is `regnet_fast.graphed`, which also copies inputs and results.
        backend: forced on ours.
        frozen: ours with the promise that no weight changes, which a compiled model with frozen weights takes as given.
        devices: the device types where it makes sense.
        kinds: the kinds of cases where it makes sense.
        extra: the device types where it is measured only if `--peers` names it.
    """

    name: str
    group: str
    channels_last: bool = False
    compile: str | None = None
    graph: bool = False
    backend: str = "auto"
    frozen: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    kinds: tuple[str, ...] = KINDS
    extra: tuple[str, ...] = ()


WHOLE = ("blocks", "models", "train")  # an operation is timed on rotating inputs, which a graph would not see

PEERS = (
    Peer("timm", "eager"),
    Peer("timm channels_last", "eager", channels_last=True),
    Peer("timm graph", "eager", graph=True, devices=("cuda",), kinds=WHOLE),
    Peer("timm channels_last graph", "eager", channels_last=True, graph=True, devices=("cuda",), kinds=WHOLE),
    Peer("compile", "compile", compile="default"),
    Peer("compile channels_last", "compile", channels_last=True, compile="default", extra=("cpu",)),
    Peer("compile max-autotune", "compile", compile="max-autotune", extra=("cpu", "cuda")),
    Peer("compile max-autotune channels_last", "compile", True, compile="max-autotune", extra=("cpu", "cuda")),
    *(Peer(name, "runtime", devices=("cpu",), kinds=("models",)) for name in runtimes.RUNTIMES),
    Peer("regnet_fast aten", "ours", backend="aten", extra=("cpu",)),
    Peer("regnet_fast cuda", "ours", backend="cuda", devices=("cuda",), kinds=("ops",)),
    Peer("regnet_fast triton", "ours", backend="triton", devices=("cuda",), kinds=("ops", "blocks", "models")),
    Peer("regnet_fast cuda,aten", "ours", backend="cuda,aten", devices=("cuda",), kinds=("blocks", "models")),
    Peer("regnet_fast cuda,triton", "ours", backend="cuda,triton", devices=("cuda",), kinds=("blocks", "models")),
    Peer("regnet_fast cuda,triton graph", "ours", False, None, True, "cuda,triton", True, ("cuda",), ("models",)),
    Peer("regnet_fast graph", "ours", graph=True, frozen=True, devices=("cuda",), kinds=("models",)),
    Peer("regnet_fast reference", "ours", backend="reference", extra=("cpu", "cuda")),
    Peer(f"{OURS} frozen", "ours", frozen=True, kinds=("blocks", "models")),
    Peer(f"{OURS} channels_last", "ours", channels_last=True, kinds=("train",)),
    Peer(OURS, "ours"),
)


class UnknownPeerError(ValueError):
    """No peer has such a name; the message says which there are."""


def choose(patterns: Sequence[str] | None, device: str, kind: str) -> list[Peer]:
    """The peers for a device type and a kind of cases that the patterns name, by default all but the extra ones.

    Ours is always there, and last. Raises UnknownPeerError for a pattern that names none of them.
    """
    here = [peer for peer in PEERS if device in peer.devices and kind in peer.kinds and peer.name != OURS]
    for pattern in patterns or ():
        if pattern != OURS and not fnmatch.filter([peer.name for peer in here], pattern):
            names = ", ".join(repr(peer.name) for peer in here)
            raise UnknownPeerError(f"no peer for {kind} on {device} is called {pattern!r}; there are {names}")

    def wanted(peer: Peer) -> bool:
        if patterns is None:
            return device not in peer.extra
        return any(fnmatch.fnmatch(peer.name, pattern) for pattern in patterns)

    return [*filter(wanted, here), PEERS[-1]]


def shown_name(peer: Peer, subject_kind: str) -> str:
    """The host of an operation is torch, of all else timm."""
    return peer.name.replace("timm", "torch") if subject_kind == "ops" else peer.name


class Step:
    """A training step: forward, cross entropy, backward, SGD with momentum in one fused call."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor, autocast: torch.dtype | None):
        self.model, self.x, self.target = model, x, target
        self.autocast = autocast
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, fused=True)

    def forward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None):
            return nn.functional.cross_entropy(self.model(self.x).float(), self.target)

    def __call__(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss


def make(peer: Peer, subject: Subject, name: str) -> tuple[Timed, nn.Module]:
    """The peer ready to be called, and its module. Nothing has run yet, so nothing is packed, converted or compiled."""
    if peer.group == "runtime":
        return Timed(name, runtimes.Call(peer.name, subject.base, *subject.inputs), subject.device), subject.base
    module, inputs = copy.deepcopy(subject.base), subject.inputs
    if peer.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if peer.channels_last or (subject.inner and peer.group == "ours"):
        inputs = tuple(t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in inputs)
    module = subject.fuse(module) if peer.group == "ours" else module
    module = regnet_fast.freeze(module) if peer.frozen else module
    own_graph = peer.graph and peer.group == "ours"
    module = regnet_fast.graphed(module) if own_graph else module
    runs = module if peer.compile is None else torch.compile(module, dynamic=False, mode=peer.compile)
    around = partial(regnet_fast.backend, peer.backend) if peer.group == "ours" else nullcontext
    call: Callable[[], Any] = partial(runs, *inputs)
    if subject.training:
        call = Step(runs, *inputs, subject.autocast)
    elif subject.copies > 1:
        call = _Rotating(runs, inputs, subject.copies)
    return Timed(name, _Graphed(call) if peer.graph and not own_graph else call, subject.device, around), module


class _Rotating:
    """A call on one copy of the inputs after another, so that none is found in the cache."""

    def __init__(self, call: Callable[..., Any], inputs: tuple[Tensor, ...], copies: int):
        self.call = call
        self.inputs = cycle([inputs, *(tuple(t.clone() for t in inputs) for _ in range(copies - 1))])

    def __call__(self) -> Any:
        return self.call(*next(self.inputs))


class _Graphed:
    """A call replayed from a CUDA graph, which the first call captures."""

    def __init__(self, call: Callable[[], Any]):
        self.call, self.graph, self.result = call, None, None

    def __call__(self) -> Any:
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.call()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.call()
        self.graph.replay()
        return self.result
