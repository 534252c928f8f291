"""What Triton is asked for and what a launch costs, with a driver that launches nothing: no GPU, and no interpreter."""

import functools
import importlib
import os
import time
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import timm
from triton.runtime.jit import JITFunction
from triton_driver import binaries, standing_in

import regnet_fast
from bench.compile import kernels as ahead
from regnet_fast import kernels
from regnet_fast.kernels import (
    channel_statistics,
    channel_tiles,
    grouped_input_gradient,
    grouped_weight_gradient,
    norm_act,
    pointwise_conv,
    squeeze_excite,
    training_join,
    training_passes,
)
from regnet_fast.kernels.training_join import ReadMap

MODELS = ("regnety_032", "regnetz_005", "resnetv2_50")


def asked(name: str, *batches: int) -> list[dict]:
    """The binaries of a forward pass in bfloat16 at each batch size."""
    model = regnet_fast.rebuild(timm.create_model(name).eval().to(torch.bfloat16)).model
    found = []
    with standing_in(), torch.no_grad(), regnet_fast.backend("triton"):
        for batch in batches:
            with binaries() as some:
                model(torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16))
            found.append(some)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_size_makes_no_binary_of_its_own(model):
    """Pixels that are divisible by 16 and that are not, and a batch of one beside another that takes the same tiles."""
    even, odd = asked(model, 64, 65)
    assert even == odd and 10 < len(even) < 30


@pytest.mark.parametrize("model", MODELS)
def test_what_is_compiled_ahead_is_what_is_launched(model):
    (found,) = asked(model, 256)
    made = {ahead.source(job)[0].hash(): job for job in ahead.jobs([model], [90], ["bfloat16"])}
    assert set(found) <= set(made), [found[key] for key in set(found) - set(made)]
    assert all(made[key].warps == warps for key, (_, warps) in found.items())


def test_no_kernel_is_compiled_for_a_size():
    """Of all kernels, those of training too."""
    found = set()
    for job in ahead.jobs(["regnety_002", "resnetv2_18"], [90], ["bfloat16"]):
        module, _, name = job.kernel.partition(".")
        kernel = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), name)
        sizes = {name for name, kind in job.arguments if kind == "i32"}
        special = [one.name for one in kernel.params if one.name in sizes and not one.do_not_specialize]
        assert sizes and not special, f"{job.kernel}: {special}"
        found.add(job.kernel)
    assert len(found) >= 15


def operands(dtype=torch.bfloat16, shift=0):
    """Of a small convolution, whose first operand may be out of line."""
    flat = torch.zeros(2 * 32 * 49 + 8, dtype=dtype)
    x = flat[shift : shift + 2 * 32 * 49].view(2, 7, 7, 32).permute(0, 3, 1, 2)
    return x, torch.zeros(64, 32, dtype=dtype), torch.zeros(64)


def lookups():
    """Counts how often Triton looks for a binary."""
    return mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run)


