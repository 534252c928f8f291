"""The operations of a training step are the plain compositions of torch's calls, in their values and gradients."""

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from problems import LAYOUTS, Untouched, assert_rule, dtype_name
from torch import Tensor
from torch.nn import functional as F

from regnet_fast.backends import backend
from regnet_fast.backends.passes import COMPILED, TORCH, passes_for, sums
from regnet_fast.backends.passes import parts as cutting
from regnet_fast.backends.passes.operands import Norm as ReadNorm
from regnet_fast.backends.passes.operands import Term
from regnet_fast.backends.passes.torch import normaliser
from regnet_fast.ops import training as ops

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-3
ACT = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}


def passes_of(x):
    return passes_for(x.map if isinstance(x, ops.Normed) else x)


def conv(x, weight, geometry, stats=None, affine=None, excite=None):
    return ops.convs(passes_of(x), x, [ops.Branch(weight, geometry, stats, affine)], excite)[0]


class Norm(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None  # None: of the batch
    var: Tensor | None


# The same calls twice: ours, and torch's own one after another


class Ours:
    @staticmethod
    def _norm(norm, activation):
        return ops.NormStatistics(norm.mean, norm.var, EPS), ops.Affine(norm.weight, norm.bias, activation)

    def conv(self, x, weight, geometry, norm=None, activation="none", excite=None):
        stats, affine = (None, None) if norm is None else self._norm(norm, activation)
        return conv(x, weight, geometry, stats, affine, None if excite is None else ops.Excite(*excite))

    def enter(self, x, norm, activation):
        return ops.read_through_norm(passes_of(x), x, *self._norm(norm, activation))

    def join(self, *terms, **options):
        return ops.join(passes_of(terms[0]), *terms, **options)

    def repvgg(self, x, weights, geometries, norms, activation, factor):
        stats, affines = zip(*(self._norm(norm, "none") for norm in norms), strict=True)
        return ops.repvgg(passes_of(x), x, weights, geometries, stats, affines, activation, factor)


class Plain:
    @staticmethod
    def _norm(x, norm):
        return F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, norm.mean is None, 0.0, EPS)

    def conv(self, x, weight, geometry, norm=None, activation="none", excite=None):
        if excite is not None:
            fc1, bias1, fc2, bias2 = (None if t is None else t.to(x.dtype) for t in excite[:4])
            gate = torch.sigmoid(F.linear(ACT[excite[4]](F.linear(x.mean((2, 3)), fc1, bias1)), fc2, bias2))
            x = x * gate[:, :, None, None]
        y = F.conv2d(x, weight, None, *geometry)
        return y if norm is None else ACT[activation](self._norm(y, norm))

    def enter(self, x, norm, activation):
        return ACT[activation](self._norm(x, norm)), x

    def join(self, first, *others, activation="none", factor=None):
        return ACT[activation](sum(others, first if factor is None else first * factor))

    def repvgg(self, x, weights, geometries, norms, activation, factor):
        y = sum(
            self._norm(F.conv2d(x, weight, None, *geometry), norm)
            for weight, geometry, norm in zip(weights, geometries, norms, strict=False)
        )
        y = y if factor is None else y * factor
        return ACT[activation](y + self._norm(x, norms[2]) if len(norms) == 3 else y)


OURS, PLAIN = Ours(), Plain()


# Compositions


