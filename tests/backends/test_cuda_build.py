"""The CUDA kernels compiled when the package is built: what is asked for, what is compiled, and a module by nvcc."""

import ast
import ctypes
import importlib.util
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import regnet_fast
from csrc.extension import cuda_launches
from regnet_fast import store
from regnet_fast.backends import backend
from regnet_fast.backends.cpu_library import SOURCES
from regnet_fast.backends.cuda import extension, launcher, plans, sources
from regnet_fast.backends.cuda.plans import PROCESSORS, TYPES, Target

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = ROOT / "csrc" / "extension"


def needs(*tools):
    missing = [tool for tool in tools if shutil.which(tool) is None and importlib.util.find_spec(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
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


GB = 1 << 30


@pytest.mark.parametrize(
    ("free", "limit", "expected"),
    [(100, "max", 16), (9, "max", 9), (0.5, "max", 1), (None, None, 16), (100, 3 * GB, 3), (2, 50 * GB, 2)],
)
def test_as_many_compilers_as_there_is_memory_for(monkeypatch, free, limit, expected):
    """With 16 processors: by what is free on the machine, and by the limit of a container."""
    names, _ = setup_file(monkeypatch)
    files = {"/sys/fs/cgroup/memory.max": limit and f"{limit}\n"}
    files["/proc/meminfo"] = free and f"MemTotal: 1 kB\nMemAvailable:   {int(free * GB) >> 10} kB\n"

    def read_text(path):
        if files[str(path)] is None:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert names["jobs"]() == expected


def test_the_digest_of_a_build_is_the_packages(monkeypatch):
    assert setup_file(monkeypatch)[0]["sources_digest"]() == sources.digest()


# Which kernels


def instantiate(folder, *arches, **environment):
    command = [sys.executable, "-S", EXTENSION / "instantiate.py", folder, *arches]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def entries(folder):
    """The kernels of the translation units in a folder, with the sources that they are compiled from."""
    found = {}
    for path in folder.glob("*.cu"):
        text = path.read_text()
        pairs = re.findall(r'entry\("(.+)", (.+)\),$', text, re.MULTILINE)
        assert pairs and all(name == kernel and name not in found for name, kernel in pairs)
        found |= {name: re.match(r'#include "(.+)"', text)[1] for name, _ in pairs}
        assert f"{path.stem}()" in (folder / "kernels.cpp").read_text()
    return found


def test_what_is_compiled_is_what_the_plans_launch(tmp_path):
    """Every source, both directions, both dtypes, any batch; what has not changed is left as it is."""
    environment = {"REGNET_FAST_CUDA_MODELS": "regnety_016"}
    assert instantiate(tmp_path, "90", "86", **environment).returncode == 0
    found, planned = entries(tmp_path), {}
    for arch in (86, 90):
        target = Target(arch, PROCESSORS[arch])
        for groups, size, stride in ((2, 112, 2), (2, 56, 1), (5, 56, 2), (5, 28, 1), (14, 28, 2), (14, 14, 1)):
            for dtype in TYPES:
                for batch in (1, 3, 32, 300, 1024):
                    problem = plans.GroupedConv(batch, size, size, groups, 24, stride, dtype)
                    training = {"affine": 2, "norm": True, "sums": True, "activation": "relu", "target": target}
                    launches = [*plans.grouped_conv_backward(problem, **training)]
                    launches += [plans.grouped_conv_forward(problem, "relu", p, target) for p in (False, True)]
                    launches.append(plans.grouped_conv_forward(problem, target=target, read="relu", moments=True))
                    launches.append(plans.merged_moments(launches[-1].grid[0], problem.channels))
                    launches += plans.squeeze_excite(batch, 4, 336, 84, dtype, "relu", target)
                    planned |= {launch.kernel: launch.source for launch in launches}
    assert planned.items() <= found.items()
    assert set(found.values()) == {path.name for path in (ROOT / "csrc").glob("*.cu")}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.cu")}
    (tmp_path / "of_another_build.cu").touch()
    assert instantiate(tmp_path, "90", "86", **environment).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.cu")} == times


@pytest.mark.parametrize("channels", [8, 24, 48, 64, 96, 200, 1024, 1536])
def test_depthwise_kernels_of_any_size_are_compiled(channels):
    """They depend on neither the map's size nor the GPU."""
    found = {launch.kernel for launch in cuda_launches.of_depthwise(TYPES)}
    for images, size, stride, dtype in ((1, 7, 1, "float16"), (3, 112, 2, "bfloat16"), (256, 15, 2, "float16")):
        problem = plans.DepthwiseConv(images, size, size, channels, stride, dtype)
        for activation in ("relu", "silu"):
            launches = [plans.depthwise_conv_forward(problem, activation, parts) for parts in (False, True)]
            launches += plans.depthwise_conv_backward(
                problem, activation=activation, target=Target(80, 108), **cuda_launches.TRAINING
            )
            assert {launch.kernel for launch in launches} <= found


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("model", ["regnetx_002", "regnety_002"])
def test_what_a_model_launches_is_compiled(tmp_path, model, training):
    """Both ways have the same kernels: what the backend asks for, of whichever way, is in the module."""
    done = instantiate(tmp_path, "90", REGNET_FAST_CUDA_MODELS=model)
    assert done.returncode == 0
    asked = {}
    network = regnet_fast.create_model(model).train(training).bfloat16()
    with (
        launcher.standing_in(lambda launch, tensors: asked.setdefault(launch.kernel, launch.source), Target()),
        backend("cuda,aten" if training else "cuda,aten,reference"),  # oneDNN has bfloat16 on some processors alone
        torch.set_grad_enabled(training),
    ):
        y = network(torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16))
        if training:
            y.sum().backward()
    expected = {"grouped_conv_forward.cu"}
    expected |= {"grouped_conv_backward.cu", "merged_moments.cu", "ordered_sum.cu"} if training else set()
    assert expected <= set(asked.values()) and asked.items() <= entries(tmp_path).items()


@pytest.mark.parametrize(
    ("arch", "model", "words"),
    [("91", "regnety_016", "no architecture 91"), ("90", "regnety", "no model"), ("90", "resnetv2_50", "none of")],
)
def test_what_cannot_be_compiled_is_said(tmp_path, arch, model, words):
    done = instantiate(tmp_path, arch, REGNET_FAST_CUDA_MODELS=model)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


# Builds without a compiler: what setup.py does with what CMake makes

FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("csrc", "kernels", "regnet_fast")
FAKE_CMAKE = """#!{python}
import json, pathlib, sys
build = pathlib.Path(sys.argv[sys.argv.index("-B") + 1] if "-B" in sys.argv else sys.argv[2])
module = build / "module"
module.mkdir(parents=True, exist_ok=True)
if "-B" in sys.argv:
    (build / "asked.json").write_text(json.dumps(sys.argv))
(module / "_cuda{suffix}").touch()
(module / "build_info.json").write_text("of this build")
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of all that a build reads, and more."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "build_info.json", "results")
    source = tmp_path / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored, symlinks=True)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture
def pretended(tmp_path):
    """An environment in which a build finds tools that compile nothing."""
    tools, suffix = tmp_path / "tools", EXTENSION_SUFFIXES[0]
    (tools / "pybind11").mkdir(parents=True)
    (tools / "pybind11" / "__init__.py").write_text("get_cmake_dir = lambda: 'there'\n")
    for name in ("nvcc", "ninja", "cmake"):
        (tools / name).write_text(FAKE_CMAKE.format(python=sys.executable, suffix=suffix))
        (tools / name).chmod(0o755)
    found = {name: value for name, value in os.environ.items() if not name.startswith("REGNET_FAST_")}
    found |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tools)}
    return found | {"REGNET_FAST_BUILD_CUDA": "1", "REGNET_FAST_CUDA_ARCHITECTURES": "80 90"}


def backend_hook(source, hook, environment):
    """The name of what a hook of the build backend makes, beside the checkout; or the end of what it says."""
    command = [sys.executable, "-c", f"from setuptools import build_meta; print(build_meta.{hook}('..'))"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip()


@pytest.mark.long
@needs("setuptools")
def test_what_was_built_is_where_it_is_looked_for(checkout, pretended):
    """A wheel has module and build_info.json; an editable install finds them in the checkout, and no wheel does."""
    code, said = backend_hook(checkout, "build_wheel", pretended)
    assert code == 0, said[-3000:]
    with zipfile.ZipFile(checkout.parent / said.splitlines()[-1]) as wheel:
        names = wheel.namelist()
        assert wheel.read("regnet_fast/backends/build_info.json") == b"of this build"
    assert f"regnet_fast/backends/_cuda{EXTENSION_SUFFIXES[0]}" in names
    assert "regnet_fast/csrc/device/primitives.cuh" in names and not [n for n in names if "csrc/extension" in n]
    (path,) = checkout.glob("build/temp*/cuda/asked.json")
    assert {
        "-DREGNET_FAST_ARCHITECTURES=80;90",
        f"-DREGNET_FAST_SOURCES={sources.digest()}",
        f"-DREGNET_FAST_VERSION={regnet_fast.__version__}",
        f"-DCMAKE_MAKE_PROGRAM={pretended['PATH'].partition(os.pathsep)[0]}/ninja",
    } <= set(json.loads(path.read_text()))

    code, said = backend_hook(checkout, "build_editable", pretended)
    assert code == 0, said[-3000:]
    here = checkout / "regnet_fast" / "backends"
    assert (here / f"_cuda{EXTENSION_SUFFIXES[0]}").exists() and (here / "build_info.json").exists()

    shutil.rmtree(checkout / "build")
    code, said = backend_hook(checkout, "build_wheel", {**pretended, "REGNET_FAST_BUILD_CUDA": "0"})
    assert code == 0 and said.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(checkout.parent / said.splitlines()[-1]) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so") or "build_info" in name]
        compiled = {file for source in SOURCES.values() for file in source.files}  # at first use
        assert {f"regnet_fast/csrc/cpu/{file}" for file in compiled} <= set(wheel.namelist())


@needs("setuptools")
@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("nvcc", "error: REGNET_FAST_BUILD_CUDA=1 needs nvcc"),
        ("cmake", "error: REGNET_FAST_BUILD_CUDA=1 needs cmake"),
    ],
)
def test_what_a_build_lacks_is_said(checkout, pretended, without, words):
    tools = Path(pretended["PYTHONPATH"])
    (tools / without).unlink()
    code, said = backend_hook(checkout, "build_wheel", pretended | {"PATH": str(tools), "CUDA_HOME": str(tools)})
    assert code != 0 and words in said.splitlines()[-1] and "Traceback" not in said


# Builds by nvcc


def few_kernels(folder: Path) -> bytes:
    """An extension module with the small kernels alone."""
    units = {
        "ordered_sum_256": ("ordered_sum.cu", ["ordered_sum<256>"]),
        "squeeze_excite_Float16_8": ("squeeze_excite.cu", ["squeeze_excite<Float16, 8, 512, SIGMOID>"]),
    }
    runpy.run_path(str(EXTENSION / "instantiate.py"))["write_sources"](folder / "sources", units)
    import pybind11

    includes = ROOT / "csrc", ROOT / "csrc" / "device", EXTENSION, pybind11.get_include(), sysconfig.get_path("include")
    command = ["nvcc", "-shared", "-std=c++17", "-arch=sm_90", "-Xcompiler", "-fPIC", "-o", folder / "module"]
    command += [f"-I{include}" for include in includes]
    sources = [*(folder / "sources").iterdir(), EXTENSION / "bindings.cpp"]
    subprocess.run([*command, *sources], check=True, capture_output=True)
    return (folder / "module").read_bytes()


@pytest.fixture
def small_module(tmp_path, monkeypatch):
    """The module with a few kernels where the package looks for it. Compiled once for what it is made from."""
    files = [path for path in sorted((ROOT / "csrc").rglob("*.*")) if path.is_file()] + [Path(__file__)]
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    key = store.key(nvcc, sys.version, *(path.read_bytes() for path in files))
    built = store.stored(key, lambda: few_kernels(tmp_path), ROOT / ".cache" / "extension")
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / f"_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(built)
    facts = {"version": regnet_fast.__version__, "sources": sources.digest(), "architectures": [90], "cuda": "13"}
    (folder / "build_info.json").write_text(json.dumps(facts))
    monkeypatch.setattr(extension, "FOLDER", folder)
    extension.kernels.cache_clear()
    yield
    extension.kernels.cache_clear()


def letters(launch):
    """What a plan passes, as the module names it."""
    return "".join("p" if isinstance(a, str) else "f" if isinstance(a, float) else "i" for a in launch.arguments)


@pytest.mark.long
@needs("nvcc", "pybind11")
def test_wrong_calls_of_the_module_are_errors(small_module):
    assert extension.refuse(90) is None
    assert "built for sm_90, and the GPU is sm_80" in extension.refuse(80)
    launch = plans.squeeze_excite(1, 4, 64, 16, "float16", "silu")[1]
    assert extension.kernels() == {launch.kernel: letters(launch), "ordered_sum<256>": "ppii"}
    start, facts = extension.module().launch, (0, launch.grid, launch.threads, launch.shared, 0)
    with pytest.raises(ValueError, match="takes 9 arguments of 8 bytes, got 8 bytes"):
        start(launch.kernel, *facts, bytes(8))
    with pytest.raises(KeyError, match="nobody"):
        start("nobody", *facts, b"")
    with pytest.raises(TypeError):
        start(launch.kernel, *facts, [1] * 9)


@pytest.mark.long
@needs("nvcc", "pybind11")
@pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="there may be a GPU, which null pointers would crash"
)
def test_a_cuda_error_is_an_exception(small_module):
    with pytest.raises(RuntimeError, match=r"ordered_sum<256>: cudaError"):
        extension.module().launch("ordered_sum<256>", 0, (1, 1, 1), 256, 60000, 0, bytes(32))


KERNELS = """
#include "cuda_runtime.h"
#include "entry.h"

void first(float*, int) {}
void second(float*, int) {}
extern "C" const char* calls() { return noted_calls(); }
Kernels all_kernels() { return {entry("first", first), entry("second", second)}; }
"""


@pytest.mark.long
@needs("g++", "pybind11")
def test_what_the_module_asks_of_cuda(tmp_path):
    """Shared memory once for each kernel and device, and never less than before; the rest in every launch."""
    import pybind11

    (tmp_path / "kernels.cpp").write_text(KERNELS)
    path = tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}"
    includes = EXTENSION, ROOT / "tests" / "simulator", pybind11.get_include(), sysconfig.get_path("include")
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-o", path, *(f"-I{folder}" for folder in includes)]
    subprocess.run([*command, EXTENSION / "bindings.cpp", tmp_path / "kernels.cpp"], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, device, shared in (
        *(("first", 0, 1000), ("first", 0, 60000), ("first", 0, 60000), ("first", 0, 50000), ("first", 0, 70000)),
        *(("second", 0, 60000), ("first", 1, 60000), ("first", 1, 60000), ("second", 0, 60000)),
    ):
        module.launch(name, device, (3, 2, 1), 128, shared, 77, struct.pack("<Qi4x", 64, -5))
    library = ctypes.CDLL(str(path))
    library.calls.restype = ctypes.c_char_p
    calls = library.calls().decode().splitlines()
    assert [call for call in calls if call.startswith("shared")] == [
        "shared 60000",
        "shared 70000",
        *["shared 60000"] * 2,
    ]
    launches = [call for call in calls if call.startswith("launch")]
    assert len(launches) == 9 and launches[1] == launches[2] == "launch 3 2 128 60000 77 -5"
    with pytest.raises(RuntimeError, match="first: cudaErrorInvalidDevice: invalid device ordinal"):
        module.launch("first", 2, (1, 1, 1), 32, 0, 0, struct.pack("<Qi4x", 64, 0))


@pytest.mark.slow
@needs("nvcc", "cmake", "ninja", "pybind11", "setuptools")
def test_from_a_source_distribution_to_an_installed_package(checkout, tmp_path):
    """An sdist, a wheel made of it alone by nvcc, installed by pip: `regnet-fast info` takes the module."""
    ours = ("REGNET_FAST_", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    code, said = backend_hook(checkout, "build_sdist", environment)
    assert code == 0, said[-3000:]
    with tarfile.open(checkout.parent / said.splitlines()[-1]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel_environment = environment | {
        "REGNET_FAST_BUILD_CUDA": "1",
        "REGNET_FAST_CUDA_ARCHITECTURES": "90",
        "REGNET_FAST_CUDA_MODELS": "regnety_032",
    }
    code, said = backend_hook(unpacked, "build_wheel", wheel_environment)
    assert code == 0, said[-3000:]
    wheel = unpacked.parent / said.splitlines()[-1]
    assert "-py3-none-any" not in wheel.name

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "regnet-fast", "info", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (row,) = json.loads(done.stdout)["cuda_kernels"]
    assert row["live"] == "extension" and row["built_for"] == ["sm_90"] and not row["refused"]["extension"]

    def says(expression):
        command = [python, "-c", f"from regnet_fast.backends.cuda import extension; print({expression})"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    facts = 90, TYPES, cuda_launches.all_batches(90)
    launches = [*cuda_launches.of_models(["regnety_032"], *facts), *cuda_launches.of_depthwise(TYPES)]
    assert ast.literal_eval(says("extension.kernels()")) == {launch.kernel: letters(launch) for launch in launches}

    (packages / "regnet_fast" / "csrc" / "elements.cuh").open("a").write("// changed\n")
    built = json.loads((packages / "regnet_fast" / "backends" / "build_info.json").read_text())["sources"][:12]
    assert f"was built for sources with the digest {built}, and you have " in says("extension.refuse()")
