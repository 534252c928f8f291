"""Choosing a backend, forcing one, packing weights for it, and Winograd's algorithm."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_close_to_reference
from torch.nn import functional as F

import regnet_fast
import regnet_fast.functional as R
from regnet_fast import backends
from regnet_fast.backends import (
    ACTIVATIONS,
    BACKENDS,
    BackendError,
    ConvProblem,
    Geometry,
    NormActProblem,
    Selection,
    SqueezeExciteProblem,
    backend,
    cuda,
    cudnn,
    forced_backend,
    library,
    native,
    onednn,
    reference,
    select,
    triton,
    winograd,
)
from regnet_fast.backends.problem import Call, Problem
from regnet_fast.ops.convolution import _SHARED_KEPT
from regnet_fast.ops.packed import KEPT, Packed

CONV = ConvProblem((2, 8, 14, 14), 16, (3, 3), Geometry(padding=(1, 1)), "relu", False, False, torch.float32, "cpu")
PROBLEMS: list[Problem] = [
    CONV,
    SqueezeExciteProblem(2, 8, 4, "relu", torch.float32, "cpu"),
    NormActProblem((2, 8, 14, 14), "relu", False, torch.float32, "cpu"),
]

pytestmark = pytest.mark.usefixtures("one_thread")

needs_onednn = pytest.mark.skipif(onednn.refuse(CONV) is not None, reason=str(onednn.refuse(CONV)))


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """Each test starts without a force, whatever the environment of the run says."""
    monkeypatch.delenv("REGNET_FAST_BACKEND", raising=False)
    backends._environment_backend.cache_clear()
    yield
    backends._environment_backend.cache_clear()


def runs_of(packed) -> list[str]:
    return [run.label for run in packed._runs.values()]


# Choosing


def test_the_libraries_are_asked_before_the_reference():
    assert BACKENDS == ("aten", "native", "triton", "cuda", "reference")
    assert [library(name, "cuda:1") for name in BACKENDS] == [cudnn, native, triton, cuda, reference]
    assert library("aten", "cpu") is onednn and library("aten", "xpu") is None


@needs_onednn
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.op)
def test_auto_takes_the_first_that_serves(problem):
    chosen = select(problem)
    assert (chosen.name, chosen.module, chosen.refused) == ("aten", onednn, {})


REFUSALS = {
    "float64": ({"dtype": torch.float64}, r"float32, bfloat16 and float16, not in torch\.float64"),
    "another device": ({"device": "meta"}, r"no fused convolution calls for the device 'meta'"),
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.op)
@pytest.mark.parametrize("what", REFUSALS)
@needs_onednn
def test_a_refusal_has_a_reason_and_the_reference_serves(problem, what):
    changes, reason = REFUSALS[what]
    chosen = select(dataclasses.replace(problem, **changes))
    assert chosen.name == "reference" and list(chosen.refused) == ["aten", "native", "triton", "cuda"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(chosen.refused["aten"])


@pytest.mark.skipif(torch.version.hip is not None, reason="ROCm has no cuDNN at all")
def test_on_a_gpu_it_is_cudnn_that_is_asked():
    """No GPU is needed to refuse."""
    with torch.backends.cudnn.flags(enabled=False):
        assert "cuDNN is missing or switched off" in select(dataclasses.replace(CONV, device="cuda")).refused["aten"]


@pytest.mark.parametrize(
    ("dtype", "supported", "reason"),
    [
        (torch.bfloat16, "_is_mkldnn_bf16_supported", "no bfloat16 instructions"),
        (torch.float16, "_is_mkldnn_fp16_supported", "no float16 instructions"),
    ],
    ids=["bfloat16", "float16"],
)
def test_low_precision_is_served_where_the_cpu_has_it(dtype, supported, reason):
    chosen = select(dataclasses.replace(CONV, dtype=dtype))
    if getattr(torch.ops.mkldnn, supported)():
        assert chosen.name == "aten"
    else:
        assert chosen.name == ("native" if dtype == torch.bfloat16 else "reference")
        assert reason in chosen.refused["aten"]


def test_a_switched_off_library_is_refused():
    with torch.backends.mkldnn.flags(enabled=False):
        chosen = select(CONV)
        assert chosen.name == "native" and "switched off" in chosen.refused["aten"]
        with backend("aten"), pytest.raises(BackendError, match="switched off"):
            R.pointwise_conv(torch.randn(1, 3, 2, 2), torch.randn(3, 3, 1, 1))


def test_nobody_serving_is_an_error(monkeypatch):
    for module in (onednn, native, triton, cuda, reference):
        monkeypatch.setattr(module, "refuse", lambda problem: "on strike")
    with pytest.raises(BackendError, match=r"dense_conv: no backend can serve .*on strike"):
        select(CONV)
    with backend("aten"), pytest.raises(BackendError, match="Backends that can: none"):
        select(CONV)


# Forcing


@pytest.mark.parametrize("name", ["nope", "", "Aten", "aten,", "aten,nope", "auto,aten", "cuda|", "cuda|aten"])
def test_an_unknown_backend_is_refused(name):
    names = "auto, aten, native, triton, cuda, reference"
    with pytest.raises(ValueError, match=rf"Unknown backend .*choose one of: {names}"), backend(name):
        pass
    assert forced_backend() is None


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.op)
def test_a_forced_backend_serves_or_raises_with_operation_reason_and_alternatives(problem):
    with backend("reference"):
        assert select(problem).name == "reference" and select(problem).refused == {}
    unserved = dataclasses.replace(problem, dtype=torch.float64)
    with backend("aten"), pytest.raises(BackendError) as error:
        select(unserved)
    for part in (problem.op, "'aten'", "not in torch.float64", "Backends that can: reference", repr(unserved)):
        assert part in str(error.value)


@needs_onednn
def test_several_forced_backends_are_asked_in_their_order():
    with backend("triton,aten"):
        chosen = select(CONV)
        assert chosen.name == "aten" and list(chosen.refused) == ["triton"]
    with backend("aten,reference"):
        assert select(CONV) == Selection("aten", onednn)
        assert select(dataclasses.replace(CONV, dtype=torch.float64)).name == "reference"
    words = r"'aten,cuda' was.*aten: .*; cuda: .*can: reference\."
    with backend("aten,cuda"), pytest.raises(BackendError, match=words):
        select(dataclasses.replace(CONV, dtype=torch.float64))


def float64_calls():
    def r(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x = r(1, 4, 3, 3)
    return {
        "pointwise_conv": lambda: R.pointwise_conv(x, r(2, 4, 1, 1)),
        "grouped_conv": lambda: R.grouped_conv(x, r(4, 2, 3, 3), groups=2),
        "dense_conv": lambda: R.dense_conv(x, r(2, 4, 3, 3)),
        "norm_act": lambda: R.norm_act(x, (r(4), r(4))),
        "squeeze_excite": lambda: R.squeeze_excite(r(1, 4), r(2, 4), r(2), r(4, 2), r(4)),
    }


@pytest.mark.parametrize("op", float64_calls())
def test_the_operations_raise_where_the_forced_backend_cannot_serve(op):
    call = float64_calls()[op]
    with backend("aten"), pytest.raises(BackendError, match=rf"{op}: the backend 'aten' was asked for"):
        call()
    call()


def test_forces_nest_and_end():
    assert forced_backend() is None
    with backend("aten"):
        with backend("reference"):
            assert forced_backend() == "reference"
            with backend("auto"):
                assert forced_backend() is None
            assert forced_backend() == "reference"
        assert forced_backend() == "aten"
        with contextlib.suppress(KeyError), backend("reference"):
            raise KeyError
        assert forced_backend() == "aten"
    assert forced_backend() is None


def test_a_force_stays_in_its_thread():
    seen, inside, forced = {}, threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        seen["before"] = forced_backend()
        with backend("aten"):
            forced.set()
            seen["within"] = forced_backend()

    thread = threading.Thread(target=other)
    thread.start()
    with backend("reference"):
        inside.set()
        assert forced.wait(10)
        thread.join(10)
        assert forced_backend() == "reference"
    assert seen == {"before": None, "within": "aten"}


def test_the_environment_forces_and_a_block_overrules_it(monkeypatch):
    monkeypatch.setenv("REGNET_FAST_BACKEND", "reference")
    backends._environment_backend.cache_clear()
    assert forced_backend() == "reference"
    with backend("aten"):
        assert forced_backend() == "aten"
    with backend("auto"):
        assert forced_backend() is None
    monkeypatch.setenv("REGNET_FAST_BACKEND", "nope")
    backends._environment_backend.cache_clear()
    with pytest.raises(ValueError, match="Unknown backend 'nope'"):
        forced_backend()


@pytest.mark.long
def test_the_environment_forces_a_new_process():
    code = (
        "import torch, regnet_fast.functional as R\n"
        "from regnet_fast.backends import BackendError, forced_backend\n"
        "x, w = torch.randn(1, 3, 2, 2).double(), torch.randn(3, 3, 1, 1).double()\n"
        "try: R.pointwise_conv(x, w)\n"
        "except BackendError as e: print(forced_backend(), e)"
    )
    environment = os.environ | {"REGNET_FAST_BACKEND": "aten", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("aten pointwise_conv: the backend 'aten' was asked for")


# A wrong kernel


def break_last_column(run):
    def broken(*arguments):
        y = run(*arguments)
        y[..., -1] *= 1.01
        return y

    broken = Call(broken, "broken")
    broken.shape = None
    return broken


def test_a_wrong_kernel_is_caught(monkeypatch):
    """The test of the tests: a last column that is off by a hundredth, which a correlation would not see."""
    prepare = onednn.prepare_conv
    monkeypatch.setattr(onednn, "prepare_conv", lambda *arguments: break_last_column(prepare(*arguments)))
    x, weight = torch.randn(2, 8, 13, 13), torch.randn(8, 4, 3, 3) / 6
    eager = F.conv2d(x, weight, padding=1, groups=2)
    ref = F.conv2d(x.double(), weight.double(), padding=1, groups=2)
    with backend("reference"):
        assert_close_to_reference(R.grouped_conv(x, weight, groups=2), eager, ref, "whole", 2)
    with backend("aten"), pytest.raises(AssertionError, match=r"last column(?s:.)*worst at \(\d, \d, \d+, 12\)"):
        assert_close_to_reference(R.grouped_conv(x, weight, groups=2), eager, ref, "broken", 2)


# Problems


def test_a_problem_knows_its_output_and_its_work():
    geometry = Geometry((2, 1), (1, 2), (1, 2), 2)
    p = ConvProblem((2, 6, 13, 7), 10, (3, 5), geometry, "none", True, True, torch.bfloat16, "cpu")
    y = F.conv2d(torch.randn(p.input_shape), torch.randn(10, 3, 3, 5), None, *geometry)
    assert p.output_shape == tuple(y.shape)
    assert p.flops == 2 * y.numel() * 3 * 3 * 5
    assert p.bytes == 2 * (2 * 6 * 13 * 7 + 2 * y.numel() + 10 * 3 * 3 * 5 + 10 + 2 * 6)


# Packing


@needs_onednn
def test_a_force_reaches_weights_that_are_already_packed():
    """They kept the backend of their first call, so that a forced comparison compared a backend with itself."""
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    conv = R.pack_conv(torch.randn(8, 32, 1, 1))
    block = regnet_fast.create_model("regnety_002", pretrained=False).eval().s1.b1
    for name in ("auto", "reference", "aten", "reference", "auto"):
        with torch.no_grad(), backend(name):
            R.pointwise_conv(x, conv)
            block(x)
            units = [unit for unit in vars(block.plan(x).form).values() if isinstance(unit, Packed)]
            labels = {label for packed in (conv.here(x), *units) for label in runs_of(packed)}
        assert len(units) == 5 and (labels == {reference.LABEL}) == (name == "reference")
        assert name == "reference" or reference.LABEL not in labels
    with backend("aten"), torch.backends.mkldnn.flags(enabled=False), pytest.raises(BackendError):
        R.pointwise_conv(torch.randn(1, 32, 4, 4), conv)


@needs_onednn
def test_labels_say_what_runs():
    x = torch.randn(4, 256, 14, 14)
    cases = {
        "oneDNN": R.pack_conv(torch.randn(8, 256, 1, 1), stride=2),
        "torch addmm": R.pack_conv(torch.randn(4, 256, 1, 1)),
        onednn.WinogradConv.label: R.pack_conv(torch.randn(256, 256, 3, 3), padding=1),
    }
    for label, packed in cases.items():
        getattr(R, packed.op)(x, packed)
        assert runs_of(packed) == [label]


@pytest.mark.parametrize(("force", "most"), [("reference", KEPT), ("auto", _SHARED_KEPT)])
def test_only_the_last_shapes_are_kept(force, most):
    packed = R.pack_conv(torch.randn(5, 3, 1, 1))
    shapes = [(1, 3, h, w) for h in range(1, 8) for w in range(1, 8)]
    with backend(force):
        for shape in shapes:
            x = torch.randn(shape)
            R.pointwise_conv(x, packed)
        assert [tuple(key[0]) for key in packed.here(x)._runs] == shapes[-most:]
    x = torch.randn(shapes[0])  # one that was dropped
    with backend("reference"):
        expected = R.pointwise_conv(x, packed.weight)
    torch.testing.assert_close(R.pointwise_conv(x, packed), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_packed_once(monkeypatch):
    calls = []
    prepare = onednn.prepare_conv
    monkeypatch.setattr(onednn, "prepare_conv", lambda *a: calls.append(a[0].input_shape) or prepare(*a))
    packed = R.pack_conv(torch.randn(5, 3, 1, 1))
    with backend("aten"):
        for n in (1, 2, 1, 2, 1):
            R.pointwise_conv(torch.randn(n, 3, 4, 4), packed)
    assert calls == [(1, 3, 4, 4)]


@pytest.fixture
def impatient_threads():
    """Threads that take turns as often as they can, so that a race shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_packed_weights_are_shared_between_threads(impatient_threads):
    """More shapes than are kept, so that threads also pack and drop at the same time."""
    packed = R.pack_conv(torch.randn(26, 5, 3, 3), torch.randn(26), padding=1, activation="silu")
    inputs = [torch.randn(n, 5, h, w) for n in (1, 3) for h in (2, 7) for w in (1, 5, 13)]
    expected = [R.dense_conv(x, packed) for x in inputs]
    start = threading.Barrier(8)

    def work(seed):
        order = torch.randint(len(inputs), (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        start.wait(30)
        return [(i, R.dense_conv(inputs[i], packed)) for i in order]

    with ThreadPoolExecutor(8) as pool:
        results = [pair for part in pool.map(work, range(8)) for pair in part]
    assert {i for i, _ in results} == set(range(len(inputs)))
    for i, y in results:
        assert torch.equal(y, expected[i]), f"input {i}: {(y - expected[i]).abs().max()}"
    assert len(packed._runs) <= _SHARED_KEPT


@needs_onednn
def test_sizes_with_other_layouts_share_plain_weights_from_the_third_on(monkeypatch):
    """As oneDNN wants them for some sizes on some processors; and no weight is folded again after that."""
    conv, folds = R.pack_conv(torch.randn(4, 2, 3, 3), torch.randn(4), padding=1), []
    folded = conv.folded
    monkeypatch.setattr(conv, "folded", lambda: folds.append(1) or folded())
    monkeypatch.setattr(onednn, "_layout", lambda weight: object())  # no two alike
    for width in (4, 5, 4, 6, 7, 8, 4, 5):
        x = torch.randn(1, 2, 4, width)
        y = R.dense_conv(x, conv)
        torch.testing.assert_close(y, torch.conv2d(x, conv.weight, conv.bias, 1, 1), rtol=1e-5, atol=1e-5)
    assert len(folds) == 3
    weights = {id(run.weight): run.weight for run in [*conv._runs.values(), *conv._unpacked.values()]}
    assert [weight.is_mkldnn for weight in weights.values()] == [False]


CONVOLUTIONS = {
    "dense": ((32, 16, 3, 3), {"padding": 1}),
    "grouped": ((32, 8, 3, 3), {"padding": 1, "groups": 4}),
    "depthwise": ((24, 1, 3, 3), {"padding": 1, "groups": 24, "stride": 2}),
    "pointwise, small and large": ((64, 48, 1, 1), {"activation": "silu"}),
    "Winograd for some": ((256, 256, 3, 3), {"padding": 1, "activation": "relu"}),
}


@needs_onednn
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("one_layout", [True, False])
def test_results_do_not_depend_on_the_shapes_seen_before(name, one_layout, monkeypatch):
    """More sizes than are packed, of all the ways; each to the very bits of a convolution that saw it alone."""
    size, options = CONVOLUTIONS[name]
    weight, bias = torch.randn(size), torch.randn(size[0])
    inputs = [
        torch.randn(n, size[1] * options.get("groups", 1), h, w)
        for n, h, w in [(1, 4, 6), (2, 14, 14), (1, 15, 13), (4, 8, 8), (1, 40, 36), (3, 16, 16), (1, 2, 2)]
    ]
    op = getattr(R, R.pack_conv(weight, **options).op)
    alone = [op(x, R.pack_conv(weight, bias, **options)) for x in inputs]
    if not one_layout:
        monkeypatch.setattr(onednn, "_layout", lambda weight: object())
    conv = R.pack_conv(weight, bias, **options)
    for _ in range(2):
        for x, expected in zip(inputs, alone, strict=True):
            assert torch.equal(op(x, conv), expected), tuple(x.shape)
    kept = {id(run.weight): type(run) for run in [*conv._runs.values(), *conv._unpacked.values()]}
    assert len(kept) == len(set(kept.values())), kept  # one weight for each way


@needs_onednn
def test_a_layout_reads_the_same_in_every_thread():
    """oneDNN's description has bytes between its members that nobody writes."""
    weight = torch.randn(16, 8, 3, 3)
    packed = onednn._packed(weight, ([1, 1], [1, 1], [1, 1], 2), (1, 16, 8, 8))
    expected = onednn._layout(packed)
    assert expected[:6] == (2, 8, 8, 3, 3, 0) and expected != onednn._layout(weight.to_mkldnn())

    def work(depth):
        return onednn._layout(packed) if depth == 0 else work(depth - 1)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(64))) == {expected}


