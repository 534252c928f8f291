"""ptflops counts by class and in its own dispatch mode."""

import pytest
from beside import NAMES, quiet, same, twins

ptflops = pytest.importorskip("ptflops")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
@pytest.mark.parametrize("name", NAMES)
def test_operations_and_parameters(name, backend):
    options = dict(as_strings=False, print_per_layer_stat=False, verbose=False, backend=backend)
    same(*(quiet(ptflops.get_model_complexity_info, model, (3, 64, 64), **options) for model in twins(name)))
