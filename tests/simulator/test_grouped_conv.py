"""The grouped convolution in the simulator against float64."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_reference

from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import GroupedConv, Target, grouped_forward
from simulator.machine import ORDERS, SimulationError, flattened, run

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}
FORWARD = ACTIVATIONS | {
    **{"relu6": F.relu6, "hardswish": F.hardswish},
    **{"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid},
}
"""Those of inference."""


def nhwc(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def packed(weight):
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()


class Forward:
    """A problem with random operands; `run` computes it in the simulator, `check` judges it."""

    def __init__(self, problem, activation="none", parts=False, bias=True, read=None, moments=False):
        self.problem, self.activation, self.read = problem, activation, read
        dtype, channels = DTYPES[problem.dtype], problem.channels
        in_channels = problem.in_channels or channels
        self.x = nhwc(problem.images, in_channels, problem.height, problem.columns, dtype=dtype)
        self.in_weight = (torch.randn(channels, in_channels) / in_channels**0.5).to(dtype)
        self.in_bias = torch.randn(channels) if bias else None
        self.weight = (torch.randn(channels, problem.width, 3, 3) / (9 * problem.width) ** 0.5).to(dtype)
        self.bias = torch.randn(channels) if bias else None
        self.scale, self.shift = torch.rand(channels) + 0.5, torch.randn(channels)
        self.has_parts, self.has_moments = parts, moments

    def run(self, order="ascending", text=None, target=Target(arch=90, processors=3), config=None):  # noqa: B008
        p = self.problem
        training = {"read": self.read, "moments": self.has_moments}
        launch = plans.grouped_conv_forward(p, self.activation, self.has_parts, target, config, **training)
        y = nhwc(p.images, p.channels, *p.out_size, dtype=self.x.dtype).fill_(torch.nan)
        outputs = {"y": y, "parts": None, "moments": None}
        outputs |= {name: torch.full(shape, torch.nan) for name, shape in launch.buffers.items()}
        inputs = {"x": self.x, "weight": packed(self.weight), "bias": self.bias}
        given = ("in_weight", "in_bias") if p.in_channels else ("scale", "shift") if self.read else ()
        inputs |= dict.fromkeys(READS) | {name: getattr(self, name) for name in given}
        run(launch, inputs, outputs, order, text)
        return y, outputs["moments"] if self.has_moments else outputs["parts"]

    def expected(self, dtype):
        bias, x = None if self.bias is None else self.bias.to(dtype), self.x.to(dtype)
        if self.problem.in_channels:
            in_bias = None if bias is None else self.in_bias.to(dtype)
            x = F.conv2d(x, self.in_weight.to(dtype)[:, :, None, None], in_bias)
        elif self.read:
            x = x * self.scale.to(dtype)[:, None, None] + self.shift.to(dtype)[:, None, None]
        if self.read:
            x = FORWARD[self.read](x)
            x = x if dtype == torch.float64 else x.to(self.x.dtype).to(dtype)
        y = F.conv2d(x, self.weight.to(dtype), bias, self.problem.stride, 1, 1, self.problem.groups)
        return FORWARD[self.activation](y)

    def check(self, *args, **kwargs):
        y, sums = self.run(*args, **kwargs)
        eager = self.expected(torch.float32).to(y.dtype)
        assert_close_to_reference(y, eager, self.expected(torch.float64), str(self.problem), self.problem.groups)
        if self.has_parts:
            means = y.double().mean((2, 3))
            torch.testing.assert_close(sums.double().sum(1), means, rtol=1e-5, atol=1e-6)
        if self.has_moments:
            self.check_moments(y, sums)
        return y, sums

    @staticmethod
    def check_moments(y, moments):
        """Merged by their own kernel they are the statistics of the rounded results."""
        launch = plans.merged_moments(len(moments), moments.shape[2])
        merged = {name: torch.full(shape, torch.nan) for name, shape in launch.buffers.items()}
        run(launch, {"moments": moments}, merged, "random")
        var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        assert (moments[:, 0].sum(0) == y.numel() / y.shape[1]).all()
        torch.testing.assert_close(merged["mean"].double(), mean, rtol=1e-6, atol=1e-6)
        rtol = 1e-5 + 1e-7 * float((mean.abs() / (var.sqrt() + 1e-3)).max())
        torch.testing.assert_close(merged["var"].double(), var, rtol=rtol, atol=1e-6)


READS = ("scale", "shift", "in_weight", "in_bias")
NARROW = (8, 16, 24, 40, 48, 56, 64)
WIDE = (72, 112, 232)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", (*NARROW, *WIDE))
def test_widths(width, stride):
    """More groups than a slab has and a number of them that fills none; tiles overhang; two images, three workers."""
    groups = 1 if width > 64 else max(2, 80 // width)
    dtype = "bfloat16" if width % 16 else "float16"
    Forward(GroupedConv(2, 15, 9, groups, width, stride, dtype), "relu", parts=True).check()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [8, 24, 64, 112])
def test_training(width, stride):
    """A raw map read through its norm, a raw result, and its moments: a worker for some tiles and one for each."""
    groups, dtype = (1, "float16") if width > 64 else (max(2, 80 // width), "bfloat16")
    problem, read = GroupedConv(2, 15, 9, groups, width, stride, dtype), "silu" if stride == 1 else "relu"
    one = Forward(problem, read=read, bias=False, moments=True)
    one.check()
    one.check("random", target=Target(90, 64))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", NARROW)
@pytest.mark.parametrize("in_channels", [8, 72, 128])
def test_a_convolution_in_front(in_channels, width, stride):
    """The map between is of fewer and of more channels than x, of a number of groups that fills no slab."""
    groups, dtype = max(2, 80 // width), "bfloat16" if width % 16 else "float16"
    problem = GroupedConv(2, 15, 9, groups, width, stride, dtype, in_channels)
    if width >= 40 and stride == 2 and in_channels == 128:  # a tile of it would be too large
        assert "no tile" in plans.refuse_in_front(problem, Target())
        with pytest.raises(ValueError, match="no configuration"):
            plans.grouped_conv_forward(problem, read="relu")
        return
    Forward(problem, "silu", parts=True, read="relu").check()
    Forward(problem, "none", bias=False, read="silu").check("random", target=Target(90, 64))


def test_the_padding_behind_a_convolution_in_front_is_zero():
    """Not the activation of its bias."""
    for stride in (1, 2):
        one = Forward(GroupedConv(1, 3, 2, 2, 16, stride, "float16", 24), read="relu")
        one.in_bias += 30
        one.check()
    Forward(GroupedConv(1, 1, 1, 5, 24, 1, "bfloat16", 40), read="silu").check()


@pytest.mark.parametrize("activation", FORWARD)
def test_every_activation(activation):
    """Of values on both sides of its bends; NaN and infinity stay what they are in torch."""
    for in_channels in (0, 16):
        one = Forward(GroupedConv(1, 9, 9, 2, 8, 1, "float16", in_channels), activation, read=activation)
        one.x *= 4
        one.check()
    one = Forward(GroupedConv(1, 5, 5, 1, 8, 1, "float16"), activation, bias=False)
    one.weight[:, :, [0, 2]] = one.weight[:, :, :, [0, 2]] = 0
    one.x[0, :, 1, 1], one.x[0, :, 3, 3] = torch.nan, -torch.inf
    one.weight.abs_()
    y, _ = one.run()
    assert torch.equal(y.isnan(), one.expected(torch.float32).isnan())


@pytest.mark.parametrize("mean", [40.0, 3000.0])
def test_moments_far_from_zero(mean):
    """As many digits as a float32 mean leaves: float32 squares of such a mean would hold none of the variance."""
    one = Forward(GroupedConv(3, 9, 7, 3, 24, 1, "float16"), read="none", moments=True)
    one.weight *= 0.25
    one.bias = torch.full((72,), mean)
    y, moments = one.run()
    one.check_moments(y, moments)
    assert (y.float().std((0, 2, 3)) < mean / 50).all()


def test_the_padding_is_zero_behind_the_activation():
    """Not the activation of the shift."""
    for stride in (1, 2):
        one = Forward(GroupedConv(1, 3, 2, 2, 16, stride, "float16"), bias=False, read="relu", moments=True)
        one.shift += 30
        one.check()


def test_one_pixel():
    Forward(GroupedConv(1, 1, 1, 5, 24, 1, "bfloat16")).check()
    Forward(GroupedConv(1, 1, 1, 5, 24, 1, "bfloat16"), read="relu", moments=True).check()


def test_activations_orders_and_equal_bits():
    """The same bits in every order of the warps; without a bias; batch 1."""
    problem, moments = GroupedConv(1, 13, 17, 4, 24, 1, "bfloat16"), {"read": "silu", "moments": True}
    for activation in (*ACTIVATIONS, None):
        options = moments if activation is None else {"parts": True, "bias": activation != "none"}
        one = Forward(problem, activation or "none", **options)
        results = [one.check(order) for order in ORDERS]
        for y, parts in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(parts, results[0][1])


def test_infinities_stay_where_they_are():
    """No term of a padded sum, no pixel beside the tile and no other group takes part in a result."""
    one = Forward(GroupedConv(1, 9, 9, 3, 24, 1, "float16"))
    one.x[0, 25, 4, 4] = torch.inf
    y, _ = one.run()
    beyond = ~y.isfinite()
    assert beyond[0, 24:48, 3:6, 3:6].all() and int(beyond.sum()) == 24 * 9


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_machines(arch):
    """Where there is less shared memory wide groups take their weights with each step."""
    for width in (56, 64):
        Forward(GroupedConv(2, 9, 9, 2, width, 2, "bfloat16")).check(target=Target(arch, 2))


BUGS = {
    "missing barrier": ("        sync_block();  // this step's", "        // this step's", "barrier|not arrived|never"),
    "missing wait": ("        wait_copies<STAGES - 2>();\n", "", "not arrived"),
    "a stage too few": (
        "copies.copy(stage,",
        "copies.copy(stages,",
        "barrier|not arrived",
    ),
    "missing warp barrier": (
        "            sync_warp();\n            char* first",
        "            char* first",
        "without a barrier|never",
    ),
    "missing barrier for the sums": (
        "            sync_block();  // the warps' sums",
        "            // the warps' sums",
        "without|never",
    ),
    "wrong rows of a fragment": (" * 16 + lane % 16;\n        if", " * 16 + (lane + 1) % 16;\n        if", None),
    "wrong halves of a fragment": ("bool second = lane >= 16;", "bool second = lane % 16 >= 8;", None),
    "wrong columns of a result": (
        "RESULT_PITCH + n * 16 + lane % 4 * 4, pair",
        "RESULT_PITCH + n * 16 + (lane + 1) % 4 * 4, pair",
        None,
    ),
    "sums of what is outside": ("if (PARTS && to_sum >> i & 1)", "if (PARTS)", None),
    "wrong order of weights": ("lane / 16 * 8 + lane % 8", "lane / 8 % 2 * 8 + lane % 8", None),
    "wrong order of terms": ("k / 2 - 3 * CHUNKS : k - 8", "k / 2 - 3 * CHUNKS + 1 : k - 8", None),
    "a tile of the next row": ("column = 0, ++row;", "column = 0, row += 2;", "of y|another thread|NUMBERS"),
    "halo off by a row": ("+ top * STRIDE - 1)", "+ top * STRIDE)", "of x|NUMBERS"),
    "halo off by a column": ("+ left * STRIDE - 1;", "+ left * STRIDE - 2;", "of x|NUMBERS"),
    "halo too small": ("(TILE_W - 1) * STRIDE + 3,", "(TILE_W - 1) * STRIDE + 2,", None),
    "no padding on the left": ("Two(column < 0) << i", "Two(0) << i", "of x|NUMBERS"),
    "no padding below": ("at.row == at.down - 1,", "at.row == at.down,", "of x|of y|another thread|NUMBERS"),
    "results beyond the image": (
        "result.pixel % TILE_W, last_rows,\n            last_columns);",
        "result.pixel % TILE_W, 99, 99);",
        "of y|another thread",
    ),
    "store misaligned": (
        "char*>(y + (long long)now.pixel * channels + out)",
        "char*>(y + (long long)now.pixel * channels + out + 1)",
        "misaligned",
    ),
    "padding read through the norm": (
        "Copies::visit(stage, now.copied,",
        "Copies::visit(stage, copies.edges.known,",
        None,
    ),
    "missing barrier for the moments": (
        "            sync_block();  // the warps' moments",
        "            // the warps' moments",
        "without|never",
    ),
    "squares about zero": ("const Floats2 mean = {total.x * share,", "const Floats2 mean = {0.0f,", None),
    "moments beyond the image": ("if (!(to_sum >> i & 1)) continue;", "", None),
    "moments of one tile alone": ("merge(found[i], {load", "found[i] = {}, merge(found[i], {load", None),
    "missing barrier behind what is made": (
        "            sync_block();  // the whole tile is made",
        "            // the whole tile is made",
        "without a barrier|never",
    ),
    "activation of a bias for the padding": ("inside & 1 ? narrow_activated", "true ? narrow_activated", None),
    "what is made in the wrong rows": ("values[i / 2][n][i % 2 * 2];", "values[i / 2][n][(i + 1) % 2 * 2];", None),
    "what is made of the wrong pixels": ("pixel < Halo::PIXELS ? pixel : 0", "pixel > 0 ? pixel - 1 : 0", None),
    "what is made by another slab's weights": ("(first_channel + row) * IN + chunk", "row * IN + chunk", None),
    "a group of what is made too few": ("at < IN_ROWS * IN;", "at < (IN_ROWS - 8) * IN;", "never"),
    "result too small": ("SIXTEENS * 16 * RESULT_PITCH;", "8 * RESULT_PITCH;", "barrier|bytes|written"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_seen(bug):
    """By the simulator in every order of the warps, or by the numbers."""
    right, wrong, words = BUGS[bug]
    text = flattened("grouped_conv_forward.cu")
    assert text.count(right) == 1, "the source has changed: seed the bug again"
    text = text.replace(right, wrong)
    for order in ORDERS:
        problem = GroupedConv(2, 15, 17, 4, 24, 1, "bfloat16")
        training = any(word in bug for word in ("moments", "squares", "norm"))
        options = {"read": "silu", "moments": True} if training else {"activation": "relu", "parts": True}
        if " made" in bug or "for the padding" in bug:
            problem, options = dataclasses.replace(problem, in_channels=40), {"read": "silu"}
        one = Forward(problem, **options)
        with pytest.raises((SimulationError, AssertionError)) as caught:
            one.check(order, text, Target(90, 1 if "tile of" in bug else 3))
        if words is not None and "NUMBERS" not in words:
            assert caught.type is SimulationError, "the simulator did not see it"
            caught.match(words)


def test_refusals():
    good = GroupedConv(2, 9, 9, 2, 24, 1, "bfloat16")
    assert plans.refuse(good) is None
    for changes, words in (
        ({"width": 12}, "multiples of 8"),
        ({"width": 272}, "from 8 to 264"),
        ({"stride": 3}, "a stride of 3"),
        ({"dtype": "float32"}, "not in float32"),
        ({"images": 0}, "empty"),
        ({"height": 2**14, "columns": 2**12}, "an image of too many elements"),
        ({"height": 2, "columns": 2**22}, "an image of too many elements"),  # with the rows that a tile has beyond it
        ({"images": 2**26}, "too many pixels"),
        ({"in_channels": 12}, "multiples of 8"),
        ({"in_channels": 2**24}, "an image of too many elements"),
    ):
        bad = dataclasses.replace(good, **changes)
        assert words in plans.refuse(bad)
        with pytest.raises(ValueError, match=words):
            plans.grouped_conv_forward(bad)
    assert "dilation" in plans.refuse(good, dilation=(2, 2))
    assert "padding" in plans.refuse(good, padding=(0, 0))
    assert "8.0" in plans.refuse(good, arch=75)


@pytest.mark.parametrize("width", [8, 24, 40, 72])
def test_some_configurations(width):
    """Some of the search space, whatever the model of the machine would choose."""
    stride = random.choice((1, 2))
    configs = [c for c in grouped_forward._configs(width, 3) if c.warps_m * c.warps_n <= 12 and c.copies(stride) <= 32]
    for config in random.sample(configs, 5):
        problem = GroupedConv(2, 11, 19, 3 if width < 72 else 1, width, stride, "bfloat16")
        if config.shared_bytes(width, problem.stride) <= plans.SHARED_BYTES[90]:
            Forward(problem, "relu", parts=True).check("random", config=config)
    problem = GroupedConv(2, 11, 19, 3 if width < 72 else 1, width, stride, "bfloat16", 48)
    fits = grouped_forward._fitting(problem, Target(), False)
    for config in random.sample(fits, min(5, len(fits))):
        Forward(problem, "relu", parts=True, read="silu").check("random", config=config)


def test_a_convolution_in_front_where_it_pays():
    """Not where many channels would be read for every slab anew, nor where no tile fits."""
    narrow, wide = (GroupedConv(256, 14, 14, 24, 24, 1, "bfloat16", channels) for channels in (72, 160))
    first = GroupedConv(256, 112, 112, 3, 24, 2, "bfloat16", 32)
    assert plans.refuse_in_front(first, Target()) is None
    assert plans.refuse_in_front(narrow, Target()) is None
    assert "more than the map between" in plans.refuse_in_front(wide, Target())
    reason = plans.refuse_in_front(dataclasses.replace(wide, in_channels=1024), Target())
    assert reason == "no tile that a 1x1 convolution of 1024 channels stands in front of fits sm_90"
    with pytest.raises(ValueError, match=r"no configuration for .* fits sm_90"):
        plans.grouped_conv_forward(dataclasses.replace(wide, in_channels=1024))


def test_shared_memory_is_what_the_kernel_takes():
    for width in (24, 112):
        launch = plans.grouped_conv_forward(GroupedConv(1, 9, 9, 1, width, 1, "bfloat16"), parts=True)
        less = dataclasses.replace(launch, shared=launch.shared - 4)
        one = Forward(GroupedConv(1, 9, 9, 1, width, 1, "bfloat16"), parts=True)
        outputs = {"y": torch.zeros_like(one.x), "parts": torch.zeros(launch.buffers["parts"])}
        with pytest.raises(SimulationError, match=f"there are {less.shared} bytes"):
            inputs = {"x": one.x, "weight": packed(one.weight), "bias": one.bias}
            run(less, inputs | dict.fromkeys((*READS, "moments")), outputs)


def test_every_problem_has_a_plan():
    """For every machine, width and stride, few pixels and many: within shared memory, with at most 384 threads."""
    for arch, shared in plans.SHARED_BYTES.items():
        for width in (8, 24, 56, 64, 72, 120, 232, 264):
            for stride, batch in ((1, 1), (2, 256)):
                problem = GroupedConv(batch, 28, 28, 6, width, stride, "float16")
                target = Target(arch, plans.PROCESSORS[arch])
                training = {"affine": 2, "norm": True, "sums": True, "target": target}
                launches = [plans.grouped_conv_forward(problem, parts=True, target=target)]
                launches.append(plans.grouped_conv_forward(problem, target=target, read="relu", moments=True))
                launches += plans.grouped_conv_backward(problem, **training)
                assert all(launch.shared <= shared and launch.threads <= 384 for launch in launches)
    with pytest.raises(ValueError, match="600000 groups: more than a grid takes"):
        plans.grouped_conv_forward(GroupedConv(1, 1, 1, 600000, 24, 1, "float16"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", range(8, 272, 8))
def test_every_width(width, stride, dtype):
    """Every width, stride and dtype, on odd sizes and on machines with little and much shared memory."""
    for size, arch, activation in (((15, 9), 90, "relu"), ((7, 18), 86, "silu"), ((2, 1), 80, "none")):
        groups = max(1, 72 // width) + 1 if width <= 72 else 1
        problem = GroupedConv(2, *size, groups, width, stride, dtype)
        Forward(problem, activation, parts=activation != "none").check(target=Target(arch, 2))
        Forward(problem, bias=False, read=activation, moments=True).check(target=Target(arch, 2))
