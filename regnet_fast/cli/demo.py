"""The command `regnet-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import DeviceOption, SizeOption, app
from .errors import FAILED, check_environment, reported_errors
from .terminal import progress


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A timm model name.")] = "regnety_016",
    image: Annotated[Path | None, typer.Option(help="A photograph of your own.")] = None,
    size: SizeOption = None,
    pretrained: Annotated[bool, typer.Option(help="Weights from the hub where it can be reached.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each variant.")] = 7,
    device: DeviceOption = "cpu",
) -> None:
    """A photograph classified by timm and by regnet_fast: the classes, the difference and the times."""
    with reported_errors(), progress() as announce:
        from ..inspect import demo as demonstration

        check_environment(device)
        announce.print(f"Model       {model}")
        ok = demonstration.demo(model, image, size, pretrained, rounds, device, announce, announce.print)
    if not ok:
        raise typer.Exit(FAILED)
