"""timm: which of its classes is which block.

Each class subclasses timm's own, keeps its state and its constructor, and reads itself as a form. Nothing is decided
at construction: a block is read again whenever a module, a setting or a hook below it changes.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from timm.layers import (
    BatchNormAct2d,
    DropPath,
    FrozenBatchNormAct2d,
    SelectAdaptivePool2d,
    SEModule,
    StdConv2d,
    SyncBatchNormAct,
)
from timm.layers import (
    ClassifierHead as TimmClassifierHead,
)
from timm.layers import (
    ConvNormAct as TimmConvNormAct,
)
from timm.layers.activations import GELU, GELUTanh, HardSigmoid, HardSwish, Sigmoid, Swish
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.drop import DropBlock2d
from timm.models import byobnet, register_notrace_module, regnet, resnetv2
from torch import Tensor, nn

from ..backends import native
from ..blocks import forms
from ..blocks.chain import Chain
from ..blocks.fused import PIECES, Fused
from ..blocks.network import Network
from ..blocks.units import (
    ActivationUnit,
    ConvUnit,
    GateUnit,
    HostNormUnit,
    LinearUnit,
    NormActUnit,
    Refused,
    RepVggUnit,
    SqueezeExciteUnit,
)
from ..blocks.watch import only_forwards
from . import modules

FAMILIES = ("regnetx_", "regnety_", "regnetv_", "regnetz_", "repvgg_", "resnetv2_")
"""Architectures whose models `create_model` rebuilds, by the beginning of their names."""

_ACTIVATIONS = {
    Swish: "silu",
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    HardSwish: "hardswish",
    HardSigmoid: "hardsigmoid",
    Sigmoid: "sigmoid",
}
_CONVS = (nn.Conv2d, StdConv2d)
_FORWARD_INTERMEDIATES = resnetv2.ResNetV2.forward_intermediates.__code__
_NORM_ACTS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
_BATCH_NORMS = (*_NORM_ACTS, *modules.BATCH_NORMS)
_INERT_IN_EVALUATION = (nn.Identity, nn.Dropout, DropPath, DropBlock2d)


def _activation(path: str, module: nn.Module) -> str:
    return modules.activation(path, module, _ACTIVATIONS)


def _check_inert(path: str, module: nn.Module | None) -> None:
    if module is not None and (
        type(module) not in _INERT_IN_EVALUATION or (module.training and type(module) is not nn.Identity)
    ):
        raise Refused(f"{path} is an active {type(module).__name__}")


def _drop_path(module: nn.Module | None) -> DropPath | None:
    """A block's stochastic depth, None where it has none. Raises `Refused` for any other module."""
    if module is None or type(module) is nn.Identity:
        return None
    if type(module) is not DropPath:
        raise Refused(f"drop_path is {type(module).__name__}, which has no fused form")
    return module


def _norm_activation(path: str, norm: nn.Module) -> str:
    """The activation that a BatchNorm module carries. Raises `Refused` where it does anything else."""
    if not isinstance(norm, _NORM_ACTS):  # torch's conversion to SyncBatchNorm keeps an `act` that is never applied
        return "none"
    optional = isinstance(norm, SyncBatchNormAct)  # whose forward leaves out what is not there
    if not optional or hasattr(norm, "drop"):
        _check_inert(f"{path}.drop", norm.drop)
    return _activation(f"{path}.act", norm.act) if not optional or hasattr(norm, "act") else "none"


def _conv(path: str, conv: nn.Module) -> float | None:
    """The epsilon of weight standardisation, None for a plain convolution. Raises `Refused` for any other layer."""
    modules.check_conv(path, conv, _CONVS)
    return conv.eps if type(conv) is StdConv2d else None


def _conv_norm(
    conv_path: str, conv: nn.Module, norm_path: str, norm: nn.Module | None, after: str = "none"
) -> ConvUnit:
    """A convolution and the norm after it; `after` is the activation behind the block's sum."""
    unit = ConvUnit(conv_path, conv, standardize=_conv(conv_path, conv), activation=after)
    if norm is None:
        return unit
    if not modules.folds(norm, _BATCH_NORMS):
        unit.then = norm
        return unit
    activation = _norm_activation(norm_path, norm)
    if activation != "none":
        if after != "none":
            raise Refused(f"{norm_path} has an activation of its own before the block's sum")
        unit.activation = activation
    unit.norm, unit.norm_path = norm, norm_path
    return unit


