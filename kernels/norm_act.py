"""Per-channel scale and shift, a per-image gate and an activation in one pass:

y[p, c] = activation(x[p, c] * scale[c] * gate[image(p), c] + shift[c])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES, Launch, activate, interpreting, narrow, new_output, unit
from .tables import Chosen, announce, chosen, fitting, planned


@dataclass(frozen=True)
class Config:
    """Tile sizes in pixels and channels."""

    block_p: int
    block_c: int
    warps: int


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: pixels, channels, and the operands."""

    pixels: int
    channels: int
    itemsize: int
    gate: bool


CONFIGS = tuple(Config(p, c, w) for p in (8, 16, 32, 64) for c in (32, 64, 128, 256) for w in (4, 8))
"""The search space of the tuner."""

EXTENTS = ("pixels",)


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None: each can."""
    return None


def heuristic(shape: Shape) -> Config:
    """A configuration that needs no measurement: 4096 elements, as many channels of a pixel as there are."""
    block_c = min(256, max(16, triton.next_power_of_2(shape.channels)))
    return Config(4096 // block_c, block_c, 4)


@triton.jit(do_not_specialize=SIZES)
def kernel(
    x, scale, shift, gate, y, pixels, image_pixels, channel_units,
    UNIT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some channels of some pixels."""
    channels = channel_units * UNIT
    rows = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < pixels)[:, None] & (cs < channels)[None, :]
    offsets = rows[:, None] * channels + cs[None, :]
    z = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(scale + cs, mask=cs < channels, other=0.0)[None, :]
    if HAS_GATE:
        image = rows // image_pixels
        s = s * tl.load(gate + image[:, None] * channels + cs[None, :], mask=inside, other=0.0).to(tl.float32)
    z = z * s + tl.load(shift + cs, mask=cs < channels, other=0.0)[None, :]
    tl.store(y + offsets, narrow(activate(z, ACTIVATION), y.dtype.element_ty, UPCAST), mask=inside)


@planned
def _plan(
    size: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    gate: torch.dtype | None,
    activation: str,
    config: Config | None,
) -> tuple[Chosen, Launch]:
    """The choice, and what launches it, by the dtypes of x and of the gate."""
    n, channels, height, width = size
    pixels = n * height * width
    choice = chosen(__name__, Shape(pixels, channels, dtype.itemsize, gate is not None), device, config)
    config = choice.config
    launch = Launch(
        kernel, (triton.cdiv(pixels, config.block_p), triton.cdiv(channels, config.block_c)),
        (pixels, height * width, channels // unit(channels)), config.warps,
        UNIT=unit(channels), ACTIVATION=activation, HAS_GATE=gate is not None, UPCAST=interpreting(),
        BLOCK_P=config.block_p, BLOCK_C=config.block_c,
    )  # fmt: skip
    return choice, launch


@fitting
def norm_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str = "none",
    config: Config | None = None,
) -> Tensor:
    """`activation(x * scale * gate + shift)` with per-channel scale and shift.

    Args:
        x: (N, C, H, W), channels_last; float32, float16 or bfloat16.
        scale, shift: (C), float32.
        gate: (N, C), contiguous, of any float dtype.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new tensor of x's dtype in channels_last. Computes in float32.
    """
    choice, launch = _plan(x.shape, x.dtype, x.device, None if gate is None else gate.dtype, activation, config)

    def run(config: Config) -> Tensor:
        return norm_act(x, scale, shift, gate, activation=activation, config=config)

    announce(choice, run)
    y = new_output(x.shape, x)
    launch(x, scale, shift, gate, y)
    return y
