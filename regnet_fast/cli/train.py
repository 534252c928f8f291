"""The commands `regnet-fast train | validate`: the fields of a dataclass of `options` are options of the same names."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..training.options import OptionError, TrainOptions, ValidateOptions
from .app import JsonOption, app
from .errors import FAILED, UNREADABLE, UsageError, check_environment, complain, reported_errors
from .terminal import line, print_json, progress

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
INTERRUPTED = 130  # as shells have it: 128 and the number of the signal


def _command(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of an instance of `options` and of `as_json`: a command with a field's option for each."""
    hints = typing.get_type_hints(options, include_extras=True)

    def parameter(field: dataclasses.Field) -> inspect.Parameter:
        kind, text = typing.get_args(hints[field.name])
        names = [f"--{field.name.replace('_', '-')}"] if field.default is False else []  # and no --no-...
        shown = {"help": text, "show_default": field.default not in (None, "", False)}
        positional = field.name == "data_dir"
        made = typer.Argument(metavar="DATA_DIR", **shown) if positional else typer.Option(*names, **shown)
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        return inspect.Parameter(field.name, _KEYWORD, default=default, annotation=Annotated[kind, made])

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def command(as_json: bool, **values: Any) -> None:
            function(options(**values), as_json)

        parameters = [parameter(field) for field in dataclasses.fields(options)]
        parameters.append(inspect.Parameter("as_json", _KEYWORD, default=False, annotation=JsonOption))
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(name=function.__name__, help=function.__doc__)(command)
        return function

    return register


@contextmanager
def _errors() -> Iterator[None]:
    """What `reported_errors` does, for the errors and the log of these commands as well."""
    from ..training.datasets import DatasetError

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("regnet-fast: %(message)s"))
    logger = logging.getLogger("regnet_fast")
    with reported_errors():
        logger.addHandler(handler)
        try:
            yield
        except OptionError as error:
            raise UsageError(str(error)) from None
        except DatasetError as error:
            complain(str(error))
            raise typer.Exit(UNREADABLE) from None
        finally:
            logger.removeHandler(handler)


@_command(TrainOptions)
def train(options: TrainOptions, as_json: bool) -> None:
    """Train a model on a folder of images or a dataset; under torchrun in several processes."""
    with _errors(), progress() as announce:
        from ..training import train as training
        from ..training.recipe import is_primary

        check_environment()
        primary = is_primary()
        show = announce.print if primary and not as_json else _nothing
        hear = announce if primary else _nothing
        try:
            found = training.train(options, hear, lambda epoch: show(_epoch_line(epoch)))
        except training.TrainingError as error:
            complain(str(error))
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            complain("interrupted; --resume with the last.pth.tar of the run goes on after its last whole epoch")
            raise typer.Exit(INTERRUPTED) from None
    if not primary:
        return
    if as_json:
        return print_json(found.as_dict())
    line(f"best: epoch {found.best_epoch}, top-1 {found.best_top1:.2f} %; files: {found.output}")


def _nothing(text: str) -> None:
    """What a process shows that is not heard."""


def _epoch_line(epoch: Any) -> str:
    found = epoch.evaluation
    losses = f"loss {epoch.train_loss:.4f} in training, {found.loss:.4f} in evaluation"
    tops = f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %"
    return f"epoch {epoch.epoch}: {losses}, {tops}, lr {epoch.lr:.4g}, {epoch.images_per_second:.1f} images/s"


@_command(ValidateOptions)
def validate(options: ValidateOptions, as_json: bool) -> None:
    """Top-1, top-5 and loss of a model on a folder of images or a dataset."""
    with _errors(), progress() as announce:
        from ..training import validate as validation

        check_environment()
        found = validation.validate(options, announce)
        if not options.pretrained and options.checkpoint is None:
            complain("the weights are random, so these numbers mean nothing")
    if as_json:
        return print_json(found.as_dict())
    one = found.evaluation
    line(f"{found.model}: top-1 {one.top1:.3f} %, top-5 {one.top5:.3f} %, loss {one.loss:.4f}, {one.images} images")
    conditions = f"{found.img_size} pixels, crop {found.crop_pct:.3f}, {found.interpolation}"
    line(f"{conditions}; {found.rebuilt} modules rebuilt; {one.images / found.seconds:.1f} images/s")
