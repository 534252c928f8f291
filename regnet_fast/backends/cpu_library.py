"""csrc/cpu compiled at first use by this machine's C++ compiler for its own processor, and loaded.

The library is kept on disk like all compiled kernels (`store`), by its source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from .. import store
from .cuda.sources import FOLDER

SOURCE = FOLDER / "cpu" / "passes.cpp"
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
LINKED = ("-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 300  # seconds for the compiler

_MAP = (c_int64, c_int64, c_int64, c_int64, c_int)  # images, floats of one, channels, floats of a row; threads


class RawTerm(ctypes.Structure):
    """A summand of a join; pointers may be null."""

    _fields_ = (("x", c_void_p), ("norm", c_void_p), ("factor", c_void_p), ("activation", c_int64))


FUNCTIONS = {
    "norm_rows": (*(c_void_p,) * 5, c_double, c_int64, c_int64),
    "raw_gradient_rows": (*(c_void_p,) * 6, c_double, c_double, c_int64, c_int64),
    "read_map": (*(c_void_p,) * 4, c_int, *_MAP),
    "sums_of_images": (*(c_void_p,) * 4, c_int, c_float, *_MAP),
    "gradient_through": (*(c_void_p,) * 7, c_int, *_MAP),
    "gradient_of_raw": (*(c_void_p,) * 5, *_MAP),
    "add_moments": (*(c_void_p,) * 3, c_int, *_MAP),
    "finished_moments": (*(c_void_p,) * 3, c_double, c_int64),
    "join_terms": (POINTER(RawTerm), c_int64, c_int, c_void_p, *_MAP),
    "join_gradients": (
        *(c_void_p, c_void_p, POINTER(RawTerm), c_int64, c_int, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
        *_MAP,
    ),
}
"""The arguments of the library's functions."""


class LibraryError(RuntimeError):
    """csrc/cpu cannot be compiled or loaded here; the message says why."""


_lock = threading.Lock()


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The functions of csrc/cpu. The first call of a process may compile them, in some seconds.

    Raises LibraryError, in every call the same.
    """
    with _lock:
        found = _loaded()
    if isinstance(found, LibraryError):
        raise found
    return found


def refuse() -> str | None:
    """Why there is no library, or None."""
    try:
        library()
    except LibraryError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | LibraryError:
    try:
        if not sys.platform.startswith("linux"):
            raise LibraryError(f"the passes of csrc/cpu are compiled on Linux alone, and this is {platform.system()}")
        command = compiler()
        source = SOURCE.read_bytes()
        parts = ("cpu", source, *command, *OPTIONS, *LINKED, compiler_version(), _processor())
        return _load(store.stored(store.key(*parts), lambda: _compile(command)))
    except LibraryError as error:
        return error
    except OSError as error:
        return LibraryError(f"the passes of csrc/cpu cannot be made or loaded: {error}")


def compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, else the first there is. Raises LibraryError."""
    given = shlex.split(os.environ.get("CXX", ""))
    found = next((path for path in map(shutil.which, given[:1] or COMPILERS) if path), None)
    if found is None:
        missing = f"CXX={given[0]}, which is not there" if given else f"no C++ compiler ({', '.join(COMPILERS)})"
        raise LibraryError(f"the passes of csrc/cpu are compiled at first use, and this machine has {missing}")
    return [found, *given[1:]]


def compiler_version() -> str:
    """The first line of what the compiler says of itself. Raises LibraryError."""
    return _output([*compiler(), "--version"]).partition("\n")[0].strip()


def _processor() -> str:
    """What -march=native makes of this machine depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    facts = re.findall(r"^(?:model name|cpu family|model|flags|Features|CPU part)\s*:.*$", text, re.MULTILINE)
    return "\n".join([platform.machine(), *sorted(set(facts))])


def _compile(command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "passes.so"
        _output([*command, *OPTIONS, *LINKED, "-o", str(made), str(SOURCE)])
        try:
            return made.read_bytes()
        except OSError:
            raise LibraryError(f"{shlex.join(command)} ended without an error and left no library") from None


def _output(command: list[str]) -> str:
    """What the compiler prints. Raises LibraryError with its message."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip()[-2000:]
        raise LibraryError(f"{shlex.join(command)} ended with status {error.returncode}: {message}") from None
    except subprocess.TimeoutExpired:
        raise LibraryError(f"{shlex.join(command)} took more than {PATIENCE} seconds") from None
    return done.stdout.decode(errors="replace")


def _load(content: bytes) -> ctypes.CDLL:
    """The library, from a file that is gone when it is loaded. Raises LibraryError."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(content)
        file.flush()
        try:
            found = ctypes.CDLL(file.name)
            for name, arguments in FUNCTIONS.items():
                function = getattr(found, name)
                function.argtypes, function.restype = arguments, None
        except (OSError, AttributeError) as error:
            raise LibraryError(f"the passes of csrc/cpu were compiled and cannot be loaded: {error}") from None
    return found
