"""Which tiles a 1x1 convolution is computed in: configurations, what they move, and one that needs no measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton

from .common import SHARED_BYTES, too_large


@dataclass(frozen=True)
class Config:
    """Tile sizes in pixels, output channels and input channels; `resident` is the form. Resident weights may have
    `rest` more input channels, a tile of their own: widths that are no powers of two would fill memory with zeros.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    resident: bool
    rest: int = 0

    @property
    def kept(self) -> int:
        """The input channels that stay."""
        return self.block_k + self.rest

    def images(self, area: int) -> int:
        """How many images of so many pixels a tile reaches at most; 0 for an area of 0."""
        first = math.gcd(self.block_m, area)  # the fewest rows of the first one
        return 1 + triton.cdiv(self.block_m - first, area) if area else 0

    def tiles(self, shape: Shape) -> tuple[int, int]:
        """How many tiles of output channels and of pixels there are."""
        return triton.cdiv(shape.out_channels, self.block_n), triton.cdiv(shape.pixels, self.block_m)

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory at most: the tiles in flight, the resident weights, and the result on its way out."""
        x, weight, y = self.block_m * self.kept, self.block_n * self.kept, self.block_m * self.block_n
        images = self.images(shape.gate)
        gate = images * self.kept if images <= MOST_IMAGES else x
        norm = 8 * self.kept // shape.itemsize if shape.norm else 0
        if self.resident:
            beside, made = gate + norm + y * shape.residual, shape.gate or shape.norm
            bias = 4 * (self.stages - 1) * self.block_n + 64  # and barriers
            return shape.itemsize * (self.stages * x + (self.stages - 1) * beside + weight + (0 if made else y)) + bias
        return shape.itemsize * max(self.stages * (x + gate + norm + weight), y)


MOST_IMAGES = 4
"""Of so many images a tile reads one gate each; of more the gate of every pixel."""


@dataclass(frozen=True)
class Shape:
    """What decides on a configuration: the product, its operands, the machine, and what is normalised as it is read.
    `gate` is the number of pixels that share one, 0 without.
    """

    pixels: int
    channels: int
    out_channels: int
    itemsize: int
    gate: int
    residual: bool
    stride: int
    tf32: bool
    arch: int
    processors: int
    norm: bool = False
    residual_norm: bool = False


CONFIGS = tuple(
    [
        Config(m, n, k, warps, stages, True, rest)
        for m, warps in ((32, 8), (64, 4), (64, 8), (128, 8))
        for n in (32, 64, 128)
        for k, rest in ((32, 0), (64, 0), (64, 16), (128, 0), (128, 64), (256, 0), (256, 128), (512, 0), (512, 64))
        for stages in (2, 3)
    ]
    + [
        Config(m, n, k, warps, stages, False)
        for m, n, warps in (
            *((32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4)),
            *((128, 128, 8), (64, 256, 8), (128, 256, 8), (256, 128, 8)),
        )
        for k in (32, 64)
        for stages in (3, 4)
    ]
)
"""The search space of the tuner."""

EXTENTS = ("pixels",)


def config_supports(config: Config, shape: Shape) -> str | None:
    """Why a configuration cannot serve, or None."""
    if config.resident and config.kept < shape.channels:
        return f"{config.kept} channels of weights stay, the layer has {shape.channels}"
    return too_large(config.shared_bytes(shape), shape.arch)


def cached_bytes(config: Config, *shapes: Shape) -> int:
    """What the processors read from the last cache and write to it in one launch: x for every tile of output channels,
    the weights for every tile of pixels, or once for every program that keeps them, the tiles' gates, the residual and
    the results.
    """
    values = 0
    for shape, times in zip(shapes, programs(config, *shapes), strict=True):
        across, down = config.tiles(shape)
        gates = across * down * min(config.block_m, config.images(shape.gate))
        values += (across * shape.pixels + times * shape.out_channels + gates) * shape.channels
        values += shape.pixels * shape.out_channels * (1 + shape.residual)
    return shapes[0].itemsize * values


def memory_bytes(*shapes: Shape) -> int:
    """What has to come from memory and go there in one launch, x once, which the first product has all pixels of."""
    first = shapes[0]
    values = (first.pixels + (first.pixels // first.gate if first.gate else 0)) * first.channels
    for shape in shapes:
        values += shape.out_channels * shape.channels + shape.pixels * shape.out_channels * (1 + shape.residual)
    return first.itemsize * values


CACHE_SPEED = 5.5 / 3.0
"""How many bytes the last cache delivers in the time in which memory delivers one: of an H100, and not measured."""


def programs(config: Config, *shapes: Shape) -> list[int]:
    """Among how many programs each tile of a product's output channels has its pixels shared out, for the products of
    one launch. Where weights stay, as many as run at once, by the products' work, so that none is ahead of the one
    before; else one for each tile of pixels.
    """
    across, down = zip(*(config.tiles(shape) for shape in shapes), strict=True)
    if not config.resident:
        return list(down)
    left = min(2, max(1, SHARED_BYTES[shapes[0].arch] // config.shared_bytes(shapes[0]))) * shapes[0].processors
    found, trips = [], 1
    for i in range(len(shapes)):
        work = sum(a * d for a, d in zip(across[i:], down[i:], strict=True))
        found.append(min(triton.cdiv(down[i], trips), max(1, left * down[i] // work)))
        trips, left = triton.cdiv(down[i], found[i]), left - across[i] * found[i]
    return found


def heuristic(*shapes: Shape) -> Config:
    """A configuration that needs no measurement, for one product, or for several of one launch.

    Where warps multiply in groups of four: the first of some configurations, by how well they hide latency, that waits
    for memory rather than for the last cache, or else the one that reads the least from there.
    """
    shape, out_channels = shapes[0], max(one.out_channels for one in shapes)
    warpgroups = shape.arch in (90, 100) and (shape.itemsize == 2 or shape.tf32)
    if not warpgroups or _tiles(shapes, 128, 128) < shape.processors:
        return _by_registers(shapes)
    row, block_n = 128 // shape.itemsize, 64 if out_channels <= 64 else 128
    block_k, rest = _whole(shape.channels)
    kept = []
    if block_k + rest <= 9 * row:
        block_m, warps = 64 if block_k <= 4 * row else 32, 4 if block_k <= 2 * row and shape.itemsize == 2 else 8
        kept = [Config(block_m, block_n, block_k, warps, stages, True, rest) for stages in (3, 2)]
    early = kept if block_k <= 4 * row else []
    tiles = [(128, block_n)]
    if shape.itemsize == 2 and block_n == 128:  # float32, and norms of more pixels, would not fit in the registers
        tiles += [(128, 256)] if shape.norm or shape.residual_norm else [(256, 128), (128, 256)]
    streamed = [Config(m, n, row, 8, 3, False) for m, n in tiles]
    found = [c for c in (*early, streamed[0], *kept, *streamed[1:]) if config_supports(c, shape) is None]
    enough = (c for c in found if cached_bytes(c, *shapes) <= CACHE_SPEED * memory_bytes(*shapes))
    return next(enough, min(found, key=lambda c: cached_bytes(c, *shapes)))


def _tiles(shapes: Sequence[Shape], block_m: int, block_n: int) -> int:
    return sum(triton.cdiv(one.pixels, block_m) * triton.cdiv(one.out_channels, block_n) for one in shapes)


def _whole(channels: int) -> tuple[int, int]:
    """A power of two, and another or 0, whose sum is a number of channels or little more."""
    above = max(16, triton.next_power_of_2(channels))
    rest = max(16, triton.next_power_of_2(channels - above // 2))
    return (above // 2, rest) if above > 16 and rest < above // 2 else (above, 0)


def _by_registers(shapes: Sequence[Shape]) -> Config:
    """Tiles of 128 pixels by the layer's width, halved while there are fewer than processors. Weights stay where all
    their channels fit; two programs share a processor where the memory allows it.
    """
    shape, out_channels = shapes[0], max(one.out_channels for one in shapes)
    block_m, block_n = 128, min(128, max(16, triton.next_power_of_2(out_channels)))
    while _tiles(shapes, block_m, block_n) < shape.processors and max(block_m, block_n) > 32:
        block_m, block_n = (block_m // 2, block_n) if block_m >= block_n else (block_m, block_n // 2)
    sizes = [(block_m, block_n), (max(16, block_m // 2), block_n), (max(16, block_m // 2), max(16, block_n // 2))]
    for resident in (True, False) if shape.channels <= 512 // shape.itemsize else (False,):
        block_k = max(16, triton.next_power_of_2(shape.channels)) if resident else 128 // shape.itemsize
        for share, stages in ((2, 3), (2, 2), (1, 3), (1, 2)):
            for m, n in sizes:
                row = block_k * shape.itemsize
                deep = row >= 256 if shape.gate and shape.norm else m >= 64 and row == 512
                wide = 64 * 128 if shape.norm or block_k >= 128 else 128 * 128
                large = deep or m * n >= wide  # four warps would lack registers
                config = Config(m, n, block_k, 8 if large else 4, stages, resident)
                gated = stages * m * row if shape.gate else 0  # a second time, which takes registers too
                if not too_large((config.shared_bytes(shape) + gated) * share, shape.arch):
                    return config
    return Config(32, 32, 64 // shape.itemsize, 4, 2, False)
