"""Which hosts there are, and which modules of a network they have a fused twin for."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from torch import nn

from ..blocks.chain import Chain
from ..blocks.fused import Fused
from ..blocks.network import Network
from . import timm

_HOSTS = {
    "timm.models.regnet": ".timm",
    "torchvision.models.regnet": ".torchvision",
    "segmentation_models_pytorch.encoders._senet": ".segmentation_models",
    "segmentation_models_pytorch.encoders._efficientnet": ".segmentation_models",
    "transformers.models.regnet.modeling_regnet": ".transformers",
    "transformers.models.resnet.modeling_resnet": ".transformers",
}
"""The module of a library that defines its blocks, and ours about it.

A network can have a library's blocks only once the library's module is there, so none is imported for a look.
"""


def hosts() -> list[ModuleType]:
    """Our modules about the libraries that are imported."""
    return [import_module(ours, __package__) for theirs, ours in _HOSTS.items() if theirs in sys.modules]


def _blocks() -> dict[type[nn.Module], type[Fused]]:
    return {host: ours for library in hosts() for host, ours in library.BLOCKS.items()}


def candidates(network: nn.Module) -> list[tuple[str, nn.Module, type[Fused]]]:
    """Every module of a network that has a fused twin, outermost only: (path, module, fused class)."""
    blocks = _blocks()
    found: list[tuple[str, nn.Module, type[Fused]]] = []
    seen: set[int] = set()

    def walk(path: str, module: nn.Module, cls: type[Fused] | None) -> None:
        if id(module) in seen or isinstance(module, Fused):
            return
        seen.add(id(module))
        cls = cls or blocks.get(type(module))
        if cls is not None:
            found.append((path, module, cls))
            return
        for name, child in module.named_children():
            walk(f"{path}.{name}" if path else name, child, timm.part(module, name))

    walk("", network, None)
    return found


def derived(network: nn.Module) -> list[tuple[str, nn.Module, type[nn.Module]]]:
    """Every module of somebody's own class derived from a block's: (path, module, the block's class)."""
    blocks = _blocks()
    return [
        (path, module, host)
        for path, module in network.named_modules()
        if not isinstance(module, Fused) and type(module) not in blocks
        for host in type(module).__mro__[1:]
        if host in blocks
    ]


def chains(network: nn.Module) -> list[tuple[nn.Module, type[Chain]]]:
    """The containers of rebuilt blocks that run one after another, with their twins."""
    twins = {host: ours for library in hosts() for host, ours in library.CHAINS.items()}
    return [
        (module, twins[type(module)])
        for module in network.modules()
        if type(module) in twins and any(isinstance(child, Fused) for child in module.children())
    ]


def networks(network: nn.Module) -> list[tuple[nn.Module, type[Network]]]:
    """The whole networks with rebuilt blocks, with their twins."""
    return [
        (module, timm.NETWORKS[type(module)])
        for module in network.modules()
        if type(module) in timm.NETWORKS and any(isinstance(child, Fused) for child in module.modules())
    ]
