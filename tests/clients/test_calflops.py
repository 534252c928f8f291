"""calflops counts by class and by patched functions."""

import pytest
from beside import NAMES, quiet, same, twins

calflops = pytest.importorskip("calflops")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", NAMES)
def test_operations_and_parameters(name):
    options = dict(input_shape=(1, 3, 64, 64), print_results=False, output_as_string=False)
    same(*(quiet(calflops.calculate_flops, model, **options) for model in twins(name)))
