"""The operations' test problems: convolutions with their operands, small calls, and how inputs may lie in memory."""

import pytest
import torch
from helpers import assert_close_to_reference
from torch import Tensor
from torch.nn import functional as F

import regnet_fast.functional as R
from regnet_fast.backends import backend, onednn, reference

DTYPES = (torch.float32, torch.bfloat16)
CHANNELS_LAST = torch.channels_last
OPS = ("pointwise_conv", "grouped_conv", "dense_conv", "norm_act", "squeeze_excite")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def force_or_skip(name: str, dtype: torch.dtype):
    """`backend(name)`, or a skip with the backend's own reason where this machine cannot serve the dtype."""
    if name == "aten":
        one = torch.zeros(1, 1, 1, 1, dtype=dtype)
        reason = onednn.refuse(R.pack_conv(one).problem(one, False, False))
        if reason:
            pytest.skip(reason)
    return backend(name)


# How an input may lie in memory


def strided_rows(x: Tensor) -> Tensor:
    """Every second row of a taller image."""
    n, c, h, w = x.shape
    base = torch.full((n, c, 2 * h, w), torch.nan, dtype=x.dtype)
    base[:, :, ::2] = x
    return base[:, :, ::2]


def batch_slice(x: Tensor) -> Tensor:
    """The middle of a larger channels_last batch, with strides of its own even where a size is 1."""
    n, c, h, w = x.shape
    base = torch.full((n + 2, c + 3, h, w + 1), torch.nan, dtype=x.dtype).to(memory_format=CHANNELS_LAST)
    base[1:-1, :c, :, 1:] = x
    return base[1:-1, :c, :, 1:]


def expanded(x: Tensor) -> Tensor:
    """One image and one column for all, with strides of 0."""
    return x[:1, :, :, :1].expand(x.shape)


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "strided rows": strided_rows,
    "batch slice": batch_slice,
    "expanded": expanded,
}


# What holds for every result


def whole_storage(t: Tensor) -> Tensor:
    """Everything that the tensor's memory holds, beyond a view's own elements."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


class Untouched:
    """Assert at the end of the block that no byte of the tensors' memory has changed."""

    def __init__(self, *tensors: Tensor | None):
        self.tensors = [t for t in tensors if t is not None and t.numel()]

    def __enter__(self):
        self.before = [whole_storage(t).clone() for t in self.tensors]

    def __exit__(self, *error):
        if error[0] is None:
            for t, before in zip(self.tensors, self.before, strict=True):
                unchanged = torch.equal(whole_storage(t).view(torch.uint8), before.view(torch.uint8))
                assert unchanged, "an input was written to"


def assert_fresh(y: Tensor, x: Tensor, *operands: Tensor | None):
    """The output is a channels_last tensor of x's dtype in memory of its own."""
    _, c, h, w = y.shape
    assert y.dtype == x.dtype
    assert y.stride() == (h * w * c, 1, w * c, c), f"strides {y.stride()} for {tuple(y.shape)}"
    for t in (x, *operands):
        if t is not None and y.numel():
            assert y.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def assert_rule(what: str, samples: list, groups: int | None = None):
    """The rule of section 7 for (ours, eager, float64) samples joined into one: few values say little of an error."""
    ours, eager, ref = (torch.cat(parts) for parts in zip(*samples, strict=True))
    assert_close_to_reference(ours, eager, ref, what, groups)


