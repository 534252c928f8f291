"""Blocks in training mode: the forms of evaluation, over the operations of `ops.training`.

A block's `Training` is made once for its form, and computes what the host's modules compute in training mode, running
statistics included; raw convolution results and block outputs alone are saved. `Refused` says where a block is left to
the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..backends import ACTIVATIONS, forced_backend
from ..backends.passes import Passes, passes_for, refuse
from ..backends.reference import activate, channel_means
from ..ops import training as ops
from ..ops.training import Affine, Branch, Excite, Map, Normed, NormStatistics, without_autocast
from . import forms
from .units import BorderedConvUnit, BranchesUnit, ConvUnit, NormActUnit, Refused, SqueezeExciteUnit


def _is_of_batch(norm: nn.Module) -> bool:
    """Whether a BatchNorm module takes the statistics of the batch."""
    return norm.training and isinstance(norm, nn.modules.batchnorm._NormBase)


def _group(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which a synchronised norm's batch is spread."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.float()


def _note(norm: nn.Module, mean: Tensor, var: Tensor, count: float, shape: torch.Size) -> None:
    """Let the running statistics of a norm follow those of a batch. Raises ValueError for a batch of one value."""
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if not norm.track_running_stats:
        return
    factor, counter = norm.momentum, norm.num_batches_tracked
    if counter is not None:
        counter.add_(1)
        if factor is None:
            factor = 1.0 / float(counter)
    factor = 0.0 if factor is None else factor
    running_mean, running_var = norm.running_mean, norm.running_var
    running_mean.lerp_(mean.to(running_mean.dtype), factor)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), factor)


class Step:
    """One pass of a block in training mode.

    Args:
        training: what is known of the block.
        dtype: in which it computes.
        passes: those of maps of this dtype.
    """

    def __init__(self, training: Training, dtype: torch.dtype, passes: Passes):
        self.training, self.dtype, self.passes = training, dtype, passes

    def _norm(self, norm: nn.Module, activation: str) -> tuple[NormStatistics, Affine]:
        stats = self.training.statistics.get(norm)
        if stats is None:
            given = (None, None) if _is_of_batch(norm) else (_wide(norm.running_mean), _wide(norm.running_var))
            stats = NormStatistics(*given, norm.eps, _group(norm), partial(_note, norm))
        return stats, Affine(_wide(norm.weight), _wide(norm.bias), activation)

    def convs(self, units: Sequence[ConvUnit], x: Map) -> list[Map]:
        """Convolutions of one map, and their norms; the activation is applied by whoever reads a result."""
        return ops.convs(self.passes, x, [self._branch(unit, unit.activation) for unit in units])

    def conv(self, unit: ConvUnit, x: Map, activation: str | None = None, excite: Excite | None = None) -> Map:
        """A convolution and its norm, with another `activation` than the unit's where one is given."""
        branch = self._branch(unit, unit.activation if activation is None else activation)
        return ops.convs(self.passes, x, [branch], excite)[0]

    def _branch(self, unit: ConvUnit, activation: str) -> Branch:
        norm = (None, None) if unit.norm is None else self._norm(unit.norm, activation)
        return Branch(unit.conv.weight.to(self.dtype), self.training.geometries[unit], *norm)

    def read_through_norm(self, unit: NormActUnit, x: Tensor) -> tuple[Normed, Tensor]:
        """A map that is read through a norm, and the map itself."""
        return ops.read_through_norm(self.passes, x, *self._norm(unit.norm, unit.activation))

    def excite(self, unit: SqueezeExciteUnit | None) -> Excite | None:
        """The parameters of squeeze-and-excitation."""
        if unit is None:
            return None
        matrices = (unit.fc1.weight.flatten(1), unit.fc1.bias, unit.fc2.weight.flatten(1), unit.fc2.bias)
        return Excite(*map(_wide, matrices), unit.activation)

    def drop(self, path: nn.Module | None, x: Map) -> Tensor | None:
        """The host's factor of stochastic depth for every image, from the same random numbers: of timm's DropPath or
        torchvision's StochasticDepth.
        """
        if path is None or not path.training:
            return None
        probability = path.drop_prob if hasattr(path, "drop_prob") else path.p
        if probability == 0.0:
            return None
        keep = 1 - probability
        like = x if isinstance(x, Tensor) else x.map
        factor = like.new_empty((like.shape[0], 1, 1, 1)).bernoulli_(keep)
        return factor.div_(keep) if keep > 0.0 and getattr(path, "scale_by_keep", True) else factor

    def _single(self, form: forms.Single, x: Tensor) -> Tensor:
        return ops.join(self.passes, self.conv(form.unit, x))

    def _bottleneck(self, form: forms.Bottleneck, x: Tensor) -> Tensor:
        if form.before is None:
            y, *terms = self.convs(self._readers(form), x)
        else:
            y, terms = self.conv(form.conv1, self.conv(form.before, x)), []
        y = y if form.conv3 is None else self.conv(form.conv2, y)
        y = self.conv(form.last, y, "none", self.excite(form.squeeze_excite))
        factor = self.drop(form.drop_path, y)
        if form.pool is not None:
            terms = [self.conv(form.shortcut, form.pool(x))]
        elif form.identity:
            terms = [x]
        return ops.join(self.passes, y, *terms, activation=form.last.activation, factor=factor)

    @staticmethod
    def _readers(form: forms.Bottleneck | forms.PreAct) -> list[ConvUnit]:
        """The convolutions that read the block's input: the first, and a shortcut that no pool precedes."""
        return [form.conv1] if form.shortcut is None or form.pool is not None else [form.conv1, form.shortcut]

    def _preact(self, form: forms.PreAct, x: Tensor) -> Tensor:
        read, identity = self.read_through_norm(form.norm1, x)
        first, *shortcut = self.convs(self._readers(form), read)
        y = self.conv(form.conv2, first)
        if form.conv3 is not None:
            if form.squeeze_excite is not None:
                gate = form.squeeze_excite(channel_means(y), y.dtype)
                y = self.read_through_norm(form.norm3, y * gate[:, :, None, None])[0]
            y = self.conv(form.conv3, y)
        factor = self.drop(form.drop_path, y)
        if form.pool is not None:
            shortcut = [self.conv(form.shortcut, form.pool(ops.join(self.passes, read)))]
        if shortcut:
            return ops.join(self.passes, y, *shortcut, factor=factor)
        if not form.identity:
            return y if factor is None else y * factor
        return ops.join(self.passes, y, read if form.identity_after_norm else identity, factor=factor)

    def _repvgg(self, form: forms.RepVgg, x: Tensor) -> Tensor:
        unit = form.conv
        (pointwise,) = unit.others
        norms = [unit.norm, pointwise.norm] + ([] if unit.identity is None else [unit.identity])
        stats, affines = zip(*(self._norm(norm, "none") for norm in norms), strict=True)
        weights = [conv.weight.to(self.dtype) for conv in (unit.conv, pointwise.conv)]
        geometries = [(c.stride, c.padding, c.dilation, c.groups) for c in (unit.conv, pointwise.conv)]
        factor = None if unit.identity is None else self.drop(form.drop_path, x)
        y = ops.repvgg(self.passes, x, weights, geometries, stats, affines, unit.activation, factor)
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
    if not (x.is_cpu or x.is_cuda) and forced_backend() is None:
        return f"the operations have not been measured on the device type {x.device.type!r}"
    return refuse(x)


