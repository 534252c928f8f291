"""What is installed, which devices there are, and which backend serves which dtype on each of them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import Counter
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..backends import ConvProblem, Geometry, cpu_library
from ..backends.cuda import extension, launcher, nvrtc
from ..kernels import tables
from ..models import rebuild

DTYPES = ("float32", "bfloat16", "float16")
BUSY = 0.5  # load average per core from which on times are called noisy


def package_version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """The version of regnet_fast, from the package itself: a checkout need not be installed."""
    import regnet_fast

    return getattr(regnet_fast, "__version__", None) or package_version("regnet_fast") or "unknown"


def cpu_name() -> str:
    """The processor's name as the system knows it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _library_versions() -> dict[str, str | None]:
    """oneDNN, MKL, CUDA and cuDNN, as far as this build of torch has them."""
    build = torch.__config__.show()
    onednn = re.search(r"MKL-DNN v([\d.]+)", build)
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", build)
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "oneDNN": onednn.group(1) if onednn else None,
        "MKL": mkl.group(1) if mkl else None,
        "CUDA": torch.version.cuda,
        "cuDNN": str(cudnn) if cudnn else None,
    }


def versions() -> dict[str, str | None]:
    """Versions by name; None for what is not installed."""
    names = ("timm", "transformers", "torchvision", "triton", "numpy", "cupy", "openvino", "onnxruntime")
    packages = {name: package_version(name) for name in names}
    own = {"regnet_fast": own_version(), "python": platform.python_version(), "torch": torch.__version__}
    return {**own, **packages, **_library_versions()}


def devices() -> list[dict[str, Any]]:
    """The CPU, then every CUDA device."""
    bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "bfloat16": bool(bfloat16 and bfloat16()),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "bfloat16": properties.major >= 8,
            }
        )
    return found


def probe(device: str, dtype: str) -> ConvProblem:
    """A small grouped convolution, the operation that every RegNet needs, to ask backends about."""
    facts = "relu", False, False, getattr(torch, dtype), device
    return ConvProblem((1, 64, 14, 14), 64, (3, 3), Geometry(padding=(1, 1), groups=8), *facts)


def support() -> list[dict[str, Any]]:
    """One row for each device, backend and dtype: whether the backend serves `probe`, and why not."""
    rows = []
    for device in devices():
        for backend in backends.BACKENDS:
            for dtype in DTYPES:
                reason = backends.refuse(backend, probe(device["device"], dtype))
                rows.append(
                    {
                        "device": device["device"],
                        "backend": backend,
                        "dtype": dtype,
                        "available": reason is None,
                        "reason": reason or "",
                    }
                )
    return rows


def tuned() -> list[dict[str, Any]]:
    """One row for each device that runs Triton's kernels: for how many shapes the fastest configuration is known."""
    rows = []
    for device in devices()[1:]:
        if backends.triton.refuse(probe(device["device"], "float32")) is None:
            shapes = sum(map(len, tables.known(torch.device(device["device"])).values()))
            rows.append({"device": device["device"], "shapes": shapes})
    return rows


def cuda_kernels() -> list[dict[str, Any]]:
    """How the CUDA C++ kernels get to each GPU, or where there is none could get to one: the way that is live, why each
    way cannot be taken or '', and what the compilers are.
    """
    rows = []
    for gpu in devices()[1:] or [{"device": None}]:
        refused = launcher.ways(int(gpu["capability"].replace(".", "")) if gpu["device"] else None)
        built = extension.refuse() is None
        rows.append(
            {
                "device": gpu["device"],
                "live": next((way for way, reason in refused.items() if reason is None), None),
                "refused": {way: reason or "" for way, reason in refused.items()},
                "built_for": [f"sm_{arch}" for arch in extension.architectures()] if built else [],
                "nvcc": extension.built_with() if built else None,
                "nvrtc": nvrtc.version() if nvrtc.refuse() is None else None,
            }
        )
    return rows


def cpu_kernels() -> dict[str, str | None]:
    """The compiler of csrc/cpu, whose passes float32 training takes on a CPU, or why torch's calls take their place.

    Compiles them where that was not done yet, in some seconds.
    """
    refused = cpu_library.refuse("passes")
    return {"compiler": None if refused else cpu_library.compiler_version(), "refused": refused}


def collect() -> dict[str, Any]:
    """Everything that `regnet-fast info` shows. Raises ValueError where REGNET_FAST_BACKEND names no backend."""
    return {
        "versions": versions(),
        "devices": devices(),
        "forced_backend": backends.forced_backend(),
        "backends": support(),
        "tuned": tuned(),
        "cuda_kernels": cuda_kernels(),
        "cpu_kernels": cpu_kernels(),
    }


def conditions(device: str = "cpu") -> dict[str, Any]:
    """What a measured number needs beside it: hardware, versions, commit, load and date."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "driver": _driver() if device.startswith("cuda") else None,
        "system": platform.platform(),
        **{name: version for name, version in versions().items() if version},
        **_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if hasattr(os, "getloadavg"):
        facts["load_average"] = round(os.getloadavg()[0], 2)
    return facts


def conditions_line(facts: dict[str, Any]) -> str:
    """The conditions in one line of text."""
    where = facts["cpu"]
    if facts["device"] != "cpu":
        where = f"{facts['device']} (driver {facts['driver']}), {where}"
    commit = f", commit {facts['commit'][:9]}" if "commit" in facts else ""
    commit += " with local changes" if facts.get("dirty") else ""
    load = f", load average {facts['load_average']} at the start" if "load_average" in facts else ""
    if facts.get("load_average", 0) > BUSY * (os.cpu_count() or 1):
        load += " (other work runs on this machine: these times are noisy)"
    return (
        f"{where}, {facts['threads']} threads, torch {facts['torch']}, timm {facts['timm']}, "
        f"regnet_fast {facts['regnet_fast']}{commit}, {facts['date'][:10]}{load}"
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(command) or "unknown").splitlines()[0]


def _commit() -> dict[str, Any]:
    """The commit that the package was imported from, where that is a git checkout; results and what is tuned make it no
    dirtier.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if not commit:
        return {}
    ours = (".", ":!bench/results", ":!kernels/tuned")
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--", *ours])
    return {"commit": commit, "dirty": bool(changes)}


def _output(command: list[str]) -> str:
    """What a command prints; '' where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def explain_model(
    name: str, batch: int, size: int | None, dtype: torch.dtype, device: str, train: bool = False
) -> dict[str, Any]:
    """The layers of a model with their totals, as `regnet-fast explain` shows them, of a training step where `train`
    says so; no layers outside our families.

    Raises UnknownModelError.
    """
    from .explanation import explain
    from .verify import host_model, input_size

    report = rebuild(host_model(name).to(device, dtype))
    shape = (batch, *input_size(report.model, size))
    rows = explain(report.model, shape, train) if report.rebuilt or report.kept else []
    served = Counter(row.backend for row in rows)
    return {
        "model": name,
        "input_shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "rebuilt": len(report.rebuilt),
        "kept": report.kept,
        "train": train,
        "layers": [{**asdict(row), "bytes": row.bytes} for row in rows],
        "totals": {
            "flops": sum(row.flops for row in rows),
            "bytes": sum(row.bytes for row in rows),
            "launches": sum(len(row.launches) for row in rows),
            "layers_by_backend": dict(served.most_common()),
        },
    }
