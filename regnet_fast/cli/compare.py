"""The command `regnet-fast compare`."""

from __future__ import annotations

import itertools
import shlex
import sys
from typing import Annotated, Any

import typer

from .app import BatchesOption, DeviceOption, DtypesOption, JsonOption, SizeOption, app
from .errors import FAILED, check_environment, compute_dtype, reported_errors
from .terminal import line, print_json, progress, show, table


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="timm model names, torchvision:NAME or transformers:FOLDER.")],
    batch: BatchesOption = [1],  # noqa: B006
    dtype: DtypesOption = ["float32"],  # noqa: B006
    size: SizeOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each variant; a result to quote has at least 7.")] = 7,
    compile: Annotated[bool, typer.Option(help="Time torch.compile too: a minute or more a case.")] = True,
    all_peers: Annotated[bool, typer.Option("--all-peers", help="Also compile channels_last, max-autotune.")] = False,
    runtimes: Annotated[bool, typer.Option(help="Time OpenVINO and ONNX Runtime too, where installed: CPU.")] = True,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Times of timm eager, torch.compile, runtimes and regnet_fast. A wrong result is not timed: exit status 1."""
    cases: list[dict[str, Any]] = []
    with reported_errors(), progress(len(models) * len(batch) * len(dtype)) as announce:
        from ..inspect import compare as comparison
        from ..inspect import info
        from ..inspect.verify import check_name

        check_environment(device)
        computes = [compute_dtype(name) for name in dtype]
        for model in models:
            check_name(model)
        facts = info.conditions(device)
        for model, images, compute in itertools.product(models, batch, computes):
            cases.append(
                comparison.compare(
                    *(model, images, compute, device, rounds, compile),
                    size=size,
                    all_peers=all_peers,
                    with_runtimes=runtimes,
                    announce=announce,
                )
            )
            announce.advance()
    if as_json:
        command = shlex.join(["regnet-fast", *sys.argv[1:]])
        means = comparison.geometric_means(cases)
        print_json({"command": command, "conditions": facts, "cases": cases, "geometric_means": means})
    elif as_markdown:
        print(comparison.markdown(cases, info.conditions_line(facts)))
    else:
        titles, *found = comparison.table(cases)
        rows = table("", *titles)
        for row in found:
            rows.add_row(*row)
        show(rows)
        for text in (*comparison.summary(cases), info.conditions_line(facts)):
            line(text)
    if not all(case["correct"] for case in cases):
        raise typer.Exit(FAILED)
