"""Trials on a CPU, in this process: its libraries are trusted, and a trial takes milliseconds.

The first time that a problem is met its variants are timed, and the fastest one serves it from then on, so that every
call of a process gives the same bits. Trials take at most a quarter of the time of calls that meet new problems, and at
most `BUDGET_S`. What is not tried then is served by what is probably the fastest, to the end of the process, and tried
by another one. Verdicts are kept on disk.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial, singledispatch
from operator import truediv
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import (
    BackToBackProblem,
    ConvProblem,
    Geometry,
    NormActProblem,
    PairProblem,
    Run,
    SqueezeExciteProblem,
    forced_backend,
    native,
    onednn,
)
from ..settings import settings
from ..store.environment import environment
from ..store.verdicts import Outcome, Verdict, Verdicts
from .modes import budget, current_mode, watched

BUDGET_S = 2.0
"""Seconds of trials in a row of calls, unless REGNET_FAST_TRIALS_BUDGET says otherwise."""

_SHARE = 4  # trials take at most one part in so many, if the next one takes as long as the last one or, as the first,
_FIRST_S = 0.05
_APART_S = 1.0  # calls that meet new problems so long after each other are not of one row
_ENOUGH_S = 4e-3  # a variant is timed for so long, in
_ROUNDS = (9, 25)  # so many rounds at least and at most; and where one call takes longer than
_LONG_S = 20e-3
_FEW = 5  # so many, since it averages by itself
_HOPELESS = 1.5  # a variant so many times as slow as the fastest in two calls is not timed further
_NOISY = 1.3  # where the median of a variant's times is so many times the least, nothing can be said
_NEAR = 0.1  # two variants whose times differ by a smaller part are timed three times as long
_MARGIN = 1.02  # what is faster by less stays untaken
_STAGE_MARGIN = 1.08  # so does a stage's, which may gain as much alone and nothing among the others (docs/cpu.md)
_WRONG = 0.05  # two variants that differ by more of the largest value do not compute the same
_LARGEST = 32e6  # bytes; of larger problems fewer images are tried


_told: ContextVar[list[Verdict] | None] = ContextVar("regnet_fast_verdicts", default=None)
_unhurried: ContextVar[bool] = ContextVar("regnet_fast_unhurried", default=False)


class Purse:
    """How much time trials may take: of a row of calls that meet new problems, each soon after the one before."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._begin, self._last, self._spent = clock, 0.0, float("-inf"), 0.0
        self._expected = _FIRST_S

    def allows(self) -> bool:
        """Whether another trial may begin now."""
        if _unhurried.get():
            return True
        now = self._clock()
        if now - self._last > _APART_S:
            self._begin, self._spent = now, 0.0
        self._last = now
        return self._spent + self._expected <= min((now - self._begin) / _SHARE, budget(BUDGET_S))

    def time(self, trial: Callable[[], Verdict]) -> Verdict:
        """The verdict of a trial, whose time is paid."""
        start = self._clock()
        try:
            return trial()
        finally:
            self._last = self._clock()
            self._expected = self._last - start
            self._spent += self._expected


Call = Callable[[], Tensor]


class Stage(NamedTuple):
    """Blocks that run one after another, as far as their time depends on it: each with what it computes, the shape of
    an image, and the dtype.
    """

    blocks: str
    image: tuple[int, int, int]
    dtype: torch.dtype
    batch: int = 0  # where it matters


_purse = Purse()
_lock = threading.RLock()  # a stage's trial meets those of its convolutions
_decided: dict[tuple[int, object], str] = {}
"""What serves a problem with a number of threads, to the end of the process."""


@lru_cache(maxsize=8)
def _verdicts(threads: int) -> Verdicts:
    return Verdicts(environment("cpu"))


def conv_variant(problem: ConvProblem, folded: Callable[[], tuple[Tensor, Tensor | None]]) -> str:
    """The variant of a convolution that serves a problem; of oneDNN's alone where that is forced. `folded()` is the
    weight and bias.
    """
    variants = onednn.conv_variants(problem)
    return _of_runs(
        problem,
        variants if forced_backend() is None else tuple(name for name in variants if name != "native"),
        lambda variant: onednn.prepare_conv(problem, *folded(), variant=variant),
    )


def norm_act_variant(problem: NormActProblem, scale: Tensor, shift: Tensor) -> str:
    """The variant of scale, shift and activation that serves a problem."""

    return _of_runs(
        problem,
        onednn.norm_act_variants(problem),
        lambda variant: onednn.prepare_norm_act(problem, scale, shift, variant),
    )