def assert_same_arguments(first: tuple, second: tuple) -> None:
    """Of two launches of one function: tensors alike, and equal numbers."""
    assert first[:5] == second[:5]
    for a, b in zip(first[9:], second[9:], strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            assert a == b


def test_triton_is_asked_once_for_aligned_tensors():
    with standing_in() as driver, lookups() as run:
        for _ in range(3):
            pointwise_conv.pointwise_conv(*operands())
        assert (run.call_count, len(driver.launched)) == (1, 3)
        first, second, _ = driver.launched
        assert first[:6] == second[:6] and len(first) == len(second)
        for _ in range(2):
            pointwise_conv.pointwise_conv(*operands(shift=1))
        assert run.call_count == 3, "other tensors than the binary was made for"
        assert driver.launched[-1][4] != first[4]
        pointwise_conv.pointwise_conv(*operands())
        assert run.call_count == 3 and driver.launched[-1][4] == first[4]
        pointwise_conv.pointwise_conv(*operands(torch.float16))
        assert run.call_count == 4 and driver.launched[-1][4] != first[4]


def normed(factor=None, dtype=torch.bfloat16):
    """A small map, read through a norm, and a factor of each of its images or of their channels."""
    factor = None if factor is None else torch.ones(factor, dtype=dtype)
    return ReadMap(operands()[0], *torch.ones(4, 32), 1e-5, "none" if factor is None else "silu", factor)


def gradients(stride):
    """Of a grouped convolution: of its input and of its weight."""
    x, affine, side = operands()[0], tuple(torch.ones(3, 32)), (7 - 1) // stride + 1
    dz = x[:, :, :side, :side].contiguous(memory_format=torch.channels_last)
    rest = ((3, 3), (stride, stride), (1, 1), (1, 1), 4)
    packed, norm = torch.zeros(32, 72, dtype=x.dtype), (*torch.ones(2, 32), "silu")
    return (
        lambda: grouped_input_gradient.input_gradient(dz, dz, affine, packed, (7, 7), *rest),
        lambda: grouped_weight_gradient.weight_gradient(x, norm, dz, dz, affine, *rest),
    )


def training():
    """What launches the passes of a training step."""
    (x, *_), one, deep, gated = operands(), normed(), normed((2,)), normed((2, 32), torch.float32)
    vectors, parts, extra = tuple(torch.ones(3, 32)), torch.zeros(2, 3, 32), torch.zeros(2, 32)
    return {
        "statistics": lambda: channel_statistics.statistics(x),
        "total": lambda: channel_tiles.total(parts),
        "join": lambda: training_join.join(one),
        "join of three": lambda: training_join.join(deep, deep, one, activation="relu"),
        "join_backward": lambda: training_join.join_backward(x, x, [deep, one], "relu"),
        "activation_backward": lambda: training_join.activation_backward(x, gated, extra),
        "raw_gradient": lambda: training_passes.raw_gradient(x, x, *vectors, x),
        "image_parts": lambda: training_passes.image_parts(one, x, 1 / 49),
        "input_gradient": gradients(1)[0],
        "input_gradient, strided": gradients(2)[0],
        "weight_gradient": gradients(1)[1],
    }


@pytest.mark.parametrize("name", training())
def test_triton_is_asked_once_in_training(name):
    call = training()[name]
    with standing_in() as driver, lookups() as run:
        call()
        launches = len(driver.launched)
        for _ in range(2):
            call()
        assert (run.call_count, len(driver.launched)) == (launches, 3 * launches) and launches
        for first, last in zip(driver.launched[:launches], driver.launched[-launches:], strict=True):
            assert_same_arguments(first, last)


def test_the_arguments_are_those_that_triton_passes():
    x, weight, bias = operands()
    with standing_in() as driver:
        for _ in range(2):
            pointwise_conv.pointwise_conv(x, weight, bias)
        first, second = driver.launched
    assert_same_arguments(first, second)


def test_every_dtype_has_a_launch_of_its_own():
    x, scale = operands()[0], torch.ones(32)
    weights = torch.zeros(8, 32), torch.zeros(8), torch.zeros(32, 8), torch.zeros(32)
    with standing_in() as driver:
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            norm_act.norm_act(x, scale, scale, torch.ones(2, 32, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            squeeze_excite.squeeze_excite(torch.zeros(2, 1, 32), *weights, dtype=dtype)
        functions = [launched[4] for launched in driver.launched]
    assert functions[0] == functions[2] != functions[1] and functions[3] == functions[5] != functions[4]


@pytest.mark.parametrize("read", [lambda dtype: normed((2,), dtype), lambda dtype: normed((2, 32), dtype)])
def test_every_dtype_of_a_factor_has_a_launch_of_its_own(read):
    with standing_in() as driver:
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            training_join.join(read(dtype))
        functions = [launched[4] for launched in driver.launched]
    assert functions[0] == functions[2] != functions[1]


def microseconds(call) -> float:
    """The fastest of a few hundred calls."""
    times = []
    for _ in range(300):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def costs() -> tuple[float, float, float]:
    """Of Triton's own way, of a launch that was found, and of a call as a whole."""
    x, weight, bias = operands()
    y = pointwise_conv.pointwise_conv(x, weight, bias)
    facts = (x.shape, 64, x.dtype, x.device, True, False, False, None, None, 1, "none", "ieee", None)
    launch = pointwise_conv._plan(*facts)[2]
    assert launch.compiled is not None
    tensors = (x, weight, bias, None, None, None, None, None, None, y)
    return (
        microseconds(lambda: launch.kernel[launch.grid](*tensors, *launch.sizes, **launch.options)),
        microseconds(lambda: launch(*tensors)),
        microseconds(lambda: pointwise_conv.pointwise_conv(x, weight, bias)),
    )


def test_a_launch_takes_a_part_of_what_triton_takes():
    with standing_in():
        again, kept, whole = costs()
    assert kept < again / 2 and whole < again, f"{kept:.1f} and {whole:.1f} us, and {again:.1f} us"


class Clock(list):
    """When each launch began."""

    def append(self, arguments):
        super().append(time.perf_counter())


def training_costs(call, driver) -> tuple[float, float]:
    """Of Triton's own way for the first launch of a call, and of the call until then where allocating costs nothing."""
    times, driver.launched = [], Clock()
    with lookups() as run:
        call()
    (kernel, *arguments), options = run.call_args_list[0]
    again = microseconds(lambda: kernel.run(*arguments, **options))
    with mock.patch.object(torch, "empty", functools.lru_cache(torch.empty)):
        for _ in range(300):
            driver.launched.clear()
            start = time.perf_counter()
            call()
            times.append(driver.launched[0] - start)
    return again, min(times) * 1e6


@pytest.mark.parametrize("name", training())
def test_a_launch_of_training_takes_less_than_what_triton_takes(name):
    with standing_in() as driver:
        again, whole = training_costs(training()[name], driver)
    assert whole < again, f"{whole:.1f} us, and {again:.1f} us"
