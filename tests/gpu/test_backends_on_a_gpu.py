"""Every backend on a real device: small models of every kind of block, judged by float64, with the backend forced.

REGNET_FAST_TEST_DEVICE names the device, by default the first GPU; `cpu` tries these tests where there is none.
"""

import os

import pytest
import torch

from regnet_fast import backends, info
from regnet_fast.verify import DTYPES, verify

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("REGNET_FAST_TEST_DEVICE", "cuda")
MODELS = ("regnetx_002", "regnety_002", "regnetz_005", "regnetv_040", "repvgg_a0", "resnetv2_18")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_model(model, backend, dtype):
    reason = backends.BACKENDS[backend].refuse(info.probe(DEVICE, dtype))
    if reason:
        pytest.skip(reason)
    with backends.backend(backend):
        found = verify(model, batch=3, size=96, dtype=DTYPES[dtype], device=DEVICE)
    assert found.rebuilt and not found.kept
    assert found.ok, "\n".join(f"{check.stage}: {check.failure}" for check in found.checks if not check.ok)


@pytest.mark.parametrize("model", MODELS)
def test_automatic_choice(model):
    found = verify(model, batch=1, size=224, dtype=torch.float32, device=DEVICE)
    assert found.ok, "\n".join(f"{check.stage}: {check.failure}" for check in found.checks if not check.ok)
