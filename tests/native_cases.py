"""The kernels of csrc/cpu for evaluation against float64, for `tests/backends/test_native.py` and for a process of its
own whose csrc/cpu is compiled in another way:

    python tests/native_cases.py

computes networks with several threads, and every case, and prints a digest of the cases' results, the lanes of a
vector, and how near to float64 the worst is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import timm
import torch
import torch.nn.functional as F
from helpers import randomize_bn
from torch import Tensor

import regnet_fast
from regnet_fast.backends import ACTIVATIONS, ConvProblem, Geometry, NormActProblem, native

F32, BF16 = torch.float32, torch.bfloat16
ROUNDING = {F32: 3e-6, BF16: 1.2e-2}
"""The error of a result, of its largest value: of sums in float32, and of what is read and written in bfloat16."""

INFINITE, NAN = float("inf"), float("nan")
SIZES = ((1, 7, 7), (2, 5, 9), (1, 1, 1), (1, 20, 31), (3, 14, 14))


def conv(size, c: int, k: int, kernel: int, stride: int = 1, groups: int = 1, **facts) -> ConvProblem:
    """A convolution that keeps the size but for its stride."""
    n, h, w = size
    dilation = facts.pop("dilation", 1)
    padding = facts.pop("padding", kernel // 2 * dilation)
    given = {"activation": "relu", "gate": False, "residual": False, "dtype": F32, "device": "cpu", **facts}
    pairs = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    return ConvProblem((n, c, h, w), k, (kernel,) * 2, Geometry(*pairs), **given)


def problems() -> Iterator[ConvProblem]:
    """1x1 with every epilogue and prologue, groups of every width, dense kernels, stems."""
    widths = ((48, 48), (24, 56), (152, 368), (7, 5), (64, 33), (1, 1), (130, 17))
    for (c, k), size, dtype in itertools.product(widths, SIZES, (F32, BF16)):
        for residual, gate, stride in itertools.product((False, True), (False, True), (1, 2)):
            names = native.ACTIVATION_CODES if size == SIZES[1] else ("silu",)
            for name in names:
                yield conv(size, c, k, 1, stride, activation=name, gate=gate, residual=residual, dtype=dtype)
    groups = ((1, 2), (1, 17), (2, 5), (4, 3), (8, 1), (8, 3), (16, 3), (24, 1), (24, 2), (24, 5), (32, 2), (40, 3))
    groups += ((48, 1), (56, 2), (64, 2), (72, 3), (80, 1), (104, 2), (112, 1), (120, 3), (168, 2), (232, 1))
    for (width, count), size, dtype in itertools.product(groups, SIZES, (F32, BF16)):
        for stride, dilation in ((1, 1), (2, 1), (1, 2)):
            c = width * count
            activation = "silu" if size == SIZES[1] else "relu"
            yield conv(size, c, c, 3, stride, count, dilation=dilation, activation=activation, dtype=dtype)
    yield from depthwise_problems()
    yield from matrix_problems()
    for c, k, kernel, stride in (
        (3, 32, 3, 2),
        (3, 64, 7, 2),
        (64, 64, 3, 1),
        (48, 56, 3, 2),
        (5, 7, 3, 1),
        (16, 16, 5, 1),
    ):
        for size, dtype, residual in itertools.product(SIZES, (F32, BF16), (False, True)):
            yield conv(size, c, k, kernel, stride, residual=residual, dtype=dtype)
    for padding in (0, 2):
        yield conv((2, 9, 8), 12, 20, 3, padding=padding)


def depthwise_problems() -> Iterator[ConvProblem]:
    """Of channels that fill vectors and of others; of the kernels that have a way of their own, and of others."""
    for c, size, dtype in itertools.product((1, 8, 16, 17, 24, 31, 40, 144, 257, 300), SIZES, (F32, BF16)):
        for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
            residual, activation = c % 2 == 1, "hardswish" if stride == 1 else "relu"
            yield conv(size, c, c, kernel, stride, c, residual=residual, activation=activation, dtype=dtype)
    for name, dtype in itertools.product(native.ACTIVATION_CODES, (F32, BF16)):
        yield conv(SIZES[1], 40, 40, 3, 1, 40, activation=name, dtype=dtype)
    for dtype in (F32, BF16):
        for kernel, stride, dilation, padding in ((7, 1, 1, 3), (2, 2, 1, 0), (3, 3, 1, 1), (3, 1, 2, 2), (5, 1, 1, 7)):
            yield conv(SIZES[1], 48, 48, kernel, stride, 48, dilation=dilation, padding=padding, dtype=dtype)
        for kernel, stride, padding in (((3, 5), (1, 2), (0, 2)), ((5, 3), (3, 1), (2, 4))):
            square = conv(SIZES[1], 33, 33, 3, groups=33, dtype=dtype)
            yield replace(square, kernel=kernel, geometry=Geometry(stride, padding, (1, 1), 33))


def matrix_problems() -> Iterator[ConvProblem]:
    """For the matrix unit: maps that fill no register or one and a little, channels whose segments are cut in every
    way. Weights so many that they are cut otherwise, by the vectors as well.
    """
    for size in ((1, 4, 8), (1, 1, 40), (2, 3, 33), (1, 33, 1), (3, 2, 2), (1, 16, 2)):
        for c, kernel, stride, groups in itertools.product((32, 48), (1, 3), (1, 2), (1, 2)):
            yield conv(size, c, c, kernel, stride, groups, activation="silu", dtype=BF16)
    for c, k in ((2, 16), (22, 34), (34, 48), (62, 31), (64, 32), (66, 96), (74, 16), (336, 40), (200, 64)):
        for kernel, dilation, residual in ((1, 1, True), (3, 1, False), (3, 2, True), (5, 1, False)):
            yield conv((2, 6, 11), c, k, kernel, dilation=dilation, residual=residual, dtype=BF16)
    for size, stride, dtype in itertools.product(((1, 7, 7), (3, 7, 7), (2, 5, 9)), (1, 2), (F32, BF16)):
        yield conv(size, 776, 712, 1, stride, dtype=dtype)
        yield conv(size, 776, 712, 1, stride, residual=True, dtype=dtype)
        yield conv(size, 776, 712, 1, stride, gate=True, residual=True, dtype=dtype)
        yield conv(size, 256, 264, 3, stride, residual=True, activation="none", dtype=dtype)
    yield conv((5, 1, 1), 776, 712, 1, dtype=BF16)
    for size, (c, k), stride in itertools.product(((1, 20, 31), (3, 14, 14)), ((48, 48), (24, 56), (130, 17)), (1, 2)):
        for activation, residual, gate in itertools.product(("relu", "none"), (False, True), (False, True)):
            yield conv(size, c, k, 1, stride, activation=activation, residual=residual, gate=gate, dtype=BF16)
    for c, groups, stride, dilation in itertools.product((128, 192, 384), (1, 2), (1, 2), (1, 2)):
        facts = dict(dilation=dilation, dtype=BF16)
        yield conv((2, 9, 12), c * groups, c * groups, 3, stride, groups, **facts)
        yield conv((2, 9, 12), c * groups, c * groups, 3, stride, groups, gate=True, residual=True, **facts)
    for size, c, stride, dtype in itertools.product(((2, 9, 20), (1, 33, 5)), (32, 144), (1, 2), (F32, BF16)):
        for kernel, residual in ((1, False), (3, True)):
            yield conv(size, c, c, kernel, stride, 2, gate=True, residual=residual, dtype=dtype)
    for kernel, stride, padding in (((3, 5), (1, 2), (0, 2)), ((5, 3), (3, 1), (2, 4)), ((1, 3), (2, 2), (1, 0))):
        for groups in (1, 3):
            square = conv((2, 8, 13), 72, 72, 3, groups=groups, dtype=BF16)
            yield replace(square, kernel=kernel, geometry=Geometry(stride, padding, (1, 1), groups))


def operands(p: ConvProblem) -> dict[str, Tensor | None]:
    """What a problem is computed from; deterministic."""
    n, c, _, _ = p.input_shape
    taps = c // p.geometry.groups * p.kernel[0] * p.kernel[1]
    return {
        "x": maps(p.input_shape, p.dtype),
        "weight": (torch.randn(p.out_channels, c // p.geometry.groups, *p.kernel) / taps**0.5).to(p.dtype),
        "bias": torch.randn(p.out_channels),
        "gate": torch.rand(n, c).to(p.dtype) if p.gate else None,
        "residual": maps(p.output_shape, p.dtype) if p.residual else None,
    }


def maps(shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def exact(p: ConvProblem, x, weight, bias, gate, residual) -> Tensor:
    """The result in float64."""
    x = x.double() if gate is None else x.double() * gate.double()[:, :, None, None]
    y = F.conv2d(x, weight.double(), bias.double(), *p.geometry[:3], p.geometry.groups)
    return ACTIVATIONS[p.activation].function(y if residual is None else y + residual.double())


def error(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """How many times as large as `ROUNDING` the largest error is."""
    assert found.isfinite().all()
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3) / ROUNDING[dtype]).item()


def computed(p: ConvProblem) -> tuple[Tensor, Tensor | None, float]:
    """The result, its means where they are made, and how near both are to float64."""
    torch.manual_seed(0)
    given = operands(p)
    expected = exact(p, **given)
    run = native.prepare_conv(p, given["weight"], given["bias"])
    if p.gate or p.residual:
        residual = None if given["residual"] is None else given["residual"].clone(memory_format=torch.preserve_format)
        y = run(given["x"], given["gate"], residual, False, True)
        return y, None, error(y, expected, p.dtype)
    y, means = run.with_parts(given["x"])
    near = error(y, expected, p.dtype)
    if run.any_layout:
        near = max(near, error(run(given["x"].contiguous(), None, None, False, False), expected, p.dtype))
    return y, means, max(near, error(means, expected.mean((2, 3)), p.dtype))


def one_result(p: ConvProblem) -> bool:
    """Whether it is the same to the bit however many threads it is cut for."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            found.append(computed(p)[:2])
    finally:
        torch.set_num_threads(before)
    return all(a is b or torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def through_cases() -> Iterator[tuple]:
    """Arguments of `through`."""
    for size, dtype in itertools.product(SIZES, (F32, BF16)):
        for c, k, kernel, stride, groups in (
            *((48, 56, 1, 1, 1), (130, 17, 1, 2, 1), (64, 48, 3, 1, 1), (5, 7, 3, 2, 1)),
            *((96, 96, 1, 1, 4), (72, 72, 3, 1, 3), (80, 80, 3, 2, 2), (40, 40, 3, 1, 40)),
        ):
            for before, gate in (("relu", False), ("silu", True)):
                yield conv(size, c, k, kernel, stride, groups, gate=gate, dtype=dtype), before


def through(p: ConvProblem, before: str) -> float:
    """How near to float64 a convolution of `before(x * gate * scale + shift)` is, computed as it reads."""
    torch.manual_seed(0)
    given, scale, shift = operands(p), torch.randn(p.input_shape[1]), torch.randn(p.input_shape[1])
    step, vectors = native.conv_step(p, 0, 1, gate=2 if p.gate else -1), (native.padded(scale), native.padded(shift))
    step.scale, step.shift = (vector.data_ptr() for vector in vectors)
    step.before = native.ACTIVATION_CODES[before]
    gate = given["gate"].float() if p.gate else torch.ones(p.input_shape[:2])
    weights = native.Weights(step, given["weight"], given["bias"])
    y = torch.empty(p.output_shape, dtype=p.dtype).contiguous(memory_format=torch.channels_last)
    program = native.Program([weights.give(step)], (weights, vectors), [*map(native.Place, range(3))])
    program([t.data_ptr() for t in (given["x"], y, gate)])
    z = given["x"].double() * (gate * scale).double()[:, :, None, None] + shift.double()[:, None, None]
    given = {**given, "x": ACTIVATIONS[before].function(z), "gate": None}
    return error(y, exact(p, **given), p.dtype)


def activated(activation: str, dtype: torch.dtype) -> float:
    """How near an activation is to float64 at every number by itself, be it infinite or none."""
    z = torch.cat([torch.linspace(-110, 110, 40001), torch.linspace(-1, 1, 20001) ** 9])
    z = torch.cat([z, torch.tensor([INFINITE, -INFINITE, NAN, 1e38, -1e38, 1e-40, -1e-40, 0.0, -0.0])]).to(dtype)
    x = z[:, None, None, None].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    problem = NormActProblem(x.shape, activation, False, dtype, "cpu")
    y = native.prepare_norm_act(problem, torch.ones(3), torch.zeros(3))(x, None, False).double()
    expected = ACTIVATIONS[activation].function(x.double())
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    known = expected.isfinite()
    rounding = {F32: 1e-5, BF16: 1.05 / 256}[dtype]
    return ((y - expected).abs() / (rounding * expected.abs() + 1e-34))[known].max().item()


# Steps of whole networks

WINDOWS = (
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 2), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (2, 2)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 5), (2, 1), (1, 2), (1, 1)),
    ((2, 2), (1, 1), (1, 1), (3, 3)),
)
"""Of max pools: kernel, stride, padding and dilation. The last has windows that meet no pixel where a map has one."""

