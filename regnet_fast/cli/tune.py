"""The command `regnet-fast tune`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from .app import BatchesOption, DtypesOption, JsonOption, SizeOption, app
from .errors import check_environment, complain, compute_dtype, reported_errors
from .terminal import line, print_json, progress
from .verdicts import show_verdicts


@app.command()
def tune(
    models: Annotated[list[str], typer.Argument(help="timm model names, torchvision:NAME or transformers:FOLDER.")],
    batch: BatchesOption = [1],  # noqa: B006
    dtype: DtypesOption = ["float32"],  # noqa: B006
    size: SizeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: a GPU if there is one]")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds after which no further shape is begun.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Forget what is known of these models first.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Write configurations into the checkout, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is the fastest here for a model: the variants of its layers, and on a GPU first the configurations of Triton
    kernels. Goes on where it was interrupted.
    """
    with reported_errors(), progress() as announce, ExitStack() as stack:
        from ..inspect import tune as tuning
        from ..inspect.verify import check_name
        from ..store import verdicts as kept

        device = device or _default_device()
        on_gpu = device != "cpu"
        if on_gpu or commit:
            tuning.check_device(device)
        check_environment(device)
        if commit:
            tuning.checkout_folder()
        if again:
            stack.enter_context(kept.again())
        computes = [compute_dtype(name) for name in dtype]
        for model in models:
            check_name(model)
        subjects = [tuning.Subject(m, n, size, d, device) for m, n, d in itertools.product(models, batch, computes)]
        found, left = _on_gpu(subjects, budget, commit, announce) if on_gpu else (_on_cpu(subjects, announce), 0)
    if left:
        complain(f"{left} kernels or layers are left: the same command goes on")
    if as_json:
        return print_json([dataclasses.asdict(verdict) for verdict in found])
    show_verdicts(found)
    line(f"{len(found)} verdicts; `regnet-fast verdicts` shows all that are kept")
    if not found and not left:
        line("there is a verdict on everything that runs; --again forgets it first")


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_cpu(subjects: list[Any], announce: Any) -> list[Any]:
    """Every layer and stage of the models, tried in this process."""
    from ..inspect import tune as tuning

    found = {}
    for subject in subjects:
        announce(f"{subject.model}: trying its layers")
        for verdict in tuning.tune_cpu(*subject.built()):
            found[verdict.problem] = verdict
    return [*found.values()]


def _on_gpu(subjects: list[Any], budget: float | None, commit: bool, announce: Any) -> tuple[list[Any], int]:
    """What is found about kernels and layers of the models in other processes, and how much is left."""
    from ..inspect import tune as tuning
    from ..store.environment import environment
    from ..store.verdicts import Verdicts

    verdicts = Verdicts(environment(subjects[0].device))
    found, left, deadline = [], 0, math.inf if budget is None else time.monotonic() + budget
    for subject in subjects:
        announce(f"{subject.model}: building and running")
        model, x = subject.built()
        try:
            with tuning.Search(subject, verdicts, deadline) as search:
                announce.expect(len(search.left))
                for verdict in search.found(announce):
                    found.append(verdict)
                    announce.advance()
                left += len(search.left)
        except tuning.TuneError as error:
            complain(str(error))
        left += tuning.settle(model, x, deadline, announce, found.append)
    if commit:
        tuning.ship(verdicts)
    return found, left
