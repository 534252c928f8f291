"""The micro-benchmarks as pytest-benchmark runs them: `pytest bench/`, with its options for saving and comparing.

    pytest bench/ -k grouped_conv --benchmark-group-by=param:case

Ours is checked before it is timed. REGNET_FAST_TEST_DEVICE names the device, by default the CPU.
"""

import os

import pytest
import torch

from bench import cases, measure, peers, subjects
from regnet_fast.inspect.timing import silent, synchronize

DEVICE = os.environ.get("REGNET_FAST_TEST_DEVICE", "cpu")
OPERATIONS = (
    "dense_conv/3x32-k3s2g1-112-relu",
    "pointwise_conv/48x120-k1s1g1-56-relu",
    "pointwise_conv/336x336-k1s1g1-14-relu",
    "grouped_conv/152x152-k3s1g19-14-relu",
    "grouped_conv/120x120-k3s1g5-28-relu",
    "grouped_conv/336x336-k3s1g14-14-relu",
    "squeeze_excite/120-30",
)
CASES = cases.select("ops", OPERATIONS, [1], ["float32", "bfloat16"])
PEERS = {peers.shown_name(peer, "ops"): peer for peer in peers.choose(["timm", "timm channels_last"], DEVICE, "ops")}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operation(benchmark, case, peer):
    subject = subjects.build(case, DEVICE, silent)
    with torch.no_grad():
        one, module = peers.make(PEERS[peer], subject, peer)
        result = one.call()
        if peer == peers.OURS:
            measure.check(one, module, subject, result, measure.eager_results(subject))

        def call():
            one.call()
            synchronize(DEVICE)

        benchmark.group = case.id
        benchmark(call)
