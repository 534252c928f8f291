"""Every public operation against float64, and what it may do to memory.

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
from problems import (
    BY_OP,
    CHANNELS_LAST,
    CONVS,
    DTYPES,
    LAYOUTS,
    OPS,
    Untouched,
    assert_fresh,
    assert_rule,
    batch_norm,
    double,
    draws,
    dtype_name,
    force_or_skip,
    grouped,
    pointwise,
    se_operands,
    small_operands,
)
from torch import Tensor
from torch.nn import functional as F

import regnet_fast.functional as R
from regnet_fast.backends import ACTIVATIONS, backend, pixel_means, reference

pytestmark = pytest.mark.usefixtures("one_thread")


# The convolutions


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
        for bias, gate, residual, activation in itertools.product(*[(False, True)] * 3, ("none", "relu", "silu")):
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


# norm_act and squeeze_excite


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


# Autocast


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
