"""Two GPUs in one process: each model runs on its own, whichever device is the current one."""

import copy

import pytest
import torch
from helpers import assert_close_to_reference, pair, reasons

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
    pytest.mark.usefixtures("no_silent_fallback"),
]

LAST = torch.channels_last


@torch.no_grad()
@pytest.mark.parametrize("name", ["regnety_002", "repvgg_a0", "resnetv2_18"])
def test_the_device_of_a_model_decides(name):
    """The current device is the other one; a model that moves runs where it is."""
    ours, theirs = pair(name)
    x = torch.randn(4, 3, 64, 64)
    exact = copy.deepcopy(theirs).double()(x.double())
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        ours.to(device)
        eager = copy.deepcopy(theirs).to(device, memory_format=LAST)(x.to(device, memory_format=LAST))
        for current in range(2):
            with torch.cuda.device(current):
                assert reasons(ours, x.to(device)) == {None}
                y = ours(x.to(device))
                assert y.device == torch.device(device) and torch.cuda.current_device() == current
            assert_close_to_reference(y, eager, exact, f"{name} on {device} while cuda:{current} is current")


@torch.no_grad()
def test_two_models_on_two_devices():
    """Copies of one model, called in turn, keep their packed weights apart."""
    first, _ = pair("regnety_002")
    second = copy.deepcopy(first).to("cuda:1")
    first.to("cuda:0")
    x = torch.randn(2, 3, 64, 64)
    found = [(first(x.to("cuda:0")).cpu(), second(x.to("cuda:1")).cpu()) for _ in range(3)]
    for a, b in found:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert torch.equal(a, found[0][0]) and torch.equal(b, found[0][1])


def test_an_input_on_another_device_is_refused():
    """As timm's model does; nothing is copied between devices unasked."""
    ours, theirs = (model.to("cuda:0") for model in pair("regnety_002"))
    x = torch.randn(2, 3, 64, 64, device="cuda:1")
    for model in (theirs, ours):
        with pytest.raises(RuntimeError, match="device"):
            model(x)