def _of_runs(
    problem: ConvProblem | NormActProblem, variants: Sequence[str], prepare: Callable[[str], Callable[..., Tensor]]
) -> str:
    """The variant of an operation that serves a problem. `prepare` binds one to its weights."""

    def trial() -> Verdict:
        made = Operands(problem)
        return tried(words(problem), variants, lambda variant: made.call(prepare(variant)), made.renew)

    return _chosen(problem, variants, trial)


def images(stage: Stage, probable: int, most: int, bind: Callable[[], Callable[[int], Tensor]]) -> int:
    """How many images of a batch go through a stage at a time: `probable`, unless another number was tried and faster.
    It is tried inside `unhurried` alone, since that takes the time of many calls.

    Args:
        most: the images of the batch.
        bind: makes what takes the batch through the stage so many images at a time.
    """
    probable = min(probable, most)
    counts = [str(n) for n in (probable, probable // 2, probable * 2) if 1 <= n <= most]

    def trial() -> Verdict:
        return tried(words(stage), counts, lambda count: partial(bind(), int(count)), margin=_STAGE_MARGIN)

    return int(_chosen(stage, counts, trial, _unhurried.get()))


def by_program(stage: Stage, bind: Callable[[str], Callable[[Tensor], Tensor]], planar: bool = False) -> bool:
    """Whether a stage is run by a program of csrc/cpu, and not block by block: unless a trial found it slower, or other
    values than its blocks'.

    Args:
        bind: makes what runs the stage, "program" or "blocks".
        planar: that its images come in NCHW.
    """

    def trial() -> Verdict:
        x = _numbers((stage.batch, *stage.image), stage.dtype)
        x = x.contiguous() if planar else x
        return tried(words(stage), _WAYS[::-1], lambda way: partial(bind(way), x), margin=1.0)

    return _chosen(stage, _WAYS, trial) == _WAYS[0]


_WAYS = ("program", "blocks")


def _chosen(problem: Any, variants: Sequence[str], trial: Callable[[], Verdict], tries: bool = True) -> str:
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
            found = _decided[key] = _found(words(problem), variants, trial, tries)
        return found
    finally:
        _lock.release()


def _found(problem: str, variants: Sequence[str], trial: Callable[[], Verdict], tries: bool) -> str:
    """By a verdict, a trial where there is time for one, or by what is probable."""
    verdicts, told = _verdicts(torch.get_num_threads()), _told.get()
    verdict = verdicts.find(problem)
    untried = verdict is None or not set(variants) <= set(verdict.outcomes)
    if tries and untried and current_mode() == "on" and not watched() and _purse.allows():
        found = _purse.time(trial)
        quiet = all(outcome.status != "noisy" for outcome in found.outcomes.values())
        verdict = verdicts.keep(found) if quiet else None
    if verdict is not None and told is not None:
        told.append(verdict)
    return variants[0] if verdict is None or verdict.chosen not in variants else verdict.chosen


def tried(
    problem: str,
    variants: Sequence[str],
    bind: Callable[[str], Call],
    renew: Callable[[], None] = lambda: None,
    margin: float = _MARGIN,
) -> Verdict:
    """Time every variant of a problem, in rounds.

    The gain of one over the first is the median of the quotients within the rounds. Their order stays, so that no
    variant follows itself and finds its own result in the cache, as none does in a model.

    Args:
        problem: in words.
        variants: the first serves where no other one is faster.
        bind: the call of a variant, whose result begins with the same image for all.
        renew: makes what the calls read as it was, before each one.
        margin: how many times as fast as the first another one has to be.

    Raises what the first variant raises.
    """
    with torch.inference_mode(False), torch.no_grad():
        first = variants[0]
        calls, times, outcomes = {}, {}, {}
        for name in variants:
            try:
                calls[name] = bind(name)
                renew()
                result = calls[name]()[:1]
                if name == first:
                    expected = result.clone()
            except RuntimeError as error:
                if name == first:
                    raise
                outcomes[name] = Outcome("refused", reason=str(error))
                continue
            if _differ(result, expected):
                outcomes[name] = Outcome("wrong", reason=f"its values are not those of {first}")

        def time(name: str) -> float:
            renew()
            return _timed(calls[name])

        for name in [name for name in variants if name not in outcomes]:
            times[name] = [time(name), time(name)]
        fastest = min(map(max, times.values()))
        left = [name for name, samples in times.items() if min(samples) <= _HOPELESS * fastest]
        for rounds in _rounds(fastest) if len(left) > 1 else (0,):
            for _ in range(rounds):
                for name in left:
                    times[name].append(time(name))
            gains = {name: statistics.median(map(truediv, times[first], times[name])) for name in left}
            if all(abs(math.log(gain)) > _NEAR for name, gain in gains.items() if name != first):
                break
    outcomes.update({name: Outcome("verified", 1e6 * statistics.median(samples)) for name, samples in times.items()})
    for name in left if len(left) > 1 else ():
        if statistics.median(times[name]) > _NOISY * min(times[name]):
            outcomes[name] = Outcome("noisy", outcomes[name].us, "other work runs on this machine")
    best = max(gains, key=gains.get)
    return Verdict(problem, best if gains[best] > margin else first, outcomes)


def _rounds(seconds: float) -> tuple[int, ...]:
    """How many rounds there are of calls that take so long, and how many more where two variants are near."""
    if seconds > _LONG_S:
        return (_FEW,)
    least, most = _ROUNDS
    some = min(max(least, round(_ENOUGH_S / max(seconds, 1e-9))), most)
    return some, 2 * some


@singledispatch
def words(problem: Any) -> str:
    """A problem in a line, which a verdict is known by."""
    if isinstance(problem, Stage):
        images = f"{problem.batch}x" if problem.batch else ""
        return f"stage {images}{'x'.join(map(str, problem.image))} {_name(problem.dtype)}: {problem.blocks}"
    facts = [problem.activation, *(f for f in ("gate", "residual", "means") if getattr(problem, f, False))]
    if isinstance(problem, SqueezeExciteProblem):
        sizes = f"{problem.batch}x{problem.channels}, {problem.hidden} hidden"
        return ", ".join([f"{problem.op} {sizes}", problem.activation, problem.gate_activation, *arithmetic(problem)])
    text = f"{problem.op} {'x'.join(map(str, problem.input_shape))}"
    if isinstance(problem, PairProblem):
        text += f" -> {problem.out_channels} and {problem.other_channels}, stride {problem.stride}"
    if isinstance(problem, BackToBackProblem):
        text += f" -> {problem.out_channels}, {problem.first_activation}, 3x3 of {problem.groups} groups"
        text += f", stride {problem.stride}"
    if isinstance(problem, ConvProblem):
        text += f" -> {problem.out_channels}, {'x'.join(map(str, problem.kernel))}"
        g, usual = problem.geometry, Geometry()
        facts = [f"{name} {getattr(g, name)}" for name in g._fields if getattr(g, name) != getattr(usual, name)] + facts
    return ", ".join([text, *facts, *arithmetic(problem)])


def arithmetic(problem: Any) -> list[str]:
    """The dtype of a problem in words, and on a GPU which of torch's settings decide how it is computed in that."""
    dtype = _name(problem.dtype)
    if not problem.device.startswith("cuda"):
        return [dtype]
    on, single = settings(), problem.dtype == torch.float32
    facts = {
        "tf32 convolutions": single and on.conv_tf32,
        "tf32 products": single and on.matmul_tf32,
        "benchmark": on.benchmark,
        "without cuDNN": not on.cudnn,
    }
    return [dtype, *(fact for fact, holds in facts.items() if holds)]


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


class Operands:
    """What a run of a problem is called with, as a block calls it: x, which was written just before and is written over
    where a gate scales it, the gate, and the residual, which takes the result.

    In a loop over what stays as it is other variants win than in a model (docs/cpu.md). Of few channels x is an image
    in NCHW, as models are given them. Nothing of torch's random numbers is taken.
    """

    def __init__(self, problem: ConvProblem | NormActProblem):
        n, c, h, w = problem.input_shape
        count = max(1, min(n, int(n * _LARGEST / problem.bytes)))
        residual = None
        with torch.inference_mode(False):
            x = _numbers((count, c, h, w), problem.dtype)
            if isinstance(problem, ConvProblem) and c <= native.FEW_CHANNELS:
                x = x.contiguous()
            gate = torch.full((count, c), 0.5, dtype=problem.dtype, device="cpu") if problem.gate else None
            if isinstance(problem, ConvProblem) and problem.residual:
                residual = _numbers((count, *problem.output_shape[1:]), problem.dtype)
            self._maps = [(t.clone(), t) for t in (x, residual) if t is not None]
        self.all = (x, gate, False) if isinstance(problem, NormActProblem) else (x, gate, residual, True, True)

    def call(self, run: Run) -> Call:
        """The call of a run, in whose time x is laid out as the run reads it."""
        if run.any_layout or self.all[0].is_contiguous(memory_format=torch.channels_last):
            return partial(run, *self.all)
        return partial(_laid_out, run, *self.all)

    def renew(self) -> None:
        """Write the maps as they were."""
        for kept, given in self._maps:
            given.copy_(kept)


def _laid_out(run: Run, x: Tensor, *others: Any) -> Tensor:
    return run(x.contiguous(memory_format=torch.channels_last), *others)


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