def _conv_norm_act(path: str, module: nn.Module, after: str = "none") -> ConvUnit:
    """timm's ConvNormAct as a unit."""
    if type(module) not in (TimmConvNormAct, ConvNormAct):
        raise Refused(f"{path} is {type(module).__name__}, not ConvNormAct")
    if getattr(module, "aa", None) is not None:
        raise Refused(f"{path} is anti-aliased")
    dot = f"{path}." if path else ""
    if type(module.bn) is nn.Sequential:
        if len(module.bn):
            raise Refused(f"{dot}bn is not a norm")
        return _conv_norm(f"{dot}conv", module.conv, f"{dot}bn", None, after)
    return _conv_norm(f"{dot}conv", module.conv, f"{dot}bn", module.bn, after)


def _norm(path: str, norm: nn.Module) -> NormActUnit | HostNormUnit:
    """A norm and activation that no convolution precedes."""
    if not modules.folds(norm, _BATCH_NORMS):
        return HostNormUnit(path, norm)
    return NormActUnit(path, norm, _norm_activation(path, norm))


def _squeeze_excite(path: str, module: nn.Module) -> SqueezeExciteUnit | None:
    if type(module) is nn.Identity:
        return None
    if type(module) is not SEModule:
        raise Refused(f"{path} is {type(module).__name__}, not SEModule")
    if module.add_maxpool or type(module.bn) is not nn.Identity:
        raise Refused(f"{path} has a max pool or a norm")
    modules.check_excite(path, module.fc1, module.fc2)
    between, gate = _activation(f"{path}.act", module.act), _activation(f"{path}.gate", module.gate)
    return SqueezeExciteUnit(path, module.fc1, module.fc2, between, gate)


def _shortcut(path: str, module: nn.Module | None, norm: bool) -> dict:
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
        return {"shortcut": _conv_norm_act(conv_path, module), "pool": pool, "identity": False}
    return {"shortcut": _conv_norm(conv_path, module, "", None), "pool": pool, "identity": False}


@register_notrace_module
class ConvNormAct(Fused, TimmConvNormAct):
    """timm's `ConvNormAct`: `act(norm(conv(x)))`. Constructor and state are timm's."""

    host = TimmConvNormAct

    def fused_form(self) -> forms.Single:
        return forms.Single(_conv_norm_act("", self))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class Layers(Fused, nn.Sequential):
    """Layers one after another that are one block."""

    trains = False

    @classmethod
    def around(cls, *layers: tuple[str, nn.Module]) -> Layers:
        """The block of layers that stand elsewhere, by their names; they stay as they are."""
        found = cls(OrderedDict(layers))
        found.training = False
        return found


