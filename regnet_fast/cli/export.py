"""The command `regnet-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, ModelArgument, SizeOption, app
from .errors import FAILED, UsageError, complain, reported_errors
from .terminal import line, print_json, progress


@app.command()
def export(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(help="The file to write, which ends in .onnx.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights from a file: safetensors or torch.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Weights from the hub, unless a checkpoint is given.")] = True,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Of the checkpoint. [default: as trained]")] = None,
    size: SizeOption = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators. [default: 18]")] = None,
    as_json: JsonOption = False,
) -> None:
    """A model as an ONNX file for any number of images, checked with ONNX Runtime."""
    with reported_errors(), progress() as announce:
        from .. import export as exporting
        from ..classify import load
        from ..inspect.verify import input_size

        try:
            exporting.check_request(file, opset or exporting.OPSET)
            announce(f"loading {model}")
            network = load(model, pretrained, checkpoint, num_classes)
            announce(f"exporting {model} and running the file")
            found = exporting.onnx(network, file, input_size(network, size), opset or exporting.OPSET)
        except exporting.WrongFileError as error:
            complain(str(error))
            raise typer.Exit(FAILED) from None
        except exporting.ExportError as error:
            raise UsageError(str(error)) from None
        if checkpoint is None and not pretrained:
            complain("the weights are random, so what the file computes means nothing")
    if as_json:
        return print_json(found.as_dict())
    ends = (f"{name} {'x'.join(map(str, shape))}" for name, shape in {**found.inputs, **found.outputs}.items())
    line(f"{found.path}: {found.bytes / 1e6:.1f} MB, opset {found.opset}; {', '.join(ends)}")
    for check in found.checks:
        line(f"  {check.stage}: largest error {check.max_ours:.1e} against float64, timm's {check.max_eager:.1e}")
