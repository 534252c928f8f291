"""The extension module with the kernels that were compiled when the package was built, where one fits."""

from __future__ import annotations

import functools
import importlib.util
import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

from . import sources

FOLDER = Path(__file__).resolve().parents[1]
BUILD = "REGNET_FAST_BUILD_CUDA=1 pip install ."


def refuse(arch: int | None = None) -> str | None:
    """Why there is no module that serves, on an architecture if one is given; or None."""
    reason = _found(FOLDER)[2]
    if reason is None and arch is not None and not any(b // 10 == arch // 10 and b <= arch for b in architectures()):
        built = ", ".join(f"sm_{one}" for one in architectures())
        reason = f"the extension module was built for {built}, and the GPU is sm_{arch}; build it again: {BUILD}"
    return reason


def architectures() -> tuple[int, ...]:
    """What the module was compiled for: compute capabilities times ten."""
    return tuple(_found(FOLDER)[1]["architectures"])


def built_with() -> str:
    """The version of nvcc that compiled the module."""
    return _found(FOLDER)[1]["cuda"]


@functools.lru_cache(maxsize=1)
def kernels() -> dict[str, str]:
    """What each kernel in the module takes, by its name expression: 'p' a pointer, 'i' an int32, 'f' a float32."""
    return module().kernels()


def module() -> ModuleType:
    """The module itself, where nothing refuses it."""
    return _found(FOLDER)[0]


@functools.lru_cache(maxsize=8)
def _found(folder: Path) -> tuple[ModuleType | None, dict[str, Any], str | None]:
    """The module of a folder, how it was built, and why it cannot be used."""
    paths = [folder / f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None, {}, f"the kernels were not compiled when the package was built ({BUILD})"
    try:
        info = json.loads((folder / "build_info.json").read_bytes())
        facts = [info["version"], info["sources"], info["architectures"], info["cuda"]]
        if [type(fact) for fact in facts] != [str, str, list, str] or {type(a) for a in facts[2]} != {int}:
            raise ValueError("its facts are not what they should be")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, {}, f"the extension module's build_info.json cannot be used: {error!r}; build it again: {BUILD}"
    import regnet_fast

    pairs = (("regnet_fast", info["version"], regnet_fast.__version__),)
    pairs += (("sources with the digest", info["sources"][:12], sources.digest()[:12]),)
    for what, built, have in pairs:
        if built != have:
            reason = f"the extension module was built for {what} {built}, and you have {have}; build it again: {BUILD}"
            return None, info, reason
    try:
        spec = importlib.util.spec_from_file_location(f"{__package__}._cuda", path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except ImportError as error:
        return None, info, f"the extension module cannot be loaded: {error}; build it again: {BUILD}"
    return loaded, info, None
