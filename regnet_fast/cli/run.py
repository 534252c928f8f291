"""The command `regnet-fast run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .errors import UsageError, complain, reported_errors


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="A Python script, such as timm's train.py.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments.")] = None,
) -> None:
    """Run a script that is written for timm, unchanged, with rebuilt models."""
    with reported_errors():
        if not script.is_file():
            raise UsageError(f"there is no script '{script}'")
    from ..run import run_script

    raise SystemExit(run_script(script, arguments or [], complain))
