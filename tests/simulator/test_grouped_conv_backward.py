"""The gradients of the grouped convolution in the simulator against float64."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_reference

from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import GroupedConv, Target, grouped_backward
from simulator.machine import ORDERS, SimulationError, flattened, run
from simulator.test_grouped_conv import ACTIVATIONS, DTYPES, nhwc

TARGET = Target(90, 3)


class Backward:
    """A convolution of what is read of x, and dz, of which and of y the gradient of the raw result is made."""

    def __init__(self, problem, affine=0, norm=False, sums=False, activation="none"):
        self.problem, self.affine, self.norm, self.sums, self.activation = problem, affine, norm, sums, activation
        dtype, channels, width = DTYPES[problem.dtype], problem.channels, problem.width
        self.x = nhwc(problem.images, channels, problem.height, problem.columns, dtype=dtype)
        self.weight = (torch.randn(channels, width, 3, 3) / (9 * width) ** 0.5).to(dtype)
        self.dz, self.y = (nhwc(problem.images, channels, *problem.out_size, dtype=dtype) for _ in range(2))
        self.a, self.q, self.b = torch.rand(channels) + 0.5, torch.randn(channels) / 2, torch.randn(channels)
        self.mean, self.invstd = torch.randn(channels) / 4, torch.rand(channels) + 0.5
        self.scale, self.shift = torch.rand(channels) + 0.5, torch.randn(channels)

    def run(self, order="ascending", text=None, target=TARGET, **options):
        p = self.problem
        launches = plans.grouped_conv_backward(
            p, affine=self.affine, norm=self.norm, sums=self.sums, activation=self.activation, target=target, **options
        )
        weight = self.packed(self.weight, p)
        y = self.y if self.affine == 2 else None
        inputs = {"dz": self.dz, "y": y, "weight": weight, "x": self.x}
        inputs |= {"a": self.a if self.affine else None}
        inputs |= {name: getattr(self, name) if self.affine == 2 else None for name in "qb"}
        through = {name: self.norm or self.sums for name in ("scale", "shift")} | dict.fromkeys(
            ("mean", "invstd"), self.sums
        )
        inputs |= {name: getattr(self, name) if there else None for name, there in through.items()}
        found = {"dx": torch.full_like(self.x, torch.nan)}
        for launch in launches:
            found |= {name: torch.full(shape, torch.nan) for name, shape in launch.buffers.items()}
        for launch in launches:
            names = {argument for argument in launch.arguments if isinstance(argument, str)}
            results = {name: t for name, t in found.items() if name in names}
            given = {name: t for name, t in inputs.items() if name in names}
            if launch.source == "ordered_sum.cu":
                given["parts"] = results.pop("parts")
            results |= dict.fromkeys(names - given.keys() - results.keys())
            run(launch, given, results, order, text if launch.source == "grouped_conv_backward.cu" else None)
        self.launches = launches
        return found

    @staticmethod
    def packed(weight, problem):
        by_group = weight.view(problem.groups, problem.width, problem.width, 3, 3)
        return by_group.permute(0, 2, 3, 4, 1).reshape(problem.channels, -1).contiguous()

    def expected(self, dtype):
        """dx, and the weight's gradient as (channels, 9, width); rounded as eager rounds."""

        def column(t):
            return t.to(dtype)[:, None, None]

        def rounded(t):
            return t if dtype == torch.float64 else t.to(self.x.dtype).to(dtype)

        p, dy = self.problem, self.dz.to(dtype)
        if self.affine:
            dy = dy * column(self.a) + (self.y.to(dtype) * column(self.q) + column(self.b) if self.affine == 2 else 0)
        x = self.x.to(dtype)
        z = (x * column(self.scale) + column(self.shift)).requires_grad_()
        read = (rounded(ACTIVATIONS[self.activation](z.detach())) if self.norm else x.clone()).requires_grad_()
        weight = self.weight.to(dtype).requires_grad_()
        with torch.backends.mkldnn.flags(enabled=False):
            y = F.conv2d(read, weight, None, p.stride, 1, 1, p.groups)
            dx, dweight = torch.autograd.grad(y, (read, weight), rounded(dy))
        if self.sums:
            dx = rounded(torch.autograd.grad(ACTIVATIONS[self.activation](z), z, rounded(dx))[0])
        return dx, dweight.permute(0, 2, 3, 1).reshape(p.channels, 9, p.width)

    def check(self, *args, **options):
        found = self.run(*args, **options)
        eager, exact, dtype = self.expected(torch.float32), self.expected(torch.float64), self.x.dtype
        if options.get("needs_input", True):
            assert_close_to_reference(found["dx"], eager[0].to(dtype), exact[0], "dx", self.problem.groups)
        if options.get("needs_weight", True):
            assert_close_to_reference(found["dweight"].to(dtype), eager[1].to(dtype), exact[1], "dweight")
        if self.sums:
            ours = found["sums"].double().sum((0, 1))
            terms = found["dx"].double()
            xhat = (self.x.double() - self.mean[:, None, None]) * self.invstd[:, None, None]
            mine = torch.stack([(terms * xhat).sum((0, 2, 3)), terms.sum((0, 2, 3))])
            torch.testing.assert_close(ours, mine, rtol=1e-5, atol=1e-4)
        return found


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [8, 16, 24, 40])
def test_single_pass(width, stride):
    """Both gradients from one read of dz and x, with nothing else."""
    one = Backward(GroupedConv(2, 15, 9, max(2, 80 // width), width, stride, "bfloat16" if width % 16 else "float16"))
    one.check()
    assert len(one.launches) == 2, [launch.kernel for launch in one.launches]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [8, 24, 56, 64, 112, 232])
def test_two_launches(width, stride):
    one = Backward(GroupedConv(1, 7, 10, 2 if width < 64 else 1, width, stride, "bfloat16"))
    one.check(single_pass=False)
    assert len(one.launches) == 3


@pytest.mark.parametrize("width", [16, 24, 72])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("affine", "activation"), [(2, "silu"), (1, "relu"), (2, "none")])
def test_training(affine, activation, stride, width):
    """dy of dz and y, x through its norm, the gradient through the activation, and the norm's sums."""
    problem = GroupedConv(2, 9, 13, 3 if width < 64 else 1, width, stride, "bfloat16" if width % 16 else "float16")
    Backward(problem, affine, True, True, activation).check()


def test_what_is_outside_the_image_is_zero():
    """Not the activation of the shift, nor the constant of the affine map."""
    for stride in (1, 2):
        one = Backward(GroupedConv(1, 3, 2, 2, 16, stride, "float16"), 2, True, False, "relu")
        one.shift += 30
        one.b += 30
        one.check()


@pytest.mark.parametrize(("needs_input", "needs_weight"), [(True, False), (False, True)])
def test_one_gradient(needs_input, needs_weight):
    one = Backward(GroupedConv(2, 6, 7, 3, 24, 2, "bfloat16"), 2, True, needs_input, "silu")
    one.check(needs_input=needs_input, needs_weight=needs_weight)


def test_orders_and_equal_bits():
    """The same bits in every order of the warps, with as many workers as tiles or fewer; one pixel."""
    one = Backward(GroupedConv(2, 15, 9, 4, 24, 2, "bfloat16"), 2, True, True, "silu")
    results = [one.check(order) for order in ORDERS]
    for found in results[1:]:
        assert all(torch.equal(found[name], results[0][name]) for name in found)
    one.check(target=Target(90, 64))
    Backward(GroupedConv(1, 1, 1, 2, 24, 1, "bfloat16"), 1, True, True, "relu").check()


BUGS = {
    "missing barrier": ("        sync_block();  // this step's", "        // this step's", "barrier|not arrived|never"),
    "missing wait": ("        wait_copies<STAGES - 2>();\n", "", "not arrived"),
    "missing warp barrier": (
        "            sync_warp();\n        }\n#pragma unroll\n        for (int n",
        "        }\n#pragma unroll\n        for (int n",
        "barrier|never",
    ),
    "wrong class of taps": (
        "return which == 3 ? 5 : which == 2 ? 3 : which",
        "return which == 3 ? 5 : which == 2 ? 2 : which",
        None,
    ),
    "wrong tap": ("0x862071534LL", "0x862701534LL", None),
    "halo off by a row": ("out_height + top - HALO / 2)", "out_height + top)", "of y|of dz|NUMBERS"),
    "padding made": (
        "Copies::visit(stage, copied_of(now.edges, now.channel),",
        "Copies::visit(stage, copies.edges.known,",
        None,
    ),
    "padding read": (
        "Reads::visit(stage + INPUTS_AT, reads.edges.inside(now.edges),",
        "Reads::visit(stage + INPUTS_AT, reads.edges.known,",
        None,
    ),
    "results beyond the image": ("inside(now.edges & 12)", "inside(0u)", "of x|of dx|another thread"),
    "wrong class of results": (
        "own[first_column].inside",
        "own[first_row].inside",
        "of x|of dx|another thread|NUMBERS",
    ),
    "a wrong step over pixels": ("16 / TILE_W * row_pitch + 16 % TILE_W * pitch", "16 / TILE_W * row_pitch", "NUMBERS"),
    "wrong columns of a product": (
        "(which * OUT_TILE / 8 + part + here / 16) * 16",
        "(which * OUT_TILE / 8 + part + here / 8 % 2) * 16",
        None,
    ),
    "wrong rows of a product": ("chunk_of(product, here / 8 % 2), which", "chunk_of(product, here / 16), which", None),
    "not transposed": ("load_matrices_transposed(left, ", "load_matrices(left, ", None),
    "sums not carried over classes": ("if (which_class) {", "if (which_class == 7) {", None),
    "parts of one worker alone": ("(long long)block_x() * channels", "(long long)0 * channels", "another thread"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_seen(bug):
    """By the simulator in every order of the warps, or by the numbers."""
    right, wrong, words = BUGS[bug]
    text = flattened("grouped_conv_backward.cu")
    assert text.count(right) == 1, "the source has changed: seed the bug again"
    for order in ORDERS:
        one = Backward(GroupedConv(2, 16, 17, 4, 24, 1 if "halo" in bug else 2, "bfloat16"), 2, True, True, "silu")
        target = Target(90, 64) if "worker" in bug else TARGET
        with pytest.raises((SimulationError, AssertionError)) as caught:
            one.check(order, text.replace(right, wrong), target=target)
        if words is not None and "NUMBERS" not in words:
            assert caught.type is SimulationError, "the simulator did not see it"
            caught.match(words)


@pytest.mark.long
@pytest.mark.parametrize(("width", "gradients"), [(8, (1, 1)), (24, (1, 1)), (40, (0, 1)), (72, (1, 0)), (72, (0, 1))])
def test_some_configurations(width, gradients):
    """Some of the search space, whatever the model of the machine would choose."""
    groups = 3 if width < 72 else 1
    needs_input, needs_weight = map(bool, gradients)
    for stride in (1, 2):
        problem = GroupedConv(1, 11, 19, groups, width, stride, "bfloat16")
        work = plans.BackwardWork(problem, needs_input, needs_weight, 2, needs_weight, needs_input)
        configs = [
            config
            for config in grouped_backward._configs(work)
            if config.warps_m * config.warps_n <= 12
            and config.accumulators(work) <= 112
            and config.shared_bytes(work) <= plans.SHARED_BYTES[90]
        ]
        for config in random.sample(configs, 3):
            one = Backward(problem, 2, True, needs_input, "silu")
            one.check("random", needs_input=needs_input, needs_weight=needs_weight, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", range(8, 272, 8))
def test_every_width(width, stride, dtype):
    """Every width, stride and dtype, plain and in training, on odd sizes and machines with little shared memory."""
    groups = max(1, 72 // width) + 1 if width <= 72 else 1
    Backward(GroupedConv(2, 9, 7, groups, width, stride, dtype)).check()
    one = Backward(GroupedConv(1, 5, 10, groups, width, stride, dtype), 2, True, True, "silu")
    one.check(target=Target(86, 2))
