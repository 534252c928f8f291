"""The CUDA kernels compiled when the package is built: what is asked for, what is compiled, and a module by nvcc."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from regnet_fast.backends import cuda_extension, cuda_plans, cuda_sources, cuda_store

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("nvcc", "cmake", "ninja")
missing = [tool for tool in TOOLS if shutil.which(tool) is None]
missing += [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
needs_tools = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def setup_file(monkeypatch, environment=()):
    """What setup.py defines, and what it gives to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    given = {}
    for name in [name for name in os.environ if name.startswith("REGNET_FAST_")]:
        monkeypatch.delenv(name)
    for name, value in dict(environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setuptools, "setup", given.update)
    return runpy.run_path(str(ROOT / "setup.py")), given


def test_setup_file_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_compiled_unasked(monkeypatch, value):
    _, given = setup_file(monkeypatch, {} if value is None else {"REGNET_FAST_BUILD_CUDA": value})
    assert given["ext_modules"] == [] and given["setup_requires"] == []


def test_a_build_brings_its_tools(monkeypatch):
    monkeypatch.setenv("PATH", "")
    _, given = setup_file(monkeypatch, {"REGNET_FAST_BUILD_CUDA": "1"})
    assert [one.name for one in given["ext_modules"]] == ["regnet_fast.backends._cuda"]
    assert [re.split(r"\W", one)[0] for one in given["setup_requires"]] == ["pybind11", "cmake", "ninja"]


def test_architectures(monkeypatch, tmp_path):
    """The environment's, else the visible cards'; without either an error that says what to set."""
    names, _ = setup_file(monkeypatch, {"REGNET_FAST_CUDA_ARCHITECTURES": "80;90, 120"})
    assert names["architectures"]() == ["80", "90", "120"]
    monkeypatch.setenv("REGNET_FAST_CUDA_ARCHITECTURES", "sm_90")
    with pytest.raises(names["SetupError"], match="Set REGNET_FAST_CUDA_ARCHITECTURES"):
        names["architectures"]()
    monkeypatch.delenv("REGNET_FAST_CUDA_ARCHITECTURES")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(names["SetupError"], match="no GPU is visible"):
        names["architectures"]()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '10.0\\n9.0\\n9.0\\n'\n")
    smi.chmod(0o755)
    assert names["architectures"]() == ["90", "100"]


def test_no_nvcc(monkeypatch, tmp_path):
    names, _ = setup_file(monkeypatch, {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)})
    monkeypatch.delenv("CUDACXX", raising=False)
    with pytest.raises(names["SetupError"], match=r"needs nvcc.*Without the variable the package installs"):
        names["compiler"]()
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert names["compiler"]() == str(nvcc)
    monkeypatch.setenv("CUDACXX", "/my/nvcc")
    assert names["compiler"]() == "/my/nvcc"


