"""The counts of bytes, kernels and operations, held to counts by hand; and that a machine's ceilings are plausible."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.byobnet import RepVggBlock
from timm.models.regnet import Bottleneck
from timm.models.resnetv2 import PreActBottleneck
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bench
import regnet_fast
from bench.roofline import probes
from bench.roofline.ceilings import measure_ceilings
from bench.roofline.model import EXECUTIONS, Count, count, kernels, work
from bench.roofline.recording import record
from regnet_fast.backends import cpu_library
from regnet_fast.inspect.counting import Kernel, KernelCounter

MODELS = Path(bench.__file__).parent / "data" / "models.tsv"
SAMPLE = (
    "regnetv_040",
    "regnetx_002",
    "regnety_040_sgn",
    "regnetz_005",
    "regnetz_b16_evos",
    "repvgg_a0",
    "repvgg_d2se",
    "resnetv2_18d",
    "resnetv2_50d_frn",
    "resnetv2_50x1_bit",
)


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def counts(model: nn.Module, *arguments) -> dict:
    """Bytes and kernels of the three executions, in their order."""
    found = work(model, *arguments)
    return {"bytes": [*found["bytes"].values()], "kernels": [*found["kernels"].values()]}


class ConvNormReLU(nn.Sequential):
    """3 to 8 channels, 3x3, on 2 images of 10x10: the maps x and y, the weights w, and vectors v of 8, all float32."""

    size = (2, 3, 10, 10)
    x, w, y, v = (4 * n for n in (2 * 3 * 100, 8 * 3 * 9, 2 * 8 * 100, 8))
    flops = 2 * (2 * 8 * 100) * (3 * 9)

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))


def test_a_unit_in_evaluation():
    m = ConvNormReLU()
    conv = m.x + m.w + m.y
    found = work(m, m.size)
    assert found["flops"] == m.flops
    assert found["bytes"] == {
        "eager": conv + (2 * m.y + 4 * m.v) + 2 * m.y,
        "compiled": conv + (2 * m.y + 4 * m.v),
        "ideal": conv,
    }
    assert found["kernels"] == {"eager": 3, "compiled": 2, "ideal": 1}


def test_a_unit_in_training():
    m = ConvNormReLU()
    conv, counter = m.x + m.w + m.y, 2 * 8
    statistics = m.y + 6 * m.v  # both running statistics are read and written, mean and deviation written
    wgrad = m.y + m.x + m.w
    eager = conv + counter + statistics + (2 * m.y + 4 * m.v) + 2 * m.y
    eager += 3 * m.y + (2 * m.y + 4 * m.v) + (3 * m.y + 5 * m.v) + wgrad  # ReLU, two sums, norm
    compiled = conv + counter + statistics + (2 * m.y + 4 * m.v)
    # The masked gradient is written and read again; so is the gradient of the convolution's result.
    compiled += (4 * m.y + 4 * m.v) + (3 * m.y + 5 * m.v) + wgrad
    # Normalised for the result; the sums; wgrad. All but the first read the result's gradient and the convolution's.
    ideal = conv + 2 * m.y + 2 * m.y + (2 * m.y + m.x + m.w)
    found = work(m, m.size, train=True)
    assert found["flops"] == 2 * m.flops  # an image needs no gradient
    assert found["bytes"] == {"eager": eager, "compiled": compiled, "ideal": ideal}
    assert found["kernels"] == {"eager": 9, "compiled": 7, "ideal": 4}


def test_a_bias_is_added_by_a_kernel_of_its_own_unless_it_is_fused():
    x, w, y, b = 4 * 2 * 3 * 100, 4 * 8 * 3, 4 * 2 * 8 * 100, 4 * 8
    conv = x + w + y
    found = counts(nn.Conv2d(3, 8, 1), (2, 3, 10, 10))
    assert found == {"bytes": [conv + 2 * y + b, conv + 2 * y + b, conv], "kernels": [2, 2, 1]}


def bottleneck(channels: int = 16, se_ratio: float = 0, **options) -> tuple[nn.Module, int]:
    """A RegNet block with 32 output channels, and the bytes of its convolution weights in bfloat16."""
    block = Bottleneck(channels, 32, group_size=8, se_ratio=se_ratio, **options)
    return block, 2 * sum(p.numel() for p in block.parameters() if p.dim() == 4)


def test_a_regnetx_bottleneck():
    """Stride 2 with a shortcut: x on 8x8 pixels, conv1's map of 32 channels there, the others' on 4x4; bfloat16."""
    block, weights = bottleneck(stride=2, downsample="conv1x1")
    x, a, b, v = (2 * n for n in (3 * 16 * 64, 3 * 32 * 64, 3 * 32 * 16, 32))
    convs = weights + (x + a) + (a + b) + (b + b) + (x + b)
    eager = convs + (4 * a + 4 * v) + (4 * b + 4 * v) + 2 * (2 * b + 4 * v) + 3 * b + 2 * b
    compiled = convs + (2 * a + 4 * v) + (2 * b + 4 * v) + (3 * b + 8 * v)
    ideal = convs - 3 * x // 4 + b  # the shortcut reads every fourth pixel, the sum's epilogue another map
    found = counts(block, (3, 16, 8, 8), torch.bfloat16)
    assert found == {"bytes": [eager, compiled, ideal], "kernels": [12, 7, 4]}


def test_a_regnetx_bottleneck_in_training():
    """conv -> BatchNorm -> ReLU three times with an identity, on maps m of one size."""
    (one, weights), (other, _) = bottleneck(32), bottleneck(32)
    m, block = 2 * 3 * 32 * 64, nn.Sequential(one, other)
    # Forward: each convolution reads one map and writes one; the first of the second block also reads the other
    # summand and writes the sum. Then the same sum of the second block, as a pass.
    forward = 2 * (3 * 2 * m + weights) + 2 * m + 3 * m
    # Backward of the second block. Its ReLU and BatchNorm need sums of the gradient, the result and conv3's map: a
    # pass. dgrad and wgrad of conv3 read these three and conv2's map; dgrad writes a gradient. Those of conv2 and conv1
    # read a gradient, their convolution's map and the one before; conv1's dgrad also reads the shortcut's gradient:
    # the first pass's operands, and conv3's map of the first block for the sums of its BatchNorm.
    conv3 = (3 + 1 + 1) * m + (3 + 1) * m
    inner = (2 + 1 + 1) * m + (2 + 1) * m
    second = 3 * m + conv3 + inner + (inner + 2 * m + m)
    # Of the first block: conv3 reads a stored gradient and its map; conv1 needs no dgrad.
    first = (2 + 1 + 1) * m + (2 + 1) * m + inner + (2 + 1) * m
    gradients = 2 * 2 * weights - 2 * 32 * 32  # weights read by dgrad, written by wgrad
    found = work(block, (3, 32, 8, 8), torch.bfloat16, train=True)
    assert found["bytes"]["ideal"] == forward + second + first + gradients
    assert found["kernels"]["ideal"] == 6 + 1 + 1 + 6 + 5


def test_squeeze_excite_rides_along():
    (plain, _), (block, _) = bottleneck(downsample="conv1x1"), bottleneck(downsample="conv1x1", se_ratio=0.25)
    size, n, c, r, m = (3, 16, 8, 8), 3, 32, 4, 2 * 3 * 32 * 64
    means, hidden = 2 * n * c, 2 * n * r
    fc1, fc2 = 2 * c * r, 2 * r * c
    products = (means + fc1 + hidden) + (hidden + fc2 + means)
    biases = (2 * hidden + 2 * r) + (2 * means + 2 * c)
    eager = (m + means) + products + biases + 2 * hidden + 2 * means + (2 * m + means)
    found, without = (counts(one, size, torch.bfloat16) for one in (block, plain))
    assert [a - b for a, b in zip(found["bytes"], without["bytes"], strict=True)][::2] == [eager, products]
    assert [a - b for a, b in zip(found["kernels"], without["kernels"], strict=True)] == [8, 4, 0]
    found, without = (work(one, size, torch.bfloat16, train=True) for one in (block, plain))
    # In training the means wait for BatchNorm's statistics: a pass over conv2's map. Backward takes none.
    assert found["bytes"]["ideal"] - without["bytes"]["ideal"] == m + 3 * products
    assert found["kernels"]["ideal"] - without["kernels"]["ideal"] == 1


def test_a_preactivated_bottleneck_reads_its_sum_in_prologues():
    """conv1 and the sum read x, of four times the channels; norm and activation are never stored."""
    block = PreActBottleneck(64, 64, bottle_ratio=0.25, conv_layer=create_conv2d, norm_layer=BatchNormAct2d)
    x, m = 4 * 2 * 64 * 36, 4 * 2 * 16 * 36
    weights = 4 * (2 * 64 * 16 + 16 * 16 * 9)
    found = counts(block, (2, 64, 6, 6))
    assert found["bytes"][2] == weights + (x + m) + (m + m) + (m + x + x)
    assert found["kernels"] == [10, 7, 3]


def test_repvgg_is_reparameterised_for_inference():
    block = RepVggBlock(16, 16)
    m, weights, v = 4 * 2 * 16 * 36, 4 * 16 * 16 * 9, 4 * 16
    conv = 2 * m + weights
    found = counts(block, (2, 16, 6, 6))
    assert found == {"bytes": [conv + 2 * m + v + 2 * m, conv + 2 * m + v, conv], "kernels": [3, 2, 1]}
    assert hasattr(block, "conv_1x1")


def test_indices_of_max_pooling_take_a_byte_where_the_format_is_free():
    x, y = 4 * 2 * 8 * 64, 4 * 2 * 8 * 16
    indices = y // 4
    pool = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.MaxPool2d(2))
    eager, compiled, ideal = counts(pool, (2, 8, 8, 8))["bytes"]
    conv = 2 * x + 4 * 64
    assert (eager, compiled, ideal) == (conv + x + y + 8 * indices, conv + x + y, conv + x + y)
    eager, compiled, _ = counts(pool, (2, 8, 8, 8), torch.float32, True)["bytes"]
    wgrad = conv
    assert eager - compiled == 2 * 7 * indices
    assert compiled == conv + (x + y + indices) + (y + indices + x) + wgrad


def test_an_expanded_tensor_is_read_as_small_as_it_is():
    class Means(nn.Module):
        def forward(self, x):
            return x.mean((2, 3), keepdim=True).expand_as(x).clone()

    x, means = 4 * 2 * 3 * 100, 4 * 2 * 3
    assert counts(Means(), (2, 3, 10, 10))["bytes"][:2] == [(x + means) + (means + x)] * 2


def rows() -> dict[str, dict[str, str]]:
    with MODELS.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}


@pytest.mark.parametrize(
    "name", ["regnetx_002", "regnety_016", "regnetz_d8", "regnetv_040", "repvgg_b1g4", "resnetv2_50"]
)
def test_operations_are_those_of_the_table(name):
    """The table has RepVGG in its training form."""
    row, train = rows()[name], name.startswith("repvgg")
    size = int(row["input_size"])
    forward = [op.flops for op in record(meta_model(name), (2, 3, size, size), train=train).ops if not op.backward]
    assert sum(forward) / 2 / 2e9 == pytest.approx(float(row["gmacs@default"]), abs=0.006)


@pytest.mark.parametrize("train", [False, True])
def test_operations_are_those_that_torch_counts(train):
    """torch's counter takes the gradients of grouped convolutions for dense ones, so this model has none."""
    model = meta_model("resnetv2_18").train(train)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        y = model(torch.empty(2, 3, 64, 64, device="meta"))
        if train:
            y.sum().backward()
    assert work(model, (2, 3, 64, 64), train=train)["flops"] == counter.get_total_flops()


