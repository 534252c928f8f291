"""The backend `cuda` without a GPU: its plans run in the simulator; its refusals, ways and launches are looked at."""

import dataclasses
import json
import shutil
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import assert_close_to_reference, randomize_bn
from simulator import stand_in
from simulator.stand_in import simulate

import regnet_fast
import regnet_fast.functional as R
from regnet_fast import store
from regnet_fast.backends import (
    BackendError,
    BackToBackProblem,
    ConvProblem,
    Geometry,
    NormActProblem,
    SqueezeExciteProblem,
    backend,
    cuda,
    native,
    onednn,
    reference,
    select,
)
from regnet_fast.backends.cuda import driver, extension, launcher, nvrtc, plans, sources
from regnet_fast.backends.cuda.plans import Target
from regnet_fast.inspect import info
from regnet_fast.observer import observing
from regnet_fast.trials.candidate import bound
from regnet_fast.trials.check import by_reference, make, results

PROBLEM = ConvProblem(
    *((2, 48, 9, 7), 48, (3, 3), Geometry(padding=(1, 1), groups=2), "relu", False, False),
    *(torch.bfloat16, "cuda:0"),
)
ON_CPU = dataclasses.replace(PROBLEM, device="cpu")


def changed(problem, changes):
    """A problem of other facts, some of them of its geometry."""
    moved = {name: value for name, value in changes.items() if name in Geometry._fields}
    rest = {name: value for name, value in changes.items() if name not in moved}
    return dataclasses.replace(problem, geometry=problem.geometry._replace(**moved), **rest)


OTHERS = "cuda,aten,reference"  # what computes the other layers of a model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def simulated():
    with stand_in.simulated():
        yield


@pytest.fixture
def no_extension(monkeypatch, tmp_path):
    """As the package is where nothing was built with it."""
    extension_of(monkeypatch, tmp_path / "nothing")


def extension_of(monkeypatch, folder):
    monkeypatch.setattr(extension, "FOLDER", folder)
    extension.kernels.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, sm_90, as far as questions go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))


# In the simulator


def operands(problem, bias=True):
    n, c, h, w = problem.input_shape
    x = torch.randn(n, c, h, w).to(problem.dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(c, c // problem.geometry.groups, 3, 3) / (9 * c / problem.geometry.groups) ** 0.5).to(
        problem.dtype
    )
    return x, weight, torch.randn(c) if bias else None


def convolved(x, weight, bias, problem, dtype):
    bias = None if bias is None else bias.to(dtype)
    y = torch.nn.functional.conv2d(x.to(dtype), weight.to(dtype), bias, *problem.geometry)
    return {"relu": torch.relu, "silu": torch.nn.functional.silu, "none": lambda y: y}[problem.activation](y)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stride": (2, 2), "activation": "silu", "dtype": torch.float16},
        {"input_shape": (1, 48, 5, 6), "activation": "none"},
        {"input_shape": (1, 176, 5, 6), "out_channels": 176},
        {"groups": 40, "input_shape": (2, 40, 6, 9), "out_channels": 40, "activation": "silu"},
        {"groups": 8, "input_shape": (1, 8, 7, 4), "out_channels": 8, "stride": (2, 2), "dtype": torch.float16},
    ],
    ids=str,
)
def test_what_is_prepared_computes_the_convolution(simulated, changes):
    problem = changed(ON_CPU, changes)
    assert cuda.refuse(problem) is None
    for bias in (True, False):
        x, weight, b = operands(problem, bias)
        run = cuda.prepare_conv(problem, weight, b)
        y, parts = run.with_parts(x)
        eager = convolved(x, weight, b, problem, torch.float32).to(x.dtype)
        assert_close_to_reference(y, eager, convolved(x, weight, b, problem, torch.float64), str(problem))
        assert torch.equal(run(x, None, None, False, False), y)
        torch.testing.assert_close(parts.double().sum(1), y.double().mean((2, 3)), rtol=1e-5, atol=1e-6)
        assert y.is_contiguous(memory_format=torch.channels_last) and run.label == "CUDA C++, stand-in"


BOTH = BackToBackProblem((2, 24, 9, 7), 48, 2, "silu", "relu", 1, torch.bfloat16, "cpu", means=True)


