"""What a user can cause, as one line on standard error and an exit status."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

FAILED, USAGE, UNREADABLE = 1, 2, 3


def complain(text: str) -> None:
    """A line to standard error."""
    print(f"regnet-fast: {text}", file=sys.stderr)


class UsageError(ValueError):
    """An option has a value that cannot be used; the message says which can."""


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turns what a user can cause into one line and an exit status, and shows no warnings but regnet_fast's own."""
    import torch

    from ..backends import BackendError
    from ..blocks.fused import FallbackWarning
    from ..classify import UnreadableImageError, WeightsUnavailableError
    from ..inspect.demo import PhotographMissingError
    from ..inspect.tune import TuneError
    from ..inspect.verify import UnknownModelError
    from ..kernels.tables import SmallerWarning
    from ..store import CacheWarning
    from ..store.verdicts import VerdictError
    from ..trials.process import StartError
    from ..trials.session import TrialWarning
    from ..weights import CheckpointError

    for library in ("huggingface_hub", "timm", "torch", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for category in (FallbackWarning, SmallerWarning, CacheWarning, TrialWarning):
                warnings.simplefilter("once", category)
            warnings.showwarning = lambda message, *_, **__: complain(str(message))
            yield
    except (
        UnreadableImageError, WeightsUnavailableError, CheckpointError, PhotographMissingError, VerdictError, OSError
    ) as error:  # fmt: skip
        complain(str(error))
        raise typer.Exit(UNREADABLE) from None
    except (UnknownModelError, BackendError, TuneError, StartError, UsageError) as error:
        complain(str(error))
        raise typer.Exit(USAGE) from None
    except torch.OutOfMemoryError as error:
        complain(f"{str(error).splitlines()[0]} Try a smaller --batch or --size.")
        raise typer.Exit(USAGE) from None


def compute_dtype(name: str) -> Any:
    """The dtype of a name. Raises UsageError."""
    from ..inspect.verify import DTYPES

    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_environment(device: str = "cpu") -> None:
    """Raise UsageError unless the device is here and REGNET_FAST_BACKEND names a backend."""
    import torch

    from ..backends import forced_backend

    try:
        forced_backend()
    except ValueError as error:
        raise UsageError(f"REGNET_FAST_BACKEND: {error}") from None
    try:
        torch.empty(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"the device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None
