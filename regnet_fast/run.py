"""A script that is written for timm, run unchanged with this package's `create_model` in the place of timm's.

Wherever timm has put its `create_model`, from where a script may take it, ours stands for as long as the script runs;
ours holds timm's own, so that neither calls itself. Processes that the script forks have it too. Processes that it
spawns import timm afresh and get timm's: data-loader workers build no models, and `torchrun` starts each process with
this command.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.utils import world_info_from_env

from . import models
from .blocks.fused import Fused

FAILED, INTERRUPTED = 1, 130


def run_script(script: str | os.PathLike, arguments: Sequence[str], say: Callable[[str], None]) -> int | str | None:
    """Run a script as `python script arguments...` does, and say at the end, in the first process, what was rebuilt.

    Returns what the script gave to `sys.exit`, or the status that Python ends with after an exception. The exception's
    traceback is on standard error, from the script's own frame on.
    """
    built: Counter[str] = Counter()
    with _as_main(script, arguments), replaced_create_model(built):
        try:
            runpy.run_path(os.path.abspath(script), run_name="__main__")
            status = None
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BaseException as error:
            traceback.print_exception(type(error), error, _from_script(error.__traceback__))
            status = FAILED
    if world_info_from_env()[1] == 0:
        say("; ".join(f"{text}{f' ({times} times)' if times > 1 else ''}" for text, times in built.items()) or _NOTHING)
    return status


_NOTHING = "the script built no model with timm's create_model"


@contextmanager
def replaced_create_model(built: Counter[str]) -> Iterator[None]:
    """Inside the block every module of timm that holds `create_model` holds ours, which counts what it builds."""
    original = models._create_model

    @functools.wraps(original)
    def create_model(*args: Any, **kwargs: Any) -> Any:
        model = models.create_model(*args, **kwargs)
        rebuilt = sum(isinstance(module, Fused) for module in model.modules())
        name = kwargs.get("model_name", args[0] if args else type(model).__name__)
        built[f"{name}: {rebuilt} modules rebuilt" if rebuilt else f"{name}: as timm makes it"] += 1
        return model

    _replace(original, create_model)
    try:
        yield
    finally:
        _replace(create_model, original)


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """In every module of timm, by whichever name it was imported."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "timm" and vars(module).get("create_model") is old:
            module.create_model = new


@contextmanager
def _as_main(script: str | os.PathLike, arguments: Sequence[str]) -> Iterator[None]:
    """Arguments and search path as a script finds them that Python itself started."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _from_script(frames: Any) -> Any:
    """A traceback without the frames above the script's; all of them where it has none, as for a syntax error."""
    below = frames
    while below is not None and below.tb_frame.f_globals.get("__name__") != "__main__":
        below = below.tb_next
    return below or frames