@pytest.mark.parametrize("variant", ["fused", "in turn"])
@pytest.mark.parametrize("changes", [{}, {"stride": 2, "dtype": torch.float16, "means": False}], ids=str)
def test_two_convolutions_back_to_back(simulated, monkeypatch, variant, changes):
    """And by operands that are not aligned."""
    if variant == "in turn":
        monkeypatch.setattr(cuda.triton, "refuse", lambda problem: None)
        monkeypatch.setattr(cuda.triton, "prepare_conv", reference.prepare_conv)
    problem = dataclasses.replace(BOTH, **changes)
    assert cuda.refuse(problem) is None and variant in cuda.variants(problem)
    case = make(problem, 3)
    found = results(bound(cuda, problem, case.weights, variant=variant)(*case.call))
    eager, exact = (by_reference(problem, case.weights, case.call, dtype) for dtype in (None, torch.float64))
    assert_close_to_reference(found[0], eager[0], exact[0], variant)
    assert len(found) == len(exact) == 1 + problem.means
    for means in found[1:]:
        torch.testing.assert_close(means.double(), found[0].double().mean((2, 3)), rtol=1e-5, atol=1e-6)
    moved = [None if t is None else shifted(t) for t in case.weights]
    again = results(bound(cuda, problem, moved, variant=variant)(*map(shifted, case.call)))
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_activation": "gelu"}, "gelu"),
        ({"activation": "gelu"}, "gelu"),
        ({"groups": 48}, "a depthwise convolution behind another"),
        ({"stride": 3}, "a stride of 3"),
        ({"input_shape": (2, 20, 9, 7)}, "multiples of 8"),
        ({"input_shape": (256, 160, 14, 14), "out_channels": 576, "groups": 24}, "more than the map between"),
        ({"dtype": torch.float32}, "not in float32"),
    ],
    ids=str,
)
def test_two_convolutions_that_it_does_not_join(simulated, changes, words):
    assert words in cuda.refuse(dataclasses.replace(BOTH, **changes))


def shifted(t):
    """The same tensor, two bytes further than an aligned one."""
    strides, flat = t.stride(), torch.zeros(t.numel() + 8, dtype=t.dtype)
    first = next(i for i in range(8) if (flat.data_ptr() + i * t.element_size()) % 16)
    moved = flat.as_strided(t.shape, strides, first)
    moved.copy_(t)
    assert moved.data_ptr() % 16 and moved.stride() == strides
    return moved


def test_operands_that_are_not_aligned(simulated):
    x, weight, bias = operands(ON_CPU)
    expected = cuda.prepare_conv(ON_CPU, weight, bias)(x, None, None, False, False)
    rows_last = weight.contiguous(memory_format=torch.channels_last)  # packed as it is
    run = cuda.prepare_conv(ON_CPU, shifted(rows_last), shifted(bias))
    before = x.clone()
    assert torch.equal(run(shifted(x), None, None, False, False), expected) and torch.equal(x, before)


def test_the_operation_takes_it_when_forced(simulated):
    x, weight, bias = operands(ON_CPU)
    with backend("cuda"):
        y, means = R.grouped_conv(x.contiguous(), weight, bias.to(x.dtype), groups=2, activation="relu", means=True)
        assert R.grouped_conv(x[:0], weight, groups=2).shape == (0, 48, 9, 7)
    wide = convolved(x, weight, bias.to(x.dtype), ON_CPU, torch.float64)
    assert_close_to_reference(y, wide.bfloat16(), wide, "grouped_conv")
    torch.testing.assert_close(means.double(), y.double().mean((2, 3)), rtol=1e-5, atol=1e-6)


GATE = SqueezeExciteProblem(3, 40, 10, "relu", torch.float32, "cpu")


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prepared_gate(simulated, dtype, activation):
    """From means and from their parts, in the dtype of a map; the weights in any, wherever they begin."""
    problem = dataclasses.replace(GATE, activation=activation)
    weights = [torch.randn(shape) / 4 for shape in ((10, 40), 10, (40, 10), 40)]
    parts = torch.randn(3, 5, 40)
    run = cuda.prepare_squeeze_excite(problem, *(shifted(t) for t in weights))
    eager = reference.squeeze_excite(parts.sum(1), *weights, activation).to(dtype)
    exact = reference.squeeze_excite(parts.double().sum(1), *(t.double() for t in weights), activation)
    found = run.from_parts(parts, dtype)
    assert_close_to_reference(found, eager, exact, "gate")
    assert_close_to_reference(run(parts.sum(1)), eager.float(), exact, "gate of means")
    assert torch.equal(run.from_parts(shifted(parts), dtype), found) and run.label == "CUDA C++, stand-in"
    with backend("cuda"):
        gate = R.squeeze_excite(parts.sum(1).bfloat16(), *weights, activation=activation)
    assert gate.dtype == torch.bfloat16


