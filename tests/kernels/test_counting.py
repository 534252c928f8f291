"""What the Triton kernels move and launch, counted from what runs, held to counts by hand; no kernel is executed."""

import pytest
import torch
from timm.layers import BatchNormAct2d, ConvNormAct, create_conv2d
from timm.models.byobnet import RepVggBlock
from timm.models.regnet import Bottleneck
from timm.models.resnetv2 import PreActBottleneck
from torch import nn

import regnet_fast
from bench.roofline import modelled
from regnet_fast.backends import backend
from regnet_fast.inspect.counting import launch_bytes
from regnet_fast.inspect.explanation import Row
from regnet_fast.observer import observing

pytestmark = pytest.mark.usefixtures("unchecked_integers")

MODELS = ("regnety_002", "resnetv2_50")


@pytest.fixture(autouse=True)
def guarded():
    """No guards around results, which would be counted."""


def explained(block: nn.Module, size: tuple) -> dict[str, Row]:
    model = regnet_fast.rebuild(block).model.to(torch.bfloat16)
    with backend("triton"):
        return {row.layer: row for row in regnet_fast.explain(model, size)}


def launches(rows: dict) -> list[str]:
    return [kernel.name.partition(".")[0] for row in rows.values() for kernel in row.launches]


def test_a_regnety_block():
    """Three images of 8x8 pixels, 32 channels in groups of 8, 8 hidden; bfloat16 with float32 biases."""
    rows = explained(Bottleneck(32, 32, group_size=8, se_ratio=0.25), (3, 32, 8, 8))
    m, w, bias = 2 * 3 * 32 * 64, 2 * 32 * 32, 4 * 32
    parts, gate = 4 * 3 * 1 * 32, 2 * 3 * 32  # an image is one tile
    fc = 4 * (2 * 8 * 32 + 8 + 32)
    assert {layer: [kernel.bytes for kernel in row.launches] for layer, row in rows.items()} == {
        "conv1.conv": [m + m, m + w + bias + m],  # the input is NCHW
        "conv2.conv": [m + 2 * 32 * 8 * 9 + bias + m + parts],
        "se": [parts + fc + gate],
        "conv3.conv": [m + w + bias + gate + m + m],
    }
    assert launches(rows) == ["clone", "pointwise_conv", "implicit_gemm", "squeeze_excite", "pointwise_conv"]
    assert [row.launches[-1].flops for row in rows.values()] == [
        2 * 3 * 64 * 32 * 32,
        2 * 3 * 64 * 32 * 8 * 9,
        4 * 3 * 32 * 8,
        2 * 3 * 64 * 32 * 32,
    ]
    for row in rows.values():
        assert row.flops == sum(k.flops for k in row.launches) and row.bytes == sum(k.bytes for k in row.launches)


def test_a_strided_shortcut_reads_the_pixels_that_it_picks():
    w, bias, y = 2 * 32 * 16, 4 * 32, 2 * 3 * 32 * 16
    for size in (8, 7):
        (row,) = explained(ConvNormAct(16, 32, 1, stride=2), (3, 16, size, size)).values()
        assert row.launches[-1].bytes == 2 * 3 * 16 * 16 + w + bias + y


def test_a_first_convolution_and_its_shortcut_read_their_map_once():
    rows = explained(Bottleneck(16, 32, stride=2, group_size=8, downsample="conv1x1"), (3, 16, 8, 8))
    x, w, bias, y, other = 2 * 3 * 16 * 64, 2 * 32 * 16, 4 * 32, 2 * 3 * 32 * 64, 2 * 3 * 32 * 16
    assert rows["conv1.conv"].launches[-1].bytes == x + 2 * w + 2 * bias + y + other
    assert rows["conv1.conv"].launches[-1].flops == 2 * 3 * 16 * 32 * (64 + 16)
    assert rows["downsample.conv"].launches == () and rows["downsample.conv"].bytes == 0


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"se_ratio": 0}, 3),
        ({"se_ratio": 0, "downsample": "conv1x1", "stride": 2}, 3),
        ({"se_ratio": 0.25}, 4),
        ({"se_ratio": 0.25, "downsample": "conv1x1", "stride": 2}, 4),
    ],
)
def test_launches_of_a_block(options, number):
    rows = explained(Bottleneck(32, 32, group_size=8, **options), (2, 32, 8, 8))
    assert len(launches(rows)) == 1 + number  # and the layout of the input


