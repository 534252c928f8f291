"""What plans choose: for a GPU's shared memory as CUDA shares it out, and few kernels for all batches."""

import dataclasses

import pytest

from csrc.extension import cuda_launches
from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import PROCESSORS, SHARED_BYTES, GroupedConv, Target
from regnet_fast.backends.cuda.plans.grouped import resident_blocks

RESERVED = 1 << 10
"""Of shared memory, which CUDA takes of a processor for each block beside what the block asked for."""

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 512)


def processor_bytes(arch):
    """Shared memory of a processor, from the CUDA C++ Programming Guide."""
    return {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}[arch] << 10


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_blocks_that_a_processor_holds(arch):
    """The largest number that fits beside what CUDA reserves for each, whatever they ask for."""
    assert SHARED_BYTES[arch] == processor_bytes(arch) - RESERVED
    for shared in (*range(1 << 10, SHARED_BYTES[arch], 1008), SHARED_BYTES[arch] // 2, SHARED_BYTES[arch]):
        held = resident_blocks(shared, 32, arch)
        assert held * (shared + RESERVED) <= processor_bytes(arch)
        assert held == 65536 // (168 * 32) or (held + 1) * (shared + RESERVED) > processor_bytes(arch)


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_no_grid_counts_on_more_blocks_than_a_processor_holds(arch):
    """Blocks that walk over tiles are as many as run at once, of every convolution of all models."""
    walking = ("grouped_conv_forward.cu", "grouped_conv_backward.cu")
    for launch in cuda_launches.of_convs(cuda_launches.grouped_convs(), arch, ("bfloat16",), (256,)):
        workers, slabs, _ = launch.grid
        if launch.source in walking and workers > 1:
            together = -(-workers * slabs // PROCESSORS[arch])
            assert together * (launch.shared + RESERVED) <= processor_bytes(arch), launch


def kernels(model, arch, batches):
    """The instantiations of a model's grouped convolutions, in inference and in training, by what they compute."""
    found = {}
    for conv in cuda_launches.grouped_convs([model]):
        for batch in batches:
            for i, launch in enumerate(cuda_launches.of_convs([conv], arch, ("bfloat16",), (batch,))):
                found.setdefault((conv, launch.source, i), set()).add(launch.kernel)
    return found


@pytest.mark.parametrize("arch", [90, 86])
def test_two_kernels_serve_all_batches(arch):
    """One where there are few images and one where there are many: those of a batch of 1 and of 256."""
    found, ends = kernels("regnety_032", arch, BATCHES), kernels("regnety_032", arch, (1, 256))
    assert found == ends and max(map(len, found.values())) == 2


def test_no_batch_has_a_plan_far_from_the_best():
    """By the model of the machine, at 1, 32 and 256 images within a tenth."""
    from regnet_fast.backends.cuda.plans import grouped_forward

    target = Target()
    for conv in cuda_launches.grouped_convs(["regnety_032", "regnetz_d8"]):
        for batch in (1, 32, 256):
            problem = conv.problem(batch, "bfloat16")
            costs = [
                grouped_forward._cost(config, problem, target.arch, target.processors)[0]
                for config in grouped_forward._fitting(problem, target, False)
            ]
            chosen = plans.forward_config(problem, target)
            cost = grouped_forward._cost(chosen, problem, target.arch, target.processors)[0]
            assert cost <= 1.1 * min(costs), (problem, chosen)


def test_a_plan_of_one_batch_is_planned_once_for_all():
    """The search, which takes milliseconds, is not repeated for another batch."""
    from regnet_fast.backends.cuda.plans import grouped_forward

    problem = GroupedConv(3, 20, 20, 5, 24, 1, "bfloat16")
    plans.forward_config(problem, Target(90, 77))
    searched = grouped_forward._best.cache_info().misses
    for images in (5, 9, 500):
        plans.forward_config(dataclasses.replace(problem, images=images), Target(90, 77))
    assert grouped_forward._best.cache_info().misses == searched
