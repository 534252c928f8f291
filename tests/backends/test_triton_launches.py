"""What Triton is asked for and what a launch costs, with a driver that launches nothing: no GPU, and no interpreter."""

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
from regnet_fast.kernels import norm_act, pointwise_conv, squeeze_excite

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


def test_triton_is_asked_once_for_aligned_tensors():
    with (
        standing_in() as driver,
        mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run,
    ):
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


def test_the_arguments_are_those_that_triton_passes():
    x, weight, bias = operands()
    with standing_in() as driver:
        for _ in range(2):
            pointwise_conv.pointwise_conv(x, weight, bias)
        first, second = (launched[9:] for launched in driver.launched)
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            assert a == b


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