def stage(dtype):
    """The first two stages of a small RegNetY, of a group width of 8."""
    model = timm.create_model("regnety_002").eval()
    randomize_bn(model, 0)
    return torch.nn.Sequential(model.stem, model.s1, model.s2).to(dtype)


@torch.no_grad()
def test_a_models_blocks_run_on_it():
    """Every grouped convolution of the blocks, with parts of the means for squeeze-excite, and that; no other layer."""
    host, launches = stage(torch.bfloat16), []

    def hear(launch, tensors):
        launches.append(launch)
        simulate(launch, tensors)

    x = torch.randn(2, 3, 32, 32).bfloat16()
    ours = regnet_fast.rebuild(host, inplace=False).model
    with launcher.standing_in(hear, Target(90, 3)), backend(OTHERS):
        y = ours(x)
    assert len(launches) == 6 and all("parts" in launch.buffers for launch in launches[::3])
    assert all(launch.kernel.startswith("squeeze_excite<float") for launch in launches[1::3])
    assert all(launch.kernel.startswith("squeeze_excite<BFloat16") for launch in launches[2::3])
    assert_close_to_reference(y, host(x), host.double()(x.double()), "two stages")


@torch.no_grad()
def test_explain_says_what_runs():
    ours = regnet_fast.rebuild(stage(torch.bfloat16)).model

    def unrun(launch, tensors):
        raise AssertionError("explain leaves kernels out")

    with launcher.standing_in(unrun, Target(90, 3)), backend(OTHERS):
        rows = {row.layer: row for row in regnet_fast.explain(ours, (2, 3, 32, 32))}
    first, second = rows["2.b1.conv1.conv"], rows["2.b1.conv2.conv"]
    for row in (first, second):
        assert (row.backend, row.label, row.reason) == ("cuda", "CUDA C++, both in one, stand-in", "")
    assert [kernel.name for kernel in first.launches] == ["grouped_conv_forward.grouped_conv_forward"]
    assert first.launches[0].flops == first.flops + second.flops and second.launches == ()
    weights = 56 * (24 + 8 * 9) * 2 + 2 * 56 * 4
    maps = 2 * (24 * 8 * 8 + 56 * 4 * 4) * 2
    assert weights + maps <= first.launches[0].bytes <= weights + maps + 2 * 56 * 4 * 4
    gate = rows["2.b1.se"]
    assert (gate.backend, gate.label, gate.reason) == ("cuda", "CUDA C++, stand-in", "")
    assert [kernel.name for kernel in gate.launches] == ["squeeze_excite.squeeze_excite"] * 2
    other = rows["2.b1.conv3.conv"]
    assert other.backend in ("aten", "reference") and "grouped convolutions and squeeze-excite alone" in other.reason


def test_stand_ins_nest_and_end():
    assert cuda.refuse(ON_CPU) == "the CUDA C++ kernels run on an NVIDIA GPU"
    with launcher.standing_in(simulate, Target(90, 3)):
        with launcher.standing_in(lambda launch, tensors: None, Target(80, 1)):
            assert cuda.refuse(ON_CPU) is None
        assert cuda.refuse(ON_CPU) is None
    with observing(launch=lambda name, arguments: False):  # somebody who counts makes no GPU
        assert cuda.refuse(ON_CPU) == "the CUDA C++ kernels run on an NVIDIA GPU"


# Refusing

