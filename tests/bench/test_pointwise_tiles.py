"""How long 1x1 convolutions wait for the last cache, by the heuristic's own tiles."""

import pytest

pytest.importorskip("triton")

from bench import cases
from regnet_fast.backends.cuda.plans import PROCESSORS
from regnet_fast.kernels import pointwise_pair
from regnet_fast.kernels.pointwise_tiles import (
    CACHE_SPEED,
    CONFIGS,
    Shape,
    cached_bytes,
    config_supports,
    heuristic,
    memory_bytes,
)

MODELS = ("regnety_032", "regnety_080", "regnety_160", "regnetz_d8")
BATCH, BOUND = 256, 0.6

WIDE = {
    "448->896, stride 2", "448->1232", "448->1232, stride 2", "576->576", "576->1512", "576->1512, stride 2",
    "896->896", "896->896, gate", "896->2016", "896->2016, stride 2", "1232->1232", "1232->1232, gate",
    "1232->3024", "1232->3024, stride 2", "1512->1512", "1512->1512, gate", "2016->2016", "2016->2016, gate",
    "3024->3024", "3024->3024, gate", "384->1536", "384->1792", "1024->384", "1536->384", "1536->384, gate",
}  # fmt: skip
"""Layers that stay below the bound whatever the tile: x is read again for every tile of output channels and the weights
for every tile of pixels, and the sums of 128 x 256 results fill the registers, resident weights the shared memory.
"""


def layers() -> dict[str, Shape]:
    """Every 1x1 convolution of the models on an H100, as it is, and with a gate and a residual where it has them."""
    found = {}
    for one in cases.operations().values():
        if one["op"] == "pointwise_conv" and set(MODELS) & one["models"].keys():
            area, stride = one["hw"] ** 2, one["stride"]
            for gate in (False, True)[: 1 + (stride == 1 and one["in"] >= one["out"])]:
                name = f"{one['in']}->{one['out']}{', gate' if gate else ''}{', stride 2' if stride > 1 else ''}"
                operands = (2, area if gate else 0, gate, stride, False, 90, PROCESSORS[90])
                found[name] = Shape(BATCH * area, one["in"], one["out"], *operands)
    return found


def share(config, shape) -> float:
    """The speed of a copy that waiting for the cache leaves."""
    return CACHE_SPEED * memory_bytes(shape) / cached_bytes(config, shape)


@pytest.mark.parametrize("name", layers())
def test_the_last_cache_does_not_hold_up_what_it_need_not(name):
    shape = layers()[name]
    found = share(heuristic(shape), shape)
    assert config_supports(heuristic(shape), shape) is None
    if name in WIDE:
        best = max(share(config, shape) for config in CONFIGS if config_supports(config, shape) is None)
        assert found < BOUND and best < BOUND and found > 0.95 * best
    else:
        assert found >= BOUND


def test_the_gated_layers_that_dominate_are_not_held_up():
    assert {"72->72, gate", "216->216, gate", "576->576, gate"} <= set(layers()) - WIDE


def test_the_bytes_are_those_of_the_tiles():
    """Counted by hand: 3 x 2 tiles of 5 pixels' channels and 300 weights' rows."""
    shape = Shape(300, 64, 200, 2, 0, False, 1, False, 90, 132)
    config = next(c for c in CONFIGS if (c.block_m, c.block_n, c.block_k) == (128, 128, 64) and not c.resident)
    assert cached_bytes(config, shape) == 2 * (2 * 300 * 64 + 3 * 200 * 64 + 300 * 200)
    assert memory_bytes(shape) == 2 * (300 * 64 + 200 * 64 + 300 * 200)
    gated = Shape(392, 64, 200, 2, 49, True, 1, False, 90, 132)
    assert cached_bytes(config, gated) == 2 * (2 * 392 * 64 + 4 * 200 * 64 + 8 * 4 * 64 + 2 * 392 * 200)
    assert memory_bytes(gated) == 2 * (392 * 64 + 200 * 64 + 8 * 64 + 2 * 392 * 200)


@pytest.mark.parametrize(
    ("channels", "width", "hw", "arch", "resident"),
    [
        *((32, 72, 112, 90, True), (72, 216, 56, 90, True), (216, 576, 28, 90, True), (576, 1512, 14, 90, True)),
        *((1232, 3024, 14, 90, False), (72, 216, 56, 89, True), (216, 576, 28, 89, False)),
    ],
)
def test_the_form_of_a_pair(channels, width, hw, arch, resident):
    """Resident where the weights fit, which reads the least from the cache; else in tiles of 64 pixels and more."""
    pair = pointwise_pair.Shape(BATCH * hw**2, channels, width, width, 2, 2, False, False, arch, PROCESSORS[arch])
    config = pointwise_pair.heuristic(pair)
    assert config.resident == resident and pointwise_pair.config_supports(config, pair) is None
    assert resident or min(config.block_m, config.block_n) >= 64
    others = [c for c in CONFIGS if not c.resident and pointwise_pair.config_supports(c, pair) is None]
    if resident:
        assert cached_bytes(config, *pair.both) < 1.1 * min(cached_bytes(other, *pair.both) for other in others)


def test_a_pairs_map_comes_from_memory_once():
    """Counted by hand: both read it from the cache, 2 and 3 times, the second a quarter of it."""
    pair = pointwise_pair.Shape(512, 64, 200, 300, 2, 2, False, False, 90, 132)
    config = next(c for c in CONFIGS if (c.block_m, c.block_n, c.block_k) == (128, 128, 64) and not c.resident)
    results = 512 * 200 + 128 * 300
    assert memory_bytes(*pair.both) == 2 * (512 * 64 + 500 * 64 + results)
    assert cached_bytes(config, *pair.both) == 2 * (2 * 512 * 64 + 3 * 128 * 64 + 4 * 200 * 64 + 300 * 64 + results)