def draws(values: int) -> int:
    """How many samples of a result to judge together."""
    return max(1, min(32, 4000 // values))


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


# The convolutions


def eager_conv(x, weight, bias, gate, residual, stride, padding, dilation, groups, activation):
    """What a model's own modules compute: one torch call for each step.

    In channels_last, as we compute: in NCHW oneDNN adds up in another order, with as little as a third of the error.
    """
    x = x.contiguous(memory_format=CHANNELS_LAST)
    if gate is not None:
        x = x * gate[:, :, None, None]
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    return {"none": lambda y: y, "relu": F.relu, "silu": F.silu}[activation](y)


class Conv:
    """One convolution problem with its operands, callable as the public operation that serves it."""

    def __init__(self, op, shape, out_channels, kernel=(1, 1), stride=1, padding=0, dilation=1, groups=1):
        self.op, self.shape, self.out_channels, self.kernel = op, shape, out_channels, kernel
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def __repr__(self):
        n, c, h, w = self.shape
        text = f"{n}x{c}x{h}x{w}->{self.out_channels}"
        for name, default in (("kernel", (1, 1)), ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
            value = getattr(self, name)
            if value != default:
                text += f"-{name[0]}" + ("x".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return text

    def operands(self, dtype, bias=True, gate=True, residual=True):
        """Random tensors by name; what the operation does not take, or was not asked for, is None."""
        n, c, h, w = self.shape
        fan_in = c // self.groups * self.kernel[0] * self.kernel[1]
        x = torch.randn(n, c, h, w, dtype=dtype)
        weight = (torch.randn(self.out_channels, c // self.groups, *self.kernel) / fan_in**0.5).to(dtype)
        out = F.conv2d(x.double(), weight.double(), None, self.stride, self.padding, self.dilation, self.groups).shape
        return {
            "x": x,
            "weight": weight,
            "bias": torch.randn(self.out_channels, dtype=dtype) if bias else None,
            "gate": torch.rand(n, c, dtype=dtype) if gate and self.op == "pointwise_conv" else None,
            "residual": torch.randn(out, dtype=dtype) if residual and self.op != "grouped_conv" else None,
        }

    def packed(self, weight, bias, activation, norm=None):
        return R.pack_conv(
            weight,
            bias,
            norm=norm,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            activation=activation,
            op=self.op,
        )

    def __call__(self, x, weight, bias=None, gate=None, residual=None, **options):
        """The public operation, for plain or packed weights."""
        operands = {} if isinstance(weight, R.PackedConv) else {"bias": bias, "stride": self.stride}
        if self.op == "pointwise_conv":
            operands |= {"gate": gate, "residual": residual}
        elif operands:
            operands |= {"dilation": self.dilation, "groups": self.groups}
        if self.op == "dense_conv":
            operands |= {"residual": residual} | ({"padding": self.padding} if "bias" in operands else {})
        return getattr(R, self.op)(x, weight, **operands, **options)

    def outputs(self):
        """How many values one call computes."""
        x, weight = torch.empty(self.shape, device="meta"), self.operands(torch.float32)["weight"].to("meta")
        return F.conv2d(x, weight, None, *self.geometry()).numel()

    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    def eager(self, x, weight, bias=None, gate=None, residual=None, activation="none"):
        return eager_conv(x, weight, bias, gate, residual, *self.geometry(), activation)

    def reference64(self, x, weight, bias=None, gate=None, residual=None, activation="none"):
        return reference.conv(*map(double, (x, weight, bias, gate, residual)), self.geometry(), activation)


def pointwise(n, c, k, h, w, stride=1):
    return Conv("pointwise_conv", (n, c, h, w), k, stride=stride)


def grouped(n, groups, width, h, w, stride=1, dilation=1, out_width=None):
    shape, out_channels = (n, groups * width, h, w), groups * (out_width or width)
    return Conv("grouped_conv", shape, out_channels, (3, 3), stride, dilation, dilation, groups)


def dense(n, c, k, h, w, kernel=(3, 3), stride=1, padding=1, dilation=1, groups=1):
    return Conv("dense_conv", (n, c, h, w), k, kernel, stride, padding, dilation, groups)


CONVS = [
    pointwise(1, 3, 5, 1, 1),
    pointwise(3, 5, 26, 2, 7),
    pointwise(1, 26, 3, 13, 7, stride=2),
    pointwise(3, 1, 26, 7, 1, stride=2),
    pointwise(1, 112, 56, 7, 7, stride=(1, 2)),
    grouped(1, 26, 1, 13, 7),  # depthwise
    grouped(3, 5, 1, 7, 7, stride=2, out_width=2),
    grouped(1, 3, 4, 2, 13, stride=2),
    grouped(3, 3, 8, 7, 7, stride=2, dilation=2),
    grouped(1, 5, 24, 7, 2, dilation=2),
    grouped(3, 2, 56, 7, 13),
    grouped(1, 2, 112, 7, 7, stride=2),
    grouped(3, 1, 26, 1, 1),
    grouped(1, 2, 3, 13, 1, stride=(2, 1), dilation=(1, 2), out_width=5),
    dense(1, 3, 26, 13, 13, stride=2),  # a stem
    dense(3, 3, 5, 13, 7, (7, 7), 2, 3),
    dense(3, 26, 26, 7, 7),
    dense(3, 1, 26, 7, 7),
    dense(3, 26, 56, 3, 3, padding=0),  # one pixel comes out
    dense(3, 5, 1, 7, 13),  # one channel comes out
    dense(1, 5, 3, 7, 2, (3, 1), (2, 1), (1, 0)),
    dense(3, 5, 8, 7, 2, (2, 2), 1, 0),
    dense(3, 26, 10, 7, 13, (5, 5), 1, 4, 2, 2),
    dense(1, 192, 192, 14, 14),  # Winograd in float32
]
TYPICAL = ("3x5x2x7->26", "3x5x7x7->10-k3x3-s2-p1-g5", "3x26x7x13->10-k5x5-p4-d2-g2")
BY_OP = {conv.op: conv for conv in CONVS if str(conv) in TYPICAL}


# Norms, squeeze-excite, and a small call of every operation


def batch_norm(channels: int, dtype: torch.dtype = torch.float32) -> R.BatchNorm:
    mean, bias = (0.2 * torch.randn(2, channels)).to(dtype)
    var, weight = torch.rand(2, channels).to(dtype) + 0.5
    return R.BatchNorm(mean, var, weight, bias, 1e-3)


def se_operands(n, channels, hidden, dtype=torch.float32, kernel=()):
    return (
        torch.randn(n, channels, dtype=dtype),
        (torch.randn(hidden, channels, *kernel) / channels**0.5).to(dtype),
        torch.randn(hidden, dtype=dtype),
        (torch.randn(channels, hidden, *kernel) / hidden**0.5).to(dtype),
        torch.randn(channels, dtype=dtype),
    )


X = (2, 6, 7, 5)


def small_operands(op: str) -> tuple[Tensor, ...]:
    """x and the weights of a small call of an operation."""
    torch.manual_seed(0)
    if op == "squeeze_excite":
        return se_operands(2, 6, 3)
    x = torch.randn(X)
    return {
        "pointwise_conv": lambda: (x, torch.randn(5, 6, 1, 1), torch.randn(5)),
        "grouped_conv": lambda: (x, torch.randn(4, 3, 3, 3), torch.randn(4)),
        "dense_conv": lambda: (x, torch.randn(5, 6, 3, 3), torch.randn(5)),
        "norm_act": lambda: (x, torch.rand(6), torch.randn(6)),
    }[op]()


def call_op(op: str, x, *weights, **options):
    if op == "norm_act":
        return R.norm_act(x, weights, **options)
    options = ({"groups": 2} if op == "grouped_conv" else {}) | options
    return getattr(R, op)(x, *weights, **options)
