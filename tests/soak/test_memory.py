"""Memory stays as it is over many calls of changing sizes, dtypes and backends, and every cache has a bound."""

import copy
import functools
import gc
import importlib
import itertools
import pkgutil
import random
from pathlib import Path

import pytest
import torch
from amount import FACTOR, times
from helpers import randomize_bn
from torch.nn import functional as F
from training_blocks import NETWORKS

import regnet_fast
from regnet_fast.backends import backend
from regnet_fast.backends.onednn import Convolution
from regnet_fast.blocks.fused import STATE, Fused
from regnet_fast.ops.convolution import PackedConv

pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_silent_fallback"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc"),
]

DTYPES = (torch.float32, torch.bfloat16)
MB = 2**20
PAGE = 4096
GROWTH = 8 * MB
"""What the allocator's and the libraries' own pools may still take after the first half of the calls."""

SIZES = [(2, 16, 16 + 4 * i) for i in range(9)]
"""More shapes than a convolution packs weights for."""


def resident() -> int:
    """Bytes of memory of this process, without what only waits for the garbage collector."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def assert_level(call, kinds: list, calls: int, tally, name: str) -> None:
    """Assert that memory after `calls` random ones of these kinds of call is what it was after half of them.

    Each kind is called once before, since oneDNN keeps what it made for the last 1024 problems.
    """
    for kind in kinds:
        call(kind)
    order, points, every = random.Random(0), [(0, resident())], max(1, calls // 50)
    for i in range(1, calls + 1):
        call(order.choice(kinds))
        tally.count("calls")
        if i % every == 0:
            points.append((i, resident()))
    tally.series[name] = [(i, size / MB) for i, size in points]
    half = [size for i, size in points if i >= calls // 2]
    growth = half[-1] - half[0]
    assert growth <= GROWTH, f"{name}: {growth / MB:.1f} MB more in the last half: {tally.series[name]}"


def packed_convolutions(model):
    for module in model.modules():
        for plan in module.__dict__.get(STATE, {}).values():
            for unit in vars(plan.form).values():
                packed = getattr(unit, "conv", unit)
                if isinstance(packed, PackedConv):
                    yield packed


def assert_bounded(model) -> None:
    blocks = [module for module in model.modules() if isinstance(module, Fused)]
    assert all(len(block.__dict__.get(STATE, {})) <= 4 for block in blocks)
    packed = list(packed_convolutions(model))
    assert packed
    for one in packed:
        for use in {(type(run), *key[1:]) for key, run in one._runs.items() if isinstance(run, Convolution)}:
            packed = {id(run.weight) for key, run in one._runs.items() if (type(run), *key[1:]) == use and run.shape}
            assert len(packed) <= 2 and not (packed and use in one._unpacked)


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS if FACTOR > 1 else ["repvgg"])
def test_inference(name, tally):
    theirs = randomize_bn(NETWORKS[name](), 0, (4, 3, 32, 32)).eval()
    models = {dtype: regnet_fast.rebuild(copy.deepcopy(theirs).to(dtype)).model for dtype in DTYPES}
    ways = [(torch.float32, False, "auto"), (torch.float32, True, "auto"), (torch.float32, False, "reference")]
    ways.append((torch.bfloat16, False, "aten" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "auto"))

    def call(kind):
        (dtype, autocast, force), size = kind
        x = torch.randn(size[0], 3, *size[1:], dtype=dtype)
        with torch.no_grad(), backend(force), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            models[dtype](x)

    kinds = [(way, size) for way in (ways if FACTOR > 1 else ways[::3]) for size in SIZES]
    assert_level(call, kinds, times(50), tally, f"{name}, inference")
    for kind in kinds:
        call(kind)
    for model in models.values():
        assert_bounded(model)


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS if FACTOR > 1 else ["resnet_v2"])
def test_training(name, tally):
    """Half of the steps under autocast, and between them evaluations whose packed weights the next step outdates."""
    model = regnet_fast.rebuild(randomize_bn(NETWORKS[name](), 0, (4, 3, 32, 32))).model
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def call(kind):
        size, autocast, evaluates = kind
        x = torch.randn(size[0], 3, *size[1:])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model.train()(x), torch.arange(len(x)) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if evaluates:
            with torch.no_grad():
                model.eval()(x)

    kinds = list(itertools.product(SIZES[-2:], (False, True), (False, True)))
    assert_level(call, kinds, times(15), tally, f"{name}, training")


@pytest.mark.long
def test_models_come_and_go(tally):
    """A model that nobody holds any more leaves nothing behind."""
    x = torch.randn(2, 3, 32, 32)

    def call(name):
        model = regnet_fast.rebuild(NETWORKS[name]()).model
        model.train()(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)

    assert_level(call, list(NETWORKS), times(8), tally, "models come and go")


def test_every_cache_has_a_bound():
    modules = [regnet_fast]
    for found in pkgutil.walk_packages(regnet_fast.__path__, "regnet_fast."):
        if not found.name.startswith(("regnet_fast.kernels.", "regnet_fast.__main__")):
            modules.append(importlib.import_module(found.name))
    kind = type(functools.lru_cache(lambda: None))
    caches = {
        f"{module.__name__}.{name}": value.cache_parameters()["maxsize"]
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, kind)
    }
    assert caches and not [name for name, size in caches.items() if size is None]
