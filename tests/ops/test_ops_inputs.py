"""What the operations take and what they refuse: registration, strides, compilation, bad and borderline input."""

import itertools

import pytest
import torch
from problems import BY_OP, DTYPES, LAYOUTS, OPS, batch_norm, call_op, dtype_name, se_operands, small_operands
from torch import Tensor
from torch._subclasses import FakeTensorMode

import regnet_fast.functional as R
from regnet_fast.backends import ACTIVATIONS, backend, select

pytestmark = pytest.mark.usefixtures("one_thread")


# Registration


def operator_calls(layout: str, dtype: torch.dtype, n: int, grad: bool):
    """Arguments of each registered operator, with channels that are no multiple of 8."""

    def leaf(t):
        t = t.to(dtype)
        return (LAYOUTS[layout](t) if t.dim() == 4 and t.shape[2] == 7 else t).detach().requires_grad_(grad)

    x, gate = torch.randn(n, 6, 7, 5), torch.rand(n, 6)
    se = [leaf(t) for t in se_operands(n, 6, 3)]
    r = torch.randn
    ones, residual = [1, 1], leaf(r(n, 5, 7, 5))
    pointwise = (*map(leaf, (x, r(5, 6, 1, 1), r(5), gate)), residual, ones, [0, 0], ones, 1, "silu", False)
    grouped = (*map(leaf, (x, r(6, 3, 3, 3), r(6))), None, None, [2, 2], ones, ones, 2, "relu", True)
    dense = (leaf(x), leaf(r(5, 6, 3, 3)), None, None, residual, ones, ones, ones, 1, "relu", False)
    yield from {"pointwise_conv": pointwise, "grouped_conv": grouped, "dense_conv": dense}.items()
    yield "norm_act", (*map(leaf, (x, r(6), r(6), gate)), "silu")
    yield "squeeze_excite", (*se, "relu", "sigmoid")


def registered(op: str):
    """The operator behind a public operation."""
    return getattr(torch.ops.regnet_fast, "conv" if op.endswith("_conv") else op)


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
    torch.library.opcheck(registered(op), arguments, test_utils=checks)


@pytest.mark.parametrize("op", OPS)
def test_fakes_promise_the_real_strides_and_dtypes(op):
    """Sizes of 1 leave strides open, and a wrong promise shows only in compiled code far away."""
    for layout, dtype, n in itertools.product(("NCHW", "channels_last", "batch slice"), DTYPES, (0, 1, 2)):
        arguments = dict(operator_calls(layout, dtype, n, False))[op]
        operator = registered(op)
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
        for r, f in zip(*(o if isinstance(o, tuple) else (o,) for o in (real, fake)), strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), f"{op} {layout} {dtype} batch {n}"


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shapes(op):
    result, real = call_op(op, *(t.to("meta") for t in small_operands(op))), call_op(op, *small_operands(op))
    assert (result.shape, result.stride(), result.device.type) == (real.shape, real.stride(), "meta")


# Compilation


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


@pytest.mark.long
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


# Bad input


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


@pytest.mark.parametrize("op", OPS)
def test_arrays_of_other_libraries(op):
    """Are refused with the way that takes them: DLPack, in the memory that they have."""
    operands = small_operands(op)
    arrays = [t.numpy() for t in operands]
    for i in range(len(operands)):
        with pytest.raises(TypeError, match=rf"{op}: .* got numpy\.ndarray; torch\.from_dlpack\(array\) is a tensor"):
            call_op(op, *operands[:i], arrays[i], *operands[i + 1 :])
    with pytest.raises(TypeError, match=f"{op}: expected a torch.Tensor, got builtins.int"):
        call_op(op, 3, *operands[1:])
    tensors = [torch.from_dlpack(array) for array in arrays]
    assert all(t.data_ptr() == array.ctypes.data for t, array in zip(tensors, arrays, strict=True))
    assert torch.equal(call_op(op, *tensors), call_op(op, *operands))


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
    "unknown activation": (ValueError, {"activation": "mish"}),
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
    yield "norm_act", lambda: norm_act(x, (r(6), r(6)), activation="mish")
    yield "norm_act", lambda: norm_act(x, (r(6), r(1)))
    yield "norm_act", lambda: norm_act(x, (torch.tensor(1.0), torch.tensor(1.0)))
    yield "norm_act", lambda: norm_act(x, (r(6), r(6)), gate=r(2, 5))
    yield "norm_act", lambda: norm_act(x, R.BatchNorm(r(6), r(1).abs()))
    yield "squeeze_excite", lambda: R.squeeze_excite(*se_operands(2, 6, 3), activation="mish")


