"""Builds kernels for the CPU and runs launches: `run(launch, inputs, outputs)`, or a `SimulationError`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from regnet_fast.backends.cuda.plans import Launch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc"
CACHE = ROOT / ".cache" / "simulator"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-w")
ORDERS = {"ascending": 0, "descending": 1, "random": 2}
"""Seeds of the order in which warps run; every larger one is another random order."""
GAP = 4 << 20  # bytes between tensors: no access beyond one finds the next


class SimulationError(Exception):
    """What a GPU would have done wrong, or silently."""


class Buffer(ctypes.Structure):
    """Memory that a launch may reach."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("writable", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("buffers", ctypes.POINTER(Buffer)),
        ("buffer_count", ctypes.c_int),
        ("kernel", ctypes.c_char_p),
    )


def built(suffix: str, key: str, command: Callable[[str], list[str]]) -> Path:
    """A file made by a command, made once for each key."""
    CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\0".join((key, COMPILER, _version(), *FLAGS)).encode()).hexdigest()[:32]
    path = CACHE / (digest + suffix)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / ("made" + suffix)
            done = subprocess.run(command(str(made)), input=key, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{COMPILER} failed:\n{done.stderr[-4000:]}")
            made.replace(path)
    return path


@functools.cache
def _version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _engine() -> Path:
    text = (HERE / "fiber.h").read_text() + (HERE / "engine.cpp").read_text()
    return built(".o", text, lambda out: [COMPILER, *FLAGS, "-c", str(HERE / "engine.cpp"), "-o", out])


def flattened(source: str) -> str:
    """A source file of csrc/ with the headers of csrc/ in it, so that a test can change any line."""
    seen: set[str] = set()

    def include(match: re.Match) -> str:
        name = match[1]
        if not (SOURCES / name).exists() or name in seen:
            return "" if name in seen else match[0]
        seen.add(name)
        return re.sub(r'^#include "([\w.]+)"$', include, (SOURCES / name).read_text(), flags=re.M)

    text = re.sub(r'^#include "([\w.]+)"$', include, (SOURCES / source).read_text(), flags=re.M)
    return text.replace("#pragma once", "")


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor as they lie in memory."""
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    assert tensor.permute(order).is_contiguous(), "tensors are dense"
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


@functools.cache
def library_path(text: str, kernel: str) -> Path:
    """A kernel of a source's text, built for the CPU with the engine."""
    entry = '\n#include "entry.h"\nextern "C" void simulated_kernel(void** arguments) { enter(&%s, arguments); }\n'
    entry += 'extern "C" int simulated_sizes(int* sizes) { return sizes_of(&%s, sizes); }\n'
    unit = text + entry.replace("%s", kernel)
    paths = (HERE / "primitives.cuh", HERE / "entry.h", SOURCES / "elements.cuh")
    headers = "".join(path.read_text() for path in paths)
    includes = ("-I", str(HERE), "-I", str(SOURCES))
    return built(
        ".so",
        unit + "\n//" + hashlib.sha256((headers + _engine().name).encode()).hexdigest(),
        lambda out: [COMPILER, *FLAGS, "-shared", *includes, "-x", "c++", "-", "-x", "none", str(_engine()), "-o", out],
    )


@functools.cache
def _library(text: str, kernel: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path(text, kernel)))
    library.simulator_run.restype = ctypes.c_char_p
    return library


def run(
    launch: Launch,
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor | None],
    order: str | int = "ascending",
    text: str | None = None,
) -> None:
    """Run a launch on tensors on the CPU, by name; None is a null pointer.

    Raises SimulationError with kernel, block, thread and what happened. `text` replaces the source.
    """
    library = _library(flattened(launch.source) if text is None else text, launch.kernel)
    flat = {name: _flat(tensor) for name, tensor in (inputs | outputs).items() if tensor is not None}
    arena = torch.empty(sum(len(bits) + GAP for bits in flat.values()) + GAP, dtype=torch.uint8)
    values, buffers, addresses, place = [], [], {}, GAP
    for name, bits in flat.items():
        place += -(arena.data_ptr() + place) % 32 + 16  # aligned to 16 bytes and not to 32
        arena[place : place + len(bits)] = bits
        addresses[name] = arena.data_ptr() + place
        buffers.append(Buffer(addresses[name], len(bits), name in outputs, name.encode()))
        place += len(bits) + GAP - 64
    for argument in launch.arguments:
        if isinstance(argument, str):
            assert argument in flat or (inputs | outputs)[argument] is None
            values.append(ctypes.c_uint64(addresses.get(argument, 0)))
        else:
            values.append((ctypes.c_float if isinstance(argument, float) else ctypes.c_int32)(argument))
    sizes = (ctypes.c_int * 64)()
    count = library.simulated_sizes(sizes)
    assert list(sizes[:count]) == [ctypes.sizeof(value) for value in values], "the arguments are not the kernel's"
    assert launch.threads % 32 == 0, "threads come in warps"
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    given = _Launch(
        ctypes.cast(library.simulated_kernel, ctypes.c_void_p),
        pointers,
        launch.grid,
        launch.threads,
        launch.shared,
        ORDERS.get(order, order),
        (Buffer * len(buffers))(*buffers),
        len(buffers),
        launch.kernel.encode(),
    )
    message = library.simulator_run(ctypes.byref(given))
    for name, tensor in outputs.items():
        if tensor is not None:
            place = addresses[name] - arena.data_ptr()
            flat[name].copy_(arena[place : place + len(flat[name])])
    if message is not None:
        raise SimulationError(message.decode())
