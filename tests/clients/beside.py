"""What the tests of users' situations share: our model beside timm's twin with the same weights, and what each did.

Activations are SiLU unless a test names another: at ReLU's kinks the gradients of two correct computations differ.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import close, pair, randomize_bn
from timm.layers import BatchNormAct2d, GroupNormAct, create_conv2d
from timm.models import resnetv2
from torch import Tensor, nn
from training_blocks import regnet_v, regnet_y, repvgg_net

import regnet_fast
from regnet_fast.blocks.fused import FallbackWarning

NAMES = ("regnety_002", "regnetx_002", "repvgg_a0", "resnetv2_18")
SMALL = ("regnet_y", "regnet_v", "repvgg", "resnet_v2")
"""Networks of a few blocks, for what needs no whole model."""
FEW = ("regnet_y", "resnet_v2")
"""Two of them, with blocks that are rather different, where there are many cases."""


def small_resnet(norm_layer=BatchNormAct2d) -> nn.Module:
    return resnetv2.ResNetV2(
        (1, 2),
        (16, 24),
        stem_chs=8,
        stem_type="",
        act_layer=nn.SiLU,
        conv_layer=create_conv2d,
        norm_layer=norm_layer,
        num_classes=5,
    )


MAKE = {
    "regnet_y": lambda: regnet_y(act_layer="silu"),
    "regnet_v": lambda: regnet_v(act_layer="silu"),
    "repvgg": lambda: repvgg_net(act_layer="silu"),
    "resnet_v2": small_resnet,
    "resnet_v2_gn": lambda: small_resnet(functools.partial(GroupNormAct, num_groups=4)),
}


@functools.cache
def _made(name: str, act: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if name in MAKE:
        theirs = randomize_bn(MAKE[name](), 0, (4, 3, 64, 64)).eval()
        return regnet_fast.rebuild(copy.deepcopy(theirs)).model, theirs
    layer = {"silu": nn.SiLU, "relu": nn.ReLU}[act]
    return pair(name, act_layer=layer if name.startswith("resnetv2") else act)


def twins(name: str, act: str = "silu") -> tuple[nn.Module, nn.Module]:
    """Our model and timm's with the same weights, in evaluation; new ones in every call."""
    return copy.deepcopy(_made(name, act))


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size)


def same(found, expected, what: str = "result") -> None:
    """The rule of `helpers.close` on every tensor of two results of any structure; everything else is equal."""
    (a, here), (b, there) = (torch.utils._pytree.tree_flatten(result) for result in (found, expected))
    assert here == there, f"{what}: ours is {here}, timm's {there}"
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        assert type(one) is type(other), f"{what}, {i}: ours is {one}, timm's {other}"
        if not isinstance(one, Tensor):
            assert one == other, f"{what}, {i}: ours is {one}, timm's {other}"
            continue
        assert one.dtype == other.dtype and one.shape == other.shape, f"{what}, {i}: {one.shape}, {other.shape}"
        assert one.requires_grad == other.requires_grad, f"{what}, {i}: requires_grad is {one.requires_grad}"
        if one.numel():
            try:
                close(one, other)
            except AssertionError as error:
                raise AssertionError(f"{what}, {i}: {error}") from None


def moved(before: Tensor, after: Tensor) -> None:
    """A change that the comparison could not see would prove nothing."""
    assert after.isfinite().all()
    assert before.shape != after.shape or (after - before).abs().max() > 0.02 * before.abs().max()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def quiet(call: Callable, *args, **kwargs):
    """`call()`, where blocks may fall back to timm's forward and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        return call(*args, **kwargs)


def outcome(call: Callable, *args, **kwargs):
    """What a call gives, or the class of what it raises."""
    try:
        return quiet(call, *args, **kwargs)
    except Exception as error:
        return type(error)


def same_outcome(ours: Callable, theirs: Callable, what: str = "outcome") -> None:
    """Both calls give the same numbers, or raise errors of the same class."""
    torch.manual_seed(0)
    found = outcome(ours)
    torch.manual_seed(0)
    expected = outcome(theirs)
    if isinstance(found, type) or isinstance(expected, type):
        assert found is expected, f"{what}: ours {found}, timm's {expected}"
    else:
        same(found, expected, what)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return quiet(model, x)


def isolated(function: Callable, *args, seconds: float = 100) -> None:
    """`function(*args)` in a process of its own, since it changes what holds for a whole process, or may end it.

    The function stands at the top level of a module. Processes are forked from one that has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "regnet_fast", "pytest", "hypothesis"])
    ours, child = context.Pipe(duplex=False)
    tests = str(Path(__file__).parents[1])
    process = context.Process(target=_run, args=(child, (tests, str(Path(__file__).parent)), function, args))
    process.start()
    child.close()
    said = None
    try:
        if ours.poll(seconds):
            said = ours.recv()
    except EOFError:  # it ended without a word
        pass
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    assert said == "done", said or f"the process ended with the code {process.exitcode}"


def _run(pipe, paths: tuple[str, ...], function: Callable, args: tuple) -> None:
    import traceback

    sys.path[:0] = [path for path in paths if path not in sys.path]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        function(*args)
        pipe.send("done")
    except BaseException:
        pipe.send(traceback.format_exc())
