"""The mixin that turns a host's block into a fused one: when the fused path applies, its caches, and its gradient.

`class Bottleneck(Fused, timm.models.regnet.Bottleneck)` overrides `forward` and nothing else. The instance keeps its
modules, parameters and buffers; `super().forward` is always there as the reference and as the way taken whenever the
fused path does not compute exactly the same function.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..backends import BackendError, forced_backend
from ..observer import observer
from ..ops.packed import Packed
from ..recorder import recorded_elsewhere
from ..settings import settings
from ..trials import cpu
from ..trials.session import session, waiting
from . import training
from .forms import Form
from .substitution import with_tensors
from .tried import Chosen, Tried, asked
from .units import ConvUnit, LinearUnit, Refused
from .watch import PLAIN, Structure, Watch, hooked, transformed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE = "_regnet_fast_plans"
"""Where a block keeps its plans: another object whenever one of them is made anew."""
_TRAINED = "_regnet_fast_training"
_FROZEN = "_regnet_fast_frozen"
PIECES = "_regnet_fast_pieces"
"""Where a module keeps blocks that it made of parts of itself."""
FOUND = "_regnet_fast_found"
"""Where a frozen network keeps the plans of its blocks."""
_PACKED = (STATE, _FROZEN, PIECES, FOUND)
_DERIVED = (*_PACKED, _TRAINED)

_RECORDED = (
    "somebody records the stream as a CUDA graph, in which packed weights would not follow the model's; use "
    "regnet_fast.graphed(model), which records it anew"
)

_BRIEF = 2
"""After how many plans that were good for one call the weights are taken for ones that change in every call."""


class FallbackWarning(UserWarning):
    """A block that could run fused takes the host's own forward."""


class Plan(Watch):
    """A form over the live modules, bound to packed weights when it first runs, and the facts it rests on; or the
    reason why there is none.

    Attributes: `unbound`, over the live modules; `in_channels` of the input; `refusal`, set where there is no form;
    `differentiated`, whether a gradient was ever asked for; `frozen`, whether the user promised that nothing changes;
    `calls`, how often it was current; `brief`, how many plans before it were current in one call at most; `programs` of
    this block and so many behind it (chain.py); `stage`, in whose program somebody heard it run.
    """

    def __init__(self, block: Fused, dtype: torch.dtype, before: Plan | None = None):
        super().__init__(block)
        self.dtype, self.frozen, self.calls = dtype, block.is_frozen, 0
        self.differentiated = before is not None and before.differentiated
        self.brief = before.brief + 1 if before is not None and before.calls <= 1 else 0
        self.refusal: str | None = self.blind
        self.unbound: Form | None = None
        self.in_channels: int | None = None
        self.programs: dict[int, Any] = {}
        self.stage: cpu.Stage | None = None
        if self.refusal is not None:
            return
        try:
            unbound = block.read_form()
            unbound.check_evaluation()
            _check_tensors(unbound, self.tensors, dtype)
            self.unbound, self.in_channels = unbound, unbound.in_channels()
        except Refused as refusal:
            self.refusal = str(refusal)

    def current(self) -> bool:
        """Whether everything that the plan rests on is as it was; a frozen plan is not looked at."""
        return self.frozen or super().current()

    @cached_property
    def form(self) -> Form:
        """The form bound to packed weights."""
        with torch.inference_mode(False), torch.no_grad():
            return self.unbound.bind(lambda unit: unit.pack(self.dtype))

    @cached_property
    def described(self) -> str:
        """What the block's time depends on: its form and the shapes of its weights."""
        shapes = ("x".join(map(str, t.shape)) for t in self.tensors if t.dim() > 1)
        return f"{type(self.unbound).__name__}({', '.join(shapes)})"

    def waits(self) -> bool:
        """Whether weights that are other ones in every call, as computed ones are, are left to the host: packing them
        pays from the second call on.
        """
        return self.brief >= _BRIEF and self.calls <= 1 and not self.frozen

    def pin(self) -> tuple:
        """What keeps the memory of the packed weights in use now from being freed, as long as it is held."""
        units = [getattr(unit, "conv", unit) for unit in vars(self.form).values()]
        return self, [unit.pin() for unit in units if isinstance(unit, Packed)]


