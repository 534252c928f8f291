"""Kernels of csrc/ compiled at first use by NVRTC, the compiler as a library: no nvcc, no GPU, no driver.

It is called through its C interface, in the copy that torch's CUDA builds bring and have loaded: nothing else has to be
installed to compile, and what it makes fits the CUDA version that torch runs on.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from ... import store
from . import sources

OPTIONS = ("--std=c++17", "--device-as-default-execution-space")


class CompileError(RuntimeError):
    """NVRTC refuses a source; the message is the compiler's own."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, and its mangled name in it."""

    name: str
    cubin: bytes


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if torch.version.cuda is None:
        return None
    try:
        return ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}")
    except OSError:
        return None


def refuse(arch: int | None = None) -> str | None:
    """Why nothing can be compiled, for an architecture if one is given; or None."""
    if torch.version.cuda is None:
        return "this build of torch is not for CUDA, so that it brings no NVRTC"
    if _library() is None:
        return f"NVRTC of CUDA {torch.version.cuda.partition('.')[0]}, which torch was built with, was not found"
    if arch is not None and arch not in architectures():
        known = ", ".join(f"sm_{one}" for one in architectures())
        return f"NVRTC {version()} compiles for {known}, and the GPU is sm_{arch}"
    return None


@functools.lru_cache(maxsize=1)
def version() -> str:
    """NVRTC's version, such as "13.2"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@functools.lru_cache(maxsize=1)
def architectures() -> tuple[int, ...]:
    """What NVRTC compiles for: compute capabilities times ten."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", found)
    return tuple(found)


def compiled(source: str, kernel: str, arch: int) -> Compiled:
    """A kernel of a source file of csrc/, from the disk or compiled now, in some seconds.

    Raises CompileError with the compiler's message.
    """
    options = (f"--gpu-architecture=sm_{arch}", *OPTIONS)
    key = store.key("nvrtc", version(), sources.digest(), source, kernel, *options)
    name, _, cubin = store.stored(key, lambda: _compile(source, kernel, options)).partition(b"\n")
    return Compiled(name.decode(), cubin)


def _compile(source: str, kernel: str, options: tuple[str, ...]) -> bytes:
    """The mangled name, a newline, and the machine code."""
    path, program, expression = sources.FOLDER / source, ctypes.c_void_p(), kernel.encode()
    _call("nvrtcCreateProgram", ctypes.byref(program), path.read_bytes(), source.encode(), 0, None, None)
    try:
        _call("nvrtcAddNameExpression", program, expression)
        given = [option.encode() for option in (*options, *(f"--include-path={one}" for one in sources.INCLUDES))]
        if _library().nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given)):
            log = _text("ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            raise CompileError(f"NVRTC {version()} cannot compile {kernel} of {path} ({' '.join(options)}):\n{log}")
        name = ctypes.c_char_p()
        _call("nvrtcGetLoweredName", program, expression, ctypes.byref(name))
        return name.value + b"\n" + _text("CUBIN", program)
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _text(what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    found = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, found)
    return found.raw


def _call(function: str, *arguments: object) -> None:
    result = getattr(_library(), function)(*arguments)
    if result:
        _library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"{function}: {_library().nvrtcGetErrorString(result).decode()}")
