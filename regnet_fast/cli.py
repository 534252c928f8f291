"""The command line: `regnet-fast info | classify | explain | compare | tune | convert | demo`, and those of
`cli_verify`, `cli_export` and `cli_train`.

Exit status: 0 done; 1 the check that was asked for failed; 2 the request is wrong (an unknown model, an option);
3 an image, a checkpoint, pretrained weights or a table cannot be read. With `--json` standard output holds JSON alone;
progress and messages go to standard error.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import line, progress, show, table

FAILED, USAGE, UNREADABLE = 1, 2, 3

app = typer.Typer(
    name="regnet-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Faster RegNet, RepVGG and ResNetV2 with timm's weights, keys and calls.",
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


def _complain(text: str) -> None:
    print(f"regnet-fast: {text}", file=sys.stderr)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, default=str))


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Turns what a user can cause into one line and an exit status, and shows no warnings but regnet_fast's own."""
    import torch

    from .backends import BackendError
    from .blocks.fused import FallbackWarning
    from .classify import UnreadableImageError, WeightsUnavailableError
    from .demo import PhotographMissingError
    from .kernels.tables import SmallerWarning, TableError, TableWarning
    from .tune import TuneError
    from .verify import UnknownModelError
    from .weights import CheckpointError

    for library in ("huggingface_hub", "timm", "torch", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for category in (FallbackWarning, SmallerWarning, TableWarning):
                warnings.simplefilter("once", category)
            warnings.showwarning = lambda message, *_, **__: _complain(str(message))
            yield
    except (
        UnreadableImageError, WeightsUnavailableError, CheckpointError, PhotographMissingError, TableError, OSError
    ) as error:  # fmt: skip
        _complain(str(error))
        raise typer.Exit(UNREADABLE) from None
    except (UnknownModelError, BackendError, TuneError, _UsageError) as error:
        _complain(str(error))
        raise typer.Exit(USAGE) from None
    except torch.OutOfMemoryError as error:
        _complain(f"{str(error).splitlines()[0]} Try a smaller --batch or --size.")
        raise typer.Exit(USAGE) from None


class _UsageError(ValueError):
    """An option has a value that cannot be used; the message says which can."""


def _dtype(name: str) -> Any:
    from .verify import DTYPES

    if name not in DTYPES:
        raise _UsageError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_environment(device: str = "cpu") -> None:
    """Raise _UsageError unless the device is here and REGNET_FAST_BACKEND names a backend."""
    import torch

    from .backends import forced_backend

    try:
        forced_backend()
    except ValueError as error:
        raise _UsageError(f"REGNET_FAST_BACKEND: {error}") from None
    try:
        torch.empty(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _UsageError(f"the device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(__version__)
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def _main(version: VersionOption = False) -> None:
    pass


@app.command()
def info(as_json: JsonOption = False) -> None:
    """What is installed, which devices there are, and which backend serves which dtype."""
    with _reported_errors():
        from .info import collect

        _check_environment()
        facts = collect()
    if as_json:
        return _print_json(facts)
    rows = table("Versions", "package", "version")
    for name, version in facts["versions"].items():
        rows.add_row(name, version or "not found")
    show(rows)
    rows = table("Devices", "device", "facts", flexible=("facts",))
    for device in facts["devices"]:
        described = (f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        rows.add_row(device["device"], f"{device['name']}: {', '.join(described)}")
    show(rows)
    title = "Backends, asked for a grouped 3x3 convolution"
    rows = table(title, "device", "backend", "dtype", "available", flexible=("available",))
    for row in facts["backends"]:
        answer = "yes" if row["available"] else f"no: {row['reason']}"
        rows.add_row(row["device"], row["backend"], row["dtype"], answer)
    show(rows)
    for row in facts["tuned"]:
        known = f"{row['shapes']} tuned shapes for {row['gpu']}" if row["shapes"] else "heuristics only"
        line(f"Triton kernels on {row['device']}: {known}; `regnet-fast tune MODEL` measures.")
    compiler, refused = facts["cpu_kernels"]["compiler"], facts["cpu_kernels"]["refused"]
    live = f"torch calls, for {refused}" if refused else f"compiled by {compiler}"
    line(f"Training passes on a CPU, float32: {live}.")
    for row in facts["cuda_kernels"]:
        where = f" on {row['device']}" if row["device"] else ""
        refused = "; ".join(f"not {way}: {reason}" for way, reason in row["refused"].items() if reason)
        compilers = f"built by nvcc {row['nvcc']} for {', '.join(row['built_for'])}" if row["nvcc"] else "not built"
        live = f"by {row['live']}" if row["live"] else "no way to them"
        line(f"CUDA C++ kernels{where}: {live} ({compilers}; NVRTC {row['nvrtc'] or 'none'}).")
        if refused:
            line(f"  {refused}.")
    if facts["forced_backend"]:
        line(f"REGNET_FAST_BACKEND forces {facts['forced_backend']}.")


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Annotated[str, typer.Option(help="A timm model name, such as regnety_016.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights from a file: safetensors or torch.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Weights from the hub, unless a checkpoint is given.")] = True,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Of the checkpoint. [default: as trained]")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """The most probable classes of images."""
    with _reported_errors(), progress() as announce:
        from .classify import load, open_image, predict

        _check_environment(device)
        compute = _dtype(dtype)
        for image in images:
            open_image(image)
        announce(f"loading {model}")
        network = load(model, pretrained, checkpoint, num_classes).to(device, compute)
        if checkpoint is None and not pretrained:
            _complain("the weights are random, so these classes mean nothing")
        announce("classifying")
        predictions = list(predict(network, images, top))
    if as_json:
        return _print_json({"model": model, "predictions": [prediction.as_dict() for prediction in predictions]})
    for prediction in predictions:
        line(prediction.image)
        for index, name, probability in prediction.top:
            line(f"  {probability:6.1%}  {name or f'class {index}'}")


@app.command()
def explain(
    model: ModelArgument,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
    size: SizeOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    bandwidth: Annotated[float | None, typer.Option(help="GB/s that a machine reaches, for modelled times.")] = None,
    peak: Annotated[float | None, typer.Option(help="TFLOP/s that it reaches in this dtype.")] = None,
    launch: Annotated[float | None, typer.Option(help="Microseconds that each kernel costs it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What runs for each layer of a model, on which backend, why not another, and what timm eager takes for it."""
    with _reported_errors(), progress() as announce:
        from .info import explain_model

        _check_environment(device)
        compute, ceilings = _dtype(dtype), _ceilings(bandwidth, peak, launch)
        announce(f"{model}: building and running")
        found = explain_model(model, batch, size, compute, device, ceilings)
    if as_json:
        return _print_json(found)
    if not found["layers"]:
        return line(f"{model} is no RegNet, RepVGG or ResNetV2: it is passed through as it is.")
    _show_layers(found)


def _ceilings(bandwidth: float | None, peak: float | None, launch: float | None) -> Any:
    """The ceilings in bytes, operations and seconds; None where they are not given."""
    from .roofline import Ceilings

    given = (bandwidth, peak, launch)
    if given == (None, None, None):
        return None
    if None in given or min(given) <= 0:
        raise _UsageError("a modelled time needs --bandwidth, --peak and --launch together, all of them positive")
    return Ceilings(bandwidth * 1e9, peak * 1e12, launch * 1e-6)


def _show_layers(found: dict[str, Any]) -> None:
    """A line for each layer, the reasons below, and the totals. "timm" and "ideal" stand right of what they are of."""
    shape = "x".join(map(str, found["input_shape"]))
    title = f"{found['model']}, {shape}, {found['dtype']}, {found['device']}: ours beside timm eager"
    work = ("MFLOP", "launches", "timm", "MB", "timm")
    times = ("us", "timm", "ideal") if found["ceilings"] else ()
    rows = table(title, "layer", "shape", "runs on", *work, *times, flexible=("shape", "runs on"), tight=True)
    reasons: dict[str, list[str]] = {}
    for row in found["layers"]:
        ours, eager = row["ours"], row["eager"]
        launches, sizes = ([one[key] for one in (ours, eager)] for key in ("kernels", "bytes"))
        work = (f"{row['flops'] / 1e6:.1f}", *map(str, launches), *(f"{size / 1e6:.2f}" for size in sizes))
        times = [f"{1e6 * one['seconds']:.1f}" for one in (ours, eager, row["ideal"]) if found["ceilings"]]
        shape = re.sub(rf"(?<!\S){found['input_shape'][0]}x(?=\d+x)", "", row["shape"])  # the title has the batch
        shape = shape if row["times"] == 1 else f"{row['times']} times {shape}"
        rows.add_row(row["layer"], shape, row["label"], *work, *times)
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
    line(f"{len(found['layers'])} layers ({served}), {totals['flops'] / 1e9:.2f} GFLOP")
    line("; ".join(_execution(title, totals[what]) for title, what in _EXECUTIONS.items()))
    untuned = sum(row["label"] == "Triton" for row in found["layers"])
    if untuned and found["device"].startswith("cuda"):
        command = f"regnet-fast tune {found['model']} --batch {found['input_shape'][0]} --dtype {found['dtype']}"
        line(f"{untuned} layers run in heuristic configurations; `{command}` measures which are faster")


_EXECUTIONS = {"ours": "ours", "timm eager": "eager", "ideal": "ideal"}


def _execution(title: str, found: dict[str, Any]) -> str:
    """The sums of all layers: launches, memory traffic and, where it is modelled, time."""
    time = "" if found["seconds"] is None else f", {1e6 * found['seconds']:.1f} us"
    return f"{title}: {found['kernels']} launches, {found['bytes'] / 1e6:.1f} MB{time}"


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="timm model names, torchvision:NAME or transformers:FOLDER.")],
    batch: BatchesOption = [1],  # noqa: B006
    dtype: DtypesOption = ["float32"],  # noqa: B006
    size: SizeOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each variant; a result to quote has at least 7.")] = 7,
    compile: Annotated[bool, typer.Option(help="Time torch.compile too: a minute or more a case.")] = True,
    all_peers: Annotated[bool, typer.Option("--all-peers", help="Also compile channels_last, max-autotune.")] = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Times of timm eager, torch.compile and regnet_fast. A wrong result is not timed: exit status 1."""
    cases: list[dict[str, Any]] = []
    with _reported_errors(), progress(len(models) * len(batch) * len(dtype)) as announce:
        from . import compare as comparison
        from . import info
        from .verify import check_name

        _check_environment(device)
        computes = [_dtype(name) for name in dtype]
        for model in models:
            check_name(model)
        facts = info.conditions(device)
        for model, images, compute in itertools.product(models, batch, computes):
            cases.append(
                comparison.compare(
                    model, images, compute, device, rounds, compile, size=size, all_peers=all_peers, announce=announce
                )
            )
            announce.advance()
    if as_json:
        command = shlex.join(["regnet-fast", *sys.argv[1:]])
        means = comparison.geometric_means(cases)
        _print_json({"command": command, "conditions": facts, "cases": cases, "geometric_means": means})
    elif as_markdown:
        print(comparison.markdown(cases, info.conditions_line(facts)))
    else:
        rows = table("", *(title for title, _ in comparison.COLUMNS))
        for case in cases:
            rows.add_row(*(text(case) for _, text in comparison.COLUMNS))
        show(rows)
        for text in (*comparison.summary(cases), info.conditions_line(facts)):
            line(text)
    if not all(case["correct"] for case in cases):
        raise typer.Exit(FAILED)


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
    with _reported_errors(), progress() as announce:
        from . import tune as tuning
        from .kernels import tables
        from .verify import check_name

        tuning.check_device(device)
        _check_environment(device)
        folder = tuning.checkout_folder() if commit else tables.user_folder()
        computes = [_dtype(name) for name in dtype]
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
        _complain(f"{wrong} configurations are left out whose results are wrong: not the heuristic's within rounding")
    if as_json:
        return _print_json({"folder": folder, "left": left, "results": [result.as_dict() for result in found]})
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


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of timm or torchvision, or a folder of transformers.")],
    destination: Annotated[Path, typer.Argument(help="A new file, or for transformers a new folder.")],
    to: Annotated[str | None, typer.Option(help="timm, torchvision or transformers. [default: by DESTINATION]")] = None,
    as_json: JsonOption = False,
) -> None:
    """The weights of a RegNetX or RegNetY in the layout of another library, unchanged to the last bit."""
    with _reported_errors():
        from .conversion import convert_checkpoint

        try:
            found = convert_checkpoint(source, destination, to)
        except ValueError as error:
            raise _UsageError(str(error)) from None
    if as_json:
        return _print_json(vars(found))
    depths = ", ".join(map(str, found.config["depths"]))
    kind = f"RegNet{found.config['layer_type'].upper()} with {depths} blocks"
    line(f"{found.source} ({found.layout}) -> {found.destination} ({found.to}): {kind}, {found.tensors} tensors")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A timm model name.")] = "regnety_016",
    image: Annotated[Path | None, typer.Option(help="A photograph of your own.")] = None,
    size: SizeOption = None,
    pretrained: Annotated[bool, typer.Option(help="Weights from the hub where it can be reached.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each variant.")] = 7,
    device: DeviceOption = "cpu",
) -> None:
    """A photograph classified by timm and by regnet_fast: the classes, the difference and the times."""
    ok = True
    with _reported_errors(), progress() as announce:
        from . import demo as demonstration

        _check_environment(device)
        announce.print(f"Model       {model}")
        for key, value in demonstration.demo(model, image, size, pretrained, rounds, device, announce):
            for text in demonstration.lines(key, value):
                announce.print(text)
            if key == "measured":
                ok = value["correct"]
    if not ok:
        raise typer.Exit(FAILED)


import regnet_fast.cli_export  # noqa: E402  (these register their commands; `from .` would ask timm for the names)
import regnet_fast.cli_train  # noqa: E402
import regnet_fast.cli_verify  # noqa: E402, F401
