"""Top-1, top-5 and loss of a model on a folder of images or a dataset, with timm's preprocessing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.utils import accuracy, reduce_tensor
from torch import nn
from torch.nn.functional import cross_entropy

from .. import models
from ..blocks.fused import Fused
from ..classify import load
from ..inspect.timing import Announce, silent
from ..inspect.verify import check_name
from . import datasets
from .options import DataOptions, OptionError, ValidateOptions


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and percentages over so many images."""

    loss: float
    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class Validation:
    """What `validate` found, and under which conditions."""

    model: str
    evaluation: Evaluation
    img_size: int
    crop_pct: float
    interpolation: str
    rebuilt: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self)
        return {"model": content.pop("model"), **content.pop("evaluation"), **content}


def validate(options: ValidateOptions, announce: Announce = silent) -> Validation:
    """Evaluate a model.

    Raises OptionError, UnknownModelError, WeightsUnavailableError, CheckpointError, FileNotFoundError, DatasetError and
    UnreadableImageError, each with one line.
    """
    options.check()
    check_name(options.model)
    device = usable_device(options.device)
    dataset = datasets.open_dataset(options, options.val_split)
    outputs = options.num_classes
    if options.checkpoint is not None:
        outputs = datasets.count_classes(options, dataset)
    announce(f"loading {options.model}")
    model = build(options, options.pretrained, options.checkpoint, outputs)
    datasets.check_classes(dataset, model.num_classes)
    place(model, options, device)
    config = data_config(options, model)
    loader = datasets.loader(options, dataset, config, device, distributed=False)
    start = time.perf_counter()
    found = evaluate(model, loader, autocast(options, device), options.channels_last, announce)
    seconds = time.perf_counter() - start
    conditions = (config["input_size"][-1], config["crop_pct"], config["interpolation"])
    return Validation(options.model, found, *conditions, count_rebuilt(model), seconds)


def evaluate(
    model: nn.Module,
    loader: Any,
    precision: Callable[[], Any] = nullcontext,
    channels_last: bool = False,
    announce: Announce = silent,
    distributed: bool = False,
) -> Evaluation:
    """Evaluate a model on all images of a loader; if `distributed`, all processes do so together, each on its share.

    Each image counts once: those by which timm's sampler makes the shares equal are left out. Raises DatasetError for
    a loader without images.
    """
    model.eval()
    share = getattr(loader.sampler, "num_valid_samples", None)
    sums, seen = [], 0
    with datasets.reading(), torch.inference_mode():
        for index, (images, target) in enumerate(loader):
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with precision():
                logits = model(images)
            left = len(target) if share is None else min(len(target), share - seen)
            if left:
                logits, target = logits[:left].float(), target[:left]
                correct = [percent * left / 100 for percent in accuracy(logits, target, topk=(1, 5))]
                sums.append(torch.stack([cross_entropy(logits, target, reduction="sum"), *correct]))
                seen += left
            announce(f"evaluated {index + 1} of {len(loader)} batches")
        total = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(3, dtype=torch.float64, device="cpu")
    total = torch.cat([total, total.new_tensor([float(seen)])])
    if distributed:
        total = reduce_tensor(total.to(next(model.parameters()).device), 1)
    loss, top1, top5, images = total.tolist()
    if not images:
        raise datasets.DatasetError("there are no images to evaluate")
    return Evaluation(loss / images, 100 * top1 / images, 100 * top5 / images, round(images))


def usable_device(name: str | None) -> torch.device:
    """The device of this name, else a GPU where there is one, else the CPU. Raises OptionError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"the device {name!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


def build(options: DataOptions, pretrained: bool, checkpoint: Any, num_classes: int | None, **kwargs: Any) -> nn.Module:
    """The model that is asked for, rebuilt unless it is to be timm's. Raises what `classify.load` does, OptionError."""
    create = partial(models._create_model if options.timm else models.create_model, **kwargs)
    try:
        return load(options.model, pretrained, checkpoint, num_classes, create)
    except TypeError as error:
        raise OptionError(f"{options.model} cannot be built so: {error}") from error


def place(model: nn.Module, options: DataOptions, device: torch.device) -> nn.Module:
    """Move a model to the device, in the memory format that is asked for."""
    return model.to(device, memory_format=torch.channels_last if options.channels_last else None)


def data_config(options: DataOptions, model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing for the model, at the size that is asked for. Raises OptionError."""
    config = resolve_data_config({"img_size": options.img_size}, model=model)
    trained = model.pretrained_cfg
    if trained.get("fixed_input_size") and config["input_size"] != trained["input_size"]:
        raise OptionError(f"{options.model} takes no other img_size than {trained['input_size'][-1]}")
    return config


def autocast(options: DataOptions, device: torch.device) -> Callable[[], Any]:
    """What makes the context in which a forward pass runs."""
    return partial(torch.autocast, device.type, getattr(torch, options.amp_dtype)) if options.amp else nullcontext


def count_rebuilt(model: nn.Module) -> int:
    """How many modules of a model run fused where they can."""
    return sum(isinstance(module, Fused) for module in model.modules())
