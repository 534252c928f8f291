"""What csrc/cpu is given addresses of: nothing that a user does may make it read or write anything else.

Each case is held to timm's own module: the same numbers, or an error where that has one.
"""

import copy

import pytest
import torch
from helpers import randomize_bn
from problems import LAYOUTS
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import byobnet, regnet
from torch import Tensor, nn
from training_blocks import BLOCKS, NETWORKS, ONE_OF_EACH, assert_equal_states, network_pair, pair_of, state_of

import regnet_fast
from regnet_fast.backends.passes import COMPILED, TORCH, parts
from regnet_fast.backends.passes.operands import Conv, Excite, Norm, OutputGrad, OutputNorm, Sums, Term

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS = {
    "sum": lambda y: y.sum(),
    "mean": lambda y: y.mean(),
    "one pixel": lambda y: y[..., -1, -1].square().sum(),
    "one channel": lambda y: y[:, 0].square().sum(),
    "mean of pixels": lambda y: y.mean((2, 3)).square().sum(),
    "largest": lambda y: y.amax((2, 3)).sum(),
}
"""Losses whose gradients are expanded, strided or mostly zero."""


def step(block: nn.Module, x: Tensor, loss) -> dict[str, Tensor]:
    block.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = block(x)
    loss(y).backward()
    return {"y": y.detach(), "gradient of x": x.grad} | state_of(block)


def assert_alike(ours: nn.Module, theirs: nn.Module, x: Tensor, loss=lambda y: y.square().mean()) -> None:
    assert_equal_states(step(ours, x, loss), step(theirs, x, loss), 2e-4)


def raised(call) -> str | None:
    """The name of the error of a call, or None."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.parametrize("what", OUTPUTS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_without_memory_of_their_own(name, what):
    ours, theirs = pair_of(name)
    x = torch.randn(3, BLOCKS[name][0], 9, 7)
    assert_alike(ours, theirs, x, OUTPUTS[what])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_expanded_and_strided_gradients_are_those_of_a_copy(name):
    block, _ = pair_of(name)
    x = torch.randn(3, BLOCKS[name][0], 8, 6)
    y = copy.deepcopy(block)(x)
    n, c, h, w = y.shape
    given = {
        "a number": torch.tensor(0.7).expand_as(y),
        "of each channel": torch.randn(1, c, 1, 1).expand_as(y),
        "of each pixel": torch.randn(n, 1, h, w).expand_as(y),
        "of each image": torch.randn(n, 1, 1, 1).expand_as(y),
        "every second": torch.randn(n, 2 * c, 2 * h, 2 * w)[:, ::2, ::2, 1::2],
        "turned": torch.randn(w, h, c, n).permute(3, 2, 1, 0),
        **{layout: make(torch.randn(n, c, h, w)) for layout, make in LAYOUTS.items()},
    }
    for what, grad in given.items():
        found, expected = (
            step(copy.deepcopy(block), x, lambda y, g=g: (y * g).sum())
            for g in (grad, grad.contiguous(memory_format=torch.channels_last).clone())
        )
        for key in expected:
            assert torch.equal(found[key], expected[key]), f"{what}, {key}"
        block_a, block_b = copy.deepcopy(block), copy.deepcopy(block)
        block_a(x).backward(grad)
        block_b(x).backward(grad.clone(memory_format=torch.contiguous_format))
        for (key, a), b in zip(state_of(block_a).items(), state_of(block_b).values(), strict=True):
            assert torch.equal(a, b), f"{what}, {key}"


def narrow(channels: int) -> dict[str, nn.Module]:
    norm = dict(norm_layer=BatchNormAct2d, act_layer=nn.ReLU)
    return {
        "stem": ConvNormAct(3, channels, 3, stride=2, **norm),
        "pointwise": ConvNormAct(channels, channels, 1, **norm),
        "from one": ConvNormAct(1, channels, 3, **norm),
        "Bottleneck": regnet.Bottleneck(channels, channels, group_size=1, se_ratio=0.25, **norm),
        "Bottleneck, strided": regnet.Bottleneck(channels, channels, stride=2, group_size=1, se_ratio=0.25, **norm),
        "RepVggBlock": byobnet.RepVggBlock(channels, channels, layers=byobnet.LayerFn()),
    }


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 1), (2, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 17])
def test_few_channels_and_pixels(channels, size):
    for name, made in narrow(channels).items():
        theirs = randomize_bn(made).train()
        report = regnet_fast.rebuild(copy.deepcopy(theirs))
        assert report.rebuilt, name
        given = {"stem": 3, "from one": 1}.get(name, channels)
        for n in (5, 2, 1):
            x = torch.randn(n, given, *size)
            ours, reference = copy.deepcopy(report.model), copy.deepcopy(theirs)
            error = raised(lambda x=x, theirs=theirs: copy.deepcopy(theirs)(x))
            if error is not None:
                assert raised(lambda x=x, ours=ours: ours(x)) == error, (name, n)
            elif n * size[0] * size[1] > 5:  # of fewer values a variance is next to nothing, and rounding all there is
                assert_close_step(ours, reference, x, f"{name}, {n}")


def assert_close_step(ours: nn.Module, theirs: nn.Module, x: Tensor, what: str) -> None:
    """Our step is as near to float64 as timm's, but for a few roundings."""

    def loss(y):
        return y.square().mean()

    exact = step(copy.deepcopy(theirs).double(), x.double(), loss)
    found, eager = step(ours, x, loss), step(theirs, x, loss)
    for key, reference in exact.items():
        if reference is None or not reference.is_floating_point():
            continue
        a, b = ((t[key].double() - reference).abs().max().item() for t in (found, eager))
        scale = max(1e-2, reference.abs().max().item())
        assert a <= 8 * b + 4e-5 * scale, f"{what}, {key}: {a} and timm's {b} at {scale}"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("change", [(1, 3), (3, 1), (2, 7)], ids=str)
