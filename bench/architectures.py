"""Which of timm's architectures are rebuilt, and how much of each: `python -m bench.architectures`.

Every architecture is built without weights and run on meta tensors. Its multiply-adds are those of its convolutions and
linear layers; the share in modules that are rebuilt goes into regnet_fast/hosts/timm/architectures.tsv, of the
architectures where there is any of a convolution. Some twenty minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from regnet_fast.models import rebuild, restore

FILE = Path(__file__).parent.parent / "regnet_fast" / "hosts" / "timm" / "architectures.tsv"


def multiply_adds(layer: nn.Module, y: Tensor) -> int:
    """Of a convolution or linear layer that gave y."""
    if isinstance(layer, nn.Conv2d):
        return y.numel() * layer.weight[0].numel()
    return y.numel() * layer.in_features


def share(name: str) -> float:
    """The share of an architecture's multiply-adds that are in rebuilt modules. Raises what building or running it
    raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, device="meta").eval()
        paths = [path for path, _ in rebuild(model).rebuilt]
        inside = {id(m) for path in paths for m in model.get_submodule(path).modules()}
        if not any(isinstance(m, nn.Conv2d) for path in paths for m in model.get_submodule(path).modules()):
            return 0.0
        restore(model)
    counted = {True: 0, False: 0}

    def count(layer: nn.Module, inputs: tuple, y: Tensor) -> None:
        counted[id(layer) in inside] += multiply_adds(layer, y)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    return counted[True] / sum(counted.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="patterns of names; with any, nothing is written")
    options = parser.parse_args(arguments)
    names = [name for pattern in options.names or ["*"] for name in timm.list_models(pattern)]
    found = {}
    for name in names:
        try:
            value = share(name)
        except Exception as error:  # of one architecture
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            continue
        if math.isclose(value, 0):
            continue
        found[name] = value
        print(f"{name}\t{value:.3f}", flush=True)
    if not options.names:
        FILE.write_text("".join(f"{name}\t{value:.3f}\n" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
