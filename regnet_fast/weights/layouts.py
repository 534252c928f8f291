"""RegNet weights under the keys of timm, transformers or torchvision: the same tensors, renamed.

RegNetX and RegNetY are the same network in the three libraries: the same order of operations, padding, eps and place of
the stride. `Parts` says which parts a network has; with a library's `Layout` it gives all keys, always in one order, so
that the keys of two libraries belong together pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .checkpoints import CheckpointError, StateDict, abridged

_CONV, _NORM = ("weight",), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_LINEAR = ("weight", "bias")


@dataclass(frozen=True)
class Layout:
    """A library's names for the parts of a RegNet.

    In `block`, `stage` and `place` count from 1 and `stage0` and `place0` from 0; in `convs`, `last` is the place of
    the third convolution. `trunk` stands before everything but the classifier, in models that have one.
    """

    conv: str
    norm: str
    stem: str
    block: str
    convs: tuple[str, str, str]
    shortcut: str
    squeeze_excite: tuple[str, str]
    classifier: str
    trunk: str = ""

    def at(self, stage: int, place: int) -> str:
        """The path of a block; both count from 0."""
        return self.block.format(stage=stage + 1, stage0=stage, place=place + 1, place0=place)


LAYOUTS = {
    "timm": Layout(
        conv="conv",
        norm="bn",
        stem="stem",
        block="s{stage}.b{place}",
        convs=("conv1", "conv2", "conv3"),
        shortcut="downsample",
        squeeze_excite=("se.fc1", "se.fc2"),
        classifier="head.fc",
    ),
    "transformers": Layout(
        conv="convolution",
        norm="normalization",
        stem="embedder.embedder",
        block="encoder.stages.{stage0}.layers.{place0}",
        convs=("layer.0", "layer.1", "layer.{last}"),
        shortcut="shortcut",
        squeeze_excite=("layer.2.attention.0", "layer.2.attention.2"),
        classifier="classifier.1",
        trunk="regnet.",
    ),
    "torchvision": Layout(
        conv="0",
        norm="1",
        stem="stem",
        block="trunk_output.block{stage}.block{stage}-{place0}",
        convs=("f.a", "f.b", "f.c"),
        shortcut="proj",
        squeeze_excite=("f.se.fc1", "f.se.fc2"),
        classifier="fc",
    ),
}


@dataclass(frozen=True)
class Parts:
    """Which parts a RegNet has: for every block of every stage whether it has a shortcut with weights, and the rest."""

    shortcuts: tuple[tuple[bool, ...], ...]
    squeeze_excite: bool
    classifier: bool

    def keys(self, layout: Layout, trunk: str) -> Iterator[str]:
        """The keys of all tensors, in the same order for every layout."""

        def unit(path: str) -> Iterator[str]:
            yield from (f"{path}.{layout.conv}.{name}" for name in _CONV)
            yield from (f"{path}.{layout.norm}.{name}" for name in _NORM)

        yield from unit(trunk + layout.stem)
        for stage, blocks in enumerate(self.shortcuts):
            for place, shortcut in enumerate(blocks):
                block = f"{trunk}{layout.at(stage, place)}."
                for conv in layout.convs:
                    yield from unit(block + conv.format(last=2 + self.squeeze_excite))
                if self.squeeze_excite:
                    yield from (f"{block}{fc}.{name}" for fc in layout.squeeze_excite for name in _LINEAR)
                if shortcut:
                    yield from unit(block + layout.shortcut)
        if self.classifier:
            yield from (f"{layout.classifier}.{name}" for name in _LINEAR)


@dataclass(frozen=True)
class Weights:
    """A RegNet's tensors under timm's keys, the layout that they came in, the network's parts, and transformers'
    configuration of it as far as weights tell.
    """

    state: StateDict
    layout: str
    parts: Parts
    config: dict[str, Any]

    def under(self, to: str) -> StateDict:
        """The same tensors under the keys of a layout. Raises CheckpointError where that library has no such model."""
        if to == "torchvision":
            if not self.parts.classifier:
                raise CheckpointError("these weights have no classifier, and torchvision has no RegNet without one")
            if self.config["num_channels"] != 3:
                raise CheckpointError(
                    f"these weights take {self.config['num_channels']} input channels, and torchvision's RegNets take 3"
                )
        layout = LAYOUTS[to]
        keys = self.parts.keys(layout, layout.trunk if self.parts.classifier else "")
        names = dict(zip(self.parts.keys(LAYOUTS["timm"], ""), keys, strict=True))
        return {names[key]: value for key, value in self.state.items()}


def convert(state_dict: Mapping[str, Tensor], to: str) -> StateDict:
    """The weights of a RegNetX or RegNetY under the keys of another library.

        timm_model.load_state_dict(regnet_fast.convert(transformers_model.state_dict(), to="timm"))

    Args:
        state_dict: of a RegNetX or RegNetY of timm, transformers (with or without a classifier) or torchvision.
        to: "timm", "transformers" or "torchvision".

    Returns a new dict with the same tensors. Raises ValueError for another `to`, and CheckpointError where the keys or
    the shapes are not those of such a model, or the other library has no such model.
    """
    check_layout(to)
    return recognize(state_dict).under(to)


def check_layout(name: str) -> None:
    """Raise ValueError unless there is a layout of this name."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; choose one of {', '.join(LAYOUTS)}")


