"""The fastest configuration of each Triton kernel on this GPU, for the shapes that a model launches.

Every configuration is launched on the model's own operands. One whose result is another than that of the heuristic's
configuration by more than rounding is never chosen. All others are timed in short; then the fastest few are timed with
care, interleaved with the heuristic's, which stays unless one is faster by more than `LEAST_GAIN`. The table is written
after every shape, so that an interrupted run goes on where it ended.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import backend, triton
from ..kernels import tables
from ..kernels.tables import Choice, Entry
from ..observer import observing
from ..store.verdicts import Verdict
from ..trials import cpu
from ..trials.modes import mode
from . import info
from .timing import Announce, silent, synchronize
from .verify import host_model, input_size, randomize_norms, rebuilt

SCREENING_ROUNDS, ROUNDS = 3, 25
FINALISTS = 5
LEAST_GAIN = 0.02
WRONG = "wrong result"
QUEUE_US = 300  # in which a call is queued for sure

Timer = Callable[[Sequence[Callable[[], object]], int], list[list[float]]]
"""`timer(calls, rounds)`: so many samples of each call, in microseconds, interleaved."""


class TuneError(ValueError):
    """Tuning was asked for where it cannot be done; the message says why, and what can."""


@dataclass(frozen=True)
class Result:
    """What was found for one shape of a kernel: how many configurations were tried, and why some were left out."""

    kernel: str
    shape: dict[str, Any]
    entry: Entry
    tried: int
    skipped: dict[str, int]

    @property
    def gain(self) -> float:
        """How many times faster than the heuristic's configuration the chosen one is."""
        return 1.0 if self.entry.config is None else self.entry.heuristic_microseconds / self.entry.microseconds

    def as_dict(self) -> dict[str, Any]:
        entry = vars(self.entry) | {
            field: config and vars(config)
            for field, config in (("config", self.entry.config), ("heuristic", self.entry.heuristic))
        }
        return vars(self) | {"entry": entry, "gain": self.gain}


