"""What the CUDA C++ kernels of csrc/ are launched with: pure Python, for the extension module, NVRTC and the simulator.

A `Launch` names a source file of csrc/ and a template instantiation in it, and holds grid, threads of a block, bytes of
dynamic shared memory and arguments. An argument that is a string names a tensor, whose address is passed as 64 bits (a
null pointer where the option that would use it is off); an int is passed as int32, a float as float32. All tensors are
dense and 16-byte aligned; feature maps are NHWC. `buffers` are the float32 tensors whose shapes the plan decides.

    problem = GroupedConv(images, height, columns, groups, width, stride, "bfloat16")
    reason = refuse(problem)                                         why there is no kernel, or None
    launch = grouped_conv_forward(problem, "relu", parts=True)       a Launch; parts: of the channel means
    launches = grouped_conv_backward(problem, affine=2, norm=True, sums=True, activation="relu")       in this order
    DepthwiseConv, refuse_depthwise, depthwise_conv_forward, depthwise_conv_backward                   the same
    launch = squeeze_excite(images, tiles, channels, hidden, "bfloat16")                               parts to gate

Sources are compiled as C++17 with `-I csrc -I csrc/device`; a launch above 48 KB of shared memory needs the function's
attribute for it. Choices are made once for each problem and are never a matter of measurement here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Dynamic shared memory that one block may have."""

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}

TYPES = {"bfloat16": "BFloat16", "float16": "Float16"}
GATES = TYPES | {"float32": "float"}
"""What squeeze-excite's gate may be in."""

ACTIVATIONS = {"none": "NONE", "relu": "RELU", "silu": "SILU"}

WIDEST = 264
_MOST = 2**31 - 2**16  # of what kernels count in 32 bits, with room for the last tile
_MOST_SLABS = 65535  # of blocks in a grid's second dimension


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `kernel` is a C++ name expression in `source`; `grid` is (x, y, z)."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[str | int | float, ...]
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if self.grid[0] > _MOST or self.grid[1] > _MOST_SLABS:
            raise ValueError(f"{self.kernel}: a grid of {self.grid}")


@dataclass(frozen=True)
class GroupedConv:
    """A 3x3 convolution with padding 1 of (images, height, columns, groups * width), as wide as its result."""

    images: int
    height: int
    columns: int
    groups: int
    width: int
    stride: int
    dtype: str

    @property
    def channels(self) -> int:
        return self.groups * self.width

    @property
    def out_size(self) -> tuple[int, int]:
        return _cdiv(self.height, self.stride), _cdiv(self.columns, self.stride)


@dataclass(frozen=True)
class Target:
    """The machine: compute capability times ten, and its processors."""

    arch: int = 90
    processors: int = 132


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _pitch(chunks: int) -> int:
    """Bytes between neighbours of so many 16-byte chunks: an odd number of these."""
    return (chunks | 1) * 16


def refuse(
    problem: GroupedConv,
    *,
    kernel: tuple[int, int] = (3, 3),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    arch: int = 90,
) -> str | None:
    """Why csrc/ has no grouped convolution for a problem, or None."""
    if arch < 80:
        return "the kernels need a GPU of compute capability 8.0 or newer"
    if problem.dtype not in TYPES:
        return f"the kernels compute in {' and '.join(TYPES)}, not in {problem.dtype}"
    if kernel != (3, 3) or padding != (1, 1):
        return f"a kernel of {kernel} with padding {padding}: only 3x3 with padding 1"
    if dilation != (1, 1):
        return f"a dilation of {dilation}"
    if problem.stride not in (1, 2):
        return f"a stride of {problem.stride}"
    if problem.width % 8 or not 8 <= problem.width <= WIDEST:
        return f"groups of {problem.width} channels: only multiples of 8 from 8 to {WIDEST}"
    if min(problem.images, problem.height, problem.columns, problem.groups) < 1:
        return "an empty map"
    if problem.height * problem.columns * problem.channels > _MOST:
        return "an image of too many elements to count in 32 bits"
    if problem.images * problem.height * problem.columns > _MOST:
        return "too many pixels to count in 32 bits"
    if problem.groups * _cdiv(problem.width, 16) ** 2 > _MOST_SLABS:
        return f"{problem.groups} groups: more than a grid takes"
    return None


