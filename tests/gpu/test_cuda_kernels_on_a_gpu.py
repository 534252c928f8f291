"""The CUDA C++ kernels on a real GPU, by each way that leads to them: the same bits by both."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends.test_cuda_training import GRADIENTS, Conv, check_forward, check_gradients, check_step, network
from helpers import assert_close_to_reference

import regnet_fast.functional as R
from regnet_fast.backends import ConvProblem, Geometry, cuda
from regnet_fast.backends.cuda import extension, launcher, nvrtc

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = [(1, 7, 9, 3, 8), (3, 14, 14, 5, 24), (2, 15, 9, 2, 64), (1, 13, 13, 1, 112), (2, 28, 28, 2, 232)]


@pytest.fixture(params=["extension", "NVRTC"])
def way(request, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("these launches take a GPU")
    reason = launcher.ways(launcher.architecture("cuda:0"))[request.param]
    if reason:
        pytest.skip(reason)
    other = {"extension": nvrtc, "NVRTC": extension}[request.param]
    monkeypatch.setattr(other, "refuse", lambda arch=None: "not in this test")
    return request.param


def prepared(shape, stride, dtype, activation="silu"):
    n, h, w, groups, width = shape
    sizes = ((n, groups * width, h, w), groups * width, (3, 3), Geometry((stride, stride), (1, 1), (1, 1), groups))
    problem = ConvProblem(*sizes, activation, False, False, dtype, "cuda:0")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.input_shape, generator=generator).to("cuda:0", dtype)
    weight = torch.randn(groups * width, width, 3, 3, generator=generator).div(3 * width**0.5).to("cuda:0", dtype)
    bias = torch.randn(groups * width, generator=generator).to("cuda:0")
    return problem, x.contiguous(memory_format=torch.channels_last), weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grouped_conv(way, shape, stride, dtype):
    problem, x, weight, bias = prepared(shape, stride, dtype)
    reason = cuda.refuse(problem)
    if reason and "was built without" in reason:
        pytest.skip(reason)
    assert reason is None
    run = cuda.prepare_conv(problem, weight, bias)
    assert run.label == f"CUDA C++, {way}"
    y, parts = run.with_parts(x)
    again = run(x, None, None, False, False)

    def convolved(kind):
        y = torch.nn.functional.conv2d(x.to(kind), weight.to(kind), bias.to(kind), *problem.geometry)
        return torch.nn.functional.silu(y)

    assert torch.equal(y, again)
    assert_close_to_reference(y, convolved(torch.float32).to(dtype), convolved(torch.float64), str(problem))
    torch.testing.assert_close(parts.sum(1), y.float().mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_on_another_stream_and_in_a_graph(way):
    problem, x, weight, bias = prepared((3, 14, 14, 5, 24), 1, torch.bfloat16)
    if cuda.refuse(problem):
        pytest.skip(cuda.refuse(problem))
    run = cuda.prepare_conv(problem, weight, bias)
    expected = run(x, None, None, False, False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(run(x, None, None, False, False), expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, None, None, False, False)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, run(x, None, None, False, False)) and not torch.equal(y, expected)


def test_in_a_thread_that_has_no_context(way):
    problem, x, weight, bias = prepared((3, 14, 14, 5, 24), 1, torch.bfloat16)
    if cuda.refuse(problem):
        pytest.skip(cuda.refuse(problem))
    run = cuda.prepare_conv(problem, weight, bias)
    expected = run(x, None, None, False, False)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        for y in pool.map(lambda _: run(x, None, None, False, False), range(8)):
            torch.cuda.synchronize()
            assert torch.equal(y, expected)


def test_arrays_of_cupy():
    """Written on a stream of CuPy's and read on torch's, and the other way round."""
    cupy = pytest.importorskip("cupy")
    _, x, weight, _ = prepared((3, 14, 14, 5, 24), 1, torch.float16)
    expected = R.grouped_conv(x, weight, groups=5)
    with cupy.cuda.Stream(non_blocking=True):
        array = cupy.from_dlpack(x) * 1
        given = torch.from_dlpack(array)
    y = R.grouped_conv(given, weight, groups=5)
    assert given.data_ptr() == array.data.ptr and torch.equal(y, expected)
    with cupy.cuda.Stream(non_blocking=True):
        assert bool((cupy.from_dlpack(y) == cupy.from_dlpack(expected)).all())


@pytest.mark.parametrize("facts", GRADIENTS, ids=str)
def test_training(way, facts):
    """Both halves of a step by the kernels of this way."""
    conv = Conv(*facts, device="cuda:0")
    launched = []

    def hear(launch, device):
        launched.append(launch.source)
        return launcher.Kernel(launch, device)  # not one that the other way has loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "kernel", hear)
        check_gradients(conv)
        check_forward(conv)
    if not launched:
        pytest.skip(f"{way} has none of these kernels")


def test_a_training_step():
    """A small RegNet in bfloat16, as near to float64 as timm's."""
    pytest.importorskip("triton")
    for forced in ("cuda,triton", "cuda,aten"):
        check_step(network(24, se_ratio=0.25), torch.bfloat16, torch.randn(4, 3, 40, 40), forced, "cuda:0")
