"""The blocks that the tests of training run: one of every kind, and small networks of them."""

import copy
from functools import partial

from helpers import randomize_bn
from timm.layers import BatchNormAct2d, ConvNormAct, SEModule, create_conv2d
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import byobnet, regnet, resnet, resnetv2
from torch import Tensor, nn

import regnet_fast

WIDTH = 48


def _norm(act):
    return partial(BatchNormAct2d, act_layer=act)


def _layers(act, se):
    return byobnet.LayerFn(
        conv_norm_act=partial(ConvNormAct, norm_layer=_norm(act), act_layer=act),
        norm_act=_norm(act),
        act=act,
        attn=None if se is None else partial(SEModule, rd_ratio=se, act_layer=act),
    )


def stem(act, kernel=3):
    return ConvNormAct(3, 32, kernel, stride=2, norm_layer=_norm(act), act_layer=act)


def bottleneck(act, kind=regnet.Bottleneck, channels=WIDTH, width=8, se=0.25, **options):
    return kind(channels, WIDTH, group_size=width, se_ratio=se, act_layer=act, norm_layer=_norm(act), **options)


def bottleneck_block(act, channels=WIDTH, width=8, se=0.25, **options):
    return byobnet.BottleneckBlock(channels, WIDTH, group_size=width, layers=_layers(act, se), **options)


def repvgg(act, channels=WIDTH, width=None, se=None, **options):
    return byobnet.RepVggBlock(channels, WIDTH, group_size=width, layers=_layers(act, se), **options)


def preact(act, kind=resnetv2.PreActBottleneck, channels=WIDTH, **options):
    options = dict(bottle_ratio=1.0, act_layer=act, conv_layer=create_conv2d, norm_layer=_norm(act)) | options
    return kind(channels, WIDTH, **options)


def byob(act, kind, channels=WIDTH, se=None, **options):
    return kind(channels, WIDTH, layers=_layers(act, se), **{"attn_last": False} | options)


def residual(act, kind=resnet.Bottleneck, channels=WIDTH, downsample=None, stride=1, **options):
    """A block of a ResNet, with a shortcut of timm's where one is named."""
    made, norm = None, nn.BatchNorm2d
    if downsample is not None:
        make = {"conv": resnet.downsample_conv, "avg": resnet.downsample_avg}[downsample]
        made = make(channels, WIDTH, 1, stride=stride, norm_layer=norm)
    planes = WIDTH // kind.expansion
    return kind(channels, planes, stride, made, act_layer=act, norm_layer=norm, **options)


def inverted(act, kind=efficientnet.InvertedResidual, channels=WIDTH, se=None, **options):
    se_layer = None if se is None else partial(efficientnet.SqueezeExcite, rd_ratio=se)
    return kind(channels, WIDTH, act_layer=act, norm_layer=nn.BatchNorm2d, se_layer=se_layer, **options)


BLOCKS = {
    "stem": (3, stem),
    "stem 7x7": (3, partial(stem, kernel=7)),
    **{f"Bottleneck of width {width}": (WIDTH, partial(bottleneck, width=width)) for width in (1, 4, 8, 24, 48)},
    "Bottleneck X": (24, partial(bottleneck, channels=24, se=0, stride=2)),
    "Bottleneck X, identity": (WIDTH, partial(bottleneck, se=0, width=24)),
    "Bottleneck, average pool": (WIDTH, partial(bottleneck, stride=2, downsample="avg")),
    "Bottleneck without a shortcut": (WIDTH, partial(bottleneck, stride=2, downsample=None)),
    "Bottleneck, dilated": (WIDTH, partial(bottleneck, dilation=(2, 2), width=4)),
    "Bottleneck, dilation begins": (WIDTH, partial(bottleneck, dilation=(1, 2))),
    "Bottleneck, dilated average pool": (WIDTH, partial(bottleneck, dilation=(2, 1), downsample="avg")),
    "Bottleneck, linear out": (WIDTH, partial(bottleneck, linear_out=True)),
    "BottleneckBlock": (WIDTH, partial(bottleneck_block, linear_out=True)),
    "BottleneckBlock, strided": (24, partial(bottleneck_block, channels=24, stride=2, downsample="conv1x1")),
    "BottleneckBlock, average pool": (WIDTH, partial(bottleneck_block, stride=2, se=None, width=48)),
    "BottleneckBlock without a shortcut": (24, partial(bottleneck_block, channels=24, downsample="")),
    "PreBottleneck": (WIDTH, partial(bottleneck, kind=regnet.PreBottleneck)),
    "PreBottleneck, strided": (24, partial(bottleneck, kind=regnet.PreBottleneck, channels=24, stride=2, width=24)),
    "PreBottleneck, average pool": (
        WIDTH,
        partial(bottleneck, kind=regnet.PreBottleneck, stride=2, downsample="avg", se=0),
    ),
    "PreBottleneck without a shortcut": (
        24,
        partial(bottleneck, kind=regnet.PreBottleneck, channels=24, se=0, downsample=None),
    ),
    "PreActBottleneck": (WIDTH, preact),
    "PreActBottleneck, strided": (24, partial(preact, channels=24, stride=2, proj_layer=resnetv2.DownsampleConv)),
    "PreActBottleneck, average pool": (
        WIDTH,
        partial(preact, stride=2, groups=4, proj_layer=resnetv2.DownsampleAvg),
    ),
    "PreActBasic": (WIDTH, partial(preact, kind=resnetv2.PreActBasic)),
    "PreActBasic, strided": (
        24,
        partial(preact, kind=resnetv2.PreActBasic, channels=24, stride=2, proj_layer=resnetv2.DownsampleConv),
    ),
    "RepVggBlock": (WIDTH, repvgg),
    "RepVggBlock of groups": (WIDTH, partial(repvgg, width=12)),
    "RepVggBlock, strided": (24, partial(repvgg, channels=24, stride=2)),
    "RepVggBlock of images": (3, partial(repvgg, channels=3, stride=2)),
    "RepVggBlock with squeeze-excite": (WIDTH, partial(repvgg, se=0.25)),
    "byobnet's BasicBlock": (WIDTH, partial(byob, kind=byobnet.BasicBlock)),
    "DarkBlock with squeeze-excite": (WIDTH, partial(byob, kind=byobnet.DarkBlock, se=0.25)),
    "EdgeBlock, strided": (24, partial(byob, kind=byobnet.EdgeBlock, channels=24, stride=2, downsample="conv1x1")),
    "BasicBlock": (WIDTH, partial(residual, kind=resnet.BasicBlock)),
    "BasicBlock, strided": (24, partial(residual, kind=resnet.BasicBlock, channels=24, stride=2, downsample="conv")),
    "ResNet's Bottleneck": (WIDTH, partial(residual, cardinality=3, base_width=64)),
    "ResNet's Bottleneck, average pool": (24, partial(residual, channels=24, stride=2, downsample="avg")),
    "InvertedResidual": (WIDTH, partial(inverted, exp_ratio=2.0, se=0.25)),
    "InvertedResidual, strided": (24, partial(inverted, channels=24, exp_ratio=2.0, stride=2, dw_kernel_size=5)),
    "DepthwiseSeparableConv": (WIDTH, partial(inverted, kind=efficientnet.DepthwiseSeparableConv, se=0.25)),
    "EdgeResidual": (WIDTH, partial(inverted, kind=efficientnet.EdgeResidual, exp_ratio=2.0)),
    "UniversalInvertedResidual": (
        WIDTH,
        partial(
            inverted,
            kind=efficientnet.UniversalInvertedResidual,
            exp_ratio=2.0,
            dw_kernel_size_start=3,
            layer_scale_init_value=None,
        ),
    ),
}
"""Input channels, and what makes the block from the class of its activation."""

