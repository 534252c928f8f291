"""The command `regnet-fast convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, app
from .errors import UsageError, reported_errors
from .terminal import line, print_json


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of timm or torchvision, or a folder of transformers.")],
    destination: Annotated[Path, typer.Argument(help="A new file, or for transformers a new folder.")],
    to: Annotated[str | None, typer.Option(help="timm, torchvision or transformers. [default: by DESTINATION]")] = None,
    as_json: JsonOption = False,
) -> None:
    """The weights of a RegNetX or RegNetY in the layout of another library, unchanged to the last bit."""
    with reported_errors():
        from ..weights.conversion import convert_checkpoint

        try:
            found = convert_checkpoint(source, destination, to)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if as_json:
        return print_json(vars(found))
    depths = ", ".join(map(str, found.config["depths"]))
    kind = f"RegNet{found.config['layer_type'].upper()} with {depths} blocks"
    line(f"{found.source} ({found.layout}) -> {found.destination} ({found.to}): {kind}, {found.tensors} tensors")
