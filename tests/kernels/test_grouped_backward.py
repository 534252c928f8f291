"""The gradients of grouped convolutions in the interpreter against float64, every configuration."""

import pytest
import torch
from configurations import interpreted
from helpers import assert_close_to_reference
from torch.nn import functional as F

from regnet_fast.kernels import common, grouped_input_gradient, grouped_weight_gradient, tables
from regnet_fast.kernels.grouped_input_gradient import packed_weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACT = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}
GEOMETRIES = {
    "stride 1": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "stride 2": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "dilated": ((3, 3), (1, 1), (2, 2), (2, 2)),
    "strided, dilated": ((3, 3), (2, 2), (2, 2), (2, 2)),
    "dilated by 3": ((3, 3), (2, 2), (3, 3), (3, 3)),
    "pointwise, strided": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "two strides": ((5, 3), (2, 1), (2, 0), (1, 1)),
    "unpadded": ((2, 2), (2, 2), (0, 0), (1, 1)),
}
WIDTHS = ((2, 4, 4), (3, 8, 8), (2, 24, 24), (1, 12, 40), (2, 20, 8))
SIZES = ((2, 7, 6), (1, 1, 1), (1, 5, 13))


class Problem:
    """A convolution of what is read of x, and the gradient of its raw result y as an affine map of dz and y."""

    def __init__(self, size, widths, geometry, dtype, activation="silu", slope=True):
        (n, h, w), (groups, width, out_width) = size, widths
        self.kernel, self.stride, self.padding, self.dilation = geometry
        self.groups, self.dtype, self.activation = groups, dtype, activation
        self.geometry = (self.stride, self.padding, self.dilation, groups)
        channels, out = groups * width, groups * out_width
        self.x = self.map(torch.randn(n, channels, h, w))
        self.weight = torch.randn(out, width, *self.kernel).to(dtype) / (width * 9) ** 0.5
        self.scale, self.shift = torch.rand(channels) + 0.5, torch.randn(channels) / 2 + 0.3
        self.y = self.map(torch.conv2d(self.x.float(), self.weight.float(), None, *self.geometry))
        self.dz = self.map(torch.randn(self.y.shape))
        self.affine = (torch.rand(out) + 0.5, *(torch.randn(2, out) / 2 if slope else (None, None)))

    def map(self, x):
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def gradients(self, dtype):
        """Of x as it is read and of the weight; what is read, and dy, are rounded as eager rounds them."""
        a, q, b = (None if t is None else t.to(dtype)[:, None, None] for t in self.affine)
        dy = self.dz.to(dtype) * a
        dy = dy if q is None else dy + self.y.to(dtype) * q + b
        z = self.x.to(dtype) * self.scale.to(dtype)[:, None, None] + self.shift.to(dtype)[:, None, None]
        read = z if self.activation is None else ACT[self.activation](z)
        if dtype != torch.float64:
            dy, read = (t.to(self.dtype).to(dtype) for t in (dy, read))
        read = (self.x.to(dtype) if self.activation is None else read).requires_grad_()
        weight = self.weight.to(dtype).requires_grad_()
        with torch.backends.mkldnn.flags(enabled=False):
            return torch.autograd.grad(torch.conv2d(read, weight, None, *self.geometry), (read, weight), dy)

    def check(self, guarded, input_config=None, weight_config=None):
        eager, exact = (self.gradients(dtype) for dtype in (torch.float32, torch.float64))
        dz, y = guarded(self.dz), None if self.affine[1] is None else guarded(self.y)
        affine, size = tuple(map(guarded, self.affine)), tuple(self.x.shape[2:])
        rest = (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        packed = guarded(packed_weight(self.weight, self.groups))
        dx = grouped_input_gradient.input_gradient(dz, y, affine, packed, size, *rest, config=input_config)
        assert_close_to_reference(dx, eager[0].to(self.dtype), exact[0], "dx", self.groups)
        norm = None if self.activation is None else (guarded(self.scale), guarded(self.shift), self.activation)
        dweight = grouped_weight_gradient.weight_gradient(
            guarded(self.x), norm, dz, y, affine, *rest, config=weight_config
        )
        assert dweight.dtype == torch.float32
        assert_close_to_reference(dweight.to(self.dtype), eager[1].to(self.dtype), exact[1], "dweight")


def fits(size, geometry):
    kernel, _, padding, dilation = geometry
    return all(s + 2 * p > d * (k - 1) for s, k, p, d in zip(size[1:], kernel, padding, dilation, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(guarded, name, dtype):
    for size in SIZES:
        if fits(size, GEOMETRIES[name]):
            Problem(size, (2, 8, 8), GEOMETRIES[name], dtype).check(guarded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_width(guarded, widths, dtype):
    """Each activation with each width and with each dtype."""
    activation, slope = ((None, True), ("relu", False), ("none", True))[
        (WIDTHS.index(widths) + DTYPES.index(dtype)) % 3
    ]
    Problem((2, 6, 7), widths, GEOMETRIES["stride 2"], dtype, activation, slope).check(guarded)


CONFIGS = [
    *((one, None) for one in interpreted(grouped_input_gradient.CONFIGS)),
    *((None, one) for one in interpreted(grouped_weight_gradient.CONFIGS)),
]


@pytest.mark.parametrize(("first", "second"), CONFIGS, ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration(guarded, first, second):
    """In float32 those that fit there."""
    needed = second.shared_bytes(4, 2, True) if first is None else first.shared_bytes(4, 2)
    if needed <= common.SHARED_BYTES[common.INTERPRETED[0]]:
        Problem((2, 9, 6), (2, 12, 20), GEOMETRIES["stride 2"], torch.float32).check(guarded, first, second)
    Problem((1, 7, 9), (2, 8, 8), GEOMETRIES["stride 1"], torch.float16).check(guarded, first, second)


def test_what_is_outside_the_image_is_zero(guarded):
    """Not the activation of the shift, nor the constant of the affine map."""
    problem = Problem((1, 2, 2), (2, 8, 8), GEOMETRIES["stride 1"], torch.float32)
    problem.shift += 100
    problem.affine[2].add_(100)
    problem.check(guarded)


def test_without_an_affine_map_and_without_a_norm(guarded):
    one = Problem((2, 6, 7), (2, 8, 8), GEOMETRIES["stride 1"], torch.float32, None)
    rest = (one.kernel, one.stride, one.padding, one.dilation, one.groups)
    packed = packed_weight(one.weight, 2)
    found = grouped_input_gradient.input_gradient(one.dz, None, None, packed, (6, 7), *rest)
    weights = grouped_weight_gradient.weight_gradient(one.x, None, one.dz, None, None, *rest)
    one.affine = (torch.ones(16), None, None)
    dx, dweight = one.gradients(torch.float64)
    torch.testing.assert_close((found, weights), (dx.float(), dweight.float()))


def test_parts_of_the_pixels_are_added_in_their_order(monkeypatch):
    """As many parts as there are tiles, or one: the same sums, and equal bits for equal inputs."""
    one = Problem((3, 9, 9), (2, 8, 8), GEOMETRIES["stride 1"], torch.float32)
    rest = (one.kernel, one.stride, one.padding, one.dilation, one.groups)
    config, found = grouped_weight_gradient.Config(128, 16, 32, 4, 2), []
    for count in (1, 4, 9, 9):
        monkeypatch.setattr(grouped_weight_gradient, "splits", lambda *_, count=count: count)
        tables.forget()
        norm = (one.scale, one.shift, "silu")
        found.append(grouped_weight_gradient.weight_gradient(one.x, norm, one.dz, one.y, one.affine, *rest, config))
    assert torch.equal(found[2], found[3])
    torch.testing.assert_close(found[0], found[3], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-4)


def test_heuristics_fit():
    for arch in common.ARCHITECTURES:
        for width in (4, 8, 24, 48, 112, 232, 744):
            for itemsize in (2, 4):
                for batch in (1, 256):
                    shape = grouped_input_gradient.Shape(
                        batch * 784, 784, 4, width, width, 9, 1, itemsize, 2, itemsize == 4, arch, 132
                    )
                    config = grouped_input_gradient.heuristic(shape)
                    assert grouped_input_gradient.config_supports(config, shape) is None
                    shape = grouped_weight_gradient.Shape(
                        batch, 784, 4, width, width, 9, 1, itemsize, 2, True, itemsize == 4, arch, 132
                    )
                    config = grouped_weight_gradient.heuristic(shape)
                    assert grouped_weight_gradient.config_supports(config, shape) is None
                    assert 1 <= grouped_weight_gradient.splits(config, shape) <= 4 * 132
    assert "sm_86 has" in grouped_weight_gradient.config_supports(
        grouped_weight_gradient.Config(128, 128, 64, 8, 3),
        grouped_weight_gradient.Shape(1, 784, 4, 128, 128, 9, 1, 4, 2, True, True, 86, 84),
    )
