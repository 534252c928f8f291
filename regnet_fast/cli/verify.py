"""The command `regnet-fast verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import DeviceOption, DtypesOption, JsonOption, ModelArgument, SizeOption, app
from .errors import FAILED, UsageError, check_environment, compute_dtype, reported_errors
from .terminal import line, print_json, progress, show, table


@app.command()
def verify(
    model: ModelArgument,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 2,
    size: SizeOption = None,
    dtype: DtypesOption = ["float32"],  # noqa: B006
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(help="Of the random weights and input.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="Draw the errors of all layers: .svg, .png or .pdf.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with the figure in it, one file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A model's numbers against timm eager and float64, stage by stage. Exit status 1 where they miss the rule."""
    found = []
    with reported_errors(), progress(len(dtype)) as announce:
        from ..inspect import verification_report as report
        from ..inspect import verify as verification

        check_environment(device)
        try:
            report.check_request(figure, html)
        except report.ReportError as error:
            raise UsageError(str(error)) from None
        for compute in [compute_dtype(name) for name in dtype]:
            found.append(verification.verify(model, batch, size, compute, device, seed, announce))
            announce.advance()
        if figure is not None:
            report.figure(found).savefig(figure)
        if html is not None:
            html.write_text(report.html(found), encoding="utf-8")
    ok = all(one.ok for one in found)
    if as_json:
        print_json({"ok": ok, "verifications": [one.as_dict() for one in found]})
    else:
        for one in found:
            _show_verification(one)
    if not ok:
        raise typer.Exit(FAILED)


def _show_verification(found: Any) -> None:
    shape = "x".join(map(str, found.input_shape))
    title = f"{found.model}, {shape}, {found.dtype}, {found.device}: errors against float64, ours and timm's"
    rows = table(title, "stage", "shape", "largest", "timm", "ratio", "RMS", "timm", "worst at", "")
    for check in found.checks:
        largest = (f"{check.max_ours:.1e}", f"{check.max_eager:.1e}", f"{check.ratio:.2f}")
        where, verdict = ",".join(map(str, check.where)), "ok" if check.ok else "FAIL"
        rms = (f"{check.rms_ours:.1e}", f"{check.rms_eager:.1e}")
        rows.add_row(check.stage, "x".join(map(str, check.shape)), *largest, *rms, where, verdict)
    show(rows)
    for check in found.checks:
        if not check.ok:
            line(f"FAIL {check.stage}: {check.failure}")
    if not found.rebuilt:
        return line(f"Nothing of {found.model} is rebuilt: it is passed through as it is.")
    if found.first_fault is not None:
        line(f"first layer beyond the rule: {found.first_fault.stage}: {found.first_fault.failure}")
    worst = found.worst
    line(f"worst of {len(found.layers)} layers: {worst.stage}, {worst.ratio:.2f} times timm's error; {worst.place}")
