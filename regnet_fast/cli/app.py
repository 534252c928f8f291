"""The application that commands register with, and the options that several of them have."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="regnet-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Faster convolutional networks of timm, torchvision and transformers: the same weights, keys and calls.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")]
SizeOption = Annotated[int | None, typer.Option(min=1, help="Height and width of the images. [default: as trained]")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DtypesOption = Annotated[list[str], typer.Option(help="float32, bfloat16 or float16; may be given several times.")]
BatchesOption = Annotated[list[int], typer.Option(min=1, help="Images; may be given several times.")]
ModelArgument = Annotated[
    str, typer.Argument(help="A timm model name, such as regnety_016; torchvision:NAME; or transformers:FOLDER.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def _main(version: VersionOption = False) -> None:
    pass