@register_notrace_module
class Stem(Layers):
    """The stem of a ResNetV2: convolutions with the norm behind each where there is one, then padding and pooling."""

    host = nn.Sequential

    def fused_form(self) -> forms.Stem:
        layers, units = list(self.named_children()), []
        while layers and len(units) < 3 and type(layers[0][1]) in _CONVS:
            normed = len(layers) > 1 and type(layers[1][1]) not in _CONVS and _has_parameters(layers[1][1])
            units.append(_conv_norm(*layers[0], *(layers[1] if normed else ("", None))))
            layers = layers[1 + normed :]
        if not units:
            raise Refused("it does not begin with a plain convolution")
        for path, layer in layers:
            if _has_parameters(layer):
                raise Refused(f"{path} is {modules.class_name(layer)}, which has no fused form here")
        return forms.Stem(*units, rest=tuple(layer for _, layer in layers))

    def __iter__(self) -> Iterator[nn.Module]:
        """The layers. For timm's `forward_intermediates`, which calls them one by one and has to give what `forward`
        gives, each convolution fused with the norm behind it, and nothing in the place of that norm.
        """
        layers = tuple(self._modules.items())
        whole = self.training or torch.compiler.is_compiling()
        if whole or sys._getframe(1).f_code is not _FORWARD_INTERMEDIATES:
            return iter([layer for _, layer in layers])
        known, pieces = self.__dict__.get(PIECES, (None, []))
        if known != layers:
            pieces = self._pieces(layers)
            self.__dict__[PIECES] = layers, pieces
        return iter(pieces)

    @staticmethod
    def _pieces(layers: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
        found: list[nn.Module] = []
        while layers:
            (_, layer), *behind = layers
            if type(layer) not in _CONVS:
                found, layers = [*found, layer], behind
                continue
            normed = bool(behind) and type(behind[0][1]) not in _CONVS and _has_parameters(behind[0][1])
            piece = Stem.around(*layers[: 1 + normed])
            found, layers = [*found, piece, *[nn.Identity()] * normed], behind[normed:]
        return found


@register_notrace_module
class LastLayer(Layers):
    """A norm with its activation, or an activation, behind the last block, as a program has it: `act(norm(x))`."""

    host = nn.Sequential

    def fused_form(self) -> forms.LastLayer:
        ((name, layer),) = self.named_children()
        norm = type(layer) in _NORM_ACTS
        unit = _norm(name, layer) if norm else ActivationUnit(name, _activation(name, layer))
        if isinstance(unit, HostNormUnit) or unit.activation not in native.ACTIVATION_CODES:
            raise Refused(f"{name} is a {type(layer).__name__}, which csrc/cpu has not")
        return forms.LastLayer(unit)


@register_notrace_module
class Bottleneck(Fused, regnet.Bottleneck):
    """timm's RegNet `Bottleneck` (RegNetX, RegNetY and the RegNetZ of regnet.py). Constructor and state are timm's."""

    host = regnet.Bottleneck

    def fused_form(self) -> forms.Bottleneck:
        return forms.Bottleneck(
            _conv_norm_act("conv1", self.conv1),
            _conv_norm_act("conv2", self.conv2),
            _conv_norm_act("conv3", self.conv3, after=_activation("act3", self.act3)),
            _squeeze_excite("se", self.se),
            **_shortcut("downsample", self.downsample, norm=True),
            drop_path=None if self.downsample is None else _drop_path(self.drop_path),
        )


@register_notrace_module
class BottleneckBlock(Fused, byobnet.BottleneckBlock):
    """timm's byobnet `BottleneckBlock` (most RegNetZ). Constructor and state are timm's."""

    host = byobnet.BottleneckBlock

    def fused_form(self) -> forms.Bottleneck:
        for path in ("conv2b_kxk", "attn_last"):
            if type(getattr(self, path)) is not nn.Identity:
                raise Refused(f"{path} has no fused form")
        return forms.Bottleneck(
            _conv_norm_act("conv1_1x1", self.conv1_1x1),
            _conv_norm_act("conv2_kxk", self.conv2_kxk),
            _conv_norm_act("conv3_1x1", self.conv3_1x1, after=_activation("act", self.act)),
            _squeeze_excite("attn", self.attn),
            **_shortcut("shortcut", self.shortcut, norm=True),
            drop_path=_drop_path(self.drop_path),
        )


@register_notrace_module
class PreBottleneck(Fused, regnet.PreBottleneck):
    """timm's RegNetV `PreBottleneck`. Constructor and state are timm's."""

    host = regnet.PreBottleneck

    def fused_form(self) -> forms.PreAct:
        squeeze_excite = _squeeze_excite("se", self.se)
        norm1 = _norm("norm1", self.norm1)
        return forms.PreAct(
            norm1,
            _conv_norm("conv1", self.conv1, "norm2", self.norm2),
            _conv_norm("conv2", self.conv2, "norm3", self.norm3 if squeeze_excite is None else None),
            _conv_norm("conv3", self.conv3, "", None),
            norm3=None if squeeze_excite is None else _norm("norm3", self.norm3),
            squeeze_excite=squeeze_excite,
            identity_after_norm=True,
            owns_norm=isinstance(norm1, NormActUnit),
            **_shortcut("downsample", self.downsample, norm=False),
            drop_path=None if self.downsample is None else _drop_path(self.drop_path),
        )


@register_notrace_module
class PreActBottleneck(Fused, resnetv2.PreActBottleneck):
    """timm's ResNetV2 `PreActBottleneck`. Constructor and state are timm's."""

    host = resnetv2.PreActBottleneck

    def fused_form(self) -> forms.PreAct:
        return forms.PreAct(
            _norm("norm1", self.norm1),
            _conv_norm("conv1", self.conv1, "norm2", self.norm2),
            _conv_norm("conv2", self.conv2, "norm3", self.norm3),
            _conv_norm("conv3", self.conv3, "", None),
            **_raw_shortcut(self.downsample),
            drop_path=_drop_path(self.drop_path),
        )


@register_notrace_module
class PreActBasic(Fused, resnetv2.PreActBasic):
    """timm's ResNetV2 `PreActBasic`. Constructor and state are timm's."""

    host = resnetv2.PreActBasic

    def fused_form(self) -> forms.PreAct:
        return forms.PreAct(
            _norm("norm1", self.norm1),
            _conv_norm("conv1", self.conv1, "norm2", self.norm2),
            _conv_norm("conv2", self.conv2, "", None),
            **_raw_shortcut(self.downsample),
            drop_path=_drop_path(self.drop_path),
        )


def _raw_shortcut(module: nn.Module | None) -> dict:
    """ResNetV2's shortcut: without a downsample module the raw input is added."""
    return {"identity": True} if module is None else _shortcut("downsample", module, norm=False)


@register_notrace_module
class RepVggBlock(Fused, byobnet.RepVggBlock):
    """timm's `RepVggBlock`, in training form and reparameterised. Constructor and state are timm's."""

    host = byobnet.RepVggBlock

    def fused_form(self) -> forms.RepVgg:
        squeeze_excite = _squeeze_excite("attn", self.attn)
        activation = _activation("act", self.act)
        after = activation if squeeze_excite is None else "none"

        def form(unit: ConvUnit, casts_input: bool) -> forms.RepVgg:
            gate = None if squeeze_excite is None else GateUnit("act", unit.conv, activation)
            branches = self.reparam_conv is None  # a deployed block has lost them
            drop_path = _drop_path(self.drop_path) if branches and self.identity is not None else None
            return forms.RepVgg(unit, squeeze_excite, gate, casts_input=casts_input, drop_path=drop_path)

        if self.reparam_conv is not None:
            return form(_conv_norm("reparam_conv", self.reparam_conv, "", None, after), True)
        kxk = _conv_norm_act("conv_kxk", self.conv_kxk)
        pointwise = _conv_norm_act("conv_1x1", self.conv_1x1)
        folded = [kxk, pointwise] if self.identity is None else [kxk, pointwise, _norm("identity", self.identity)]
        if any(unit.norm is None or unit.activation != "none" or isinstance(unit, HostNormUnit) for unit in folded):
            raise Refused("its branches are not all BatchNorm without an activation")
        padding = tuple(self.conv_kxk.conv.dilation[i] * (self.conv_kxk.conv.kernel_size[i] // 2) for i in range(2))
        if (
            kxk.standardize
            or pointwise.standardize
            or pointwise.conv.padding != (0, 0)
            or kxk.conv.padding != padding
            or pointwise.conv.stride != kxk.conv.stride
            or pointwise.conv.groups != kxk.conv.groups
        ):
            raise Refused("its branches do not have the same geometry")
        unit = RepVggUnit(
            "conv_kxk",
            self.conv_kxk.conv,
            self.conv_kxk.bn,
            activation=after,
            norm_path="conv_kxk.bn",
            pointwise=self.conv_1x1.conv,
            pointwise_norm=self.conv_1x1.bn,
            identity=self.identity,
        )
        return form(unit, self.identity is None)


def _flattens(path: str, module: nn.Module) -> bool:
    """Whether a layer flattens all but the first dimension; or it does nothing. Raises `Refused` for any other."""
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return True
    if type(module) is not nn.Identity:
        raise Refused(f"{path} is {modules.class_name(module)}, which has no fused form")
    return False


def _check_means(path: str, pool: nn.Module) -> bool:
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
    return _flattens(f"{path}.flatten", pool.flatten) or flat


@register_notrace_module
class ClassifierHead(Fused, TimmClassifierHead):
    """timm's `ClassifierHead`: global average pooling and a linear classifier. Constructor and state are timm's."""

    host = TimmClassifierHead
    trains = False

    def fused_form(self) -> forms.Head:
        _check_inert("drop", self.drop)
        pooled_flat, ends_flat = _check_means("global_pool", self.global_pool), _flattens("flatten", self.flatten)
        if type(self.fc) is nn.Identity and (pooled_flat or ends_flat):
            return forms.Head()
        if not (type(self.fc) is nn.Linear and pooled_flat) and not (
            modules.is_linear(self.fc) and ends_flat and not pooled_flat
        ):
            raise Refused(f"fc is {modules.class_name(self.fc)}, not a plain linear layer or 1x1 convolution")
        return forms.Head(LinearUnit("fc", self.fc))

    def reset(self, *args, **kwargs):
        self._forget()
        super().reset(*args, **kwargs)

    def forward(self, x, pre_logits: bool = False):
        return TimmClassifierHead.forward(self, x, pre_logits) if pre_logits else Fused.forward(self, x)


BLOCKS: dict[type[nn.Module], type[Fused]] = {
    cls.host: cls
    for cls in (
        ConvNormAct,
        Bottleneck,
        BottleneckBlock,
        PreBottleneck,
        PreActBottleneck,
        PreActBasic,
        RepVggBlock,
        ClassifierHead,
    )
}
"""timm's class to ours, wherever it stands in a network."""


class RegStage(Chain, regnet.RegStage):
    """A stage of a RegNet."""

    host = regnet.RegStage

    def forward(self, x: Tensor) -> Tensor:
        return regnet.RegStage.forward(self, x) if self.grad_checkpointing else Chain.forward(self, x)


class Sequential(Chain, nn.Sequential):
    """A stage of a ByobNet, the blocks of a stage of ResNetV2 and of a stage of transformers' RegNet."""

    host = nn.Sequential


CHAINS: dict[type[nn.Module], type[Chain]] = {cls.host: cls for cls in (RegStage, Sequential)}
"""timm's container to ours, where the blocks in it were rebuilt."""


def _there(*modules: nn.Module) -> Iterator[nn.Module]:
    """All but those that do nothing."""
    return (module for module in modules if type(module) is not nn.Identity or not only_forwards(module))


def _in(container: nn.Module) -> Iterator[nn.Module]:
    """What a plain Sequential calls; of any other container, itself."""
    plain = type(container) is nn.Sequential and only_forwards(container)
    return iter(container) if plain else iter([container])


class RegNet(Network, regnet.RegNet):
    """A whole RegNet."""

    host = regnet.RegNet
    loose = (("stem", Stem), ("final_conv", LastLayer))  # of a RegNetV

    def in_order(self) -> Iterator[nn.Module]:
        return _there(self.stem, self.s1, self.s2, self.s3, self.s4, self.final_conv, self.head)


class ByobNet(Network, byobnet.ByobNet):
    """A whole RepVGG, or RegNetZ of byobnet."""

    host = byobnet.ByobNet

    def in_order(self) -> Iterator[nn.Module]:
        return _there(self.stem, *_in(self.stages), self.final_conv, self.head)


class ResNetV2(Network, resnetv2.ResNetV2):
    """A whole ResNetV2."""

    host = resnetv2.ResNetV2
    loose = (("norm", LastLayer),)

    def in_order(self) -> Iterator[nn.Module]:
        yield self.stem
        for stage in _in(self.stages):
            own = type(stage) is resnetv2.ResNetStage and only_forwards(stage) and not stage.grad_checkpointing
            yield stage.blocks if own else stage
        yield from _there(self.norm, self.head)


NETWORKS: dict[type[nn.Module], type[Network]] = {cls.host: cls for cls in (RegNet, ByobNet, ResNetV2)}
"""timm's network to ours, where blocks in it were rebuilt."""


def part(parent: nn.Module, name: str) -> type[Fused] | None:
    """The twin of a child whose class alone does not tell what it is, or None."""
    is_stem = isinstance(parent, resnetv2.ResNetV2) and name == "stem" and type(parent.stem) is nn.Sequential
    return Stem if is_stem and type(next(iter(parent.stem), None)) in _CONVS else None