MISTAKES = list(other_mistakes())


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=lambda i: f"{i}-{MISTAKES[i][0]}")
def test_operands_that_do_not_fit_are_refused(i):
    op, call = MISTAKES[i]
    with pytest.raises(ValueError, match=op):
        call()


# Packed weights


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


W3 = torch.zeros(6, 3, 3, 3)
PACKING_MISTAKES = {
    "a linear layer's weight": (r"pack_conv.*\(K, C / groups, R, S\).*\(5, 6\)", (torch.zeros(5, 6),), {}),
    "a 1d convolution's weight": (r"pack_conv.*\(K, C / groups, R, S\).*\(3, 3, 3\)", (W3[0],), {}),
    "groups that do not divide": (r"pack_conv.*6 output channels.*4 groups", (W3,), {"groups": 4}),
    "no groups": (r"pack_conv.*6 output channels.*0 groups", (W3,), {"groups": 0}),
    "negative groups": (r"pack_conv.*6 output channels.*-2 groups", (W3,), {"groups": -2}),
    "an unknown operation": (r"pack_conv.*'conv2d'.*pointwise_conv, grouped_conv, dense_conv", (W3,), {"op": "conv2d"}),
    "no convolution": (r"pack_conv.*'norm_act'.*pointwise_conv, grouped_conv, dense_conv", (W3,), {"op": "norm_act"}),
    "an empty operation": (r"pack_conv.*''.*pointwise_conv, grouped_conv, dense_conv", (W3,), {"op": ""}),
    "3x3 as 1x1": (r"pointwise_conv.*1x1.*\(3, 3\).*dense_conv", (W3,), {"op": "pointwise_conv"}),
    "1x1 with padding": (r"pointwise_conv.*\(1, 0\)", (W3[..., :1, :1],), {"op": "pointwise_conv", "padding": (1, 0)}),
    "1x1 in groups": (r"pointwise_conv.*2 groups", (W3[..., :1, :1],), {"op": "pointwise_conv", "groups": 2}),
    "5x5 as grouped": (
        r"grouped_conv.*3x3.*\(5, 5\)",
        (torch.zeros(6, 3, 5, 5),),
        {"op": "grouped_conv", "padding": 1},
    ),
    "grouped without padding": (r"grouped_conv.*padding.*\(0, 0\)", (W3,), {"op": "grouped_conv", "groups": 2}),
    "a bias for other channels": (r"dense_conv.*\(6,\).*\(5,\)", (W3, torch.zeros(5)), {}),
    "a norm for other channels": (r"dense_conv.*\(6,\).*\(3,\)", (W3,), {"norm": batch_norm(3)}),
    "a norm of one channel": (r"dense_conv.*\(6,\).*\(1,\)", (W3,), {"norm": batch_norm(1)}),
}


@pytest.mark.parametrize("mistake", PACKING_MISTAKES)
def test_pack_conv_refuses_what_it_cannot_pack(mistake):
    """A norm of one channel was spread over all of them, and a 3x3 kernel ran as `pointwise_conv`."""
    message, operands, options = PACKING_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        R.pack_conv(*operands, **options)


def test_pack_conv_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match=r"dense_conv.*mish"):
        R.pack_conv(torch.zeros(3, 3, 3, 3), activation="mish")


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


# Borderline input


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
    clipped = ("relu", "relu6", "hardsigmoid")
    if name == "aten" and activation in clipped and op in ("grouped_conv", "dense_conv"):
        reason = "oneDNN's post-ops that clip turn NaN into a number, as they do in a frozen torch.compile"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    x, *weights = small_operands(op)
    x[1, 2, ...] = torch.nan
    with backend(name):
        y = call_op(op, x, *weights, activation=activation)
    assert not y[0].isnan().any()
    assert y[1].isnan().any()
