"""Training in two processes is training in one: data parallel, synchronised norms, sharded parameters."""

import time

import pytest
import torch
import torch.multiprocessing as mp
import training_processes as processes
from torch import nn
from torch.nn import functional as F
from training_blocks import assert_equal_states, state_of

from regnet_fast.blocks import fused

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_float64"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(fused, "_DTYPES", (*fused._DTYPES, torch.float64))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of every scenario by name, one of each process. The processes start once and end after a while."""
    folder = tmp_path_factory.mktemp("processes")
    context = mp.spawn(processes.main, (str(folder),), processes.WORLD, join=False)
    deadline = time.monotonic() + 240
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the processes do not end"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return {
        name: [torch.load(folder / f"{i}-{rank}.pt") for rank in range(processes.WORLD)]
        for i, name in enumerate(processes.SCENARIOS)
    }


def results(found, name):
    for result in found[name]:
        assert isinstance(result, dict), result
    return found[name]


def of_one_process(model, x, target, times=1):
    for _ in range(times):
        loss = F.cross_entropy(model(x), target)
        loss.backward()
    return {"loss": loss.detach()} | state_of(model)


def gradients(state):
    return {k: v for k, v in state.items() if k.startswith("gradient")}


def mean(states):
    return {k: sum(state[k] for state in states) / len(states) for k in states[0]}


@pytest.mark.long
def test_data_parallel_with_fixed_norms(found):
    _, theirs = processes.networks("regnet_y")
    expected = of_one_process(processes.freeze_norms(theirs), *processes.images(), times=2)
    del expected["loss"]
    for state in results(found, "ddp"):
        assert_equal_states(state, expected)


@pytest.mark.long
def test_data_parallel_with_norms_of_each_batch(found):
    halves = []
    for rank in range(processes.WORLD):
        part = processes.share(processes.EVEN, rank)
        halves.append(of_one_process(processes.networks("repvgg")[1], *(t[part] for t in processes.images())))
    states = results(found, "ddp_statistics")
    for state, half in zip(states, halves, strict=True):
        assert_equal_states(gradients(state), mean(list(map(gradients, halves))))
        buffers = {k: v for k, v in state.items() if not k.startswith("gradient")}
        assert_equal_states(buffers, {k: half[k] for k in buffers})


@pytest.mark.parametrize("case", processes.SYNCHRONISED, ids=lambda case: "-".join(map(str, case)))
def test_synchronised_norms(found, case):
    """As one process that has all images, however they are shared out; torch's own norms refuse a CPU."""
    network, conversion, _ = case
    _, theirs = processes.networks(network)
    if conversion == "torch":
        processes.without_activations(theirs)
    expected = of_one_process(theirs, *processes.images(), times=2)
    for state in results(found, f"sync {case}"):
        assert state.pop("reasons") == {None}
        assert_equal_states(state, expected)


@pytest.mark.parametrize("scenario", ["fsdp", "fsdp with the stem"])
def test_sharded_parameters(found, scenario):
    """With the stem apart as well: its parameters are freed before the next block makes the stem's map again."""
    x, target = processes.images()
    _, model = processes.networks("regnet_y")
    copies = [{name: b.clone() for name, b in model.named_buffers()} for _ in range(processes.WORLD)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = [[], []]
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(processes.WORLD):  # one after another, each with its own statistics
            for name, buffer in model.named_buffers():
                buffer.data.copy_(copies[rank][name])
            part = processes.share(processes.EVEN, rank)
            loss = F.cross_entropy(model(x[part]), target[part])
            (loss / processes.WORLD).backward()
            losses[rank].append(loss.detach())
            copies[rank] = {name: b.clone() for name, b in model.named_buffers()}
        last = gradients(state_of(model))
        optimizer.step()
    for rank, state in enumerate(results(found, scenario)):
        assert_equal_states(state, {"losses": torch.stack(losses[rank])} | last | copies[rank])


def test_synchronised_norms_of_one_process():
    """Outside a process group they are norms of the batch."""
    ours, theirs = processes.networks("repvgg")
    converted = processes.timms_conversion(ours)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert_equal_states(of_one_process(converted, *processes.images()), of_one_process(theirs, *processes.images()))
