"""The kernels compiled ahead of time, without a GPU: no spills, within shared memory, with matrix instructions."""

import itertools

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
    expected = ("pointwise_conv.resident_kernel", "pointwise_pair.kernel", "implicit_gemm.kernel")
    expected += ("squeeze_excite.whole_kernel", "channel_statistics.statistics_kernel", "training_join.backward_kernel")
    assert {*expected, "grouped_input_gradient.kernel", "grouped_weight_gradient.kernel"} <= set(kinds)
    for name, jobs in kinds.items():
        product = not name.startswith(kernels.WITHOUT_PRODUCT)
        for job in some(jobs, 2 if product else 1, start):
            made = kernels.compile_job(job)
            assert not made.fault, f"{job}: {made.fault}"
            rows = dict(job.constants).get("BLOCK_M", 0)
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
