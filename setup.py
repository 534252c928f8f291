"""Everything static is in pyproject.toml; this builds the CUDA kernels ahead of time where REGNET_FAST_BUILD_CUDA=1.

Otherwise the package is plain Python, and needs neither nvcc nor torch nor a GPU to be built. docs/building.md has the
variables of the environment.
"""

import contextlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
BUILD_CUDA = os.environ.get("REGNET_FAST_BUILD_CUDA", "0") not in ("", "0")
MODULE = "regnet_fast.backends._cuda"
INFO = "build_info.json"
MEMORY_OF_A_JOB = 1 << 30  # bytes: a quarter of that was seen, of nvcc and what it starts


def architectures() -> list[str]:
    """Compute capabilities times ten: the environment's, else those of the visible GPUs. Raises SetupError."""
    given = os.environ.get("REGNET_FAST_CUDA_ARCHITECTURES", "").replace(",", " ").replace(";", " ").split()
    if not given:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        except (OSError, subprocess.SubprocessError):
            seen = []
        given = sorted({capability.replace(".", "") for capability in seen}, key=int)
    if not given or not all(one.isdigit() for one in given):
        raise SetupError(
            f"REGNET_FAST_BUILD_CUDA=1: no architectures to compile for: {' '.join(given) or 'no GPU is visible'}. "
            "Set REGNET_FAST_CUDA_ARCHITECTURES to compute capabilities times ten, such as '80 90'"
        )
    return given


def jobs() -> int:
    """Compilers at once: as many as there are processors, and as there is memory for, free and in this container."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = [processors * MEMORY_OF_A_JOB]
    with contextlib.suppress(OSError, LookupError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory.append(int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) << 10)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        memory.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min(memory) // MEMORY_OF_A_JOB)


def lacking() -> list[str]:
    """What a build needs besides nvcc and a C++ compiler, and is not installed."""
    tools = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    return tools if importlib.util.find_spec("pybind11") else ["pybind11>=2.13", *tools]


def compiler() -> str:
    """nvcc: the environment's, else on the path, else in CUDA_HOME. Raises SetupError."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None:
        raise SetupError(
            "REGNET_FAST_BUILD_CUDA=1 needs nvcc, which is neither named by CUDACXX nor on the PATH nor in CUDA_HOME. "
            "Without the variable the package installs as it is, and NVRTC compiles the same kernels at first use"
        )
    return found


def sources_digest() -> str:
    """The digest by which the package knows that its sources are those that were compiled."""
    return runpy.run_path(str(ROOT / "regnet_fast" / "backends" / "cuda" / "sources.py"))["digest"]()


class BuildCuda(build_ext):
    """Has CMake build the extension module, and puts it with its build_info.json where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, arches = compiler(), architectures()
        if lacking():
            raise SetupError(f"REGNET_FAST_BUILD_CUDA=1 needs {', '.join(lacking())}, or pip with its build isolation")
        import pybind11

        build, target = Path(self.build_temp).resolve() / "cuda", Path(self.get_ext_fullpath(ext.name))
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": nvcc,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),  # pip's lies in a new place each time
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "REGNET_FAST_ARCHITECTURES": ";".join(arches),
            "REGNET_FAST_SOURCES": sources_digest(),
            "REGNET_FAST_VERSION": self.distribution.get_version(),
        }
        parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(jobs())
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        self.spawn([*configure, *(f"-D{key}={value}" for key, value in options.items())])
        self.spawn(["cmake", "--build", str(build), "--parallel", parallel])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next((build / "module").glob("_cuda.*")), target)
        shutil.copy(build / "module" / INFO, target.parent)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the module is found in the source tree, and so is what it was built from."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, *MODULE.split(".")[:-1], INFO)
        shutil.copy(built, ROOT.joinpath(*MODULE.split(".")[:-1]))


setup(
    ext_modules=[Extension(MODULE, sources=[])] if BUILD_CUDA else [],
    cmdclass={"build_ext": BuildCuda},
    setup_requires=lacking() if BUILD_CUDA else [],
)