class Trained(Structure):
    """What computes a block in training mode; or the reason why there is nothing.

    Attributes: `training`; `refusal`, set where it is None; `lost`, whether that costs a block that has one.
    """

    def __init__(self, block: Fused):
        super().__init__(block)
        self._kinds = self._read_kinds()
        self.training: training.Training | None = None
        self.refusal: str | None = self.odd()
        self.lost = True
        if self.refusal is not None:
            return
        try:
            form = block.read_form()
            self.lost = False
            self.training = training.Training(form)
        except Refused as refusal:
            self.refusal = str(refusal)

    @cached_property
    def tried(self) -> Tried:
        """What trials found about its steps."""
        return Tried(self._modules[0], self.training, self._read_tensors)

    def _read_kinds(self) -> list[tuple]:
        return [(type(t), t.shape if type(t) in PLAIN else None) for t in self._read_tensors()]

    def current(self) -> bool:
        """Whether the structure is as it was, and every weight of its class and shape."""
        return super().current() and self._read_kinds() == self._kinds


def _check_tensors(form: Form, tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Refuse what the host itself would refuse or promote: mixed devices, and weights of another dtype."""
    if len({t.device for t in tensors}) > 1:
        raise Refused("its weights are on more than one device")
    wrong = [unit for unit in form.units().values() if isinstance(unit, (ConvUnit, LinearUnit)) and unit.dtype != dtype]
    if wrong and not torch.is_autocast_enabled(tensors[0].device.type):
        raise Refused(f"{wrong[0].path} has {wrong[0].dtype} weights and the input is {dtype}")


def unfit(x: Tensor) -> str | None:
    """Why a call cannot be fused, from what is known without looking at the weights."""
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if x.is_meta:
        return "meta tensors have no values to compute with"
    if x.dim() != 4 or x.numel() == 0:
        return f"an input of shape {tuple(x.shape)} is left to the host"
    if x.is_neg():
        return "a negated view is left to the host"  # its memory has other values
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is computed by the host's own forward"
    return transformed()


def _key(x: Tensor, dtype: torch.dtype, casts: bool) -> tuple:
    """What a block has a plan for: all that is decided on when weights are packed."""
    return dtype, casts, forced_backend(), torch._C._get_mkldnn_enabled() if x.is_cpu else settings()


def _device_type(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type


class Freezable:
    """Mixin of what `freeze` reaches. What was derived from weights is dropped, and with it the promise that they stay,
    when they may have changed; it goes neither into copies nor into files.
    """

    @property
    def is_frozen(self) -> bool:
        """Whether the user promised that nothing changes."""
        return _FROZEN in self.__dict__

    def _forget(self, names: tuple[str, ...] = _DERIVED) -> None:
        """Drop the packed weights, and with them the promise that nothing changes."""
        for name in names:
            self.__dict__.pop(name, None)

    def train(self, mode: bool = True):
        self._forget(_PACKED)  # a step in training rests on no weights, and its trials on the step before
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self._forget()
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        return super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._forget()
        return replica

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name not in _DERIVED}


class Fused(Freezable):
    """Mixin before a host's block class. Subclasses set `host` and define `fused_form`.

    `trains` says that there is something to fuse in training mode: a norm with statistics of the batch.
    """

    host: type[nn.Module]
    trains: bool = True

    def fused_form(self) -> Form:
        """The block as a form over its own modules. Raises `Refused` where it is not exactly that form."""
        raise NotImplementedError

    def read_form(self) -> Form:
        """`fused_form` where nobody listens below the block. Whatever goes wrong in it is a refusal."""
        try:
            return self._checked_form()
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"it is not built like {self.host.__name__}: {type(error).__name__}: {error}") from error

    def _checked_form(self) -> Form:
        check_quiet(self)
        form = self.fused_form()
        form.check_channels()
        return form

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._traced(x)
        return self.step(x, False)[0]

    def step(self, x: Tensor, own: bool) -> tuple[Tensor, bool]:
        """The output, and whether nobody else can hold it: it was computed fused, without a gradient.

        `own` says so of x, which may then be overwritten.
        """
        if self.training:
            return self._trained(x) if self.trains else super().forward(x), False
        reason = unfit(x)
        plan = None
        if reason is None:
            plan, x, reason = self._plan(x)
        told = observer.get()
        if told is not None:
            told.block(self, x, plan, reason)
        if reason is not None:
            return self._by_host(x, reason, lost_speed=plan is not None), False
        if waiting and plan.calls:
            session.settle()
        waits, plan.calls = plan.waits() and forced_backend() is None, plan.calls + 1
        if waits:
            return super().forward(x), False
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in plan.tensors)):
            if plan.differentiated or _saved_tensors_are_seen():
                return super().forward(x), False
            return _Evaluated.apply(self, plan, x, *plan.tensors), False
        return self._run(plan.form, x, own), True

    @staticmethod
    def _run(form: Form, x: Tensor, own: bool = False) -> Tensor:
        device = _device_type(x)
        if not torch.is_autocast_enabled(device):
            return form.run(form.laid_out(x), own)
        with torch.autocast(device, enabled=False):
            return form.run(form.laid_out(x), own)

    def _trained(self, x: Tensor) -> Tensor:
        """The output in training mode."""
        reason, found, lost, names = unfit(x), None, False, None
        if reason is None and forced_backend() == "reference":
            return super().forward(x)
        if reason is None:
            reason = training.unserved(x)
        if reason is None:
            found = self.__dict__.get(_TRAINED)
            if found is None or not found.of(self) or not found.current():
                found = self.__dict__[_TRAINED] = Trained(self)
            reason, lost = found.refusal, found.lost
        if reason is None:
            reason = found.training.unfit(x)
        if reason is None and asked(x):
            names, words = found.tried.serving(x)
            reason = words if names is None else None
        told = observer.get()
        if told is not None:
            told.block(self, x, None, reason)
        if reason is not None:
            return self._by_host(x, f"in training mode {reason}", lost_speed=lost)
        return found.training.run(x, names)

    def tried(self, x: Tensor) -> Chosen | None:
        """What trials found about the training step on x that runs fused; None where they are not asked."""
        return self.__dict__[_TRAINED].tried.serving(x) if asked(x) else None

    def _plan(self, x: Tensor) -> tuple[Plan | None, Tensor, str | None]:
        """The current plan for an input, and the input in the plan's dtype; or the reason why there is none."""
        device = _device_type(x)
        casts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if casts else x.dtype
        if dtype not in _DTYPES:
            return None, x, f"autocast to {dtype} is left to the host"
        plan = self._current(x, dtype, casts)
        if plan.refusal is not None:
            return plan, x, plan.refusal
        if plan.tensors and plan.tensors[0].device != x.device:
            return plan, x, f"the input is on {x.device}, the weights on {plan.tensors[0].device}"
        if recorded_elsewhere(x):
            return plan, x, _RECORDED
        if plan.in_channels is not None and x.shape[1] != plan.in_channels:
            return plan, x, f"an input of {x.shape[1]} channels is left to the host"
        if x.dtype != dtype:
            if not plan.form.casts_input:
                return plan, x, f"under autocast this block adds its {x.dtype} input to {dtype} results"
            x = x.to(dtype)
        return plan, x, None

    def _current(self, x: Tensor, dtype: torch.dtype, casts: bool) -> Plan:
        """The plan for x in a dtype, to which autocast `casts` other weights, made anew where the block has changed."""
        key = _key(x, dtype, casts)
        plans = self.__dict__.get(STATE)
        plan = plans.get(key) if plans is not None else None
        if plan is None or not plan.of(self) or not plan.current():
            plan = Plan(self, dtype, before=plan)
            self.__dict__[STATE] = {key: plan} if plans is None or len(plans) >= 4 else {**plans, key: plan}
        return plan

    def plan(self, x: Tensor, counted: bool = True) -> Plan | None:
        """The current plan for inputs like x, of which `unfit` says nothing, without autocast; None where a step would
        not use one. A plan that waits and is `counted` by nobody else has been called once more.
        """
        if self.training:
            return None
        plan = self._current(x, x.dtype, False)
        if plan.refusal is not None or recorded_elsewhere(x) or (plan.tensors and plan.tensors[0].device != x.device):
            return None
        if plan.waits():
            plan.calls += not counted
            return None
        return plan

    def follows(self, plan: Plan, x: Tensor) -> bool:
        """Whether a plan that `plan` gave before is what it would give for x; none is made."""
        plans = self.__dict__.get(STATE)
        if self.training or plans is None or plans.get(_key(x, x.dtype, False)) is not plan:
            return False
        return plan.of(self) and plan.current() and not (plan.tensors and plan.tensors[0].device != x.device)

    def _by_host(self, x: Tensor, reason: str, lost_speed: bool) -> Tensor:
        """The host's forward. Raises BackendError where a backend is forced; warns once where speed is lost unasked."""
        forced = forced_backend()
        if forced is not None:
            raise BackendError(
                f"{type(self).__name__}: the backend {forced!r} was asked for and the fused path does not apply: "
                f"{reason}. Lift the force (backend 'auto') to run the host's own forward."
            )
        if lost_speed:
            warnings.warn(f"{type(self).__name__} runs the host's own forward: {reason}", FallbackWarning, stacklevel=3)
        return super().forward(x)

    def _traced(self, x: Tensor) -> Tensor:
        """The path under torch.compile and torch.export: in evaluation through the operators, weights folded in the
        graph; in training mode the host's own forward, which a compiler fuses better (docs/training.md).

        ONNX knows no such operators: its exporter records the host's own forward.
        """
        if self.training:
            return super().forward(x)
        if x.dim() != 4 or x.dtype not in _DTYPES or x.is_meta or torch.onnx.is_in_onnx_export():
            return super().forward(x)
        if any(map(is_traceable_wrapper_subclass, self.parameters())):
            return super().forward(x)
        try:
            form = self._checked_form()
            form.check_evaluation()
        except Refused:
            return super().forward(x)
        if not form.casts_input and torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return form.run(x)

    def pin(self) -> list[tuple]:
        """What keeps the memory of the packed weights in use now from being freed, as long as it is held."""
        return [plan.pin() for plan in self.__dict__.get(STATE, {}).values() if plan.refusal is None]

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the host's own block."""
        return as_host(self)


def _saved_tensors_are_seen() -> bool:
    """Whether somebody counts or moves what autograd saves, as checkpointing does: the path has to stay the same."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class _Evaluated(torch.autograd.Function):
    """An evaluation-mode block under autograd: the fused forward, and a backward that first computes it again, step
    by step, from the input and the weights that it had.

    Nothing but these is saved. A block that was differentiated once runs the host's forward from then on: computing it
    twice pays only while nobody asks for a gradient.
    """

    @staticmethod
    def forward(ctx, block: Fused, plan: Plan, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.name, ctx.plan, ctx.form = type(block).__name__, plan, with_tensors(plan.unbound, {})
        device = x.device.type
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.save_for_backward(x, *tensors)
        y = block._run(plan.form, x)
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # which the caller may write to

    @staticmethod
    def backward(ctx, dy: Tensor):
        ctx.plan.differentiated = True
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if ctx.plan.stepped or not ctx.plan.memory_current():
            raise RuntimeError(
                f"{ctx.name}: a weight or running statistic was changed between forward and backward, so the gradient "
                "cannot be computed any more; call backward before the change"
            )
        again = torch.is_grad_enabled()
        device, enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
            # The leaves themselves would call their hooks, which they do when these gradients reach them.
            x, *tensors = (
                t if not need else t.view_as(t) if again else t.detach().requires_grad_()
                for t, need in zip(saved, needs, strict=True)
            )
            instead = {id(t): alias for t, alias in zip(ctx.plan.tensors, tensors, strict=True)}
            y = with_tensors(ctx.form, instead).run(x)
        wanted = [t for t, need in zip((x, *tensors), needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again, allow_unused=True))
        return None, None, *[next(found) if need else None for need in needs]


def check_quiet(block: nn.Module) -> None:
    """Refuse a block below which somebody listens, or has replaced the forward or another method of a module."""
    for path, module in block.named_modules():
        if path == "":
            continue
        if hooked(module):
            raise Refused(f"a hook is registered on {path}")
        # torch.compile of 2.11 cannot list a module's attributes.
        for name in ("forward",) if torch.compiler.is_compiling() else [*module.__dict__]:
            if name in module.__dict__ and callable(getattr(type(module), name, None)):
                raise Refused(f"the {name} of {path} was replaced")


def freeze(module: Freezable) -> None:
    """Take the module's weights as they are now, until `train`, `eval`, `load_state_dict` or a move of it."""
    module._forget(_PACKED)
    module.__dict__[_FROZEN] = True


def as_host(block: Fused) -> nn.Module:
    """A plain host block that shares the fused block's modules and parameters."""
    plain = object.__new__(type(block).host)
    plain.__dict__ = block.__getstate__()
    return plain
