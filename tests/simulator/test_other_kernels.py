"""The depthwise convolution, its gradients, squeeze-excite and ordered sums in the simulator against float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_reference

from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import DepthwiseConv, GroupedConv, Target
from simulator.machine import ORDERS, SimulationError, flattened, run
from simulator.test_grouped_conv import ACTIVATIONS, DTYPES, Forward
from simulator.test_grouped_conv_backward import Backward


def as_groups(problem):
    """The same convolution for the tests of groups: of one channel each."""
    p = problem
    return GroupedConv(p.images, p.height, p.columns, p.channels, 1, p.stride, p.dtype)


def planned(monkeypatch, problem):
    """The tests of groups run this depthwise problem's plans, with its weights' layout."""

    def forward(_, activation, parts, target, config):
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("images", "tiles", "channels", "hidden"), [(1, 3, 48, 6), (5, 1, 120, 30), (6, 2, 8, 64)])
def test_squeeze_excite(images, tiles, channels, hidden, activation):
    for dtype, kind in {**DTYPES, "float32": torch.float32}.items():
        parts, fc1, fc2 = (
            torch.randn(images, tiles, channels),
            torch.randn(hidden, channels),
            torch.randn(channels, hidden),
        )
        fc1, fc2, bias1, bias2 = fc1 / channels**0.5, fc2 / hidden**0.5, torch.randn(hidden), torch.randn(channels)
        weights = {"fc1": fc1, "bias1": bias1, "fc2": fc2, "bias2": bias2}

        def gate(kind, parts=parts, weights=weights):
            fc1, bias1, fc2, bias2 = (t.to(kind) for t in weights.values())
            h = ACTIVATIONS[activation](F.linear(parts.to(kind).sum(1), fc1, bias1))
            return F.linear(h, fc2, bias2).sigmoid()

        for processors in (1, 2, 132):
            launch = plans.squeeze_excite(images, tiles, channels, hidden, dtype, activation, Target(90, processors))
            found = torch.full((images, channels), torch.nan, dtype=kind)
            for order in ORDERS:
                run(launch, {"parts": parts, **weights}, {"gate": found}, order)
            assert_close_to_reference(found, gate(torch.float32).to(found.dtype), gate(torch.float64), "gate")


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ("squeeze_excite.cu", "    sync_block();\n    for (int r = warp", "    for (int r = warp"),
        ("squeeze_excite.cu", "    sync_block();\n    for (int c = 2 * warp", "    for (int c = 2 * warp"),
        ("depthwise_conv_forward.cu", "    sync_block();\n    for (int i = t", "    for (int i = t"),
        ("depthwise_conv_backward.cu", "    sync_block();  // the sums before", "    // the sums before"),
    ],
)  # fmt: skip
def test_missing_barriers_are_seen(source, right, wrong):
    text = flattened(source)
    assert text.count(right) == 1, "the source has changed: seed the bug again"
    if source == "squeeze_excite.cu":
        launch = plans.squeeze_excite(1, 1, 48, 6, "bfloat16")
        inputs = {"parts": torch.randn(1, 1, 48), "fc1": torch.randn(6, 48), "bias1": torch.randn(6)}
        inputs |= {"fc2": torch.randn(48, 6), "bias2": torch.randn(48)}
        outputs = {"gate": torch.zeros(1, 48, dtype=torch.bfloat16)}
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
    with pytest.raises(ValueError, match="pairs"):
        plans.squeeze_excite(1, 1, 7, 2, "bfloat16")
    with pytest.raises(ValueError, match="shared memory"):
        plans.squeeze_excite(1, 1, 40000, 20000, "bfloat16", target=Target(86, 84))
