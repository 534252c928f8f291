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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from .. import store
from .cuda.sources import FOLDER

OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
LINKED = ("-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 300  # seconds for the compiler

_MAP = (c_int64, c_int64, c_int64, c_int64, c_int)  # images, floats of one, channels, floats of a row; threads


class RawTerm(ctypes.Structure):
    """A summand of a join; pointers may be null."""

    _fields_ = (("x", c_void_p), ("norm", c_void_p), ("factor", c_void_p), ("activation", c_int64))


_PASSES = {
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


class Step(ctypes.Structure):
    """A step of a program (csrc/cpu/program.cpp)."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "activation", "images", "channels", "height", "width")),
        *((name, c_int64) for name in ("out_channels", "out_height", "out_width")),
        *((name, c_int64 * 2) for name in ("kernel", "stride", "padding", "dilation")),
        *((name, c_int64) for name in ("groups", "bfloat16", "planar", "before", "way")),
        *((name, c_void_p) for name in ("weight", "bias", "scale", "shift")),
        *((name, c_int64) for name in ("x", "y", "residual", "gate", "sums")),
    )


CHECK = ctypes.CFUNCTYPE(c_int)
"""What a program's run asks whether its result counts."""

_PROGRAM = {
    "lanes": (),
    "has_matrix_unit": (),
    "ask_for_large_pages": (c_void_p, c_int64),
    "packed_size": (POINTER(Step),),
    "pack_weight": (POINTER(Step), c_void_p, c_void_p, c_int),
    "bands_of": (POINTER(Step),),
    "new_program": (POINTER(Step), c_int64, c_int),
    "free_program": (c_void_p,),
    "scratch_size": (c_void_p,),
    "run_program": (c_void_p, POINTER(c_void_p), c_void_p, c_int, CHECK, POINTER(c_double)),
}


class Source(NamedTuple):
    """What a library is compiled from: files of csrc/cpu, of which the compiler is given each .cpp, at the same time;
    the arguments of its functions by name, and the results of those that have one; further options.
    """

    files: tuple[str, ...]
    functions: dict[str, tuple[type, ...]]
    results: Mapping[str, type] = MappingProxyType({})
    options: tuple[str, ...] = ()
    needed: bool = True  # else nobody waits for another process that compiles it


SOURCES = {
    "passes": Source(("passes.cpp",), _PASSES),
    "program": Source(
        (
            *("program.cpp", "kernels_float32.cpp", "kernels_bfloat16.cpp"),
            *("pace.h", "matrix.h", "matrix_plan.h", "amx.h", "depthwise.h", "winograd.h", "convolution.h"),
            *("panel.h", "plan.h", "kernels.h", "vector.h"),
        ),
        _PROGRAM,
        {
            "lanes": c_int64,
            "has_matrix_unit": c_int,
            "packed_size": c_int64,
            "bands_of": c_int64,
            "scratch_size": c_int64,
            "new_program": c_void_p,
            "run_program": c_int,
        },
        ("-ffp-contract=fast",),
        needed=False,
    ),
}
"""The libraries: the passes of a training step, and programs in evaluation."""


class LibraryError(RuntimeError):
    """csrc/cpu cannot be compiled or loaded here; the message says why."""


_lock = threading.Lock()


@functools.lru_cache(maxsize=len(SOURCES))
def library(name: str) -> ctypes.CDLL:
    """The functions of a library of `SOURCES`. The first call of a process may compile them, in some seconds.

    Raises LibraryError, in every call the same.
    """
    with _lock:
        found = _loaded(name)
    if isinstance(found, LibraryError):
        raise found
    return found


def refuse(name: str) -> str | None:
    """Why there is no library of a name, or None."""
    try:
        library(name)
    except LibraryError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=len(SOURCES))
def _loaded(name: str) -> ctypes.CDLL | LibraryError:
    source = SOURCES[name]
    try:
        if not sys.platform.startswith("linux"):
            raise LibraryError(f"csrc/cpu is compiled on Linux alone, and this is {platform.system()}")
        compiler_, *given = compiler()
        command = [compiler_, *OPTIONS, *source.options, *LINKED, *given]  # the user's own options have the last word
        texts = [(FOLDER / "cpu" / file).read_bytes() for file in source.files]
        key = store.key("cpu", *texts, *command, compiler_version(), _processor())
        return _load(store.stored(key, lambda: _compile(command, source), wait=source.needed), source)
    except LibraryError as error:
        return error
    except BlockingIOError:
        return LibraryError("another process is compiling csrc/cpu; the next one that starts will have it")
    except OSError as error:
        return LibraryError(f"csrc/cpu cannot be compiled or loaded: {error}")


def compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, else the first there is. Raises LibraryError."""
    given = shlex.split(os.environ.get("CXX", ""))
    found = next((path for path in map(shutil.which, given[:1] or COMPILERS) if path), None)
    if found is None:
        missing = f"CXX={given[0]}, which is not there" if given else f"no C++ compiler ({', '.join(COMPILERS)})"
        raise LibraryError(f"csrc/cpu is compiled at first use, and this machine has {missing}")
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


def _compile(command: list[str], source: Source) -> bytes:
    print(f"regnet_fast compiles csrc/cpu/{source.files[0]} for this processor, once: some seconds", file=sys.stderr)
    given = [FOLDER / "cpu" / file for file in source.files if file.endswith(".cpp")]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.so"
        if len(given) > 1:
            objects = [Path(folder) / f"{file.stem}.o" for file in given]
            commands = ([*command, "-c", "-o", str(o), str(file)] for o, file in zip(objects, given, strict=True))
            with ThreadPoolExecutor() as pool:
                list(pool.map(_output, commands))
            given = objects
        _output([*command, "-o", str(made), *map(str, given)])
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


def _load(content: bytes, source: Source) -> ctypes.CDLL:
    """The library, from a file that is gone when it is loaded. Raises LibraryError."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(content)
        file.flush()
        try:
            found = ctypes.CDLL(file.name)
            for name, arguments in source.functions.items():
                function = getattr(found, name)
                function.argtypes, function.restype = arguments, source.results.get(name)
        except (OSError, AttributeError) as error:
            raise LibraryError(f"csrc/cpu was compiled and cannot be loaded: {error}") from None
    return found
