"""Random small networks of timm's classes, and random images: what the soak tests draw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from helpers import randomize_bn
from hypothesis import reject
from hypothesis import strategies as st
from problems import LAYOUTS
from timm.layers import BatchNormAct2d, GroupNormAct, StdConv2d, create_conv2d, get_act_layer
from timm.models import byobnet, regnet, resnetv2
from torch import Tensor, nn

ACTIVATIONS = ("relu", "silu", "gelu", "hard_swish", "leaky_relu")
CLASSES = 5


@dataclass(frozen=True)
class Network:
    """A network of one of timm's classes, by the options that make it."""

    family: str
    options: dict
    seed: int

    @property
    def in_chans(self) -> int:
        return self.options["in_chans"]

    def make(self) -> nn.Module:
        """The network as timm builds it, in evaluation, with random weights and statistics."""
        torch.manual_seed(self.seed)
        try:
            model = FAMILIES[self.family][1](**self.options)
        except ValueError:  # torch has no convolution of such groups
            reject()
        return randomize_bn(model, self.seed, (4, self.in_chans, 32, 32)).eval()


@dataclass(frozen=True)
class Images:
    """Images of a random size, and how they lie in memory."""

    batch: int
    height: int
    width: int
    layout: str
    seed: int

    def make(self, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.batch, channels, self.height, self.width, generator=generator).to(dtype)
        return LAYOUTS[self.layout](x)


def _regnet(width: int, **options) -> nn.Module:
    """The slope is such that every depth from 5 to 7 has the four stages that timm asks for."""
    shape = dict(w0=width, wa=1.5 * width, wm=2.0)
    of_model = ("in_chans", "output_stride", "global_pool", "drop_rate", "drop_path_rate", "num_classes")
    config = regnet.RegNetCfg(**shape, **{k: v for k, v in options.items() if k not in of_model})
    return regnet.RegNet(config, **{k: v for k, v in options.items() if k in of_model})


def _resnetv2(shape: tuple, kind: str, act: str, norm: str, standardized: bool, **options) -> nn.Module:
    return resnetv2.ResNetV2(
        *shape,
        preact=kind != "original",
        basic=kind == "preact basic",
        act_layer=get_act_layer(act),
        norm_layer=BatchNormAct2d if norm == "batch" else partial(GroupNormAct, num_groups=4),
        conv_layer=StdConv2d if standardized else create_conv2d,
        **options,
    )


def _byobnet(stages: list[dict], se: float, linear_out: bool, **options) -> nn.Module:
    of_model = ("in_chans", "output_stride", "drop_rate", "drop_path_rate", "num_classes")
    blocks = tuple(
        byobnet.ByoBlockCfg(
            **stage, block_kwargs=dict(linear_out=True) if linear_out and stage["type"] == "bottle" else {}
        )
        for stage in stages
    )
    attention = dict(attn_layer="se", attn_kwargs=dict(rd_ratio=se)) if se else {}
    config = {k: v for k, v in options.items() if k not in of_model}
    config = byobnet.ByoModelCfg(blocks, stem_pool="", **attention, **config)
    return byobnet.ByobNet(config, **{k: v for k, v in options.items() if k in of_model})


def _any(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


def _common(rates: bool) -> dict:
    """What every class takes. Stochastic depth and dropout draw the random numbers of one dtype."""
    common = dict(in_chans=_any(3, 1, 4), num_classes=_any(CLASSES, 1), output_stride=_any(32, 16, 8))
    return common | (dict(drop_rate=_any(0.0, 0.2), drop_path_rate=_any(0.0, 0.3)) if rates else {})


def _regnet_options(acts: tuple[str, ...], rates: bool) -> st.SearchStrategy:
    return st.fixed_dictionaries(
        dict(
            width=_any(8, 16, 24),
            depth=st.integers(5, 7),
            group_size=_any(8, 1, 2, 4, 16, 24),
            bottle_ratio=_any(1.0, 0.5, 2.0, 4.0),
            se_ratio=_any(0.0, 0.25, 0.5),
            stem_width=_any(8, 16, 12),
            downsample=_any("conv1x1", "avg"),
            linear_out=st.booleans(),
            preact=st.booleans(),
            num_features=_any(0, 40),
            act_layer=_any(*acts),
            norm_layer=_any("batchnorm", "batchnorm", "batchnorm", "groupnorm1"),
            global_pool=_any("avg", "max"),
            **_common(rates),
        )
    )


def _resnetv2_options(acts: tuple[str, ...], rates: bool) -> st.SearchStrategy:
    return st.fixed_dictionaries(
        dict(
            shape=_any(((1, 2), (16, 24)), ((2, 1), (24, 32)), ((1, 1, 1), (16, 16, 40))),
            kind=_any("preact", "preact basic", "original"),
            stem_chs=_any(8, 16),
            stem_type=_any("", "deep", "fixed"),
            avg_down=st.booleans(),
            bottle_ratio=_any(0.5, 1.0),
            act=_any(*acts),
            norm=_any("batch", "batch", "group"),
            standardized=st.booleans(),
            **_common(rates),
        )
    )


def _byobnet_options(acts: tuple[str, ...], rates: bool) -> st.SearchStrategy:
    stage = st.fixed_dictionaries(
        dict(
            type=_any("rep", "bottle"),
            d=st.integers(1, 3),
            c=_any(16, 24, 48),
            s=_any(2, 1),
            gs=_any(0, 8, 1),
            br=_any(1.0, 0.5, 2.0),
        )
    )
    return st.fixed_dictionaries(
        dict(
            stages=st.lists(stage, min_size=2, max_size=3),
            se=_any(0.0, 0.25),
            linear_out=st.booleans(),
            downsample=_any("conv1x1", "avg", ""),
            stem_type=_any("rep", "3x3", "7x7"),
            stem_chs=_any(8, 16),
            num_features=_any(0, 40),
            act_layer=_any(*acts),
            **_common(rates),
        )
    )


FAMILIES = {
    "RegNet": (_regnet_options, _regnet),
    "ResNetV2": (_resnetv2_options, _resnetv2),
    "ByobNet": (_byobnet_options, _byobnet),
}


def networks(
    family: str, acts: tuple[str, ...] = ACTIVATIONS, rates: bool = False, smooth: bool = False
) -> st.SearchStrategy[Network]:
    """Networks of a family; with `rates` some of stochastic depth and dropout; `smooth` ones have SiLU and no global
    maximum, whose gradient leaps from one pixel to another.
    """
    options = FAMILIES[family][0](("silu",) if smooth else acts, rates)
    if smooth:
        options = options.map(lambda o: {**o, "global_pool": "avg"} if "global_pool" in o else o)
    return st.builds(Network, st.just(family), options, st.integers(0, 2**16))


def images(least: int = 1, layouts: tuple[str, ...] = tuple(LAYOUTS)) -> st.SearchStrategy[Images]:
    return st.builds(
        Images,
        st.integers(1, 4),
        st.integers(least, 48),
        st.integers(least, 48),
        _any(*layouts),
        st.integers(0, 2**16),
    )
