"""The depthwise convolution, its gradients, squeeze-excite and ordered sums in the simulator against float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_reference

from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import DepthwiseConv, GroupedConv, Target
from simulator.machine import ORDERS, SimulationError, flattened, run
from simulator.test_grouped_conv import ACTIVATIONS, DTYPES, FORWARD, Forward
from simulator.test_grouped_conv_backward import Backward


def as_groups(problem):
    """The same convolution for the tests of groups: of one channel each."""
    p = problem
    return GroupedConv(p.images, p.height, p.columns, p.channels, 1, p.stride, p.dtype)


def planned(monkeypatch, problem):
    """The tests of groups run this depthwise problem's plans, with its weights' layout."""

    def forward(_, activation, parts, target, config, **options):
        assert options == {"read": None, "moments": False}
        return plans.depthwise_conv_forward(problem, activation, parts)

    def backward(_, **options):
        return plans.depthwise_conv_backward(problem, **options)

    monkeypatch.setattr(plans, "grouped_conv_forward", forward)
    monkeypatch.setattr(plans, "grouped_conv_backward", backward)


def by_tap(weight):
    return weight.flatten(1).t().contiguous()


SIZES = ((2, 7, 9), (1, 1, 1), (3, 6, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [8, 40, 136])
def test_depthwise_forward(monkeypatch, channels, stride, dtype):
    monkeypatch.setattr("simulator.test_grouped_conv.packed", by_tap)
    for size, activation, parts, bias in zip(SIZES, ACTIVATIONS, (True, False, True), (True, False, True), strict=True):
        problem = DepthwiseConv(*size, channels, stride, dtype)
        planned(monkeypatch, problem)
        one = Forward(as_groups(problem), activation, parts, bias)
        y, sums = one.check("random")
        again = one.run("descending")
        assert torch.equal(y, again[0]) and (sums is None or torch.equal(sums, again[1]))


@pytest.mark.parametrize("activation", FORWARD)
def test_depthwise_activations(monkeypatch, activation):
    monkeypatch.setattr("simulator.test_grouped_conv.packed", by_tap)
    problem = DepthwiseConv(2, 9, 7, 40, 1, "bfloat16")
    planned(monkeypatch, problem)
    Forward(as_groups(problem), activation, True).check()


class DepthwiseBackward(Backward):
    @staticmethod
    def packed(weight, problem):
        return by_tap(weight)

    def expected(self, dtype):
        dx, dweight = super().expected(dtype)
        return dx, dweight[:, :, 0].t()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("affine", "norm", "sums", "activation"), [
    (0, False, False, "none"), (1, True, True, "relu"), (2, True, True, "silu"),
])  # fmt: skip
def test_depthwise_backward(monkeypatch, affine, norm, sums, activation, stride, dtype):
    for size, channels in zip(SIZES, (40, 8, 136), strict=True):
        problem = DepthwiseConv(*size, channels, stride, dtype)
        planned(monkeypatch, problem)
        one = DepthwiseBackward(as_groups(problem), affine, norm, sums, activation)
        first, second = one.check("random"), one.check("descending")
        assert all(torch.equal(first[name], second[name]) for name in first)
        one.check(needs_weight=False)
        if not sums:
            one.check(needs_input=False)


@pytest.mark.parametrize(
    ("activation", "gate"), [*((name, "sigmoid") for name in ACTIVATIONS), ("relu", "hardsigmoid")]
)
@pytest.mark.parametrize(
    ("images", "tiles", "channels", "hidden"), [(1, 3, 147, 37), (3, 1, 120, 30), (64, 2, 9, 35), (9, 2, 8, 64)]
)
def test_squeeze_excite(images, tiles, channels, hidden, activation, gate):
    """One image, fewer and more than a block takes, odd widths; the same bits in every order and for every GPU."""
    for dtype, kind in {**DTYPES, "float32": torch.float32}.items():
        parts, fc1 = torch.randn(images, tiles, channels), torch.randn(hidden, channels) / channels**0.5
        fc2, bias1, bias2 = torch.randn(channels, hidden) / hidden**0.5, torch.randn(hidden), torch.randn(channels)
        weights = {"fc1": fc1, "bias1": bias1, "fc2": fc2, "bias2": bias2}

        def compute(kind, parts=parts, weights=weights):
            fc1, bias1, fc2, bias2 = (t.to(kind) for t in weights.values())
            h = ACTIVATIONS[activation](F.linear(parts.to(kind).sum(1), fc1, bias1))
            return FORWARD[gate](F.linear(h, fc2, bias2))

        results = []
        for processors in (1, 5, 132):
            sizes = images, tiles, channels, hidden
            launches = plans.squeeze_excite(*sizes, dtype, activation, Target(90, processors), gate)
            for order in ORDERS:
                found = {"hidden": torch.full((images, hidden), torch.nan)}
                found["gate"] = torch.full((images, channels), torch.nan, dtype=kind)
                run(launches[0], {"parts": parts, "fc1": fc1, "bias1": bias1}, {"hidden": found["hidden"]}, order)
                given = {"values": found["hidden"], "fc2": fc2, "bias2": bias2}
                run(launches[1], given, {"gate": found["gate"]}, order)
                results.append(found["gate"])
        assert_close_to_reference(results[0], compute(torch.float32).to(kind), compute(torch.float64), "gate")
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("channels", "hidden"), [(72, 8), (576, 144), (1512, 378), (3024, 308)])
def test_squeeze_excite_goes_around(channels, hidden):
    """The same kernels for every batch, which read the weights once for eight images; one fills the GPU, or as many
    blocks as have an output for each warp.
    """
    kernels = {}
    for images in (1, 8, 64, 256, 4096):
        planned = plans.squeeze_excite(images, 2, channels, hidden, "float16")
        for launch, outputs in zip(planned, (hidden, channels), strict=True):
            together, down = launch.grid[:2]
            rows = launch.arguments[-1]
            assert together == -(-images // 8) and (down - 1) * rows < outputs <= down * rows
            assert rows == 16 or down <= max(1, 132 // together) < 2 * down
            kernels.setdefault(outputs, set()).add(launch.kernel)
    assert plans.squeeze_excite(1, 2, 576, 144, "float16")[0].grid == (1, 9, 1)
    assert plans.squeeze_excite(1, 2, 576, 144, "float16")[1].grid == (1, 36, 1)
    assert all(len(same) == 1 for same in kernels.values())


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ("squeeze_excite.cu", "    sync_block();\n    for (int r = first", "    for (int r = first"),
        ("depthwise_conv_forward.cu", "    sync_block();\n    for (int i = t", "    for (int i = t"),
        ("depthwise_conv_backward.cu", "    sync_block();  // the sums before", "    // the sums before"),
    ],
)  # fmt: skip
def test_missing_barriers_are_seen(source, right, wrong):
    text = flattened(source)
    assert text.count(right) == 1, "the source has changed: seed the bug again"
    if source == "squeeze_excite.cu":
        launch = plans.squeeze_excite(1, 1, 48, 6, "bfloat16")[0]
        inputs = {"parts": torch.randn(1, 1, 48), "fc1": torch.randn(6, 48), "bias1": torch.randn(6)}
        outputs = {"hidden": torch.zeros(1, 6)}
    else:
        problem = DepthwiseConv(1, 9, 9, 8, 1, "bfloat16")
        names = ("x", "y", "dz", "dx")
        maps = {name: torch.randn(1, 9, 9, 8).bfloat16() for name in names}
        weight = torch.randn(9, 8).bfloat16()
        if "forward" in source:
            launch = plans.depthwise_conv_forward(problem, parts=True)
            inputs, outputs = {"x": maps["x"], "weight": weight, "bias": None}, {"y": maps["y"]}
        else:
            launch = plans.depthwise_conv_backward(problem)[0]
            inputs = {"x": maps["x"], "dz": maps["dz"], "weight": weight}
            inputs |= dict.fromkeys(("y", "a", "q", "b", "scale", "shift", "mean", "invstd", "sums"))
            outputs = {"dx": maps["dx"]}
        outputs |= {name: torch.zeros(shape) for name, shape in launch.buffers.items()}
    run(launch, inputs, outputs)
    for order in ORDERS:
        with pytest.raises(SimulationError, match=r"without a barrier|never written"):
            run(launch, inputs, outputs, order, text.replace(right, wrong))


def test_refusals():
    good = DepthwiseConv(2, 9, 9, 24, 1, "bfloat16")
    assert plans.refuse_depthwise(good) is None
    assert "20 channels" in plans.refuse_depthwise(DepthwiseConv(2, 9, 9, 20, 1, "bfloat16"))
    assert "dilation" in plans.refuse_depthwise(good, dilation=(2, 2))
    with pytest.raises(ValueError, match="a stride of 3"):
        plans.depthwise_conv_forward(DepthwiseConv(2, 9, 9, 24, 3, "bfloat16"))
    with pytest.raises(ValueError, match="shared memory"):
        plans.squeeze_excite(1, 1, 40000, 20000, "bfloat16", target=Target(86, 84))
