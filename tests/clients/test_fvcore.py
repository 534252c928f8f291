"""fvcore counts in a trace."""

import pytest
from beside import NAMES, images, quiet, same, twins

fvcore = pytest.importorskip("fvcore.nn")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", NAMES)
def test_operations_of_every_module(name):
    found = []
    for model in twins(name):
        counted = fvcore.FlopCountAnalysis(model, images(1)).unsupported_ops_warnings(False)
        counted.uncalled_modules_warnings(False)
        found.append((quiet(counted.total), dict(counted.by_module()), dict(fvcore.parameter_count(model))))
    same(*found)
