"""Problems of several results: each is held to float64's, in this process."""

import dataclasses
from functools import partial

import planted
import pytest
import torch
from test_session import PROBLEM

import regnet_fast.functional as R
from regnet_fast.backends import reference
from regnet_fast.backends.problem import Run
from regnet_fast.ops.convolution import PackedConv
from regnet_fast.trials import candidate
from regnet_fast.trials.check import Wrong, verify

MEANS = dataclasses.replace(PROBLEM, means=True)
PEER = partial(candidate.bound, reference)

pytestmark = pytest.mark.usefixtures("one_thread")


def verified(problem, variant):
    with torch.inference_mode():
        return verify(problem, partial(candidate.bound, planted, variant=variant), PEER)


@pytest.mark.parametrize("variant", ["Plain", "Parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_that_are_right(variant, dtype):
    assert verified(dataclasses.replace(MEANS, dtype=dtype), variant) < 3


@pytest.mark.parametrize(
    ("variant", "message"), [("WrongMeans", "the means: .*error"), ("MapWrongWithMeans", "^the la")]
)
def test_means_that_are_wrong_or_spoil_the_map(variant, message):
    with pytest.raises(Wrong, match=message):
        verified(MEANS, variant)
    verified(PROBLEM, variant)


def test_a_residual_is_not_lost_where_the_backend_has_the_means_of_a_plain_convolution():
    problem = dataclasses.replace(MEANS, residual=True)
    assert verified(problem, "Parts") < 3


def test_packed_weights_ask_for_a_choice_of_their_own_with_means(monkeypatch):
    """On a GPU; on a CPU it is one problem, and the weights are packed once."""
    asked = []

    class Bound(Run):
        label = "bound"

        def __call__(self, *arguments):
            return torch.ones(1, 4, 3, 3, dtype=torch.float32, device="meta")

    def prepare_conv(problem, weight, bias):
        asked.append(problem.means)
        return Bound()

    monkeypatch.setattr(reference, "prepare_conv", prepare_conv)
    packed, x = R.pack_conv(torch.randn(4, 4, 3, 3, device="meta"), padding=1), torch.randn(1, 4, 3, 3, device="meta")
    for means in (False, True, True, False):
        packed(x, means=means)
    assert asked == [False, True]
    assert packed.problem(x, None, None, True).means


def test_packed_weights_on_a_cpu_are_one_problem_with_means_or_without():
    packed, x = R.pack_conv(torch.randn(4, 4, 3, 3), padding=1), torch.randn(1, 4, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    y = packed(x)
    again, means = packed(x, means=True)
    assert isinstance(packed, PackedConv) and len(packed._runs) == 1 and torch.equal(y, again)
    torch.testing.assert_close(means, y.mean((2, 3)))
    assert packed.problem(x, None, None, True) == packed.problem(x)
