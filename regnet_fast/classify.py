"""Images to classes: weights from the hub or a file, timm's preprocessing, and timm's class names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from .inspect.verify import unknown_model_errors
from .models import create_model
from .weights import load_checkpoint

HUB_TIMEOUT = 4.0
_BATCH = 16


class WeightsUnavailableError(RuntimeError):
    """The pretrained weights of a model could not be had; the message says why in one line."""


class UnreadableImageError(RuntimeError):
    """A file is no image that Pillow can read; the message says why in one line."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image: (index, name, probability), the best first."""

    image: str
    top: list[tuple[int, str, float]]

    def as_dict(self) -> dict[str, Any]:
        return {"image": self.image, "top": [{"index": i, "class": name, "probability": p} for i, name, p in self.top]}


def load(
    name: str,
    pretrained: bool = True,
    checkpoint: str | PathLike | None = None,
    num_classes: int | None = None,
    build: Callable[..., nn.Module] = create_model,
) -> nn.Module:
    """A model in evaluation mode, with weights from a checkpoint file if one is given, else from the hub if asked.

    Raises UnknownModelError; WeightsUnavailableError where the hub cannot be reached within seconds and its cache has
    not the weights; FileNotFoundError and CheckpointError for a checkpoint.
    """
    kwargs = {} if num_classes is None else {"num_classes": num_classes}
    with unknown_model_errors(name):
        if not pretrained or checkpoint is not None:
            model = build(name, pretrained=False, **kwargs)
        else:
            model = _build_pretrained(name, build, kwargs)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def _build_pretrained(name: str, build: Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    timm.get_pretrained_cfg(name)  # raises for an unknown tag, before anything is downloaded
    if not timm.is_model(name):
        return build(name, pretrained=True, **kwargs)
    with _hub_within(HUB_TIMEOUT) as answers:
        try:
            return build(name, pretrained=True, **kwargs)
        except Exception as error:  # whatever a network, a proxy, a disk or a missing file can raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if not answers:
                reason = "the Hugging Face hub does not answer and its cache has not got them"
            raise WeightsUnavailableError(f"{name}: its pretrained weights could not be loaded: {reason}") from error


@contextmanager
def _hub_within(timeout: float) -> Iterator[bool]:
    """Inside the block only the hub's cache is read where the hub does not answer in time; yields whether it does.

    Without this, a machine without a network waits through minutes of retries.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    answers = not before and _answers(constants.ENDPOINT, timeout)
    constants.HF_HUB_OFFLINE = not answers
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str, timeout: float) -> bool:
    """Whether a server answers anything at all in time; in a thread, since looking up its name knows no timeout."""
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub.utils import get_session

        try:
            get_session().head(url, timeout=timeout)
        except Exception:  # any failure means no answer
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def class_names(model: nn.Module) -> dict[int, str]:
    """The model's class names by index: those of its configuration, else ImageNet's for as many classes, else none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    count = getattr(model, "num_classes", None)
    labels, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if labels and len(labels) == count:
        described = descriptions if isinstance(descriptions, dict) else {}
        return {index: described.get(label, label) for index, label in enumerate(labels)}
    subset = timm.data.infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return {}
    info = timm.data.ImageNetInfo(subset)
    return {index: info.index_to_description(index) for index in range(count)}


def preprocessing(model: nn.Module, size: int | None = None) -> Callable[[Any], Tensor]:
    """timm's evaluation transform for a model, from a Pillow image to a tensor, at its own or another square size."""
    args = {} if size is None else {"input_size": (3, size, size)}
    config = timm.data.resolve_model_data_config(model, args=args)
    with torch.device("cpu"):  # where images are normalised, whatever torch's default device is
        return timm.data.create_transform(**config, is_training=False)


def open_image(path: str | PathLike) -> Any:
    """A Pillow image in RGB. Raises UnreadableImageError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UnreadableImageError(f"there is no image '{path}'") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them
        raise UnreadableImageError(f"'{path}' is not an image that can be read: {error}") from error


def rank(logits: Tensor, names: dict[int, str], top: int) -> list[tuple[int, str, float]]:
    """The most probable classes of one row of logits."""
    probabilities = logits.float().softmax(-1)
    best = probabilities.topk(min(top, probabilities.numel()))
    return [(i, names.get(i, ""), p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def predict(model: nn.Module, images: Sequence[str | PathLike], top: int = 5) -> Iterator[Prediction]:
    """Classify image files, in batches, on the model's device and in its dtype. Raises UnreadableImageError."""
    transform, names = preprocessing(model), class_names(model)
    parameter = next(model.parameters())
    for start in range(0, len(images), _BATCH):
        chunk = images[start : start + _BATCH]
        x = torch.stack([transform(open_image(path)) for path in chunk]).to(parameter.device, parameter.dtype)
        with torch.inference_mode():
            logits = model(x)
        for path, row in zip(chunk, logits, strict=True):
            yield Prediction(str(path), rank(row, names, top))