@needs_onednn
@pytest.mark.parametrize("groups", [1, 2])
def test_a_residual_of_another_size_raises(groups):
    conv = R.pack_conv(torch.randn(4, 4 // groups, 3, 3), padding=1, groups=groups)
    x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"cannot add a residual of shape \(1, 4, 3, 3\)"):
        conv(x, None, torch.randn(1, 4, 3, 3))


@pytest.mark.parametrize(
    ("available", "capability", "reason"),
    [
        (False, (9, 0), "there is no GPU here"),
        (True, (7, 5), "the kernels need a GPU of compute capability 8.0 or newer"),
        (True, (8, 0), None),
        (True, (12, 0), None),
    ],
)
def test_gpus_that_triton_serves(monkeypatch, available, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = dataclasses.replace(CONV, device="cuda")
    assert triton.refuse(problem) == reason
    if reason is not None:
        with backend("triton"), pytest.raises(BackendError, match=reason):
            select(problem)


def test_two_kinds_of_gpu_in_one_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {"cuda:0": (9, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    first, second = (dataclasses.replace(CONV, device=f"cuda:{i}") for i in range(2))
    assert triton.refuse(first) is None
    assert triton.refuse(second) == "the kernels need a GPU of compute capability 8.0 or newer"
    with backend("reference"):
        assert select(second).name == "reference"


# Winograd

WINOGRAD = ConvProblem(
    (4, 256, 14, 14), 256, (3, 3), Geometry(padding=(1, 1)), "relu", False, True, torch.float32, "cpu"
)


def winograd_case(n, c, k, h, w, activation, bias=True):
    problem = dataclasses.replace(WINOGRAD, input_shape=(n, c, h, w), out_channels=k, activation=activation)
    x = torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(k, c, 3, 3) / (9 * c) ** 0.5
    residual = torch.randn(n, k, h, w).contiguous(memory_format=torch.channels_last)
    return problem, x, weight, torch.randn(k) if bias else None, residual


@needs_onednn
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(14, 14), (15, 17), (28, 14), (7, 7)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_winograd(batch, size, activation):
    """At 64 channels and any size, where it is judged against the direct convolution; `faster` picks more of both."""
    bias = size != (7, 7)
    problem, x, weight, bias, residual = winograd_case(batch, 64, 72, *size, activation, bias)
    run = onednn.WinogradConv(problem, weight, bias)
    for r in (None, residual):
        before = [t.clone() for t in (x, weight, residual)]
        y = run(x, None, r, False, False)
        assert y.shape == residual.shape and y.is_contiguous(memory_format=torch.channels_last)
        assert all(map(torch.equal, before, (x, weight, residual)))
        eager = reference.conv(x, weight, bias, None, r, problem.geometry, activation)
        wide = [None if t is None else t.double() for t in (x, weight, bias, None, r)]
        ref = reference.conv(*wide, problem.geometry, activation)
        assert_close_to_reference(y, eager, ref, f"winograd {batch} {size} {activation} residual={r is not None}")


@needs_onednn
def test_winograd_of_awkward_channels():
    """Few channels or pixels are beyond the rule: the direct convolution then adds up too little to be inexact."""
    for n, c, k, h, w in ((1, 1, 1, 2, 2), (3, 5, 3, 7, 4), (2, 26, 31, 13, 5), (1, 64, 3, 1, 2), (2, 7, 26, 1, 1)):
        problem, x, weight, bias, _ = winograd_case(n, c, k, h, w, "none")
        y = onednn.WinogradConv(problem, weight, bias)(x, None, None, False, False)
        ref = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        torch.testing.assert_close(y.double(), ref, rtol=0, atol=4e-6)


@needs_onednn
def test_winograd_works_under_a_default_device():
    problem, x, weight, bias, _ = winograd_case(1, 8, 8, 4, 4, "none")
    run = onednn.WinogradConv(problem, weight, bias)
    with torch.device("meta"):
        y = run(x, None, None, False, False)
    assert torch.equal(y, run(x, None, None, False, False))


def test_transformed_weights_multiply_back():
    """B^T d B and A^T m A written as matrices, on one tile: the sixteen products give the four outputs exactly."""
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    u = winograd.transformed_weights(weight).view(4, 4, 3, 2)
    bt = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
    at = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)
    d = torch.randn(2, 4, 4, dtype=torch.float64)
    m = torch.einsum("abkc,cab->kab", u, bt @ d @ bt.T)
    torch.testing.assert_close(at @ m @ at.T, F.conv2d(d[None], weight)[0], rtol=1e-12, atol=1e-12)


SLOWER = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "few input channels": {"input_shape": (8, 255, 14, 14)},
    "few output channels": {"input_shape": (8, 256, 14, 14), "out_channels": 255},
    "transformed tiles too large": {"input_shape": (8, 256, 28, 28)},
    "odd height": {"input_shape": (1, 256, 15, 14)},
    "odd width": {"input_shape": (1, 256, 14, 15)},
    "little work": {"input_shape": (1, 256, 14, 14)},
    "large image": {"input_shape": (1, 256, 14, 34)},
    "another kernel": {"kernel": (5, 5)},
    "stride": {"geometry": Geometry((2, 2), (1, 1))},
    "no padding": {"geometry": Geometry()},
    "dilation": {"geometry": Geometry((1, 1), (2, 2), (2, 2))},
    "groups": {"geometry": Geometry(padding=(1, 1), groups=2)},
    "gate": {"gate": True},
}


@pytest.mark.parametrize("what", SLOWER)
def test_winograd_is_not_chosen_where_it_was_not_measured_faster(what):
    assert not winograd.probable(dataclasses.replace(WINOGRAD, **SLOWER[what]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_shape": (16, 512, 7, 7), "out_channels": 512},
        {"input_shape": (1, 256, 28, 28)},
        {"activation": "silu", "residual": False},
    ],
    ids=str,
)
def test_winograd_is_chosen_where_it_was_measured_faster(changes):
    assert winograd.probable(dataclasses.replace(WINOGRAD, **changes))
