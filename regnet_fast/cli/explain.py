"""The command `regnet-fast explain`."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from .app import DeviceOption, DtypeOption, JsonOption, ModelArgument, SizeOption, app
from .errors import UsageError, check_environment, compute_dtype, reported_errors
from .terminal import line, print_json, progress, show, table


@app.command()
def explain(
    model: ModelArgument,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
    size: SizeOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    train: Annotated[bool, typer.Option("--train", help="A training step, instead of inference.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What runs for each layer of a model, on which backend, and why not another."""
    with reported_errors(), progress() as announce:
        from ..inspect.info import explain_model

        check_environment(device)
        compute = compute_dtype(dtype)
        announce(f"{model}: building and running")
        try:
            found = explain_model(model, batch, size, compute, device, train)
        except ValueError as error:  # such as a batch of one value per channel
            raise UsageError(str(error)) from None
    if as_json:
        return print_json(found)
    if not found["layers"]:
        return line(f"{model} is no RegNet, RepVGG or ResNetV2: it is passed through as it is.")
    _show_layers(found)


def _show_layers(found: dict[str, Any]) -> None:
    """A line for each layer, the reasons below, and the totals."""
    shape = "x".join(map(str, found["input_shape"]))
    title = f"{found['model']}, {shape}, {found['dtype']}, {found['device']}"
    title, columns = (f"{title}: a training step", TRAINED) if found["train"] else (title, EVALUATED)
    rows = table(title, *columns, flexible=("shape", "runs on", "forward", "backward"), tight=True)
    reasons: dict[str, list[str]] = {}
    for row in found["layers"]:
        work = (f"{row['flops'] / 1e6:.1f}", str(len(row["launches"])), f"{row['bytes'] / 1e6:.2f}")
        shape = re.sub(rf"(?<!\S){found['input_shape'][0]}x(?=\d+x)", "", row["shape"])  # the title has the batch
        shape = shape if row["times"] == 1 else f"{row['times']} times {shape}"
        rows.add_row(row["layer"], shape, row["label"], *((row["backward"],) if found["train"] else work))
        if row["reason"]:
            reasons.setdefault(f"{row['backend']}, because {row['reason']}", []).append(row["layer"])
    show(rows)
    for reason, layers in reasons.items():
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        line(f"{layers[0]}{more}: {reason}")
    for path, kind, reason in found["kept"]:
        line(f"kept as timm makes it: {path} ({kind}): {reason}")
    totals = found["totals"]
    served = ", ".join(f"{name} {count}" for name, count in totals["layers_by_backend"].items())
    work = f", {totals['flops'] / 1e9:.2f} GFLOP, {totals['launches']} launches, {totals['bytes'] / 1e6:.1f} MB"
    line(f"{len(found['layers'])} layers ({served}){'' if found['train'] else work}")
    untuned = sum(row["label"] == "Triton" for row in found["layers"])
    if untuned and found["device"].startswith("cuda"):
        command = f"regnet-fast tune {found['model']} --batch {found['input_shape'][0]} --dtype {found['dtype']}"
        line(f"{untuned} layers run in heuristic configurations; `{command}` measures which are faster")


EVALUATED = ("layer", "shape", "runs on", "MFLOP", "launches", "MB")
TRAINED = ("layer", "shape", "forward", "backward")
