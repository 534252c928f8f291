"""Modules that every host has, read as units: plain convolutions, BatchNorms, activations, squeeze-excite."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from ..blocks.units import ConvUnit, Refused, SqueezeExciteUnit


def _leaky_relu(module: nn.LeakyReLU) -> str:
    if module.negative_slope != 0.01:
        raise Refused(f"a LeakyReLU of slope {module.negative_slope} has no fused form, only one of 0.01")
    return "leaky_relu"


def _relu6(module: nn.ReLU6) -> str:
    if (module.min_val, module.max_val) != (0, 6):
        raise Refused(f"a ReLU6 from {module.min_val} to {module.max_val} has no fused form, only one from 0 to 6")
    return "relu6"


ACTIVATIONS: dict[type[nn.Module], str | Callable[[nn.Module], str]] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: _relu6,
    nn.SiLU: "silu",
    nn.LeakyReLU: _leaky_relu,
    nn.GELU: lambda module: {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate],
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
}
"""The name of each class of activations, or what reads it off a module."""
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def class_name(module: nn.Module) -> str:
    """A class with its module's name: a wrapper often has the name of the layer that it wraps."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def activation(path: str, module: nn.Module, more: dict[type[nn.Module], str] | None = None) -> str:
    """The name of an activation, of those that every host has or of `more`. Raises `Refused` for one that has no fused
    form.
    """
    name = (ACTIVATIONS | (more or {})).get(type(module))
    if name is None:
        raise Refused(f"{path} is {type(module).__name__}, which has no fused form")
    return name if isinstance(name, str) else name(module)


def check_conv(path: str, conv: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> None:
    """Refuse any other layer than a plain convolution that pads with zeros."""
    if type(conv) not in kinds:
        raise Refused(f"{path} is {class_name(conv)}, not a plain convolution")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise Refused(f"{path} pads with {conv.padding!r} in mode {conv.padding_mode!r}")
    for name in ("stride", "padding", "dilation"):
        if isinstance(getattr(conv, name), int):  # which torch takes as well
            raise Refused(f"the {name} of {path} is {getattr(conv, name)!r}, not a pair")


def folds(norm: nn.Module, kinds: tuple[type[nn.Module], ...] = BATCH_NORMS) -> bool:
    """Whether a norm is a fixed affine map in evaluation."""
    return type(norm) in kinds and norm.running_mean is not None and norm.running_var is not None


def conv_norm(conv_path: str, conv: nn.Module, norm_path: str, norm: nn.Module | None, activation: str) -> ConvUnit:
    """A plain convolution, the norm after it where there is one, and the activation behind both."""
    check_conv(conv_path, conv)
    unit = ConvUnit(conv_path, conv, activation=activation)
    if norm is not None and folds(norm):
        unit.norm, unit.norm_path = norm, norm_path
    else:
        unit.then = norm
    return unit


def squeeze_excite(path: str, fc1: nn.Module, fc2: nn.Module, gate: nn.Module, between: str) -> SqueezeExciteUnit:
    """Two 1x1 convolutions on the channel means, an activation between them, and one for the gate."""
    check_excite(path, fc1, fc2)
    return SqueezeExciteUnit(path, fc1, fc2, between, activation(f"the gate of {path}", gate))


def check_excite(path: str, fc1: nn.Module, fc2: nn.Module) -> None:
    """Refuse all but two plain 1x1 convolutions with bias."""
    if not (is_linear(fc1) and is_linear(fc2)) or fc1.bias is None or fc2.bias is None:
        raise Refused(f"{path} is not made of two plain 1x1 convolutions with bias")


def is_linear(conv: nn.Module) -> bool:
    """Whether a layer is a plain convolution that a linear layer on every pixel is."""
    return type(conv) is nn.Conv2d and (
        (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
    )
