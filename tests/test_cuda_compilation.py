"""The CUDA C++ kernels compiled without a GPU: no local memory, wide copies, matrix instructions."""

import ctypes
import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest

from bench import cuda_compilation
from regnet_fast.backends import cuda_plans

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("arch", cuda_plans.SHARED_BYTES)
def test_kernels_compile(arch):
    """A narrow and a wide model's kernels, some of each kind."""
    kinds: dict[str, list] = {}
    for job in cuda_compilation.jobs(["regnety_016", "regnety_120"], [arch], ["float16" if arch == 90 else "bfloat16"]):
        kinds.setdefault(cuda_compilation._row_name(job.launch)[0], []).append(job)
    assert len(kinds) >= 6
    chosen = [job for jobs in kinds.values() for job in jobs[:: max(1, len(jobs) // 2)][:2]]
    for made in cuda_compilation.compile_all(chosen):
        assert not made.fault, f"{made.job.launch.kernel}: {made.fault}"


@needs_nvcc
def test_what_is_wrong_is_told():
    job = next(job for job in cuda_compilation.jobs(["regnety_016"], [86], ["bfloat16"]) if job.products)
    good = cuda_compilation.Compiled(job, 128, products=9, matrix_loads=9, wide_copies=3)
    assert not good.fault

    def fault(**changes):
        return dataclasses.replace(good, **changes).fault

    assert "local memory" in fault(local=8)
    assert "matrix instructions" in fault(products=0)
    assert "sixteen bytes" in fault(narrow_copies=1)
    assert "sixteen bytes" in fault(wide_copies=0)
    assert "no block fits" in fault(job=dataclasses.replace(job, launch=dataclasses.replace(job.launch, threads=1024)))
    much = dataclasses.replace(job.launch, shared=200000)
    assert "200000 bytes" in fault(job=dataclasses.replace(job, launch=much))
    broken = dataclasses.replace(job.launch, kernel=job.launch.kernel.replace("BFloat16", "Bfloat"))
    assert "Bfloat" in cuda_compilation.compile_jobs([dataclasses.replace(job, launch=broken)])[0].fault


@needs_nvcc
def test_local_memory_is_seen(tmp_path, monkeypatch):
    """A kernel that indexes its registers by a number known only when it runs."""
    source = "#include <primitives.cuh>\ntemplate <int N> KERNEL(32, 1) kernel(float* y, int n) {\n"
    source += "float held[N]; for (int i = 0; i < N; ++i) held[i] = load_global(y + i * n);\n"
    source += "for (int i = 0; i < n; ++i) held[i % N] *= held[i * n % N];\n"
    source += "for (int i = 0; i < N; ++i) store_global(y + i, held[i]);\n}\n"
    (tmp_path / "probe.cu").write_text(source)
    launch = cuda_plans.Launch(str(tmp_path / "probe.cu"), "kernel<64>", (1, 1, 1), 32, 0, ("y", 1))
    made = cuda_compilation.compile_jobs([cuda_compilation.Job(80, launch)])[0]
    assert "local memory" in made.fault


def test_rows_are_merged():
    rows = ["| b | 16 | sm_90 | float16 | new |", "| b | 8 | sm_100 | - | 1 |", "| b | 8 | sm_90 | - | 1 |"]
    old = (
        "<!-- cuda-compilation -->\nt\n-\n"
        + rows[1]
        + "\n| b | 16 | sm_90 | float16 | old |\n<!-- /cuda-compilation -->"
    )
    merged = cuda_compilation.merged(old, "\n".join(["t", "-", rows[0], rows[2]]))
    assert merged.splitlines()[3:-1] == [rows[2], rows[1], rows[0]]


def _nvrtc() -> ctypes.CDLL | None:
    """CUDA's compiler as a library, as torch's CUDA builds bring it along."""
    for folder in getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", None) or ():
        for path in Path(folder).glob("*/lib/libnvrtc.so.*"):
            return ctypes.CDLL(str(path))
    return None


def test_nvrtc_takes_the_same_sources():
    """One kernel of each source, by its name expression and without any other header."""
    library = _nvrtc()
    if library is None:
        pytest.skip("NVRTC is not installed")
    launches = {launch.source: launch for launch in cuda_compilation.launches(["regnety_016"], 90, "bfloat16", (1,))}
    assert set(launches) == {path.name for path in (cuda_compilation.ROOT / "csrc").glob("*.cu")}
    folders = [cuda_compilation.ROOT / "csrc", cuda_compilation.ROOT / "csrc" / "device"]
    options = [b"-arch=sm_80", b"-std=c++17", *(f"-I{folder}".encode() for folder in folders)]
    for source, launch in launches.items():
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        text = (cuda_compilation.ROOT / "csrc" / source).read_bytes()
        assert not library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None)
        assert not library.nvrtcAddNameExpression(program, launch.kernel.encode())
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        assert not failed, f"{source}: {log.value.decode()}"
        lowered = ctypes.c_char_p()
        assert not library.nvrtcGetLoweredName(program, launch.kernel.encode(), ctypes.byref(lowered))
        assert launch.kernel.partition("<")[0] in lowered.value.decode()
        library.nvrtcDestroyProgram(ctypes.byref(program))
