"""The command `regnet-fast tune`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Annotated, Any

import typer

from .app import BatchesOption, DtypesOption, JsonOption, SizeOption, app
from .errors import check_environment, complain, compute_dtype, reported_errors
from .terminal import line, print_json, progress, show, table
from .verdicts import show_verdicts


@app.command()
def tune(
    models: Annotated[list[str], typer.Argument(help="timm model names, torchvision:NAME or transformers:FOLDER.")],
    batch: BatchesOption = [1],  # noqa: B006
    dtype: DtypesOption = ["float32"],  # noqa: B006
    size: SizeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds after which no further shape is begun.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the table has as well.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Write into the checkout, to be shipped.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is the fastest here for a model: on a CPU the variants of its layers, on a GPU the Triton kernels'
    configurations. Goes on where it was interrupted.
    """
    if device is None:
        device = _default_device()
    if device == "cpu":
        return _tune_cpu(models, batch, dtype, size, as_json)
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


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _tune_cpu(models: list[str], batch: list[int], dtype: list[str], size: int | None, as_json: bool) -> None:
    """Try every layer of the models in this process."""
    found = {}
    with reported_errors(), progress() as announce:
        from ..inspect import tune as tuning
        from ..inspect.verify import check_name

        check_environment()
        computes = [compute_dtype(name) for name in dtype]
        for model in models:
            check_name(model)
        for model, images, compute in itertools.product(models, batch, computes):
            announce(f"{model}: trying its layers")
            for verdict in tuning.tune_cpu(*tuning.subject(model, images, size, compute, "cpu")):
                found[verdict.problem] = verdict
    if as_json:
        return print_json([dataclasses.asdict(verdict) for verdict in found.values()])
    show_verdicts(found.values())
    line(f"{len(found)} layers and stages have a verdict; `regnet-fast verdicts` shows all that are kept")


def _show_tuning(found: list[Any]) -> None:
    rows = table("", "kernel", "shape", "heuristic, us", "best, us", "gain", "tried", "left out", flexible="shape")
    for result in found:
        shape = ", ".join(f"{field} {value}" for field, value in result.shape.items())
        times = (result.entry.heuristic_microseconds, result.entry.microseconds)
        skipped = ", ".join(f"{count} {reason}" for reason, count in result.skipped.items())
        rows.add_row(result.kernel, shape, *map(str, times), f"{result.gain:.2f}x", str(result.tried), skipped)
    show(rows)
