"""Squeeze-excite from the parts of channel means to the gate:

    gate[n, c] = gate_activation(sum_r fc2[c, r] * h[n, r] + bias2[c])
    h[n, r] = activation(sum_c fc1[r, c] * sum_t parts[n, t, c] + bias1[r])

One kernel where the weights are small enough for every program to read them all; two where they are not, so that many
programs share them. Everything is float32; the gate leaves in the dtype of the feature map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES, Launch, activate, interpreting, machine, narrow, too_large, unit
from .tables import Chosen, announce, chosen, fitting, planned


@dataclass(frozen=True)
class Config:
    """Tile sizes in images, channels and hidden channels; `whole` is one kernel for both products."""

    block_i: int
    block_c: int
    block_r: int
    warps: int
    whole: bool

    def shared_bytes(self) -> int:
        """Shared memory at most: three tiles in flight of the weights and of what they are multiplied with, and the
        means. Triton 3.8 keeps three, 3.9 two.
        """
        return 4 * (3 * self.block_r * (self.block_c + self.block_i) + self.block_i * self.block_c)


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: images, parts of each mean, channels, hidden channels and the architecture."""

    images: int
    tiles: int
    channels: int
    hidden: int
    arch: int


CONFIGS = tuple(
    [Config(16, 64, r, warps, True) for r in (16, 32, 64, 128) for warps in (4, 8)]
    + [Config(16, 32, r, warps, True) for r in (16, 32, 64, 128, 256) for warps in (4, 8)]
    + [Config(16, c, r, warps, False) for c in (32, 64) for r in (32, 64) for warps in (4, 8)]
)
"""The search space of the tuner."""

EXTENTS = ("images", "tiles")


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    if config.whole and config.block_r < shape.hidden:
        return f"{config.block_r} hidden channels are computed at once, there are {shape.hidden}"
    return too_large(config.shared_bytes(), shape.arch)


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement: one kernel up to 64 K weights a product, where its tiles fit."""
    if shape.channels * shape.hidden <= 1 << 16 and shape.hidden <= 256:
        block_r = max(16, triton.next_power_of_2(shape.hidden))
        large = Config(16, 64, block_r, 4 if block_r <= 64 else 8, True)
        for config in (large, replace(large, block_c=32)):
            if config_supports(config, shape) is None:
                return config
    return Config(16, 64, 32, 4, False)


@triton.jit
def _hidden(
    parts, fc1, bias1, image, rs, images, tiles, channels, hidden,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The hidden channels of some images: the parts are added in their order on the way."""
    sums = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
    for start in range(0, channels, BLOCK_C):
        cs = start + tl.arange(0, BLOCK_C)
        known = (image < images)[:, None] & (cs < channels)[None, :]
        means = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
        for tile in range(0, tiles):
            means += tl.load(parts + (image[:, None] * tiles + tile) * channels + cs[None, :], mask=known, other=0.0)
        known = (rs < hidden)[:, None] & (cs < channels)[None, :]
        w = tl.load(fc1 + rs[:, None] * channels + cs[None, :], mask=known, other=0.0)
        sums = tl.dot(means, tl.trans(w), sums, input_precision=PRECISION)
    return activate(sums + tl.load(bias1 + rs, mask=rs < hidden, other=0.0)[None, :], ACTIVATION)


