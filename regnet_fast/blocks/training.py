"""Blocks in training mode: the forms of evaluation, over the operations of `ops.training`.

`Step(x).bottleneck(form)` and so on compute what the host's modules compute in training mode, running statistics
included, and save raw convolution results and block outputs alone. `Refused` says where a block is left to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends import ACTIVATIONS, forced_backend
from ..backends.reference import activate, channel_means
from ..backends.training import refuse
from ..ops import training as ops
from ..ops.training import Affine, Branch, Excite, Map, Normed, Statistics, without_autocast
from . import forms
from .units import ConvUnit, NormActUnit, Refused, SqueezeExciteUnit


def _statistics(norm: nn.Module) -> Statistics:
    """Which statistics a BatchNorm module takes now."""
    if not norm.training or not isinstance(norm, nn.modules.batchnorm._NormBase):
        return Statistics(_wide(norm.running_mean), _wide(norm.running_var), norm.eps)
    return Statistics(None, None, norm.eps, _group(norm))


def _group(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which a synchronised norm's batch is spread."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.float()


class Step:
    """One pass of a block in training mode, in the dtype of `x`.

    Statistics go into the running ones before the next operation: gradient checkpointing stops a block that it computes
    again at the last tensor that backward needs.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def run(self, form: forms.Form, x: Tensor) -> Tensor:
        """The output of a block for a channels_last map of the step's dtype."""
        return _RUN[type(form)](self, form, x)

    def _norm(self, norm: nn.Module, activation: str) -> tuple[Statistics, Affine]:
        return _statistics(norm), Affine(_wide(norm.weight), _wide(norm.bias), activation)

    def _note(
        self, norm: nn.Module, stats: Statistics, mean: Tensor, var: Tensor, count: float, shape: torch.Size
    ) -> None:
        if not stats.batch:
            return
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        if not norm.track_running_stats:
            return
        with torch.no_grad():
            factor = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if factor is None:
                    factor = 1.0 / float(norm.num_batches_tracked)
            factor = 0.0 if factor is None else factor
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
            norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), factor)

    def convs(self, units: Sequence[ConvUnit], x: Map) -> list[Map]:
        """Convolutions of one map, and their norms; the activation is applied by whoever reads a result."""
        return self._convs(x, units, [unit.activation for unit in units], None)

    def conv(self, unit: ConvUnit, x: Map, activation: str | None = None, excite: Excite | None = None) -> Map:
        """A convolution and its norm, with another `activation` than the unit's where one is given."""
        return self._convs(x, [unit], [unit.activation if activation is None else activation], excite)[0]

    def _convs(self, x: Map, units: Sequence[ConvUnit], activations: Sequence[str], excite: Excite | None) -> list[Map]:
        branches = []
        for unit, activation in zip(units, activations, strict=True):
            norm = (None, None) if unit.norm is None else self._norm(unit.norm, activation)
            branches.append(Branch(unit.conv.weight.to(self.dtype), unit.geometry(), *norm))
        results = ops.convs(x, branches, excite)
        for unit, branch, y in zip(units, branches, results, strict=True):
            if unit.norm is not None:
                self._note(unit.norm, branch.stats, y.mean, y.var, y.count, y.shape)
        return results

    def enter(self, unit: NormActUnit, x: Tensor) -> tuple[Normed, Tensor]:
        """A map that is read through a norm, and the map itself."""
        stats, affine = self._norm(unit.norm, unit.activation)
        read, identity = ops.enter(x, stats, affine)
        self._note(unit.norm, stats, read.mean, read.var, read.count, x.shape)
        return read, identity

    def excite(self, unit: SqueezeExciteUnit | None) -> Excite | None:
        """The parameters of squeeze-and-excitation."""
        if unit is None:
            return None
        matrices = (unit.fc1.weight.flatten(1), unit.fc1.bias, unit.fc2.weight.flatten(1), unit.fc2.bias)
        return Excite(*map(_wide, matrices), unit.activation)

    def drop(self, path: nn.Module | None, x: Map) -> Tensor | None:
        """timm's factor of stochastic depth for every image, from the same random numbers."""
        if path is None or not path.training or path.drop_prob == 0.0:
            return None
        keep = 1 - path.drop_prob
        like = x if isinstance(x, Tensor) else x.map
        factor = like.new_empty((like.shape[0], 1, 1, 1)).bernoulli_(keep)
        return factor.div_(keep) if keep > 0.0 and path.scale_by_keep else factor

    def _single(self, form: forms.Single, x: Tensor) -> Tensor:
        return ops.join(self.conv(form.unit, x))

    def _bottleneck(self, form: forms.Bottleneck, x: Tensor) -> Tensor:
        first, *terms = self.convs(self._readers(form), x)
        y = self.conv(form.conv3, self.conv(form.conv2, first), "none", self.excite(form.squeeze_excite))
        factor = self.drop(form.drop_path, y)
        if form.pool is not None:
            terms = [self.conv(form.shortcut, form.pool(x))]
        elif form.identity:
            terms = [x]
        return ops.join(y, *terms, activation=form.conv3.activation, factor=factor)

    @staticmethod
    def _readers(form: forms.Bottleneck | forms.PreAct) -> list[ConvUnit]:
        """The convolutions that read the block's input: the first, and a shortcut that no pool precedes."""
        return [form.conv1] if form.shortcut is None or form.pool is not None else [form.conv1, form.shortcut]

    def _preact(self, form: forms.PreAct, x: Tensor) -> Tensor:
        read, identity = self.enter(form.norm1, x)
        first, *shortcut = self.convs(self._readers(form), read)
        y = self.conv(form.conv2, first)
        if form.conv3 is not None:
            if form.squeeze_excite is not None:
                gate = form.squeeze_excite(channel_means(y), y.dtype)
                y = self.enter(form.norm3, y * gate[:, :, None, None])[0]
            y = self.conv(form.conv3, y)
        factor = self.drop(form.drop_path, y)
        if form.pool is not None:
            shortcut = [self.conv(form.shortcut, form.pool(ops.join(read)))]
        if shortcut:
            return ops.join(y, *shortcut, factor=factor)
        if not form.identity:
            return y if factor is None else y * factor
        return ops.join(y, read if form.identity_after_norm else identity, factor=factor)

    def _repvgg(self, form: forms.RepVgg, x: Tensor) -> Tensor:
        unit = form.conv
        norms = [unit.norm, unit.pointwise_norm] + ([] if unit.identity is None else [unit.identity])
        stats, affines = zip(*(self._norm(norm, "none") for norm in norms), strict=True)
        weights = [conv.weight.to(self.dtype) for conv in (unit.conv, unit.pointwise)]
        geometries = [(c.stride, c.padding, c.dilation, c.groups) for c in (unit.conv, unit.pointwise)]
        factor = None if unit.identity is None else self.drop(form.drop_path, x)

        def note(i: int, mean: Tensor, var: Tensor, count: float, shape: torch.Size) -> None:
            self._note(norms[i], stats[i], mean, var, count, shape)

        y = ops.repvgg(x, weights, geometries, stats, affines, unit.activation, factor, note)
        if form.squeeze_excite is None:
            return y
        gate = form.squeeze_excite(channel_means(y), y.dtype)
        return activate(y * gate[:, :, None, None], form.gate.activation)


