"""The same small RegNetX or RegNetY as timm, transformers and torchvision build it, and the rule for a rebuilt one.

Widths that are no power of two, groups of 8, a stage of two blocks: both kinds of shortcut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm.models.regnet
import torch
import torchvision.models.regnet
from helpers import assert_close_to_reference, assert_same_step, randomize_bn, reasons
from torch import Tensor, nn

import regnet_fast
from regnet_fast.observer import observing

LAST = torch.channels_last
STEM, WIDTHS, DEPTHS, GROUP_WIDTH, CLASSES = 32, (16, 24, 32, 56), (1, 1, 2, 1), 8, 5
BLOCKS = 1 + sum(DEPTHS)
"""Modules of such a model that have a fused twin: the stem and the residual blocks."""

Outputs = Callable[[nn.Module, Tensor], dict[str, Tensor]]


def of_timm(kind: str = "y", seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    cfg = timm.models.regnet.RegNetCfg(
        depth=5, w0=16, wa=8.0, wm=1.5, group_size=GROUP_WIDTH, stem_width=STEM, se_ratio=0.25 * (kind == "y")
    )
    return with_statistics(timm.models.regnet.RegNet(cfg, **{"num_classes": CLASSES, **kwargs}), seed)


def of_torchvision(kind: str = "y", seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    widths, ones, twos = list(WIDTHS), [1.0] * len(WIDTHS), [2] * len(WIDTHS)
    params = torchvision.models.regnet.BlockParams(
        list(DEPTHS), widths, [GROUP_WIDTH] * len(WIDTHS), ones, twos, 0.25 if kind == "y" else None
    )
    model = torchvision.models.regnet.RegNet(params, **{"num_classes": CLASSES, "stem_width": STEM, **kwargs})
    return with_statistics(model, seed)


def of_transformers(kind: str = "y", seed: int = 0, **kwargs) -> nn.Module:
    return transformers_model(seed, layer_type=kind, **kwargs)


def transformers_model(seed: int = 0, cls: str = "RegNetForImageClassification", **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    return with_statistics(getattr(transformers, cls)(transformers_config(**config)), seed)


def transformers_config(**config):
    transformers = pytest.importorskip("transformers")
    small = dict(embedding_size=STEM, hidden_sizes=WIDTHS, depths=DEPTHS, groups_width=GROUP_WIDTH, num_labels=CLASSES)
    return transformers.RegNetConfig(**{**small, **config})


HOSTS = {"timm": of_timm, "transformers": of_transformers, "torchvision": of_torchvision}


def with_statistics(model: nn.Module, seed: int) -> nn.Module:
    channels = next(parameter for parameter in model.parameters() if parameter.ndim == 4).shape[1]
    return randomize_bn(model.eval(), seed, (16, channels, 64, 64))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The result of a model of any host."""
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def assert_same_function(model: nn.Module, x: Tensor, outputs: Outputs, what: str) -> None:
    """Assert that the model is the same function when it is rebuilt, all of it fused. Uses the model up.

    Eager is held in channels_last, which torch leaves after a convolution of few channels.
    """
    model.to(x.dtype).eval()
    eager_form = copy.deepcopy(model).to(memory_format=LAST)
    for conv in (module for module in eager_form.modules() if isinstance(module, nn.Conv2d)):
        conv.register_forward_hook(lambda conv, inputs, y: y.contiguous(memory_format=LAST))
    report = regnet_fast.rebuild(model)
    assert report.rebuilt and not report.kept, str(report)
    heard = []
    with torch.no_grad():
        with observing(block=lambda block, image, plan, reason: heard.append(reason)):
            fused = outputs(model, x)
        assert len(heard) >= len(report.rebuilt) and set(heard) == {None}, f"{what}: not fused: {set(heard)}"
        eager = outputs(eager_form, x.contiguous(memory_format=LAST))
        exact = outputs(regnet_fast.restore(model).double(), x.double())
    assert fused.keys() == eager.keys() == exact.keys()
    for name in exact:
        assert_close_to_reference(fused[name], eager[name], exact[name], f"{what}, {name}")


def assert_trains_alike(theirs: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    """Assert that one training step of the rebuilt model is the host's."""
    ours, exact = regnet_fast.rebuild(copy.deepcopy(theirs)).model, copy.deepcopy(theirs).double()
    x, target = torch.randn(8, 3, 64, 64).contiguous(memory_format=LAST), torch.arange(8) % CLASSES
    assert reasons(copy.deepcopy(ours).train(), x) == {None}
    losses = []
    for model, images in ((ours, x), (theirs, x), (exact, x.double())):
        losses.append(loss(model.train(), images, target))
        losses[-1].backward()
    assert_same_step(ours, theirs, exact, losses)
