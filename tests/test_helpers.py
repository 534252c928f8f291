"""The rule for "the same function" must catch what breaks kernels, and the random statistics must stay in range."""

import copy

import pytest
import timm
import torch
from helpers import assert_close_to_reference, randomize_bn
from torch.nn import functional as F

from regnet_fast.inspect.verify import is_norm

GROUPS = 4


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def results(request):
    """A grouped convolution's result, twice: eager in the compute dtype, and in float64."""
    x = torch.randn(3, 32, 13, 7, dtype=request.param)
    weight = torch.randn(32, 8, 3, 3, dtype=request.param) * 0.1
    eager = F.conv2d(x, weight, padding=1, groups=GROUPS)
    return eager, F.conv2d(x.double(), weight.double(), padding=1, groups=GROUPS)


def test_eager_and_a_rounded_reference_pass(results):
    eager, reference = results
    assert_close_to_reference(eager.clone(), eager, reference, "eager", GROUPS)
    assert_close_to_reference(reference.to(eager.dtype), eager, reference, "rounded", GROUPS)


@pytest.mark.parametrize(
    ("region", "index"),
    [
        ("first row", (..., 0, slice(None))),
        ("last row", (..., -1, slice(None))),
        ("first column", (..., 0)),
        ("last column", (..., -1)),
        ("last image", (-1,)),
        ("last channel of each group", (slice(None), slice(7, None, 8))),
    ],
)
def test_an_error_in_one_region_is_caught_and_named(results, region, index):
    """An error below twice eager's largest passes as a maximum, and over the whole tensor its RMS fades."""
    eager, reference = results
    ours = reference.clone()
    size = 1.9 * (eager - reference).abs().max()
    ours[index] += size * torch.randn_like(ours[index]).sign()
    with pytest.raises(AssertionError, match=region):
        assert_close_to_reference(ours.to(eager.dtype), eager, reference, "shifted", GROUPS)


def test_a_zeroed_corner_is_reported_with_its_place(results):
    eager, reference = results
    ours = eager.clone()
    ours[1, 15, 0, 0] += 1
    with pytest.raises(AssertionError) as failure:
        assert_close_to_reference(ours, eager, reference, "corner", GROUPS)
    assert "(1, 15, 0, 0)" in str(failure.value)
    assert "channel 7 of 8 in group 1 of 4" in str(failure.value)


def test_a_missing_tap_at_the_border_is_caught(results):
    eager, reference = results
    ours = eager.clone()
    ours[..., 0] = 0
    with pytest.raises(AssertionError):
        assert_close_to_reference(ours, eager, reference, "padding", GROUPS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_caught(results, value):
    eager, reference = results
    ours = eager.clone()
    ours[2, 3, 4, 5] = value
    with pytest.raises(AssertionError, match=r"\(2, 3, 4, 5\)"):
        assert_close_to_reference(ours, eager, reference, "not a number", GROUPS)


def test_shape_dtype_and_reference_are_checked(results):
    eager, reference = results
    for ours, wrong_reference in ((eager[:1], reference), (eager.half(), reference), (eager, reference.float())):
        with pytest.raises(AssertionError):
            assert_close_to_reference(ours, eager, wrong_reference, "mismatch")


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 4, 1, 1), (1, 8, 1, 5), (0, 8, 4, 4)], ids=str)
def test_any_shape_is_accepted_and_still_checked(shape):
    reference = torch.randn(shape, dtype=torch.float64)
    eager = reference.float()
    assert_close_to_reference(eager, eager, reference, "equal")
    if eager.numel():
        with pytest.raises(AssertionError):
            assert_close_to_reference(eager + 1, eager, reference, "off by one")


@pytest.mark.parametrize("name", ["regnety_016", "regnetz_b16", "resnetv2_50", "repvgg_a0", "regnetv_040"])
def test_random_statistics_keep_a_whole_model_in_range(name):
    model = randomize_bn(timm.create_model(name).eval(), seed=1)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = model(x)
        reference = copy.deepcopy(model).double()(x.double())
        low = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert 1e-2 < logits.std() < 1e2
    assert (logits[0] - logits[1]).std() > 0.1 * logits.std(), "the logits hardly depend on the image"
    assert (logits - reference).norm() / reference.norm() < 5e-6
    assert (low - reference).norm() / reference.norm() < 0.2


def test_random_statistics_are_random_everywhere_and_reproducible():
    model = timm.create_model("regnetx_002").train()
    models = [randomize_bn(copy.deepcopy(model), seed) for seed in (3, 3, 4)]
    norms = [[module for module in model.modules() if is_norm(module)] for model in models]
    assert len(norms[0]) == sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert all(module.training and not module._forward_pre_hooks for module in models[0].modules())
    for a, b, c in zip(*norms, strict=True):
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(a, name), getattr(b, name))
            assert not torch.equal(getattr(a, name), getattr(c, name))
            assert getattr(a, name).std() > 0.01
