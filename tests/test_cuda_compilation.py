"""The CUDA C++ kernels compiled by nvcc, without a GPU: no local memory, wide copies, matrix instructions."""

import dataclasses
import shutil

import pytest

from bench import cuda_compilation
from regnet_fast.backends import cuda_plans

if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)


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
