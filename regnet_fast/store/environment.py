"""What a verdict holds for: the device, the libraries and the kernels that it was found with."""

from __future__ import annotations

import hashlib
import platform
import re
from functools import lru_cache
from pathlib import Path

import torch

from .. import __version__

_PACKAGE = Path(__file__).resolve().parents[1]
_KERNELS = (
    *("csrc/**/*.cu*", "csrc/**/*.cpp", "csrc/**/*.h", "kernels/*.py"),
    *("backends/**/*.py", "ops/*.py", "blocks/*.py"),
)


def environment(device: str) -> dict[str, str]:
    """The facts by name; where one differs another verdict may be right.

    On a CPU the processor with its instructions, the threads and oneDNN; on a GPU its model, the driver, CUDA and
    cuDNN; and everywhere torch, Triton and the text of all kernels.
    """
    kind = device.partition(":")[0]
    facts = {"torch": torch.__version__, "regnet_fast": __version__, "kernels": kernels_digest()}
    if kind == "cpu":
        return {"device": _cpu(), "threads": str(torch.get_num_threads()), "onednn": _onednn(), **facts}
    if kind == "cuda":
        return {"device": torch.cuda.get_device_name(device), **_cuda(), **facts}
    return {"device": kind, **facts}


def card(device: str) -> str:
    """What tells one GPU from all others; '' of a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.startswith("cuda") else ""


@lru_cache(maxsize=1)
def _cpu() -> str:
    """The processor's name and a digest of the instructions that it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", "model", "flags")}
    name, model, flags = (match.group(1).strip() if match else "" for match in found.values())
    return f"{name or platform.machine()} {model} {hashlib.sha256(flags.encode()).hexdigest()[:8]}".strip()


@lru_cache(maxsize=1)
def _onednn() -> str:
    match = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return match.group(1) if match else "none"


@lru_cache(maxsize=1)
def _cuda() -> dict[str, str]:
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().split("\n", 1)[0]
    except OSError:
        driver = "unknown"
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = "none"
    return {
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "cudnn": _cudnn(),
        "triton": compiler,
    }


def _cudnn() -> str:
    try:
        return str(torch.backends.cudnn.version())
    except RuntimeError:  # one of the GPUs here is too old for it
        return "refused"


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """A digest of the text of every kernel and of what plans, launches and composes them."""
    digest = hashlib.sha256()
    for pattern in _KERNELS:
        for path in sorted(_PACKAGE.glob(pattern)):
            digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
