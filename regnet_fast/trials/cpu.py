"""Trials on a CPU, in this process: its libraries are trusted, and a trial takes milliseconds.

The first time that a problem is met its variants are timed, and the fastest one serves it from then on, so that every
call of a process gives the same bits. Trials take at most a third of the time of the calls that meet new problems, and
at most `BUDGET_S` of it; what is not tried then is served by what is probably the fastest, to the end of the process,
and tried by another one. Verdicts are kept on disk.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial, singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import ConvProblem, Geometry, NormActProblem, PairProblem, SqueezeExciteProblem, onednn
from ..store.environment import environment
from ..store.verdicts import Outcome, Verdict, Verdicts
from .modes import budget, current_mode, watched

BUDGET_S = 2.0
"""Seconds of trials in a row of calls, unless REGNET_FAST_TRIALS_BUDGET says otherwise."""

_SHARE = 3  # trials take at most one part in so many
_APART_S = 1.0  # calls that meet new problems so long after each other are not of one row
_ENOUGH_S = 4e-3  # a variant is timed for so long, in
_ROUNDS = (3, 25)  # so many rounds at least and at most
_HOPELESS = 1.5  # a variant so many times as slow as the fastest in two calls is not timed further
_NOISY = 1.3  # where the median of a variant's times is so many times the least, nothing can be said
_MARGIN = 1.03  # what is faster by less stays untaken
_WRONG = 0.05  # two variants that differ by more of the largest value do not compute the same
_LARGEST = 32e6  # bytes; of larger problems fewer images are tried


_told: ContextVar[list[Verdict] | None] = ContextVar("regnet_fast_verdicts", default=None)
_unhurried: ContextVar[bool] = ContextVar("regnet_fast_unhurried", default=False)


class Purse:
    """How much time trials may take: of a row of calls that meet new problems, each soon after the one before."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._begin, self._last, self._spent = clock, 0.0, float("-inf"), 0.0

    def allows(self) -> bool:
        """Whether another trial may begin now."""
        if _unhurried.get():
            return True
        now = self._clock()
        if now - self._last > _APART_S:
            self._begin, self._spent = now, 0.0
        self._last = now
        return self._spent <= (now - self._begin) / _SHARE and self._spent < budget(BUDGET_S)

    def time(self, trial: Callable[[], Verdict]) -> Verdict:
        """The verdict of a trial, whose time is paid."""
        start = self._clock()
        try:
            return trial()
        finally:
            self._last = self._clock()
            self._spent += self._last - start


Call = Callable[[], Tensor]


class Stage(NamedTuple):
    """Blocks that run one after another, as far as their time depends on it: each with what it computes, the shape of
    an image, and the dtype.
    """

    blocks: str
    image: tuple[int, int, int]
    dtype: torch.dtype


def _same(variant: str) -> float:
    return 1.0


_purse = Purse()
_lock = threading.RLock()  # a stage's trial meets those of its convolutions
_decided: dict[tuple[int, object], str] = {}
"""What serves a problem with a number of threads, to the end of the process."""


@lru_cache(maxsize=8)
def _verdicts(threads: int) -> Verdicts:
    return Verdicts(environment("cpu"))


def conv_variant(problem: ConvProblem, folded: Callable[[], tuple[Tensor, Tensor | None]]) -> str:
    """The variant of oneDNN's convolutions that serves a problem. `folded()` is the weight and bias."""

    def bind(variant: str) -> Call:
        return partial(onednn.prepare_conv(problem, *folded(), variant=variant), *operands(problem))

    return _chosen(problem, onednn.conv_variants(problem), bind)


def norm_act_variant(problem: NormActProblem, scale: Tensor, shift: Tensor) -> str:
    """The variant of scale, shift and activation that serves a problem."""

    def bind(variant: str) -> Call:
        return partial(onednn.prepare_norm_act(problem, scale, shift, variant), *operands(problem))

    return _chosen(problem, onednn.norm_act_variants(problem), bind)


