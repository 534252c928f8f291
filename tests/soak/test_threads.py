"""Models called from many threads at once, under different backends, and in forked workers."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from amount import times
from helpers import pair, randomize_bn
from torch.nn import functional as F
from training_blocks import NETWORKS, network_pair, state_of

import regnet_fast
from regnet_fast.backends import backend

pytestmark = pytest.mark.usefixtures("one_thread", "no_silent_fallback", "impatient_threads")

THREADS = 6
FORCES = ("auto", "aten", "reference")


@pytest.fixture(scope="module")
def impatient_threads():
    """Threads that take turns as often as they can, so that a race shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(work):
    """`work(k)` for each of the threads, all started at once."""
    start = threading.Barrier(THREADS)

    def run(k):
        start.wait(60)
        return work(k)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def made(name):
    theirs = randomize_bn(NETWORKS[name](), 0, (4, 3, 32, 32)).eval()
    return regnet_fast.rebuild(theirs).model


@torch.no_grad()
def forced(model, x, force):
    with backend(force):
        return model(x)


def inputs():
    return [torch.randn(1 + i % 2, 3, 16 + 8 * (i % 3), 24 + i).to(dtype) for i in range(4) for dtype in DTYPES]


DTYPES = (torch.float32, torch.bfloat16)
UNSERVED = () if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.bfloat16,)
"""What oneDNN does not compute on this processor."""


@pytest.mark.parametrize("name", NETWORKS)
def test_one_model_under_different_backends(name, tally):
    """More plans at once than are kept, so that threads also pack and drop; the results are the serial ones."""
    model = made(name)
    models = {dtype: copy.deepcopy(model).to(dtype) for dtype in DTYPES}
    calls = [(x, force) for x in inputs() for force in FORCES if force != "aten" or x.dtype not in UNSERVED]
    expected = [forced(models[x.dtype], x, force) for x, force in calls]
    for _ in range(times(1)):
        for one in models.values():
            one.eval()  # nothing is packed when the threads start

        def work(k):
            order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(k)).tolist()
            return [(i, forced(models[calls[i][0].dtype], *calls[i])) for i in order]

        for i, y in [found for part in in_threads(work) for found in part]:
            x, force = calls[i]
            assert torch.equal(y, expected[i]), f"{tuple(x.shape)}, {x.dtype}, {force}"
            tally.count("calls")


def test_autocast_in_some_threads(tally):
    """Threads with and without autocast share the plans of a model."""
    model = made("regnet_y")
    x = torch.randn(2, 3, 32, 40)

    @torch.no_grad()
    def call(k):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(k % 2)):
            return model(x)

    expected = [call(k) for k in range(2)]
    for _ in range(times(3)):
        model.eval()
        for k, y in enumerate(in_threads(call)):
            assert y.dtype == expected[k % 2].dtype and torch.equal(y, expected[k % 2])
            tally.count("calls")


def test_many_models_train_in_many_threads(tally):
    """Every thread trains a model of its own; gradients and statistics are the serial ones."""

    def train(k):
        torch_generator = torch.Generator().manual_seed(k)
        model = copy.deepcopy(models[k])
        x = torch.randn(4, 3, 32, 32, generator=torch_generator)
        for _ in range(2):
            F.cross_entropy(model(x), torch.arange(4) % 5).backward()
        return state_of(model)

    models = [network_pair(list(NETWORKS)[k % len(NETWORKS)])[0] for k in range(THREADS)]
    expected = [train(k) for k in range(THREADS)]
    for _ in range(times(1)):
        for found, wanted in zip(in_threads(train), expected, strict=True):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert value is found[name] is None or torch.equal(found[name], value), name
            tally.count("steps", 2)


def test_weights_change_between_calls_of_threads(tally):
    """After an optimizer's step no thread computes with the old weights, which are a hundredth smaller.

    Weights that are other ones in every call are left to the host, whose sums are rounded otherwise.
    """
    model = made("resnet_v2")
    x = torch.randn(2, 3, 32, 32)
    for _ in range(times(3)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        expected = forced(copy.deepcopy(model), x, "auto")
        for y in in_threads(lambda k: forced(model, x, "auto")):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            tally.count("calls")


class Batches(torch.utils.data.Dataset):
    """What a model makes of images, computed in the worker that loads them."""

    def __init__(self, model, length):
        self.model, self.length = model, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32) * (index + 1)
        return forced(self.model, x, FORCES[index % len(FORCES)])[0]


@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_workers(tally):
    """Workers inherit weights that were packed in the parent, and pack others."""
    model, _ = pair("regnety_002", num_classes=5)
    dataset = Batches(model, times(6))
    expected = [dataset[i] for i in range(len(dataset))]
    loader = torch.utils.data.DataLoader(dataset, 1, num_workers=2, multiprocessing_context="fork", timeout=120)
    for y, wanted in zip(loader, expected, strict=True):
        assert torch.equal(y[0], wanted)
        tally.count("calls")