CHANNELS = (1, 5, 24, 64, 130, 257)


def largest_cases() -> Iterator[tuple]:
    """Arguments of `largest`: windows that leave pixels, of maps of every size, with and without what is no number."""
    for size, channels, window, dtype in itertools.product(SIZES, CHANNELS, WINDOWS, (F32, BF16)):
        fields = [(k - 1) * d + 1 for k, d in zip(window[0], window[3], strict=True)]
        if all(n + 2 * p >= field for n, p, field in zip(size[1:], window[2], fields, strict=True)):
            for value in (None, NAN, -INFINITE, INFINITE) if channels in (5, 64) else (None,):
                yield size, channels, window, dtype, value


def largest(size, channels: int, window, dtype: torch.dtype, value: float | None) -> tuple[Tensor, Tensor]:
    """A max pool of negative numbers and what it has to be; every fifth pixel is `value`, and all of one channel. NaN
    stands beside infinities.
    """
    torch.manual_seed(0)
    n, h, w = size
    x = -maps((n, channels, h, w), dtype).abs()
    if value is not None:
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view of memory in channels_last
        if value is NAN:
            pixels[1::3] = INFINITE
        pixels[::5] = value
        x[:, -1] = value
    expected = F.max_pool2d(x.double(), *window).to(dtype)
    step = native.window_step(native.LARGEST, x.shape, expected.shape, dtype, window, 0, 1)
    return _run_step(step, x, torch.empty_like(expected, memory_format=torch.channels_last)), expected


