"""A block's training step as a problem of trials: forward and backward, by the host or on the passes of a backend.

A candidate is a name that `backend(...)` takes; the reference, which is the host's own forward, is the peer. The
process that tries it is sent the block without its weights and makes random ones.
"""

from __future__ import annotations

import base64
import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from .. import store
from ..backends import Problem, Run, backend
from ..backends.passes import choices
from ..inspect.judging import judge
from .candidate import KINDS, Candidate, candidates, prepare
from .check import Case, Wrong, guarded, make, odd, poison, verify
from .cpu import arithmetic, words

PEER = "reference"

DRAWS = 8
"""How many small problems are judged together: a norm's gradient has few values, which say little of an error."""

_ATTEMPTS = 16
_KINK = (
    3e-6  # on which side of a ReLU's kink a float32 value falls that is as near, or a rounding in 16 bits, is chance
)
_CROWDED = 2.0  # where so many values are as near, other draws are no better
_APART = 3.0  # times eager's error a candidate may be from the host in images of the real size,
_CHANCE = 2e-3  # and so much more of their size: some of many values change their side of a ReLU
_OUTPUT, _INPUT = "the output", "the gradient of the input"
_MAPS = _OUTPUT, _INPUT


@dataclass(frozen=True)
class StepProblem:
    """Forward and backward of a block in training mode.

    Attributes: `block`, in words; `dtype`, in which it computes; `cast_from`, the input's under autocast, otherwise "";
    `channels_last`, whether the input is; `needs_x`, whether its gradient is asked for; `grouped`, whether there is a
    grouped convolution; `pickled`, the block on the device meta.
    """

    block: str
    input_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    cast_from: str
    channels_last: bool
    needs_x: bool
    grouped: bool
    device: str
    pickled: str = field(compare=False, repr=False)
    op: str = "training step"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the input, which backends are asked about."""
        return self.input_shape

    @property
    def bytes(self) -> int:
        """Bytes of the input."""
        return math.prod(self.input_shape) * self.dtype.itemsize


KINDS[StepProblem.__name__] = StepProblem


def pose(block: nn.Module, x: Tensor, dtype: torch.dtype) -> StepProblem:
    """The step of a block on an input, computed in a dtype. Raises what copying or pickling the block raises."""
    return StepProblem(
        described(block),
        tuple(x.shape),
        dtype,
        _name(x.dtype) if torch.is_autocast_enabled(x.device.type) else "",
        x.is_contiguous(memory_format=torch.channels_last),
        x.requires_grad,
        any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in block.modules()),
        str(x.device),
        base64.b64encode(pickle.dumps(_without_weights(block))).decode(),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def described(block: nn.Module) -> str:
    """A block in words that are the same for equal ones: its class, the shapes of its matrices, and a digest of all its
    modules with their settings. Of a setting that is no whole number only whether it is zero counts.
    """
    shapes = ("x".join(map(str, p.shape)) for p in block.parameters() if p.dim() > 1)
    facts = [
        (path, type(m).__module__, type(m).__qualname__, sorted(_settings(m)), [*_tensors(m)])
        for path, m in block.named_modules()
    ]
    return f"{type(block).__name__}({', '.join(shapes)}) {store.key(json.dumps(facts))[:12]}"


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if isinstance(value, float):
            yield name, str(value != 0)
        elif not name.startswith("_") and isinstance(value, (bool, int, str, tuple, type(None))):
            yield name, str(value)


def _tensors(module: nn.Module) -> Iterator[tuple]:
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        yield (name, *(() if t is None else (tuple(t.shape), t.stride(), _name(t.dtype), t.requires_grad)))


def _without_weights(block: nn.Module) -> nn.Module:
    memo: dict[int, Tensor] = {}
    for t in (*block.parameters(), *block.buffers()):
        bare = torch.empty_like(t, device="meta", requires_grad=False)
        memo[id(t)] = nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare
    bare = copy.deepcopy(block, memo)
    for name, value in vars(bare).items():
        if "_hooks" in name:  # whoever listens to the block itself hears its own call
            value.clear()
    return bare


@words.register(StepProblem)
def _(problem: StepProblem) -> str:
    facts = [f"autocast from {problem.cast_from}"] if problem.cast_from else []
    facts += [name for name in ("channels_last", "needs_x") if getattr(problem, name)]
    text = f"{problem.op} {'x'.join(map(str, problem.input_shape))}, {problem.block}"
    return ", ".join([text, *facts, *arithmetic(problem)])


@candidates.register(StepProblem)
def _(problem: StepProblem) -> list[Candidate]:
    return [Candidate(name) for name in (PEER, *choices(problem, problem.grouped))]


# In the process that tries candidates


class Step(Run):
    """The step of a block like the given one: `run(x, dy)` is its output and the gradients of `wanted`."""

    label = "a training step"

    def __init__(self, problem: StepProblem, block: nn.Module, name: str):
        self.problem, self.block, self.name = problem, copy.deepcopy(block), name
        self.wanted = {name: p for name, p in self.block.named_parameters() if p.requires_grad}
        self._kept = {name: t.detach().clone() for name, t in block.state_dict().items()}

    def forward(self, x: Tensor) -> Tensor:
        problem, device = self.problem, self.problem.device.partition(":")[0]
        with torch.autocast(device, problem.dtype, enabled=bool(problem.cast_from)):
            if self.name == PEER:
                return self.block.host.forward(self.block, x)
            with backend(self.name):
                return self.block(x)

    def __call__(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        with torch.inference_mode(False):
            x = x.detach().requires_grad_(self.problem.needs_x)
            y = self.forward(x)
            wanted = [*self.wanted.values(), *([x] if self.problem.needs_x else [])]
            return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    def results(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """All that a step makes, by name, from the state that the block had at first. Raises Wrong where it changes
        more.
        """
        for name, t in self.block.named_buffers():
            t.copy_(self._kept[name])
        torch.manual_seed(0)
        poison(x, dy)
        y, *gradients = self(x, dy)
        names = [*(f"the gradient of {name}" for name in self.wanted), *([_INPUT] if self.problem.needs_x else [])]
        found = {_OUTPUT: y, **dict(zip(names, gradients, strict=True))}
        found.update({name: t.clone() for name, t in self.block.named_buffers()})
        for name, p in self.block.named_parameters():
            if not torch.equal(p, self._kept[name]):
                raise Wrong(f"it changes {name}")
        return found


@prepare.register(StepProblem)
@torch.inference_mode(False)
def _(problem: StepProblem, weights: Sequence[nn.Module], candidate: Candidate) -> Step:
    return Step(problem, *weights, candidate.backend)


@make.register(StepProblem)
@torch.inference_mode(False)
def _(problem: StepProblem, seed: int) -> Case:
    """Images and the gradient of the output of unit variance, and weights that keep it."""
    random, kept = torch.Generator(problem.device).manual_seed(seed), []
    block = _with_weights(problem, seed)

    def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        t = torch.randn(shape, generator=random, dtype=torch.float32, device=problem.device).to(dtype)
        return guarded(t if problem.channels_last else t.flatten(1), kept).view(shape)

    x = normal(problem.input_shape, getattr(torch, problem.cast_from or _name(problem.dtype)))
    with torch.no_grad():
        y = Step(problem, block, PEER).forward(x)
    return Case(problem, (block,), (x, normal(y.shape, y.dtype)), kept)


@torch.no_grad()
def _with_weights(problem: StepProblem, seed: int) -> nn.Module:
    from ..inspect.verify import randomize_norms  # which imports the blocks

    random = torch.Generator().manual_seed(seed)
    block: nn.Module = pickle.loads(base64.b64decode(problem.pickled)).to_empty(device=problem.device)
    for t in (*block.parameters(), *block.buffers()):
        scale = t[0].numel() ** -0.5 if t.dim() > 1 else 0.2
        drawn = torch.randn(t.shape, generator=random, dtype=torch.float32, device="cpu")
        t.copy_(drawn * scale) if t.is_floating_point() else t.zero_()
    return randomize_norms(block, random)


@odd.register(StepProblem)
def _(problem: StepProblem) -> StepProblem:
    return replace(problem, input_shape=(5, problem.input_shape[1], 9, 7))


@lru_cache(maxsize=DRAWS)
def _expected(problem: StepProblem, seed: int) -> tuple[int, bool, dict[str, Tensor], list[dict[str, Tensor]]]:
    """The host's results of a small problem in float64 and, of two calls, in its own dtype; with the seed of one whose
    values keep away from ReLU's kink, and whether that could be had.
    """
    kink = max(_KINK, torch.finfo(problem.dtype).eps)
    for attempt in range(_ATTEMPTS):
        chosen = seed + DRAWS * attempt
        case = make(problem, chosen)
        exact = Step(replace(problem, dtype=torch.float64, cast_from=""), case.weights[0].double(), PEER)
        nearest = _listened(exact.block)
        found = exact.results(*(t.double() for t in case.call))
        if all(least > kink or count * kink > _CROWDED for least, count in nearest):
            break
    eager = Step(problem, *make(problem, chosen).weights, PEER)
    smooth = all(least > kink for least, _ in nearest)
    return chosen, smooth, found, [eager.results(*case.call) for _ in range(2)]


def _listened(block: nn.Module) -> list[tuple[float, int]]:
    """How near to zero the values before each ReLU come, and how many there are, as the block runs."""
    heard: list[tuple[float, int]] = []
    for module in block.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, x: heard.append((x[0].abs().min().item(), x[0].numel())))
    return heard


Bind = Callable[[Problem, Sequence[nn.Module]], Step]


@verify.register(StepProblem)
@torch.inference_mode(False)
def _(problem: StepProblem, prepare: Bind, peer: Bind) -> float:
    """Some small problems are held to float64's results by the rule of `inspect.judging`, the host being eager; those
    of the real size to the host's, in the RMS of every image.
    """
    small, drawn, smooth = odd(problem), [], True
    for seed in range(DRAWS):
        chosen, away, exact, eager = _expected(small, seed)
        smooth &= away
        case = make(small, chosen)
        found = _twice(prepare(small, case.weights), case, eager)
        drawn.append({name: (found[name], eager[0][name], t) for name, t in exact.items()})
    worst, errors = 0.0, {}
    for name in drawn[0]:
        threes = zip(*(one[name] for one in drawn), strict=True)
        found, eager, exact = (torch.cat([*map(torch.atleast_1d, ts)]) for ts in threes)
        if not exact.is_floating_point():
            if not torch.equal(found, exact):
                raise Wrong(f"{name} is not the host's")
            continue
        check = judge(name, found, eager, exact, largest=smooth)
        if not check.ok:
            raise Wrong(f"{name}: {check.failure}")
        worst, errors[name] = max(worst, check.ratio), _apart(eager, exact)
    apart: dict[str, float] = dict.fromkeys(errors, math.inf)
    for seed in (DRAWS, DRAWS + 1):
        case = make(problem, seed)
        step = peer(problem, case.weights)
        eager = [step.results(*case.call) for _ in range(2)]
        found = _twice(prepare(problem, case.weights), case, eager)
        for name in errors:
            apart[name] = min(apart[name], _apart(found[name], eager[0][name], name in _MAPS))
    for name, error in errors.items():
        if not apart[name] <= _APART * error + _CHANCE:
            raise Wrong(f"{name} of the real size is {apart[name]:.2g} of its size from the host's")
    return worst


def _twice(step: Step, case: Case, eager: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of a step, which two calls give to the bit where two of eager's do."""
    first, second = (step.results(*case.call) for _ in range(2))
    fault = case.unchanged()
    if fault:
        raise Wrong(fault)
    for name, t in first.items():
        if not torch.equal(t, second[name]) and torch.equal(*(one[name] for one in eager)):
            raise Wrong(f"{name}: " + ("two calls differ" if t.isfinite().all() else "values are unwritten, or NaN"))
    return first


def _apart(found: Tensor, expected: Tensor, images: bool = False) -> float:
    """The RMS of a difference relative to that of what is expected; of the image where it is the largest."""
    rows = len(found) if images else 1
    error, size = (t.float().square().reshape(rows, -1).mean(1) for t in (found - expected, expected))
    return (error / (size + torch.finfo(size.dtype).tiny)).sqrt().max().item()
