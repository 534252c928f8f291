"""The tally of each test, written where more than the short form runs."""

import pytest

pytest.importorskip("hypothesis")

from amount import FACTOR, RESULTS, Tally

_FAILED = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[_FAILED] = str(call.excinfo.value)
    return report


@pytest.fixture
def tally(request):
    tally = Tally(request.node.name)
    yield tally
    if FACTOR != 1:
        tally.write(RESULTS, request.node.stash.get(_FAILED, None))