MEAN_WINDOWS = (
    dict(kernel_size=2, stride=2),
    dict(kernel_size=2, stride=2, ceil_mode=True),
    dict(kernel_size=3, stride=2, padding=1, count_include_pad=False),
    dict(kernel_size=(3, 2), stride=(1, 2), padding=(1, 0), ceil_mode=True, count_include_pad=False),
)
"""Of average pools."""


def window_mean_cases() -> Iterator[tuple]:
    """Arguments of `window_mean`."""
    for size, channels, window, dtype in itertools.product(SIZES, CHANNELS, range(len(MEAN_WINDOWS)), (F32, BF16)):
        if min(size[1:]) >= 3:
            yield size, channels, window, dtype


def window_mean(size, channels: int, window: int, dtype: torch.dtype) -> float:
    """How near an average pool is to float64."""
    torch.manual_seed(0)
    n, h, w = size
    x, pool = maps((n, channels, h, w), dtype), torch.nn.AvgPool2d(**MEAN_WINDOWS[window])
    expected = pool(x.double())
    pairs = [torch.nn.modules.utils._pair(getattr(pool, name)) for name in ("kernel_size", "stride", "padding")]
    step = native.window_step(native.WINDOW_MEAN, x.shape, expected.shape, dtype, [*pairs, (1, 1)], 0, 1)
    found = _run_step(step, x, torch.empty(expected.shape, dtype=dtype, memory_format=torch.channels_last))
    return error(found, expected, dtype)


