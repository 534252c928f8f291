"""What a case computes: the host's module with random weights, its inputs, and how ours is made of a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm.utils
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regnet_fast
from regnet_fast import functional
from regnet_fast.backends import Problem
from regnet_fast.inspect.timing import Announce
from regnet_fast.inspect.verify import DTYPES, host_model, input_size, randomize_norms
from regnet_fast.models import rebuild
from regnet_fast.ops.squeeze_excite import PackedSqueezeExcite

from .cases import Case

_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu_, "silu": lambda x: F.silu(x, inplace=True)}


@dataclass
class Subject:
    """A module of the host's on its device and in its dtype, in NCHW, and its inputs.

    `fuse` makes ours of a copy. `checked` are the methods whose results are held to float64. In `training` the module
    is in float32 and runs under autocast to `autocast`, where that is another dtype. The calls take turns on so many
    `copies` of the inputs. `inner` says that these are maps from the inside of a network, where ours are channels_last.
    """

    base: nn.Module
    inputs: tuple[Tensor, ...]
    fuse: Callable[[nn.Module], nn.Module]
    checked: tuple[str, ...] = ("__call__",)
    training: bool = False
    autocast: torch.dtype | None = None
    copies: int = 1
    inner: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def device(self) -> str:
        return self.inputs[0].device.type


class HostConv(nn.Module):
    """A convolution as torch computes it: its own call, then the residual, then the activation in place."""

    def __init__(self, details: dict[str, Any]):
        super().__init__()
        kernel, dilation = details["kernel"], details["dilation"]
        padding = dilation * (kernel // 2)
        shape = (details["in"], details["out"], kernel, details["stride"], padding, dilation, details["groups"])
        self.conv = nn.Conv2d(*shape, bias=True)
        self.op, self.activation = details["op"], details["activation"]

    def forward(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.activation](self.conv(x))


class FusedConv(nn.Module):
    """The same by the operation of `regnet_fast.functional`, with packed weights."""

    def __init__(self, host: HostConv):
        super().__init__()
        conv = host.conv
        self.call = getattr(functional, host.op)
        self.packed = functional.pack_conv(
            conv.weight,
            conv.bias,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            activation=host.activation,
            op=host.op,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.packed)

    def explain(self, x: Tensor) -> tuple[Problem, str]:
        return self.packed.here(x).explain(x)


class HostSqueezeExcite(nn.Module):
    """The gate from the channel means as torch computes it."""

    def __init__(self, details: dict[str, Any]):
        super().__init__()
        self.fc1 = nn.Linear(details["in"], details["out"])
        self.fc2 = nn.Linear(details["out"], details["in"])
        self.activation = details["activation"]

    def forward(self, means: Tensor) -> Tensor:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(means))).sigmoid()


class FusedSqueezeExcite(nn.Module):
    """The same with packed weights, as the blocks call it."""

    def __init__(self, host: HostSqueezeExcite):
        super().__init__()
        weights = (host.fc1.weight, host.fc1.bias, host.fc2.weight, host.fc2.bias)
        self.packed = PackedSqueezeExcite(*weights, host.activation)

    def forward(self, means: Tensor) -> Tensor:
        return self.packed(means)

    def explain(self, means: Tensor) -> tuple[Problem, str]:
        return self.packed.explain(means)


def build(case: Case, device: str, announce: Announce) -> Subject:
    """The subject of a case. Raises what building the host's module raises."""
    announce("building")
    torch.manual_seed(0)
    make = {"ops": _operation, "blocks": _block, "models": _model, "train": _training}[case.kind]
    return make(case, device)


def _copies(x: Tensor) -> int:
    """How many copies of an operation's input a GPU's cache does not hold; on a CPU the input is hot, as in a model."""
    if not x.is_cuda:
        return 1
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    return min(64, 1 + 2 * cache // (x.numel() * x.element_size()))


def scaled(hw: int, size: int | None) -> int:
    """An operation's output size where the model's image has another size than 224."""
    return hw if size is None else max(1, hw * size // 224)


def _operation(case: Case, device: str) -> Subject:
    details, dtype = case.details, DTYPES[case.dtype]
    if details["op"] == "squeeze_excite":
        means = torch.rand(case.batch, details["in"], device=device)
        return Subject(HostSqueezeExcite(details).to(device).requires_grad_(False), (means,), FusedSqueezeExcite)
    hw = scaled(details["hw"], case.size) * details["stride"]
    x = torch.randn(case.batch, details["in"], hw, hw).to(device, dtype)
    base = HostConv(details).to(device, dtype).requires_grad_(False)
    return Subject(base, (x,), FusedConv, copies=_copies(x), inner=details["in"] > 3)


def _host(case: Case, name: str) -> nn.Module:
    return timm.utils.reparameterize_model(randomize_norms(host_model(name), 0), inplace=True)


def _block(case: Case, device: str) -> Subject:
    """A block of a model on random input. The input's shape is the one that the model gives it."""
    network = _host(case, case.details["model"])
    block = network.get_submodule(case.details["path"])
    seen = []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        copy.deepcopy(network).to("meta")(torch.empty(1, *input_size(network, case.size), device="meta"))
    hook.remove()
    shape = (case.batch, *seen[0][1:])
    x = torch.randn(shape).to(device, DTYPES[case.dtype])
    base = block.to(device, x.dtype)
    fuse, details = (lambda module: regnet_fast.rebuild(module).model), {"input": list(shape)}
    return Subject(base, (x,), fuse, inner=shape[1] > 3, details=details)


def _model(case: Case, device: str) -> Subject:
    base = _host(case, case.name).to(device, DTYPES[case.dtype])
    x = torch.randn(case.batch, *input_size(base, case.size)).to(device, DTYPES[case.dtype])
    checked = ("forward_features", "__call__")
    return Subject(base, (x,), lambda module: rebuild(module).model, checked, details={"size": list(x.shape[2:])})


def _training(case: Case, device: str) -> Subject:
    base = randomize_norms(host_model(case.name), 0).to(device).train()
    x = torch.randn(case.batch, *input_size(base, case.size), device=device)
    target = torch.randint(base.num_classes, (case.batch,), device=device)
    autocast = None if case.dtype == "float32" else DTYPES[case.dtype]
    size = {"size": list(x.shape[2:])}
    return Subject(base, (x, target), lambda m: rebuild(m).model, (), training=True, autocast=autocast, details=size)