@dataclass(frozen=True)
class Case:
    """A composition of the operations; `out` is None where the channels stay."""

    kind: str
    act: str = "relu"
    channels: int = 4
    out: int | None = None
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    frozen: bool = False
    excite: str | None = None
    drop: bool = False
    shortcut: str | None = None
    affine: str = "weight and bias"

    def __str__(self):
        changed = [(k, v) for k, v in vars(self).items() if k != "kind" and v != Case.__dataclass_fields__[k].default]
        return " ".join([self.kind, *(f"{k}={v}" for k, v in changed)])

    def geometry(self, kernel=1, stride=1, dilation=1, groups=1):
        padding = dilation * (kernel // 2)
        return (stride, stride), (padding, padding), (dilation, dilation), groups

    def middle(self):
        return self.geometry(self.kernel, self.stride, self.dilation, self.groups)

    def run(self, kit, t):
        """The output for the operands by name; x may be in any layout where the composition begins with `conv`."""
        t = SimpleNamespace(**t)
        pixel = self.geometry()
        down = self.geometry(stride=self.stride)

        def norm(i):
            return Norm(*(getattr(t, f"{name}{i}", None) for name in ("scale", "shift", "mean", "var")))

        excite = None if self.excite is None else (t.fc1, t.fc_bias1, t.fc2, t.fc_bias2, self.excite)
        factor = t.factor if self.drop else None
        if self.kind == "bare":
            return kit.conv(t.x, t.w2, self.middle(), excite=excite)
        if self.kind == "single":
            return kit.join(kit.conv(t.x, t.w2, self.middle(), norm(2), self.act))
        if self.kind == "norm":
            return kit.join(kit.enter(t.x, norm(0), self.act)[0])
        if self.kind == "stem":  # a map that is made again from the raw one, read twice
            y = kit.join(kit.conv(t.x, t.w2, self.middle(), norm(2), self.act))
            a = kit.conv(y, t.w3, pixel, norm(3), self.act)
            return kit.join(a, kit.conv(y, t.ws, pixel, norm(4)), activation=self.act)
        if self.kind == "bottleneck":
            y = kit.conv(kit.conv(t.x, t.w1, pixel, norm(1), self.act), t.w2, self.middle(), norm(2), self.act)
            y = kit.conv(y, t.w3, pixel, norm(3), "none", excite)
            terms = [y]
            if self.shortcut is not None:
                terms.append(t.x if self.shortcut == "identity" else kit.conv(t.x, t.ws, down, norm(4)))
            return kit.join(*terms, activation=self.act, factor=factor)
        if self.kind == "preact":
            read, identity = kit.enter(t.x, norm(0), self.act)
            y = kit.conv(kit.conv(read, t.w1, pixel, norm(1), self.act), t.w2, self.middle(), norm(2), self.act)
            y = kit.conv(y, t.w3, pixel, excite=excite)
            if self.shortcut is None:
                return kit.join(y, factor=factor)
            other = {"identity": lambda: identity, "read": lambda: read, "conv": lambda: kit.conv(read, t.ws, down)}
            return kit.join(y, other[self.shortcut](), factor=factor)
        assert self.kind == "repvgg"
        norms = [norm(2), norm(4)] + ([norm(0)] if self.shortcut == "identity" else [])
        return kit.repvgg(t.x, (t.w2, t.ws), (self.middle(), self.geometry(1, self.stride, 1, self.groups)), norms,
                          self.act, factor)  # fmt: skip

    def operands(self, n=5, h=5, w=4, dtype=torch.float64, norms=None):
        """Random operands by name: those with gradients, and constants."""
        c, out = self.channels, self.out or self.channels
        alone = self.kind in ("bare", "single", "stem", "repvgg")
        mid = out if alone else c
        shapes = {"x": (n, c, h, w), "w2": (mid, c // self.groups, self.kernel, self.kernel)}
        if not alone and self.kind != "norm":
            shapes["w1"] = (c, c, 1, 1)
        if self.kind in ("bottleneck", "preact", "stem"):
            shapes["w3"] = (out, mid, 1, 1)
        if self.kind == "repvgg":
            shapes["ws"] = (out, c // self.groups, 1, 1)
        elif self.kind == "stem":
            shapes["ws"] = (out, mid, 1, 1)
        elif self.shortcut == "conv":
            shapes["ws"] = (out, c, 1, 1)
        if self.kind == "norm":
            del shapes["w2"]
        found = {k: torch.randn(s) / (1 if k == "x" else (s[1] * s[2] * s[3]) ** 0.5) for k, s in shapes.items()}
        found["x"] += 0.3
        if self.excite is not None:
            read = c if self.kind == "bare" else mid
            found |= {"fc1": torch.randn(3, read), "fc_bias1": torch.randn(3), "fc2": torch.randn(read, 3),
                      "fc_bias2": torch.randn(read)}  # fmt: skip
        used = {
            "bare": {},
            "single": {2: mid},
            "norm": {0: c},
            "stem": {2: mid, 3: out, 4: out},
            "bottleneck": {1: c, 2: mid, 3: out} | ({4: out} if self.shortcut == "conv" else {}),
            "preact": {0: c, 1: c, 2: mid},
            "repvgg": {2: out, 4: out} | ({0: out} if self.shortcut == "identity" else {}),
        }[self.kind]
        constants = {"factor": torch.tensor([1.25, 0.0, 1.25, 1.25, 0.0]).repeat(n)[:n, None, None, None]}
        for i, size in used.items():
            if "weight" in self.affine:
                found[f"scale{i}"] = torch.rand(size) + 0.5
            if "bias" in self.affine:
                found[f"shift{i}"] = torch.randn(size) / 2
            if self.frozen:
                constants |= {f"mean{i}": torch.randn(size) / 3, f"var{i}": torch.rand(size) + 0.5}
        wide = ("scale", "shift", "fc", "mean", "var")

        def cast(name, value):
            return value.to(norms if norms and name.startswith(wide) else dtype)

        return ({k: cast(k, v) for k, v in group.items()} for group in (found, constants))


CASES = [
    Case("bare"),
    Case("bare", kernel=1, stride=2, out=6),
    Case("bare", groups=4),
    Case("bare", groups=2, stride=2, dilation=2, out=6),
    Case("bare", excite="relu"),
    Case("bare", excite="silu", kernel=1, out=3),
    Case("single", act="none"),
    Case("single", act="relu", kernel=1, out=3),
    Case("single", act="silu", stride=2, groups=2),
    Case("single", act="silu", channels=3, kernel=7, stride=2, out=5),
    Case("single", act="relu", frozen=True),
    Case("norm", act="none"),
    Case("norm", act="relu"),
    Case("norm", act="silu", frozen=True),
    Case("stem", act="relu", channels=3, stride=2, out=6),
    Case("stem", act="silu", channels=3, stride=2, out=4),
    Case("stem", act="relu", channels=3, stride=2, out=4, frozen=True),
    Case("bottleneck"),
    Case("bottleneck", act="none", shortcut="identity"),
    Case("bottleneck", shortcut="identity", groups=4),
    Case("bottleneck", act="silu", shortcut="identity", groups=2, excite="silu"),
    Case("bottleneck", shortcut="identity", excite="relu", drop=True),
    Case("bottleneck", act="silu", shortcut="conv", drop=True),
    Case("bottleneck", shortcut="conv", stride=2, groups=2, excite="relu", out=6),
    Case("bottleneck", shortcut="conv", dilation=2, out=6),
    Case("bottleneck", shortcut="conv", frozen=True, excite="silu", stride=2),
    Case("bottleneck", act="silu", shortcut="identity", frozen=True),
    Case("bottleneck", shortcut="identity", affine="weight"),
    Case("bottleneck", shortcut="conv", affine="bias", excite="relu"),
    Case("bottleneck", shortcut="conv", affine="none", frozen=True),
    Case("preact"),
    Case("preact", shortcut="identity"),
    Case("preact", act="silu", shortcut="read", groups=2),
    Case("preact", act="none", shortcut="read", drop=True),
    Case("preact", shortcut="identity", drop=True, excite="relu"),
    Case("preact", shortcut="conv", stride=2, out=6),
    Case("preact", act="silu", shortcut="conv", frozen=True, dilation=2),
    Case("preact", shortcut="read", affine="none"),
    Case("repvgg", stride=2, out=6),
    Case("repvgg", shortcut="identity"),
    Case("repvgg", act="silu", shortcut="identity", groups=2),
    Case("repvgg", act="none", shortcut="identity", groups=4),
    Case("repvgg", shortcut="identity", drop=True),
    Case("repvgg", act="silu", shortcut="identity", frozen=True),
    Case("repvgg", shortcut="identity", affine="none"),
    Case("repvgg", act="silu", affine="bias", out=6),
]


def results(kit, case, leaves, constants, dy=None, wanted=None):
    """The output and the gradients by name."""
    t = {k: v.detach().requires_grad_(wanted is None or k in wanted) for k, v in leaves.items()}
    y = case.run(kit, t | constants)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if dy is None else dy
    names = [k for k, v in t.items() if v.requires_grad]
    grads = torch.autograd.grad(y, [t[k] for k in names], dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: {error}"


@pytest.fixture(params=["whole", "parts", "single images"])
def cut(request, monkeypatch):
    """The batch of five at once, in parts of 2, 2 and 1 images for the maps of 4 x 5 x 4, and image by image."""
    if request.param != "whole":
        size = 1.0 if request.param == "single images" else 2.5 * 4 * 5 * 4 * 8 / torch.get_num_threads()
        monkeypatch.setattr(cutting, "_PART_BYTES", size)
        lengths = [part.stop - part.start for part in cutting.parts(torch.empty(5, 4, 5, 4, dtype=torch.float64))]
        assert lengths == ([2, 2, 1] if request.param == "parts" else [1] * 5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float64(case, cut):
    leaves, constants = case.operands()
    assert_same(results(OURS, case, leaves, constants), results(PLAIN, case, leaves, constants))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case, monkeypatch):
    """By finite differences, in parts. ReLU's kinks are too far off to be stepped over."""
    monkeypatch.setattr(cutting, "_PART_BYTES", 1.0)
    leaves, constants = case.operands(n=2, h=3, w=3)
    names = list(leaves)

    def function(*tensors):
        return case.run(OURS, dict(zip(names, tensors, strict=True)) | constants)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves.values()], fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [
        Case("bottleneck", act="silu", shortcut="conv", excite="relu", drop=True, channels=2),
        Case("preact", act="silu", shortcut="read", channels=2),
        Case("repvgg", act="silu", shortcut="identity", channels=2),
        Case("stem", act="silu", channels=3, out=2),
    ],
    ids=str,
)
def test_every_entry_of_the_jacobian(case):
    leaves, constants = case.operands(n=2, h=3, w=2)
    names = list(leaves)

    def function(*tensors):
        return case.run(OURS, dict(zip(names, tensors, strict=True)) | constants)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves.values()])


# One of each kind, with everything


FULL = [
    Case("bare", groups=2, excite="relu"),
    Case("norm", act="silu"),
    Case("stem", act="relu", channels=3, stride=2, out=4),
    Case("bottleneck", act="relu", shortcut="conv", excite="relu", stride=2, groups=2, drop=True),
    Case("bottleneck", act="silu", shortcut="identity", excite="silu"),
    Case("preact", act="relu", shortcut="read", drop=True),
    Case("preact", act="silu", shortcut="identity"),
    Case("repvgg", act="relu", shortcut="identity", drop=True),
]


@pytest.mark.parametrize("case", [*FULL, replace(FULL[3], frozen=True), replace(FULL[7], frozen=True)], ids=str)
def test_gradients_of_some_inputs_alone(case):
    """Every tensor alone, and all but it: the same gradients, and none for the others."""
    leaves, constants = case.operands()
    expected = results(PLAIN, case, leaves, constants)
    for name in leaves:
        for wanted in ({name}, leaves.keys() - {name}):
            found = results(OURS, case, leaves, constants, wanted=wanted)
            assert found.keys() == {"y", *wanted}
            assert_same(found, {k: expected[k] for k in found})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_layouts_of_the_input_and_of_the_gradient(case, layout, cut):
    """The first convolution takes any layout; what joins or enters a map lays it out before."""
    leaves, constants = case.operands()
    x = LAYOUTS[layout](leaves["x"])
    dy = LAYOUTS[layout](torch.randn_like(results(PLAIN, case, leaves, constants)["y"]))
    if case.kind not in ("bare", "stem"):
        x = x.contiguous(memory_format=torch.channels_last)
    given = leaves | {"x": x}
    with Untouched(x, dy, *given.values(), *constants.values()):
        found = results(OURS, case, given, constants, dy)
    assert_same(found, results(PLAIN, case, given, constants, dy))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_nothing_is_written_to_an_input_and_two_runs_are_equal(case, cut):
    leaves, constants = case.operands(dtype=torch.float32)
    leaves["x"] = leaves["x"].contiguous(memory_format=torch.channels_last)
    everything = [*leaves.values(), *constants.values()]
    versions = [t._version for t in everything]
    with Untouched(*everything):
        first, second = (results(OURS, case, leaves, constants) for _ in range(2))
    assert [t._version for t in everything] == versions
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_graph_can_be_kept_and_run_again(case):
    leaves, constants = case.operands()
    t = {k: v.requires_grad_() for k, v in leaves.items()}
    y = case.run(OURS, t | constants)
    first, second = (torch.autograd.grad(y.sum(), list(t.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_second_derivatives_are_refused(case):
    leaves, constants = case.operands()
    t = {k: v.requires_grad_() for k, v in leaves.items()}
    y = case.run(OURS, t | constants)
    with pytest.raises(RuntimeError, match="the gradient of a gradient"):
        torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_weight_changed_between_forward_and_backward_is_refused(case):
    """Whichever tensor it is: where plain torch refuses, so do we."""
    leaves, constants = case.operands()
    for name in leaves.keys() - {"x"} - {name for name in leaves if name.startswith("shift")}:
        t = {k: v.clone().requires_grad_() for k, v in leaves.items()}
        y = case.run(OURS, t | constants)
        with torch.no_grad():
            t[name].mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# Precision


PRECISE = [
    Case("bare", channels=16, excite="silu"),
    Case("stem", act="relu", channels=3, stride=2, out=16),
    Case("bottleneck", act="relu", channels=16, shortcut="conv", stride=2, groups=2, excite="relu", drop=True),
    Case("bottleneck", act="silu", channels=16, shortcut="identity", groups=16),
    Case("bottleneck", act="relu", channels=16, shortcut="identity", frozen=True),
    Case("preact", act="relu", channels=16, shortcut="identity", groups=2),
    Case("preact", act="silu", channels=16, shortcut="read"),
    Case("repvgg", act="relu", channels=16, shortcut="identity"),
    Case("repvgg", act="silu", channels=16, out=24, stride=2),
]


@pytest.mark.parametrize(
    ("dtype", "forced"),
    [(torch.float32, "auto"), (torch.float32, "aten"), (torch.bfloat16, "auto")],
    ids=["float32, compiled", "float32, torch's calls", "bfloat16"],
)
@pytest.mark.parametrize("case", PRECISE, ids=str)
def test_precision(case, dtype, forced, monkeypatch):
    """Errors against float64 are held to those of the plain composition in the same dtype: norms in float32 as under
    autocast, maps in channels_last as ours. In bfloat16 with SiLU alone: on which side of ReLU's kink a rounded value
    falls is chance, and the largest error is that of one such value.
    """
    assert passes_for(torch.zeros(1, 1, 1, 1)) is COMPILED
    if dtype == torch.bfloat16:
        case = replace(case, act="silu", excite=case.excite and "silu")
    monkeypatch.setattr(cutting, "_PART_BYTES", 5e3)
    samples = {}
    for _ in range(24):
        groups = case.operands(n=6, h=9, w=8, dtype=dtype, norms=torch.float32)
        leaves, constants = groups
        leaves["x"] = leaves["x"].contiguous(memory_format=torch.channels_last)
        exact = [{k: v.double() for k, v in group.items()} for group in (leaves, constants)]
        with backend(forced):
            ours = results(OURS, case, leaves, constants)
        eager = results(PLAIN, case, leaves, constants)
        for name, reference in results(PLAIN, case, *exact).items():
            samples.setdefault(name, []).append((ours[name], eager[name], reference))
    for name, sample in samples.items():
        assert_rule(f"{case}, {name}, {dtype_name(dtype)}", sample)


@pytest.mark.parametrize("ratio", [0, 4, 32, 1000])
@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_statistics_of_channels_far_from_zero(dtype, ratio, parts, monkeypatch):
    """Mean and variance of a channel whose mean is so many standard deviations, as well as torch knows them.

    The variance of the whole has a share of the parts' means, which torch knows only as well as any: an error e of
    them makes one of up to 2 e max|mean of a part - mean|.
    """
    x = torch.randn(14, 32, 16, 16).add_(ratio * torch.sign(torch.randn(1, 32, 1, 1)))
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(cutting, "_PART_BYTES", x.nbytes / parts / torch.get_num_threads())
    cut = cutting.parts(x)
    assert len(cut) == parts
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    spread = max((x[part].double().mean((0, 2, 3)) - mean).abs().max() for part in cut)
    count = x.numel() / 32
    running = torch.zeros(32), torch.ones(32)
    torch.batch_norm(x, None, None, *running, True, 1.0, EPS, False)
    mean_error = (running[0] - mean).abs().max()
    var_error = (running[1].double() * ((count - 1) / count) / var - 1).abs().max()
    eps = torch.finfo(torch.float32).eps

    given = ops.NormStatistics(None, None, EPS), ops.Affine(None, None)
    entered = ops.read_through_norm(passes_of(x), x, *given)[0]
    convolved = conv(x, torch.eye(32, dtype=dtype)[:, :, None, None], ((1, 1), (0, 0), (1, 1), 1), *given)
    for found in (TORCH.statistics(x), entered.norm[:2], convolved.norm[:2]):
        assert found[0].dtype == found[1].dtype == torch.float32
        assert (found[0] - mean).abs().max() <= 2 * mean_error + 2 * eps * max(1, ratio)
        between = 0.0 if parts == 1 else 2 * mean_error * spread / var.min()
        assert (found[1] / var - 1).abs().max() <= 2 * var_error + between + 4 * eps


@pytest.mark.parametrize("ratio", [4, 32])
def test_gradients_through_a_norm_of_channels_far_from_zero(ratio):
    case = Case("preact", act="silu", channels=16, shortcut="identity")
    samples = {}
    for _ in range(6):
        leaves, constants = case.operands(n=6, h=9, w=8, dtype=torch.float32)
        leaves["x"] = (leaves["x"] + ratio).contiguous(memory_format=torch.channels_last)
        exact = {k: v.double() for k, v in leaves.items()}
        ours, eager = (results(kit, case, leaves, constants) for kit in (OURS, PLAIN))
        for name, reference in results(PLAIN, case, exact, constants).items():
            samples.setdefault(name, []).append((ours[name], eager[name], reference))
    for name, sample in samples.items():
        assert_rule(f"{name} at {ratio} standard deviations", sample)


# Details


@pytest.mark.parametrize(
    ("pixels", "channels", "abreast"),
    [
        (50176, 24, 32),
        (874, 24, 38),
        (3136, 336, 2),
        (784, 888, 1),
        (784, 2048, 1),
        (49, 24, 1),
        (881, 24, 1),
        (512, 7, 128),
    ],
)
def test_sums_of_a_gradient_that_is_nearly_constant(pixels, channels, abreast):
    """As that of an average pool: what is left after its mean is taken away is only as good as its sum."""
    assert sums._abreast(pixels, channels) == abreast
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in torch.randn(2, 1, channels, 1, pixels))
    grad = (torch.randn(1, channels, 1, 1) + 1e-3 * grad).contiguous(memory_format=torch.channels_last)
    mean, var = TORCH.statistics(x)
    plain = sums.sums_of_norm(grad, x, ReadNorm(mean, var, None, None, EPS, "none")).plain
    exact = grad.double().sum((0, 2, 3))
    error = ((plain - exact) / exact.abs().mean()).square().mean().sqrt()
    assert error < 2e-8 * (pixels / abreast) ** 0.5 + 6e-8


@pytest.mark.parametrize(
    ("shape", "beside"),
    [
        ((2, 24, 32, 24), 2),
        ((3, 24, 19, 27), 1),  # an odd number of pixels
        ((2, 12, 48, 48), 4),
        ((1, 3, 96, 96), 16),
        ((2, 24, 9, 9), 1),  # too few to be worth it
        ((2, 32, 32, 24), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_over_pixels_side_by_side(shape, beside, dtype):
    x, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x += torch.randn(1, shape[1], 1, 1).to(dtype)
    assert sums._beside(x) == beside
    wide = sums._side_by_side(x, beside)
    assert wide.data_ptr() == x.data_ptr() and wide.shape[1] == beside * shape[1]
    exact = x.double(), grad.double()
    var, mean = torch.var_mean(exact[0], (0, 2, 3), correction=0)
    kind = torch.promote_types(dtype, torch.float32)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(TORCH.statistics(x), (mean.to(kind), var.to(kind)), **tolerance)
    norm = ReadNorm(mean.to(kind), var.to(kind), torch.rand(shape[1]).to(kind), None, EPS, "none")
    normalised = (exact[0] - mean.view(1, -1, 1, 1)) * (var + EPS).rsqrt().view(1, -1, 1, 1)
    expected = [(exact[1] * normalised).sum((0, 2, 3)), exact[1].sum((0, 2, 3))]
    scale = (shape[0] * shape[2] * shape[3]) ** 0.5
    layouts = [(grad, x)] + ([] if dtype == torch.bfloat16 else [(grad, x.contiguous()), (grad.contiguous(), x)])
    for gradient, read in layouts:
        for a, b in zip(sums.sums_of_norm(gradient, read, norm), expected, strict=True):
            torch.testing.assert_close(a.double() / scale, b / scale, **tolerance)


def test_merged_statistics_of_unequal_parts():
    x = torch.randn(9, 4, 3, 3, dtype=torch.float64) * torch.arange(1, 10)[:, None, None, None]
    found, counts = [], (4, 1, 3, 1)
    for part in x.split(counts):
        found.append(torch.var_mean(part, (0, 2, 3), correction=0)[::-1])
    mean, var = sums.merged(found, counts)
    expected = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close((var, mean), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("read", list(itertools.product([False, True], repeat=3)))
def test_joins_of_three_terms(read, cut):
    """With and without a norm in each place: no term is overwritten before it is added."""
    terms = []
    for has_norm in read:
        mean, var, weight, bias = (torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(4))
        x = torch.randn(5, 4, 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        terms.append(Term(x, ReadNorm(mean, var, weight, bias, EPS, "none") if has_norm else None, None))
    expected = sum(x if norm is None else normaliser(norm, x)(x) for x, norm, _ in terms)
    with Untouched(*(term.x for term in terms)):
        found = TORCH.join(terms, "silu")
    torch.testing.assert_close(found, F.silu(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 8), (2, 9), (3, 10)])
def test_weights_of_a_1x1_convolution_of_few_channels(dtype, stride, size):
    """RepVGG's first block: 1x1 and strided on RGB images."""
    for channels, out in ((3, 48), (1, 16), (15, 8), (16, 8)):
        geometry = (stride, stride), (0, 0), (1, 1), 1
        x, weight = torch.randn(4, channels, size, size, dtype=dtype), torch.randn(out, channels, 1, 1, dtype=dtype)
        expected = torch.autograd.functional.vjp(
            lambda w, x=x, geometry=geometry: F.conv2d(x.double(), w, None, *geometry), weight.double(),
            dy := torch.randn_like(F.conv2d(x, weight, None, *geometry)).double(),
        )[1]  # fmt: skip
        for layout in ("NCHW", "channels_last", "strided rows"):
            leaf = weight.clone().requires_grad_()
            conv(LAYOUTS[layout](x), leaf, geometry).backward(dy.to(dtype))
            error = (leaf.grad.double() - expected).abs().max() / expected.abs().max()
            sums = 16 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # of up to 256 products
            assert error <= torch.finfo(dtype).eps + sums


@pytest.mark.parametrize("padding", [(1, 1), (0, 2)])
def test_a_1x1_convolution_may_pad(padding):
    geometry = (2, 2), padding, (1, 1), 1
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 7, 6), (5, 3, 1, 1)))
    y, expected = conv(x, weight, geometry), F.conv2d(x, weight, None, *geometry)
    dy = torch.randn_like(y)
    found, theirs = (torch.autograd.grad(out, (x, weight), dy) for out in (y, expected))
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)


# A map that is made again in backward, from the raw one


def stem_and_reader():
    case = Case("single", act="relu", channels=3, stride=2, out=6)
    leaves, _ = case.operands()
    reader = torch.randn(4, 6, 1, 1, dtype=torch.float64)
    return case, {k: v.requires_grad_() for k, v in leaves.items()}, reader.requires_grad_()


def gradients_behind(change):
    """Gradients of a convolution that reads a stem's map after `change`, by ours and by torch."""
    case, leaves, reader = stem_and_reader()
    found = []
    for kit in (OURS, PLAIN):
        y = case.run(kit, leaves)
        y = change(y if kit is OURS else y.clone())  # torch's ReLU needs its result
        z = kit.conv(y, reader, ((1, 1), (0, 0), (1, 1), 1))
        found.append(torch.autograd.grad(z.square().sum(), (reader, *leaves.values())))
    return found


CHANGES = {
    "none": lambda y: y,
    "in place": lambda y: y.mul_(2.0),
    "through a view": lambda y: y[:, :3].mul_(2.0) is None or y,
    "a copy": lambda y: y * 2.0,
    "a permuted view": lambda y: y.flip(1),
    "another layout": lambda y: y.contiguous(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_map_changed_before_it_is_read(change):
    ours, theirs = gradients_behind(CHANGES[change])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_hook_on_the_map_sees_and_changes_its_gradient():
    seen = []

    def change(y):
        y.register_hook(lambda g: seen.append(g.clone()) or g * 3)
        y.retain_grad()
        return y

    ours, theirs = gradients_behind(change)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*seen, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("changed", ["scale2", "shift2"])
def test_a_norm_changed_after_its_map_was_made(changed):
    """As a teacher's is, whose features a student reads: the features stay what they were."""
    case, leaves, reader = stem_and_reader()
    with torch.no_grad():
        y = case.run(OURS, leaves)
        kept = y.clone()
        leaves[changed].add_(1.0)
    ours, theirs = (conv(t, reader, ((1, 1), (0, 0), (1, 1), 1)).square().sum() for t in (y, kept))
    torch.testing.assert_close(*(torch.autograd.grad(loss, reader)[0] for loss in (ours, theirs)))


def test_the_raw_map_is_kept_in_place_of_the_one_that_is_read():
    """One map for the stem, and none for who reads it."""
    case, leaves, reader = stem_and_reader()
    kept = set()

    def pack(t):
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = case.run(OURS, leaves)
        before = len(kept)
        conv(y, reader, ((1, 1), (0, 0), (1, 1), 1))
    assert y.untyped_storage().data_ptr() not in kept
    small = [t for t in kept if t != reader.untyped_storage().data_ptr()]
    assert before <= len(small)
