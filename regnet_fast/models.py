"""Models: timm builds them, and the blocks that are known here are rebuilt fused. Names timm's `models` has and this
module has not are timm's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import timm.models
from timm.layers import is_exportable, is_scriptable
from timm.models import get_pretrained_cfg, is_model, list_pretrained
from torch import nn

from . import weights
from .blocks.chain import Chain
from .blocks.fused import Freezable, Fused
from .blocks.fused import freeze as freeze_part
from .blocks.network import Network
from .blocks.units import Refused
from .graphs import graphed
from .hosts.registry import candidates, chains, derived, networks

__all__ = [
    "Report",
    "create_model",
    "freeze",
    "get_pretrained_cfg",
    "is_model",
    "list_models",
    "list_pretrained",
    "model_entrypoint",
    "rebuild",
    "restore",
]

_create_model = getattr(timm.models.create_model, "__wrapped__", timm.models.create_model)
_model_entrypoint = getattr(timm.models.model_entrypoint, "__wrapped__", timm.models.model_entrypoint)


@dataclass
class Report:
    """What `rebuild` did: the model, the modules that run fused, and those that were left with the reason."""

    model: nn.Module
    rebuilt: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.rebuilt)} modules rebuilt, {len(self.kept)} kept"]
        lines += [f"  kept {path} ({name}): {reason}" for path, name, reason in self.kept]
        return "\n".join(lines)


def rebuild(model: nn.Module, inplace: bool = True) -> Report:
    """Turn every block of a network that is known here into its fused twin.

    A block keeps its modules, parameters, buffers and identity: only its class becomes a subclass of the host's. So
    state-dict keys, optimisers, hooks and references to the block stay as they are.

    Args:
        model: a timm model of any kind, a model of transformers or torchvision, or a network that contains such models
            or blocks.
        inplace: change the model itself; else a deep copy of it.

    Returns a `Report` with the model, what was rebuilt, and what was not and why. Raises TypeError for anything but a
    module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"rebuild takes a torch.nn.Module, got {type(model).__name__}")
    report = Report(model if inplace else copy.deepcopy(model))
    for path, module, cls in candidates(report.model):
        reason = why_not(module, cls)
        if reason is not None:
            report.kept.append((path, type(module).__name__, reason))
            continue
        module.__class__ = cls
        report.rebuilt.append((path, cls.__name__))
    for path, module, cls in derived(report.model):
        reason = f"it is derived from {cls.__name__} and may compute something else"
        report.kept.append((path, type(module).__name__, reason))
    for module, cls in (*chains(report.model), *networks(report.model)):
        module.__class__ = cls
    return report


def why_not(module: nn.Module, cls: type[Fused]) -> str | None:
    """Why a module could not run fused in evaluation as it is built, or None."""
    twin = object.__new__(cls)
    twin.__dict__ = {**module.__dict__, "training": False}
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = False
        twin.read_form()
    except Refused as refusal:
        return str(refusal)
    finally:
        for m, training in flags:
            m.training = training
    return None


