"""Every backend on a real device: small models of every kind of block, judged by float64, with the backend forced.

REGNET_FAST_TEST_DEVICE names the device, by default the first GPU; `cpu` tries these tests where there is none.
"""

import os

import pytest
import torch

from regnet_fast import backends, explain
from regnet_fast.inspect import info, tune
from regnet_fast.inspect.verify import DTYPES, verify

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("REGNET_FAST_TEST_DEVICE", "cuda")
MODELS = ("regnetx_002", "regnety_002", "regnetz_005", "regnetv_040", "repvgg_a0", "resnetv2_18")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cuda,aten" if name == "cuda" else name for name in backends.BACKENDS])
@pytest.mark.parametrize("model", MODELS)
def test_model(model, backend, dtype):
    """`cuda` has grouped convolutions alone; the other layers are cuDNN's."""
    reason = backends.refuse(backend.partition(",")[0], info.probe(DEVICE, dtype))
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


def test_tuning(tmp_path, monkeypatch):
    if not DEVICE.startswith("cuda"):
        pytest.skip("tuning takes a GPU")
    monkeypatch.setattr(tune.tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune.tables.forget()
    folder = tune.tables.user_folder()
    block = tune.subject("regnety_002", 1, 64, torch.bfloat16, DEVICE)[0].s1.b1
    x = torch.randn(8, 32, 32, 32, device=DEVICE, dtype=torch.bfloat16)
    for kernel in {kernel for kernel, _ in tune.missing(block, x, folder)}:
        monkeypatch.setattr(kernel, "CONFIGS", kernel.CONFIGS[::16])
    try:
        results = list(tune.tune(block, x, tune.missing(block, x, folder), folder))
        assert results and all(tune.WRONG not in result.skipped for result in results)
        assert all(result.entry.microseconds <= result.entry.heuristic_microseconds for result in results)
        with backends.backend("triton"):
            assert {row.label for row in explain(block, tuple(x.shape))} == {"Triton, tuned"}
    finally:
        tune.tables.forget()
