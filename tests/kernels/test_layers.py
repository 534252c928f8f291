"""What is heard of a forward pass for the model of a GPU: all operations, with their tiles, at the batch asked for."""

import pytest
import torch

from bench.roofline import layers
from bench.roofline.model import work
from regnet_fast.inspect.verify import host_model

H100 = layers.GPUS["H100"]


@pytest.mark.parametrize("name", ["regnety_002", "repvgg_a0"])
def test_all_operations_are_heard(name):
    """As many as the host has, but for those of squeeze-excite, whose launches are of vectors, and a little more where
    a tile's halo is made by both neighbours.
    """
    found = layers.heard(name, 2, H100)
    model = host_model(name).to(torch.bfloat16)
    expected = work(model, (2, 3, 224, 224), torch.bfloat16)["flops"]
    gates = sum(2 * 4 * m.fc1.weight.numel() for m in model.modules() if hasattr(m, "fc1"))
    pairs = {one.label for one in found if one.job is not None}
    assert 0.99 < sum(one.flops for one in found) / (expected - gates) < (1.01 if name == "repvgg_a0" else 1.05)
    assert all(one.bytes > 0 and one.cached >= 0.99 * one.bytes for one in found if one.blocks) and len(pairs) > 5


def test_a_larger_batch_is_heard_in_one_part_with_larger_tiles():
    few, many = (layers.heard("regnetx_002", batch, H100) for batch in (1, 64))
    flops = [sum(one.flops for one in some) for some in (few, many)]
    assert flops[1] == pytest.approx(64 * flops[0], rel=0.05)
    assert sum(one.bytes for one in many) > 40 * sum(one.bytes for one in few) / 2
    assert len({one.job for one in many} - {one.job for one in few}) > 0


def test_the_machine_is_as_it_was():
    from regnet_fast.kernels import common

    before = common.INTERPRETED
    layers.heard("regnetx_002", 1, layers.GPUS["A100"])
    assert before == common.INTERPRETED


def test_an_unknown_model_is_refused(capsys):
    assert layers.main(["--model", "regnetx_02"]) == 2
    assert "regnetx_02" in capsys.readouterr().err