@triton.jit(do_not_specialize=SIZES)
def whole_kernel(
    parts, fc1, bias1, fc2, bias2, gate, images, tiles, channel_units, hidden_units,
    UNIT: tl.constexpr, HIDDEN_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program i: the gates of some images."""
    channels, hidden = channel_units * UNIT, hidden_units * HIDDEN_UNIT
    image, rs = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64), tl.arange(0, BLOCK_R)
    h = _hidden(
        parts, fc1, bias1, image, rs, images, tiles, channels, hidden, ACTIVATION, PRECISION, BLOCK_I, BLOCK_C, BLOCK_R
    )
    for start in range(0, channels, BLOCK_C):
        cs = start + tl.arange(0, BLOCK_C)
        known = (cs < channels)[:, None] & (rs < hidden)[None, :]
        w = tl.load(fc2 + cs[:, None] * hidden + rs[None, :], mask=known, other=0.0)
        z = tl.dot(h, tl.trans(w), input_precision=PRECISION)
        z += tl.load(bias2 + cs, mask=cs < channels, other=0.0)[None, :]
        known = (image < images)[:, None] & (cs < channels)[None, :]
        tl.store(
            gate + image[:, None] * channels + cs[None, :],
            narrow(activate(z, GATE), gate.dtype.element_ty, UPCAST),
            mask=known,
        )


@triton.jit(do_not_specialize=SIZES)
def hidden_kernel(
    parts, fc1, bias1, result, images, tiles, channel_units, hidden_units,
    UNIT: tl.constexpr, HIDDEN_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some hidden channels of some images."""
    channels, hidden = channel_units * UNIT, hidden_units * HIDDEN_UNIT
    image = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    rs = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = _hidden(
        parts, fc1, bias1, image, rs, images, tiles, channels, hidden, ACTIVATION, PRECISION, BLOCK_I, BLOCK_C, BLOCK_R
    )
    tl.store(result + image[:, None] * hidden + rs[None, :], h, mask=(image < images)[:, None] & (rs < hidden)[None, :])


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(
    values, fc2, bias2, gate, images, channel_units, hidden_units,
    UNIT: tl.constexpr, HIDDEN_UNIT: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the gates of some images and channels."""
    channels, hidden = channel_units * UNIT, hidden_units * HIDDEN_UNIT
    image = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    z = tl.zeros((BLOCK_I, BLOCK_C), tl.float32)
    for start in range(0, hidden, BLOCK_R):
        rs = start + tl.arange(0, BLOCK_R)
        known = (image < images)[:, None] & (rs < hidden)[None, :]
        h = tl.load(values + image[:, None] * hidden + rs[None, :], mask=known, other=0.0)
        known = (cs < channels)[:, None] & (rs < hidden)[None, :]
        w = tl.load(fc2 + cs[:, None] * hidden + rs[None, :], mask=known, other=0.0)
        z = tl.dot(h, tl.trans(w), z, input_precision=PRECISION)
    z += tl.load(bias2 + cs, mask=cs < channels, other=0.0)[None, :]
    known = (image < images)[:, None] & (cs < channels)[None, :]
    tl.store(
        gate + image[:, None] * channels + cs[None, :],
        narrow(activate(z, GATE), gate.dtype.element_ty, UPCAST),
        mask=known,
    )


@planned
def _plan(
    size: torch.Size, hidden: int, activation: str, gate_activation: str, dtype: torch.dtype, device: torch.device,
    config: Config | None,
) -> tuple[Chosen, tuple[Launch, ...]]:  # fmt: skip
    """The choice, and what launches it for gates of a dtype: one kernel or two."""
    images, tiles, channels = size
    choice = chosen(__name__, Shape(images, tiles, channels, hidden, machine(device)[0]), device, config)
    config = choice.config
    units, rows = (channels // unit(channels), hidden // unit(hidden)), triton.cdiv(images, config.block_i)
    blocks = {"BLOCK_I": config.block_i, "BLOCK_C": config.block_c, "BLOCK_R": config.block_r}
    blocks |= {"UNIT": unit(channels), "HIDDEN_UNIT": unit(hidden), "PRECISION": "ieee" if interpreting() else "tf32x3"}
    first, last = {"ACTIVATION": activation}, {"GATE": gate_activation, "UPCAST": interpreting()}
    counts, warps = (images, tiles, *units), config.warps
    if config.whole:
        return choice, (Launch(whole_kernel, (rows,), counts, warps, **blocks, **first, **last),)
    down, across = ((rows, triton.cdiv(*sizes)) for sizes in ((hidden, config.block_r), (channels, config.block_c)))
    products = Launch(hidden_kernel, down, counts, warps, **blocks, **first)
    return choice, (products, Launch(gate_kernel, across, (images, *units), warps, **blocks, **last))


@fitting
def squeeze_excite(
    parts: Tensor,
    fc1: Tensor,
    bias1: Tensor,
    fc2: Tensor,
    bias2: Tensor,
    *,
    activation: str = "relu",
    gate_activation: str = "sigmoid",
    dtype: torch.dtype = torch.float32,
    config: Config | None = None,
) -> Tensor:
    """`gate_activation(linear(activation(linear(parts.sum(1), fc1, bias1)), fc2, bias2)).to(dtype)`.

    Args:
        parts: (N, T, C), contiguous, whose sum over T are the means.
        fc1, bias1: (R, C) and (R).
        fc2, bias2: (C, R) and (C); all of them float32 and contiguous.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new (N, C) tensor. Products in three TF32 steps, which keep float32's precision.
    """
    choice, launches = _plan(parts.shape, fc1.shape[0], activation, gate_activation, dtype, parts.device, config)

    def run(config: Config) -> Tensor:
        acts = {"activation": activation, "gate_activation": gate_activation}
        return squeeze_excite(parts, fc1, bias1, fc2, bias2, **acts, dtype=dtype, config=config)

    announce(choice, run)
    images, channels = parts.shape[0], parts.shape[2]
    gate = torch.empty((images, channels), dtype=dtype, device=parts.device)
    if choice.config.whole:
        launches[0](parts, fc1, bias1, fc2, bias2, gate)
        return gate
    values = torch.empty((images, fc1.shape[0]), dtype=torch.float32, device=parts.device)
    launches[0](parts, fc1, bias1, values)
    launches[1](values, fc2, bias2, gate)
    return gate