def recognize(state: Mapping[str, Tensor]) -> Weights:
    """The weights of a RegNetX or RegNetY in any of the layouts.

    `num_batches_tracked` may be missing, as in files of frozen BatchNorms. Raises CheckpointError for other weights,
    naming what is missing, unknown or of another shape.
    """
    name, trunk = _layout(state)
    parts = _parts(state, LAYOUTS[name], trunk)
    theirs = list(parts.keys(LAYOUTS[name], trunk))
    missing = [key for key in theirs if key not in state and not key.endswith("num_batches_tracked")]
    unknown = sorted(state.keys() - set(theirs))
    if missing or unknown:
        found = [f"{word}: {abridged(keys)}" for word, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise CheckpointError(f"these are not the keys of a RegNetX or RegNetY of {name}; {'; '.join(found)}")
    for stage, blocks in enumerate(parts.shortcuts, 1):
        if blocks != (True, *[False] * (len(blocks) - 1)):
            raise CheckpointError(
                f"in stage {stage} the blocks with a shortcut of their own are not the first one alone, where these "
                "networks halve the image"
            )
    pairs = zip(theirs, parts.keys(LAYOUTS["timm"], ""), strict=True)
    renamed = {ours: state[key] for key, ours in pairs if key in state}
    config = _config(renamed, parts)
    wrong = [
        f"{key} is {tuple(renamed[key].shape)} and not {shape}"
        for key, shape in _shapes(parts, config).items()
        if key in renamed and tuple(renamed[key].shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            "these weights are no RegNetX or RegNetY, where a block keeps its width, groups are equally wide and "
            f"squeeze-excite has a quarter of the block's input (timm's keys): {abridged(wrong, '; ')}"
        )
    return Weights(renamed, name, parts, config)


def _layout(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The name of the layout that some keys have, and what stands before its trunk."""
    for name, layout in LAYOUTS.items():
        for trunk in {"": None, layout.trunk: None}:
            if f"{trunk}{layout.at(0, 0)}.{layout.convs[0]}.{layout.conv}.weight" in state:
                return name, trunk
    raise CheckpointError(
        "these are no weights of a RegNetX or RegNetY of timm, transformers or torchvision; their keys are "
        f"{abridged(map(str, state)) or 'none'}"
    )


def _parts(state: Mapping[str, Tensor], layout: Layout, trunk: str) -> Parts:
    def has(stage: int, place: int, part: str) -> bool:
        return f"{trunk}{layout.at(stage, place)}.{part}.weight" in state

    first, shortcuts = f"{layout.convs[0]}.{layout.conv}", []
    while has(len(shortcuts), 0, first):
        stage, blocks = len(shortcuts), []
        while has(stage, len(blocks), first):
            blocks.append(has(stage, len(blocks), f"{layout.shortcut}.{layout.conv}"))
        shortcuts.append(tuple(blocks))
    classifier = f"{layout.classifier}.weight" in state
    return Parts(tuple(shortcuts), has(0, 0, layout.squeeze_excite[0]), classifier)


def _config(state: StateDict, parts: Parts) -> dict[str, Any]:
    """What transformers' RegNetConfig says of these weights. A stage narrower than `groups_width` is one group."""

    def size(key: str, axis: int) -> int:
        shape = state[key].shape
        if len(shape) <= axis:
            raise CheckpointError(f"{key} (timm's key) is of shape {tuple(shape)} and no weight of a convolution")
        return shape[axis]

    firsts = [f"s{stage + 1}.b1" for stage in range(len(parts.shortcuts))]
    return {
        "num_channels": size("stem.conv.weight", 1),
        "embedding_size": size("stem.conv.weight", 0),
        "hidden_sizes": [size(f"{first}.conv3.conv.weight", 0) for first in firsts],
        "depths": [len(blocks) for blocks in parts.shortcuts],
        "groups_width": max(size(f"{first}.conv2.conv.weight", 1) for first in firsts),
        "layer_type": "y" if parts.squeeze_excite else "x",
    }


def _shapes(parts: Parts, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor under timm's keys."""
    shapes: dict[str, tuple[int, ...]] = {}

    def unit(path: str, *conv: int) -> None:
        shapes[f"{path}.conv.weight"] = conv
        shapes.update({f"{path}.bn.{name}": conv[:1] for name in _NORM[:-1]} | {f"{path}.bn.{_NORM[-1]}": ()})

    width = config["embedding_size"]
    unit("stem", width, config["num_channels"], 3, 3)
    for stage, (blocks, wider) in enumerate(zip(parts.shortcuts, config["hidden_sizes"], strict=True), 1):
        groups = max(1, wider // max(1, config["groups_width"]))
        for place, shortcut in enumerate(blocks, 1):
            block = f"s{stage}.b{place}"
            unit(f"{block}.conv1", wider, width, 1, 1)
            unit(f"{block}.conv2", wider, wider // groups, 3, 3)
            unit(f"{block}.conv3", wider, wider, 1, 1)
            if parts.squeeze_excite:
                hidden = round(width / 4)
                shapes[f"{block}.se.fc1.weight"], shapes[f"{block}.se.fc1.bias"] = (hidden, wider, 1, 1), (hidden,)
                shapes[f"{block}.se.fc2.weight"], shapes[f"{block}.se.fc2.bias"] = (wider, hidden, 1, 1), (wider,)
            if shortcut:
                unit(f"{block}.downsample", wider, width, 1, 1)
            width = wider
    return shapes
