"""Which kernels of csrc/ models take: the launches of the default plans, in inference and in training.

The extension module is built of these (instantiate.py), and bench/compile/csrc.py compiles them to see what becomes
of them. The standard library and `plans` are all that is imported: a build has no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import PROCESSORS, DepthwiseConv, GroupedConv, Launch, Target

from . import shapes

TRAINING = {"affine": 2, "norm": True, "sums": True}
"""What a training step asks of the gradients of a convolution that reads its map through a norm."""

ACTIVATIONS = ("relu", "silu")  # of the models


class Conv(NamedTuple):
    """A grouped convolution of a model; `size` is the height and width of its result."""

    groups: int
    width: int
    size: int
    stride: int
    activation: str

    def problem(self, batch: int, dtype: str) -> GroupedConv:
        size = self.size * self.stride
        return GroupedConv(batch, size, size, self.groups, self.width, self.stride, dtype)


def grouped_convs(models: Iterable[str] | None = None) -> list[Conv]:
    """The grouped convolutions of some models, or of all, that csrc/ has kernels for, each once."""
    found = {}
    for facts in _operations("grouped_conv", models):
        conv = Conv(facts["groups"], facts["in"] // facts["groups"], facts["hw"], facts["stride"], facts["activation"])
        geometry = {"kernel": (facts["kernel"],) * 2, "dilation": (facts["dilation"],) * 2}
        padding = (facts["kernel"] // 2 * facts["dilation"],) * 2
        refused = plans.refuse(conv.problem(1, "bfloat16"), padding=padding, **geometry)
        if facts["in"] == facts["out"] and refused is None:
            found[conv] = None
    return list(found)


def _operations(op: str, models: Iterable[str] | None) -> Iterator[dict]:
    """The operations of a kind in some models, or in all. Raises ValueError for a model that there is not."""
    asked, known = set(models or ()), set(shapes.model_names())
    if asked - known:
        raise ValueError(f"no model is called {min(asked - known)!r}")
    for facts in shapes.operations().values():
        if facts["op"] == op and (not asked or asked & facts["models"].keys()):
            yield facts


def of_convs(convs: Iterable[Conv], arch: int, dtypes: Sequence[str], batches: Sequence[int]) -> Iterator[Launch]:
    """What grouped convolutions take: in inference, with the parts of the means and without, and in training."""
    target = Target(arch, PROCESSORS[arch])
    for conv in convs:
        for dtype in dtypes:
            for batch in batches:
                problem = conv.problem(batch, dtype)
                for parts in (True, False):
                    yield plans.grouped_conv_forward(problem, conv.activation, parts, target)
                raw = plans.grouped_conv_forward(problem, target=target, read=conv.activation, moments=True)
                yield raw
                yield plans.merged_moments(raw.grid[0], problem.channels)
                yield from plans.grouped_conv_backward(problem, activation=conv.activation, target=target, **TRAINING)


def of_back_to_back(
    models: Iterable[str] | None, arch: int, dtypes: Sequence[str], batches: Sequence[int]
) -> Iterator[Launch]:
    """What grouped convolutions take together with the 1x1 convolutions whose result they may read, where that pays."""
    pointwise, target = list(_operations("pointwise_conv", models)), Target(arch, PROCESSORS[arch])
    for conv in grouped_convs(models):
        widths = {
            facts["in"]
            for facts in pointwise
            if (facts["out"], facts["hw"], facts["stride"]) == (conv.groups * conv.width, conv.size * conv.stride, 1)
        }
        for in_channels in sorted(widths):
            for dtype in dtypes:
                for batch in batches:
                    problem = replace(conv.problem(batch, dtype), in_channels=in_channels)
                    if plans.refuse(problem, arch=arch) or plans.refuse_in_front(problem, target):
                        continue
                    for parts in (True, False):
                        yield plans.grouped_conv_forward(problem, conv.activation, parts, target, read=conv.activation)


def of_squeeze_excite(
    models: Iterable[str] | None, arch: int, dtypes: Sequence[str], batches: Sequence[int]
) -> Iterator[Launch]:
    """What the squeeze-and-excitation of some models takes, or of all."""
    for facts in _operations("squeeze_excite", models):
        for dtype in dtypes:
            for batch in batches:
                sizes = batch, 1, facts["in"], facts["out"]
                yield from plans.squeeze_excite(*sizes, dtype, facts["activation"], Target(arch, PROCESSORS[arch]))


def of_depthwise(dtypes: Sequence[str]) -> Iterator[Launch]:
    """Every depthwise kernel, which depend on the channels only by the largest power of two in them, and on no GPU."""
    for channels in (8, 16, 32, 64, 128):
        for stride in (1, 2):
            for dtype in dtypes:
                problem = DepthwiseConv(1, 28, 28, channels, stride, dtype)
                for activation in ACTIVATIONS:
                    for parts in (True, False):
                        yield plans.depthwise_conv_forward(problem, activation, parts)
                    yield from plans.depthwise_conv_backward(problem, activation=activation, **TRAINING)


def all_batches(arch: int) -> tuple[int, ...]:
    """Some batches that take between them every kernel that any batch takes, of an image size."""
    return plans.FEW, plans.MANY, 2 * PROCESSORS[arch], 4 * PROCESSORS[arch]  # the last two of squeeze-excite


def of_models(
    models: Iterable[str] | None, arch: int, dtypes: Sequence[str], batches: Sequence[int]
) -> Iterator[Launch]:
    """Everything that some models take, or all: their grouped convolutions, and squeeze-and-excitation."""
    yield from of_convs(grouped_convs(models), arch, dtypes, batches)
    yield from of_back_to_back(models, arch, dtypes, batches)
    yield from of_squeeze_excite(models, arch, dtypes, batches)
