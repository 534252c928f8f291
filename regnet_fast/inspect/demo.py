"""What `make demo` shows: a photograph classified by timm and by regnet_fast, how far apart they are and how fast."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ..blocks.fused import Fused
from ..classify import WeightsUnavailableError, class_names, load, open_image, preprocessing, rank
from ..models import rebuild
from .compare import EAGER, OURS, measure
from .explanation import explain
from .judging import judge
from .timing import Announce
from .verify import randomize_norms

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
    name: str,
    image: Path | None,
    size: int | None,
    pretrained: bool,
    rounds: int,
    device: str,
    announce: Announce,
    show: Callable[[str], None],
) -> bool:
    """Show line by line, as soon as it is known: the photograph, where the weights are from, the classes, how far our
    logits are from timm eager's and both from float64, the times, and how many layers each backend has.

    Returns whether our result was right, and so timed. Raises UnknownModelError, PhotographMissingError,
    UnreadableImageError.
    """
    path = image or photograph()
    picture = open_image(path)
    show(f"Photograph  {path.name}, {picture.width}x{picture.height}")

    announce(f"loading {name}")
    base, weights = _weights(name, pretrained)
    show(f"Weights     {weights}")

    base = timm.utils.reparameterize_model(base, inplace=True).to(device)
    x = preprocessing(base, size)(picture)[None].to(device)
    ours = rebuild(copy.deepcopy(base)).model
    with torch.no_grad():
        logits = ours(x)
        for index, label, probability in rank(logits[0], class_names(base), 5):
            show(f"  {probability:6.1%}  {label or f'class {index}'}")
        announce("comparing with timm eager and float64")
        _show_difference(base, x, logits, show)
    announce("timing")
    measured = measure(base, x, rounds, compile=False, announce=announce, with_runtimes=False)
    if measured["correct"]:
        timed = [f"{variant} {measured['variants'][variant]['median_ms']:.1f} ms" for variant in (*EAGER, OURS)]
        over = measured["over_eager"]
        show(f"Time        {', '.join(timed)}")
        quartiles = f"quartiles of the rounds {over['low']:.2f}-{over['high']:.2f}"
        show(f"            {over['ratio']:.2f}x as fast as {over['peer']} ({quartiles})")
    else:
        show(f"Not timed   {measured['refused']}")
    show(f"Ran on      {_backends(ours, tuple(x.shape)) or 'timm, unchanged'}")
    return measured["correct"]


def _weights(name: str, pretrained: bool) -> tuple[nn.Module, str]:
    if pretrained:
        try:
            return load(name, build=timm.create_model), "pretrained"
        except WeightsUnavailableError as error:
            reason = f"{error}. Seeded random weights instead, for which the comparison with timm means the same"
    else:
        reason = "seeded random weights"
    torch.manual_seed(0)
    return randomize_norms(load(name, pretrained=False, build=timm.create_model)), reason


def _show_difference(base: nn.Module, x: Tensor, logits: Tensor, show: Callable[[str], None]) -> None:
    eager = base(x)
    last = torch.channels_last
    check = judge(
        "logits",
        logits,
        copy.deepcopy(base).to(memory_format=last)(x.contiguous(memory_format=last)),
        copy.deepcopy(base).double()(x.double()),
    )
    largest, scale = (t.abs().max().item() for t in (logits - eager, eager))
    show(f"Difference  {largest:.2g} at most from timm's logits, which reach {scale:.2g}")
    fault = f"; FAIL: {check.failure}" if check.failure else ""
    show(f"            from float64: regnet_fast {check.max_ours:.2g}, timm {check.max_eager:.2g} at most{fault}")


def _backends(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """How many layers of the model each backend serves, the most first; empty where none is fused."""
    if not any(isinstance(module, Fused) for module in model.modules()):
        return ""
    counts = Counter(row.label or row.backend for row in explain(model, input_shape))
    return ", ".join(f"{label} ({count})" for label, count in counts.most_common())
