"""Every public operation against float64: results, memory, gradients, registration, compilation, bad input.

What is left out of the grids, and why: float16 is checked with `reference` alone and on one shape for each operation,
since no CPU kernel of ours computes in it; large images, because nothing here depends on size but Winograd's algorithm
and it has its own test; the product of shapes, layouts and epilogues: every shape runs in every layout with the fullest
fused epilogue and with none, every epilogue on one awkward shape.
"""

import itertools
from collections import defaultdict

import pytest
import torch
from helpers import assert_close_to_reference
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import regnet_fast.functional as R
from regnet_fast.backends import ACTIVATIONS, backend, onednn, reference, select
from regnet_fast.ops.convolution import pixel_means

DTYPES = (torch.float32, torch.bfloat16)
CHANNELS_LAST = torch.channels_last
OPS = ("pointwise_conv", "grouped_conv", "dense_conv", "norm_act", "squeeze_excite")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Shapes this small only wait for a second thread, for seconds where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        return reference.conv(*map(double, (x, weight, bias, gate, residual)), *self.geometry(), activation)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("conv", CONVS, ids=lambda c: f"{c.op}-{c}")
def test_conv_in_every_layout(conv, name, dtype):
    """Full epilogue, and none at all with packed weights; both must also leave their inputs alone.

    ReLU where there is a residual, since their sum with SiLU is not fused and takes no notice of the layout.
    """
    activation = "silu" if conv.op == "grouped_conv" else "relu"
    few = conv.outputs() < 200
    samples = defaultdict(list)
    with force_or_skip(name, dtype):
        for (layout, lay), _ in itertools.product(LAYOUTS.items(), range(draws(conv.outputs()))):
            what = f"{conv.op} {conv} {'every layout' if few else layout} {name} {dtype}"
            t = conv.operands(dtype)
            t["x"], t["residual"] = lay(t["x"]), None if t["residual"] is None else lay(t["residual"])
            with Untouched(*t.values()):
                y = conv(**t, activation=activation)
            assert_fresh(y, *t.values())
            eager, ref = conv.eager(**t, activation=activation), conv.reference64(**t, activation=activation)
            samples[what].append((y, eager, ref))

            x, weight = t["x"], t["weight"]
            packed = conv.packed(weight, None, "none")
            with Untouched(x, weight):
                y = conv(x, packed)
            assert_fresh(y, x, weight)
            samples["packed " + what].append((y, conv.eager(x, weight), conv.reference64(x, weight)))
    for what, parts in samples.items():
        assert_rule(what, parts, conv.groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("conv", BY_OP.values(), ids=lambda c: c.op)
def test_conv_with_every_epilogue(conv, name, dtype):
    with force_or_skip(name, dtype):
        for bias, gate, residual, activation in itertools.product(*[(False, True)] * 3, ACTIVATIONS):
            if (gate and conv.op != "pointwise_conv") or (residual and conv.op == "grouped_conv"):
                continue
            t = conv.operands(dtype, bias, gate, residual)
            what = f"{conv.op} {conv} bias={bias} gate={gate} residual={residual} {activation} {name} {dtype}"
            eager, ref = conv.eager(**t, activation=activation), conv.reference64(**t, activation=activation)
            assert_close_to_reference(conv(**t, activation=activation), eager, ref, what, conv.groups)
            packed = conv.packed(t["weight"], t["bias"], activation)
            y = conv(t["x"], packed, gate=t["gate"], residual=t["residual"])
            assert_close_to_reference(y, eager, ref, "packed " + what, conv.groups)


@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("conv", BY_OP.values(), ids=lambda c: c.op)
def test_weights_bias_and_gate_may_be_views(conv, name):
    """oneDNN reads a bias as if it were contiguous: a strided one gave another channel's values."""
    t = conv.operands(torch.float32)
    given = {k: v for k, v in t.items() if v is not None}
    views = {
        "strided": {k: torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for k, v in given.items()},
        "expanded": {k: v[:1].expand(v.shape) for k, v in given.items()},
        "transposed": {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in given.items()},
    }
    with backend(name):
        for kind, changed in views.items():
            v = t | changed
            what = f"{conv.op} {kind} {name}"
            with Untouched(*v.values()):
                y = conv(**v, activation="relu")
                p = conv(v["x"], conv.packed(v["weight"], v["bias"], "relu"), gate=v["gate"], residual=v["residual"])
            eager, ref = conv.eager(**v, activation="relu"), conv.reference64(**v, activation="relu")
            assert_close_to_reference(y, eager, ref, what, conv.groups)
            assert_close_to_reference(p, eager, ref, "packed " + what, conv.groups)


@pytest.mark.parametrize("op", OPS[:3])
def test_float16_with_the_reference(op):
    conv = BY_OP[op]
    t = conv.operands(torch.float16)
    try:
        eager = conv.eager(**t, activation="silu")
    except RuntimeError as error:
        pytest.skip(f"torch has no float16 convolution on this CPU: {error}")
    with backend("reference"):
        y = conv(**t, activation="silu")
    assert_close_to_reference(y, eager, conv.reference64(**t, activation="silu"), op, conv.groups)


def batch_norm(channels: int, dtype: torch.dtype = torch.float32) -> R.BatchNorm:
    mean, bias = (0.2 * torch.randn(2, channels)).to(dtype)
    var, weight = torch.rand(2, channels).to(dtype) + 0.5
    return R.BatchNorm(mean, var, weight, bias, 1e-3)


def apply_batch_norm(y: Tensor, norm: R.BatchNorm, dtype: torch.dtype) -> Tensor:
    vectors = (None if t is None else t.to(dtype) for t in (norm.mean, norm.var, norm.weight, norm.bias))
    return F.batch_norm(y, *vectors, eps=norm.eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("conv", BY_OP.values(), ids=lambda c: c.op)
def test_a_norm_is_folded(conv, affine, dtype):
    with force_or_skip("aten", dtype):
        for bias in (False, True):
            plain, packed = [], []
            for _ in range(draws(conv.outputs())):
                t = conv.operands(dtype, bias, gate=False, residual=False)
                norm = batch_norm(conv.out_channels)
                norm = norm if affine else R.BatchNorm(norm.mean, norm.var, eps=1e-3)
                eager = F.relu(apply_batch_norm(conv.eager(t["x"], t["weight"], t["bias"]), norm, dtype))
                ref = F.relu(apply_batch_norm(conv.reference64(t["x"], t["weight"], t["bias"]), norm, torch.float64))
                plain.append((conv(**t, norm=norm, activation="relu"), eager, ref))
                packed.append((conv(t["x"], conv.packed(t["weight"], t["bias"], "relu", norm)), eager, ref))
            assert_rule(f"{conv.op} bias={bias}", plain, conv.groups)
            assert_rule(f"packed {conv.op} bias={bias}", packed, conv.groups)


@pytest.mark.parametrize("conv", CONVS, ids=lambda c: f"{c.op}-{c}")
def test_packed_calls_are_equal_and_independent(conv):
    t = conv.operands(torch.float32)
    packed = conv.packed(t["weight"], t["bias"], "relu")
    first = conv(t["x"], packed, gate=t["gate"], residual=t["residual"])
    kept = first.clone()
    second = conv(t["x"], packed, gate=t["gate"], residual=t["residual"])
    assert torch.equal(first, second)
    first.fill_(torch.nan)
    assert torch.equal(second, kept)
    third = conv(t["x"], packed, gate=t["gate"], residual=t["residual"])
    assert torch.equal(third, kept)
    assert len({y.untyped_storage().data_ptr() for y in (first, second, third)}) == 3


@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_consuming_its_operands_changes_no_result(name, activation):
    """What a block allows its own convolutions: x and the residual may be overwritten, and must not be otherwise."""
    conv = pointwise(3, 5, 26, 7, 7)
    t = conv.operands(torch.float32)
    t |= {k: t[k].contiguous(memory_format=CHANNELS_LAST) for k in ("x", "residual")}
    with backend(name):
        packed = conv.packed(t["weight"], t["bias"], activation)
        with Untouched(*t.values()):
            kept = packed(t["x"], t["gate"], t["residual"])
        given = packed(t["x"].clone(), t["gate"], t["residual"].clone(), consume=True, into_residual=True)
    torch.testing.assert_close(given, kept, rtol=1e-6, atol=1e-6)


# Channel means


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("conv", [c for c in CONVS if c.op == "grouped_conv"], ids=str)
def test_means(conv, name, dtype):
    """Eager is what timm computes: the mean of the rounded output, in the compute dtype."""
    samples = []
    with force_or_skip(name, dtype):
        for _ in range(draws(conv.shape[0] * conv.out_channels)):
            t = conv.operands(dtype)
            y, means = conv(**t, activation="silu", means=True)
            packed_y, packed_means = conv(t["x"], conv.packed(t["weight"], t["bias"], "silu"), means=True)
            assert means.dtype == packed_means.dtype == torch.float32 and means.is_contiguous()
            assert torch.equal(y, packed_y) and torch.equal(means, packed_means)
            eager = conv.eager(**t, activation="silu").mean((2, 3)).float()
            samples.append((means, eager, reference.channel_means(conv.reference64(**t, activation="silu"))))
    assert_rule(f"means of {conv} {name} {dtype}", samples)


def test_means_of_float16_do_not_overflow():
    """56 x 56 pixels of 30 add up to 94080, which float16 does not hold."""
    y = torch.full((2, 5, 56, 56), 30.0, dtype=torch.float16).contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(pixel_means(y), torch.full((2, 5), 30.0))


def test_means_of_float64_are_float64():
    t = grouped(2, 2, 3, 7, 5).operands(torch.float64)
    y, means = R.grouped_conv(t["x"], t["weight"], groups=2, means=True)
    torch.testing.assert_close(means, y.mean((2, 3)), rtol=1e-14, atol=1e-14)


# norm_act and squeeze_excite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 5, 2, 7), (1, 26, 13, 7), (3, 1, 7, 13)], ids=str)
def test_norm_act(shape, name, dtype):
    """The map itself, for a scale and shift that the dtype holds; layouts of tiny shapes are judged together.

    The data is uniform: an error here is a share of its value, and one rare large value would decide the maximum.
    """
    n, c, h, w = shape
    samples = defaultdict(list)
    cases = [("silu", True, layout) for layout in LAYOUTS]
    cases += [(a, gated, "channels_last") for a in ACTIVATIONS for gated in (False, True)]
    with force_or_skip(name, dtype):
        for (activation, gated, layout), _ in itertools.product(cases, range(draws(max(1, n * c * h * w // 4)))):
            x = LAYOUTS[layout]((4 * torch.rand(shape) - 2).to(dtype))
            scale, shift = (torch.rand(c) + 0.5).to(dtype), (0.2 * torch.randn(c)).to(dtype)
            gate = (0.5 + 0.5 * torch.rand(n, c)).to(dtype) if gated else None
            with Untouched(x, gate, scale, shift):
                y = R.norm_act(x, (scale, shift), activation=activation, gate=gate)
            assert_fresh(y, x, scale, shift)
            ref = reference.norm_act(*map(double, (x, scale, shift, gate)), activation)
            x = x if gate is None else x * gate[:, :, None, None]
            if dtype == torch.float32:
                eager = x * scale[:, None, None] + shift[:, None, None]
            else:  # which rounds once, so that it is the harder one to equal
                mean, var = torch.zeros_like(scale), torch.ones_like(scale)
                eager = F.batch_norm(x.contiguous(), mean, var, scale, shift, eps=1e-30)
            where = "every layout" if n * c * h * w < 50 else layout
            what = f"norm_act {shape} {where} {activation} gate={gated} {name} {dtype}"
            samples[what].append((y, reference.activate(eager, activation), ref))
    for what, parts in samples.items():
        assert_rule(what, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_act_of_a_norm(activation, name, dtype):
    """In bfloat16 scale and shift are rounded too, so many channels are needed to judge it; its RMS error is 1.4 times
    eager's."""
    x, norm = torch.randn(2, 256, 7, 7, dtype=dtype), batch_norm(256, dtype)
    with force_or_skip(name, dtype):
        y = R.norm_act(x, norm, activation=activation)
    eager = reference.activate(apply_batch_norm(x, norm, dtype), activation)
    ref = reference.activate(apply_batch_norm(x.double(), norm, torch.float64), activation)
    assert_close_to_reference(y, eager, ref, f"{name} {activation} {dtype}")


def test_the_reference_of_norm_act_rounds_once():
    """In bfloat16 it rounded the product too, and its largest error was 2.5 times eager's."""
    x, gate = torch.randn(2, 26, 7, 7).bfloat16(), torch.rand(2, 26).bfloat16()
    scale, shift = torch.randn(2, 26).bfloat16()
    wide = reference.norm_act(x.float(), scale.float(), shift.float(), gate.float(), "silu")
    assert torch.equal(reference.norm_act(x, scale, shift, gate, "silu"), wide.bfloat16())


def test_norm_act_takes_a_scale_and_a_shift():
    x, norm = torch.randn(3, 5, 7, 2), batch_norm(5)
    scale, shift = (t.float() for t in norm.scale_shift())
    assert torch.equal(R.norm_act(x, norm, activation="relu"), R.norm_act(x, (scale, shift), activation="relu"))


def se_operands(n, channels, hidden, dtype=torch.float32, kernel=()):
    return (
        torch.randn(n, channels, dtype=dtype),
        (torch.randn(hidden, channels, *kernel) / channels**0.5).to(dtype),
        torch.randn(hidden, dtype=dtype),
        (torch.randn(channels, hidden, *kernel) / hidden**0.5).to(dtype),
        torch.randn(channels, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("shape", [(1, 3, 1), (3, 26, 5), (1, 112, 28), (1, 888, 222)], ids=str)
def test_squeeze_excite(shape, name, dtype):
    with force_or_skip(name, dtype):
        for activation, kernel in itertools.product(ACTIVATIONS, ((), (1, 1))):
            samples = []
            for _ in range(draws(shape[0] * shape[1])):
                t = se_operands(*shape, dtype, kernel)
                means = torch.cat([t[0], t[0]], 1)[:, : shape[1]]
                with Untouched(means, *t[1:]):
                    gate = R.squeeze_excite(means, *t[1:], activation=activation)
                assert gate.is_contiguous()
                flat = [w.flatten(1) if w.dim() == 4 else w for w in t]
                ref = reference.squeeze_excite(*map(double, flat), activation)
                samples.append((gate, reference.squeeze_excite(*flat, activation), ref))
            assert_rule(f"squeeze_excite {shape} {activation} {name} {dtype}", samples)


# Registration


def operator_calls(layout: str, dtype: torch.dtype, n: int, grad: bool):
    """Arguments of each registered operator, with channels that are no multiple of 8."""

    def leaf(t):
        t = t.to(dtype)
        return (LAYOUTS[layout](t) if t.dim() == 4 and t.shape[2] == 7 else t).detach().requires_grad_(grad)

    x, gate = torch.randn(n, 6, 7, 5), torch.rand(n, 6)
    se = [leaf(t) for t in se_operands(n, 6, 3)]
    r = torch.randn
    yield "pointwise_conv", (*map(leaf, (x, r(5, 6, 1, 1), r(5), gate, r(n, 5, 7, 5))), [1, 1], "silu")
    yield "grouped_conv", (*map(leaf, (x, r(6, 3, 3, 3), r(6))), [2, 2], [1, 1], 2, "relu", True)
    ones = [1, 1]
    yield "dense_conv", (leaf(x), leaf(r(5, 6, 3, 3)), None, leaf(r(n, 5, 7, 5)), ones, ones, ones, 1, "relu")
    yield "norm_act", (*map(leaf, (x, r(6), r(6), gate)), "silu")
    yield "squeeze_excite", (*se, "relu")


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
OPCHECKS = [
    # The ahead-of-time test compiles forward and backward with symbolic sizes, which takes most of the time: once.
    ("channels_last", torch.float32, 2, True, (*QUICK, "test_aot_dispatch_dynamic")),
    ("NCHW", torch.float32, 2, True, QUICK),
    ("strided rows", torch.float32, 2, True, QUICK),
    ("batch slice", torch.float32, 1, True, QUICK),
    ("NCHW", torch.float32, 1, True, QUICK),
    ("expanded", torch.float32, 2, False, QUICK),
    ("channels_last", torch.float32, 0, True, QUICK),
    ("channels_last", torch.bfloat16, 2, False, QUICK),  # no gradients: bfloat16 has no tolerances in opcheck
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", OPCHECKS, ids=lambda c: f"{c[0]}-{dtype_name(c[1])}-batch{c[2]}".replace(" ", "_"))
def test_opcheck(case, op):
    layout, dtype, n, grad, checks = case
    arguments = dict(operator_calls(layout, dtype, n, grad))[op]
    torch.library.opcheck(getattr(torch.ops.regnet_fast, op), arguments, test_utils=checks)


@pytest.mark.parametrize("op", OPS)
def test_fakes_promise_the_real_strides_and_dtypes(op):
    """Sizes of 1 leave strides open, and a wrong promise shows only in compiled code far away."""
    for layout, dtype, n in itertools.product(("NCHW", "channels_last", "batch slice"), DTYPES, (0, 1, 2)):
        arguments = dict(operator_calls(layout, dtype, n, False))[op]
        operator = getattr(torch.ops.regnet_fast, op)
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
        for r, f in zip(*(o if isinstance(o, tuple) else (o,) for o in (real, fake)), strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), f"{op} {layout} {dtype} batch {n}"


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shapes(op):
    result, real = call_op(op, *(t.to("meta") for t in small_operands(op))), call_op(op, *small_operands(op))
    assert (result.shape, result.stride(), result.device.type) == (real.shape, real.stride(), "meta")


# Gradients


def with_norm(call):
    """The operation with its weights followed by the four vectors of a BatchNorm."""

    def run(*tensors):
        *operands, mean, var, weight, bias = tensors
        return call(*operands, norm=R.BatchNorm(mean, var, weight, bias, 1e-3))

    return run


def r64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def norm64(c):
    return r64(c), torch.rand(c, dtype=torch.float64) + 0.5, r64(c), r64(c)


GRADIENTS = {
    "pointwise_conv": lambda a: (
        lambda x, w, b, g, r: R.pointwise_conv(x, w, b, stride=2, gate=g, residual=r, activation=a),
        (r64(2, 3, 3, 2), r64(2, 3, 1, 1), r64(2), r64(2, 3), r64(2, 2, 2, 1)),
    ),
    "pointwise_conv norm": lambda a: (
        with_norm(lambda x, w, b, norm: R.pointwise_conv(x, w, b, norm=norm, activation=a)),
        (r64(2, 3, 2, 2), r64(2, 3, 1, 1), r64(2), *norm64(2)),
    ),
    "grouped_conv": lambda a: (
        lambda x, w, b: R.grouped_conv(x, w, b, groups=2, stride=2, dilation=2, activation=a, means=True),
        (r64(1, 4, 3, 4), r64(4, 2, 3, 3), r64(4)),
    ),
    "grouped_conv norm": lambda a: (
        with_norm(lambda x, w, norm: R.grouped_conv(x, w, groups=2, norm=norm, activation=a)),
        (r64(1, 2, 3, 2), r64(2, 1, 3, 3), *norm64(2)),
    ),
    "dense_conv": lambda a: (
        lambda x, w, b, r: R.dense_conv(x, w, b, stride=(1, 2), padding=1, residual=r, activation=a),
        (r64(1, 2, 2, 3), r64(2, 2, 3, 3), r64(2), r64(1, 2, 2, 2)),
    ),
    "dense_conv norm": lambda a: (
        with_norm(lambda x, w, norm: R.dense_conv(x, w, norm=norm, padding=1, activation=a)),
        (r64(1, 2, 2, 3), r64(2, 2, 3, 3), *norm64(2)),
    ),
    "norm_act": lambda a: (
        lambda x, s, t, g: R.norm_act(x, (s, t), gate=g, activation=a),
        (r64(2, 3, 2, 2), r64(3), r64(3), r64(2, 3)),
    ),
    "norm_act norm": lambda a: (
        lambda x, *norm: R.norm_act(x, R.BatchNorm(*norm), activation=a),
        (r64(2, 3, 2, 2), *norm64(3)),
    ),
    "squeeze_excite": lambda a: (
        lambda *t: R.squeeze_excite(*t, activation=a),
        tuple(t.double() for t in se_operands(2, 4, 3)),
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_every_tensor(case, activation):
    """First and second derivatives by finite differences in float64. ReLU's kink is too far off to be stepped over."""
    function, tensors = GRADIENTS[case](activation)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


GRADIENT_OPERANDS = {
    "pointwise_conv": ("x", "weight", "bias", "gate", "residual"),
    "grouped_conv": ("x", "weight", "bias"),
    "dense_conv": ("x", "weight", "bias", "residual"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("op", OPS[:3])
def test_conv_gradients_in_the_compute_dtype(op, dtype):
    """Against eager's by the same rule, for each tensor alone, for gradients that are expanded and NCHW."""
    conv = BY_OP[op]
    everything = GRADIENT_OPERANDS[op]
    with force_or_skip("aten", dtype):
        for wanted, kind in itertools.product([(name,) for name in everything] + [everything], ("NCHW", "expanded")):
            samples = {name: [] for name in wanted}
            for _ in range(6):
                t = conv.operands(dtype)
                dy = LAYOUTS[kind](torch.randn_like(conv.eager(**t)))
                grads = []
                for run, cast in ((conv, dtype), (conv.eager, dtype), (conv.eager, torch.float64)):
                    leaves = {k: v.to(cast).clone().requires_grad_(k in wanted) for k, v in t.items() if v is not None}
                    y = run(**leaves, activation="silu")
                    grads.append(torch.autograd.grad(y, [leaves[k] for k in wanted], dy.to(cast)))
                for name, *sample in zip(wanted, *grads, strict=True):
                    samples[name].append(sample)
            for name in wanted:
                assert_rule(f"{op}: gradient of {name}, dy {kind}, wanted {wanted}, {dtype}", samples[name])


def test_gradients_of_the_means_alone_and_of_the_output_alone():
    t = grouped(2, 2, 3, 5, 4).operands(torch.float64)
    for which in (0, 1):
        x, x_ref = t["x"].clone().requires_grad_(), t["x"].clone().requires_grad_()
        R.grouped_conv(x, t["weight"], groups=2, activation="silu", means=True)[which].square().sum().backward()
        y = F.silu(F.conv2d(x_ref, t["weight"], padding=1, groups=2))
        (y, y.mean((2, 3)))[which].square().sum().backward()
        torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-12, atol=1e-12)


def test_relu_has_no_gradient_at_zero():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    R.norm_act(x, (torch.ones(3), torch.zeros(3)), activation="relu").sum().backward()
    R.pointwise_conv(x, torch.ones(2, 3, 1, 1), activation="relu").sum().backward()
    assert not x.grad.any()


# Bad and borderline input

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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64], ids=dtype_name)
def test_other_dtypes_are_refused(op, dtype):
    """As the input, and as any single one of the other tensors."""
    operands = small_operands(op)
    for i in range(len(operands)):
        changed = [t.to(dtype) if i == j else t for j, t in enumerate(operands)]
        with pytest.raises(TypeError, match=op):
            call_op(op, *changed)
    with pytest.raises(TypeError, match=op):
        call_op(op, *(t.to(dtype) for t in operands))


@pytest.mark.parametrize("op", ["pointwise_conv", "grouped_conv", "dense_conv"])
def test_a_mixture_of_dtypes_is_refused(op):
    x, weight, bias = small_operands(op)
    for mixture in ((x.bfloat16(), weight, bias), (x, weight.double(), bias)):
        with pytest.raises(TypeError, match=rf"{op}.*autocast"):
            call_op(op, *mixture)


@pytest.mark.parametrize("op", OPS)
def test_a_mixture_of_devices_is_refused(op):
    """An operand on another device gave memory that nobody had written to."""
    operands = small_operands(op)
    for i in range(len(operands)):
        changed = [t.to("meta") if i == j else t for j, t in enumerate(operands)]
        with pytest.raises(ValueError, match=rf"{op}.*meta"):
            call_op(op, *changed)


@pytest.mark.parametrize("op", OPS)
def test_wrong_ranks_and_channels_are_refused(op):
    operands = small_operands(op)
    for i in range(len(operands)):
        t = operands[i]
        wrong = [t[0], torch.cat([t, t[:, :1]], 1) if t.dim() > 1 else torch.cat([t, t])]
        for changed in wrong:
            with pytest.raises(ValueError, match=op):
                call_op(op, *operands[:i], changed, *operands[i + 1 :])


CONV_MISTAKES = {
    "unknown activation": (ValueError, {"activation": "gelu"}),
    "zero stride": (ValueError, {"stride": 0}),
    "negative stride": (ValueError, {"stride": (1, -1)}),
    "three strides": (TypeError, {"stride": (1, 1, 1)}),
    "fractional stride": (TypeError, {"stride": 1.5}),
    "a norm for other channels": (ValueError, {"norm": batch_norm(3)}),
    "a norm of one channel": (ValueError, {"norm": batch_norm(1)}),
    "a norm without a shape": (ValueError, {"norm": R.BatchNorm(torch.tensor(0.0), torch.tensor(1.0))}),
}


@pytest.mark.parametrize("op", OPS[:3])
@pytest.mark.parametrize("mistake", CONV_MISTAKES)
def test_wrong_options_are_refused(op, mistake):
    error, options = CONV_MISTAKES[mistake]
    with pytest.raises(error, match=op):
        call_op(op, *small_operands(op), **options)


def other_mistakes():
    x, w1, _ = small_operands("pointwise_conv")
    _, w3, _ = small_operands("grouped_conv")
    _, wd, bd = small_operands("dense_conv")
    r = torch.randn
    pointwise_conv, grouped_conv, dense_conv, norm_act = R.pointwise_conv, R.grouped_conv, R.dense_conv, R.norm_act
    yield "pointwise_conv", lambda: pointwise_conv(x, wd)
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, gate=r(2, 5))
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, gate=r(1, 6))
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, gate=r(2, 6, 1, 1))
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, residual=r(2, 5, 1, 1))
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, stride=2, residual=r(2, 5, 7, 5))
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, r(1), norm=batch_norm(5))
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, norm=R.BatchNorm(r(5), r(5).abs(), r(1), r(5)))
    yield "pointwise_conv", lambda: pointwise_conv(x, w1, norm=R.BatchNorm(r(5), r(5).abs(), r(5), r(5, 1)))
    yield "pointwise_conv", lambda: pointwise_conv(r(2, 0, 7, 5), r(5, 0, 1, 1))
    yield "grouped_conv", lambda: grouped_conv(x, w1)
    yield "grouped_conv", lambda: grouped_conv(x, w3, groups=0)
    yield "grouped_conv", lambda: grouped_conv(x, w3, groups=-2)
    yield "grouped_conv", lambda: grouped_conv(x, w3, groups=3)
    yield "grouped_conv", lambda: grouped_conv(x, r(5, 3, 3, 3), groups=2)
    yield "grouped_conv", lambda: grouped_conv(x, w3, groups=2, dilation=0)
    yield "grouped_conv", lambda: grouped_conv(r(2, 6, 0, 5), w3, groups=2)
    yield "dense_conv", lambda: dense_conv(r(2, 6, 2, 7), wd, bd)  # smaller than the kernel
    yield "dense_conv", lambda: dense_conv(x, wd, dilation=4)
    yield "dense_conv", lambda: dense_conv(x, wd, padding=-1)
    yield "dense_conv", lambda: dense_conv(x, wd, padding=1, residual=r(2, 5, 7, 1))
    yield "dense_conv", lambda: dense_conv(r(2, 6, 0, 5), wd, padding=2)  # no pixels, and yet an output
    yield "norm_act", lambda: norm_act(x, (r(6), r(6)), activation="gelu")
    yield "norm_act", lambda: norm_act(x, (r(6), r(1)))
    yield "norm_act", lambda: norm_act(x, (torch.tensor(1.0), torch.tensor(1.0)))
    yield "norm_act", lambda: norm_act(x, (r(6), r(6)), gate=r(2, 5))
    yield "norm_act", lambda: norm_act(x, R.BatchNorm(r(6), r(1).abs()))
    yield "squeeze_excite", lambda: R.squeeze_excite(*se_operands(2, 6, 3), activation="gelu")


MISTAKES = list(other_mistakes())


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=lambda i: f"{i}-{MISTAKES[i][0]}")
def test_operands_that_do_not_fit_are_refused(i):
    op, call = MISTAKES[i]
    with pytest.raises(ValueError, match=op):
        call()


@pytest.mark.parametrize("op", OPS[:3])
def test_packed_weights_refuse_what_they_cannot_honour(op):
    x, weight, bias = small_operands(op)
    groups = 2 if op == "grouped_conv" else 1
    packed = R.pack_conv(weight, bias, groups=groups, padding=1 if op == "grouped_conv" else 0, op=op)
    run = getattr(R, op)
    wrong = [
        lambda: run(x[:, :5], packed),
        lambda: run(x[0], packed),
        lambda: run(x.to("meta"), packed),
        # What the packed weights hold already would be ignored if it were given again.
        lambda: run(x, packed, bias),
        lambda: run(x, packed, stride=2),
        lambda: run(x, packed, activation="relu"),
        lambda: run(x, packed, norm=batch_norm(weight.shape[0])),
        lambda: run(x.clone().requires_grad_(), packed),
        lambda: getattr(R, next(o for o in OPS if o != op))(x, packed),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"pointwise_conv|grouped_conv|dense_conv"):
            call()
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        with pytest.raises(TypeError, match=op):
            run(x.to(dtype), packed)
    with torch.no_grad():
        assert torch.equal(run(x.clone().requires_grad_(), packed), run(x, packed))


def test_pack_conv_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match=r"dense_conv.*gelu"):
        R.pack_conv(torch.zeros(3, 3, 3, 3), activation="gelu")


@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_gives_an_empty_result(op, name):
    with backend(name):
        operands = [t.requires_grad_() for t in small_operands(op)]
        whole = call_op(op, *operands)
        empty = call_op(op, operands[0][:0], *operands[1:])
        assert empty.shape == (0, *whole.shape[1:]) and empty.dtype == whole.dtype
        for gradient in torch.autograd.grad(empty.sum(), operands):
            assert not gradient.any()
        if op == "grouped_conv":
            assert call_op(op, operands[0][:0], *operands[1:], means=True)[1].shape == (0, 4)
        if op in ("grouped_conv", "dense_conv"):
            packed = R.pack_conv(
                operands[1],
                operands[2],
                groups=2 if op == "grouped_conv" else 1,
                padding=1 if op == "grouped_conv" else 0,
                op=op,
            )
            assert getattr(R, op)(operands[0][:0].detach(), packed).shape == empty.shape


def test_an_image_of_one_pixel():
    x = torch.randn(2, 6, 1, 1)
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    for dilation in (1, 2):
        y = R.grouped_conv(x, weight, bias, groups=2, dilation=dilation, stride=2)
        centre = torch.einsum("ngc,gkc->ngk", x.view(2, 2, 3), weight[:, :, 1, 1].view(2, 2, 3)).reshape(2, 4, 1, 1)
        torch.testing.assert_close(y, centre + bias[:, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_nan_propagates(op, name, activation, request):
    if name == "aten" and activation == "relu" and op in ("grouped_conv", "dense_conv"):
        reason = "oneDNN's ReLU post-op turns NaN into 0, as it does in a frozen torch.compile"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    x, *weights = small_operands(op)
    x[1, 2, ...] = torch.nan
    with backend(name):
        y = call_op(op, x, *weights, activation=activation)
    assert not y[0].isnan().any()
    assert y[1].isnan().any()


# Compilation and autocast


def network(x, w1, w3, wd, fc1, b1, fc2, b2, mean, var, gamma, beta):
    """All five operations in one function, on 8 channels in 2 groups."""
    norm = R.BatchNorm(mean, var, gamma, beta)
    y = R.pointwise_conv(x, w1, norm=norm, activation="silu")
    y, means = R.grouped_conv(y, w3, groups=2, stride=2, norm=norm, activation="silu", means=True)
    gate = R.squeeze_excite(means.to(y.dtype), fc1, b1, fc2, b2)
    y = R.pointwise_conv(y, w1, gate=gate, residual=R.dense_conv(x, wd, beta, stride=2, padding=1))
    return R.norm_act(y, norm, activation="relu", gate=gate)


def network_operands(n=2, h=7, w=5):
    r = torch.randn
    return [
        r(n, 8, h, w),
        r(8, 8, 1, 1),
        r(8, 4, 3, 3),
        r(8, 8, 3, 3),
        r(2, 8),
        r(2),
        r(8, 2),
        r(8),
        r(8),
        r(8).abs() + 0.5,
        r(8),
        r(8),
    ]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("grad", "dynamic"), [(False, False), (True, True)], ids=["inference", "training-any-size"])
def test_compiled_without_a_graph_break(fresh_compiler, grad, dynamic):
    """`aot_eager` traces the operators and their gradients through the fakes, and leaves out the code generator."""
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for sizes in ((2, 7, 5), (3, 13, 6)):
        operands = [t.requires_grad_(grad) for t in network_operands(*sizes)]
        ours, eager = compiled(*operands), network(*operands)
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
        assert ours.stride() == eager.stride()
        if grad:
            grads = [torch.autograd.grad(y, operands, torch.ones_like(y)) for y in (ours, eager)]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        if not dynamic:
            break


@pytest.mark.parametrize("op", OPS[:3])
def test_autocast_is_an_explicit_conversion(op):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 instructions that oneDNN uses")
    conv = BY_OP[op]
    t = conv.operands(torch.float32)
    leaves = {k: v if v is None else v.clone().requires_grad_() for k, v in t.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(**leaves, activation="relu")
        mixed = conv(**leaves | {"x": leaves["x"].bfloat16()}, activation="relu")
        folded = conv(**t, norm=batch_norm(conv.out_channels))
    explicit = conv(**{k: v if v is None else v.bfloat16() for k, v in t.items()}, activation="relu")
    assert y.dtype == folded.dtype == torch.bfloat16
    assert torch.equal(y, explicit) and torch.equal(mixed, explicit)
    y.float().sum().backward()
    for k, v in leaves.items():
        assert v is None or (v.grad is not None and v.grad.dtype == torch.float32), k


@pytest.mark.parametrize("name", ["aten", "reference"])
def test_autocast_leaves_alone_what_eager_leaves_alone(name):
    """As batch_norm, norm_act keeps its input's dtype; float64 stays; gate and packed weights keep their precision."""
    norm, se = small_operands("norm_act"), small_operands("squeeze_excite")
    conv = BY_OP["dense_conv"]
    t = conv.operands(torch.float64)
    bare = conv.operands(torch.float32)
    packed = conv.packed(bare["weight"], bare["bias"], "none")
    with backend(name), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(R.norm_act(norm[0], norm[1:]), R.norm_act(norm[0], norm[1:]).float())
        gate = R.squeeze_excite(*se)
        assert conv(bare["x"], packed).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(**t).dtype == torch.float64
    with backend(name):
        assert torch.equal(gate, R.squeeze_excite(*se))


@pytest.mark.parametrize("op", OPS[:3])
def test_the_operation_is_chosen_by_shape(op):
    """`pack_conv` without `op` serves the operation that the model's blocks would ask for."""
    conv = BY_OP[op]
    t = conv.operands(torch.float32)
    packed = R.pack_conv(
        t["weight"], t["bias"], stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups
    )
    assert packed.op == op
    assert select(packed.problem(t["x"], False, False)).name == "aten"
    assert packed.problem(t["x"], False, False).output_shape == tuple(conv(t["x"], packed).shape)
