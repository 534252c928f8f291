"""The commands `regnet-fast verdicts`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import JsonOption, app
from .errors import UsageError, reported_errors
from .terminal import line, print_json, show, table

verdicts = typer.Typer(help="What trials found on this machine: list, forget, export and import it.")
app.add_typer(verdicts, name="verdicts")


@verdicts.callback(invoke_without_command=True)
def _list(
    context: typer.Context,
    forget: Annotated[bool, typer.Option("--forget", help="Remove all verdicts.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What trials found on this machine, for this and for other versions."""
    if context.invoked_subcommand is not None:
        return
    with reported_errors():
        from ..store import verdicts as kept

        if forget:
            return line(f"{kept.forget()} verdicts removed from {kept.folder()}")
        if as_json:
            return print_json(kept.exported())
        by_environment: dict[str, list[Any]] = {}
        for environment, verdict, _ in kept.entries():
            words = ", ".join(f"{name} {value}" for name, value in environment.items())
            by_environment.setdefault(words, []).append(verdict)
        for words, found in by_environment.items():
            line(words)
            show_verdicts(found)
        line(f"{sum(map(len, by_environment.values()))} verdicts in {kept.folder()}")


@verdicts.command("export")
def _export(file: Annotated[Path, typer.Argument(help="A new file.")]) -> None:
    """All verdicts into one file, for a container image or other machines of the same kind."""
    with reported_errors():
        from ..store import verdicts as kept

        content = kept.exported()
        with file.open("x") as out:
            json.dump(content, out, indent=1)
    line(f"{len(content['verdicts'])} verdicts in {file}")


@verdicts.command("import")
def _import(file: Annotated[Path, typer.Argument(help="A file that `regnet-fast verdicts export` wrote.")]) -> None:
    """Keep the verdicts of a file. They serve where device, libraries, threads and kernels are the same."""
    with reported_errors():
        from ..store import verdicts as kept

        try:
            count = kept.imported(json.loads(file.read_bytes()))
        except ValueError as error:
            raise UsageError(f"{file}: {error}") from None
    line(f"{count} verdicts kept in {kept.folder()}")


def show_verdicts(found: Iterable[Any]) -> None:
    """A table of verdicts, with the times of other candidates, and how many of them failed in which way."""
    rows = table("", "problem", "chosen", "us", "others", flexible=("problem", "chosen", "others"))
    for verdict in found:
        outcomes = dict(verdict.outcomes)
        chosen = outcomes.pop(verdict.chosen)
        others = [f"{name} {outcome.us:.1f} us" for name, outcome in outcomes.items() if outcome.us is not None]
        for status, count in Counter(o.status for o in outcomes.values() if o.us is None).items():
            names = [name for name, outcome in outcomes.items() if (outcome.status, outcome.us) == (status, None)]
            others.append(f"{count if count > 2 else ', '.join(names)} {status}")
        us = chosen.status if chosen.us is None else f"{chosen.us:.1f}"
        rows.add_row(verdict.problem, verdict.chosen, us, ", ".join(others))
    show(rows)
