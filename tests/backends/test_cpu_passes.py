"""The passes of csrc/cpu: each against float64 beside torch's calls, and what happens where they cannot be compiled."""

import copy
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from helpers import randomize_bn
from problems import LAYOUTS, Untouched, assert_rule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import regnet_fast
from regnet_fast.backends import cpu_library
from regnet_fast.backends.passes import COMPILED, TORCH, compiled, passes_for
from regnet_fast.backends.passes.operands import Conv, Excite, Norm, OutputGrad, OutputNorm, Sums, Term
from regnet_fast.cli import app

EPS = 1e-3
ACTIVATIONS = ("none", "relu", "silu")
# One channel; odd ones; rows of several pixels, and of one; more than one block of rows, tile and unit
SHAPES = [(2, 1, 3, 2), (3, 7, 5, 3), (2, 24, 9, 9), (1, 48, 24, 23), (5, 130, 3, 3), (2, 888, 7, 7), (1, 2064, 6, 6)]
THREADS = (1, 2, 3)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def nhwc(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, activation: str = "none", affine: bool = True) -> Norm:
    weight, bias = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    return Norm(torch.randn(channels), torch.rand(channels) + 0.1, weight, bias, EPS, activation)


def excite_of(channels: int, activation: str = "relu") -> Excite:
    hidden = max(1, channels // 4)
    fc1, fc2 = torch.randn(hidden, channels) / channels**0.5, torch.randn(channels, hidden) / hidden**0.5
    return Excite(fc1, torch.randn(hidden), fc2, torch.randn(channels), activation)


def double(t):
    """Tensors of a tuple in float64."""
    if isinstance(t, Tensor):
        return t.double()
    if isinstance(t, tuple):
        made = [double(one) for one in t]
        return type(t)(*made) if hasattr(t, "_fields") else tuple(made)
    return [double(one) for one in t] if isinstance(t, list) else t


def check(what: str, call, make) -> None:
    """The tensors that `call(passes, *make())` gives are as near to float64 as those of torch's calls, which make the
    float64 ones too. Small results are judged from several draws: few values say little of an error.
    """
    samples: dict[int, list] = {}
    drawn, draws = 0, 1
    while drawn < draws:
        given = make()
        with Untouched(*tensors_of(given)):
            ours = call(COMPILED, *given)
        eager, exact = call(TORCH, *given), call(TORCH, *double(given))
        assert [t is None for t in ours] == [t is None for t in eager]
        for i, found in enumerate(zip(ours, eager, exact, strict=True)):
            if found[0] is not None:
                samples.setdefault(i, []).append([t if t.ndim == 4 and len(t) > 1 else t.flatten() for t in found])
        sizes = [t.numel() for t in ours if t is not None]
        drawn, draws = drawn + 1, min(250, 1000 // min(sizes, default=1000), 60_000 // max(sizes, default=1000))
    for i, sample in samples.items():
        assert_rule(f"{what}, result {i}", sample)


def tensors_of(given) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [t for one in given for t in tensors_of(one)] if isinstance(given, (tuple, list)) else []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_of_rows(shape):
    """Whole pixels and, where there are several, whole vectors."""
    width = compiled._row(shape[1])
    assert width % shape[1] == 0 and width >= min(128, shape[1])
    assert width == shape[1] or (width % 16 == 0 and width < 128 + 16 * shape[1])


@pytest.mark.long
@pytest.mark.parametrize(("activation", "gated"), list(itertools.product(ACTIVATIONS, [False, True])))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reading_and_its_gradients(shape, activation, gated):
    """Through norm, activation and squeeze-excite, forward and back, of parts of a batch too."""

    def make():
        norm, excite = norm_of(shape[1], activation), excite_of(shape[1]) if gated else None
        return nhwc(*shape) + 0.3, norm, excite, nhwc(*shape)

    def run(passes, x, norm, excite, grad):
        results = [passes.reader(x, norm, excite).read(slice(None)).clone()]
        for through, cut in itertools.product([True, False], [[slice(None)], [slice(0, 1), slice(1, None)]]):
            reader, out = passes.backward_reader(x, norm, excite), torch.empty_like(x)
            for part in cut:
                if x[part].shape[0]:
                    results.append(reader.read(part).clone())
                    reader.back(grad[part].clone(memory_format=torch.channels_last), out[part], through)
            sums, excited = reader.totals()
            assert (sums is None) == (not through) and (excited is None) == (excite is None)
            results += [out, *(sums or ()), *(excited or ())]
        return results

    check(f"{shape}, {activation}", run, make)


def test_reading_a_map_that_has_squeeze_excite_alone():
    def run(passes, x, excite, grad):
        reader, out = passes.backward_reader(x, None, excite), torch.empty_like(x)
        read = reader.read(slice(None)).clone()
        reader.back(grad.clone(memory_format=torch.channels_last), out, False)
        return [read, out, *reader.totals()[1]]

    check("squeeze-excite", run, lambda: (nhwc(3, 24, 9, 7), excite_of(24, "silu"), nhwc(3, 24, 9, 7)))


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(shape, mean):
    """Also of channels far from zero, and of a constant one; and a copy of what is measured, where one is wanted."""
    x = nhwc(*shape) + mean * torch.randn(1, shape[1], 1, 1)
    x[:, 0] = 7.25
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    found, copy = COMPILED.moments(), torch.empty_like(x)
    for i in range(shape[0]):
        found.add(x[i : i + 1], copy[i : i + 1])
    assert torch.equal(copy, x)
    with Untouched(x):
        whole = COMPILED.statistics(x)
    for got in (whole, found.merged()):
        assert ((got[0] - exact[1]).abs() <= 1e-6 * exact[0].sqrt() + 1e-7 * exact[1].abs()).all()
        assert ((got[1] - exact[0]).abs() <= 2e-6 * exact[0]).all()
        assert got[1][0] == 0.0


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_raw_maps(shape, fixed, plus):
    c = shape[1]

    def make():
        sums = None if fixed else Sums(torch.randn(c), torch.randn(c))
        own = OutputNorm(torch.randn(c), torch.rand(c) + 0.1, torch.rand(c) + 0.5, EPS, sums, float(shape[0] * 6))
        return nhwc(*shape), own, nhwc(*shape), nhwc(*shape) if plus else None

    def run(passes, grad, own, x, identity):
        return [passes.entered_backward(grad, own, x, identity)]

    check(f"{shape}", run, make)


def terms_of(shape, kinds, factored) -> list[Term]:
    found = []
    for kind in kinds:
        norm = None if kind == "plain" else norm_of(shape[1], kind, affine=kind != "relu")
        found.append(Term(nhwc(*shape), norm, None))
    if factored:
        found[0] = found[0]._replace(factor=torch.tensor([1.25, 0.0]).repeat(shape[0])[: shape[0], None, None, None])
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "kinds", [("relu",), ("plain", "none"), ("none", "none", "plain"), ("silu", "relu"), ("none",) * 3], ids=str
)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4], SHAPES[6]], ids=str)
def test_joins(shape, kinds, activation):
    def forward(passes, terms):
        return [passes.join(terms, activation)]

    def backward(passes, grad, y, terms, needs):
        y = y if activation == "relu" else None
        found = passes.join_backward(grad, y, terms, activation, needs)
        return [t for dx, sums in found for t in (dx, *(sums or (None, None)))]

    for factored in (False, True):
        check(f"{kinds}, {activation}", forward, lambda factored=factored: (terms_of(shape, kinds, factored),))
        others = (False,) * (len(kinds) - 1)
        for needs in {(True,) * len(kinds), (True, *others), (*others, True)}:

            def make(factored=factored, needs=needs):
                terms = terms_of(shape, kinds, factored)
                # The kink's side is that of the float64 sum in all three: rounding decides it otherwise
                return nhwc(*shape), TORCH.join(double(terms), activation).float(), terms, list(needs)

            check(f"gradients of {kinds}, {activation}, {needs}", backward, make)


