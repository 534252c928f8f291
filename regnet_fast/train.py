"""Training of a model on a folder of images or a dataset, from timm's parts, so that an interrupted run can go on.

    open the data -> build the model -> for each epoch: train, evaluate, add a row to summary.csv, save the state

Everything random is drawn from generators whose states are saved, and the order of the images depends on the seed and
the epoch alone: a run that was killed and resumed computes what it would have computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import (
    ModelEmaV3,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    init_distributed_device,
    random_seed,
    reduce_tensor,
    trim_summary,
    update_summary,
    world_info_from_env,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import datasets, training_state
from .checkpoints import CheckpointError
from .options import OptionError, TrainOptions
from .timing import Announce, silent
from .validate import Evaluation, autocast, build, count_rebuilt, data_config, evaluate, place, usable_device
from .verify import check_name

SUMMARY = "summary.csv"
_ANNOUNCED = 50  # batches between two announcements of the loss, each of which waits for the device
_INCIDENTAL = ("data_dir", "dataset_download", "resume", "output", "workers", "device", "pretrained", "initial_checkpoint")


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why in one line."""


@dataclass(frozen=True)
class Epoch:
    """One epoch, counted from 0: mean training loss, the evaluation after it, and what it took."""

    epoch: int
    train_loss: float
    evaluation: Evaluation
    lr: float
    seconds: float
    images_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Everything in one level, the evaluation's values as eval_*."""
        content = asdict(self)
        return content | {f"eval_{key}": value for key, value in content.pop("evaluation").items()}


@dataclass(frozen=True)
class TrainResult:
    """A run: its epochs, those before a resumption included, and where its files are."""

    model: str
    output: Path
    epochs: list[Epoch]
    best_epoch: int
    best_top1: float
    num_classes: int
    rebuilt: int
    resumed_after: int | None

    def as_dict(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**content, "output": str(self.output), "epochs": [epoch.as_dict() for epoch in self.epochs]}


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def distributed(self) -> bool:
        return self.size > 1


def ignore(epoch: Epoch) -> None:
    """Does nothing with an epoch."""


def is_primary() -> bool:
    """Whether this process, under torchrun or alone, is the one that writes files and is heard."""
    return world_info_from_env()[1] == 0


def train(
    options: TrainOptions, progress: Announce = silent, on_epoch: Callable[[Epoch], None] = ignore
) -> TrainResult:
    """Train a model; under torchrun, together with the other processes.

    `progress` hears what is being done, `on_epoch` each epoch when its state is saved.

    Raises, each with one line, before anything is trained: OptionError, UnknownModelError, WeightsUnavailableError,
    CheckpointError, FileNotFoundError, DatasetError; later UnreadableImageError, DatasetError and TrainingError.
    """
    options.check()
    _check_names(options)
    benchmark = torch.backends.cudnn.benchmark
    world = _join(options)
    try:
        torch.backends.cudnn.benchmark = True
        run = _Run(options, world, progress)
        for epoch in range(run.start, run.epochs):
            run.epoch(epoch)
            on_epoch(run.history[-1])
    finally:
        torch.backends.cudnn.benchmark = benchmark
    if world.distributed:  # after an error the others may still wait for this process, and torchrun ends them
        torch.distributed.destroy_process_group()
    return run.result()


def _join(options: TrainOptions) -> World:
    """Meet the other processes where there are any. Raises OptionError."""
    found = SimpleNamespace(device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        init_distributed_device(found)  # into `found`
    except (AssertionError, RuntimeError, ValueError) as error:
        raise OptionError(f"the device {found.device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None
    world = World(usable_device(found.device), found.rank, found.world_size)
    if options.sync_bn and world.device.type == "cpu":
        raise OptionError("sync_bn needs GPUs: torch has no synchronised batch norm on a CPU")
    return world


def _check_names(options: TrainOptions) -> None:
    """Raise UnknownModelError or OptionError where timm has no such model, optimizer or schedule."""
    check_name(options.model)
    try:
        _optimizer_and_schedule(options, [nn.Parameter(torch.zeros(1))], 1.0)
    except Exception as error:  # unknown names, missing packages, and whatever optimizers and schedules assert
        raise OptionError(str(error).strip().split("\n")[0] or f"timm refuses {options.opt} or {options.sched}") from error


def _optimizer_and_schedule(options: TrainOptions, model: Any, lr: float) -> tuple[Any, Any, int]:
    """timm's optimizer and scheduler, and how many epochs the schedule has."""
    optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(options), "lr": lr})
    return optimizer, *create_scheduler_v2(optimizer, **scheduler_kwargs(options))


def learning_rate(options: TrainOptions, processes: int = 1) -> float:
    """The learning rate of a run: as given, else timm's rule from 0.1 for 256 images of an update."""
    if options.lr is not None:
        return options.lr
    ratio = options.batch_size * options.grad_accum_steps * processes / 256
    return 0.1 * (math.sqrt(ratio) if any(name in options.opt.lower() for name in ("ada", "lamb")) else ratio)