def test_a_preactivated_block():
    """conv1 computes norm1 as it reads, norm2 and norm3 are folded; x has four times the channels, and is NCHW."""
    block = PreActBottleneck(64, 64, bottle_ratio=0.25, conv_layer=create_conv2d, norm_layer=BatchNormAct2d)
    rows = explained(block, (2, 64, 6, 6))
    x, m, bias = 2 * 2 * 64 * 36, 2 * 2 * 16 * 36, 4 * 16
    assert [row.launches[-1].bytes for row in rows.values()] == [
        x + x,
        x + 2 * 4 * 64 + 2 * 64 * 16 + bias + m,
        m + 2 * 16 * 16 * 9 + bias + m,
        m + 2 * 64 * 16 + x + x,
    ]


def test_a_repvgg_block_is_one_launch():
    rows = explained(RepVggBlock(16, 16), (2, 16, 6, 6))
    assert launches(rows) == ["implicit_gemm"]
    (row,) = rows.values()
    assert row.launches[-1].bytes == 2 * (2 * 2 * 16 * 36) + 2 * 16 * 16 * 9 + 4 * 16


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name):
    """Its own forward launches what the rows say, twice the same."""
    model = regnet_fast.create_model(name).eval().to(torch.bfloat16)
    size, heard = (2, 3, 64, 64), []

    def listen(name, arguments):
        heard.append(launch_bytes(arguments))
        return False

    with backend("triton"):
        rows = regnet_fast.explain(model, size)
        assert regnet_fast.explain(model, size) == rows
        with torch.no_grad(), observing(launch=listen):
            model(torch.rand(size, dtype=torch.bfloat16))
    launched = [kernel for row in rows for kernel in row.launches if "." in kernel.name]
    assert heard == [kernel.bytes for kernel in launched]
    computed = [row for row in rows if row.operation != "norm_act" or row.launches]  # others ride in a convolution
    assert sum(k.flops for row in rows for k in row.launches) == sum(row.flops for row in computed)
    for row in rows:
        assert row.backend in ("triton", "torch", "host")
        assert row.launches or row.operation in ("norm_act", "pointwise_conv")


def test_bytes_grow_evenly_with_the_batch():
    model = modelled.host_model("regnety_002").to(torch.bfloat16)
    two, three, five = (modelled._ours(model, images, 64) for images in (2, 3, 5))
    assert {what: modelled._at(5, two[what], three[what]) for what in two} == five


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in MODELS else pytest.mark.slow) for name in modelled.MODELS]
)
def test_ours_moves_half_of_what_a_compiler_leaves_and_hardly_more_than_the_ideal(name):
    """RepVGG's gates take a pass behind each block (docs/kernels.md)."""
    counts = modelled.modelled(name, 256, 224).counts
    of_compiled, of_ideal = (counts["ours"].bytes / counts[other].bytes for other in ("compiled", "ideal"))
    gated = name.endswith("se")
    assert 0.4 < of_compiled < (0.69 if gated else 0.57) and 0.97 < of_ideal < (2.0 if gated else 1.04)
    assert counts["ours"].kernels < counts["compiled"].kernels


def test_the_command(capsys):
    assert modelled.main(["--model", "regnetx_002", "--size", "64", "--batch", "2"]) == 0
    titles, _, row = capsys.readouterr().out.splitlines()
    assert titles.startswith("| model | eager GB |") and row.startswith("| regnetx_002 |")
    assert modelled.main(["--model", "regnetx_02"]) == 2
    error = capsys.readouterr().err
    assert "regnetx_002" in error and error.count("\n") == 1