class GpuTimer:
    """Times calls on a GPU by events, each with a cold L2 cache.

    Before every call a buffer larger than that cache is written, for so long that the call is queued before the GPU
    comes to it: the GPU's time is measured, not Python's.
    """

    def __init__(self, device: torch.device):
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.fills = 10
        fill = self([lambda: [self.buffer.zero_() for _ in range(10)]], 2)[0][-1] / 10
        self.fills = math.ceil(QUEUE_US / fill)

    def __call__(self, calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
        marks = []
        for index in range(rounds):
            order = list(enumerate(calls))
            for which, call in order if index % 2 == 0 else reversed(order):
                for _ in range(self.fills):
                    self.buffer.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                marks.append((which, start, end))
        torch.cuda.synchronize()
        samples: list[list[float]] = [[] for _ in calls]
        for which, start, end in marks:
            samples[which].append(1e3 * start.elapsed_time(end))
        return samples


def check_device(device: str) -> None:
    """Raise TuneError unless Triton's kernels run on the device, a GPU."""
    reason = "that is no GPU" if not device.startswith("cuda") else triton.refuse(info.probe(device, "float32"))
    if reason is not None:
        raise TuneError(
            f"tuning was asked for on the device {device!r}, but {reason}. It takes an NVIDIA GPU of compute "
            "capability 8.0 or newer. Without it the kernels run in heuristic configurations, or in those of a table "
            f"that was measured on the same model of GPU and put into {tables.user_folder()}"
        )


def checkout_folder() -> Path:
    """Where this checkout keeps the tables that are shipped. Raises TuneError where the package is no checkout."""
    folder = tables.SHIPPED.resolve()
    if not (folder.parent.parent / ".git").exists():
        raise TuneError(
            f"--commit writes into a git checkout of regnet_fast, and this one is installed in {folder.parent}. "
            f"Without --commit, tables are written into {tables.user_folder()}"
        )
    return folder


def subject(name: str, batch: int, size: int | None, dtype: torch.dtype, device: str) -> tuple[nn.Module, Tensor]:
    """A rebuilt model with random weights and an input for it.

    Raises UnknownModelError, and TuneError for a model of which nothing is rebuilt.
    """
    torch.manual_seed(0)
    report = rebuilt(randomize_norms(host_model(name)).to(device, dtype))
    if not report.rebuilt:
        raise TuneError(f"nothing of {name} is rebuilt: it runs as timm makes it, without kernels that could be tuned")
    size = (batch, *input_size(report.model, size))
    return report.model, torch.randn(size, dtype=torch.float32, device="cpu").to(device, dtype)


def tune_cpu(model: nn.Module, x: Tensor) -> list[Verdict]:
    """Run a model on a CPU and try every layer and stage of it that no verdict is on; the verdicts on all of them.

    `model` is in evaluation mode, rebuilt, and has not run before.
    """
    with torch.inference_mode(), mode("on"), cpu.unhurried(), cpu.heard() as found:
        model(x)
    return found


def missing(model: nn.Module, x: Tensor, folder: Path, again: bool = False) -> list[tuple[ModuleType, Any]]:
    """The kernels and shapes that a model launches for an input and a folder's tables lack; with `again`, all of them.

    The model runs once with the backend `triton` forced. Raises BackendError where that cannot serve it, and TableError
    for a table that cannot be used.
    """
    found: dict[tuple[ModuleType, Any], None] = {}
    _launch(model, x, lambda choice: found.setdefault((choice.kernel, choice.shape)))
    known = {kernel: tables.read(_file(folder, x, kernel), kernel) for kernel, _ in found}
    return [(kernel, shape) for kernel, shape in found if again or tables.key(shape) not in known[kernel]]


def _launch(model: nn.Module, x: Tensor, hear: Callable[[Choice], object]) -> None:
    with backend("triton"), torch.no_grad(), observing(choice=hear):
        model(x)


def _file(folder: Path, x: Tensor, kernel: ModuleType) -> Path:
    return folder / tables.gpu(x.device) / f"{tables.name(kernel)}.json"


def tune(
    model: nn.Module,
    x: Tensor,
    shapes: Sequence[tuple[ModuleType, Any]],
    folder: Path,
    deadline: float = math.inf,
    timer: Timer | None = None,
    announce: Announce = silent,
) -> Iterator[Result]:
    """Measure kernels for some of the shapes that a model launches, and yield each result once a table has it.

    Args:
        model: in evaluation mode, rebuilt.
        x: its input.
        shapes: of `missing`, for the same model and input.
        folder: of all GPUs' tables.
        deadline: a time of `time.monotonic()` from which on no further shape is begun.
        timer: by default a `GpuTimer`.
        announce: told which configuration comes next.

    Raises TableError for a table that cannot be used, which stays as it is.
    """
    facts = conditions(x.device)
    with torch.cuda.device_of(x):
        timer = timer or GpuTimer(x.device)
    for kernel, shape in shapes:
        if time.monotonic() >= deadline:
            return
        path, key = _file(folder, x, kernel), tables.key(shape)
        with torch.no_grad(), torch.cuda.device_of(x):
            run = _captured(model, x, kernel, shape)
            measured, tried, skipped = _measure(kernel, shape, x.device, run, timer, announce)
        entry = Entry(*measured, facts)
        tables.write(path, kernel, tables.read(path, kernel) | {key: entry})
        tables.forget()
        yield Result(tables.name(kernel), dict(key), entry, tried, skipped)


def _captured(model: nn.Module, x: Tensor, kernel: ModuleType, shape: Any) -> Callable[[Any], Any]:
    """The launch of a kernel for a shape, with its operands; those of all others are let go."""
    found = []

    def hear(choice: Choice) -> None:
        if not found and choice.kernel is kernel and choice.shape == shape:
            found.append(choice.run)

    _launch(model, x, hear)
    return found[0]


def _measure(
    kernel: ModuleType, shape: Any, device: torch.device, run: Callable[[Any], Any], timer: Timer, announce: Announce
) -> tuple[tuple[Any, float, Any, float], int, dict[str, int]]:
    """The chosen configuration and its time, the heuristic's and its time; how many were tried, and why some were left
    out.
    """
    heuristic = tables.default(kernel, shape, device)
    expected = _outputs(run(heuristic))
    configs = [c for c in kernel.CONFIGS if c != heuristic and kernel.config_supports(c, shape) is None]
    screened: dict[Any, float] = {}
    skipped: Counter[str] = Counter()
    for index, config in enumerate(configs):
        announce(f"{tables.name(kernel)}, configuration {index + 1} of {len(configs)}")
        fault = _fault(run, config, expected)
        if fault:
            skipped[fault] += 1
        else:
            screened[config] = statistics.median(timer([partial(run, config)], SCREENING_ROUNDS)[0])
    announce(f"{tables.name(kernel)}, the fastest configurations once more")
    finalists = [heuristic, *sorted(screened, key=screened.get)[:FINALISTS]]
    samples = timer([partial(run, config) for config in finalists], ROUNDS)
    times = {config: round(statistics.median(taken), 2) for config, taken in zip(finalists, samples, strict=True)}
    best = min(finalists, key=times.get)
    if times[best] * (1 + LEAST_GAIN) >= times[heuristic]:
        best = heuristic
    chosen = None if best == heuristic else best
    return (chosen, times[best], heuristic, times[heuristic]), len(configs) + 1, dict(skipped)


def _outputs(result: Tensor | tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """What a launch returns, with parts of means added up: how many (N, T, C) has depends on the configuration."""
    found = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    return [t.sum(1) if t.dim() == 3 else t for t in found]


def _fault(run: Callable[[Any], Any], config: Any, expected: list[Tensor]) -> str:
    """Why a configuration cannot be chosen, or ''."""
    for tensor in expected:
        torch.full_like(tensor, math.nan)  # let go at once, for the next result to lie in, of which nothing may be left
    try:
        found = _outputs(run(config))
        agree = all(same(a, b, _rounding(expected[0].dtype)) for a, b in zip(found, expected, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler fails, or takes more registers or shared memory than there are
        synchronize(expected[0].device.type)  # which raises where it was not the configuration but the GPU
        return type(error).__name__
    return "" if agree else WRONG


def same(found: Tensor, expected: Tensor, rounding: float | None = None) -> bool:
    """Whether two results differ by two roundings at most, of the value and of the RMS."""
    rounding = rounding or _rounding(expected.dtype)
    found, expected = found.float(), expected.float()
    rms = expected.nan_to_num(0, 0, 0).square().mean().sqrt().item()
    return torch.allclose(found, expected, rtol=2 * rounding, atol=2 * rounding * rms, equal_nan=True)


def _rounding(dtype: torch.dtype) -> float:
    """The relative size of a rounding: of a 16-bit result, of TF32 operands, or of a float32 sum in any order, in which
    up to 2^14 roundings add like random steps.
    """
    if dtype != torch.float32:
        return torch.finfo(dtype).eps
    return 2**-10 if torch.backends.cudnn.allow_tf32 else 2**-16


def conditions(device: torch.device) -> dict[str, Any]:
    """What a table says about where its times come from."""
    facts = info.conditions(str(device))
    wanted = ("driver", "CUDA", "torch", "triton", "regnet_fast", "commit", "dirty")
    found = {field: facts[field] for field in wanted if field in facts}
    if device.type == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"gpu": facts["device"], **found, "date": facts["date"][:10]}
