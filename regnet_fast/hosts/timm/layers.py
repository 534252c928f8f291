"""timm's layers as units: convolutions, norms with their activations, squeeze-excite, shortcuts, pooling.

Each function raises `Refused` for what has no fused form.
"""

from __future__ import annotations

from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    DropPath,
    EcaModule,
    FrozenBatchNormAct2d,
    SelectAdaptivePool2d,
    SEModule,
    StdConv2d,
    SyncBatchNormAct,
)
from timm.layers import ConvNormAct as TimmConvNormAct
from timm.layers.activations import GELU, GELUTanh, HardSigmoid, HardSwish, Sigmoid, Swish
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.drop import DropBlock2d
from timm.models import byobnet, resnetv2
from torch import nn

from ...blocks.units import (
    BorderedConvUnit,
    ChannelConvUnit,
    ConvUnit,
    HostNormUnit,
    NormActUnit,
    Refused,
    SqueezeExciteUnit,
)
from .. import modules

ACTIVATIONS = {
    Swish: "silu",
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    HardSwish: "hardswish",
    HardSigmoid: "hardsigmoid",
    Sigmoid: "sigmoid",
}
CONVS = (nn.Conv2d, StdConv2d, Conv2dSame)
_FORWARD_INTERMEDIATES = resnetv2.ResNetV2.forward_intermediates.__code__
NORM_ACTS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
BATCH_NORMS = (*NORM_ACTS, *modules.BATCH_NORMS)
INERT_IN_EVALUATION = (nn.Identity, nn.Dropout, DropPath, DropBlock2d)


def activation(path: str, module: nn.Module) -> str:
    """The name of an activation."""
    return modules.activation(path, module, ACTIVATIONS)


def is_activation(module: nn.Module) -> bool:
    """Whether a layer is of a class that `activation` knows."""
    return type(module) in ACTIVATIONS or type(module) in modules.ACTIVATIONS


def check_inert(path: str, module: nn.Module | None) -> None:
    """Refuse a module that does something in evaluation, or is in training mode."""
    if module is not None and (
        type(module) not in INERT_IN_EVALUATION or (module.training and type(module) is not nn.Identity)
    ):
        raise Refused(f"{path} is an active {type(module).__name__}")


def drop_path(module: nn.Module | None) -> DropPath | None:
    """A block's stochastic depth, None where it has none. Raises `Refused` for any other module."""
    if module is None or type(module) is nn.Identity:
        return None
    if type(module) is not DropPath:
        raise Refused(f"drop_path is {type(module).__name__}, which has no fused form")
    return module


def norm_activation(path: str, norm: nn.Module) -> str:
    """The activation that a BatchNorm module carries. Raises `Refused` where it does anything else."""
    if not isinstance(norm, NORM_ACTS):  # torch's conversion to SyncBatchNorm keeps an `act` that is never applied
        return "none"
    optional = isinstance(norm, SyncBatchNormAct)  # whose forward leaves out what is not there
    if not optional or hasattr(norm, "drop"):
        check_inert(f"{path}.drop", norm.drop)
    return activation(f"{path}.act", norm.act) if not optional or hasattr(norm, "act") else "none"


def standardization(path: str, conv: nn.Module) -> float | None:
    """The epsilon of weight standardisation, None for a plain convolution. Raises `Refused` for any other layer."""
    modules.check_conv(path, conv, CONVS)
    return conv.eps if type(conv) is StdConv2d else None


def conv_norm(conv_path: str, conv: nn.Module, norm_path: str, norm: nn.Module | None, after: str = "none") -> ConvUnit:
    """A convolution and the norm after it; `after` is the activation behind the block's sum."""
    kind = BorderedConvUnit if type(conv) is Conv2dSame else ConvUnit
    unit = kind(conv_path, conv, standardize=standardization(conv_path, conv), activation=after)
    if norm is None:
        return unit
    if not modules.folds(norm, BATCH_NORMS):
        unit.then = norm
        return unit
    activation = norm_activation(norm_path, norm)
    if activation != "none":
        if after != "none":
            raise Refused(f"{norm_path} has an activation of its own before the block's sum")
        unit.activation = activation
    unit.norm, unit.norm_path = norm, norm_path
    return unit


