"""The numbers of a rebuilt model against timm's own, both judged by float64, stage by stage.

One set of weights, rounded to the compute dtype, and one input run three ways: on timm's forward in float64 (r), on
timm's forward in the compute dtype (e), and rebuilt (k). e is timm as it is deployed: in channels_last, in which ours
computes too, and with RepVGG's branches reparameterised, which ours folds as well. The rule is that of `judging`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import timm.utils
import torch
from torch import Tensor, nn

from ..hosts import named
from ..models import rebuild
from .judging import Check, judge
from .timing import Announce, silent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UnknownModelError(ValueError):
    """timm has no model of this name; the message says which names come close."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found: the checks in the order of the stages, and what was rebuilt and kept.

    `layers` are the same for every rebuilt module, in the order of execution. They show where an error comes from; the
    verdict is that of the stages.
    """

    model: str
    input_shape: tuple[int, ...]
    dtype: str
    device: str
    seed: int
    rebuilt: int
    kept: list[tuple[str, str, str]]
    checks: list[Check]
    layers: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The layer where our largest error is the most times eager's; None where nothing is rebuilt."""
        return max(self.layers, key=lambda check: check.ratio, default=None)

    @property
    def first_fault(self) -> Check | None:
        """The first layer beyond the rule."""
        return next((check for check in self.layers if not check.ok), None)

    def as_dict(self) -> dict[str, Any]:
        found = {name: [check.as_dict() for check in getattr(self, name)] for name in ("checks", "layers")}
        worst, fault = (check and check.stage for check in (self.worst, self.first_fault))
        return {**vars(self), **found, "worst_layer": worst, "first_faulty_layer": fault, "ok": self.ok}


def host_model(name: str, **kwargs: Any) -> nn.Module:
    """The host's own model, in evaluation mode: timm's with random weights, or another's (`hosts.named`).

    It is on the CPU, whatever torch's default device is. Raises UnknownModelError, with the host's message and the
    closest names, where it has no such model or tag.
    """
    with torch.device("cpu"):
        if named.is_named(name):
            try:
                return named.build(name).eval()
            except ValueError as error:
                raise UnknownModelError(str(error)) from error
        with unknown_model_errors(name):
            return timm.create_model(name, pretrained=False, **kwargs).eval()


def check_name(name: str) -> None:
    """Raise UnknownModelError, with the closest names, for a name or tag that is not registered with timm."""
    with unknown_model_errors(name):
        if ":" not in name:  # else the model comes from a hub or a directory
            if not timm.is_model(name):
                timm.create_model(name)
            timm.get_pretrained_cfg(name)


@contextmanager
def unknown_model_errors(name: str) -> Iterator[None]:
    """Turns timm's complaints about a model's name into UnknownModelError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag", "Model name", "Model architecture")):
            raise
        raise UnknownModelError(_with_close_names(error, name)) from error


def _with_close_names(error: Exception, name: str) -> str:
    architecture, _, tag = name.partition(".")
    if tag and timm.is_model(architecture):
        close = timm.list_models(f"{architecture}.*", pretrained=True)
    else:
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.6)
    return f"{str(error).rstrip('.')}. " + (f"Close: {', '.join(close)}" if close else "See timm.list_models()")


def input_size(model: nn.Module, size: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the model's input: the size it was trained for, or a square one of `size`."""
    default = (getattr(getattr(model, "config", None), "num_channels", 3), 224, 224)
    channels, height, width = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or default
    return (channels, size or height, size or width)


