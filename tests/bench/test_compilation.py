"""The kernels compiled ahead of time, without a GPU: no spills, within shared memory, with matrix instructions."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.compile import kernels

INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
DTYPES = ("bfloat16", "float16", "float32")


def some(jobs: list, most: int, start: int) -> list:
    """So many at most, spread evenly; from another start others."""
    step = -(-len(jobs) // most)
    return jobs[start % step :: step]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param(arch, dtype, marks=() if dtype == "bfloat16" or arch == 90 else pytest.mark.slow)
        for arch, dtype in itertools.product(INSTRUCTION, DTYPES)
    ],
)
def test_kernels_compile(arch, dtype):
    """Some of each kernel for the operations of models, others for each architecture and dtype: narrow, wide, grouped,
    strided, stems, squeeze-excite. `python -m bench.compile.kernels` compiles all.
    """
    models = ["regnety_002"] if arch != 90 else ["regnety_032", "resnetv2_50"]
    start = 3 * list(INSTRUCTION).index(arch) + DTYPES.index(dtype)
    kinds: dict[str, list] = {}
    for job in kernels.jobs(models, [arch], [dtype]):
        kinds.setdefault(job.kernel, []).append(job)
    expected = ("pointwise_conv.resident_kernel", "pointwise_pair.resident_kernel", "implicit_gemm.kernel")
    expected += ("squeeze_excite.whole_kernel", "channel_statistics.statistics_kernel", "training_join.backward_kernel")
    assert {*expected, "grouped_input_gradient.kernel", "grouped_weight_gradient.kernel"} <= set(kinds)
    for name, jobs in kinds.items():
        product = not name.startswith(kernels.WITHOUT_PRODUCT)
        for job in some(jobs, 2 if product else 1, start):
            made = kernels.compile_job(job)
            assert not made.fault, f"{job}: {made.fault}"
            side = "BLOCK_N" if name.startswith("pointwise") else "BLOCK_M"
            rows = dict(job.constants).get(side, 0)
            if product and (INSTRUCTION[arch] == "mma.sync" or (rows >= 64 and job.warps >= 4)):
                assert made.instruction == INSTRUCTION[arch], f"{job}: multiplies with {made.instruction}"


def test_what_is_wrong_is_told():
    job = kernels.jobs(["regnety_002"], [86], ["bfloat16"])[0]
    assert kernels.Compiled(job, registers=255, spilled=8).fault == "spills 8 bytes"
    assert "needs 200000 bytes" in kernels.Compiled(job, shared=200000).fault
    assert "without matrix" in kernels.Compiled(job, registers=100, shared=1000).fault
    assert not kernels.Compiled(job, registers=100, shared=1000, instruction="mma.sync").fault
    broken = kernels.Job(job.kernel, 86, job.dtype, job.warps, job.arguments[:1], job.constants, job.config)
    assert kernels.compile_job(broken).fault


def test_every_operation_of_the_models_has_a_job():
    jobs = kernels.jobs(kernels.MODELS, [90], ["bfloat16"])
    assert len(jobs) == len(set(jobs)) > 400
    widths = {dict(job.constants)["WIDTH"] for job in jobs if job.kernel == "implicit_gemm.kernel"}
    assert {4, 8, 16, 24, 48, 56, 64, 112, 120, 232} <= widths


def disassembled(cubin: bytes) -> str:
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(job):
    import triton
    from triton.backends.compiler import GPUTarget

    code, options = kernels.source(job)
    return triton.compile(code, target=GPUTarget("cuda", job.arch, 32), options=options)


def pointwise_jobs(form: str, arch: int = 90, **facts) -> list:
    """1x1 convolutions of regnety_080 with some constants, the largest tiles first."""
    found = [
        job
        for job in kernels.jobs(["regnety_080"], [arch], ["bfloat16"])
        if job.kernel == f"pointwise_conv.{form}_kernel" and facts.items() <= dict(job.constants).items()
    ]
    return sorted(found, key=lambda job: -dict(job.constants)["BLOCK_M"] * dict(job.constants)["BLOCK_N"])


@pytest.mark.parametrize("form", ["streamed", "resident"])
@pytest.mark.parametrize("gate", [False, True])
def test_products_run_at_once(form, gate):
    """On Hopper no warpgroup waits for a product before it starts the next one of a tile, with a gate as without."""
    for job in pointwise_jobs(form, HAS_GATE=gate)[:3]:
        text = disassembled(compiled(job).asm["cubin"])
        events = "".join(re.findall(r"HGMMA|(?<=WARPGROUP\.)DEPBAR", text))
        runs = [len(run) // len("HGMMA") for run in events.split("DEPBAR") if run]
        assert runs and min(runs) >= dict(job.constants)["BLOCK_K"] // 16, f"{job}: {runs}"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("form", ["streamed", "resident"])
def test_loads_and_stores_are_of_16_bytes(form, arch):
    """Though no size is known when the kernel is compiled."""
    job = pointwise_jobs(form, arch, HAS_GATE=True, HAS_RESIDUAL=True, UNIT=8, OUT_UNIT=8)[0]
    ptx, facts = compiled(job).asm["ptx"], dict(job.constants)
    m, n, k = facts["BLOCK_M"], facts["BLOCK_N"], facts["BLOCK_K"] + facts.get("REST", 0)
    each = 2 / 16 / (32 * job.warps)
    loads = len(re.findall(r"cp\.async\.cg\.shared\.global .*?, 0x10|ld\.global\.v4\.b32", ptx))
    assert loads >= (m * k + n * k + m * n) * each
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) >= m * n * each
    narrow = len(re.findall(r"ld\.global\.b(?:8|16|32) |ld\.global\.v2", ptx))
    assert narrow <= 2 * facts["IMAGES"] + n // 8 + 16, "biases and gates"


def test_gates_are_one_vector_for_each_image():
    """And no second map: shared memory has what the same tile has without a gate, or little more."""
    job = pointwise_jobs("streamed", HAS_GATE=True)[0]
    facts = dict(job.constants)
    tile = 2 * facts["BLOCK_M"] * facts["BLOCK_K"]
    weights = 2 * facts["BLOCK_N"] * facts["BLOCK_K"]
    vectors = 2 * facts["STAGES"] * facts["IMAGES"] * facts["BLOCK_K"]
    assert compiled(job).metadata.shared <= facts["STAGES"] * (tile + weights) + vectors + 1024