def whole_step(x: Tensor, weight: Tensor, norm: Norm, excite: Excite | None) -> list[Tensor]:
    one = [Conv(weight, ((1, 1), (1, 1), (1, 1), 1))]
    (y, (mean, var)), *_ = COMPILED.convs(x, norm, excite, one, [True])
    own = OutputNorm(mean, var, None, EPS, Sums(mean, var), y.numel() / y.shape[1])
    found = COMPILED.convs_backward([OutputGrad(y, own, y)], x, norm, excite, one, True, [True])
    joined = COMPILED.join([Term(y, Norm(mean, var, None, None, EPS, "none"), None)], "silu")
    return [y, mean, var, found.x, *found.sums, *found.weights, *(found.excite or ()), joined]


@pytest.mark.parametrize("shape", [*SHAPES, (3, 56, 33, 31)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape):
    x, grad = nhwc(*shape), nhwc(*shape)
    norm, found = norm_of(shape[1], "silu"), []
    for threads in THREADS:
        torch.set_num_threads(threads)
        reader, out = COMPILED.backward_reader(x, norm, None), torch.empty_like(x)
        read = reader.read(slice(None)).clone()
        reader.back(grad, out, True)
        mean, var = COMPILED.statistics(x)
        ((dx, sums),) = COMPILED.join_backward(grad, None, [Term(x, norm, None)], "silu", [True])
        found.append([read, out, *reader.totals()[0], mean, var, dx, *sums])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_threads_at_once():
    """Each has its own memory."""
    torch.set_num_threads(1)
    given = [(nhwc(2, 32, 20, 20), torch.randn(32, 32, 3, 3), norm_of(32, "relu"), excite_of(32)) for _ in range(4)]
    expected, found = [whole_step(*one) for one in given], [[] for _ in given]

    def work(i: int) -> None:
        torch.set_num_threads(1)
        found[i] += [whole_step(*given[i]) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 10
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, right, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30, 1e-40], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite_spread_as_in_torch(activation, bad):
    x, grad = nhwc(2, 24, 5, 5), nhwc(2, 24, 5, 5)
    norm = norm_of(24, activation)
    for where in ("x", "grad"):
        given = {"x": x.clone(), "grad": grad.clone()}
        given[where][1, 3, 2, 2] = given[where][0, 5, 0, 0] = bad
        results = []
        for passes in (COMPILED, TORCH):
            reader, out = passes.backward_reader(given["x"], norm, None), torch.empty_like(x)
            found = [reader.read(slice(None)).clone()]
            reader.back(given["grad"].clone(), out, True)
            y = passes.join([Term(given["x"], norm._replace(activation="none"), None)], activation)
            (dx, sums), *_ = passes.join_backward(given["grad"], y, [Term(given["x"], norm, None)], "none", [True])
            results.append([*found, out, *reader.totals()[0], *passes.statistics(given["x"]), y, dx, *sums])
        for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
            torch.testing.assert_close(
                ours.nan_to_num(1e38), theirs.nan_to_num(1e38), rtol=2e-4, atol=2e-4, msg=f"{where}, result {i}"
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x, one = LAYOUTS[layout](torch.randn(3, 16, 9, 9)), [Conv(torch.randn(8, 16, 1, 1), ((1, 1), (0, 0), (1, 1), 1))]
    norm = norm_of(16, "silu")
    expected = COMPILED.convs(x.contiguous(memory_format=torch.channels_last), norm, None, one, [True])
    found = COMPILED.convs(x, norm, None, one, [True])
    assert torch.equal(found[0][0], expected[0][0]) and torch.equal(found[0][1][0], expected[0][1][0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(layout):
    """Of the raw map, of its gradient and of what is added."""
    made = [LAYOUTS[layout](torch.randn(3, 16, 9, 9)) for _ in range(3)]
    own = OutputNorm(torch.randn(16), torch.rand(16) + 0.1, None, EPS, Sums(torch.randn(16), torch.randn(16)), 243.0)
    found, expected = (
        COMPILED.entered_backward(grad, own, x, identity)
        for grad, x, identity in (made, [t.contiguous(memory_format=torch.channels_last) for t in made])
    )
    assert torch.equal(found, expected)


def test_parameters_in_other_dtypes_and_strides():
    x = nhwc(2, 16, 6, 6)
    norm = norm_of(16, "relu")
    strided = Norm(*(torch.stack([t, t], 1)[:, 0].double() for t in norm[:4]), EPS, "relu")
    found = [COMPILED.join([Term(x, one, None)], "none") for one in (norm, strided)]
    assert torch.equal(*found)


def test_who_takes_the_compiled_passes():
    x = torch.zeros(2, 8, 3, 3)
    assert passes_for(x) is COMPILED
    assert passes_for(x.double()) is TORCH and passes_for(x.bfloat16()) is TORCH
    assert passes_for(x[:0]) is TORCH and passes_for(x.to("meta")) is TORCH
    for name in ("aten", "reference"):
        with regnet_fast.backend(name):
            assert passes_for(x) is TORCH


def train(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))]


@pytest.fixture
def model() -> torch.nn.Module:
    made = randomize_bn(timm.create_model("regnetx_002", num_classes=5), 0)
    return regnet_fast.rebuild(made).model.train()


def test_a_step_that_is_traced_below_autograd(model):
    """By make_fx, which sees torch's calls alone: its graph computes what the step does, for another image too."""
    x, other = torch.randn(2, 2, 3, 64, 64)
    parameters = [p.detach() for p in model.parameters()]
    state = {name: p for (name, _), p in zip(model.named_parameters(), parameters, strict=True)}

    def forward(x):
        with torch.no_grad():
            return torch.func.functional_call(model, state, (x,))

    torch.testing.assert_close(make_fx(forward)(x)(other), forward(other), rtol=1e-3, atol=1e-4)


def test_tensors_without_memory(model):
    """Shapes are found without computing."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = train(model, mode.from_tensor(torch.randn(2, 3, 64, 64)))
    assert [t.shape for t in found] == [(2, 5), *(p.shape for p in model.parameters())]


def test_a_step_that_is_counted(model):
    """All convolutions are seen, in both directions."""
    counts = []
    for counted in (model, regnet_fast.restore(copy.deepcopy(model))):
        with FlopCounterMode(display=False) as counter:
            train(counted, torch.randn(2, 3, 64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# Where they cannot be compiled


def forget_library() -> None:
    for cached in (cpu_library.library, cpu_library._loaded):
        cached.cache_clear()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not compiled anything, with an empty cache."""
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path / "cache"))
    forget_library()
    yield tmp_path
    forget_library()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


