"""What `make demo` shows: a photograph classified by timm and by regnet_fast, how far apart they are and how fast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..blocks.fused import Fused
from ..classify import WeightsUnavailableError, class_names, load, open_image, preprocessing, rank
from .compare import EAGER, OURS, measure
from .explanation import explain
from .judging import judge
from .verify import Announce, randomize_norms, rebuilt, silent

MODEL = "regnety_016"
PHOTOGRAPH = "grace_hopper.jpg"


class PhotographMissingError(RuntimeError):
    """matplotlib, which ships the photograph, is not installed."""


def photograph() -> Path:
    """The portrait of Grace Hopper that matplotlib ships as sample data; it is in the public domain."""
    try:
        import matplotlib
    except ImportError as error:
        raise PhotographMissingError(
            "the demo's photograph comes with matplotlib: pip install 'regnet_fast[demo]', or name one with --image"
        ) from error
    path = Path(matplotlib.get_data_path()) / "sample_data" / PHOTOGRAPH
    if not path.exists():
        raise PhotographMissingError(f"this matplotlib ships no {PHOTOGRAPH}; name a photograph with --image")
    return path


def demo(
    name: str = MODEL,
    image: Path | None = None,
    size: int | None = None,
    pretrained: bool = True,
    rounds: int = 7,
    device: str = "cpu",
    announce: Announce = silent,
) -> Iterator[tuple[str, Any]]:
    """Yield what there is to show, as soon as it is known: (key, value) pairs in this order.

    `photograph`: its path and size. `weights`: in words. `top`: as `classify.rank` has it. `difference`: how far our
    logits are from timm eager's, and their `Check` against float64. `measured`: as `compare.measure` returns it.
    `backends`: labels, and how many layers each has.

    Raises UnknownModelError, PhotographMissingError, UnreadableImageError.
    """
    path = image or photograph()
    picture = open_image(path)
    yield "photograph", {"path": str(path), "width": picture.width, "height": picture.height}

    announce(f"loading {name}")
    base, weights, trained = _weights(name, pretrained)
    yield "weights", {"text": weights, "pretrained": trained}

    base = timm.utils.reparameterize_model(base, inplace=True).to(device)
    x = preprocessing(base, size)(picture)[None].to(device)
    ours = rebuilt(copy.deepcopy(base)).model
    with torch.no_grad():
        logits = ours(x)
        yield "top", rank(logits[0], class_names(base), 5)
        announce("comparing with timm eager and float64")
        yield "difference", _difference(base, x, logits)
    announce("timing")
    yield "measured", measure(base, x, rounds, compile=False, announce=announce)
    yield "backends", _backends(ours, tuple(x.shape))


def _weights(name: str, pretrained: bool) -> tuple[nn.Module, str, bool]:
    if pretrained:
        try:
            return load(name, build=timm.create_model), "pretrained", True
        except WeightsUnavailableError as error:
            reason = f"{error}. Seeded random weights instead, for which the comparison with timm means the same"
    else:
        reason = "seeded random weights"
    torch.manual_seed(0)
    return randomize_norms(load(name, pretrained=False, build=timm.create_model)), reason, False


def _difference(base: nn.Module, x: Tensor, logits: Tensor) -> dict[str, Any]:
    eager = base(x)
    last = torch.channels_last
    check = judge(
        "logits",
        logits,
        copy.deepcopy(base).to(memory_format=last)(x.contiguous(memory_format=last)),
        copy.deepcopy(base).double()(x.double()),
    )
    return {"from_eager": (logits - eager).abs().max().item(), "scale": eager.abs().max().item(), "check": check}


def _backends(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """How many layers of the model each backend serves, the most first."""
    if not any(isinstance(module, Fused) for module in model.modules()):
        return {}
    counts: dict[str, int] = {}
    for row in explain(model, input_shape):
        counts[row.label or row.backend] = counts.get(row.label or row.backend, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def lines(key: str, value: Any) -> list[str]:
    """One step of `demo` in words."""
    if key == "photograph":
        return [f"Photograph  {Path(value['path']).name}, {value['width']}x{value['height']}"]
    if key == "weights":
        return [f"Weights     {value['text']}"]
    if key == "top":
        return [f"  {probability:6.1%}  {name or f'class {index}'}" for index, name, probability in value]
    if key == "difference":
        check = value["check"]
        return [
            f"Difference  {value['from_eager']:.2g} at most from timm's logits, which reach {value['scale']:.2g}",
            f"            from float64: regnet_fast {check.max_ours:.2g}, timm {check.max_eager:.2g} at most"
            + (f"; FAIL: {check.failure}" if check.failure else ""),
        ]
    if key == "backends":
        counts = ", ".join(f"{label} ({count})" for label, count in value.items())
        return [f"Ran on      {counts or 'timm, unchanged'}"]
    if not value["correct"]:
        return [f"Not timed   {value['refused']}"]
    timed = {variant: value["variants"][variant]["median_ms"] for variant in (*EAGER, OURS)}
    over = value["over_eager"]
    quartiles = f"quartiles of the rounds {over['low']:.2f}-{over['high']:.2f}"
    return [
        "Time        " + ", ".join(f"{variant} {ms:.1f} ms" for variant, ms in timed.items()),
        f"            {over['ratio']:.2f}x as fast as {over['peer']} ({quartiles})",
    ]
