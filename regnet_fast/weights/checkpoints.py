"""Checkpoint files: read without executing anything in them, and brought to timm's keys.

Safetensors and torch files, in the layouts of timm, of torchvision and SEER (through timm's own key filter), and of the
original RepVGG (https://github.com/DingXiaoH/RepVGG), which timm does not read.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from timm.models import clean_state_dict
from timm.models.regnet import _filter_fn as regnet_filter
from torch import Tensor

StateDict = dict[str, Tensor]

NUMPY_SUFFIXES = (".npz", ".npy")
_SAFETENSORS_MAX_HEADER = 100_000_000  # bytes, the format's own limit

_REPVGG_BLOCK_KEY = re.compile(
    r"(?:stage0|stage([1-9])\.(\d+))\.(rbr_dense|rbr_1x1|rbr_identity|rbr_reparam|se\.down|se\.up)\.(.+)"
)
_REPVGG_PARTS = {
    "rbr_dense": "conv_kxk",
    "rbr_1x1": "conv_1x1",
    "rbr_identity": "identity",
    "rbr_reparam": "reparam_conv",
    "se.down": "attn.fc1",
    "se.up": "attn.fc2",
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model. The model is as it was before the call."""


def read_state_dict(path: str | PathLike, use_ema: bool = True, device: str | torch.device = "cpu") -> StateDict:
    """Reads the tensors of a safetensors or torch file, whichever its content is, without executing anything in it.

    Training wrappers are opened in timm's order ('state_dict_ema' and 'model_ema' if `use_ema`, 'state_dict', 'model'),
    SEER (VISSL) files are brought to timm's keys, and the prefixes 'module.' and '_orig_mod.' are removed. Entries that
    are not tensors are left out.

    Raises what `read_content` raises, and CheckpointError for a file without tensors.
    """
    return _tensors(Path(path), _unwrap(read_content(path, device), use_ema))


def read_content(path: str | PathLike, device: str | torch.device = "cpu") -> Any:
    """Reads a safetensors or torch file as it is: tensors and plain Python containers, nothing executed.

    Raises FileNotFoundError, and CheckpointError if the file is a directory, empty, damaged, no checkpoint, or needs
    code to be executed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint file '{path}'")
    if path.is_dir():
        raise CheckpointError(
            f"'{path}' is a directory: name the weight file in it, or, where it holds a config.json, "
            f"use create_model('local-dir:{path}', pretrained=True)"
        )
    if path.suffix.lower() in NUMPY_SUFFIXES:
        raise CheckpointError(
            f"'{path}' is a NumPy archive, which only the model itself can read: use create_model(..., "
            "checkpoint_path=...), or custom_load=True in pretrained_cfg_overlay"
        )
    with path.open("rb") as file:
        head = file.read(9)
        file.seek(0)
        if not head:
            raise CheckpointError(f"'{path}' is empty (0 bytes)")
        try:
            if _is_safetensors(head):
                return safetensors.torch.load_file(path, device=str(device))
            if zipfile.is_zipfile(file):
                _check_records(file)
            file.seek(0)
            # An open file, because torch.load takes the name's extension for the format. timm's training
            # checkpoints keep their arguments as a Namespace, which is only data.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location=device, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            raise CheckpointError(_why_unreadable(path, head, error)) from error


def to_timm_keys(state: StateDict) -> StateDict:
    """Brings the layouts of other libraries to timm's keys; others are returned as they are."""
    if is_original_repvgg(state):
        return convert_repvgg(state)
    if "stem.0.weight" in state and any(key.startswith("trunk_output.") for key in state):
        return regnet_filter(state)
    return state


def convert_repvgg(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Renames the keys of an original RepVGG checkpoint (A, B and D2se; training or deployed form) to timm's.

    stage0.* -> stem.*, stage{k}.{i}.* -> stages.{k-1}.{i}.*, linear.* -> head.fc.*, and in each block rbr_dense ->
    conv_kxk, rbr_1x1 -> conv_1x1, rbr_identity -> identity, rbr_reparam -> reparam_conv, se.down/up -> attn.fc1/fc2.

    Returns a new dict with the same tensors. Raises CheckpointError for a key that is not of this layout.
    """
    converted = {}
    for key, value in state_dict.items():
        block = _REPVGG_BLOCK_KEY.fullmatch(key)
        if block:
            stage, index, part, rest = block.groups()
            prefix = f"stages.{int(stage) - 1}.{index}" if stage else "stem"
            converted[f"{prefix}.{_REPVGG_PARTS[part]}.{rest}"] = value
        elif key.startswith("linear."):
            converted[f"head.fc.{key.removeprefix('linear.')}"] = value
        else:
            raise CheckpointError(
                f"'{key}' is no key of an original RepVGG checkpoint (A, B or D2se: stage0 to stage4, linear)"
            )
    return converted


def is_original_repvgg(state: StateDict) -> bool:
    """Whether the keys are those of an original RepVGG file."""
    return any(key.startswith("stage0.rbr_") for key in state)


def abridged(items: Iterable[str], separator: str = ", ", limit: int = 4) -> str:
    """The first items, and '...' where there are more."""
    items = list(items)
    return separator.join(items[:limit]) + (f"{separator}..." if len(items) > limit else "")


def _is_safetensors(head: bytes) -> bool:
    """Whether a file that starts with these bytes is safetensors: the length of a JSON header, then the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_MAX_HEADER


def _check_records(file: IO[bytes]) -> None:
    """Refuse a torch archive in whose directory a record is damaged into an empty one or a folder.

    torch reads nothing for it, raises nothing, and the tensor shows whatever was in the memory of the process.
    """
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            folder = record.external_attr & 0x10
            if record.file_size and (folder or not record.compress_size):
                raise ValueError(f"its record {record.filename} is marked as {'a folder' if folder else 'empty'}")
            if record.compress_type != zipfile.ZIP_STORED:  # torch writes none, and does not see that one is damaged
                archive.read(record)


def _why_unreadable(path: Path, head: bytes, error: Exception) -> str:
    message = str(error)
    is_pickle_refusal = isinstance(error, pickle.UnpicklingError)
    if "TorchScript" in message or (is_pickle_refusal and ("GLOBAL" in message or head[:1] in (b"\x80", b"P"))):
        names = ", ".join(sorted(set(re.findall(r"GLOBAL ([\w.]+)", message))))
        return (
            f"'{path}' needs code execution to be read{names and f' (it names {names})'} and is refused. Where you "
            "trust its origin, load it with the library that wrote it and save model.state_dict() alone"
        )
    reason = "" if is_pickle_refusal else f": {message or type(error).__name__}"
    return f"'{path}' is not a readable safetensors or torch checkpoint: damaged, truncated or another format{reason}"


def _unwrap(content: Any, use_ema: bool) -> Any:
    """Returns the state dict in a training checkpoint, in timm's order of preference; `content` if there is none."""
    if isinstance(content, Mapping):
        for wrapper in (*(("state_dict_ema", "model_ema") if use_ema else ()), "state_dict", "model"):
            if isinstance(content.get(wrapper), Mapping):
                return content[wrapper]
    return content


def _tensors(path: Path, content: Any) -> StateDict:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, not a checkpoint (a dict of tensors)")
    entries = content
    if "classy_state_dict" in content:
        try:
            entries = regnet_filter(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{path}' is no SEER (VISSL) RegNet checkpoint: {error!r}") from error
    tensors = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"'{path}' is a checkpoint without tensors; its entries are {abridged(map(str, entries)) or 'none'}. "
            "Weights belong at its top level or under 'state_dict' or 'model'"
        )
    return clean_state_dict(tensors)
