"""The convolution kernels in the interpreter against float64, every configuration, on shapes that fill no tile."""

import pytest
import torch
import torch.nn.functional as F
from configurations import interpreted
from helpers import assert_close_to_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from regnet_fast.backends import Geometry, reference
from regnet_fast.kernels import common, depthwise_conv, implicit_gemm, pointwise_conv, pointwise_pair, tables
from regnet_fast.kernels.pointwise_conv import Shape, config_supports

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE = ((1, 1), (1, 1))
GROUP_WIDTHS = (4, 8, 16, 24, 40, 48, 56, 64, 112)


def nhwc(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def judge(y, x, weight, bias, gate, residual, stride, padding, dilation, groups, activation):
    """Our result against float64 and against plain torch in float32, rounded."""
    geometry = Geometry(stride, padding, dilation, groups)
    gated = x if gate is None else (x.float() * gate.float()[:, :, None, None]).to(x.dtype)

    def compute(dtype):
        operands = [None if t is None else t.to(dtype) for t in (gated, weight, bias)]
        return reference.conv(*operands, None, None if residual is None else residual.to(dtype), geometry, activation)

    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_reference(y, compute(torch.float32).to(y.dtype), compute(torch.float64), "kernel", groups)


def affine(channels: int, activation: str | None) -> tuple | None:
    """Scale, shift and activation, or None for None."""
    return None if activation is None else (torch.randn(channels), torch.randn(channels), activation)


def normalised(x: torch.Tensor, gate: torch.Tensor | None, norm: tuple | None) -> torch.Tensor:
    """`activation(x * scale * gate + shift)` in float32, rounded to x's dtype."""
    if norm is None:
        return x
    scale, shift, activation = norm
    column = scale[None] if gate is None else scale * gate.float()
    z = x.float() * column[:, :, None, None] + shift[:, None, None]
    return reference.activate(z, activation).to(x.dtype)


def pointwise(
    guarded, n, c, h, w, k, dtype, stride=1, activation="none", gate=True, residual=True, bias=True,
    norm=None, residual_norm=None, **more,
):  # fmt: skip
    x, weight = nhwc(n, c, h, w, dtype=dtype), (torch.randn(k, c) / c**0.5).to(dtype)
    bias = torch.randn(k) if bias else None
    gate = torch.rand(n, c).to(dtype) if gate else None
    size = ((h - 1) // stride + 1, (w - 1) // stride + 1)
    residual = nhwc(n, k, *size, dtype=dtype) if residual else None
    norm, residual_norm = affine(c, norm), affine(k, residual_norm if residual is not None else None)
    norms = {
        name: None if one is None else (guarded(one[0]), guarded(one[1]), one[2])
        for name, one in (("norm", norm), ("residual_norm", residual_norm))
    }
    y = pointwise_conv.pointwise_conv(
        *map(guarded, (x, weight, bias, gate, residual)), **norms, stride=stride, activation=activation, **more
    )
    if norm is not None:
        x, gate = normalised(x, gate, norm), None
    if residual_norm is not None:
        residual = normalised(residual, None, residual_norm)
    judge(y, x, weight[:, :, None, None], bias, gate, residual, (stride, stride), (0, 0), (1, 1), 1, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize(
    ("n", "c", "h", "w", "k", "stride"),
    [(2, 24, 5, 7, 40, 1), (3, 72, 6, 5, 24, 2), (1, 300, 3, 3, 152, 1), (2, 8, 4, 4, 7, 1), (1, 3, 9, 8, 33, 2)],
)
def test_pointwise_conv(guarded, n, c, h, w, k, stride, activation, dtype):
    pointwise(guarded, n, c, h, w, k, dtype, stride, activation)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_pointwise_conv_without_its_optional_operands(guarded, gate, residual, bias):
    pointwise(guarded, 2, 40, 5, 3, 24, torch.float32, gate=gate, residual=residual, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("norm", "residual_norm"), [("relu", None), ("silu", "relu"), (None, "silu"), ("none", "none")]
)
@pytest.mark.parametrize(("c", "k", "stride"), [(24, 40, 1), (300, 72, 2)])
def test_pointwise_conv_of_maps_that_it_normalises(guarded, c, k, stride, norm, residual_norm, gate, dtype):
    pointwise(guarded, 2, c, 5, 4, k, dtype, stride, gate=gate, norm=norm, residual_norm=residual_norm)


FORMS = {
    "streamed": lambda m: pointwise_conv.Config(m, 32, 32, 4, 2, False),
    "resident": lambda m: pointwise_conv.Config(m, 32, 128, 4, 2, True),
    "resident in two": lambda m: pointwise_conv.Config(m, 32, 64, 4, 2, True, 16),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("n", "h", "w", "block_m", "images"),
    [
        *((2, 8, 8, 64, 1), (3, 16, 8, 64, 1), (2, 14, 14, 64, 2), (3, 7, 9, 64, 2), (5, 7, 7, 128, 4)),
        *((9, 4, 4, 64, 4), (7, 7, 7, 64, 3), (1, 7, 9, 128, 4), (9, 3, 3, 64, 8), (70, 1, 1, 32, 32)),
    ],
)
def test_gates_of_tiles_that_reach_over_images(guarded, n, h, w, block_m, images, form, dtype):
    """One, two, a few and many; the last tile is not full."""
    config = FORMS[form](block_m)
    assert config.images(h * w) == images
    pointwise(guarded, n, 72, h, w, 40, dtype, norm="relu" if n == 5 else None, config=config)


@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_a_tile_knows_how_many_images_it_reaches(block_m):
    config = pointwise_conv.Config(block_m, 32, 32, 4, 2, False)
    assert config.images(0) == 0
    for area in range(1, 300):
        starts = range(0, area * block_m, block_m)
        assert config.images(area) == max((at + block_m - 1) // area - at // area + 1 for at in starts), area


def pair(guarded, n, c, h, w, k, k2, dtype, stride=2, activation="relu", bias=True, norm=None, **more):
    x = nhwc(n, c, h, w, dtype=dtype)
    weights = [(torch.randn(k, c) / c**0.5).to(dtype) for k in (k, k2)]
    biases = [torch.randn(k) if bias else None for k in (k, k2)]
    norm = affine(c, norm)
    found = pointwise_pair.pointwise_pair(
        *map(guarded, (x, weights[0], biases[0], weights[1], biases[1])),
        norm=None if norm is None else (guarded(norm[0]), guarded(norm[1]), norm[2]),
        stride=stride, activation=activation, **more,
    )  # fmt: skip
    x = normalised(x, None, norm)
    for y, weight, b, step, after in zip(found, weights, biases, (1, stride), (activation, "none"), strict=True):
        judge(y, x, weight[:, :, None, None], b, None, None, (step, step), (0, 0), (1, 1), 1, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "relu"])
@pytest.mark.parametrize(
    ("n", "c", "h", "w", "k", "k2", "stride"),
    [(3, 24, 7, 5, 40, 72, 2), (1, 200, 3, 3, 17, 300, 2), (2, 32, 12, 11, 16, 24, 1), (2, 8, 1, 1, 8, 8, 2)],
)
def test_pointwise_pair(guarded, n, c, h, w, k, k2, stride, norm, dtype):
    pair(guarded, n, c, h, w, k, k2, dtype, stride, norm=norm)


@settings(max_examples=25)
@given(data=st.data())
def test_any_pointwise_pair(data):
    draw = data.draw
    n, c, h, w, k, k2 = (draw(st.integers(1, most)) for most in (3, 80, 15, 15, 80, 80))
    pair(
        lambda t: t, n, c, h, w, k, k2, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from(["none", "relu", "silu"])), draw(st.booleans()), draw(st.sampled_from([None, "relu"])),
    )  # fmt: skip


@pytest.fixture
def processors(monkeypatch):
    """A function that sets how many the interpreter stands in for."""

    def stand_in(count):
        monkeypatch.setattr(common, "INTERPRETED", (90, count))
        tables.forget()

    yield stand_in
    tables.forget()


RESIDENT = [
    (3, 24, 7, 5, 40, 72, 2, (32, 32, 32, 0)),
    (1, 72, 9, 11, 72, 216, 2, (32, 64, 64, 16)),
    (2, 216, 5, 7, 24, 40, 3, (32, 32, 128, 128)),
    (1, 576, 7, 9, 40, 17, 2, (32, 32, 512, 64)),
    (2, 40, 12, 5, 16, 24, 1, (32, 32, 32, 16)),
    (2, 20, 1, 1, 40, 72, 2, (64, 32, 16, 16)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "bias", "count"), [(None, True, 1), ("relu", False, 3), ("silu", True, 60)])
@pytest.mark.parametrize(("n", "c", "h", "w", "k", "k2", "stride", "tile"), RESIDENT)
@pytest.mark.usefixtures("unchecked_integers")
def test_a_pair_of_resident_weights(processors, guarded, n, c, h, w, k, k2, stride, tile, norm, bias, count, dtype):
    """Each program walks over all tiles, some, or one."""
    processors(count)
    config = pointwise_pair.Config(*tile[:3], 4, 2, True, tile[3])
    pair(guarded, n, c, h, w, k, k2, dtype, stride, bias=bias, norm=norm, config=config)


@pytest.mark.parametrize(
    ("pixels", "channels", "widths", "config", "expected"),
    [
        (256 * 112**2, 32, (72, 72), (64, 128, 32), [211, 53]),
        (256 * 56**2, 72, (216, 216), (64, 128, 64, 16), [105, 27]),
        (256 * 14**2, 576, (1512, 1512), (32, 128, 512, 64), [8, 2]),
        (14**2, 32, (72, 72), (64, 128, 32), [4, 1]),
        (256 * 14**2, 32, (72, 33000), (64, 128, 32), [4, 1]),
    ],
)
def test_programs_are_shared_out_by_work(pixels, channels, widths, config, expected):
    """Two on each of 132 processors, or one where the weights fill its memory, no more of the strided one than it needs
    to keep up.
    """
    shape = pointwise_pair.Shape(pixels, channels, *widths, 2, 2, False, False, 90, 132)
    config = pointwise_pair.Config(*config[:3], 4, 2, True, *config[3:])
    found = pointwise_pair.programs(config, *shape.both)
    assert found == expected
    across = [config.tiles(one)[0] for one in shape.both]
    together = 132 if config.block_k == 512 else 264
    assert sum(a * b for a, b in zip(across, found, strict=True)) <= together


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("config", interpreted(pointwise_pair.CONFIGS), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_pointwise_pair(guarded, config, dtype):
    c = config.kept - 3 if config.resident else config.block_k + 13
    shape = pointwise_pair.Shape(207, c, 70, 40, dtype.itemsize, 2, False, False, 90, 1)
    if pointwise_pair.config_supports(config, shape):
        pytest.skip("it does not fit")
    pair(guarded, 1, c, 23, 9, 70, 40, dtype, config=config)


def pointwise_shape(config, dtype) -> dict:
    """More pixels than a tile, channels that fill no tile; two images, so that tiles cross from one to the next."""
    c = config.kept - 3 if config.resident else config.block_k + 13
    return {"n": 2, "c": c, "h": config.block_m // 2 + 15, "w": 1, "k": min(config.block_n + 5, 70), "dtype": dtype}


def pointwise_fits(config, dtype) -> bool:
    facts = pointwise_shape(config, dtype)
    operands = (dtype.itemsize, facts["h"], True, 1, dtype == torch.float32)
    shape = Shape(facts["n"] * facts["h"], facts["c"], facts["k"], *operands, 90, 1)
    return config_supports(config, shape) is None


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(c, dtype) for c in interpreted(pointwise_conv.CONFIGS) for dtype in DTYPES[:2] if pointwise_fits(c, dtype)],
    ids=str,
)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_pointwise_conv(guarded, config, dtype):
    pointwise(guarded, **pointwise_shape(config, dtype), config=config)


def test_a_configuration_that_does_not_fit_is_refused():
    shape = Shape(100, 200, 64, 4, 0, False, 1, True, 86, 84)
    too_large = pointwise_conv.Config(128, 64, 256, 4, 3, True)
    assert "shared memory, sm_86 has" in config_supports(too_large, shape)
    assert "128 channels of weights stay" in config_supports(pointwise_conv.Config(64, 64, 128, 4, 2, True), shape)
    for arch in (80, 86, 89, 90, 100, 120):
        for size in (2, 4):
            for channels in (3, 24, 232, 1512, 7392):
                for pixels in (49, 50000):
                    shape = Shape(pixels, channels, channels, size, 49, True, 1, size == 4, arch, 132)
                    assert config_supports(pointwise_conv.heuristic(shape), shape) is None


@settings(max_examples=25)
@given(data=st.data())
def test_any_pointwise_conv(data):
    draw = data.draw
    n, c, h, w, k = (draw(st.integers(1, most)) for most in (3, 80, 9, 9, 80))
    pointwise(
        lambda t: t, n, c, h, w, k, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 2])),
        draw(st.sampled_from(["none", "relu", "silu"])), draw(st.booleans()), draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from([None, "relu"])), draw(st.sampled_from([None, "silu"])),
    )  # fmt: skip