class _Run:
    """Everything that lives as long as a run."""

    def __init__(self, options: TrainOptions, world: World, progress: Announce):
        self.options, self.world, self.progress = options, world, progress
        self.output = self._output()
        state = training_state.read(options.resume, options.model) if options.resume else None
        trained, evaluated = datasets.open_training(options)
        self.num_classes = datasets.count_classes(options, trained)
        self._build_model()
        self._build_loaders(trained, evaluated)
        self.lr = learning_rate(options, world.size)
        self.optimizer, self.scheduler, self.epochs = _optimizer_and_schedule(options, self.model, self.lr)
        self.scaler = NativeScaler(world.device.type) if options.amp and options.amp_dtype == "float16" else None
        self.autocast = autocast(options, world.device)
        self.start, self.history, self.best = 0, [], {"epoch": -1, "top1": -1.0}
        random_seed(options.seed, world.rank)
        if state is not None:
            self._restore(state)
        if world.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            trim_summary(str(self.output / SUMMARY), self.start)

    def _output(self) -> Path:
        options = self.options
        default = Path("output", "train", f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_model_name(options.model)}")
        output = options.output or (options.resume.parent if options.resume else default)
        last = output / training_state.LAST
        if last.exists() and not (options.resume and options.resume.exists() and options.resume.parent.samefile(output)):
            raise OptionError(f"'{last}' is of another run: resume it, or name another output")
        return output

    def _build_model(self) -> None:
        options, world = self.options, self.world
        self.progress(f"building {options.model}")
        random_seed(options.seed, 0)  # the same weights in every process
        rates = {"drop_rate": options.drop, "drop_path_rate": options.drop_path}
        rates = {name: rate for name, rate in rates.items() if rate is not None}
        model = build(options, options.pretrained, options.initial_checkpoint, self.num_classes, **rates)
        if options.grad_checkpointing:
            try:
                model.set_grad_checkpointing(True)
            except (AttributeError, AssertionError):
                raise OptionError(f"{options.model} has no gradient checkpointing") from None
        self.model = place(model, options, world.device)
        if world.distributed and options.sync_bn:
            self.model = convert_sync_batchnorm(self.model)
        self.ema = None
        if options.model_ema:
            self.ema = ModelEmaV3(self.model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
        self.forward: nn.Module = self.model
        if world.distributed:
            ids = [world.device] if world.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=ids)

    def _build_loaders(self, trained: Any, evaluated: Any) -> None:
        options, world = self.options, self.world
        config = data_config(options, self.model)
        augmentation = {"no_aug": options.no_aug, "auto_augment": options.aa, "re_prob": options.reprob}
        if not options.no_aug:
            augmentation["interpolation"] = "random"
        place = (world.device, world.distributed)
        self.loader = datasets.loader(
            options, trained, config, *place, is_training=True, re_mode="pixel", **augmentation
        )
        self.eval_loader = datasets.loader(options, evaluated, config, *place)
        if not len(self.loader):
            images = f"{len(trained)} training images" + (f" in {world.size} processes" if world.size > 1 else "")
            raise OptionError(f"batch_size {options.batch_size} makes no whole batch of {images}")
        self.mixup = None
        if options.mixup or options.cutmix:
            self.mixup = Mixup(
                mixup_alpha=options.mixup,
                cutmix_alpha=options.cutmix,
                label_smoothing=options.smoothing,
                num_classes=self.num_classes,
            )
        self.criterion = create_classification_loss("ce", smoothing=options.smoothing, soft_targets=bool(self.mixup))
        self.criterion.to(world.device)

    def epoch(self, epoch: int) -> None:
        """Train, evaluate, write the row of the summary and save the state."""
        start = time.perf_counter()
        loss = self._train(epoch)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss) and self.scaler is None:
            raise TrainingError(f"the training loss of epoch {epoch} is {loss}; '{self.output}' has the state before it")
        if self.world.distributed:
            for model in filter(None, (self.model, self.ema)):
                distribute_bn(model, self.world.size, reduce=True)
        subject = self.model if self.ema is None else self.ema.module
        found = evaluate(subject, self.eval_loader, self.autocast, self.options.channels_last, self.progress)
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        lr = sum(lrs) / len(lrs)
        images = len(self.loader) * self.options.batch_size * self.world.size
        self.history.append(Epoch(epoch, loss, found, lr, seconds, images / seconds))
        best = found.top1 > self.best["top1"]
        if best:
            self.best = {"epoch": epoch, "top1": found.top1}
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, found.top1)
        state = self._state(epoch)
        if self.world.rank == 0:
            metrics = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
            update_summary(epoch, {"loss": loss}, metrics, str(self.output / SUMMARY), lr=lr)
            training_state.save(state, self.output, best)

    def _train(self, epoch: int) -> float:
        """One pass over the training images; returns the mean loss over all processes."""
        options, batches, steps = self.options, len(self.loader), self.options.grad_accum_steps
        self._order(epoch)
        self.forward.train()
        self.optimizer.zero_grad()
        updates, losses = epoch * math.ceil(batches / steps), []
        with datasets.reading():
            for index, (images, target) in enumerate(self.loader):
                if self.mixup is not None:
                    images, target = self.mixup(images, target)
                if options.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                update = (index + 1) % steps == 0 or index + 1 == batches
                together = batches % steps if index >= batches - batches % steps else steps
                with self.forward.no_sync() if self.world.distributed and not update else nullcontext():
                    with self.autocast():
                        loss = self.criterion(self.forward(images), target)
                    self._backward(loss / together, update)
                losses.append(loss.detach())
                if update:
                    self.optimizer.zero_grad()
                    updates += 1
                    if self.ema is not None:
                        self.ema.update(self.model, step=updates)
                if index % _ANNOUNCED == 0:
                    self.progress(f"epoch {epoch}: batch {index + 1} of {batches}, loss {losses[-1].item():.4g}")
        mean = torch.stack(losses).float().mean()
        return (reduce_tensor(mean, self.world.size) if self.world.distributed else mean).item()

    def _backward(self, loss: Tensor, update: bool) -> None:
        """Gradients, and the optimizer's step where it is time; a scaled step that overflowed is left out."""
        create_graph = getattr(self.optimizer, "is_second_order", False)
        parameters, clip = self.model.parameters(), self.options.clip_grad
        if self.scaler is not None:
            self.scaler(
                loss,
                self.optimizer,
                clip_grad=clip,
                parameters=parameters,
                create_graph=create_graph,
                need_update=update,
            )
            return
        loss.backward(create_graph=create_graph)
        if update:
            if clip is not None:
                dispatch_clip_grad(parameters, clip)
            self.optimizer.step()

    def _order(self, epoch: int) -> None:
        """The order of the images from the seed and the epoch alone, whatever else was drawn before."""
        sampler, dataset = self.loader.sampler, self.loader.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        elif hasattr(sampler, "set_epoch"):
            sampler.seed = self.options.seed
            sampler.set_epoch(epoch)
        elif hasattr(sampler, "generator"):
            sampler.generator = torch.Generator().manual_seed(self.options.seed + epoch)

    def _state(self, epoch: int) -> dict[str, Any]:
        """What a run goes on from after this epoch. All processes call it together."""
        return {
            "epoch": epoch,
            "arch": self.options.model,
            "version": 2,  # in timm's checkpoints: `epoch` is done
            "metric": self.history[-1].evaluation.top1,
            "state_dict": self.model.state_dict(),
            **({"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            **({self.scaler.state_dict_key: self.scaler.state_dict()} if self.scaler else {}),
            **({"plateau": plateau.state_dict()} if (plateau := self._plateau) else {}),
            "generators": training_state.generators(self.world.device),
            "best": self.best,
            "history": [asdict(one) for one in self.history],
            "options": _plain(self.options) | {"lr": self.lr, "processes": self.world.size},
        }

    @property
    def _plateau(self) -> Any:
        """The one scheduler with a state of its own, which timm does not save."""
        return getattr(self.scheduler, "lr_scheduler", None)

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises CheckpointError where it does not fit this run."""
        path = self.options.resume
        try:
            self.model.load_state_dict(state["state_dict"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["state_dict_ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler is not None and self.scaler.state_dict_key in state:
                self.scaler.load_state_dict(state[self.scaler.state_dict_key])
            self.start, self.best = state["epoch"] + 1, state["best"]
            self.history = [Epoch(**{**one, "evaluation": Evaluation(**one["evaluation"])}) for one in state["history"]]
            if self._plateau is not None and "plateau" in state:
                self._plateau.load_state_dict(state["plateau"])
            elif self.scheduler is not None:
                self.scheduler.step(self.start)
            if len(state["generators"]) == self.world.size:
                training_state.set_generators(state["generators"][self.world.rank], self.world.device)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = str(error).strip().replace("\n", " ")[:300]
            raise CheckpointError(f"'{path}' does not fit this run: {type(error).__name__}: {reason}") from error
        now = _plain(self.options) | {"lr": self.lr, "processes": self.world.size}
        before = state["options"]
        changed = [f"{key} {value} (was {before.get(key)})" for key, value in now.items() if value != before.get(key)]
        self.changed = changed

    def result(self) -> TrainResult:
        """What the run came to."""
        rebuilt, resumed = count_rebuilt(self.model), self.start - 1 if self.options.resume else None
        return TrainResult(
            self.options.model,
            self.output,
            self.history,
            self.best["epoch"],
            self.best["top1"],
            self.num_classes,
            rebuilt,
            resumed,
        )


def _plain(options: TrainOptions) -> dict[str, Any]:
    """The options on which the numbers of a run depend."""
    return {key: value for key, value in vars(options).items() if key not in _INCIDENTAL}
