"""What a grouped convolution issues for each tile, counted in its SASS."""

import shutil

import pytest

from bench.compile import slots
from bench.compile.csrc import Job
from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import ForwardConfig, GroupedConv, Launch, Target

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

FACTS = "BFloat16, 24, 2, 24, 24, 3, 1, 8, 14, 2, 1, 2, RELU, true, false, NONE, false, 0"


def program(*lines):
    """SASS as cuobjdump writes it; `>N` is a branch to line N."""
    text = ""
    for i, line in enumerate(lines):
        line, _, to = line.partition(">")
        text += f"        /*{16 * i:04x}*/   {line}{hex(16 * int(to)) if to else ''} ;   /* 0x0000 */\n"
    return text


def launch(facts=FACTS, threads=64):
    return Launch("grouped_conv_forward.cu", f"grouped_conv_forward<{facts}>", (1, 1, 1), threads, 0, ())


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_a_tile_of_two_groups_of_24(arch):
    """168 products and 85 loads of matrices are what it has to do; all else is less than twice as much."""
    problem, config = GroupedConv(256, 14, 14, 24, 24, 1, "bfloat16"), ForwardConfig(2, 24, 24, 3, 8, 14, 2, 2, 2)
    planned = plans.grouped_conv_forward(problem, "relu", True, Target(arch, plans.PROCESSORS[arch]), config)
    (found,) = slots.count([Job(arch, planned)])
    assert (found["products"], found["matrix loads"]) == (168, 85)
    assert found.total() <= 3 * (168 + 85), f"{found.total()} instructions for a tile: {dict(found)}"


@needs_nvcc
@pytest.mark.parametrize(("tile", "warps", "sixteens"), [((4, 8), 2, 6), ((4, 14), 4, 6), ((8, 14), 4, 8)])
def test_a_convolution_in_front_of_a_tile(tile, warps, sixteens):
    """Its products, for so many sixteens of the halo's pixels in each warp, are counted beside those of the tile."""
    problem = GroupedConv(256, 56, 56, 3, 24, 2, "bfloat16", 72)
    config = ForwardConfig(3, 24, 24, 3, *tile, warps, 3, 2)
    planned = plans.grouped_conv_forward(problem, "relu", False, Target(), config, read="relu")
    (found,) = slots.count([Job(90, planned)])
    own = -(-tile[0] * tile[1] // (16 * warps))
    assert found["products"] == 3 * warps / 4 * 3 * (14 * own + 5 * sixteens)


def test_loops_and_warps():
    """Two warps on four quarters, two units in one warp; what comes before the tiles, and the padding, are left out."""
    lines = ["LDG.E R0, [R1]", "LDSM.16.M88.4 R0, [R1]", "@!P0 HMMA.16816.F32.BF16 R0, R1", "@P0 BRA >1"]
    lines += ["STG.E.128 [R0], R1", "@P1 BRA >0", "EXIT", "BRA >7"]
    found = slots.slots(program(*lines), launch())
    assert found == {"global memory": 1.0, "matrix loads": 1.0, "products": 1.0, "rest": 1.5}


def test_steps():
    """112 channels, 16 at a time: seven steps, of which the last stores."""
    facts = "BFloat16, 112, 1, 16, 56, 7, 1, 8, 14, 4, 1, 2, RELU, true, false, NONE, false, 0"
    lines = ["LDSM.16.M88.4 R0, [R1]", "HMMA.16816.F32.BF16 R0, R1", "@P0 BRA >5", "STG.E.128 [R0], R1", "STS [R0], R1"]
    found = slots.slots(program(*lines, "@P1 BRA >0"), launch(facts, 128))
    assert found == {"matrix loads": 7, "products": 7, "global memory": 1, "other shared memory": 1, "rest": 14}


def test_what_it_cannot_tell_is_an_error():
    with pytest.raises(ValueError, match="no loop over tiles"):
        slots.slots(program("HMMA.16816 R0, R1", "EXIT"), launch())
    with pytest.raises(ValueError, match=r"nothing is known of: .*STG"):
        slots.slots(program("HMMA.16816 R0, R1", "STG.E [R0], R1", "@P0 BRA >1", "@P1 BRA >0"), launch())
