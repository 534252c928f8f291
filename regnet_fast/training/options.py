"""What `train` and `validate` are asked for: timm's names, and what can be refused before anything is loaded.

Each field is also an option of the command line, and its annotation that option's help. Nothing heavy is imported here,
so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

AMP_DTYPES = ("float16", "bfloat16")


class OptionError(ValueError):
    """An option has a value that cannot be used, or does not fit the data; the message says why in one line."""


@dataclass(kw_only=True)
class DataOptions:
    """Where the images are and how they come to the model."""

    data_dir: Annotated[Path | None, "A folder with train/ and val/ below it, or the root of the dataset."] = None
    model: Annotated[str, "A timm model name, such as regnety_016."]
    dataset: Annotated[str, "A name that timm's create_dataset takes: torch/cifar10, hfds/NAME, ..."] = ""
    dataset_download: Annotated[bool, "Download the dataset where it can be."] = False
    val_split: Annotated[str, "The split that is evaluated."] = "validation"
    num_classes: Annotated[int | None, "Outputs of the model. [default: the classes of the dataset]"] = None
    img_size: Annotated[int | None, "Height and width of the images. [default: as the model was trained]"] = None
    batch_size: Annotated[int, "Images of a batch, in each process."] = 128
    workers: Annotated[int, "Processes that read images, for each process that computes."] = 4
    device: Annotated[str | None, "cpu, cuda, cuda:1, ... [default: cuda where there is one]"] = None
    channels_last: Annotated[bool, "Images and weights in channels_last."] = False
    amp: Annotated[bool, "Automatic mixed precision."] = False
    amp_dtype: Annotated[str, "float16 or bfloat16, for --amp."] = "float16"
    timm: Annotated[bool, "timm's model as it is, for comparison."] = False

    def check(self) -> None:
        """Raise OptionError for a value that can be refused without looking at the data or the model."""
        for name in ("num_classes", "img_size", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{name} is {value}, and must be at least 1")
        if self.workers < 0:
            raise OptionError(f"workers is {self.workers}, and must be at least 0")
        if self.amp_dtype not in AMP_DTYPES:
            raise OptionError(f"unknown amp_dtype {self.amp_dtype!r}; choose one of {', '.join(AMP_DTYPES)}")
        if self.data_dir is None and self.dataset.partition("/")[0].lower() not in ("hfds", "hfids", "tfds", "wds"):
            raise OptionError("there is no data folder: DATA_DIR is missing")


@dataclass(kw_only=True)
class TrainOptions(DataOptions):
    """A training run. Defaults are those of timm's own training script where it has the option."""

    train_split: Annotated[str, "The split that is trained on."] = "train"
    pretrained: Annotated[bool, "Start from the hub's weights."] = False
    initial_checkpoint: Annotated[Path | None, "Start from the weights in a file."] = None
    resume: Annotated[Path | None, "Go on after the last epoch of an interrupted run: its last.pth.tar."] = None
    output: Annotated[Path | None, "Folder of the run. [default: output/train/TIME-MODEL, or the resumed one]"] = None
    epochs: Annotated[int, "Epochs of the schedule."] = 300
    opt: Annotated[str, "timm's name of an optimizer."] = "sgd"
    lr: Annotated[float | None, "Learning rate. [default: 0.1 for 256 images, by timm's rule for others]"] = None
    momentum: Annotated[float, "For optimizers that have one."] = 0.9
    weight_decay: Annotated[float, "Not applied to biases and norms."] = 2e-5
    layer_decay: Annotated[float | None, "Learning rate of each group of layers, over that of the next."] = None
    sched: Annotated[str, "timm's name of a schedule: cosine, step, poly, wsd, none, ..."] = "cosine"
    warmup_epochs: Annotated[int, "Epochs of linear warm-up."] = 5
    warmup_lr: Annotated[float, "Learning rate at its start."] = 1e-5
    min_lr: Annotated[float, "Learning rate at the end of the schedule."] = 0.0
    decay_epochs: Annotated[float, "Epochs between the steps of --sched step."] = 90
    decay_rate: Annotated[float, "Factor of a step."] = 0.1
    clip_grad: Annotated[float | None, "Largest norm of the gradient."] = None
    grad_accum_steps: Annotated[int, "Batches of one update."] = 1
    grad_checkpointing: Annotated[bool, "Recompute activations in the backward pass, to save memory."] = False
    sync_bn: Annotated[bool, "Batch statistics over all processes."] = False
    drop: Annotated[float | None, "Dropout before the classifier."] = None
    drop_path: Annotated[float | None, "Stochastic depth."] = None
    smoothing: Annotated[float, "Label smoothing."] = 0.1
    mixup: Annotated[float, "Alpha of mixup; 0: none."] = 0.0
    cutmix: Annotated[float, "Alpha of CutMix; 0: none."] = 0.0
    aa: Annotated[str | None, "AutoAugment policy, such as rand-m9-mstd0.5."] = None
    reprob: Annotated[float, "Probability of random erasing."] = 0.0
    no_aug: Annotated[bool, "No augmentation: the evaluation's transform."] = False
    model_ema: Annotated[bool, "Keep and evaluate a moving average of the weights."] = False
    model_ema_decay: Annotated[float, "Its decay."] = 0.9998
    model_ema_warmup: Annotated[bool, "Let its decay grow from 0."] = False
    seed: Annotated[int, "Of the weights, the order of the data and the augmentation."] = 42

    def check(self) -> None:
        super().check()
        for name in ("epochs", "grad_accum_steps"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, and must be at least 1")
        for name in ("warmup_epochs", "seed", "mixup", "cutmix", "weight_decay"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}, and must be at least 0")
        for name in ("smoothing", "reprob", "drop", "drop_path", "model_ema_decay"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}, and must be between 0 and 1")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise OptionError(f"clip_grad is {self.clip_grad}, and must be positive")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise OptionError(f"mixup and cutmix take pairs of images, so batch_size cannot be {self.batch_size}")
        if self.resume and (self.pretrained or self.initial_checkpoint):
            raise OptionError("resume takes its weights from the run: drop pretrained and initial_checkpoint")


@dataclass(kw_only=True)
class ValidateOptions(DataOptions):
    """An evaluation."""

    checkpoint: Annotated[Path | None, "Weights from a file: safetensors or torch."] = None
    pretrained: Annotated[bool, "Weights from the hub, unless a checkpoint is given."] = True