def test_another_number_of_threads_in_backward(name, change, monkeypatch):
    """Parts of a batch and units of work are counted anew."""
    monkeypatch.setattr(parts, "_PART_BYTES", 4e4)
    model, _ = network_pair(name)
    x, found = torch.randn(6, 3, 33, 47), []
    before = torch.get_num_threads()
    try:
        for forward, backward in (change, (change[0], change[0])):
            one = copy.deepcopy(model)
            torch.set_num_threads(forward)
            y = one(x)
            torch.set_num_threads(backward)
            y.square().mean().backward()
            found.append({"y": y.detach(), **state_of(one)})
    finally:
        torch.set_num_threads(before)
    assert_equal_states(*found, 2e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_batches_of_none_and_one(name):
    for n in (0, 1):
        ours, theirs = pair_of(name)
        x = torch.randn(n, BLOCKS[name][0], 6, 5)
        error = raised(lambda theirs=theirs, x=x: theirs(x))
        assert raised(lambda ours=ours, x=x: ours(x)) == error
        if error is None:
            assert_alike(*pair_of(name), x)


NORM = (nn.modules.batchnorm._BatchNorm,)
SOME = ("stem", "Bottleneck of width 8", "PreActBottleneck, strided", "RepVggBlock")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["parameters", "statistics", "all"])
@pytest.mark.parametrize("name", SOME)
def test_norms_of_another_dtype(name, which, dtype, autocast):
    """Where timm computes, ours are its numbers; where timm refuses, ours may compute what it would have."""
    ours, theirs = pair_of(name)
    for block in (ours, theirs):
        for norm in (m for m in block.modules() if isinstance(m, NORM)):
            if which in ("parameters", "all"):
                norm.weight.data, norm.bias.data = norm.weight.data.to(dtype), norm.bias.data.to(dtype)
            if which in ("statistics", "all"):
                norm.running_mean, norm.running_var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    x = torch.randn(4, BLOCKS[name][0], 9, 7)

    def run(block: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x)
        y.float().square().mean().backward()
        return {"y": y.detach(), **state_of(block)}

    if raised(lambda: run(copy.deepcopy(theirs))) is not None:
        if raised(lambda: run(copy.deepcopy(ours))) is None:
            assert all(t.isfinite().all() for t in run(ours).values() if t is not None)
        return
    found, expected = run(ours), run(theirs)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        error, scale = (found[key].double() - value.double()).abs().max(), value.double().abs().max()
        assert error <= (0.06 if autocast or dtype != torch.float64 else 2e-4) * max(1.0, scale), f"{key}: {error}"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["never tracked", "gone"])
