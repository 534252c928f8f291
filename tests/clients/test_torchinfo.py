"""torchinfo: every row of its table."""

import pytest
from beside import NAMES, same, twins

torchinfo = pytest.importorskip("torchinfo")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NAMES)
def test_summary(name):
    found = []
    for model in twins(name):
        summary = torchinfo.summary(model, (2, 3, 64, 64), verbose=0)
        rows = [
            (r.class_name.replace("Stem", "Sequential"), r.var_name, r.depth, r.output_size, r.num_params, r.macs)
            for r in summary.summary_list
        ]  # the container of a ResNetV2's stem has a name of its own, its layers have torch's
        found.append((rows, summary.total_mult_adds, summary.total_params, summary.total_output_bytes))
    same(*found)
