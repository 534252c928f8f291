"""The passes of a training step in the interpreter against float64, every configuration."""

import numpy as np
import pytest
import torch
from configurations import interpreted
from helpers import assert_close_to_reference
from torch.nn import functional as F

from regnet_fast.kernels import channel_statistics, channel_tiles, training_join, training_passes
from regnet_fast.kernels.channel_tiles import CONFIGS, Config, Shape, config_supports, heuristic
from regnet_fast.kernels.training_join import ReadMap

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACT = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}
SIZES = ((3, 52, 5, 7), (1, 1000, 1, 1), (2, 264, 1, 3), (1, 331, 3, 2), (2, 7, 9, 9))
FEW = (CONFIGS[0], CONFIGS[-1])


def maps(size, dtype, count=1):
    found = [torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(count)]
    return found[0] if count == 1 else found


def term(size, dtype, activation="none", factor=None, norm=True, affine=True):
    """A map with a random norm, and a factor for each image or each of its channels."""
    n, c = size[:2]
    values = {}
    if norm:
        values = {"mean": torch.randn(c) / 3, "var": torch.rand(c) + 0.5, "eps": 1e-3}
    if norm and affine:
        values |= {"weight": torch.rand(c) + 0.5, "bias": torch.randn(c) / 2}
    scale = {None: None, "image": (n,), "channel": (n, c)}[factor]
    factor = None if scale is None else torch.rand(scale).to(dtype)
    return ReadMap(maps(size, dtype), activation=activation, factor=factor, **values)


def between_nans(guarded, one):
    return one._replace(**{k: guarded(v) for k, v in one._asdict().items() if isinstance(v, torch.Tensor)})


def summed(t, keep=0):
    """A sum over images and pixels, or over the pixels of each image: in float32 one after another."""
    rows = t.detach().movedim(1, -1).flatten(keep, 2)
    if t.dtype == torch.float64:
        return rows.sum(keep)
    return torch.from_numpy(np.add.accumulate(rows.numpy(), keep, np.float32)).select(keep, -1)


def column(t):
    return t[:, :, None, None] if t.dim() == 2 else t[:, None, None, None]


def normalised(one, dtype):
    """xhat, and the map before its activation, with its gradient kept."""
    if one.mean is None:
        z = one.x.to(dtype).detach().requires_grad_()
        return z, z
    mean, var = (t.to(dtype)[:, None, None] for t in (one.mean, one.var))
    xhat = (one.x.to(dtype) - mean) / (var + one.eps).sqrt()
    z = xhat if one.weight is None else xhat * one.weight.to(dtype)[:, None, None] + one.bias.to(dtype)[:, None, None]
    return xhat, z.detach().requires_grad_()


def value(one, z):
    a = ACT[one.activation](z)
    return a if one.factor is None else a * column(one.factor.to(z.dtype))


def composed(terms, activation, grad, dtype, extra=None):
    """The join, and for every term dz and its two sums: by autograd in a dtype."""
    pairs = [normalised(one, dtype) for one in terms]
    total = sum(value(one, z) for one, (_, z) in zip(terms, pairs, strict=True))
    y = ACT[activation](total)
    loss = (y * grad.to(dtype)).sum()
    if extra is not None:
        loss = loss + (ACT[terms[0].activation](pairs[0][1]) * column(extra.to(dtype))).sum()
    dzs = torch.autograd.grad(loss, [z for _, z in pairs])
    return y.detach(), [(dz, summed(dz * xhat), summed(dz)) for dz, (xhat, _) in zip(dzs, pairs, strict=True)]


def judge(found, terms, activation, grad, dtype, what, y=None, extra=None):
    """Gradients and sums by the rule; eager has the map's dtype, and float32 sums of what was rounded."""
    wide, exact = (composed(terms, activation, grad, d, extra)[1] for d in (torch.float32, torch.float64))
    for i, (one, eager, reference) in enumerate(zip(found, wide, exact, strict=True)):
        assert_close_to_reference(one.dz, eager[0].to(dtype), reference[0], f"{what}, dz{i}")
        if terms[i].mean is None:
            assert one.product is None and one.plain is None
            continue
        xhat = normalised(terms[i], torch.float32)[0]
        rounded = eager[0].to(dtype).float()
        eagers = summed(rounded * xhat), summed(rounded)
        for ours, theirs, true in zip(one[1:], eagers, reference[1:], strict=True):
            assert_close_to_reference(ours, theirs, true, f"{what}, sums{i}")


# Statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_statistics(guarded, size, dtype):
    for config in (None, *FEW):
        measure(guarded, maps(size, dtype), config)


@pytest.mark.parametrize("config", interpreted(CONFIGS), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_the_statistics(guarded, config):
    measure(guarded, maps((3, 52, 11, 13), torch.float16) + 1, config)


@pytest.mark.parametrize("mean", [32, 1000])
@pytest.mark.parametrize("config", [None, *FEW], ids=str)
def test_a_mean_far_from_zero_costs_no_digits(guarded, mean, config):
    measure(guarded, maps((4, 24, 16, 16), torch.float32) + mean, config)


def measure(guarded, x, config):
    found = channel_statistics.statistics(guarded(x), config=config)

    def compute(dtype):
        wide, pixels = x.to(dtype), x.numel() / x.shape[1]
        mean = summed(wide) / pixels
        return mean, summed((wide - mean[:, None, None]) ** 2) / pixels

    for ours, eager, exact in zip(found, compute(torch.float32), compute(torch.float64), strict=True):
        assert_close_to_reference(ours, eager, exact, "statistics")


def test_nan_reaches_its_channel_alone(guarded):
    x = maps((2, 24, 5, 5), torch.float32)
    x[1, 3, 4, 4] = torch.nan
    for found in channel_statistics.statistics(guarded(x)):
        assert found.isnan().nonzero().flatten().tolist() == [3]


# Joins


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_join_and_its_gradients(guarded, size, dtype):
    """What blocks join: norms of branches, stochastic depth, a shortcut, an identity."""
    cases = {
        "relu": ([term(size, dtype), term(size, dtype)], "relu"),
        "relu, depth": ([term(size, dtype, factor="image"), term(size, dtype, norm=False)], "relu"),
        "alone": ([term(size, dtype, "silu")], "none"),
        "plain": ([term(size, dtype, norm=False, factor="channel"), term(size, dtype, "relu", affine=False)], "none"),
        "three": ([term(size, dtype) for _ in range(3)], "relu"),
        "silu": ([term(size, dtype, "relu", "channel"), term(size, dtype, "silu", "image"), term(size, dtype)], "silu"),
    }
    for what, (terms, activation) in cases.items():
        both(guarded, terms, activation, dtype, what)


@pytest.mark.parametrize("config", interpreted(CONFIGS), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_join(guarded, config):
    size = (3, 52, 9, 7)
    terms = [term(size, torch.float16, factor="image"), term(size, torch.float16, norm=False)]
    both(guarded, terms, "relu", torch.float16, str(config), config)


def both(guarded, terms, activation, dtype, what, config=None):
    grad = maps(terms[0].x.shape, dtype)
    inputs = [between_nans(guarded, one) for one in terms]
    y = training_join.join(*inputs, activation=activation, config=config)
    eager, exact = (composed(terms, activation, grad, d)[0] for d in (torch.float32, torch.float64))
    assert_close_to_reference(y, eager.to(dtype), exact, what)
    backward = config if fits(config, inputs) else None
    kept = y if activation == "relu" else None
    found = training_join.join_backward(guarded(grad), kept, inputs, activation, config=backward)
    if activation == "relu" and not bool(((y > 0) == (exact > 0)).all()):
        return  # a rounding error changes a gradient by all of it
    judge(found, terms, activation, grad, dtype, what)


def fits(config, terms):
    sums = 2 * sum(one.mean is not None for one in terms)
    return config is None or config_supports(config, Shape(1, 9, 8, 2, 5, sums, 1)) is None


def test_needs(guarded):
    """Only what is needed is written, and what terms share is one map."""
    size, dtype = (2, 24, 3, 5), torch.float32
    terms, grad = (
        [term(size, dtype), term(size, dtype, norm=False), term(size, dtype, factor="image")],
        maps(size, dtype),
    )
    y = training_join.join(*terms, activation="relu")
    a, b, c = training_join.join_backward(grad, y, terms, "relu", [True, True, False])
    assert a.dz is b.dz and (c.dz, c.product, b.plain) == (None, None, None)
    a, b = training_join.join_backward(grad, None, terms[:2], "none")
    assert a.dz is b.dz is grad and a.product is not None
    (only,) = training_join.join_backward(grad, None, terms[1:2], "none")
    assert only == (grad, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_the_gradient_before_an_activation(guarded, activation, dtype):
    for size in SIZES[:4]:
        for factor in (None, "channel"):
            one = term(size, dtype, activation, factor)
            grad, extra = maps(size, dtype), torch.randn(size[:2]) if factor else None
            found = training_join.activation_backward(guarded(grad), between_nans(guarded, one), guarded(extra))
            judge([found], [one], "none", grad, dtype, f"{size}, {factor}", extra=extra)


@pytest.mark.parametrize("config", interpreted(c for c in CONFIGS if c.block_p * c.block_c <= 512 * c.warps), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_before_an_activation(guarded, config):
    """Those whose values and sums fit in the registers."""
    one = term((3, 52, 9, 7), torch.float32, "silu")
    grad = maps(one.x.shape, torch.float32)
    found = training_join.activation_backward(guarded(grad), between_nans(guarded, one), config=config)
    judge([found], [one], "none", grad, torch.float32, str(config))


# One map


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_raw_gradient(guarded, size, dtype):
    for given in range(4):
        affine(guarded, size, dtype, given & 1, given & 2)


@pytest.mark.parametrize("config", interpreted(CONFIGS), ids=str)
@pytest.mark.usefixtures("unchecked_integers")
def test_every_configuration_of_the_passes_over_one_map(guarded, config):
    affine(guarded, (3, 52, 9, 7), torch.float16, True, True, config)
    image_sums(guarded, (3, 52, 9, 7), torch.float16, "silu", True, config)


def affine(guarded, size, dtype, slope, identity, config=None):
    dz, y, other = maps(size, dtype, 3)
    a, q, k = torch.randn(3, size[1])
    given = (q, k) if slope else (None, None)
    other = other if identity else None
    found = training_passes.raw_gradient(*map(guarded, (dz, y, a, *given, other)), config=config)

    def compute(dtype):
        result = dz.to(dtype) * a.to(dtype)[:, None, None]
        if slope:
            result = result + y.to(dtype) * q.to(dtype)[:, None, None] + k.to(dtype)[:, None, None]
        return result if other is None else result + other.to(dtype)

    assert_close_to_reference(found, compute(torch.float32).to(dtype), compute(torch.float64), "raw gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_over_images(guarded, size, dtype):
    for activation, times in (("none", False), ("relu", True), ("silu", True)):
        image_sums(guarded, size, dtype, activation, times)


def image_sums(guarded, size, dtype, activation, times, config=None):
    one, other = term(size, dtype, activation), maps(size, dtype) if times else None
    parts = training_passes.image_parts(between_nans(guarded, one), guarded(other), 0.25, config=config)

    def compute(dtype):
        a = ACT[activation](normalised(one, dtype)[1])
        return summed(a if other is None else a * other.to(dtype), 1) * 0.25

    assert_close_to_reference(channel_tiles.total(parts), compute(torch.float32), compute(torch.float64), "image sums")


# All of them


@pytest.mark.parametrize("tiles", [1, 2, 64, 65, 130])
def test_parts_are_added_whatever_their_number(guarded, tiles):
    parts = torch.randn(2, tiles, 37)
    found = channel_tiles.total(guarded(parts))
    assert_close_to_reference(found, parts.sum(1), parts.double().sum(1), "total")


def test_equal_inputs_give_equal_bits():
    size = (4, 24, 9, 7)
    one, grad = term(size, torch.float32, "silu"), maps(size, torch.float32)
    for config in (None, CONFIGS[0]):
        runs = [
            (*channel_statistics.statistics(grad, config), *training_join.activation_backward(grad, one, config=config))
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_heuristics_fit():
    """Many tiles for each processor, or as many as there are; registers for all sums."""
    for channels in (8, 24, 64, 152, 336, 2240):
        for pixels in (1, 49, 12544, 256 * 12544):
            for maps_, sums in ((1, 2), (3, 2), (5, 4), (8, 6)):
                shape = Shape(1, pixels, channels, 2, maps_, sums, 132)
                config = heuristic(shape)
                assert config_supports(config, shape) is None
                programs = channel_tiles.tiles(config, shape) * -(-channels // config.block_c)
                assert config.steps == 1 or programs >= 4 * 132
    assert "do not fit in the registers" in config_supports(Config(128, 64, 1, 4), shape)