def convolve(guarded, n, c, h, w, k, groups, dtype, size, stride, padding, dilation, activation="relu", **more):
    x = nhwc(n, c, h, w, dtype=dtype)
    depthwise = groups == c == k and groups > 1
    x = x.contiguous() if more.pop("channels_first", False) and not depthwise else x
    weight = (torch.randn(k, c // groups, *size) / (c // groups * size[0] * size[1]) ** 0.5).to(dtype)
    bias, means = torch.randn(k), more.pop("means", False)
    geometry = (stride, padding, dilation)
    if depthwise:
        packed = depthwise_conv.packed_weight(weight)
        y, parts = depthwise_conv.depthwise_conv(
            *map(guarded, (x, packed, bias)), size, *geometry, activation, means, **more
        )
        residual = None
    else:
        shape = F.conv2d(x.float(), weight.float(), None, *geometry, groups).shape
        residual = None if means else nhwc(*shape, dtype=dtype)
        packed = implicit_gemm.packed_weight(weight)
        y, parts = implicit_gemm.convolution(
            *map(guarded, (x, packed, bias, residual)), size, *geometry, groups, activation, means, **more
        )
    judge(y, x, weight, bias, None, residual, *geometry, groups, activation)
    if means:
        assert parts.dtype == torch.float32
        torch.testing.assert_close(parts.sum(1), y.float().mean((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", GROUP_WIDTHS)
def test_grouped_conv(guarded, width, stride, dtype):
    channels = 3 * width if width < 64 else 2 * width
    convolve(guarded, 2, channels, 7, 5, channels, channels // width, dtype, (3, 3), (stride, stride), *ONE, means=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("c", "k", "size", "stride", "padding", "dilation"),
    [
        (3, 32, (3, 3), (2, 2), (1, 1), (1, 1)),
        (3, 24, (7, 7), (2, 2), (3, 3), (1, 1)),
        (64, 96, (3, 3), (1, 1), (1, 1), (1, 1)),
        (20, 7, (3, 3), (1, 1), (2, 2), (2, 2)),
        (9, 16, (1, 3), (1, 2), (0, 1), (1, 1)),
        (16, 8, (1, 1), (2, 1), (0, 0), (1, 1)),
    ],
)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_dense_conv(guarded, c, k, size, stride, padding, dilation, activation, dtype):
    convolve(guarded, 2, c, 11, 9, k, 1, dtype, size, stride, padding, dilation, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "k", "size", "groups"), [(3, 32, 3, 1), (3, 24, 7, 1), (24, 24, 3, 3), (1, 8, 3, 1)])
def test_images_as_they_come(guarded, c, k, size, groups, dtype):
    convolve(
        guarded, 2, c, 11, 9, k, groups, dtype, (size, size), (2, 2), (size // 2,) * 2, (1, 1), "relu",
        means=groups > 1, channels_first=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_dilated_groups(guarded, dilation, dtype):
    convolve(guarded, 1, 48, 9, 9, 48, 2, dtype, (3, 3), (1, 1), (dilation,) * 2, (dilation,) * 2, "silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [8, 37, 150])
def test_depthwise_conv(guarded, channels, stride, dtype):
    convolve(guarded, 2, channels, 9, 7, channels, channels, dtype, (3, 3), (stride, stride), *ONE, "silu", means=True)


def implicit_gemm_fits(config, dtype) -> bool:
    operands = (dtype.itemsize, False, True, dtype == torch.float32)
    shape = implicit_gemm.Shape(150, 150, 2, 24, 24, 9, 1, *operands, 90, 1)
    return implicit_gemm.config_supports(config, shape) is None


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(c, dtype) for c in interpreted(implicit_gemm.CONFIGS) for dtype in DTYPES[:2] if implicit_gemm_fits(c, dtype)],
    ids=str,
)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_implicit_gemm(guarded, config, dtype):
    convolve(guarded, 1, 48, 15, 10, 48, 2, dtype, (3, 3), (1, 1), *ONE, means=True, config=config)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("config", interpreted(depthwise_conv.CONFIGS), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_depthwise_conv(guarded, config, dtype):
    convolve(guarded, 2, 40, 9, 9, 40, 40, dtype, (3, 3), (1, 1), *ONE, means=True, config=config)


@settings(max_examples=25)
@given(data=st.data())
def test_any_convolution(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    groups = draw(st.integers(1, 4))
    width, out_width = (draw(st.integers(1, 40)) for _ in range(2))
    size, dilation = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
    h, w = (draw(st.integers(dilation * (size - 1) + 1, 12)) for _ in range(2))
    padding = draw(st.integers(0, dilation * (size // 2)))
    convolve(
        lambda t: t, draw(st.integers(1, 2)), groups * width, h, w, groups * out_width, groups, dtype, (size, size),
        (draw(st.integers(1, 2)),) * 2, (padding, padding), (dilation, dilation),
        draw(st.sampled_from(["none", "silu"])), means=draw(st.booleans()), channels_first=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay(dtype):
    x = torch.zeros(1, 8, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 1, 2, 2] = float("nan"), float("inf")
    weight = torch.eye(8, dtype=dtype)
    y = pointwise_conv.pointwise_conv(x, weight, activation="relu")
    assert y[0, :, 0, 0].isnan().all() and y[0, 1, 2, 2] == float("inf")
    y, _ = implicit_gemm.convolution(
        x,
        implicit_gemm.packed_weight(weight[:, :, None, None]),
        None,
        None,
        (1, 1),
        *ONE[:1],
        (0, 0),
        (1, 1),
        1,
        "relu",
    )
    assert y[0, :, 0, 0].isnan().all()