def joined_cases() -> Iterator[tuple]:
    """Arguments of `joined`."""
    facts = (native.ACTIVATION_CODES, (False, True), (F32, BF16))
    return itertools.product(SIZES, CHANNELS, *facts)


def joined(size, channels: int, activation: str, gated: bool, dtype: torch.dtype) -> float:
    """How near `activation(x * gate + residual)` is to float64."""
    torch.manual_seed(0)
    n, h, w = size
    x, residual, gate = maps((n, channels, h, w), dtype), maps((n, channels, h, w), dtype), torch.rand(n, channels)
    vectors = native.padded(torch.ones(channels)), native.padded(torch.zeros(channels))
    problem = NormActProblem(x.shape, activation, gated, dtype, "cpu")
    step = native.affine_step(problem, *vectors, 0, 0, 2 if gated else -1, 1)
    z = x.double() * (gate.double()[:, :, None, None] if gated else 1) + residual.double()
    native.Program([step], vectors, [*map(native.Place, range(3))])([t.data_ptr() for t in (x, residual, gate)])
    return error(x, ACTIVATIONS[activation].function(z), dtype)


def average_cases() -> Iterator[tuple]:
    """Arguments of `average`, each also with a norm and activation before."""
    for size, channels, dtype in itertools.product(SIZES, CHANNELS, (F32, BF16)):
        for before in (None, *native.ACTIVATION_CODES):
            yield size, channels, dtype, before


