"""The CUDA C++ sources that the package brings, and their digest."""

from __future__ import annotations

import functools
from pathlib import Path

from .cuda_store import key

FOLDER = Path(__file__).resolve().parent.parent / "csrc"
INCLUDES = (FOLDER, FOLDER / "device")


@functools.lru_cache(maxsize=1)
def digest() -> str:
    """Of the names and contents of all sources and headers of the kernels. Raises OSError where one cannot be read."""
    paths = sorted(path for folder in INCLUDES for path in folder.glob("*.cu*"))
    return key(*(part for path in paths for part in (path.name, path.read_bytes())))
