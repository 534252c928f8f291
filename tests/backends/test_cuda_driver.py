"""How csrc/ is launched, on a stand-in for the CUDA driver: whole models against float64, and what is asked of it."""

import contextvars
import dataclasses
import functools
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from backends.test_cuda_backend import ON_CPU, convolved, operands, shifted
from backends.test_cuda_training import check_step, network
from helpers import assert_close_to_reference, randomize_bn
from simulator import machine
from simulator.driver import STREAM, driven

import regnet_fast
from regnet_fast.backends import backend, cuda
from regnet_fast.backends.cuda import driver, launcher, nvrtc
from regnet_fast.backends.cuda.plans import Launch
from regnet_fast.observer import observer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which(machine.COMPILER) is None, reason="the simulator needs a C++ compiler"),
]


@pytest.fixture
def stand_in():
    with driven() as found:
        yield found


def launched(stand_in):
    """The names of the kernels that were launched, each time."""
    calls = [call.split(" ", 3)[3] for call in stand_in.calls if call.startswith("cuLaunchKernel")]
    return [call.partition("<")[0] for call in calls]


Z = {"bottle_ratio": 4.0, "se_ratio": 0.25, "downsample": None, "linear_out": True, "num_features": 64}
MODELS = {
    "x": (8, {"act_layer": "relu"}),
    "y": (24, {"act_layer": "relu", "se_ratio": 0.25}),
    "z": (8, Z),
    "depthwise": (1, {"w0": 24, "wa": 24.0, "se_ratio": 0.25}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_whole_models(stand_in, kind):
    """Every grouped convolution and gate by csrc/, and as near to float64 as timm."""
    (group_size, options), dtype = MODELS[kind], torch.float16 if kind == "z" else torch.bfloat16
    host = randomize_bn(network(group_size, **options), 0, (2, 3, 64, 64)).eval()
    grouped = sum(getattr(module, "groups", 1) > 1 for module in host.modules())
    x, exact = torch.randn(2, 3, 40, 40).to(dtype), host.double()
    wide = exact(x.double())
    eager = host.to(dtype)(x)
    ours = regnet_fast.rebuild(host).model
    with backend("cuda,aten,reference"):
        y = ours(x)
    assert_close_to_reference(y, eager, wide, kind)
    heard = launched(stand_in)
    name = "depthwise_conv_forward" if kind == "depthwise" else "grouped_conv_forward"
    assert heard.count(name) == grouped >= 5
    joined = [call for call in stand_in.calls if "grouped_conv_forward<" in call and not call.endswith(", 0>")]
    assert bool(joined) == (kind != "depthwise"), "where it pays conv1 is a part of conv2's launch"
    excites = sum(type(module).__name__ == "SEModule" for module in host.modules())
    assert heard.count("squeeze_excite") == 2 * excites, "two launches of one kernel"
    assert ("squeeze_excite" in heard) == ("se_ratio" in options)


@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_whole_models_train(kind):
    group_size, options = MODELS[kind]
    model, stand_ins = network(group_size, **options), []
    grouped = sum(getattr(module, "groups", 1) > 1 for module in model.modules())

    @contextmanager
    def launching():
        with driven() as found:
            yield stand_ins.append(found)

    check_step(model, torch.bfloat16, torch.randn(4, 3, 40, 40), launching=launching())
    heard = launched(*stand_ins)
    if kind == "depthwise":
        assert heard.count("depthwise_conv_backward") == grouped >= 5
    else:  # `check_step` runs two forward passes
        assert heard.count("grouped_conv_backward") == grouped >= 5
        assert heard.count("grouped_conv_forward") == heard.count("merged_moments") == 2 * grouped


def test_what_the_driver_is_asked(stand_in):
    """A kernel is loaded once for all weights and batches that take it, and launched on the current stream."""
    x, weight, bias = operands(ON_CPU)
    for _ in range(2):
        run = cuda.prepare_conv(ON_CPU, weight, bias)
        assert run.label == "CUDA C++, NVRTC"
        for _ in range(2):
            y = run(x, None, None, False, False)
    exact = convolved(x, weight, bias, ON_CPU, torch.float64)
    assert_close_to_reference(y, convolved(x, weight, bias, ON_CPU, torch.float32).bfloat16(), exact, "conv")
    names = [call.split()[0] for call in stand_in.calls]
    assert [names.count(name) for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel")] == [1, 1, 4]
    assert names.count("cuDevicePrimaryCtxRetain") == 1 and "cuFuncSetAttribute" not in names
    assert {tuple(call.split()[1:3]) for call in stand_in.calls if "cuLaunch" in call} == {("0", str(STREAM))}


def test_more_shared_memory_is_asked_for_once(stand_in):
    """And never less, which would take it from a launch before."""
    problem = dataclasses.replace(ON_CPU, input_shape=(1, 464, 5, 6), out_channels=464, activation="none")
    x, weight, bias = operands(problem)
    run = cuda.prepare_conv(problem, weight, bias)
    assert cuda._launch(problem, False).shared > driver.ORDINARY_SHARED
    for _ in range(3):
        y = run(x, None, None, False, False)
    exact = convolved(x, weight, bias, problem, torch.float64)
    assert_close_to_reference(y, convolved(x, weight, bias, problem, torch.float32).bfloat16(), exact, "conv")
    function = launcher._function("ordered_sum.cu", "ordered_sum<256>", 0, 90)
    for shared in (1000, 60000, 50000, 60000, 70000, 49152):
        function.bound((1, 1, 1), 256, shared, struct.Struct("=QQi4xi4x"))
    asked = [call.split()[1] for call in stand_in.calls if call.startswith("cuFuncSetAttribute")]
    assert asked == [str(cuda._launch(problem, False).shared), "60000", "70000"]


def test_threads(stand_in):
    """Threads that launch one kernel at a time, none of which has a context of its own, each get their results."""
    _, weight, bias = operands(ON_CPU)
    run = cuda.prepare_conv(ON_CPU, weight, bias)
    images = [operands(ON_CPU)[0] for _ in range(4)]
    expected = [run(x, None, None, False, False) for x in images]

    def many(i):
        return [run(images[i], None, None, False, False) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(contextvars.copy_context().run, many, i) for i in range(4)]
        for future, y in zip(futures, expected, strict=True):
            assert all(torch.equal(one, y) for one in future.result())


def sums(index=0):
    """The smallest launch, of a device's number, and its tensors."""
    launch = Launch("ordered_sum.cu", "ordered_sum<256>", (1, 1, 1), 256, 0, ("parts", "dweight", 2, 64))
    return launcher.Kernel(launch, torch.device("cuda", index)), torch.randn(2, 64), torch.empty(64)


def test_two_devices(stand_in, monkeypatch):
    """On the device of its tensors, in its context and on its stream, whichever is the current one; which stays so."""
    current = [0]

    @contextmanager
    def on(index):
        before, current[0] = current[0], index
        yield
        current[0] = before
        stand_in.library.cuCtxSetCurrent(driver._context(before))  # as torch's guard does

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    kernels = [sums(index) for index in (0, 1, 0, 1)]
    assert stand_in.library.stand_in_device() == -1
    for kernel, parts, dweight in (*kernels, *kernels):
        kernel(parts=parts, dweight=dweight)
        assert torch.equal(dweight, parts[0] + parts[1]) and stand_in.library.stand_in_device() == 0
    at = [call.split()[1:3] for call in stand_in.calls if call.startswith("cuLaunch")]
    assert at == [["0", str(STREAM)], ["1", str(STREAM + 1)]] * 4


# Wrong input


@pytest.mark.parametrize(
    ("code", "words"), [(2, "CUDA_ERROR_OUT_OF_MEMORY"), (700, "CUDA_ERROR_ILLEGAL_ADDRESS"), (12345, "error 12345")]
)
def test_an_error_of_a_launch_is_an_exception(stand_in, code, words):
    """With the kernel and the driver's own words; the next launch is as good as any."""
    kernel, parts, dweight = sums()
    stand_in.refuse("cuLaunchKernel", code)
    with pytest.raises(RuntimeError, match=rf"ordered_sum<256>: {words}"):
        kernel(parts=parts, dweight=dweight)
    kernel(parts=parts, dweight=dweight)
    assert torch.equal(dweight, parts[0] + parts[1])


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuModuleGetFunction", "cuDevicePrimaryCtxRetain"])
def test_machine_code_that_the_driver_does_not_load(stand_in, monkeypatch, call):
    """What made it and for what, the driver's version and words; and it may be tried again."""
    monkeypatch.setattr(nvrtc, "version", lambda: "13.2")
    kernel, parts, dweight = sums()
    stand_in.refuse(call, 200)
    words = rf"ordered_sum<256>: the driver, of CUDA 13\.0, does not load what NVRTC 13\.2 made for sm_90: {call}: "
    with pytest.raises(RuntimeError, match=words + "CUDA_ERROR_INVALID_IMAGE: in the stand-in's words"):
        kernel(parts=parts, dweight=dweight)
    kernel(parts=parts, dweight=dweight)
    assert torch.equal(dweight, parts[0] + parts[1])


def test_more_shared_memory_than_there_is(stand_in):
    launch = Launch("ordered_sum.cu", "ordered_sum<256>", (1, 1, 1), 256, 1 << 20, ("parts", "dweight", 2, 64))
    with pytest.raises(RuntimeError, match="ordered_sum<256>: 1048576 bytes of shared memory: CUDA_ERROR_INVALID"):
        launcher.Kernel(launch, torch.device("cpu"))(parts=torch.zeros(2, 64), dweight=torch.zeros(64))


def test_memory_that_was_not_named_is_not_reached(stand_in):
    """The stand-in's own eyes: a size that is too large, and pointers in the wrong order."""
    kernel, parts, dweight = sums()
    kernel(parts=parts, dweight=dweight)
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_LAUNCH_FAILED: .*of parts"):
        kernel(parts=parts[:1], dweight=dweight)
    wrong = dataclasses.replace(kernel.launch, arguments=("dweight", "parts", 1, 64))
    with pytest.raises(RuntimeError, match="writes to parts"):
        launcher.Kernel(wrong, torch.device("cpu"))(parts=parts, dweight=dweight)


def test_views_that_are_not_aligned(stand_in):
    """Are copied by the backend; a kernel itself refuses them."""
    x, weight, bias = operands(ON_CPU)
    expected = cuda.prepare_conv(ON_CPU, weight, bias)(x, None, None, False, False)
    run = cuda.prepare_conv(ON_CPU, shifted(weight.contiguous(memory_format=torch.channels_last)), shifted(bias))
    assert torch.equal(run(shifted(x), None, None, False, False), expected)
    kernel, parts, dweight = sums()
    with pytest.raises(ValueError, match=r"ordered_sum<256>: the tensor 'parts' is not 16-byte aligned"):
        kernel(parts=shifted(parts), dweight=dweight)


# What a launch costs


def idle(monkeypatch):
    """A convolution whose launches end before the driver is called."""
    monkeypatch.setattr(driver.Function, "bound", lambda self, *facts: lambda arguments, stream: None)
    x, weight, bias = operands(ON_CPU)
    run = cuda.prepare_conv(ON_CPU, weight, bias)
    return functools.partial(run, x, None, None, False, False)


def test_a_launch_is_a_few_calls_of_python(stand_in, monkeypatch):
    """Of functions and of C, tensors' addresses among them: what a launch costs in a count that no machine changes."""
    call, calls = idle(monkeypatch), []
    with observing_nobody():
        call()
        sys.setprofile(lambda frame, event, what: calls.append((frame.f_code.co_name, event, what)))
        try:
            call()
        finally:
            sys.setprofile(None)
    entered = [name for name, event, _ in calls if event == "call"]
    assert 0 < len(entered) <= 10 and len([event for _, event, _ in calls if event.endswith("call")]) <= 24, calls


def test_a_launch_costs_microseconds(stand_in, monkeypatch):
    """Five where nothing else runs; here any machine under load."""
    call = idle(monkeypatch)
    with observing_nobody():
        took = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(100):
                call()
            took.append((time.perf_counter() - start) / 100)
    assert min(took) < 25e-6


@contextmanager
def observing_nobody():
    token = observer.set(None)
    yield
    observer.reset(token)