FAILS = 'case "$*" in *--version*) echo 1;; *) echo "out of luck" >&2; exit 3;; esac'

BROKEN = {
    "no compiler": (None, "compiled at first use, and this machine has CXX=/nowhere/c++, which is not there"),
    "a compiler that fails": (FAILS, "status 3: out of luck"),
    "no version": ("exit 1", "ended with status 1"),
    "a compiler that makes nothing": ("echo 1", "without an error and left no library"),
    "garbage": (
        'case "$*" in *--version*) echo 1;; *) while [ "$1" != -o ]; do shift; done; echo junk > "$2";; esac',
        "was compiled and cannot be loaded",
    ),
    "another library": (
        'case "$*" in *--version*) echo 1;; *) while [ "$1" != -o ]; do shift; done; '
        'echo "int f() { return 0; }" > "$2.cpp"; c++ -shared -fPIC -o "$2" "$2.cpp";; esac',
        "undefined symbol: norm_rows",
    ),
    "not a program": ("", "cannot be compiled or loaded"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_where_they_cannot_be_compiled_torch_s_calls_serve(what, fresh, monkeypatch):
    text, reason = BROKEN[what]
    path = "/nowhere/c++" if text is None else script(fresh / "cxx", text)
    if what == "not a program":
        Path(path).write_bytes(b"\x7fELF nonsense")
    monkeypatch.setenv("CXX", path)
    assert reason in cpu_library.refuse("passes")
    assert passes_for(torch.zeros(1, 8, 2, 2)) is TORCH
    with pytest.raises(cpu_library.LibraryError):
        cpu_library.library("passes")
    found = CliRunner().invoke(app, ["info"])
    assert found.exit_code == 0 and "torch calls" in found.stdout
    found = CliRunner().invoke(app, ["info", "--json"])
    assert reason in json.loads(found.stdout)["cpu_kernels"]["refused"]


def test_a_compiler_that_hangs(fresh, monkeypatch):
    monkeypatch.setenv("CXX", script(fresh / "cxx", "exec sleep 60"))
    monkeypatch.setattr(cpu_library, "PATIENCE", 0.2)
    assert "more than 0.2 seconds" in cpu_library.refuse("passes")


def test_another_system(fresh, monkeypatch):
    monkeypatch.setattr(cpu_library.sys, "platform", "darwin")
    assert "Linux alone" in cpu_library.refuse("passes")


def kept(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache" / "kernels").iterdir() if path.suffix != ".lock"]


@pytest.mark.long
def test_compiled_once(fresh, monkeypatch):
    """The second process takes what the first one kept; a compiler with options of its own has another entry."""
    log = fresh / "log"
    monkeypatch.setenv("CXX", script(fresh / "cxx", f'echo "$*" >> {log}; exec c++ "$@" -O0'))
    code = "import regnet_fast; from regnet_fast.backends import cpu_library as c; print(c.refuse('passes'))"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
        assert done.stdout == "None\n"
    assert sum("--version" not in line for line in log.read_text().splitlines()) == 1
    assert len(kept(fresh)) == 1
    monkeypatch.setenv("CXX", f"{fresh / 'cxx'} -O1")
    assert cpu_library.refuse("passes") is None
    assert len(kept(fresh)) == 2


@pytest.mark.long
def test_a_folder_for_kernels_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("REGNET_FAST_CACHE", str(fresh / "file"))
    with pytest.warns(UserWarning, match="nothing can be kept"):
        assert cpu_library.refuse("passes") is None


def test_info_says_what_compiled_them():
    found = CliRunner().invoke(app, ["info", "--json"])
    facts = json.loads(found.stdout)["cpu_kernels"]
    assert facts["refused"] is None and facts["compiler"] == cpu_library.compiler_version()
    assert facts["compiler"] in CliRunner().invoke(app, ["info"]).stdout.replace("\n", " ")


@pytest.mark.long
def test_nothing_is_compiled_at_import():
    code = "import regnet_fast; from regnet_fast.backends import cpu_library as c; print(c._loaded.cache_info()[-1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "0\n"