@pytest.mark.parametrize("name", ["regnety_002", "resnetv2_18"])
def test_eager_runs_the_operations_that_are_recorded(name):
    """On a CPU a convolution adds its own bias."""
    model, x = timm.create_model(name).eval(), torch.rand(1, 3, 32, 32)
    with KernelCounter() as counter, torch.no_grad():
        model(x)
    recorded = record(model, (1, 3, 32, 32)).ops
    assert len(counter.take()) == sum(op.name != "bias" for op in recorded)


@pytest.mark.long
@pytest.mark.parametrize("name", SAMPLE[::3])
def test_each_execution_does_less_than_the_one_before(name):
    model = meta_model(name)
    for train in (False, True):
        found = counts(model, (2, 3, 64, 64), torch.bfloat16, train)
        for what in ("bytes", "kernels"):
            eager, compiled, ideal = found[what]
            assert eager > compiled > ideal > 0, (what, train)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", rows())
def test_each_execution_does_less_for_every_architecture(name, train):
    found = counts(meta_model(name), (2, 3, 64, 64), torch.bfloat16, train)
    for what in ("bytes", "kernels"):
        assert found[what] == sorted(found[what], reverse=True)


def test_maps_grow_with_the_batch_and_the_dtype_and_weights_do_not():
    model = meta_model("regnetx_002")
    one, two, three = (work(model, (n, 3, 64, 64), torch.bfloat16) for n in (1, 2, 3))
    for execution in EXECUTIONS:
        sizes = [found["bytes"][execution] for found in (one, two, three)]
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
        assert 2 * sizes[0] - sizes[1] > 2 * 2_000_000  # the weights
        assert one["kernels"] == two["kernels"]
        assert work(model, (1, 3, 64, 64), torch.float32)["bytes"][execution] == 2 * sizes[0]
    assert two["flops"] == 2 * one["flops"]


