"""Datasets and loaders of timm, with errors that name the file: for training and for evaluation.

timm's folder reader goes on with the next image where one cannot be read, and gives up after ten in a row. So it does
here, and each file that was left out is named in a warning of this module's logger.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import Dataset, IterableDataset

from ..classify import UnreadableImageError
from ..weights.checkpoints import abridged
from .options import DataOptions, OptionError, TrainOptions

_logger = logging.getLogger(__name__)


class DatasetError(RuntimeError):
    """A dataset cannot be had or read; the message says why in one line."""


def open_dataset(options: DataOptions, split: str, training: bool = False, class_map: Any = None) -> Any:
    """A split of the dataset, as timm's `create_dataset` finds it. Raises DatasetError."""
    if options.data_dir is not None and not options.dataset_download and not options.data_dir.exists():
        raise DatasetError(f"there is no data folder '{options.data_dir}'")
    try:
        return create_dataset(
            options.dataset,
            root=None if options.data_dir is None else str(options.data_dir),
            split=split,
            class_map=class_map,
            is_training=training,
            download=options.dataset_download,
            batch_size=options.batch_size,
            seed=getattr(options, "seed", 42),
        )
    except Exception as error:  # whatever torchvision, datasets, a network or a disk can raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DatasetError(f"{options.dataset or options.data_dir}, split '{split}': {reason}") from error


def open_training(options: TrainOptions) -> tuple[Any, Any]:
    """The training and the validation split, with the same numbers for the same classes.

    Raises DatasetError; OptionError where a folder has not both splits, or the validation split has more classes.
    """
    trained = open_dataset(options, options.train_split, training=True)
    evaluated = open_dataset(options, options.val_split)
    roots = [getattr(getattr(split, "reader", None), "root", None) for split in (trained, evaluated)]
    if not options.dataset and options.data_dir.is_dir():
        for root, split, name in zip(roots, (options.train_split, options.val_split), ("train", "val"), strict=True):
            if root == str(options.data_dir):
                raise OptionError(f"'{options.data_dir}' has no folder '{name}' for the split '{split}'")
    known, found = classes(trained), classes(evaluated)
    if extra := found.keys() - known.keys():
        raise OptionError(f"classes of the split '{options.val_split}' without training images: {_names(extra)}")
    if found != known and not options.dataset:
        evaluated = open_dataset(options, options.val_split, class_map=known)
    return trained, evaluated


def classes(dataset: Any) -> dict[str, int]:
    """The number of each class by name; empty where the dataset does not say."""
    for holder in (getattr(dataset, "reader", None), dataset):
        if found := getattr(holder, "class_to_idx", None):
            return found
    return {}


def count_classes(options: DataOptions, dataset: Any) -> int:
    """Outputs of a model for this dataset: as many as asked for, else its classes. Raises OptionError."""
    known = max(classes(dataset).values(), default=-1) + 1
    if not (options.num_classes or known):
        raise OptionError("the dataset does not say how many classes it has: give num_classes")
    check_classes(dataset, options.num_classes or known)
    return options.num_classes or known


def check_classes(dataset: Any, outputs: int) -> None:
    """Raise OptionError where the dataset has classes that a model with so many outputs has not."""
    known = max(classes(dataset).values(), default=-1) + 1
    if known > outputs:
        raise OptionError(f"the dataset has {known} classes and the model {outputs}: num_classes is too small")


def loader(
    options: DataOptions, dataset: Any, config: dict[str, Any], device: torch.device, distributed: bool, **kwargs: Any
) -> Any:
    """timm's loader of a dataset: batches on the device, normalised. Raises OptionError for what timm refuses.

    Workers start anew with each epoch, from a seed that is drawn from torch's generator: one that lived on would carry
    the state of its own generators past what a checkpoint holds.
    """
    named = dataset if isinstance(dataset, IterableDataset) else _Named(dataset)
    try:
        return create_loader(
            named,
            **{"interpolation": config["interpolation"], **kwargs},
            **{key: config[key] for key in ("input_size", "mean", "std", "crop_pct", "crop_mode")},
            batch_size=options.batch_size,
            num_workers=options.workers,
            distributed=distributed,
            device=device,
            pin_memory=device.type == "cuda",
            persistent_workers=False,
        )
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"timm's loader refuses these options: {error or type(error).__name__}") from error


class _Named(Dataset):
    """A dataset that says which of its files could not be read."""

    def __init__(self, dataset: Any):
        self.dataset, self.tried = dataset, None
        if hasattr(dataset, "reader"):
            self.tried = dataset.reader = _Recorder(dataset.reader)

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        tried = [index] if self.tried is None else self.tried.indices
        if self.tried is not None:
            tried.clear()
        try:
            sample = self.dataset[index]
        except OSError as error:
            raise UnreadableImageError(f"'{self._file(index)}' is not an image that can be read: {error}") from error
        except RuntimeError as error:
            if len(tried) < 2:
                raise
            files = _names(self._file(one) for one in tried)
            raise UnreadableImageError(f"{len(tried)} images in a row that cannot be read: {files}") from error
        for broken in tried[:-1]:
            _logger.warning("'%s' is not an image that can be read: the next one takes its place", self._file(broken))
        return sample

    def _file(self, index: int) -> str:
        try:
            return self.tried.reader.filename(index, absolute=True) if self.tried else self.dataset.samples[index][0]
        except (AttributeError, KeyError, TypeError):
            return f"image {index}"


class _Recorder:
    """A reader of timm's that keeps in mind which samples were asked for."""

    def __init__(self, reader: Any):
        self.reader, self.indices = reader, []

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Any:
        self.indices.append(index)
        return self.reader[index]


@contextmanager
def reading() -> Iterator[None]:
    """Turns what goes wrong in the processes that read images into UnreadableImageError and DatasetError, in one line.

    It stands around whatever computes with the batches: torch raises from a signal handler when such a process dies.
    """
    try:
        yield
    except UnreadableImageError as error:  # from a worker with its traceback as text, the message at the end
        text = str(error).strip().splitlines()[-1]
        raise UnreadableImageError(text.rpartition(f"{UnreadableImageError.__name__}: ")[2]) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).split(". ")[0].rstrip(". ")
        raise DatasetError(f"a process that reads images died: {reason}; where memory is short, try fewer") from None


def _names(items: Any) -> str:
    return abridged(str(item) for item in items)
