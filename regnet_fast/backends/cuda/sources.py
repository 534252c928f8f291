"""The CUDA C++ sources that the package brings, and their digest. setup.py imports this file alone."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "csrc"
INCLUDES = (FOLDER, FOLDER / "device")


@functools.lru_cache(maxsize=1)
def digest() -> str:
    """Of the names and contents of all sources and headers of the kernels. Raises OSError where one cannot be read."""
    found = hashlib.sha256()
    for path in sorted(path for folder in INCLUDES for path in folder.glob("*.cu*")):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()