def average(size, channels: int, dtype: torch.dtype, before: str | None) -> tuple[Tensor, float]:
    """The means of a map, and how near they are to float64."""
    torch.manual_seed(0)
    n, h, w = size
    x = maps((n, channels, h, w), dtype) + 1
    step, expected = native.average_step(x.shape, dtype, 0, 1), x.double()
    if before is not None:
        scale, shift = torch.randn(channels), torch.randn(channels)
        vectors = native.padded(scale), native.padded(shift)
        step.scale, step.shift = (vector.data_ptr() for vector in vectors)
        step.before = native.ACTIVATION_CODES[before]
        expected = expected * scale.double()[:, None, None] + shift.double()[:, None, None]
        expected = ACTIVATIONS[before].function(expected)
    y = _run_step(step, x, torch.empty(n, channels, dtype=dtype))
    return y, error(y, expected.mean((2, 3)), dtype)


def _run_step(step, x: Tensor, y: Tensor) -> Tensor:
    native.Program([step], None, [native.Place(0), native.Place(1)])([x.data_ptr(), y.data_ptr()])
    return y


NETWORKS = "regnetx_002", "regnety_002", "regnetz_b16", "repvgg_a0", "resnetv2_50"


def networks() -> Iterator[str]:
    """Whole programs with one thread to four, and two at a time: those that give another result than with one."""
    for name, dtype in itertools.product(NETWORKS, (F32, BF16)):
        model = timm.create_model(name, num_classes=10).eval()
        randomize_bn(model, 0)
        model = regnet_fast.rebuild(model).model.to(dtype)
        images = torch.randn(2, 3, 45, 37, dtype=dtype)

        def run(threads: int, model=model, images=images) -> Tensor:
            with torch.inference_mode(), regnet_fast.backend("native"):
                torch.set_num_threads(threads)
                return model(images)

        expected = run(1)
        with ThreadPoolExecutor() as pool:
            pairs = [(*pool.map(run, (threads, threads)), run(threads)) for threads in (1, 2, 3, 4)]
        if not expected.isfinite().all() or any(not torch.equal(y, expected) for pair in pairs for y in pair):
            yield f"{name} in {dtype}"


def main() -> None:
    assert not (wrong := list(networks())), wrong
    digest, worst = hashlib.sha256(), 0.0
    for p in problems():
        y, _, near = computed(p)
        digest.update(y.float().contiguous().numpy().tobytes())
        worst = max(worst, near)
    for p in itertools.islice(problems(), 0, None, 7):
        assert one_result(p), p
    for activation, dtype in itertools.product(native.ACTIVATION_CODES, (F32, BF16)):
        assert activated(activation, dtype) < 1, (activation, dtype)
    for case in through_cases():
        worst = max(worst, through(*case))
    for case in largest_cases():
        y, expected = largest(*case)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    for case in window_mean_cases():
        worst = max(worst, window_mean(*case))
    for case in joined_cases():
        worst = max(worst, joined(*case))
    for case in average_cases():
        worst = max(worst, average(*case)[1])
    print(digest.hexdigest(), native._library().lanes(), f"{worst:.3f}")


if __name__ == "__main__":
    main()
