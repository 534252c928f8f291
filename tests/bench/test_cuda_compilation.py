"""The CUDA C++ kernels compiled without a GPU: no local memory, wide copies, matrix instructions."""

import dataclasses
import itertools
import shutil
import subprocess

import pytest

from bench.compile import csrc
from csrc.extension import cuda_launches
from regnet_fast.backends.cuda import nvrtc, plans
from regnet_fast.backends.cuda.plans import PROCESSORS

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.mark.long
@needs_nvcc
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch in (90, 120) else pytest.mark.slow) for arch in PROCESSORS]
)
def test_kernels_compile(arch):
    """The first and the last of each kind, of a narrow and a wide model."""
    dtypes = ["float16" if arch == 90 else "bfloat16"]
    jobs = csrc.jobs(["regnety_016", "regnety_120"], [arch], dtypes)
    jobs += [csrc.Job(arch, launch) for launch in cuda_launches.of_depthwise(dtypes)]
    kinds: dict[str, list] = {}
    for job in jobs:
        kinds.setdefault(csrc.kind(job), []).append(job)
    assert len(kinds) == 9
    chosen = [job for same in kinds.values() for job in dict.fromkeys((same[0], same[-1]))]
    made = list(csrc.compile_all(chosen, csrc.Kept()))
    assert len(made) == len(chosen)
    for one in made:
        assert not one.fault, f"{one.job.launch.kernel}: {one.fault}"


@needs_nvcc
def test_what_is_wrong_is_told():
    job = next(job for job in csrc.jobs(["regnety_016"], [86], ["bfloat16"]) if job.products)
    good = csrc.Compiled(job, 128, products=9, matrix_loads=9, wide_copies=3)
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
    assert "Bfloat" in csrc.compile_jobs([dataclasses.replace(job, launch=broken)])[0].fault


@needs_nvcc
def test_local_memory_is_seen(tmp_path, monkeypatch):
    """A kernel that indexes its registers by a number known only when it runs."""
    source = "#include <primitives.cuh>\ntemplate <int N> KERNEL(32, 1) kernel(float* y, int n) {\n"
    source += "float held[N]; for (int i = 0; i < N; ++i) held[i] = load_global(y + i * n);\n"
    source += "for (int i = 0; i < n; ++i) held[i % N] *= held[i * n % N];\n"
    source += "for (int i = 0; i < N; ++i) store_global(y + i, held[i]);\n}\n"
    (tmp_path / "probe.cu").write_text(source)
    launch = plans.Launch(str(tmp_path / "probe.cu"), "kernel<64>", (1, 1, 1), 32, 0, ("y", 1))
    made = csrc.compile_jobs([csrc.Job(80, launch)])[0]
    assert "local memory" in made.fault


def test_only_what_changed_is_compiled_again(tmp_path, monkeypatch):
    """By the text of the source and its headers, the compiler and the kernel; a line cut short costs its kernel."""
    compiled = []

    def compile_jobs(same):
        compiled.append([job.launch.kernel for job in same])
        return [csrc.Compiled(job, 100 + i, instructions=7) for i, job in enumerate(same)]

    monkeypatch.setattr(csrc, "compile_jobs", compile_jobs)
    monkeypatch.setattr(csrc, "compiler_version", lambda: "V13.0")
    jobs = csrc.jobs(["regnety_016"], [80, 90], ["bfloat16"])
    kernels = {(job.arch, job.launch.kernel) for job in jobs}

    def run():
        compiled.clear()
        made = list(csrc.compile_all(jobs, csrc.Kept(tmp_path)))
        assert {(one.job.arch, one.job.launch.kernel) for one in made} == kernels
        return {(one.job.arch, one.job.launch.kernel): one for one in made}

    first = run()
    assert sum(map(len, compiled)) == len(jobs) and max(map(len, compiled)) <= csrc.TOGETHER
    assert run() == first and not compiled

    text = csrc._content
    monkeypatch.setattr(csrc, "_content", lambda source: text(source) + "x" * source.startswith("squeeze"))
    run()
    assert compiled and all(kernel.startswith("squeeze_excite<") for part in compiled for kernel in part)

    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    run()
    assert sum(map(len, compiled)) == 1
    assert run() and not compiled

    monkeypatch.setattr(csrc, "compiler_version", lambda: "V13.1")
    run()
    assert sum(map(len, compiled)) == len(jobs)


def test_the_content_of_a_source_has_its_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(csrc, "CSRC", tmp_path)
    monkeypatch.setattr(csrc, "_content", csrc._content.__wrapped__)
    (tmp_path / "device").mkdir()
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text("#include <c.cuh>\n")
    (tmp_path / "device" / "c.cuh").write_text("1")
    (tmp_path / "other.cuh").write_text("1")
    before = csrc._content("a.cu")
    (tmp_path / "other.cuh").write_text("2")
    assert csrc._content("a.cu") == before
    (tmp_path / "device" / "c.cuh").write_text("2")
    assert csrc._content("a.cu") != before


@pytest.mark.long
def test_every_width_stride_and_dtype_is_compiled():
    found = set()
    for job in csrc.jobs():
        name, _, facts = job.launch.kernel.partition("<")
        if name.startswith("grouped_conv"):
            facts = facts.split(", ")
            found.add((name, job.arch, facts[0], int(facts[1]), int(facts[6])))
    names = ("grouped_conv_forward", "grouped_conv_backward")
    widths = range(8, plans.WIDEST + 1, 8)
    assert found == set(itertools.product(names, PROCESSORS, plans.TYPES.values(), widths, (1, 2)))


def test_a_summary_shows_the_worst():
    def made(width, arch, registers, kernel="grouped_conv_forward"):
        launch = plans.Launch("x.cu", f"{kernel}<BFloat16, {width}, 1>", (1, 1, 1), 256, 1024 * registers, ())
        return csrc.Compiled(csrc.Job(arch, launch), registers)

    lines = csrc.summary([made(16, 80, 128), made(8, 80, 64), made(8, 90, 32), made(1, 80, 16, "a")]).splitlines()
    assert lines[2:] == [
        "| a | sm_80 | 1 | 16 | 16 | 100 |",
        "| grouped_conv_forward | sm_80 | 2 | 128 | 128 | 12 |",
        "| grouped_conv_forward | sm_90 | 1 | 32 | 32 | 75 |",
    ]


@pytest.mark.long
@pytest.mark.skipif(nvrtc.refuse() is not None or shutil.which("c++filt") is None, reason="no NVRTC or no c++filt")
def test_nvrtc_takes_the_same_sources():
    """One kernel of each source, by its name expression: it takes what the plan passes."""
    launches = {launch.source: launch for launch in cuda_launches.of_models(["regnety_016"], 90, ["bfloat16"], (1,))}
    launches |= {launch.source: launch for launch in cuda_launches.of_depthwise(["float16"])}
    assert set(launches) == {path.name for path in csrc.CSRC.glob("*.cu")}
    for source, launch in launches.items():
        made = nvrtc._compile(source, launch.kernel, ("--gpu-architecture=sm_80", *nvrtc.OPTIONS))
        name = made.partition(b"\n")[0].decode()
        plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
        assert plain.startswith(f"void {launch.kernel.partition('<')[0]}<")
        taken = plain[plain.rindex("(") + 1 : -1].split(", ")
        passed = ["*" if isinstance(a, str) else type(a).__name__ for a in launch.arguments]
        assert ["*" if kind.endswith("*") else kind for kind in taken] == passed