def test_as_many_compilers_as_there_is_memory_for(monkeypatch):
    names, _ = setup_file(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    read_text = Path.read_text
    for available, expected in ((100, 16), (9, 4), (1, 1), (None, 16)):
        text = "" if available is None else f"MemTotal: 1 kB\nMemAvailable:   {available << 20} kB\n"
        fake = lambda self, *a, text=text: text if str(self) == "/proc/meminfo" else read_text(self, *a)  # noqa: E731
        monkeypatch.setattr(Path, "read_text", fake)
        assert names["jobs"]() == expected


def test_the_digest_of_a_build_is_the_packages(monkeypatch):
    assert setup_file(monkeypatch)[0]["sources_digest"]() == cuda_sources.digest()


def instantiate(folder, *arches, **environment):
    command = [sys.executable, "-S", ROOT / "csrc" / "extension" / "instantiate.py", folder, *arches]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_what_is_compiled_is_what_the_plans_launch(tmp_path):
    """Both dtypes, with the parts of the means and without, at each batch; what has not changed is left as it is."""
    environment = {"REGNET_FAST_CUDA_MODELS": "regnety_016", "REGNET_FAST_CUDA_BATCHES": "32"}
    assert instantiate(tmp_path, "90", **environment).returncode == 0
    table = (tmp_path / "kernels.cpp").read_text()
    units = {path: path.read_text() for path in tmp_path.glob("*.cu")}
    for groups, size, stride, activation in ((5, 28, 1, "relu"), (14, 14, 1, "relu"), (2, 112, 2, "relu")):
        for dtype in cuda_plans.TYPES:
            for parts in (False, True):
                problem = cuda_plans.GroupedConv(32, size, size, groups, 24, stride, dtype)
                kernel = cuda_plans.grouped_conv_forward(problem, activation, parts).kernel
                assert sum(f'entry("{kernel}", {kernel})' in text for text in units.values()) == 1
    assert all(f"{path.stem}()" in table for path in units)
    times = {path: path.stat().st_mtime_ns for path in units}
    (tmp_path / "kernel_9999.cu").touch()
    assert instantiate(tmp_path, "90", **environment).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.cu")} == times


@pytest.mark.parametrize(
    ("arch", "model", "words"),
    [("91", "regnety_016", "no architecture 91"), ("90", "regnety", "no model"), ("90", "resnetv2_50", "none of")],
)
def test_what_cannot_be_compiled_is_said(tmp_path, arch, model, words):
    done = instantiate(tmp_path, arch, REGNET_FAST_CUDA_MODELS=model)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


SOURCES = ("CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("csrc", "regnet_fast/backends")
DATA = ("bench/cases.py", "bench/data/conv_shapes.tsv", "bench/data/models.tsv", "regnet_fast/__init__.py")


def wheel_bytes(folder: Path) -> bytes:
    """A wheel of the package with the kernels of one small model, built in a copy of what it is made from."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "build_info.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in (*SOURCES, *DATA):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    (source / "regnet_fast" / "csrc").symlink_to("../csrc")
    environment = os.environ | {
        "REGNET_FAST_BUILD_CUDA": "1",
        "REGNET_FAST_CUDA_ARCHITECTURES": "90",
        "REGNET_FAST_CUDA_MODELS": "regnety_032",
        "REGNET_FAST_CUDA_BATCHES": "1",
    }
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    command = [sys.executable, "-c", build]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    assert "-py3-none-any" not in wheel.name
    return wheel.read_bytes()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel's content. It is built once for the content of all that it is made from."""
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    paths = [
        path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.*")) if path.suffix not in (".pyc", ".so")
    ]
    paths += [ROOT / name for name in (*SOURCES, *DATA)] + [Path(__file__)]
    parts = [part for path in paths if path.is_file() for part in (path.name, path.read_bytes())]
    key = cuda_store.key(nvcc, sys.version, *parts)
    folder = tmp_path_factory.mktemp("built")
    content = cuda_store.stored(key, lambda: wheel_bytes(folder), ROOT / ".cache" / "extension")
    (folder / "wheel").write_bytes(content)
    with zipfile.ZipFile(folder / "wheel") as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"


@needs_tools
def test_a_wheel_with_kernels(unpacked):
    package = unpacked / "regnet_fast"
    assert sorted(path.name for path in unpacked.iterdir())[0] == "regnet_fast"
    assert (package / "csrc" / "device" / "primitives.cuh").exists() and not (package / "csrc" / "extension").exists()
    facts = json.loads((package / "backends" / "build_info.json").read_text())
    assert facts["architectures"] == [90] and facts["sources"] == cuda_sources.digest()


@needs_tools
def test_the_module_that_nvcc_makes(unpacked, monkeypatch):
    """It fits the package, has the plans' kernels, and answers wrong calls with errors."""
    monkeypatch.setattr(cuda_extension, "FOLDER", unpacked / "regnet_fast" / "backends")
    cuda_extension.kernels.cache_clear()
    assert cuda_extension.refuse(90) is None
    assert "built for sm_90, and the GPU is sm_80" in cuda_extension.refuse(80)
    launch = cuda_plans.grouped_conv_forward(cuda_plans.GroupedConv(1, 28, 28, 9, 24, 1, "bfloat16"), "relu", True)
    assert launch.kernel in cuda_extension.kernels() and len(cuda_extension.kernels()) == 12
    start, facts = cuda_extension.module().launch, (0, launch.grid, launch.threads, launch.shared, 0)
    with pytest.raises(ValueError, match="takes 11 arguments of 8 bytes, got 8 bytes"):
        start(launch.kernel, *facts, bytes(8))
    with pytest.raises(KeyError, match="nobody"):
        start("nobody", *facts, b"")
    with pytest.raises(TypeError):
        start(launch.kernel, *facts, [1] * 11)
    cuda_extension.kernels.cache_clear()


@needs_tools
@pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="there may be a GPU, which null pointers would crash"
)
def test_a_cuda_error_is_an_exception(unpacked, monkeypatch):
    monkeypatch.setattr(cuda_extension, "FOLDER", unpacked / "regnet_fast" / "backends")
    cuda_extension.kernels.cache_clear()
    name = min(cuda_extension.kernels())
    with pytest.raises(RuntimeError, match=r"grouped_conv_forward<.*: cudaError"):
        cuda_extension.module().launch(name, 0, (1, 1, 1), 128, 60000, 0, bytes(88))
    cuda_extension.kernels.cache_clear()
