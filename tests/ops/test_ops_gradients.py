"""The gradients of every public operation: by finite differences, and against eager's in the compute dtype."""

import itertools

import pytest
import torch
from problems import BY_OP, DTYPES, LAYOUTS, OPS, assert_rule, dtype_name, force_or_skip, grouped, se_operands
from torch.nn import functional as F

import regnet_fast.functional as R
from regnet_fast.backends import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")


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
