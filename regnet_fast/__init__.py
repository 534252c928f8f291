"""regnet_fast: fused blocks for convolutional networks of timm, torchvision and transformers, with the same weights,
keys and calls.

Nothing is imported before it is used. Names that are not defined here are timm's, so that `import regnet_fast as timm`
runs code written for timm.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "create_model": "models",
    "list_models": "models",
    "list_pretrained": "models",
    "is_model": "models",
    "get_pretrained_cfg": "models",
    "model_entrypoint": "models",
    "rebuild": "models",
    "restore": "models",
    "freeze": "models",
    "graphed": "graphs",
    "ungraphed": "graphs",
    "explain": "inspect.explanation",
    "backend": "backends",
    "BackendError": "backends",
    "FallbackWarning": "blocks.fused",
    "CheckpointError": "weights",
    "convert": "weights.layouts",
    "convert_checkpoint": "weights.conversion",
}
_MODULES = ("backends", "blocks", "export", "functional", "hosts", "models", "ops", "trials", "weights")
_OPTIONAL = ("transformers",)  # what needs an extra, and is left out where everything is imported

__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in (*_MODULES, *_OPTIONAL):
        return importlib.import_module(f".{name}", __name__)
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    timm = importlib.import_module("timm")
    try:
        return getattr(timm, name)
    except AttributeError:
        pass
    try:
        return importlib.import_module(f"timm.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"neither regnet_fast nor timm has an attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
