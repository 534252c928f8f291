"""The kernels that ATen runs, counted with what they move."""

import torch
from timm.layers import ConvNormAct

import regnet_fast
from regnet_fast.inspect.counting import KernelCounter


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


def test_the_operations_of_atens_own_kernels():
    """Two per multiply-accumulate of convolutions and matrix products."""
    conv, x, a, b = torch.rand(8, 3, 3, 3), torch.rand(2, 3, 10, 10), torch.rand(4, 5), torch.rand(5, 6)
    with KernelCounter() as counter:
        _ = torch.conv2d(x, conv)
        _ = (a @ b).relu()
    assert [kernel.flops for kernel in counter.take("layer")] == [2 * 2 * 8 * 8 * 8 * 3 * 9, 2 * 4 * 5 * 6, 0]


def test_a_layer_of_onednn():
    """Two images of 10x10, 3 to 8 channels, packed weights; the layout of the image is a kernel."""
    model = regnet_fast.rebuild(ConvNormAct(3, 8, 3)).model
    (row,) = regnet_fast.explain(model, (2, 3, 10, 10))
    x, w, y, bias = (4 * n for n in (2 * 3 * 100, 8 * 3 * 9, 2 * 8 * 100, 8))
    clone, conv = row.launches
    assert (clone.bytes, conv.bytes, conv.flops) == (2 * x, x + w + bias + y, row.flops)
    assert row.bytes == 2 * x + x + w + bias + y