def test_gradients_are_recorded_for_the_module_that_they_belong_to():
    ops = record(meta_model("regnetz_b16"), (2, 3, 32, 32), train=True).ops
    forward, backward = ({op.path for op in ops if op.backward == side} for side in (False, True))
    assert "" not in forward | backward
    wgrads = [op.path for op in ops if op.name == "wgrad"]
    assert sorted(wgrads) == sorted(op.path for op in ops if op.name == "convolution")
    assert {op.path for op in ops if op.name == "silu_backward"} == {op.path for op in ops if op.name == "silu"}


def test_recording_leaves_the_model_as_it_is():
    model = regnet_fast.create_model("repvgg_a0")
    state = {name: (t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    rebuilt = work(model, (1, 3, 32, 32))
    assert model.training and state == {
        n: (t.data_ptr(), t._version) for n, t in model.state_dict(keep_vars=True).items()
    }
    assert not any(module._forward_hooks for module in model.modules())
    heard = []
    model.stem.register_forward_hook(lambda *_: heard.append(1))
    assert work(model, (1, 3, 32, 32)) == rebuilt and not heard
    with regnet_fast.backend("reference"):  # which timm's own blocks, recorded here, know nothing of
        assert work(model, (1, 3, 32, 32)) == rebuilt == work(meta_model("repvgg_a0"), (1, 3, 32, 32))


def test_counts_are_sums():
    assert count([Kernel("", "", 2, 1), Kernel("a", "b", 20, 10)]) == Count(flops=11, bytes=22, kernels=2)
    assert count([]) == Count(0, 0, 0)


def test_an_unknown_execution_is_refused():
    with pytest.raises(ValueError, match="'fused'; choose one of eager, compiled, ideal"):
        kernels(record(nn.ReLU(), (1, 3, 4, 4)), "fused")


def test_ceilings_are_positive_and_plausible():
    found = measure_ceilings("cpu", ["float32", "bfloat16"], quick=True)
    assert set(found) == {"bytes_per_s", "launch_s", "flops_per_s", "measured_by"}
    assert 1e7 < found["bytes_per_s"] < 1e13
    assert 1e-8 < found["launch_s"] < 1e-2
    assert set(found["flops_per_s"]) == {"float32", "bfloat16"}
    assert all(1e6 < peak < 1e15 for peak in found["flops_per_s"].values())
    assert {"bytes_per_s", "float32", "bfloat16"} <= set(found["measured_by"])


def test_products_in_registers_count_their_operations():
    try:
        found = probes.Probes()
    except probes.ProbesError as error:
        assert cpu_library.refuse("passes") is not None, error  # where a compiler compiles the package's own
        pytest.skip(str(error))
    once, twice = found.multiply_adds(1000), found.multiply_adds(2000)
    assert twice == 2 * once > 0
    assert found.pair_products(1000) in (0, 2 * once)
    y, a, b = (torch.full((1003,), value) for value in (0.0, 1.0, 3.0))
    found.triad(y, a, b)
    assert torch.equal(y, torch.full((1003,), 7.0))


def test_ceilings_without_a_compiler_say_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    probes._library.cache_clear()
    found = measure_ceilings("cpu", ["float32"], quick=True)
    assert found["flops_per_s"]["float32"] > 0 and found["measured_by"]["float32"] == "a matrix product"
    assert found["measured_by"]["bytes_per_s"] == "a copy"
    assert "no-such-compiler" in found["measured_by"]["registers"]