@torch.no_grad()
def randomize_norms(model: nn.Module, seed: int | torch.Generator = 0) -> nn.Module:
    """Give every norm random running statistics and a random affine transform, in place, and return the model.

        running_var, weight ~ U(0.5, 1.5)                 running_mean, bias ~ N(0, 0.2)

    A fresh timm model has the last norm of each residual branch zeroed, which hides half of every block. Where the
    output of a norm is added to something, its weight is smaller, so that neither activations nor rounding errors grow
    with depth: U(0.1, 0.3) at the end of a residual branch, U(0.3, 0.8) in the three branches of a RepVGG block.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
        tensor.copy_(drawn * (high - low) + low)

    def normal(tensor: Tensor) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu") * 0.2)

    norms = list(filter(is_norm, model.modules()))
    summed = dict(_summed_norms(model))
    for norm in norms:
        if getattr(norm, "weight", None) is not None:
            uniform(norm.weight, *summed.get(norm, (0.5, 1.5)))
        if getattr(norm, "bias", None) is not None:
            normal(norm.bias)
        if isinstance(getattr(norm, "v", None), nn.Parameter):  # EvoNorm: the slope of its gate
            uniform(norm.v, 0.5, 1.5)
        if isinstance(getattr(norm, "tau", None), nn.Parameter):  # filter response norm: its threshold
            normal(norm.tau)
    for norm in norms:
        if getattr(norm, "running_var", None) is not None:
            normal(norm.running_mean)
            uniform(norm.running_var, 0.5, 1.5)
    return model


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises per channel: it has running statistics, or a vector for its weight and its bias."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    has_vectors = isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim == bias.ndim == 1
    return has_vectors or isinstance(getattr(module, "running_var", None), Tensor)


def _summed_norms(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[float, float]]]:
    """The norms whose output is added to something else, with the range of their weights.

    A block is a smallest module that holds more than one norm beside its shortcut.
    """
    for block in model.modules():
        parts = [child for name, child in block.named_children() if name not in ("downsample", "shortcut")]
        norms = [[module for module in part.modules() if is_norm(module)] for part in parts]
        if sum(map(len, norms)) < 2 or max(map(len, norms), default=0) > 1:
            continue
        flat = [norm for part in norms for norm in part]
        if "repvgg" in type(block).__name__.lower():
            yield from ((norm, (0.3, 0.8)) for norm in flat)
        else:
            yield flat[-1], (0.1, 0.3)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of each stage by name, where the model can give them, and the logits."""
    stages: dict[str, Tensor] = {}
    if hasattr(model, "forward_intermediates"):
        features = model.forward_intermediates(x, intermediates_only=True)
        names = [info.get("module", "") for info in getattr(model, "feature_info", None) or []]
        if len(names) != len(features) or len(set(names)) != len(names):
            names = [f"feature {i}" for i in range(len(features))]
        stages.update(zip(names, features, strict=True))
    stages.update(named.results(model, x))
    return {name: value for name, value in stages.items() if isinstance(value, Tensor)}


@torch.no_grad()
def layer_outputs(model: nn.Module, x: Tensor, paths: Sequence[str]) -> dict[str, Tensor]:
    """What the modules of these paths return while the model runs once, in the order of execution."""
    found: dict[str, Tensor] = {}

    def hear(path: str) -> Callable:
        return lambda module, inputs, output: found.update({path: output.clone()})

    handles = [model.get_submodule(path).register_forward_hook(hear(path)) for path in paths]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def verify(
    name: str,
    batch: int = 2,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    announce: Announce = silent,
) -> Verification:
    """Run a model three ways on the same random weights and input, and judge every stage, the logits and every layer.

    Args:
        name: a timm model name, or one of `hosts.named`.
        batch: images.
        size: height and width; by default those the model was trained for.
        dtype: compute dtype of timm eager and of ours.
        device: where all three run.
        seed: of the weights and the input.
        announce: told what is about to run.

    Raises UnknownModelError.
    """
    announce(f"{name}: building")
    torch.manual_seed(seed)
    base = randomize_norms(host_model(name), seed).to(device, dtype)
    x = torch.randn(batch, *input_size(base, size), dtype=torch.float32, device="cpu").to(device, dtype)
    report = rebuild(copy.deepcopy(base))
    paths = [path for path, _ in report.rebuilt]
    last = torch.channels_last
    with torch.device(device):  # where timm makes the new convolutions
        deployed = timm.utils.reparameterize_model(copy.deepcopy(base).float(), inplace=True)
    deployed = deployed.to(dtype, memory_format=last)
    runs = []
    for what, model, images in (
        (f"regnet_fast in {_short(dtype)}", lambda: report.model, x),
        (f"timm eager in {_short(dtype)}", lambda: deployed, x.contiguous(memory_format=last)),
        ("timm eager in float64", base.double, x.double()),
    ):
        announce(f"{name}: {what}")
        runs.append((outputs(model(), images), layer_outputs(model(), images, paths)))
    checks, layers = (
        [judge(stage, ours[stage], eager[stage], reference[stage]) for stage in reference]
        for ours, eager, reference in zip(*runs, strict=True)
    )
    shape = tuple(x.shape)
    return Verification(
        name, shape, _short(dtype), device, seed, len(report.rebuilt), list(report.kept), checks, layers
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
