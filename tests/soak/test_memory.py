"""Memory stays as it is over many calls of changing sizes, dtypes and backends, and every cache has a bound."""

import functools
import gc
import importlib
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
from regnet_fast.blocks.fused import _STATE, Fused
from regnet_fast.ops.convolution import _SHAPES_KEPT, PackedConv

pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_silent_fallback"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc"),
]

MB = 2**20
PAGE = 4096
GROWTH = 8 * MB
"""What the allocator's and the libraries' own pools may still take after the first half of the calls."""

SIZES = [(batch, 16 + 8 * i, 16 + 8 * j) for batch in (1, 3) for i in range(3) for j in range(3)]
"""Twice the shapes that a convolution keeps, so that packed weights are dropped and made again."""


def resident() -> int:
    """Bytes of memory of this process, without what only waits for the garbage collector."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def assert_level(call, calls: int, tally, name: str) -> None:
    """Assert that memory after `calls` calls is what it was after half of them."""
    points, every = [], max(1, calls // 50)
    for i in range(calls):
        call(i)
        tally.count("calls")
        if i % every == every - 1:
            points.append((i + 1, resident()))
    tally.series[name] = [(i, size / MB) for i, size in points]
    half = [size for i, size in points if i >= calls // 2]
    assert half[-1] - half[0] <= GROWTH, f"{name}: {(half[-1] - half[0]) / MB:.1f} MB more in the last half"


def packed_convolutions(model):
    for module in model.modules():
        for plan in module.__dict__.get(_STATE, {}).values():
            for unit in vars(plan.form).values():
                packed = getattr(unit, "conv", unit)
                if isinstance(packed, PackedConv):
                    yield packed


def assert_bounded(model) -> None:
    blocks = [module for module in model.modules() if isinstance(module, Fused)]
    assert all(len(block.__dict__.get(_STATE, {})) <= 4 for block in blocks)
    packed = list(packed_convolutions(model))
    assert packed and all(len(one._runs) <= _SHAPES_KEPT for one in packed)
    assert max(len(one._runs) for one in packed) == _SHAPES_KEPT


@pytest.mark.parametrize("name", NETWORKS)
def test_inference(name, tally):
    model = regnet_fast.rebuild(randomize_bn(NETWORKS[name](), 0, (4, 3, 32, 32)).eval()).model
    models = [model, regnet_fast.rebuild(model, inplace=False).model.bfloat16()]
    order = random.Random(0)

    def call(i):
        chosen = order.choice(models)
        x = torch.randn(order.choice(SIZES)[0], 3, *order.choice(SIZES)[1:]).to(next(chosen.parameters()).dtype)
        autocast = order.random() < 0.25
        with (
            torch.no_grad(),
            backend(order.choice(("auto", "auto", "aten", "reference"))),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast and x.dtype == torch.float32),
        ):
            chosen(x)
        if order.random() < 0.05:
            chosen.eval()

    assert_level(call, times(150), tally, f"{name}, inference")
    for x in [torch.randn(*size[:1], 3, *size[1:]) for size in SIZES]:
        with torch.no_grad():
            model(x)
    assert_bounded(model)


@pytest.mark.parametrize("name", NETWORKS if FACTOR > 1 else ["regnet_y"])
def test_training(name, tally):
    model = regnet_fast.rebuild(randomize_bn(NETWORKS[name](), 0, (4, 3, 32, 32))).model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    order = random.Random(0)

    def call(i):
        _, height, width = order.choice(SIZES)
        batch = order.choice((2, 4))
        with torch.autocast("cpu", torch.bfloat16, enabled=order.random() < 0.5):
            loss = F.cross_entropy(model(torch.randn(batch, 3, height, width)), torch.arange(batch) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if order.random() < 0.2:  # and an evaluation between steps, with packed weights that the next step outdates
            with torch.no_grad():
                model.eval()(torch.randn(batch, 3, height, width))
            model.train()

    assert_level(call, times(60), tally, f"{name}, training")


def test_models_come_and_go(tally):
    """A model that nobody holds any more leaves nothing behind."""
    x = torch.randn(2, 3, 32, 32)

    def call(i):
        name = list(NETWORKS)[i % len(NETWORKS)]
        model = regnet_fast.rebuild(NETWORKS[name]()).model
        model.train()(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)

    assert_level(call, times(24), tally, "models come and go")


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