def check(form: forms.Form) -> None:
    """Raise `Refused` where a form is left to the host in training mode."""
    if type(form) not in _RUN:
        raise Refused(f"{type(form).__name__} has no fused form in training mode")
    if isinstance(form, forms.RepVgg):
        if not isinstance(form.conv, BranchesUnit):
            raise Refused("a reparameterised block has no norm to fuse with")
        if [branch.conv.kernel_size for branch in form.conv.others] != [(1, 1)]:
            raise Refused("it has other branches than a RepVGG's")
    if isinstance(form, forms.Single) and form.unit.norm is None:
        raise Refused("there is no norm to fuse with")
    for unit in form.units().values():
        activation = getattr(unit, "activation", "none")
        if not ACTIVATIONS[activation].trains:
            raise Refused(f"{unit.path} has the activation {activation}, which the passes of training do not have")
        if isinstance(unit, SqueezeExciteUnit) and unit.gate_activation != "sigmoid":
            raise Refused(f"the gate of {unit.path} is a {unit.gate_activation}, which training does not have")
        if isinstance(unit, ConvUnit):
            if unit.then is not None:
                raise Refused(f"{unit.path} is followed by {type(unit.then).__name__}")
            if isinstance(unit, BorderedConvUnit):
                raise Refused(f"{unit.path} has a border that training does not have")
            if unit.standardize is not None:
                raise Refused(f"{unit.path} standardises its weights")
            if unit.conv.bias is not None:
                raise Refused(f"{unit.path} has a bias")
        if not isinstance(unit, (ConvUnit, NormActUnit, SqueezeExciteUnit, forms.GateUnit)):
            raise Refused(f"{unit.path} has no fused form in training mode")
    if isinstance(form, forms.Bottleneck) and form.blur is not None:
        raise Refused("its last convolution reads a pooling")
    if isinstance(form, forms.Bottleneck) and form.before is not None and form.shortcut is not None:
        raise Refused("its shortcut reads what no other convolution does")
    if isinstance(form, forms.PreAct) and (form.conv3 or form.conv2).norm is not None:
        raise Refused("its last convolution has a norm")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x computes now."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Training:
    """A form in training mode: what is known of a block as long as its structure, settings and modes stay. Raises
    `Refused` for a form that is left to the host.

    Attributes: `geometries` of its convolutions; `statistics` of its norms that are those of the batch in one process;
    `synchronised`, the norms that may be those of several.
    """

    def __init__(self, form: forms.Form):
        check(form)
        self.form, self.run_form, self.channels = form, _RUN[type(form)], form.in_channels()
        self.convs = [unit for unit in form.units().values() if isinstance(unit, ConvUnit)]
        self.geometries = {unit: unit.geometry() for unit in self.convs}
        self.synchronised = [norm for _, norm in form.norms() if isinstance(norm, nn.SyncBatchNorm)]
        self.statistics = {
            norm: NormStatistics(None, None, norm.eps, None, partial(_note, norm))
            for _, norm in form.norms()
            if _is_of_batch(norm) and not isinstance(norm, nn.SyncBatchNorm)
        }

    def unfit(self, x: Tensor) -> str | None:
        """Why an input is left to the host, which refuses or promotes it, or None."""
        autocast = torch.is_autocast_enabled(x.device.type)
        if self.channels not in (None, x.shape[1]):
            return f"an input of {x.shape[1]} channels is left to the host"
        for unit in self.convs:
            weight = unit.conv.weight
            if weight.device != x.device:
                return f"the input is on {x.device}, the weights on {weight.device}"
            if not autocast and weight.dtype != x.dtype:
                return f"{unit.path} has {weight.dtype} weights and the input is {x.dtype}"
        if autocast and not self.form.casts_input and x.dtype != compute_dtype(x):
            return f"under autocast this block adds its {x.dtype} input to {compute_dtype(x)} results"
        return None

    def in_processes(self) -> bool:
        """Whether the batch of a norm is spread over processes."""
        return any(_group(norm) is not None for norm in self.synchronised)

    def run(self, x: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """The block's output, on the passes of the backends named, or by default of those that are forced."""
        dtype = compute_dtype(x)
        with without_autocast(x.device.type):
            x = x.to(dtype)
            if not isinstance(self.form, forms.Single):  # a convolution takes any layout, and need not keep a copy
                x = x.contiguous(memory_format=torch.channels_last)
            return self.run_form(Step(self, dtype, passes_for(x, names)), self.form, x)
