"""The kernels that ATen runs, counted with what they move."""

import timm
import torch
from timm.layers import ConvNormAct
from torch import nn

import regnet_fast
from regnet_fast.counting import KernelCounter
from regnet_fast.recording import Kernel
from regnet_fast.roofline import Ceilings, Count, count, total


def counted(call) -> list[tuple[str, int]]:
    with torch.no_grad(), KernelCounter() as counter:
        call()
    return [(kernel.name, kernel.bytes) for kernel in counter.take()]


def test_operands_are_read_and_results_written():
    x, y, out = torch.rand(8, 16), torch.rand(8, 1), torch.rand(8, 16)
    m = 4 * 8 * 16
    assert counted(lambda: x + y) == [("add", 2 * m + 4 * 8)]
    assert counted(lambda: x.relu_()) == [("relu", 2 * m)]
    assert counted(lambda: torch.mul(x, x)) == [("mul", 2 * m)]
    assert counted(lambda: torch.add(x, x, out=out)) == [("add", 2 * m)]
    assert counted(lambda: torch.sub(x, y.expand(8, 16))) == [("sub", 2 * m + 4 * 8)]
    assert counted(lambda: x.t()[2:].view(-1, 8)) == counted(lambda: torch.empty(3)) == []
    assert counted(lambda: x.t().contiguous()) == [("clone", 2 * m)]


def test_the_operations_of_a_layer_are_done_by_its_largest_kernel():
    x = torch.rand(4)
    with KernelCounter() as counter:
        _ = x[:2] + 1
        _ = x + 1
    first, second = counter.take("layer", 8)
    assert (first.path, first.flops, second.path, second.flops) == ("layer", 0, "layer", 8)
    assert counter.take() == ()


def test_a_layer_of_onednn():
    """Two images of 10x10, 3 to 8 channels, packed weights; the layout of the image is a kernel."""
    model = regnet_fast.rebuild(ConvNormAct(3, 8, 3)).model
    (row,) = regnet_fast.explain(model, (2, 3, 10, 10))
    x, w, y, bias = (4 * n for n in (2 * 3 * 100, 8 * 3 * 9, 2 * 8 * 100, 8))
    clone, conv = row.launched
    assert (clone.bytes, conv.bytes, conv.flops) == (2 * x, x + w + bias + y, row.flops)
    assert row.ours == Count(row.flops, 2 * x + x + w + bias + y, 2)


def test_a_modelled_time():
    ceilings = Ceilings(bytes_per_s=1e9, flops_per_s=1e12, launch_s=1e-5)
    rows = regnet_fast.explain(regnet_fast.create_model("regnety_002"), (2, 3, 64, 64), ceilings)
    for row in rows:
        assert row.ours == count(row.launched, ceilings)
        assert row.ours.seconds >= max(row.ours.bytes / 1e9, row.ours.flops / 1e12) + 1e-5 * row.ours.kernels - 1e-12
    eager, ideal = (total([getattr(row, what) for row in rows]) for what in ("eager", "ideal"))
    assert eager.seconds > total([row.ours for row in rows]).seconds > ideal.seconds
    host = regnet_fast.explain(timm.create_model("resnet10t"), (1, 3, 64, 64), ceilings)
    assert all(row.ours is row.eager and row.ours.seconds is not None for row in host)


def test_totals():
    one, two = Count(1, 2, 3, 0.5), Count(10, 20, 30, 0.25)
    assert total([one, two]) == Count(11, 22, 33, 0.75)
    assert total([one, count([Kernel("", "", 20, 10)])]) == Count(11, 22, 4)
    assert total([]) == Count(0, 0, 0, 0)
    assert isinstance(regnet_fast.explain(nn.Identity(), (1, 3, 8, 8)), list)
