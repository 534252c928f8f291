"""Training steps with csrc/'s grouped convolutions, in the simulator, against float64."""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
from helpers import assert_close_to_reference, randomize_bn, reasons
from simulator.stand_in import TARGET, simulate, simulated
from timm.models import regnet

import regnet_fast
from regnet_fast.backends import BackendError, backend, cuda
from regnet_fast.backends.cuda import launcher, nvrtc
from regnet_fast.backends.passes import TORCH, passes_for
from regnet_fast.backends.passes import cuda as cuda_passes
from regnet_fast.backends.passes.operands import Conv, Excite, Norm, OutputGrad, OutputNorm, Sums

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = cuda_passes.CudaConvs()
EPS = 1e-3


def narrow(t, dtype):
    return t.to(dtype).contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


@dataclasses.dataclass
class Case:
    """A convolution of a map that is read through a norm, the gradient that arrives, and the norm behind it."""

    width: int
    groups: int
    stride: int = 1
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = "relu"
    own: str | None = "batch"
    size: tuple[int, int, int] = (2, 7, 9)
    device: str = "cpu"

    def __post_init__(self):
        (n, h, w), channels = self.size, self.width * self.groups
        out = (n, channels, -(-h // self.stride), -(-w // self.stride))
        self.x = narrow(torch.randn(n, channels, h, w), self.dtype)
        self.weight = (torch.randn(channels, self.width, 3, 3) / (9 * self.width) ** 0.5).to(self.dtype)
        self.grad, self.y = (narrow(torch.randn(out), self.dtype) for _ in range(2))
        self.vectors = [torch.rand(channels) + 0.5 for _ in range(8)]
        for name in ("x", "weight", "grad", "y"):
            setattr(self, name, getattr(self, name).to(self.device))
        self.vectors = [vector.to(self.device) for vector in self.vectors]

    def launching(self):
        """On a CPU the simulator."""
        return simulated() if self.device == "cpu" else nullcontext()

    @property
    def conv(self):
        return Conv(self.weight, ((self.stride,) * 2, (1, 1), (1, 1), self.groups))

    def arguments(self, dtype):
        """Those of `convs_backward`, with the maps in a dtype and the rest in float32, or all in float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        var, weight, bias, own_var, own_weight, product, plain, mean = (t.to(wide) for t in self.vectors)
        norm = own = None
        if self.activation is not None:
            norm = Norm(mean - 1, var, weight, bias - 1, EPS, self.activation)
        if self.own is not None:
            sums = Sums(product * 50, plain * 50) if self.own == "batch" else None
            own = OutputNorm(mean - 0.7, own_var, own_weight, EPS, sums, self.y.numel() / self.y.shape[1])
        weight, geometry = self.conv
        maps = [OutputGrad(self.grad.to(dtype), own, self.y.to(dtype))]
        return maps, self.x.to(dtype), norm, None, [Conv(weight.to(dtype), geometry)]


def vector(found):
    """The gradients of a weight and the sums, each with an RMS near 1."""
    parts = [found.weights[0]] + ([] if found.sums is None else list(found.sums))
    return [part.double().flatten() for part in parts if part is not None]


def check_gradients(case, needs_x=True, needs_weight=True, through=True):
    """`convs_backward` of csrc/ is as near to float64 as the framework's own calls."""
    options = needs_x, [needs_weight], through
    with case.launching():
        assert cuda_passes.refuse(case.x, None, [case.conv]) is None
        ours = OURS.convs_backward(*case.arguments(case.dtype), *options)
    eager = TORCH.convs_backward(*case.arguments(case.dtype), *options)
    exact = TORCH.convs_backward(*case.arguments(torch.float64), *options)
    if needs_x:
        assert ours.x.is_contiguous(memory_format=torch.channels_last)
        assert_close_to_reference(ours.x, eager.x, exact.x, "dx", case.groups)
    assert (ours.x is None) != needs_x and (ours.weights[0] is None) != needs_weight
    assert (ours.sums is None) == (eager.sums is None) and ours.excite is None
    scales = [part.square().mean().sqrt() for part in vector(exact)]
    flat = [torch.cat([part / s for part, s in zip(vector(f), scales, strict=True)]) for f in (ours, eager, exact)]
    if scales:
        assert_close_to_reference(*(f.to(case.dtype) for f in flat[:2]), flat[2], "weight and sums")
    if needs_weight:
        assert ours.weights[0].shape == case.weight.shape and ours.weights[0].dtype == case.dtype
    return ours


BF16, FP16 = torch.bfloat16, torch.float16
GRADIENTS = [
    (8, 5), (8, 3, 2, FP16, "silu"), (16, 3, 2), (24, 3, 1, FP16, "silu", "fixed"), (24, 2, 2, BF16, None),
    (40, 2, 1, BF16, "none", None), (72, 2, 2, FP16), (1, 40), (1, 24, 2, FP16, "silu", "fixed"),
]  # fmt: skip


@pytest.mark.parametrize("facts", GRADIENTS, ids=str)
def test_gradients(facts):
    check_gradients(Case(*facts))


@pytest.mark.parametrize("options", [(False, True), (True, False), (True, True, False)])
@pytest.mark.parametrize("width", [24, 1])
def test_some_gradients(width, options):
    """The weight's alone, the map's alone, and that of the map as it was read."""
    check_gradients(Case(width, 48 // width, 1, BF16, "silu"), *options)


def test_layouts_and_alignment():
    """Maps that are contiguous, and operands that begin two bytes after an aligned address."""
    case = Case(8, 3)
    expected = check_gradients(case)
    (one,), x, *rest = case.arguments(case.dtype)
    moved = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (one.grad, one.y, x)]
    moved.append(torch.empty(case.weight.numel() + 1, dtype=BF16)[1:].view(case.weight.shape).copy_(case.weight))
    rest[-1] = [Conv(moved[3], case.conv.geometry)]
    before = [t.clone() for t in moved]
    with simulated():
        found = OURS.convs_backward([OutputGrad(moved[0], one.norm, moved[1])], moved[2], *rest, True, [True])
    assert torch.equal(found.x, expected.x) and torch.equal(found.weights[0], expected.weights[0])
    assert all(torch.equal(*pair) for pair in zip(moved, before, strict=True))


def check_forward(case, measured=True):
    """`convs` of csrc/ is as near to float64 as the framework's own calls; the statistics are those of its result."""
    _, *arguments = case.arguments(case.dtype)
    with case.launching():
        ((y, found),) = OURS.convs(*arguments, [measured])
    eager, exact = (TORCH.convs(*case.arguments(dtype)[1:], [measured])[0][0] for dtype in (case.dtype, torch.float64))
    assert_close_to_reference(y, eager, exact, "y", case.groups)
    assert y.is_contiguous(memory_format=torch.channels_last) and (found is None) != measured
    if measured:
        var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(found[0].double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1].double(), var, rtol=1e-5, atol=1e-6)


FORWARD = [(8, 5), (16, 3, 2, FP16, "silu"), (24, 2, 1, BF16, None), (40, 2, 2, BF16, "none"), (72, 1), (1, 24)]


@pytest.mark.parametrize("facts", FORWARD, ids=str)
def test_forward(facts):
    check_forward(Case(*facts))


def test_forward_without_statistics_and_of_one_pixel():
    check_forward(Case(24, 2), measured=False)
    check_forward(Case(8, 3, size=(2, 1, 1)))


# Models


def network(group_size, **options):
    """A small RegNet of four stages with six blocks."""
    config = dict(w0=group_size, wa=1.5 * group_size, wm=2.0, depth=6, group_size=group_size, stem_width=8)
    return regnet.RegNet(regnet.RegNetCfg(**config | {"act_layer": "silu"} | options), num_classes=5)


def step(model, x, dy, forced="auto"):
    with backend(forced):
        y = model(x)
    y.backward(dy.to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return y.detach(), gradients, {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def check_step(theirs, dtype, x, forced="cuda,aten", device="cpu", launching=None):
    """One step of a rebuilt model with the backend forced is as near to float64 as eager's. Returns the simulator's
    launches; none on a GPU, and none where something else is to launch, `launching`.
    """
    randomize_bn(theirs, 0, (4, 3, 64, 64)).train().to(device)
    x, heard = x.to(device), []

    def hear(launch, tensors):
        heard.append(launch.kernel.partition("<")[0])
        simulate(launch, tensors)

    ours, exact = regnet_fast.rebuild(copy.deepcopy(theirs)).model, copy.deepcopy(theirs).double()
    dy = torch.randn(copy.deepcopy(theirs)(x).shape, device=device)
    if launching is None:
        launching = launcher.standing_in(hear, TARGET) if device == "cpu" else nullcontext()
    with launching:
        with backend(forced):
            assert reasons(copy.deepcopy(ours).to(dtype), x.to(dtype)) == {None}
        heard.clear()
        found = [step(ours.to(dtype), x.to(dtype), dy, forced)]
    found += [step(theirs.to(dtype), x.to(dtype), dy), step(exact, x.double(), dy)]
    assert_close_to_reference(*(one[0] for one in found), "output")
    for i, what in ((1, "gradients"), (2, "statistics")):
        scale = {name: value.square().mean().sqrt() + 1e-12 for name, value in found[2][i].items()}
        vectors = [torch.cat([(one[i][k].double() / s).flatten() for k, s in scale.items()]) for one in found]
        assert_close_to_reference(*(v.to(dtype) for v in vectors[:2]), vectors[2], what)
    return heard


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"se_ratio": 0.25}, {"preact": True}], ids=str)
@pytest.mark.parametrize("group_size", [8, 24])
def test_models(group_size, options):
    model = network(group_size, **options)
    heard = check_step(model, torch.bfloat16, torch.randn(4, 3, 40, 40))
    grouped = sum(getattr(module, "groups", 1) > 1 for module in model.modules())
    assert heard.count("grouped_conv_backward") == heard.count("grouped_conv_forward") == grouped >= 5
    assert heard.count("merged_moments") == grouped


def test_what_computes_a_step(monkeypatch):
    """The first named backend that can: csrc/ its convolutions, and the rest whatever is named behind it."""
    x = Case(8, 3).x
    with backend("cuda,aten"):
        chosen = passes_for(x)
        assert type(chosen) is cuda_passes.CudaConvs and chosen.join.__func__ is TORCH.join.__func__
    for name in ("aten,cuda", "aten", "auto"):
        with backend(name):
            assert passes_for(x) is TORCH
    with backend("cuda"), pytest.raises(BackendError, match=r"'cuda' was asked for.*name what computes the rest"):
        passes_for(x)


LEFT = {
    "behind squeeze-excite": ({}, {"excite": True}),
    "read their map together": ({}, {"convs": 2}),
    "grouped convolutions alone": ({"groups": 1, "width": 8}, {}),
    "not in float32": ({"dtype": torch.float32}, {}),
    "groups of 12 channels": ({"width": 12}, {}),
    "groups of 4 channels": ({"width": 4}, {}),
    "groups of 328 channels": ({"width": 328, "groups": 2, "size": (1, 2, 2)}, {}),
    "an empty map": ({"size": (0, 7, 9)}, {}),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_to_the_others(reason):
    """With the reason; and the others compute it."""
    changes, options = LEFT[reason]
    case = Case(**{"width": 8, "groups": 3} | changes)
    c = case.x.shape[1]
    excite = Excite(torch.randn(2, c), torch.randn(2), torch.randn(c, 2), torch.randn(c), "relu")
    excite, convs = excite if "excite" in options else None, [case.conv] * options.get("convs", 1)
    with simulated():
        assert reason in cuda_passes.refuse(case.x, excite, convs)
    assert "run on an NVIDIA GPU" in cuda_passes.refuse(case.x, None, [case.conv])
    if case.x.shape[0] and excite is None and len(convs) == 1:
        with launcher.standing_in(lambda *launched: pytest.fail("nothing is launched"), TARGET):
            ours = OURS.convs_backward(*case.arguments(case.dtype), True, [True])
        assert torch.equal(ours.x, TORCH.convs_backward(*case.arguments(case.dtype), True, [True]).x)


def test_without_a_way_to_the_kernels_the_others_compute(monkeypatch):
    """No extension module and no compiler: both halves of a step are those of the passes behind."""
    asked = []
    monkeypatch.setattr(cuda, "no_way", lambda launches, device: asked.append(launches) or "no compiler")
    case = Case(8, 3)
    arguments = case.arguments(case.dtype)
    with launcher.standing_in(lambda *launched: pytest.fail("nothing is launched"), TARGET):
        ((y, _),) = OURS.convs(*arguments[1:], [False])
        found = OURS.convs_backward(*arguments, True, [True])
    assert len(asked) == 2
    assert torch.equal(y, TORCH.convs(*arguments[1:], [False])[0][0])
    assert torch.equal(found.x, TORCH.convs_backward(*arguments, True, [True]).x)


def test_what_the_compiler_says_reaches_whoever_trains(monkeypatch):
    """A source that does not compile is an error, in the words of the compiler."""

    def fail(launch, tensors):
        raise nvrtc.CompileError("cannot compile: expected a semicolon")

    x = torch.randn(2, 3, 32, 32).bfloat16()
    model = regnet_fast.rebuild(network(8)).model.bfloat16().train()
    raises = pytest.raises(nvrtc.CompileError, match="expected a semicolon")
    with launcher.standing_in(fail, TARGET), backend("cuda,aten"), raises:
        model(x)