@pytest.mark.parametrize("name", SOME)
def test_norms_without_running_statistics(name, how, training):
    ours, theirs = pair_of(name)
    for block in (ours, theirs):
        for norm in (m for m in block.modules() if isinstance(m, NORM)):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = how == "gone"
            norm.train(training)
    x = torch.randn(4, BLOCKS[name][0], 9, 7)
    error = raised(lambda: copy.deepcopy(theirs)(x))
    if error is None:
        assert_alike(ours, theirs, x)
    else:
        assert raised(lambda: ours(x)) is not None


SPOILT = {
    "a short weight": lambda norm: setattr(norm, "weight", nn.Parameter(torch.ones(3))),
    "a long weight": lambda norm: setattr(norm, "weight", nn.Parameter(torch.ones(1000))),
    "a short bias": lambda norm: setattr(norm, "bias", nn.Parameter(torch.zeros(1))),
    "short statistics": lambda norm: (
        setattr(norm, "running_mean", torch.zeros(2)),
        setattr(norm, "running_var", torch.ones(2)),
        norm.eval(),
    ),
    "a short variance": lambda norm: (setattr(norm, "running_var", torch.ones(2)), norm.eval()),
    "a weight elsewhere": lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight.data.to("meta"))),
    "statistics elsewhere": lambda norm: (norm.eval(), setattr(norm, "running_mean", norm.running_mean.to("meta"))),
    "weights whose memory is gone": lambda norm: norm.weight.data.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("name", ["stem", "Bottleneck of width 8", "PreActBottleneck, strided", "RepVggBlock"])
def test_norms_that_do_not_fit_are_an_error(name, what):
    """As they are for timm: none is read beyond its end."""
    for index in range(sum(isinstance(m, NORM) for m in pair_of(name)[0].modules())):
        ours, theirs = pair_of(name)
        x = torch.randn(4, BLOCKS[name][0], 9, 7)
        for block in (ours, theirs):
            SPOILT[what]([m for m in block.modules() if isinstance(m, NORM)][index])
        if what != "weights whose memory is gone":
            assert raised(lambda theirs=theirs, x=x: theirs(x).sum().backward()) is not None
        assert raised(lambda ours=ours, x=x: ours(x).sum().backward()) is not None, index


@pytest.mark.parametrize("name", ["Bottleneck X, identity", "PreActBottleneck", "RepVggBlock"])
def test_a_branch_whose_map_has_another_size(name):
    """What timm refuses to add is refused, what it broadcasts is broadcast."""
    for stride in ((2, 2), (9, 9)):  # which leaves one pixel
        ours, theirs = pair_of(name)
        x = torch.randn(4, BLOCKS[name][0], 9, 9)
        for block in (ours, theirs):
            convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
            convs[-1].stride = stride
        error = raised(lambda theirs=theirs, x=x: copy.deepcopy(theirs)(x))
        if error is None:
            assert raised(lambda ours=ours, x=x: ours(x).sum().backward()) in (None, "RuntimeError")
        else:
            assert raised(lambda ours=ours, x=x: ours(x)) == error


# The passes themselves


def nhwc(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int) -> Norm:
    return Norm(torch.randn(channels), torch.rand(channels) + 0.1, torch.ones(channels), None, 1e-3, "relu")


WITHOUT_MEMORY = {
    "meta": lambda t: t.to("meta"),
    "zeros that are none": lambda t: torch._efficientzerotensor(t.shape),
    "freed": lambda t: (freed := t.clone(), freed.untyped_storage().resize_(0))[0],
}


