"""What a training run is made of, each part timm's: model, optimizer, schedule, mixup, loss, and the processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import init_distributed_device, random_seed, world_info_from_env
from torch import nn

from ..inspect.verify import check_name
from .options import OptionError, TrainOptions
from .validate import build, place, usable_device


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def distributed(self) -> bool:
        return self.size > 1

    @property
    def primary(self) -> bool:
        return self.rank == 0


def is_primary() -> bool:
    """Whether this process, under torchrun or alone, is the one that writes files and is heard."""
    return world_info_from_env()[1] == 0


@contextmanager
def joined(options: TrainOptions) -> Iterator[World]:
    """Meet the other processes where there are any: those of the group that the caller has made, else torchrun's.

    Raises OptionError.
    """
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = not dist.is_initialized()
    if made:
        found = SimpleNamespace(device=name)
        try:
            init_distributed_device(found)  # which answers in its argument
        except (AssertionError, RuntimeError, ValueError) as error:
            raise OptionError(f"the device {name!r} cannot be used: {str(error).strip().splitlines()[0]}") from None
        world = World(usable_device(found.device), found.rank, found.world_size)
    else:
        local = f"cuda:{world_info_from_env()[0]}" if name == "cuda" else name
        world = World(usable_device(local), dist.get_rank(), dist.get_world_size())
    if options.sync_bn and world.device.type == "cpu":
        raise OptionError("sync_bn needs GPUs: torch has no synchronised batch norm on a CPU")
    yield world
    if made and world.distributed:  # after an error the others may wait for this process, until torchrun ends them
        dist.destroy_process_group()


def check_names(options: TrainOptions) -> None:
    """Raise UnknownModelError or OptionError where timm has no such model, optimizer or schedule."""
    check_name(options.model)
    try:
        optimizer_and_schedule(options, [nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))], 1.0)
    except Exception as error:  # unknown names, missing packages, and whatever optimizers and schedules assert
        reason = str(error).strip().split("\n")[0]
        raise OptionError(reason or f"timm refuses {options.opt} or {options.sched}: {error!r}") from error


def optimizer_and_schedule(options: TrainOptions, model: Any, lr: float) -> tuple[Any, Any, int]:
    """timm's optimizer and scheduler, and how many epochs the schedule has."""
    optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(options), "lr": lr})
    return optimizer, *create_scheduler_v2(optimizer, **scheduler_kwargs(options))


def learning_rate(options: TrainOptions, processes: int = 1) -> float:
    """The learning rate of a run: as given, else timm's rule from 0.1 for the 256 images of an update."""
    if options.lr is not None:
        return options.lr
    ratio = options.batch_size * options.grad_accum_steps * processes / 256
    return 0.1 * (math.sqrt(ratio) if any(name in options.opt.lower() for name in ("ada", "lamb")) else ratio)


def build_model(options: TrainOptions, num_classes: int, world: World) -> nn.Module:
    """The model on its device, with the same weights in every process. Raises what `validate.build` does."""
    random_seed(options.seed, 0)
    rates = {"drop_rate": options.drop, "drop_path_rate": options.drop_path}
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    model = build(options, options.pretrained, options.initial_checkpoint, num_classes, **rates)
    if options.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise OptionError(f"{options.model} has no gradient checkpointing") from None
    model = place(model, options, world.device)
    return convert_sync_batchnorm(model) if options.sync_bn and world.distributed else model


def mixup_and_loss(options: TrainOptions, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """timm's mixup where it is asked for, and the loss that goes with its targets."""
    mixup = None
    if options.mixup or options.cutmix:
        mixup = Mixup(options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=num_classes)
    return mixup, create_classification_loss("ce", smoothing=options.smoothing, soft_targets=mixup is not None)
