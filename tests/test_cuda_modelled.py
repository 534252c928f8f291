"""What the CUDA kernels' plans move and multiply, against counts by hand, and the page that says so."""

import dataclasses

from bench import cuda_modelled
from bench.cuda_modelled import H200, Traffic, traffic
from regnet_fast.backends.cuda_plans import (
    BackwardConfig,
    ForwardConfig,
    GroupedConv,
    grouped_conv_backward,
    grouped_conv_forward,
)

# Two tiles of 4x8 pixels, one above the other: of their 6x10 pixels with halo, 5x8 are in the image.
PROBLEM = GroupedConv(1, 8, 8, 2, 8, 1, "bfloat16")
READ, WRITTEN, WEIGHTS = 2 * 5 * 8 * 32, 8 * 8 * 32, 16 * 72 * 2
PRODUCTS = 2 * 64 * 16 * 72
LOADED = 2 * 2 * 2 * 9 * (128 + 256)  # tiles, groups, sixteens, chunks: one matrix of weights, two of pixels


def test_forward_counts():
    config = ForwardConfig(2, 8, 8, 1, 4, 8, 2, 2, 2)
    launch = grouped_conv_forward(PROBLEM, "relu", True, config=config)
    assert launch.grid == (2, 1, 1)
    moved, parts = READ + WRITTEN, 2 * 16 * 4
    shared = 2 * 6 * 10 * 32 + LOADED + 2 * WRITTEN
    assert (
        traffic(launch, PROBLEM)
        == Traffic(moved + parts + WEIGHTS, moved + parts + 2 * WEIGHTS, shared, PRODUCTS)
        == Traffic(7040, 9344, 35584, 147456)
    )


def test_backward_counts():
    config = BackwardConfig(2, 8, 8, 1, 4, 8, 2, 2, 2)
    launch, last = grouped_conv_backward(PROBLEM, affine=2, norm=True, sums=True, activation="relu", config=config)
    maps = 2 * READ + 2 * WRITTEN  # dz and y; x and dx
    left = 2 * WEIGHTS * 2 + 2 * 2 * 16 * 4  # a part of the weight's gradient from each of two blocks, and the sums
    halo, inputs = 2 * 6 * 10 * 32, WRITTEN
    shared = 2 * halo + inputs  # copied
    shared += 2 * halo + 6 * halo + halo + 2 * inputs + 4 * inputs  # the prologue, with its float coefficients
    shared += LOADED + 4 * WRITTEN  # dx, through the map that it is multiplied at
    shared += 2 * 4 * 2 * (3 * 512 + 256)  # tiles, warps, sixteens: three of six pairs of taps, one chunk of x
    products = PRODUCTS + 2 * 2 * 2 * 6 * 4096  # tiles, groups, sixteens, pairs of taps
    assert (
        traffic(launch, PROBLEM)
        == Traffic(maps + left + WEIGHTS, maps + left + 2 * WEIGHTS + WRITTEN, shared, products)
        == Traffic(20992, 25344, 121088, 344064)
    )
    assert traffic(last, PROBLEM).dram == 3 * 2 * WEIGHTS


def test_streamed_counts():
    """Input channels in steps of 16 and 8: the halo is read in pieces, and the weights for every tile."""
    problem = GroupedConv(1, 8, 8, 1, 24, 1, "bfloat16")
    launch = grouped_conv_forward(problem, config=ForwardConfig(1, 16, 24, 3, 4, 8, 2, 1, 2))
    moved = traffic(launch, problem)
    # A pixel has 48 bytes: its first 32 lie in one sector or two, its last 16 in one; all of it in two.
    maps, weights = 2 * 5 * 8 * (48 + 32) + 64 * 64, 24 * 9 * 24 * 2
    assert (moved.dram, moved.l2) == (maps + weights, maps + 2 * weights)
    assert moved.flops == 2 * 64 * 24 * 9 * 32


def test_blocks_that_wait_for_others_take_their_time():
    problem = GroupedConv(256, 28, 28, 14, 24, 1, "bfloat16")
    launch = grouped_conv_forward(problem)
    workers, slabs, _ = launch.grid
    resident = H200.blocks(launch) * H200.target.processors
    assert resident - slabs < workers * slabs <= resident
    time = cuda_modelled.modelled(launch, problem, H200).seconds
    assert time >= traffic(launch, problem).dram / H200.ceilings.bytes_per_s
    waiting = dataclasses.replace(launch, grid=(workers + 1, slabs, 1))
    assert cuda_modelled.modelled(waiting, problem, H200).seconds > 1.1 * time


def test_the_page_is_up_to_date():
    text = cuda_modelled.PAGE.read_text()
    assert cuda_modelled.filled(text, cuda_modelled.page()) == text, "run python -m bench.cuda_modelled --write"
