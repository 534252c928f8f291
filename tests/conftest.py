"""Every test is seeded from its own name, the seed is shown when it fails, and workers share the cores."""

import os
import random
import re
import warnings
import zlib

import numpy
import pytest
import torch

from regnet_fast.backends import cpu_library
from regnet_fast.blocks import fused
from regnet_fast.blocks.fused import FallbackWarning

try:
    import hypothesis
except ImportError:
    hypothesis = None

pytest.register_assert_rewrite("checkpoint_files", "helpers", "problems", "regnets")

if hypothesis is not None:
    # The same examples every time, and no deadline: the first call of an operation may compile.
    hypothesis.settings.register_profile("regnet_fast", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("regnet_fast")


# What is the fastest here and now decides no test's bits; tests of trials switch them on.
os.environ["REGNET_FAST_TRIALS"] = "off"

MIRRORS = re.compile(r"^tests/(backends|bench|blocks|cli|docs|hosts|inspect|ops|training|weights)/")
"""Folders of the package's names: a test that moves with what it tests keeps its seed."""

SHORT = 3
"""Sets of parameters of a test in the short part."""


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of every test (default: made from the test's name)")
    parser.addoption(
        "--part",
        choices=("short", "rest"),
        help=f"short: no long test, and {SHORT} sets of parameters of each other one; rest: what that leaves out",
    )


def pytest_configure(config):
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))
    cpu_library.refuse("program")  # compiled before there are several processes, of which one would go without


def pytest_collection_modifyitems(config, items):
    part = config.getoption("--part")
    if part:
        short = set(_short(items))
        config.hook.pytest_deselected(items=[item for item in items if (item in short) != (part == "short")])
        items[:] = [item for item in items if (item in short) == (part == "short")]
    if not torch.cuda.is_available() and "REGNET_FAST_TEST_DEVICE" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _short(items):
    """The short part: of each function the first set of parameters and others evenly spread behind it."""
    functions = {}
    for item in items:
        if not item.get_closest_marker("long") and not item.get_closest_marker("slow"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in functions.values():
        yield from {same[i * len(same) // SHORT] for i in range(SHORT)}


def _seed_of(item) -> int:
    given = item.config.getoption("--seed")
    name = MIRRORS.sub("tests/", item.nodeid)
    return zlib.crc32(name.encode()) if given is None else given


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seed = _seed_of(item)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("seed", f"reproduce with --seed {_seed_of(item)}"))
    return report


@pytest.fixture
def seed(request) -> int:
    """The seed of this test, for a generator of its own."""
    return _seed_of(request.node)


@pytest.fixture(scope="module")
def one_thread():
    """Shapes this small only wait for a second thread, for seconds where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads():
    """For large models: with one thread torch leaves oneDNN for a matrix product that is more exact than ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_silent_fallback():
    """A block that leaves the fused path unasked fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


@pytest.fixture
def in_float64(monkeypatch):
    """Blocks take float64 as well, in which nothing but a mistake differs."""
    monkeypatch.setattr(fused, "_DTYPES", (*fused._DTYPES, torch.float64))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
