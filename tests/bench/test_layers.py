"""The terms of the model of a GPU, held to counts by hand and by brute force."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.roofline import layers
from bench.roofline.layers import GPUS, LAUNCH_S, Built, Gpu, Heard, seconds, terms

GPU = Gpu(90, bytes_per_s=1e12, cached_per_s=2e12, clock=1e9, flops_per_s=1e14)  # 132 processors


@pytest.mark.parametrize(
    ("facts", "slots", "bound", "expected"),
    [
        ({"bytes": 10**9, "cached": 10**9, "flops": 10**10}, 0, "memory", 1e-3),
        ({"bytes": 10**9, "cached": 4 * 10**9, "flops": 10**10}, 0, "cache", 2e-3),
        ({"bytes": 10**9, "cached": 10**9, "flops": 10**12}, 0, "products", 1e-2),
        ({"bytes": 10**9, "cached": 10**9, "blocks": 133}, 1e6, "issue", 2e-3),
        ({"bytes": 10**9, "cached": 10**9, "blocks": 132}, 1e6, "memory", 1e-3),
        ({"bytes": 10**9, "cached": 10**9, "blocks": 33}, 0, "memory", 4e-3),
        ({"bytes": 10**3, "cached": 10**3}, 0, "memory", LAUNCH_S),
    ],
    ids=["memory", "cache", "products", "a second wave", "one wave", "few blocks", "launch"],
)
def test_the_longest_term_counts(facts, slots, bound, expected):
    one, built = Heard("kernel", **facts), Built(32, 0, slots)
    found = terms(one, built, GPU)
    assert max(found, key=found.get) in (bound, "issue") and seconds(one, built, GPU) == pytest.approx(expected)


def test_a_convolution_reads_its_input_for_every_tap_and_tile_of_channels():
    config = SimpleNamespace(block_m=16, block_n=8, block_k=8)
    shape = SimpleNamespace(
        pixels=2 * 35, image_pixels=35, groups=3, width=4, out_width=12, taps=9, itemsize=2, residual=True
    )
    values = blocks = 0
    for _image, start, _group, column in itertools.product(range(2), range(0, 35, 16), range(3), range(0, 12, 8)):
        rows, columns = min(16, 35 - start), min(8, 12 - column)
        values += sum((rows + 8) * min(8, 36 - k) for k in range(0, 36, 8)) + 2 * rows * columns
        blocks += 1
    found = layers.tiles("implicit_gemm", shape, config)
    assert found == {"cached": 2 * values, "flops": 2 * 70 * 3 * 12 * 36, "blocks": blocks, "trips": 5}


def test_the_formula_of_a_1x1_convolution_is_its_heuristics():
    from regnet_fast.kernels import pointwise_tiles as pointwise

    shape = pointwise.Shape(256 * 196, 576, 576, 2, 196, True, 1, False, 90, 132)
    config = pointwise.heuristic(shape)
    found = layers.tiles("pointwise_conv", shape, config)
    assert found["cached"] == pointwise.cached_bytes(config, shape) > pointwise.memory_bytes(shape)
    assert found["blocks"] * found["trips"] == pytest.approx(
        -(-shape.pixels // config.block_m) * -(-576 // config.block_n)
    )


@pytest.mark.parametrize(
    ("resident", "blocks", "trips"), [(True, 2 * (105 + 27), 15680 * 2 / 264), (False, 2 * 3920, 2)]
)
def test_a_pair_has_the_tiles_of_both_convolutions(resident, blocks, trips):
    """72 to 216 channels, the other with a quarter of the pixels: both in two tiles of channels."""
    from regnet_fast.kernels import pointwise_pair

    shape = pointwise_pair.Shape(256 * 56 * 56, 72, 216, 216, 2, 2, False, False, 90, 132)
    config = pointwise_pair.Config(64 if resident else 256, 128, 64, 4, 3, resident, 16 * resident)
    found = layers.tiles("pointwise_pair", shape, config)
    pixels, other = 256 * 56 * 56, 256 * 28 * 28
    weights = 105 + 27 if resident else 3136 + 784
    assert found["cached"] == 2 * ((pixels + other) * (2 * 72 + 216) + weights * 72 * 216)
    assert found["flops"] == 2 * (pixels + other) * 72 * 216
    assert found["blocks"] == blocks and found["trips"] == pytest.approx(trips)


def test_instructions_in_the_loop_with_the_products_count_as_often_as_it_is_gone_through(monkeypatch):
    lines = ["S2R R0, SR_TID.X", "HGMMA.64x64x16.F32.BF16 R24, R4", "IADD3 R1, R1, 0x1, RZ", "@P0 BRA `(0x10)"]
    lines += ["STG.E [R2], R24", "EXIT", "BRA `(0x60)", "NOP"]
    lines[3], lines[6] = "@P0 BRA 0x10", "BRA 0x60"
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(lines))
    monkeypatch.setattr(layers.kernels, "tool", lambda cubin, option: sass)
    made = SimpleNamespace(asm={"cubin": b""})
    assert layers._triton_slots(made, 4, 1) == 7
    assert layers._triton_slots(made, 4, 10) == 7 + 9 * 3
    assert layers._triton_slots(made, 8, 10) == 2 * (7 + 9 * 3)


def test_of_two_loops_with_products_a_block_takes_one(monkeypatch):
    lines = ["S2R R0, SR_TID.X", "@P1 BRA 0x60", "HGMMA.64x64x16.F32.BF16 R24, R4", "IADD3 R1, R1, 0x1, RZ"]
    lines += ["@P0 BRA 0x20", "EXIT", "HGMMA.64x64x16.F32.BF16 R24, R4", "@P0 BRA 0x60", "EXIT"]
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(lines))
    monkeypatch.setattr(layers.kernels, "tool", lambda cubin, option: sass)
    assert layers._triton_slots(SimpleNamespace(asm={"cubin": b""}), 4, 10) == 4 / 2 + 10 * 3


def test_the_table_says_what_bounds_each_layer():
    one, job = Heard("a", 10**9, 4 * 10**9, job="job", label="8->8@4", blocks=264, trips=3.0), "job"
    found = {(job, 3.0): Built(128, 65536, 1000.0)}
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(layers, "blocks_of_a_processor", lambda built, job: 3)
        (row,) = layers.table([one, one], found, GPUS["H100"]).rows
    assert row[:6] == ("a", "8->8@4", "2", "128", "64.0", "3") and row[9] == "cache"
    assert row[11] == f"{100 * (1e9 / 3.0e12) / (4e9 / 5.5e12):.0f}"


def test_what_cudnn_takes_for_the_same():
    """ReLU and residual in its call, a gate and any other activation as passes; nothing where it is no rival."""
    x, y = torch.empty(1, 8, 10**3, 10**3, dtype=torch.half), torch.empty(1, 16, 10**3, 10**3, dtype=torch.half)
    gpu, around = GPUS["H100"], 2 * 16 * 10**6
    assert layers._passes({"x": x, "y": y, "ACTIVATION": "relu", "residual": y}) == 0
    assert layers._passes({"x": x, "y": y, "ACTIVATION": "none", "gate": y[0]}) == around
    assert layers._passes({"x": x, "y": y, "ACTIVATION": "silu", "residual": y}) == 5 * around
    one = Heard("a", 3 * 10**9, flops=10**9, passes=0)
    assert layers.by_library(one, gpu) == pytest.approx(1e-3)
    assert layers.by_library(replace(one, passes=6 * 10**9), gpu) == pytest.approx(3e-3)
    assert layers.by_library(replace(one, passes=None), gpu) is None
    assert layers.by_library(replace(one, bytes=0, passes=8), gpu) == 2 * layers.LAUNCH_S