def images(stage: Stage, probable: int, most: int, bind: Callable[[], Callable[[int], Tensor]]) -> int:
    """How many images of a batch go through a stage at a time: `probable`, unless another number was tried and faster.
    It is tried inside `unhurried` alone, since that takes the time of many calls.

    Args:
        most: the images of the batch.
        bind: makes what takes so many images through the stage.
    """
    counts = [str(n) for n in (probable, probable // 2, probable * 2) if 1 <= n <= most]
    if not counts:
        return probable

    def calls(count: str) -> Call:
        return partial(bind(), int(count))

    return int(_chosen(stage, counts, calls, int, _unhurried.get()))


def _chosen(
    problem: Any,
    variants: Sequence[str],
    bind: Callable[[str], Call],
    work: Callable[[str], float] = _same,
    tries: bool = True,
) -> str:
    if len(variants) == 1 or current_mode() == "off" or torch.are_deterministic_algorithms_enabled():
        return variants[0]
    key = (torch.get_num_threads(), problem)
    found = _decided.get(key)
    if found in variants:
        return found
    if not _lock.acquire(timeout=BUDGET_S):  # held by a thread that a fork left behind
        return variants[0]
    try:
        found = _decided.get(key)  # by whoever held it
        if found not in variants:
            found = _decided[key] = _found(words(problem), variants, bind, work, tries)
        return found
    finally:
        _lock.release()


def _found(
    problem: str, variants: Sequence[str], bind: Callable[[str], Call], work: Callable[[str], float], tries: bool
) -> str:
    """By a verdict, a trial where there is time for one, or by what is probable."""
    verdicts, told = _verdicts(torch.get_num_threads()), _told.get()
    verdict = verdicts.find(problem)
    untried = verdict is None or not set(variants) <= set(verdict.outcomes)
    if tries and untried and current_mode() == "on" and not watched() and _purse.allows():
        found = _purse.time(lambda: tried(problem, variants, bind, work))
        quiet = all(outcome.status != "noisy" for outcome in found.outcomes.values())
        verdict = verdicts.keep(found) if quiet else None
    if verdict is not None and told is not None:
        told.append(verdict)
    return variants[0] if verdict is None or verdict.chosen not in variants else verdict.chosen


def tried(
    problem: str, variants: Sequence[str], bind: Callable[[str], Call], work: Callable[[str], float] = _same
) -> Verdict:
    """Time every variant of a problem, in rounds that take turns.

    Args:
        problem: in words.
        variants: the first serves where no other one is faster.
        bind: the call of a variant, whose result begins with the same image for all.
        work: how much a call of a variant does.

    Raises what the first variant raises.
    """
    with torch.inference_mode(False), torch.no_grad():
        first = variants[0]
        calls, times, outcomes = {first: bind(first)}, {}, {}
        expected = calls[first]()[:1]
        for name in variants[1:]:
            try:
                calls[name] = bind(name)
                wrong = _differ(calls[name]()[:1], expected)
            except RuntimeError as error:
                outcomes[name] = Outcome("refused", reason=str(error))
                continue
            if wrong:
                outcomes[name] = Outcome("wrong", reason=f"its values are not those of {first}")

        def time(name: str) -> float:
            return _timed(calls[name]) / work(name)

        for name in [name for name in variants if name not in outcomes]:
            times[name] = [time(name), time(name)]
        fastest = min(map(max, times.values()))
        left = [name for name, samples in times.items() if min(samples) <= _HOPELESS * fastest]
        least, most = _ROUNDS
        rounds = min(max(least, round(_ENOUGH_S / max(fastest, 1e-9))), most) if len(left) > 1 else 0
        for i in range(rounds):
            for name in left if i % 2 else reversed(left):
                times[name].append(time(name))
    best = {name: min(samples) for name, samples in times.items()}
    outcomes.update({name: Outcome("verified", 1e6 * seconds) for name, seconds in best.items()})
    fastest = min(best, key=best.get)
    for name in left if len(left) > 1 else ():
        if statistics.median(times[name]) > _NOISY * best[name]:
            outcomes[name] = Outcome("noisy", 1e6 * best[name], "other work runs on this machine")
    faster = all(_MARGIN * measure(times[fastest]) < measure(times[first]) for measure in (min, statistics.median))
    return Verdict(problem, fastest if faster else first, outcomes)


@singledispatch
def words(problem: Any) -> str:
    """A problem in a line, which a verdict is known by."""
    if isinstance(problem, Stage):
        return f"stage {'x'.join(map(str, problem.image))} {_name(problem.dtype)}: {problem.blocks}"
    facts = [problem.activation, *(f for f in ("gate", "residual", "means") if getattr(problem, f, False))]
    if isinstance(problem, SqueezeExciteProblem):
        sizes = f"{problem.batch}x{problem.channels}, {problem.hidden} hidden"
        return f"{problem.op} {sizes}, {problem.activation}, {problem.gate_activation}, {_name(problem.dtype)}"
    text = f"{problem.op} {'x'.join(map(str, problem.input_shape))}"
    if isinstance(problem, PairProblem):
        text += f" -> {problem.out_channels} and {problem.other_channels}, stride {problem.stride}"
    if isinstance(problem, ConvProblem):
        text += f" -> {problem.out_channels}, {'x'.join(map(str, problem.kernel))}"
        g, usual = problem.geometry, Geometry()
        facts = [f"{name} {getattr(g, name)}" for name in g._fields if getattr(g, name) != getattr(usual, name)] + facts
    return f"{text}, {', '.join(facts)}, {'tf32' if tf32(problem) else _name(problem.dtype)}"


def tf32(problem: Any) -> bool:
    """Whether a problem in float32 may be computed with rounded operands, by the setting for cuDNN."""
    return problem.dtype == torch.float32 and problem.device.startswith("cuda") and torch.backends.cudnn.allow_tf32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why(problem: Any) -> str:
    """What a trial found about a problem, in words; '' where there was none."""
    verdict = _verdicts(torch.get_num_threads()).find(words(problem))
    if verdict is None or current_mode() == "off":
        return ""
    others = [
        f"{name} {outcome.us:.0f} us" if outcome.us is not None else f"{name} {outcome.status}: {outcome.reason}"
        for name, outcome in verdict.outcomes.items()
        if name != verdict.chosen
    ]
    return f"a trial: {verdict.chosen} {verdict.outcomes[verdict.chosen].us:.0f} us, {', '.join(others)}"


@contextmanager
def heard() -> Iterator[list[Verdict]]:
    """The verdicts that decide something for the first time inside the `with` block, in this thread or task alone."""
    found: list[Verdict] = []
    token = _told.set(found)
    try:
        yield found
    finally:
        _told.reset(token)


@contextmanager
def unhurried() -> Iterator[None]:
    """Try whatever is met inside the `with` block, however long it takes; in this thread or task alone."""
    token = _unhurried.set(True)
    try:
        yield
    finally:
        _unhurried.reset(token)


def operands(problem: ConvProblem | NormActProblem) -> tuple:
    """What a run of a problem is called with. Nothing of torch's random numbers is taken."""
    n, c, h, w = problem.input_shape
    count = max(1, min(n, int(n * _LARGEST / problem.bytes)))
    x = _numbers((count, c, h, w), problem.dtype)
    gate = torch.full((count, c), 0.5, dtype=problem.dtype, device="cpu") if problem.gate else None
    if isinstance(problem, NormActProblem):
        return x, gate, False
    residual = _numbers((count, *problem.output_shape[1:]), problem.dtype) if problem.residual else None
    return x, gate, residual, False, False


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A map in channels_last of numbers between -1 and 1 with little order."""
    n, c, h, w = shape
    y = torch.empty((n, h, w, c), dtype=dtype, device="cpu")
    period = torch.arange(4093, dtype=torch.float32, device="cpu").mul_(12.9898).sin_().to(dtype)
    flat, whole = y.view(-1), y.numel() // 4093 * 4093
    flat[:whole].view(-1, 4093).copy_(period)
    flat[whole:].copy_(period[: y.numel() - whole])
    return y.permute(0, 3, 1, 2)


def _timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _differ(result: Tensor, expected: Tensor) -> bool:
    size = expected.abs().max()
    return not bool((result - expected).abs().max() <= _WRONG * size)