REFUSED = {
    "float32": ({"dtype": torch.float32}, "not in float32"),
    "float64": ({"dtype": torch.float64}, "not in float64"),
    "channels that are no multiple of 8": ({"input_shape": (2, 24, 9, 7), "out_channels": 24}, "groups of 12 channels"),
    "groups of 4 channels": ({"groups": 12}, "groups of 4 channels: only multiples of 8 from 8 to 264"),
    "groups of 328 channels": ({"input_shape": (2, 656, 9, 7), "out_channels": 656}, "groups of 328 channels"),
    "more groups than a grid takes": (
        {"input_shape": (1, 524288, 1, 1), "out_channels": 524288, "groups": 65536},
        "65536 groups: more than a grid takes",
    ),
    "groups too wide": ({"input_shape": (2, 544, 9, 7), "out_channels": 544}, "groups of 272 channels"),
    "an empty batch": ({"input_shape": (0, 48, 9, 7)}, "empty map"),
    "an image beyond 2^31 elements": ({"input_shape": (1, 48, 2**13, 2**13)}, "an image of too many elements"),
    "pixels beyond 2^31": ({"input_shape": (2**26, 48, 9, 7)}, "too many pixels"),
    "more channels out than in": ({"out_channels": 96}, "only as many out as in"),
    "two strides": ({"stride": (1, 2)}, "two different strides"),
    "a stride of 3": ({"stride": (3, 3)}, "a stride of 3"),
    "depthwise, 12 channels": ({"groups": 12, "input_shape": (2, 12, 9, 7), "out_channels": 12}, "12 channels: only"),
    "a dilation": ({"dilation": (2, 2), "padding": (2, 2)}, "padding 1"),
    "a dilation without more padding": ({"dilation": (2, 2)}, "dilation"),
    "another size": ({"kernel": (5, 5), "padding": (2, 2)}, "only 3x3"),
    "a gate": ({"gate": True}, "with a gate"),
    "a residual": ({"residual": True}, "with a residual"),
    "a dense convolution": ({"groups": 1}, "grouped convolutions and squeeze-excite alone"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_serve_is_refused_with_the_reason(simulated, what):
    changes, reason = REFUSED[what]
    problem = changed(ON_CPU, changes)
    assert reason in cuda.refuse(problem)
    with backend("cuda"), pytest.raises(BackendError, match="'cuda' was asked for and cannot serve"):
        select(problem)


REFUSED_GATES = {
    "float64": ({"dtype": torch.float64}, "the gate is in bfloat16, float16, float32, not in torch.float64"),
    "too many channels": ({"channels": 60000}, "bytes of shared memory"),
    "an empty batch": ({"batch": 0}, "an empty batch"),
    "images beyond 2^31": ({"batch": 2**31}, "too many images"),
}


@pytest.mark.parametrize("what", REFUSED_GATES)
def test_gates_that_it_cannot_serve(simulated, what):
    changes, reason = REFUSED_GATES[what]
    problem = dataclasses.replace(GATE, **changes)
    assert reason in cuda.refuse(problem)
    with backend("cuda,reference"):
        assert select(problem).name == "reference"


def test_other_operations_and_training_alone_are_refused(simulated):
    other = NormActProblem((2, 8, 4, 4), "relu", False, torch.half, "cpu")
    assert "grouped convolutions and squeeze-excite alone" in cuda.refuse(other)
    model = regnet_fast.rebuild(stage(torch.float32)).model.train()
    with backend("cuda"), pytest.raises(BackendError, match=r"'cuda' was asked for.*of a training step alone"):
        model(torch.randn(2, 3, 32, 32))
    with backend("cuda,aten"):
        model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize(
    ("available", "capability", "reason"),
    [
        (False, (9, 0), "there is no GPU here"),
        (True, (7, 5), "the kernels need a GPU of compute capability 8.0 or newer"),
    ],
)
def test_gpus_that_it_does_not_serve(monkeypatch, available, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cuda.refuse(PROBLEM) == reason
    with backend("cuda"), pytest.raises(BackendError, match=reason):
        select(PROBLEM)


def test_auto_leaves_it_aside_and_says_why(simulated, monkeypatch):
    for module in (onednn, native):
        monkeypatch.setattr(module, "refuse", lambda problem: "not today")
    chosen = select(ON_CPU)
    assert chosen.name == "reference" and "serve where a trial chose them" in chosen.refused["cuda"]


# The way to the kernel


def compiler_without(monkeypatch, reason):
    monkeypatch.setattr(nvrtc, "refuse", lambda arch=None: reason)


def test_no_way_at_all(gpu, no_extension, monkeypatch):
    """Neither built nor a compiler: both reasons, and what would help."""
    compiler_without(monkeypatch, "no NVRTC")
    for words in ("there is no way to the kernel", "REGNET_FAST_BUILD_CUDA=1 pip install .", "NVRTC: no NVRTC"):
        assert words in cuda.refuse(PROBLEM)
    with backend("cuda,reference"):
        chosen = select(PROBLEM)
    assert chosen.name == "reference" and "no way" in chosen.refused["cuda"]


def test_no_driver(gpu, no_extension, monkeypatch):
    """None at all, and one of an older CUDA than the machine code."""
    compiler_without(monkeypatch, None)
    monkeypatch.setattr(driver, "library", lambda: None)
    assert "NVRTC: the CUDA driver, libcuda.so.1, was not found" in cuda.refuse(PROBLEM)
    monkeypatch.setattr(driver, "library", object)
    monkeypatch.setattr(driver, "version", lambda: "12.8")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "NVRTC: the driver is of CUDA 12.8 and loads no machine code of CUDA 13, torch's: update the driver" in (
        cuda.refuse(PROBLEM)
    )
    monkeypatch.setattr(driver, "version", lambda: "13.2")
    assert cuda.refuse(PROBLEM) is None


def test_a_cpu_build_of_torch_has_no_compiler(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    nvrtc._library.cache_clear()
    assert "not for CUDA" in nvrtc.refuse()
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    nvrtc._library.cache_clear()
    assert "NVRTC of CUDA 99" in nvrtc.refuse()
    nvrtc._library.cache_clear()


def built(folder, module=b"not a library", **changes):
    """A folder as a build leaves it."""
    facts = {
        "version": regnet_fast.__version__,
        "sources": sources.digest(),
        "architectures": [90],
        "cuda": "13.0",
    }
    folder.mkdir(exist_ok=True)
    (folder / f"_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(module)
    (folder / "build_info.json").write_text(json.dumps(facts | changes))
    return folder


MISMATCHES = {
    "version": ({"version": "0.0.1"}, rf"built for regnet_fast 0\.0\.1, and you have {regnet_fast.__version__}"),
    "sources": ({"sources": "f" * 64}, r"built for sources with the digest f{12}, and you have [0-9a-f]{12}"),
    "no library": ({}, "cannot be loaded"),
    "facts of another type": ({"architectures": ["90"]}, "build_info.json cannot be used"),
    "no architectures": ({"architectures": None}, "build_info.json cannot be used"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_module_that_does_not_fit_is_refused(monkeypatch, tmp_path, what):
    changes, reason = MISMATCHES[what]
    extension_of(monkeypatch, built(tmp_path / "built", **changes))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(extension.refuse())
    assert "build it again: REGNET_FAST_BUILD_CUDA=1 pip install ." in extension.refuse()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"version": 1}', "\0"])
def test_a_damaged_build_info(monkeypatch, tmp_path, content):
    folder = built(tmp_path / "built")
    (folder / "build_info.json").unlink()
    if content is not None:
        (folder / "build_info.json").write_text(content)
    extension_of(monkeypatch, folder)
    assert "build_info.json cannot be used" in extension.refuse()


def stand_for_the_module(monkeypatch, kernels, architectures=(90,)):
    """A module that keeps what it is asked to launch."""
    launched = []
    module = SimpleNamespace(kernels=lambda: kernels, launch=lambda *facts: launched.append(facts))
    facts = {"architectures": list(architectures), "cuda": "13.0"}
    monkeypatch.setattr(extension, "_found", lambda folder: (module, facts, None))
    extension.kernels.cache_clear()
    return launched


@pytest.fixture(autouse=True)
def kernels_of_the_next():
    yield
    extension.kernels.cache_clear()


@pytest.mark.parametrize(("have", "fits"), [(80, True), (86, True), (89, True), (90, False), (100, False)])
def test_architectures(monkeypatch, have, fits):
    """What was compiled for an architecture runs on the same and on later ones of its major number."""
    stand_for_the_module(monkeypatch, [], (80,))
    assert extension.refuse() is None
    expected = f"the extension module was built for sm_80, and the GPU is sm_{have}"
    assert extension.refuse(have) is None if fits else expected in extension.refuse(have)


def test_what_is_not_in_the_module_goes_to_the_compiler(gpu, monkeypatch):
    launch = cuda._launch(PROBLEM, False)
    compiler_without(monkeypatch, None)
    monkeypatch.setattr(driver, "refuse", lambda: None)
    stand_for_the_module(monkeypatch, [launch.kernel])
    assert launcher.way(launch, "cuda:0") == "extension" and launcher.refuse(launch, "cuda:0") is None
    stand_for_the_module(monkeypatch, [])
    assert launcher.way(launch, "cuda:0") == "NVRTC" and launcher.refuse(launch, "cuda:0") is None
    compiler_without(monkeypatch, "no NVRTC")
    assert f"extension: the extension module was built without {launch.kernel}" in cuda.refuse(PROBLEM)


def tensors_for(launch, **changes):
    given = {name: torch.zeros(64, dtype=torch.bfloat16) for name in launch.arguments if isinstance(name, str)}
    return given | changes


def test_what_the_module_is_given(gpu, monkeypatch):
    launch = dataclasses.replace(cuda._launch(PROBLEM, False), arguments=("x", "bias", -7, 2.5))
    launched = stand_for_the_module(monkeypatch, [launch.kernel])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1233 + index, raising=False)
    kernel, given = launcher.Kernel(launch, torch.device("cuda", 1)), tensors_for(launch, bias=None)
    kernel(**given)
    (facts,) = launched
    assert facts[:-1] == (launch.kernel, 1, launch.grid, launch.threads, launch.shared, 1234)
    assert struct.unpack("<QQixxxxfxxxx", facts[-1]) == (given["x"].data_ptr(), 0, -7, 2.5)
    with pytest.raises(ValueError, match="the tensor 'x' is not 16-byte aligned"):
        kernel(**tensors_for(launch, x=torch.zeros(64)[1:], bias=None))
    assert len(launched) == 1


# NVRTC

needs_nvrtc = pytest.mark.skipif(nvrtc.refuse() is not None, reason=str(nvrtc.refuse()))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@needs_nvrtc
def test_nvrtc_compiles_the_sources(cache, monkeypatch):
    """For one architecture, without a GPU; the second time from the disk; made again where the entry is damaged."""
    launch = plans.grouped_conv_forward(plans.GroupedConv(1, 7, 7, 2, 24, 1, "bfloat16"), parts=True)
    source, kernel = launch.source, launch.kernel
    made = nvrtc.compiled(source, kernel, 90)
    assert made.cubin[:4] == b"\x7fELF" and "grouped_conv_forward" in made.name and made.name.encode() in made.cubin
    compile_ = nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert nvrtc.compiled(source, kernel, 90) == made
    (entry,) = (path for path in cache.iterdir() if not path.suffix)
    entry.write_bytes(entry.read_bytes()[:-8])
    monkeypatch.setattr(nvrtc, "_compile", compile_)
    assert nvrtc.compiled(source, kernel, 90) == made


@needs_nvrtc
def test_the_key_knows_architecture_kernel_sources_and_compiler(cache, monkeypatch):
    keys = []
    monkeypatch.setattr(store, "stored", lambda key, make: keys.append(key) or b"name\ncubin")
    for source, kernel, arch in (
        ("a.cu", "k<1>", 90),
        ("b.cu", "k<1>", 90),
        ("a.cu", "k<2>", 90),
        ("a.cu", "k<1>", 80),
    ):
        assert nvrtc.compiled(source, kernel, arch).name == "name"
    monkeypatch.setattr(sources, "digest", lambda: "others")
    nvrtc.compiled("a.cu", "k<1>", 90)
    monkeypatch.setattr(nvrtc, "version", lambda: "1.0")
    nvrtc.compiled("a.cu", "k<1>", 90)
    assert len(set(keys)) == 6


@needs_nvrtc
def test_the_compilers_message_reaches_the_user(cache):
    with pytest.raises(nvrtc.CompileError, match=r"(?s)cannot compile .*ordered_sum\.cu.*sm_90.*nonsense") as error:
        nvrtc.compiled("ordered_sum.cu", "ordered_sum<nonsense>", 90)
    assert "error" in str(error.value)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


@needs_nvrtc
def test_architectures_that_nvrtc_does_not_know():
    assert nvrtc.refuse(90) is None
    assert "the GPU is sm_999" in nvrtc.refuse(999)


def test_info_says_which_way_is_live(monkeypatch, no_extension):
    (row,) = info.cuda_kernels()
    assert row["device"] is None and "REGNET_FAST_BUILD_CUDA" in row["refused"]["extension"] and row["nvcc"] is None
    stand_for_the_module(monkeypatch, [], (80, 90))
    (row,) = info.cuda_kernels()
    assert row["live"] == "extension" and row["built_for"] == ["sm_80", "sm_90"] and row["nvcc"] == "13.0"


def test_sources_are_found_and_their_digest_follows_them(monkeypatch, tmp_path):
    assert {"grouped_conv_forward.cu", "elements.cuh"} <= {path.name for path in sources.FOLDER.iterdir()}
    before = sources.digest()
    shutil.copytree(sources.FOLDER, tmp_path / "csrc")
    with (tmp_path / "csrc" / "device" / "primitives.cuh").open("a") as file:
        file.write("//\n")
    monkeypatch.setattr(sources, "INCLUDES", (tmp_path / "csrc", tmp_path / "csrc" / "device"))
    sources.digest.cache_clear()
    assert sources.digest() != before
    sources.digest.cache_clear()
