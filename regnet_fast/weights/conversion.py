"""Checkpoint files and folders brought to another library's layout (`layouts`). Nothing in them is executed.

    transformers: a folder with config.json and model.safetensors        timm, torchvision: one file

A target is written beside its place and moved there when it is whole; after a failure there is none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .checkpoints import CheckpointError, StateDict, read_content, read_state_dict
from .layouts import Weights, check_layout, recognize

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX, _OLDER = "model.safetensors.index.json", "pytorch_model.bin"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
_ASSUMED = {"hidden_act": "relu", "downsample_in_first_stage": True}
"""Of transformers' configuration, what weights do not tell and what timm and torchvision always build."""


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did: where from and to, in which layouts, and how many tensors."""

    source: Path
    destination: Path
    layout: str
    to: str
    tensors: int
    config: dict[str, Any]


def convert_checkpoint(source: str | PathLike, destination: str | PathLike, to: str | None = None) -> Conversion:
    """Write the weights of a RegNetX or RegNetY in another library's layout.

    Args:
        source: a safetensors or torch file of timm, torchvision or transformers, or a folder of transformers.
        destination: a new .safetensors, .pth, .pt or .bin file for timm and torchvision, a new folder for transformers,
            which gets a config.json too (with LABEL_0, LABEL_1, ... for classes, since weights do not name them).
        to: "timm", "torchvision" or "transformers"; by default timm where the destination has one of these suffixes,
            else transformers.

    Raises ValueError for another `to` or an unfit destination, FileExistsError where the destination is there, what
    `read_state_dict` raises, and CheckpointError where the source is no such model, or one that the other library does
    not have. Nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    to = to or ("timm" if destination.suffix in _SUFFIXES else "transformers")
    check_layout(to)
    _check_destination(destination, to)
    config = _read_config(source) if source.is_dir() else None
    weights = _recognized(source, _read_folder(source) if source.is_dir() else read_state_dict(source))
    if config is not None:
        _check_config(source, config, weights, to)
    try:
        state = weights.under(to)
    except CheckpointError as error:
        raise CheckpointError(f"cannot convert '{source}' to {to}: {error}") from None
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
        new = Path(folder) / destination.name
        if to == "transformers":
            new.mkdir()
            described = json.dumps(config or _full_config(weights), indent=2, sort_keys=True)
            (new / _CONFIG).write_text(described + "\n", encoding="utf-8")
            _save(state, new / _WEIGHTS)
        else:
            _save(state, new)
        new.rename(destination)
    return Conversion(source, destination, weights.layout, to, len(state), weights.config)


def _check_destination(path: Path, to: str) -> None:
    if to == "transformers" and path.suffix in _SUFFIXES:
        raise ValueError(f"a transformers model is a folder: '{path}' is the name of a file")
    if to != "transformers" and path.suffix not in _SUFFIXES:
        raise ValueError(f"weights of {to} are one file, {', '.join(_SUFFIXES)}: '{path}' is none of them")
    if path.exists():
        raise FileExistsError(f"'{path}' exists already: name another, or remove it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder '{path.parent}'")


def _recognized(source: Path, state: StateDict) -> Weights:
    try:
        return recognize(state)
    except CheckpointError as error:
        raise CheckpointError(f"cannot convert '{source}': {error}") from None


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder of transformers; None for a folder without one, or of another library."""
    if not (folder / _CONFIG).is_file():
        return None
    config = _read_json(folder / _CONFIG)
    if "model_type" not in config:
        return None
    if config["model_type"] != "regnet":
        raise CheckpointError(f"'{folder}' holds a model of type {config['model_type']!r}, not a RegNet")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{path}' is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds no JSON object")
    return content


def _read_folder(folder: Path) -> StateDict:
    """The weights of a folder: one safetensors file, several with an index, or an older torch file."""
    for name in (_WEIGHTS, _OLDER):
        if (folder / name).is_file():
            return read_state_dict(folder / name)
    if not (folder / _INDEX).is_file():
        raise CheckpointError(f"'{folder}' holds none of {_WEIGHTS}, {_INDEX} and {_OLDER}")
    places = _read_json(folder / _INDEX).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"'{folder / _INDEX}' does not name the files of the weights beside it")
    state: StateDict = {}
    for name in names:
        state.update(read_content(folder / name))
    return state


def _check_config(folder: Path, config: Mapping[str, Any], weights: Weights, to: str) -> None:
    """Refuse a configuration that is not that of the weights, or that other libraries do not build."""
    for field in ("num_channels", "embedding_size", "hidden_sizes", "depths", "layer_type"):
        if field in config and config[field] != weights.config[field]:
            raise CheckpointError(
                f"cannot convert '{folder}': its config.json says {field}={config[field]!r}, and its weights have "
                f"{weights.config[field]!r}"
            )
    for field, value in _ASSUMED.items():
        if to != "transformers" and config.get(field, value) != value:
            raise CheckpointError(
                f"cannot convert '{folder}' to {to}: it has {field}={config[field]!r}, and the RegNets of {to} have "
                f"{value!r}, so that these weights would compute something else there"
            )


def _full_config(weights: Weights) -> dict[str, Any]:
    """A config.json for weights of timm or torchvision."""
    config = {**weights.config, **_ASSUMED, "model_type": "regnet"}
    config["dtype"] = str(weights.state["stem.conv.weight"].dtype).removeprefix("torch.")
    classifier = weights.state.get("head.fc.weight")
    if classifier is None:
        return {**config, "architectures": ["RegNetModel"]}
    labels = {str(index): f"LABEL_{index}" for index in range(len(classifier))}
    numbers = {label: int(index) for index, label in labels.items()}
    return {**config, "architectures": ["RegNetForImageClassification"], "id2label": labels, "label2id": numbers}


def _save(state: StateDict, path: Path) -> None:
    alone = {key: _alone(value) for key, value in state.items()}
    if path.suffix in _TORCH_SUFFIXES:
        torch.save(alone, path)
    else:
        safetensors.torch.save_file(alone, path, metadata={"format": "pt"})


def _alone(tensor: Tensor) -> Tensor:
    """The tensor itself where it is all of its memory, else a copy: a file takes a view's whole memory, or refuses."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