_RUN: dict[type[forms.Form], Callable[[Step, forms.Form, Tensor], Tensor]] = {
    forms.Single: Step._single,
    forms.Bottleneck: Step._bottleneck,
    forms.PreAct: Step._preact,
    forms.RepVgg: Step._repvgg,
}


def unserved(x: Tensor) -> str | None:
    """Why the operations are not used for such an input, or None."""
    if not x.is_cpu and forced_backend() is None:
        return f"the operations have not been measured on the device type {x.device.type!r}"
    return refuse(x)


def check(form: forms.Form) -> None:
    """Raise `Refused` where a form is left to the host in training mode."""
    if type(form) not in _RUN:
        raise Refused(f"{type(form).__name__} has no fused form in training mode")
    if isinstance(form, forms.RepVgg) and not hasattr(form.conv, "pointwise"):
        raise Refused("a reparameterised block has no norm to fuse with")
    if isinstance(form, forms.Single) and form.unit.norm is None:
        raise Refused("there is no norm to fuse with")
    for unit in form.units().values():
        activation = getattr(unit, "activation", "none")
        if ACTIVATIONS[activation].code is None:
            raise Refused(f"{unit.path} has the activation {activation}, which the passes of training do not have")
        if isinstance(unit, ConvUnit):
            if unit.then is not None:
                raise Refused(f"{unit.path} is followed by {type(unit.then).__name__}")
            if unit.standardize is not None:
                raise Refused(f"{unit.path} standardises its weights")
            if unit.conv.bias is not None:
                raise Refused(f"{unit.path} has a bias")
        if not isinstance(unit, (ConvUnit, NormActUnit, SqueezeExciteUnit, forms.GateUnit)):
            raise Refused(f"{unit.path} has no fused form in training mode")
    if isinstance(form, forms.PreAct) and (form.conv3 or form.conv2).norm is not None:
        raise Refused("its last convolution has a norm")


def unfit(form: forms.Form, x: Tensor) -> str | None:
    """Why an input is left to the host, which refuses or promotes it, or None."""
    autocast = torch.is_autocast_enabled(x.device.type)
    channels = form.in_channels()
    if channels is not None and channels != x.shape[1]:
        return f"an input of {x.shape[1]} channels is left to the host"
    for unit in form.units().values():
        if isinstance(unit, ConvUnit):
            weight = unit.conv.weight
            if weight.device != x.device:
                return f"the input is on {x.device}, the weights on {weight.device}"
            if not autocast and weight.dtype != x.dtype:
                return f"{unit.path} has {weight.dtype} weights and the input is {x.dtype}"
    if not form.casts_input and autocast and x.dtype != compute_dtype(x):
        return f"under autocast this block adds its {x.dtype} input to {compute_dtype(x)} results"
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x computes now."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def run(form: forms.Form, x: Tensor) -> Tensor:
    """The output of a block in training mode."""
    dtype = compute_dtype(x)
    with without_autocast(x.device.type):
        x = x.to(dtype)
        if not isinstance(form, forms.Single):  # a convolution takes any layout, and need not keep another copy
            x = x.contiguous(memory_format=torch.channels_last)
        return Step(dtype).run(form, x)
