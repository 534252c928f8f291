"""Squeeze-excite and norm_act in the interpreter against float64, every configuration."""

from dataclasses import replace

import pytest
import torch
from configurations import interpreted
from helpers import assert_close_to_reference

from regnet_fast.backends import ACTIVATIONS, reference
from regnet_fast.kernels import common, norm_act, pointwise_conv, squeeze_excite
from regnet_fast.kernels.squeeze_excite import Config, Shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gate(guarded, n, tiles, c, r, dtype, activation="relu", config=None, gate_activation="sigmoid"):
    parts = torch.randn(n, tiles, c) / tiles
    weights = torch.randn(r, c) / c**0.5, torch.randn(r), torch.randn(c, r) / r**0.5, torch.randn(c)
    found = squeeze_excite.squeeze_excite(
        *map(guarded, (parts, *weights)),
        activation=activation, gate_activation=gate_activation, dtype=dtype, config=config,
    )  # fmt: skip
    acts = activation, gate_activation
    eager = reference.squeeze_excite(parts.sum(1), *weights, *acts)
    exact = reference.squeeze_excite(parts.double().sum(1), *(t.double() for t in weights), *acts)
    assert_close_to_reference(found, eager.to(dtype), exact, "gate")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    ("n", "tiles", "c", "r", "config"),
    [
        (1, 1, 24, 8, None),
        (19, 3, 152, 38, None),
        (2, 2, 104, 26, None),
        (3, 1, 520, 140, None),
        (5, 4, 72, 21, Config(16, 64, 32, 4, False)),
        (17, 1, 40, 10, Config(16, 32, 16, 4, True)),
    ],
)
def test_squeeze_excite(guarded, n, tiles, c, r, config, activation, dtype):
    gate(guarded, n, tiles, c, r, dtype, activation, config)


@pytest.mark.parametrize("config", [None, Config(16, 64, 32, 4, False)])
def test_a_hard_gate(guarded, config):
    gate(guarded, 5, 2, 72, 21, torch.bfloat16, config=config, gate_activation="hardsigmoid")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("config", interpreted(squeeze_excite.CONFIGS), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_squeeze_excite(guarded, config, dtype):
    gate(guarded, 17, 2, 72, config.block_r - 5 if config.whole else 75, dtype, config=config)


def test_squeeze_excite_fits_in_shared_memory():
    wide = Shape(1, 1, 256, 256, 90)
    assert squeeze_excite.heuristic(replace(wide, hidden=128)) == Config(16, 64, 128, 8, True)
    assert squeeze_excite.heuristic(replace(wide, hidden=128, arch=86)) == Config(16, 32, 128, 8, True)
    assert squeeze_excite.heuristic(wide) == Config(16, 32, 256, 8, True)
    assert squeeze_excite.heuristic(replace(wide, arch=86)) == Config(16, 64, 32, 4, False)
    assert "sm_86 has" in squeeze_excite.config_supports(squeeze_excite.heuristic(wide), replace(wide, arch=86))
    for arch in common.ARCHITECTURES:
        for hidden in (1, 8, 16, 40, 100, 200, 256, 1000):
            for channels in (8, 256, 1000, 8000):
                shape = Shape(2, 1, channels, hidden, arch)
                assert squeeze_excite.config_supports(squeeze_excite.heuristic(shape), shape) is None


def test_a_configuration_that_cannot_serve_raises():
    weights = torch.randn(40, 72), torch.randn(40), torch.randn(72, 40), torch.randn(72)
    with pytest.raises(ValueError, match="32 hidden channels are computed at once, there are 40"):
        squeeze_excite.squeeze_excite(torch.randn(1, 1, 72), *weights, config=Config(16, 64, 32, 4, True))
    x = torch.randn(1, 72, 2, 2).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="64 channels of weights stay, the layer has 72"):
        pointwise_conv.pointwise_conv(x, weights[0], config=pointwise_conv.Config(64, 32, 64, 4, 2, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [name for name, one in ACTIVATIONS.items() if one.code is not None])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_act(guarded, gated, activation, dtype):
    normalise(guarded, gated, activation, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("config", interpreted(norm_act.CONFIGS), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_norm_act(guarded, config, dtype):
    normalise(guarded, True, "silu", dtype, config)


def normalise(guarded, gated, activation, dtype, config=None):
    n, c, h, w = 3, 52, 5, 7
    x = (3 * torch.randn(n, c, h, w)).to(dtype).contiguous(memory_format=torch.channels_last)
    scale, shift, gate = torch.rand(c) + 0.5, torch.randn(c), torch.rand(n, c).to(dtype) if gated else None
    y = norm_act.norm_act(*map(guarded, (x, scale, shift, gate)), activation=activation, config=config)

    def compute(dtype):
        column = scale.to(dtype) if gate is None else scale.to(dtype) * gate.to(dtype)
        column = column[None] if column.dim() == 1 else column
        return reference.activate(x.to(dtype) * column[:, :, None, None] + shift.to(dtype)[:, None, None], activation)

    assert_close_to_reference(y, compute(torch.float32).to(dtype), compute(torch.float64), "norm_act")