def conv_norm_act(path: str, module: nn.Module, after: str = "none") -> ConvUnit:
    """timm's ConvNormAct as a unit."""
    if TimmConvNormAct not in (type(module), getattr(type(module), "host", None)):
        raise Refused(f"{path} is {type(module).__name__}, not ConvNormAct")
    if getattr(module, "aa", None) is not None:
        raise Refused(f"{path} is anti-aliased")
    dot = f"{path}." if path else ""
    if type(module.bn) is nn.Sequential:
        if len(module.bn):
            raise Refused(f"{dot}bn is not a norm")
        return conv_norm(f"{dot}conv", module.conv, f"{dot}bn", None, after)
    return conv_norm(f"{dot}conv", module.conv, f"{dot}bn", module.bn, after)


def norm_act(path: str, norm: nn.Module) -> NormActUnit | HostNormUnit:
    """A norm and activation that no convolution precedes."""
    if not modules.folds(norm, BATCH_NORMS):
        return HostNormUnit(path, norm)
    return NormActUnit(path, norm, norm_activation(path, norm))


def attention(path: str, module: nn.Module) -> SqueezeExciteUnit | ChannelConvUnit | None:
    """timm's SEModule or EcaModule as a unit, None where there is none."""
    return _channel_conv(path, module) if type(module) is EcaModule else squeeze_excite(path, module)


def _channel_conv(path: str, module: EcaModule) -> ChannelConvUnit:
    conv = module.conv
    if module.conv2 is not None or type(conv) is not nn.Conv1d or conv.bias is not None:
        raise Refused(f"{path} is more than one plain convolution along the channels")
    if (conv.stride, conv.dilation, conv.padding_mode) != ((1,), (1,), "zeros"):
        raise Refused(f"{path} has a convolution with a stride, a dilation or another border")
    return ChannelConvUnit(path, conv, activation(f"{path}.gate", module.gate))


def squeeze_excite(path: str, module: nn.Module) -> SqueezeExciteUnit | None:
    """timm's SEModule as a unit, None where there is none."""
    if type(module) is nn.Identity:
        return None
    if type(module) is not SEModule:
        raise Refused(f"{path} is {type(module).__name__}, not SEModule")
    if module.add_maxpool or type(module.bn) is not nn.Identity:
        raise Refused(f"{path} has a max pool or a norm")
    modules.check_excite(path, module.fc1, module.fc2)
    between, gate = activation(f"{path}.act", module.act), activation(f"{path}.gate", module.gate)
    return SqueezeExciteUnit(path, module.fc1, module.fc2, between, gate)


def shortcut(path: str, module: nn.Module | None, norm: bool) -> dict:
    """The fields `shortcut`, `pool` and `identity` of a form, from timm's shortcut module."""
    if module is None:
        return {"identity": False}
    if type(module) is nn.Identity:
        return {"identity": True}
    pool, conv_path = None, path
    if type(module) is nn.Sequential and len(module) == 2:
        pool, conv_path, module = module[0], f"{path}.1", module[1]
    elif type(module) in (byobnet.DownsampleAvg, resnetv2.DownsampleAvg, resnetv2.DownsampleConv):
        if type(getattr(module, "norm", None)) not in (type(None), nn.Identity):
            raise Refused(f"{path} has a norm of its own")
        pool, conv_path, module = getattr(module, "pool", None), f"{path}.conv", module.conv
    pool = None if type(pool) is nn.Identity else pool
    if norm:
        return {"shortcut": conv_norm_act(conv_path, module), "pool": pool, "identity": False}
    return {"shortcut": conv_norm(conv_path, module, "", None), "pool": pool, "identity": False}


def has_parameters(module: nn.Module) -> bool:
    """Whether there is any parameter in a module."""
    return next(module.parameters(), None) is not None


def flattens(path: str, module: nn.Module) -> bool:
    """Whether a layer flattens all but the first dimension; or it does nothing. Raises `Refused` for any other."""
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return True
    if type(module) is not nn.Identity:
        raise Refused(f"{path} is {modules.class_name(module)}, which has no fused form")
    return False


def check_means(path: str, pool: nn.Module) -> bool:
    """Refuse any pooling but global averages of an NCHW map; whether the result has two dimensions."""
    if type(pool) is not SelectAdaptivePool2d:
        raise Refused(f"{path} is {modules.class_name(pool)}, not SelectAdaptivePool2d")
    inner = pool.pool
    if type(inner) is FastAdaptiveAvgPool and tuple(inner.dim) == (2, 3):
        flat = inner.flatten
    elif type(inner) is nn.AdaptiveAvgPool2d and inner.output_size in (1, (1, 1)):
        flat = False
    else:
        raise Refused(f"{path}.pool is {inner}, not a global average")
    return flattens(f"{path}.flatten", pool.flatten) or flat
