"""The fused blocks compute what timm's do: in evaluation and training, under autocast, compiled, for every input."""

import copy
import sys
import threading
import warnings

import pytest
import timm
import torch
from helpers import close, pair, randomize_bn, reasons
from training_blocks import NETWORKS

import regnet_fast
from regnet_fast.backends import BackendError, backend
from regnet_fast.blocks.fused import FallbackWarning

pytestmark = pytest.mark.usefixtures("no_silent_fallback")

SMALL = ["regnetx_002", "regnety_002", "regnetz_005", "regnetz_b16", "regnetv_040", "repvgg_a0", "resnetv2_18"]


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_runs_fused_with_and_without_grad(name):
    ours, theirs = pair(name)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert reasons(ours, x) == {None}
        close(ours(x), theirs(x))
    assert reasons(ours, x) == {None}
    y = ours(x)
    assert y.requires_grad
    close(y, theirs(x))


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_gradients_in_evaluation(name):
    ours, theirs = pair(name)
    ours.double(), theirs.double()
    exact = copy.deepcopy(theirs)
    ours.float(), theirs.float()
    x = torch.randn(2, 3, 64, 64)
    dy = torch.randn(2, 1000)
    inputs = []
    for model, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64)):
        image = x.detach().clone().to(dtype).requires_grad_()
        model(image).backward(dy.to(dtype))
        inputs.append(image.grad)

    def error(g, r):
        return float((g.double() - r).norm() / r.norm().clamp(min=1e-30))

    assert error(inputs[0], inputs[2]) <= 3 * error(inputs[1], inputs[2]) + 1e-5
    for (path, a), b, r in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), path
        assert error(a.grad, r.grad) <= 3 * error(b.grad, r.grad) + 1e-5, path


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_training_runs_fused_and_the_reference_is_timms_bit_for_bit(name):
    ours, theirs = pair(name, drop_path_rate=0.2)
    x, results = torch.randn(4, 3, 64, 64), []
    assert reasons(copy.deepcopy(ours).train(), x) == {None}
    auto, forced, exact = copy.deepcopy(ours), copy.deepcopy(ours), copy.deepcopy(theirs).double()
    for model, name in ((auto, "auto"), (forced, "reference"), (theirs, "auto"), (exact, "auto")):
        torch.manual_seed(0)
        with backend(name):
            y = model.train()(x.to(next(model.parameters()).dtype))
        y.square().mean().backward()
        results.append((y, [p.grad for p in model.parameters()], list(model.buffers())))
    fused, reference, eager, exact = results
    assert torch.equal(reference[0], eager[0])
    assert all(torch.equal(a, b) for i in (1, 2) for a, b in zip(reference[i], eager[i], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(fused[1], eager[1], strict=True))  # other sums, the same function
    ours_error, eager_error = (
        torch.stack([(a - r).norm() / r.norm() for a, r in zip(found[1], exact[1], strict=True)]).median()
        for found in (fused, eager)
    )
    assert ours_error <= 2 * eager_error < 1e-2
    with backend("triton"), pytest.raises(BackendError, match="training"):
        ours.train()(x)


@pytest.mark.long
@pytest.mark.parametrize("name", ["regnety_002", "repvgg_a0", "resnetv2_18", "regnetv_040"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(name, dtype):
    ours, theirs = pair(name)
    x = torch.randn(8, 3, 64, 64)  # bfloat16 errors of few images differ by chance
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert reasons(ours, x) == {None}
        a, b = ours(x), theirs(x)
        assert a.dtype == b.dtype
    with torch.no_grad():
        r = exact(x.double())
    assert (a - r).norm() <= 2 * (b - r).norm()
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_autocast_with_an_identity_shortcut_keeps_timms_dtype():
    ours, theirs = pair("regnetx_002")
    x = torch.randn(1, 368, 7, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        a, b = ours.s4.b2(x), theirs.s4.b2(x)
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, b)


COMPILED = [("regnet_y", True), ("resnet_v2", False)]
COMPILED_LONG = [
    ("regnety_002", True),
    ("repvgg_a0", True),
    *((name, False) for name in ("regnety_002", "regnetz_b16", "regnetv_040", "repvgg_a0", "resnetv2_50d_gn")),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "grad"), [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED_LONG)]
)
def test_compiled_fullgraph(name, grad):
    theirs = NETWORKS[name]() if name in NETWORKS else timm.create_model(name)
    theirs = randomize_bn(theirs.eval(), 0, torch.randn(4, 3, 64, 64))
    ours = regnet_fast.rebuild(theirs, inplace=False).model
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 64, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        y, expected = compiled(x), theirs(x)
    close(y, expected)
    if grad:
        (a,), (b,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
        assert (a - b).norm() <= 0.02 * b.norm()  # one ReLU whose input is nearly zero may fall on either side


def test_layouts_sizes_and_inputs_are_respected():
    ours, theirs = pair("regnety_002")
    base = torch.randn(3, 3, 66, 70)
    inputs = [
        base,
        base.contiguous(memory_format=torch.channels_last),
        base[:, :, ::2, 1::2],
        base[1:2],
        base[:, :1].expand(3, 3, 66, 70),
        torch.randn(2, 3, 1, 1),
        torch.randn(1, 3, 33, 65),
    ]
    with torch.no_grad():
        for x in inputs:
            kept = x.clone()
            a, b = ours(x), theirs(x)
            assert reasons(ours, x) == {None}
            close(a, b)
            assert torch.equal(x, kept)


def test_results_do_not_alias():
    ours, _ = pair("regnetv_040")
    x = torch.randn(1, 128, 8, 8)
    block = ours.s1.b2
    with torch.no_grad():
        kept = x.clone()
        a = block(x)
        b = block(x)
        c = a.clone()
        b.zero_()
    assert torch.equal(a, c) and torch.equal(x, kept)


def test_functional_call_vmap_and_forward_mode():
    ours, theirs = pair("regnety_002")
    x = torch.randn(2, 3, 64, 64)
    other = {k: v * 1.1 for k, v in theirs.named_parameters()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        close(torch.func.functional_call(ours, other, x), torch.func.functional_call(theirs, other, x))
        close(ours(x), theirs(x))
        close(torch.func.vmap(ours)(x[:, None]).flatten(0, 1), theirs(x))
        tangent = torch.randn_like(x)
        a = torch.func.jvp(ours, (x,), (tangent,))[1]
        close(a, torch.func.jvp(theirs, (x,), (tangent,))[1])


def test_checkpointing_and_frozen_parameters():
    ours, theirs = pair("regnety_002")
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    grads = []
    for model in (ours, theirs):
        model.set_grad_checkpointing()
        for p in model.s1.parameters():
            p.requires_grad_(False)
        (g,) = torch.autograd.grad(model(x).square().sum(), x)
        grads.append(g)
    close(*grads)


def test_threads_share_a_model():
    ours, theirs = pair("regnety_002")
    inputs = [torch.randn(1 + i % 2, 3, 32 + 32 * (i % 3), 64) for i in range(12)]
    with torch.no_grad():
        expected = [theirs(x) for x in inputs]
    failures = []

    def work(indices):
        try:
            with torch.no_grad():
                for i in indices:
                    close(ours(inputs[i]), expected[i])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(range(k, 12, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_direct_construction():
    from regnet_fast.hosts.timm import Bottleneck

    block = Bottleneck(16, 24, stride=2, group_size=8).eval()
    plain = timm.models.regnet.Bottleneck(16, 24, stride=2, group_size=8).eval()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(1, 16, 9, 9)
    with torch.no_grad():
        close(block(x), plain(x))


def test_a_call_makes_few_python_calls():
    """At small sizes they are most of its time."""
    model, x, count = regnet_fast.create_model("regnety_002").eval(), torch.randn(1, 3, 64, 64), 0

    def heard(frame, event, argument):
        nonlocal count
        count += event == "call"

    with torch.inference_mode():
        for _ in range(3):
            model(x)
        before = sys.getprofile()
        sys.setprofile(heard)
        try:
            model(x)
        finally:
            sys.setprofile(before)
    assert 40 < count <= 120
