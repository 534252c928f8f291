"""Every backend on a real device: small models of every kind of block, judged by float64, with the backend forced.

REGNET_FAST_TEST_DEVICE names the device, by default the first GPU; `cpu` tries these tests where there is none.
"""

import os

import pytest
import torch

from regnet_fast import backends, explain
from regnet_fast.inspect import info
from regnet_fast.inspect.tune import Search
from regnet_fast.inspect.tuner import Subject, Tuner
from regnet_fast.inspect.verify import DTYPES, verify
from regnet_fast.kernels import tables
from regnet_fast.kernels.tables import HEURISTIC
from regnet_fast.store.environment import environment
from regnet_fast.store.verdicts import Verdicts

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
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.forget()
    block = Subject("regnety_002", 1, 64, torch.bfloat16, DEVICE).built()[0].s1.b1
    x = torch.randn(8, 32, 32, 32, device=DEVICE, dtype=torch.bfloat16)
    one, verdicts = Tuner(block, x), Verdicts(tables.here(x.device))
    try:
        for problem, (kernel, _) in one.shapes.items():
            with monkeypatch.context() as few:
                few.setattr(kernel, "CONFIGS", kernel.CONFIGS[::16])
                verdict = verdicts.keep(one.measure(problem))
            assert all(outcome.status != "wrong" for outcome in verdict.outcomes.values())
            assert verdict.outcomes[verdict.chosen].us <= verdict.outcomes[HEURISTIC].us
        tables.forget()
        with backends.backend("triton"):
            assert {row.label for row in explain(block, tuple(x.shape))} == {"Triton, tuned"}
    finally:
        tables.forget()


def test_a_search_in_a_process_of_its_own(tmp_path, monkeypatch):
    if not DEVICE.startswith("cuda"):
        pytest.skip("tuning takes a GPU")
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    with Search(Subject("regnetx_002", 1, 32, torch.float16, DEVICE), Verdicts(environment(DEVICE))) as search:
        left = len(search.left)
        verdict = next(search.found())
    assert tables.measured(verdict) and len(search.left) == left - 1
