"""The process that measures configurations of Triton kernels: `python -m regnet_fast.inspect.tuner`, which may crash or
hang where one does that was never launched before.

Every configuration is launched on the model's own operands. One whose result is another than that of the heuristic's
configuration by more than rounding is never chosen. All others are timed in short; then the fastest few are timed with
care, interleaved with the heuristic's, which stays unless one is faster by more than `LEAST_GAIN`.
"""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import BackendError, backend
from ..kernels import tables
from ..kernels.tables import HEURISTIC, Choice, words
from ..models import rebuild
from ..observer import observing
from ..settings import settings
from ..store.verdicts import Outcome, Verdict
from ..trials.clock import Timer, timer
from ..trials.process import descriptors, serve
from .timing import Announce, silent, synchronize
from .verify import host_model, input_size, randomize_norms

SCREENING_ROUNDS, ROUNDS = 3, 25
FINALISTS = 5
LEAST_GAIN = 0.02


class TuneError(ValueError):
    """Tuning was asked for where it cannot be done; the message says why, and what can."""


class Subject(NamedTuple):
    """A model by its name, and its input: of so many images, of the model's own size where none is given."""

    model: str
    batch: int
    size: int | None
    dtype: torch.dtype
    device: str

    def built(self) -> tuple[nn.Module, Tensor]:
        """The rebuilt model with random weights, and an input.

        Raises UnknownModelError, and TuneError for a model of which nothing is rebuilt.
        """
        torch.manual_seed(0)
        report = rebuild(randomize_norms(host_model(self.model)).to(self.device, self.dtype))
        if not report.rebuilt:
            raise TuneError(
                f"nothing of {self.model} is rebuilt: it runs as timm makes it, without kernels that could be tuned"
            )
        shape = (self.batch, *input_size(report.model, self.size))
        return report.model, torch.randn(shape, dtype=torch.float32, device="cpu").to(self.device, self.dtype)


class Tuner:
    """A model that ran once with the backend `triton` forced, to measure what it launched.

    Args:
        model: in evaluation mode, rebuilt.
        x: its input.
        timer: by default that of x's device.

    Attributes: `shapes`, the kernel and shape of each launch by the problem's words. Raises BackendError where Triton
    cannot serve the model.
    """

    def __init__(self, model: nn.Module, x: Tensor, timer: Timer | None = None):
        self._model, self._x, self._timer = model, x, timer
        self.shapes: dict[str, tuple[ModuleType, Any]] = {}
        self._launch(lambda c: self.shapes.setdefault(tables.problem(c.kernel, c.shape), (c.kernel, c.shape)))

    def measure(self, problem: str, known: Collection[str] = (), say: Announce = silent) -> Verdict:
        """Measure the configurations of a kernel for one of the shapes.

        Args:
            known: configurations to leave out.
            say: told of each configuration before it is launched, and `HEURISTIC` where it is not one alone.
        """
        kernel, shape = self.shapes[problem]
        with torch.no_grad(), torch.cuda.device_of(self._x):
            say(HEURISTIC)
            return self._measure(problem, kernel, shape, self._captured(kernel, shape), known, say)

    def _launch(self, hear: Callable[[Choice], object]) -> None:
        with backend("triton"), torch.no_grad(), observing(choice=hear):
            self._model(self._x)

    def _captured(self, kernel: ModuleType, shape: Any) -> Callable[[Any], Any]:
        """The launch of a kernel for a shape, with its operands; those of all others are let go."""
        found = []

        def hear(choice: Choice) -> None:
            if not found and choice.kernel is kernel and choice.shape == shape:
                found.append(choice.run)

        self._launch(hear)
        return found[0]

    def _measure(
        self,
        problem: str,
        kernel: ModuleType,
        shape: Any,
        run: Callable[[Any], Any],
        known: Collection[str],
        say: Announce,
    ) -> Verdict:
        time = self._timer = self._timer or timer(str(self._x.device))
        heuristic = tables.default(kernel, shape, self._x.device)
        expected = _outputs(run(heuristic))
        outcomes, screened = {}, {}
        for config in kernel.CONFIGS:
            if config == heuristic or words(config) in known or kernel.config_supports(config, shape) is not None:
                continue
            say(words(config))
            failed = _failed(run, config, expected)
            if failed is not None:
                outcomes[words(config)] = failed
            else:
                screened[config] = statistics.median(time([partial(run, config)], SCREENING_ROUNDS)[0])
        say(HEURISTIC)
        finalists = [heuristic, *sorted(screened, key=screened.get)[:FINALISTS]]
        samples = time([partial(run, config) for config in finalists], ROUNDS)
        times = {config: round(statistics.median(taken), 2) for config, taken in zip(finalists, samples, strict=True)}
        best = min(finalists, key=times.get)
        chosen = HEURISTIC
        if times[best] * (1 + LEAST_GAIN) < times[heuristic]:
            chosen = words(best)
            outcomes[chosen] = Outcome("verified", times[best])
        outcomes[HEURISTIC] = Outcome("verified", times[heuristic])
        return Verdict(problem, chosen, outcomes)


def _outputs(result: Tensor | tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """What a launch returns, with parts of means added up: how many (N, T, C) has depends on the configuration."""
    found = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    return [t.sum(1) if t.dim() == 3 else t for t in found]


def _failed(run: Callable[[Any], Any], config: Any, expected: list[Tensor]) -> Outcome | None:
    """Why a configuration cannot be chosen, or None."""
    for tensor in expected:
        torch.full_like(tensor, math.nan)  # let go at once, for the next result to lie in, of which nothing may be left
    try:
        found = _outputs(run(config))
        agree = all(same(a, b, _rounding(expected[0].dtype)) for a, b in zip(found, expected, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler fails, or takes more registers or shared memory than there are
        synchronize(expected[0].device.type)  # which raises where it was not the configuration but the GPU
        return Outcome("refused", reason=f"{type(error).__name__}: {str(error)[:100]}")
    return None if agree else Outcome("wrong", reason="its result is not the heuristic's within rounding")


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
    return 2**-10 if settings().conv_tf32 else 2**-16


_tuner: Tuner | None = None


def answer(question: dict[str, Any], say: Callable[[str], object]) -> dict[str, Any]:
    """Run a model, whose problems are the answer; or measure one of them."""
    global _tuner
    for module in question.get("modules", ()):
        importlib.import_module(module)
    try:
        if "model" in question:
            say("run")
            name, batch, size, dtype, device = question["model"]
            _tuner = Tuner(*Subject(name, batch, size, getattr(torch, dtype), device).built())
            return {"status": "ran", "problems": [*_tuner.shapes]}
        found = _tuner.measure(question["problem"], question["known"], lambda config: say(f"try: {config}"))
        return {"status": "measured", **asdict(found)}
    except (TuneError, BackendError, torch.OutOfMemoryError) as error:
        return {"status": "refused", "reason": str(error).splitlines()[0]}


if __name__ == "__main__":
    serve(*descriptors(sys.argv[1:]), answer)
