"""The command `regnet-fast classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import DeviceOption, DtypeOption, JsonOption, app
from .errors import check_environment, complain, compute_dtype, reported_errors
from .terminal import line, print_json, progress


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Annotated[str, typer.Option(help="A timm model name, such as regnety_016.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights from a file: safetensors or torch.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Weights from the hub, unless a checkpoint is given.")] = True,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Of the checkpoint. [default: as trained]")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """The most probable classes of images."""
    with reported_errors(), progress() as announce:
        from ..classify import load, open_image, predict

        check_environment(device)
        compute = compute_dtype(dtype)
        for image in images:
            open_image(image)
        announce(f"loading {model}")
        network = load(model, pretrained, checkpoint, num_classes).to(device, compute)
        if checkpoint is None and not pretrained:
            complain("the weights are random, so these classes mean nothing")
        announce("classifying")
        predictions = list(predict(network, images, top))
    if as_json:
        return print_json({"model": model, "predictions": [prediction.as_dict() for prediction in predictions]})
    for prediction in predictions:
        line(prediction.image)
        for index, name, probability in prediction.top:
            line(f"  {probability:6.1%}  {name or f'class {index}'}")