ONE_OF_EACH = (
    "stem",
    "Bottleneck of width 8",
    "Bottleneck, average pool",
    "BottleneckBlock",
    "PreBottleneck",
    "PreActBottleneck, strided",
    "PreActBasic",
    "RepVggBlock",
    "RepVggBlock with squeeze-excite",
    "BasicBlock, strided",
    "InvertedResidual",
    "UniversalInvertedResidual",
)


def pair_of(name: str, act: type[nn.Module] = nn.ReLU) -> tuple[nn.Module, nn.Module]:
    """A rebuilt block and timm's own in training mode, with the same random weights and statistics."""
    made = randomize_bn(BLOCKS[name][1](act)).train()
    report = regnet_fast.rebuild(copy.deepcopy(made))
    assert [path for path, _ in report.rebuilt] == [""] and not report.kept
    return report.model, made


def regnet_y(**options) -> nn.Module:
    """Stem, six blocks with squeeze-excite, the identity as shortcut of two, head."""
    config = dict(w0=8, wa=12.0, wm=2.0, depth=6, group_size=8, se_ratio=0.25, stem_width=8)
    rates = {k: options.pop(k) for k in ("drop_path_rate", "drop_rate", "num_classes") if k in options}
    return regnet.RegNet(regnet.RegNetCfg(**config | options), **{"num_classes": 5} | rates)


def regnet_v(**options) -> nn.Module:
    return regnet_y(preact=True, downsample="avg", **options)


def repvgg_net(attn: str | None = None, **options) -> nn.Module:
    blocks = tuple(byobnet.ByoBlockCfg(type="rep", d=d, c=c, s=2, br=0.0, gs=0) for d, c in ((2, 16), (3, 24)))
    config = byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8, attn_layer=attn)
    return byobnet.ByobNet(config, **{"num_classes": 5} | options)


def resnet_v2(**options) -> nn.Module:
    return resnetv2.ResNetV2(
        (1, 2),
        (16, 24),
        stem_chs=8,
        stem_type="",
        act_layer=nn.ReLU,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        **{"num_classes": 5} | options,
    )


NETWORKS = {"regnet_y": regnet_y, "regnet_v": regnet_v, "repvgg": repvgg_net, "resnet_v2": resnet_v2}


def network_pair(name: str = "regnet_y", **options) -> tuple[nn.Module, nn.Module]:
    """A small rebuilt network and timm's own in training mode, with the same random weights and statistics."""
    theirs = randomize_bn(NETWORKS[name](**options), 0, (4, 3, 64, 64)).train()
    report = regnet_fast.rebuild(copy.deepcopy(theirs))
    assert not report.kept
    return report.model, theirs


def state_of(model: nn.Module) -> dict[str, Tensor | None]:
    """All gradients and buffers by name."""
    grads = {f"gradient of {name}": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return grads | {name: b.detach().clone() for name, b in model.named_buffers()}


def assert_equal_states(found: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or found[name] is None:
            assert value is found[name], name
            continue
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        if not value.numel():
            continue
        error = (found[name] - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: {error}"
