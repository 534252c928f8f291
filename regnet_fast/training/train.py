"""Training of a model on a folder of images or a dataset, from timm's parts, so that an interrupted run can go on.

    open the data -> build the model -> for each epoch: train, evaluate, add a row to summary.csv, save the state

The states of all random generators are saved, and the order of the images depends on the seed and the epoch alone: a
run that was killed and resumed computes what it would have computed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name
from timm.utils import (
    ModelEmaV3,
    NativeScaler,
    dispatch_clip_grad,
    distribute_bn,
    random_seed,
    reduce_tensor,
    trim_summary,
    update_summary,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..inspect.timing import Announce, silent
from ..weights.checkpoints import CheckpointError
from . import datasets, run_state
from .options import OptionError, TrainOptions
from .recipe import World, build_model, check_names, joined, learning_rate, mixup_and_loss, optimizer_and_schedule
from .validate import Evaluation, autocast, count_rebuilt, data_config, evaluate

SUMMARY = "summary.csv"
_ANNOUNCED = 50  # batches between two announcements of the loss, each of which waits for the device
# Options on which the numbers of a resumed run do not depend: where it began, and where it runs.
_START = {"pretrained", "initial_checkpoint", "resume"}
_PLACE = {"data_dir", "dataset_download", "output", "workers", "device"}
_logger = logging.getLogger(__name__)


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


def ignore(epoch: Epoch) -> None:
    """Does nothing with an epoch."""


def train(
    options: TrainOptions, progress: Announce = silent, on_epoch: Callable[[Epoch], None] = ignore
) -> TrainResult:
    """Train a model; under torchrun, together with the other processes.

    `progress` hears what is being done, `on_epoch` each epoch when its state is saved.

    Raises, each with one line, before anything is trained: OptionError, UnknownModelError, WeightsUnavailableError,
    CheckpointError, FileNotFoundError, DatasetError; later UnreadableImageError, DatasetError and TrainingError.
    """
    options.check()
    check_names(options)
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True
        with joined(options) as world:
            run = _Run(options, world, progress)
            for epoch in range(run.start, run.epochs):
                run.epoch(epoch)
                on_epoch(run.history[-1])
    finally:
        torch.backends.cudnn.benchmark = benchmark
    return run.result()


class _Run:
    """Everything that lives as long as a run."""

    def __init__(self, options: TrainOptions, world: World, progress: Announce):
        self.options, self.world, self.progress = options, world, progress
        self.output = _output(options)
        state = run_state.read(options.resume, options.model) if options.resume else None
        trained, evaluated = datasets.open_training(options)
        self.num_classes = datasets.count_classes(options, trained)
        progress(f"building {options.model}")
        self.model = build_model(options, self.num_classes, world)
        self._build_loaders(trained, evaluated)
        self.mixup, self.criterion = mixup_and_loss(options, self.num_classes)
        self.lr = learning_rate(options, world.size)
        self.optimizer, self.scheduler, self.epochs = optimizer_and_schedule(options, self.model, self.lr)
        self.scaler = NativeScaler(world.device.type) if options.amp and options.amp_dtype == "float16" else None
        self.autocast = autocast(options, world.device)
        self.ema = None
        if options.model_ema:
            self.ema = ModelEmaV3(self.model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
        self.forward: nn.Module = self.model
        if world.distributed:
            ids = [world.device] if world.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=ids)
        self.start, self.history, self.best = 0, [], {"epoch": -1, "top1": -1.0}
        random_seed(options.seed, world.rank)
        if state is not None:
            self._restore(state)
        if world.primary:
            self.output.mkdir(parents=True, exist_ok=True)
            trim_summary(str(self.output / SUMMARY), self.start)

    def _build_loaders(self, trained: Any, evaluated: Any) -> None:
        options, world = self.options, self.world
        config, where = data_config(options, self.model), (world.device, world.distributed)
        augmentation = {"no_aug": options.no_aug, "auto_augment": options.aa, "re_prob": options.reprob}
        if not options.no_aug:
            augmentation["interpolation"] = "random"
        self.loader = datasets.loader(
            options, trained, config, *where, is_training=True, re_mode="pixel", **augmentation
        )
        self.eval_loader = datasets.loader(options, evaluated, config, *where)
        if not len(self.loader):
            images = f"{len(trained)} training images" + (f" in {world.size} processes" if world.distributed else "")
            raise OptionError(f"batch_size {options.batch_size} makes no whole batch of {images}")

    def epoch(self, epoch: int) -> None:
        """Train, evaluate, write the row of the summary and save the state."""
        start = time.perf_counter()
        loss = self._train(epoch)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss) and self.scaler is None:
            raise TrainingError(f"the training loss of epoch {epoch} is {loss}; the files are as they were before it")
        if self.world.distributed:
            for model in (self.model, self.ema):
                if model is not None:
                    distribute_bn(model, self.world.size, reduce=True)
        subject = self.model if self.ema is None else self.ema.module
        how = (self.autocast, self.options.channels_last, self.progress, self.world.distributed)
        found = evaluate(subject, self.eval_loader, *how)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        lr = sum(rates) / len(rates)
        images = len(self.loader) * self.options.batch_size * self.world.size
        self.history.append(Epoch(epoch, loss, found, lr, seconds, images / seconds))
        best = found.top1 > self.best["top1"]
        if best:
            self.best = {"epoch": epoch, "top1": found.top1}
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, found.top1)
        state = self._state(epoch)
        if self.world.primary:
            metrics = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
            update_summary(epoch, {"loss": loss}, metrics, str(self.output / SUMMARY), lr=lr)
            run_state.save(state, self.output, best)

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
                alone = self.world.distributed and not update  # no gradients from the other processes yet
                with self.forward.no_sync() if alone else nullcontext():
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
            how = {"clip_grad": clip, "create_graph": create_graph, "need_update": update}
            return self.scaler(loss, self.optimizer, parameters=parameters, **how)
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
        else:
            sampler.generator = torch.Generator().manual_seed(self.options.seed + epoch)

    def _state(self, epoch: int) -> dict[str, Any]:
        """What a run goes on from after this epoch. All processes call it together."""
        state = {
            "epoch": epoch,
            "arch": self.options.model,
            "version": 2,  # timm's for checkpoints whose `epoch` is done
            "metric": self.history[-1].evaluation.top1,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": run_state.generators(self.world.device),
            "best": self.best,
            "history": [asdict(one) for one in self.history],
            "options": self._conditions(),
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        if self.scaler is not None:
            state[self.scaler.state_dict_key] = self.scaler.state_dict()
        if self._plateau is not None:
            state["plateau"] = self._plateau.state_dict()
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises CheckpointError where it does not fit this run."""
        changed: list[str] = []
        try:
            now = self._conditions()
            before = state["options"].items()
            changed += [f"{key} is {now.get(key)} and was {value}" for key, value in before if now.get(key) != value]
            self.model.load_state_dict(state["state_dict"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["state_dict_ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state[self.scaler.state_dict_key])
            self.start, self.best = state["epoch"] + 1, state["best"]
            self.history = [Epoch(**{**one, "evaluation": Evaluation(**one["evaluation"])}) for one in state["history"]]
            if self._plateau is not None:
                self._plateau.load_state_dict(state["plateau"])
            elif self.scheduler is not None:
                self.scheduler.step(self.start)
            if len(state["generators"]) == self.world.size:
                run_state.set_generators(state["generators"][self.world.rank], self.world.device)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            reasons = "; ".join([*changed, reason])
            raise CheckpointError(f"'{self.options.resume}' does not fit this run: {reasons}") from error
        if changed and self.world.primary:
            _logger.warning("resumed under other conditions: %s", ", ".join(changed))

    @property
    def _plateau(self) -> Any:
        """The part with a state of its own of the one scheduler that has such a part."""
        return getattr(self.scheduler, "lr_scheduler", None)

    def _conditions(self) -> dict[str, Any]:
        """What the numbers of a run depend on."""
        given = {key: value for key, value in vars(self.options).items() if key not in _START | _PLACE}
        return {**given, "lr": self.lr, "processes": self.world.size}

    def result(self) -> TrainResult:
        """What the run came to."""
        resumed = self.start - 1 if self.options.resume else None
        best, rebuilt = self.best, count_rebuilt(self.model)
        found = (self.history, best["epoch"], best["top1"], self.num_classes, rebuilt, resumed)
        return TrainResult(self.options.model, self.output, *found)


def _output(options: TrainOptions) -> Path:
    """The folder of the run. Raises OptionError where another run has its state there."""
    default = Path("output", "train", f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_model_name(options.model)}")
    output = options.output or (options.resume.parent if options.resume else default)
    last = output / run_state.LAST
    resumed = options.resume is not None and options.resume.exists() and options.resume.parent.samefile(output)
    if last.exists() and not resumed:
        raise OptionError(f"'{last}' is of another run: resume it, or name another output")
    return output