@pytest.mark.parametrize("how", WITHOUT_MEMORY)
def test_tensors_without_memory_are_an_error(how):
    """Or are what they stand for, where torch makes it of them."""
    x, grad, norm = nhwc(2, 16, 3, 3), nhwc(2, 16, 3, 3), norm_of(16)
    own = OutputNorm(norm.mean, norm.var, None, 1e-3, Sums(norm.mean, norm.var), 18.0)
    calls = {
        "a gradient": lambda make: COMPILED.entered_backward(make(grad), own, x, None),
        "a mean": lambda make: COMPILED.entered_backward(grad, own._replace(mean=make(norm.mean)), x, None),
        "a weight": lambda make: COMPILED.join([Term(x, norm._replace(weight=make(norm.mean)), None)], "none"),
        "a map": lambda make: COMPILED.join([Term(x, None, None), Term(make(x), None, None)], "none"),
        "a map to measure": lambda make: torch.cat(COMPILED.statistics(make(x))),
    }
    refused = []
    for what, call in calls.items():
        refused.append(raised(lambda call=call: call(WITHOUT_MEMORY[how])))
        if refused[-1] is None:
            assert torch.equal(call(WITHOUT_MEMORY[how]), call(torch.zeros_like)), what
    assert set(refused) <= {"RuntimeError", None} and ("RuntimeError" in refused)
    assert how == "zeros that are none" or None not in refused


def test_vectors_of_another_length_are_an_error():
    x, norm = nhwc(2, 16, 3, 3), norm_of(16)
    own = OutputNorm(norm.mean, norm.var, None, 1e-3, Sums(norm.mean, norm.var), 18.0)
    one = [Conv(torch.randn(16, 16, 1, 1), ((1, 1), (0, 0), (1, 1), 1))]
    for wrong in (norm.mean[:15], torch.randn(17), torch.randn(1), torch.randn(0)):
        for field in ("mean", "var", "weight", "bias"):
            with pytest.raises(RuntimeError, match="expected 16"):
                COMPILED.convs(x, norm._replace(**{field: wrong}), None, one, [True])
        for field in ("mean", "var", "weight"):
            spoilt = own._replace(**{field: wrong})
            with pytest.raises(RuntimeError, match="expected 16"):
                COMPILED.entered_backward(x, spoilt, x, None)
            with pytest.raises(RuntimeError):
                COMPILED.convs_backward([OutputGrad(x, spoilt, x)], x, norm, None, one, True, [True])
        with pytest.raises(RuntimeError, match="expected 16"):
            COMPILED.entered_backward(x, own._replace(sums=Sums(wrong, norm.var)), x, None)
        excite = Excite(torch.randn(4, 16), torch.randn(4), torch.randn(len(wrong), 4), torch.randn(len(wrong)), "relu")
        with pytest.raises(RuntimeError, match="expected 32"):
            COMPILED.convs(x, norm, excite, one, [True])


@pytest.mark.parametrize("backward", [False, True])
def test_joins_of_unlike_maps_are_torch_s(backward):
    x, norm = nhwc(2, 16, 3, 3), norm_of(16)
    unlike = {
        "a pixel": nhwc(2, 16, 1, 1),
        "a channel": nhwc(2, 1, 3, 3),
        "an image": nhwc(1, 16, 3, 3),
        "float64": x.double(),
        "another size": nhwc(2, 16, 2, 3),
    }
    for what, other in unlike.items():
        for terms in ([Term(x, None, None), Term(other, None, None)], [Term(x, norm, None), Term(other, None, None)]):

            def run(passes, terms=terms):
                if backward:
                    found = passes.join_backward(x, x, terms, "relu", [True, True])
                    return [t for dx, sums in found for t in (dx, *(sums or ()))]
                return [passes.join(terms, "relu")]

            error = raised(lambda run=run: run(TORCH))
            assert raised(lambda run=run: run(COMPILED)) == error, what
            if error is None:
                for a, b in zip(run(COMPILED), run(TORCH), strict=True):
                    assert torch.equal(a, b), what
