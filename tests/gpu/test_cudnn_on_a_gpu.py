"""cuDNN's calls on a real device: what the fused ones make of memory that was NaN, and which settings they go by."""

import pytest
import torch
import torch.nn.functional as F
from test_settings import WRITES, write

from regnet_fast.backends import ConvProblem, Geometry, cudnn
from regnet_fast.settings import settings
from regnet_fast.trials.candidate import Candidate, candidates, prepare
from regnet_fast.trials.check import make, poison, verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "stem": ((4, 3, 64, 64), 32, (3, 3), Geometry((2, 2), (1, 1))),
    "pointwise": ((4, 72, 28, 28), 216, (1, 1), Geometry()),
    "shortcut": ((4, 72, 28, 28), 216, (1, 1), Geometry((2, 2))),
    "7x7 pointwise": ((4, 576, 7, 7), 1512, (1, 1), Geometry()),
    "dense": ((4, 64, 28, 28), 64, (3, 3), Geometry(padding=(1, 1))),
    **{
        f"groups of {width}": ((4, 3 * width, 14, 14), 3 * width, (3, 3), Geometry((s, s), (1, 1), groups=3))
        for width, s in ((8, 1), (24, 1), (24, 2), (40, 1), (56, 1), (112, 2), (232, 1))
    },
}


def problem_of(shape, dtype, residual=False, gate=False):
    return ConvProblem(*SHAPES[shape], "relu", gate, residual, dtype, "cuda:0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_of_recycled_memory_gets_into_a_fused_result(shape, residual, dtype):
    """cudnn_convolution_relu hands its own unwritten result to cuDNN as what to add, times zero."""
    problem = problem_of(shape, dtype, residual)
    case = make(problem, 0)
    run = cudnn.prepare_conv(problem, *case.weights, variant="fused")
    expected = cudnn.prepare_conv(problem, *case.weights)(*case.call)
    for _ in range(3):
        poison(*[expected] * 4, case.call[0])
        y = run(*case.call)
        if run.refused:
            pytest.skip(run.refused)
        assert y.isfinite().all()
        poison(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gate", "residual"), [(False, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_is_what_a_trial_would_take(shape, gate, residual, dtype):
    problem = problem_of(shape, dtype, residual, gate)
    peer, *others = [one for one in candidates(problem) if one.backend == "aten"]
    assert [peer, *others] == [Candidate("aten", "plain"), Candidate("aten", "fused")]
    bind = [lambda p, w, one=one: prepare(p, w, one) for one in (peer, *others)]
    with torch.inference_mode():
        for one in bind:
            verify(problem, one, bind[0])


@pytest.fixture
def restored():
    before = settings()
    yield
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    before.apply()


@pytest.mark.parametrize("writes", [[one] for one in WRITES], ids=str)
def test_convolutions_and_products_go_by_the_settings_that_are_read(restored, writes):
    """2^-12 beside 1 is lost where the operands are rounded to TF32."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    for one in writes:
        write(*one)
    exact = 1 + 2.0**-12
    x = torch.full((8, 64, 16, 16), exact, device="cuda").contiguous(memory_format=torch.channels_last)
    weight = torch.ones(64, 64, 3, 3, device="cuda").contiguous(memory_format=torch.channels_last)
    found = F.conv2d(x, weight)[0, 0, 0, 0].item() / (64 * 9)
    rounded = abs(found - exact) > 2.0**-14
    assert rounded <= settings().conv_tf32, "rounded without leave; that it is not with leave is cuDNN's affair"
    found = (torch.full((512, 512), exact, device="cuda") @ torch.ones(512, 512, device="cuda"))[0, 0].item() / 512
    assert (abs(found - exact) > 2.0**-14) <= settings().matmul_tf32


@pytest.mark.parametrize("name", ["deterministic", "benchmark"])
def test_no_fused_call_where_it_would_not_obey(monkeypatch, name):
    monkeypatch.setattr(torch.backends.cudnn, name, True)
    assert [str(one) for one in candidates(problem_of("dense", torch.float16)) if one.backend == "aten"] == [
        "aten:plain"
    ]