def _check(problem: GroupedConv) -> None:
    reason = refuse(problem)
    if reason is not None:
        raise ValueError(f"no kernel for {problem}: {reason}")


@dataclass(frozen=True)
class ForwardConfig:
    """The compile-time sizes of `grouped_conv_forward`."""

    groups: int
    chunk: int
    out_tile: int
    unit: int
    tile_h: int
    tile_w: int
    warps_m: int
    warps_n: int
    stages: int

    def shared_bytes(self, width: int, stride: int, moments: bool = False) -> int:
        """Dynamic shared memory: pixels and weights in flight, resident weights, results, and sums of columns."""
        halo = (
            ((self.tile_h - 1) * stride + 3) * ((self.tile_w - 1) * stride + 3) * _pitch(self.groups * self.chunk // 8)
        )
        weights = self.groups * self.out_tile * _pitch(9 * self.chunk // 8)
        sixteens = _cdiv(self.tile_h * self.tile_w, 16 * self.warps_m)
        results = self.warps_m * self.warps_n * sixteens * 16 * _pitch(self.unit)
        held = (weights, 0) if self.chunk >= width else (0, weights)
        sums = 4 * self.warps_m * (self.groups * self.out_tile * (1 + moments) + moments)
        return self.stages * (halo + held[1]) + held[0] + results + sums


_TILES = ((8, 16), (8, 14), (8, 8), (7, 7), (4, 14), (4, 8), (4, 4))
_ACCUMULATORS = 64  # of a thread at most, in whole tiles of 16x8
_BYTES_PER_CLOCK, _PRODUCTS_PER_CLOCK, _TILE_CLOCKS = 19, 1320, 400  # of one H200 processor, roughly


def _forward_configs(width: int, groups: int) -> Iterator[ForwardConfig]:
    """Whole groups with their weights in shared memory; and parts of one group, with weights for each step."""
    eights = width // 8
    for tile in _TILES:
        sixteens = _cdiv(tile[0] * tile[1], 16)
        for warps_m in (1, 2, 4, 8):
            held = _cdiv(sixteens, warps_m)
            if warps_m > sixteens or held > 4:
                continue
            for slab in (
                range(1, min(groups, 72 // width) + 1) if eights <= 8 and held * eights * 4 <= _ACCUMULATORS else ()
            ):
                for warps_n in {min(slab, 3), min(slab, 4)}:
                    for stages in (3, 2):
                        yield ForwardConfig(slab, width, width, eights, *tile, warps_m, warps_n, stages)
            for unit in range(3, 9):
                for warps_n in (1, 2, 4):
                    if held * unit * 4 > _ACCUMULATORS or unit * (warps_n - 1) >= eights:
                        continue
                    for chunk in (16, 24, 32):
                        if chunk < width:
                            yield ForwardConfig(1, chunk, 8 * unit * warps_n, unit, *tile, warps_m, warps_n, 2)


def _resident_blocks(shared: int, threads: int, arch: int) -> int:
    """Blocks of a processor at once, by shared memory and, with 168 registers a thread, by registers."""
    return max(1, min(SHARED_BYTES[arch] // shared, 65536 // (168 * threads)))


def _sectors(channels: int) -> int:
    """Bytes moved for so many channels of a pixel, in sectors of 32, wherever the first of them lies."""
    return 2 * channels if channels % 16 == 0 else 2 * channels + 16


def _forward_cost(config: ForwardConfig, problem: GroupedConv, arch: int, processors: int) -> tuple[float, int]:
    """Clocks of the busiest processor, modelled, and shared memory where they are equal."""
    c, p, (out_height, out_columns) = config, problem, problem.out_size
    tiles = _cdiv(out_height, c.tile_h) * _cdiv(out_columns, c.tile_w)
    slabs = _cdiv(p.groups, c.groups) * _cdiv(p.width, c.out_tile)
    shared, threads = c.shared_bytes(p.width, p.stride), 32 * c.warps_m * c.warps_n
    halo = min(p.height, (c.tile_h - 1) * p.stride + 3) * min(p.columns, (c.tile_w - 1) * p.stride + 3)
    pixels = min(out_height, c.tile_h) * min(out_columns, c.tile_w)
    depth = _cdiv(p.width, c.chunk) * c.chunk
    bytes_moved = halo * _sectors(c.groups * p.width) + pixels * _sectors(c.groups * min(c.out_tile, p.width))
    if c.chunk < p.width:
        bytes_moved += c.out_tile * 9 * depth  # from the L2 cache, at twice the rate
    units = _cdiv(c.groups * c.out_tile // (8 * c.unit), c.warps_n) * c.warps_n * c.unit * 8
    products = _cdiv(c.tile_h * c.tile_w, 16 * c.warps_m) * 16 * c.warps_m * units * 9 * depth
    busy = max(bytes_moved / _BYTES_PER_CLOCK, products / _PRODUCTS_PER_CLOCK)
    count = _cdiv(p.images * tiles * slabs, processors)
    together = min(count, _resident_blocks(shared, threads, arch))
    warps = min(1.0, together * threads / 256)  # fewer than eight warps do not keep a processor busy
    return count * (busy / warps + _TILE_CLOCKS / min(together, 2)), shared


@functools.lru_cache(maxsize=4096)
def forward_config(problem: GroupedConv, target: Target, moments: bool = False) -> ForwardConfig:
    """The configuration that a rough model of the machine takes for the fastest; no measurement stands behind it."""
    fits = [
        config
        for config in _forward_configs(problem.width, problem.groups)
        if config.shared_bytes(problem.width, problem.stride, moments) <= SHARED_BYTES[target.arch]
        and 4 <= config.warps_m * config.warps_n <= 12
    ]
    return min(fits, key=lambda config: _forward_cost(config, problem, target.arch, target.processors))


def grouped_conv_forward(
    problem: GroupedConv,
    activation: str = "none",
    parts: bool = False,
    target: Target = Target(),
    config: ForwardConfig | None = None,
    *,
    read: str | None = None,
    moments: bool = False,
) -> Launch:
    """`activation(conv(read(x)) + bias)`: tensors x, weight, bias (may be null), y; and, null where they are not asked
    for, scale and shift, parts, moments.

    The weight is (channels, 9 * width), tap by tap. With an activation for `read`, read(x) is that of x * scale +
    shift. parts are (images, tiles, channels): their sum over tiles are the means of y over an image's pixels. moments
    are (workers, 3, channels), for `merged_moments`. There are either of them.
    """
    _check(problem)
    config = config or forward_config(problem, target, moments)
    (out_height, out_columns), p, c = problem.out_size, problem, config
    tiles = _cdiv(out_height, c.tile_h) * _cdiv(out_columns, c.tile_w)
    slabs = _cdiv(p.groups, c.groups) * _cdiv(p.width, c.out_tile)
    shared = c.shared_bytes(p.width, p.stride, moments)
    resident = _resident_blocks(shared, 32 * c.warps_m * c.warps_n, target.arch)
    workers = min(p.images * tiles, max(1, resident * target.processors // slabs))
    facts = (
        TYPES[p.dtype], p.width, c.groups, c.chunk, c.out_tile, c.unit, p.stride, c.tile_h, c.tile_w, c.warps_m,
        c.warps_n, c.stages, ACTIVATIONS[activation], str(parts).lower(), str(read is not None).lower(),
        ACTIVATIONS[read or "none"], str(moments).lower(),
    )  # fmt: skip
    buffers = {"parts": (p.images, tiles, p.channels)} if parts else {}
    return Launch(
        "grouped_conv_forward.cu",
        f"grouped_conv_forward<{', '.join(map(str, facts))}>",
        (workers, slabs, 1),
        32 * c.warps_m * c.warps_n,
        shared,
        ("x", "scale", "shift", "weight", "bias", "y", "parts", "moments", p.images, p.height, p.columns, out_height,
         out_columns, p.groups),
        buffers | ({"moments": (workers, 3, p.channels)} if moments else {}),
    )  # fmt: skip


def merged_moments(parts: int, channels: int) -> Launch:
    """mean and var (channels), the biased one, of so many parts with their moments."""
    warps = 16
    buffers = dict.fromkeys(("mean", "var"), (channels,))
    return Launch(
        "merged_moments.cu", f"merged_moments<{warps}>", (_cdiv(channels, 32), 1, 1), 32 * warps, 12 * 32 * warps,
        ("moments", "mean", "var", parts, channels), buffers,
    )  # fmt: skip


@dataclass(frozen=True)
class BackwardConfig:
    """The compile-time sizes of `grouped_conv_backward`."""

    groups: int
    chunk: int
    out_tile: int
    unit: int
    tile_h: int
    tile_w: int
    warps_m: int
    warps_n: int
    stages: int

    def shared_bytes(self, work: BackwardWork) -> int:
        """Dynamic shared memory: maps and weights in flight, resident weights, results, and sums of columns."""
        p, halo = work.problem, 2 if work.problem.stride == 1 else 1
        pixels, area = (self.tile_h + halo) * (self.tile_w + halo), self.tile_h * self.tile_w
        stage = (2 if work.affine == 2 else 1) * pixels * _pitch(self.groups * self.chunk // 8)
        if work.weight:
            stage += area * p.stride**2 * _pitch(self.groups * self.out_tile // 8)
        weights = work.input * self.groups * self.out_tile * _pitch(9 * self.chunk // 8)
        streamed = work.input and self.chunk < p.width
        results = work.input * self.warps_m * self.warps_n * _cdiv(area, 16 * self.warps_m) * 16 * _pitch(self.unit)
        sums = 8 * self.warps_m * self.groups * self.out_tile * work.sums
        return self.stages * (stage + streamed * weights) + (not streamed) * weights + results + sums

    def accumulators(self, work: BackwardWork) -> int:
        """Floats of a thread that the sums take."""
        p, chunks = work.problem, self.chunk // 8
        held = _cdiv(self.tile_h * self.tile_w, 16 * self.warps_m) * self.unit * 4
        classes = p.stride**2 if self.chunk < p.width else 1
        products = _cdiv(9 * chunks, 2) if p.stride == 1 else _cdiv(chunks, 2) + 4 * chunks
        return work.input * held * classes + work.weight * _cdiv(products, self.warps_m) * self.unit * 4


@dataclass(frozen=True)
class BackwardWork:
    """What one launch of `grouped_conv_backward` computes: which gradients, with which prologue and epilogue."""

    problem: GroupedConv
    input: bool
    weight: bool
    affine: int
    norm: bool
    sums: bool


_BACKWARD_TILES = ((8, 16), (8, 14), (8, 8), (4, 8), (4, 4))
_BACKWARD_ACCUMULATORS = 112


def _backward_configs(work: BackwardWork) -> Iterator[BackwardConfig]:
    width, groups = work.problem.width, work.problem.groups
    eights = width // 8
    for tile in _BACKWARD_TILES:
        sixteens = tile[0] * tile[1] // 16
        for warps_m in (1, 2, 4, 8):
            if work.input and (warps_m > sixteens or _cdiv(sixteens, warps_m) > 4):
                continue
            for slab in range(1, min(groups, 72 // width) + 1 if eights <= 8 else 1):
                for stages in (3, 2):
                    yield BackwardConfig(slab, width, width, eights, *tile, warps_m, slab, stages)
            if work.input and work.weight:
                continue
            for unit in range(2, 9):
                for warps_n in (1, 2, 4):
                    for chunk in (16, 24, 32):
                        if chunk < width and unit * (warps_n - 1) < eights:
                            yield BackwardConfig(1, chunk, 8 * unit * warps_n, unit, *tile, warps_m, warps_n, 2)


def _backward_cost(config: BackwardConfig, work: BackwardWork, target: Target) -> tuple[float, int]:
    c, p, (out_height, out_columns) = config, work.problem, work.problem.out_size
    tiles, slabs = _cdiv(out_height, c.tile_h) * _cdiv(out_columns, c.tile_w), _backward_slabs(config, work)
    shared, threads = c.shared_bytes(work), 32 * c.warps_m * c.warps_n
    halo = min(out_height, c.tile_h + 2) * min(out_columns, c.tile_w + 2)
    pixels = min(out_height, c.tile_h) * min(out_columns, c.tile_w) * p.stride**2
    depth = _cdiv(p.width, c.chunk) * c.chunk if work.input else c.chunk
    outs = c.groups * min(c.out_tile, p.width)
    maps = work.input + work.weight + work.sums
    bytes_moved = (2 if work.affine == 2 else 1) * halo * _sectors(c.groups * depth) + maps * pixels * _sectors(outs)
    if work.input and c.chunk < p.width:
        bytes_moved += c.out_tile * 9 * depth
    area = c.tile_h * c.tile_w
    products = c.groups * c.out_tile * 9 * depth * area
    products = products * work.input + products * work.weight * (1 if p.stride == 1 else 1.5)
    busy = max(bytes_moved / _BYTES_PER_CLOCK, products / _PRODUCTS_PER_CLOCK)
    count = _cdiv(p.images * tiles * slabs, target.processors)
    together = min(count, _resident_blocks(shared, threads, target.arch))
    return count * (busy / min(1.0, together * threads / 256) + _TILE_CLOCKS / min(together, 2)), shared


def _backward_slabs(config: BackwardConfig, work: BackwardWork) -> int:
    p = work.problem
    splits = 1 if work.input else _cdiv(p.width, config.chunk)
    return _cdiv(p.groups, config.groups) * _cdiv(p.width, config.out_tile) * splits


@functools.lru_cache(maxsize=4096)
def backward_config(work: BackwardWork, target: Target) -> BackwardConfig | None:
    """As `forward_config`; None where nothing fits, which only a single pass can meet."""
    fits = [
        config
        for config in _backward_configs(work)
        if 4 <= config.warps_m * config.warps_n <= 12
        and config.accumulators(work) <= _BACKWARD_ACCUMULATORS
        and config.shared_bytes(work) <= SHARED_BYTES[target.arch]
    ]
    return min(fits, key=lambda config: _backward_cost(config, work, target), default=None)


def grouped_conv_backward(
    problem: GroupedConv,
    *,
    needs_input: bool = True,
    needs_weight: bool = True,
    affine: int = 0,
    norm: bool = False,
    sums: bool = False,
    activation: str = "none",
    single_pass: bool = True,
    target: Target = Target(),
    config: BackwardConfig | None = None,
) -> tuple[Launch, ...]:
    """The gradients of the input and of the weight; csrc/grouped_conv_backward.cu has the equations.

    Tensors, by name: dz, y (with `affine` 2), a (1 and 2), q, b (2); x (for the weight's gradient and with `sums`);
    scale, shift (with `norm` and `sums`), mean, invstd (`sums`); weight, (channels, 9 * width) with a row for each
    input channel, tap by tap; results dx, sums (images, tiles, 2, channels), parts, and dweight (channels, 9, width),
    all but dx in float32. Those that an option leaves out are null.

    `norm` and `sums` read the map through `activation(x * scale + shift)`. One launch makes both gradients where whole
    groups fit, two do otherwise, or without `single_pass`; the last one adds up the parts of the weight's gradient.
    """
    _check(problem)
    single = BackwardWork(problem, needs_input, needs_weight, affine, norm and needs_weight, sums and needs_input)
    works = [single]
    if config is None and needs_input and needs_weight and (not single_pass or backward_config(single, target) is None):
        works = [
            BackwardWork(problem, True, False, affine, False, sums),
            BackwardWork(problem, False, True, affine, norm, False),
        ]
    launches = [_backward_launch(work, config or backward_config(work, target), activation, target) for work in works]
    if needs_weight:
        launches.append(_ordered_sum(launches[-1].buffers["parts"][0], (problem.channels, 9, problem.width)))
    return tuple(launches)


def _ordered_sum(count: int, shape: tuple[int, ...]) -> Launch:
    """dweight of that shape, the sum of so many parts."""
    length = math.prod(shape)
    arguments = ("parts", "dweight", count, length)
    return Launch(
        "ordered_sum.cu", "ordered_sum<256>", (_cdiv(length, 1024), 1, 1), 256, 0, arguments, {"dweight": shape}
    )


def _backward_launch(work: BackwardWork, config: BackwardConfig | None, activation: str, target: Target) -> Launch:
    if config is None:
        raise ValueError(f"no configuration for {work} fits sm_{target.arch}")
    c, p, (out_height, out_columns) = config, work.problem, work.problem.out_size
    tiles, slabs = _cdiv(out_height, c.tile_h) * _cdiv(out_columns, c.tile_w), _backward_slabs(config, work)
    shared, threads = c.shared_bytes(work), 32 * c.warps_m * c.warps_n
    resident = _resident_blocks(shared, threads, target.arch)
    workers = min(p.images * tiles, max(1, resident * target.processors // slabs))
    switches = (work.input, work.weight, work.affine, work.norm, work.sums)
    facts = (
        TYPES[p.dtype], p.width, c.groups, c.chunk, c.out_tile, c.unit, p.stride, c.tile_h, c.tile_w, c.warps_m,
        c.warps_n, c.stages, *(str(s).lower() for s in switches), ACTIVATIONS[activation],
    )  # fmt: skip
    buffers = {"parts": (workers, p.channels, 9, p.width)} if work.weight else {}
    return Launch(
        "grouped_conv_backward.cu",
        f"grouped_conv_backward<{', '.join(map(str, facts))}>",
        (workers, slabs, 1),
        threads,
        shared,
        ("dz", "y", "a", "q", "b", "x", "scale", "shift", "mean", "invstd", "weight", "dx", "sums", "parts", p.images,
         p.height, p.columns, out_height, out_columns, p.groups),
        buffers | ({"sums": (p.images, tiles, 2, p.channels)} if work.sums else {}),
    )  # fmt: skip


@dataclass(frozen=True)
class DepthwiseConv:
    """A 3x3 convolution with padding 1 of (images, height, columns, channels), one channel in a group."""

    images: int
    height: int
    columns: int
    channels: int
    stride: int
    dtype: str

    @property
    def out_size(self) -> tuple[int, int]:
        return _cdiv(self.height, self.stride), _cdiv(self.columns, self.stride)


def refuse_depthwise(problem: DepthwiseConv, **geometry) -> str | None:
    """Why csrc/ has no depthwise convolution for a problem, or None; `geometry` as for `refuse`."""
    p = problem
    if p.channels % 8 or p.channels < 8:
        return f"{p.channels} channels: only multiples of 8"
    return refuse(GroupedConv(p.images, p.height, p.columns, p.channels // 8, 8, p.stride, p.dtype), **geometry)


_DEPTHWISE_THREADS = 128


def _depthwise(problem: DepthwiseConv, run: int) -> tuple[int, int, int]:
    """Lanes of eight channels, tiles of an image, and blocks that cover the channels; checks the problem."""
    reason = refuse_depthwise(problem)
    if reason is not None:
        raise ValueError(f"no kernel for {problem}: {reason}")
    chunks = problem.channels // 8
    lanes = min((1, 2, 4, 8, 16), key=lambda n: (_cdiv(chunks, n) * n, -n))
    runs = problem.out_size[0] * _cdiv(problem.out_size[1], run)
    return lanes, _cdiv(runs, _DEPTHWISE_THREADS // lanes), _cdiv(chunks, lanes)


def depthwise_conv_forward(problem: DepthwiseConv, activation: str = "none", parts: bool = False) -> Launch:
    """As `grouped_conv_forward`, with the weight as (9, channels)."""
    p, run = problem, 4 if problem.stride == 1 else 2
    lanes, tiles, across = _depthwise(p, run)
    facts = (TYPES[p.dtype], lanes, run, _DEPTHWISE_THREADS, p.stride, ACTIVATIONS[activation], str(parts).lower())
    return Launch(
        "depthwise_conv_forward.cu",
        f"depthwise_conv_forward<{', '.join(map(str, facts))}>",
        (p.images * tiles, across, 1),
        _DEPTHWISE_THREADS,
        32 * _DEPTHWISE_THREADS * parts,
        ("x", "weight", "bias", "y", "parts", tiles, p.height, p.columns, *p.out_size, p.channels),
        {"parts": (p.images, tiles, p.channels)} if parts else {},
    )


def depthwise_conv_backward(
    problem: DepthwiseConv,
    *,
    needs_input: bool = True,
    needs_weight: bool = True,
    affine: int = 0,
    norm: bool = False,
    sums: bool = False,
    activation: str = "none",
    target: Target = Target(),
) -> tuple[Launch, ...]:
    """As `grouped_conv_backward`, always in a single pass; weight and dweight are (9, channels)."""
    p, run = problem, 2 if problem.stride == 1 else 1
    lanes, tiles, across = _depthwise(p, run)
    norm, sums = norm and needs_weight, sums and needs_input
    switches = (str(s).lower() for s in (needs_input, needs_weight, affine, norm, sums))
    facts = (TYPES[p.dtype], lanes, run, _DEPTHWISE_THREADS, p.stride, *switches, ACTIVATIONS[activation])
    workers = min(p.images * tiles, max(1, _cdiv(4 * target.processors, across))) if needs_weight else p.images * tiles
    buffers = {"parts": (workers, 9, p.channels)} if needs_weight else {}
    launch = Launch(
        "depthwise_conv_backward.cu",
        f"depthwise_conv_backward<{', '.join(map(str, facts))}>",
        (workers, across, 1),
        _DEPTHWISE_THREADS,
        32 * _DEPTHWISE_THREADS * (needs_weight or sums),
        ("dz", "y", "a", "q", "b", "x", "scale", "shift", "mean", "invstd", "weight", "dx", "sums", "parts", p.images,
         tiles, p.height, p.columns, *p.out_size, p.channels),
        buffers | ({"sums": (p.images, tiles, 2, p.channels)} if sums else {}),
    )  # fmt: skip
    return (launch, *(_ordered_sum(workers, (9, p.channels)) for _ in range(needs_weight)))


def refuse_squeeze_excite(images: int, channels: int, hidden: int, target: Target = Target()) -> str | None:
    """Why csrc/ has no squeeze-excite for so many images and channels, or None."""
    if min(images, channels, hidden) < 1:
        return "an empty batch, or no channels"
    if channels % 2:
        return f"{channels} channels: the gate is written in pairs"
    needed = 4 * (channels + hidden)
    if needed > SHARED_BYTES[target.arch]:
        return f"{channels} channels and {hidden} hidden ones need {needed} bytes of shared memory"
    if images > _MOST:
        return "too many images to count in 32 bits"
    return None


def squeeze_excite(
    images: int, tiles: int, channels: int, hidden: int, dtype: str, activation: str = "relu", target: Target = Target()
) -> Launch:
    """The gate in a dtype of `GATES`: tensors parts (images, tiles, channels), fc1, bias1, fc2, bias2, gate."""
    reason = refuse_squeeze_excite(images, channels, hidden, target)
    if reason is not None:
        raise ValueError(f"no kernel for a gate: {reason}")
    block = next((n for n in (4, 2, 1) if n <= images and images // n >= target.processors), 1)
    while block > 1 and 4 * block * (channels + hidden) > SHARED_BYTES[target.arch]:
        block //= 2
    threads = 512
    return Launch(
        "squeeze_excite.cu",
        f"squeeze_excite<{GATES[dtype]}, {block}, {threads}, {ACTIVATIONS[activation]}>",
        (_cdiv(images, block), 1, 1),
        threads,
        4 * block * (channels + hidden),
        ("parts", "fc1", "bias1", "fc2", "bias2", "gate", images, tiles, channels, hidden),
    )