def restore(model: nn.Module) -> nn.Module:
    """Undo `rebuild` in place: every fused block becomes the host's own class again, weights untouched. Returns
    the model. Raises TypeError, before anything is changed, where a module's class was derived from ours since.
    """
    rebuilt = [(path, m) for path, m in model.named_modules() if isinstance(m, (Fused, Chain, Network))]
    for path, module in rebuilt:
        if "host" not in vars(type(module)):
            raise TypeError(
                f"restore: {path or 'the model'} is {type(module).__qualname__}, a class that was put on top of "
                f"{type(module).__mro__[1].__qualname__}; undo that first, such as a parametrization "
                "(torch.nn.utils.parametrize.remove_parametrizations). Nothing was restored"
            )
    for _, module in rebuilt:
        if isinstance(module, Freezable):
            module._forget()
        module.__class__ = type(module).host
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Promise that the weights of a rebuilt model in evaluation mode stay as they are, and return the model.

    Otherwise every block looks in every call whether a weight, a statistic, a setting or a hook below it has changed,
    which at batch 1 on a CPU costs several percent (docs/cpu.md). A frozen block takes its weights as they are at its
    next call, and does not see in-place changes, replaced layers or parameters, nor hooks on inner modules. On a CPU a
    frozen network's program takes in the layers that stand in no block, as the stems and classifiers of ResNet and
    EfficientNet, RegNetV's stem and ResNetV2's last norm; other layers in their place and hooks on them are seen.

    `train()`, `eval()`, `load_state_dict()` and `to()` lift the promise, as do deep copies and pickling for the copy.
    Raises ValueError where a block is in training mode, since `eval()` would lift the promise at once.
    """
    parts = [(path, module) for path, module in model.named_modules() if isinstance(module, Freezable)]
    for path, module in parts:
        if module.training and isinstance(module, Fused):
            raise ValueError(f"freeze: {path or type(module).__name__} is in training mode; call model.eval() first")
    for _, module in parts:
        freeze_part(module)
    return model


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
    *,
    fused: bool = False,
) -> list[str]:
    """`timm.list_models`; with `fused`, of the architectures in which a convolution runs fused alone."""
    names = timm.models.list_models(filter, module, pretrained, exclude_filters, name_matches_cfg, include_tags)
    if not fused:
        return names
    known = fused_shares()
    return [name for name in names if name.split(".")[0] in known]


def fused_shares() -> dict[str, float]:
    """The share of the multiply-adds of timm's architectures in layers of rebuilt blocks, of those where there is any.

    As `python -m bench.architectures` counted it for timm 1.0.31; other options than the defaults may change it.
    """
    text = files(__package__).joinpath("hosts/timm/architectures.tsv").read_text()
    return {name: float(share) for name, share in (line.split("\t") for line in text.splitlines())}


def create_model(
    model_name: str,
    pretrained: bool = False,
    pretrained_cfg=None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    checkpoint_path=None,
    cache_dir=None,
    scriptable: bool | None = None,
    exportable: bool | None = None,
    no_jit: bool | None = None,
    *,
    graph: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model`, with every block that is known here rebuilt fused, as `rebuild` does.

    Arguments, defaults and errors are timm's. Beyond timm, `checkpoint_path` and an overlay's `file` also take original
    RepVGG checkpoints, and `checkpoint_path` deployed (reparameterised) ones. A model without a known block, and any
    model built with `scriptable` or `exportable` set, is exactly timm's. `graph` runs its calls in evaluation as CUDA
    graphs, as `regnet_fast.graphed` does.
    """
    overlay = weights.pretrained_overlay(pretrained_cfg_overlay) if pretrained else pretrained_cfg_overlay
    model = _create_model(
        model_name, pretrained, pretrained_cfg, overlay, None, cache_dir, scriptable, exportable, no_jit, **kwargs
    )
    if overlay is not pretrained_cfg_overlay:  # the converted weights are in the model now, not in its configuration
        model.pretrained_cfg.pop("state_dict", None)
        model.pretrained_cfg["file"] = pretrained_cfg_overlay["file"]
    if checkpoint_path:
        weights.load_checkpoint(model, checkpoint_path)
    scriptable = is_scriptable() if scriptable is None else scriptable
    exportable = is_exportable() if exportable is None else exportable
    if not scriptable and not exportable:
        rebuild(model)
    return graphed(model) if graph else model


create_model.__wrapped__ = _create_model  # by which a second import finds timm's original under ours


def model_entrypoint(model_name: str, module_filter: str | None = None) -> Callable[..., nn.Module]:
    """`timm.model_entrypoint`: the function that builds a model, which rebuilds it."""
    entrypoint = _model_entrypoint(model_name, module_filter)

    @functools.wraps(entrypoint)
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        model = entrypoint(*args, **kwargs)
        return model if is_scriptable() or is_exportable() else rebuild(model).model

    return build


def __getattr__(name: str) -> Any:
    """timm's, where a function that builds a model is the one that rebuilds it."""
    found = getattr(timm.models, name)
    return model_entrypoint(name) if is_model(name) else found
