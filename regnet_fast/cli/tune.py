"""The command `regnet-fast tune`."""

from __future__ import annotations

import itertools
import math
import time
from typing import Annotated, Any

import typer

from .app import BatchesOption, DeviceOption, DtypesOption, JsonOption, SizeOption, app
from .errors import check_environment, complain, compute_dtype, reported_errors
from .terminal import line, print_json, progress, show, table


@app.command()
def tune(
    models: Annotated[list[str], typer.Argument(help="timm model names, torchvision:NAME or transformers:FOLDER.")],
    batch: BatchesOption = [1],  # noqa: B006
    dtype: DtypesOption = ["float32"],  # noqa: B006
    size: SizeOption = None,
    device: DeviceOption = "cuda",
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds after which no further shape is begun.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the table has as well.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Write into the checkout, to be shipped.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The fastest configurations of the Triton kernels for a model, into a table. Goes on where it was interrupted."""
    found, left = [], 0
    with reported_errors(), progress() as announce:
        from ..inspect import tune as tuning
        from ..inspect.verify import check_name
        from ..kernels import tables

        tuning.check_device(device)
        check_environment(device)
        folder = tuning.checkout_folder() if commit else tables.user_folder()
        computes = [compute_dtype(name) for name in dtype]
        for model in models:
            check_name(model)
        deadline = math.inf if budget is None else time.monotonic() + budget
        for model, images, compute in itertools.product(models, batch, computes):
            announce(f"{model}: building and running")
            network, x = tuning.subject(model, images, size, compute, device)
            shapes = tuning.missing(network, x, folder, again)
            announce.expect(len(shapes))
            left += len(shapes)
            for result in tuning.tune(network, x, shapes, folder, deadline, announce=announce):
                found.append(result)
                announce.advance()
                left -= 1
    wrong = sum(result.skipped.get(tuning.WRONG, 0) for result in found)
    if wrong:
        complain(f"{wrong} configurations are left out whose results are wrong: not the heuristic's within rounding")
    if as_json:
        return print_json({"folder": folder, "left": left, "results": [result.as_dict() for result in found]})
    _show_tuning(found)
    faster = sum(result.entry.config is not None for result in found)
    line(f"{len(found)} shapes measured, {faster} of them faster than in the heuristic configuration; tables: {folder}")
    if left:
        line(f"{left} shapes are left: the same command goes on")
    elif not found:
        line("the tables have every shape that is launched; --again measures them once more")


def _show_tuning(found: list[Any]) -> None:
    rows = table("", "kernel", "shape", "heuristic, us", "best, us", "gain", "tried", "left out", flexible="shape")
    for result in found:
        shape = ", ".join(f"{field} {value}" for field, value in result.shape.items())
        times = (result.entry.heuristic_microseconds, result.entry.microseconds)
        skipped = ", ".join(f"{count} {reason}" for reason, count in result.skipped.items())
        rows.add_row(result.kernel, shape, *map(str, times), f"{result.gain:.2f}x", str(result.tried), skipped)
    show(rows)
