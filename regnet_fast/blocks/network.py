"""Whole networks in evaluation: on a CPU one program from the image to the last layer that csrc/cpu has; elsewhere one
fused block after another, also of layers that stand in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import forced_backend, native
from ..observer import observer
from ..ops.convolution import autocast_enabled
from ..trials import cpu
from ..trials.modes import current_mode
from .chain import Chain, current_plans, is_fused, made, told
from .fused import FOUND, PIECES, STATE, Freezable, Fused, Plan, unfit
from .program import Program
from .units import Refused
from .watch import Joined, calls_forward, hooks, not_derived, only_forwards, transformed

_CALLED = ("forward_features", "forward_head")
"""What the host's forward calls of the network itself, and somebody may put their own in its place."""
_CHECKPOINTING = "grad_checkpointing"
_CLASS, _CHILDREN, _CHECKPOINTS = attrgetter("__class__"), itemgetter("_modules"), itemgetter(_CHECKPOINTING)
_SERVING_KEPT = 8
"""For how many kinds of calls it is kept which program serves."""


class Network(Freezable):
    """Mixin before a host's network. Subclasses set `host` and say in `in_order` what its forward calls, and in `loose`
    which of its children, one after another, may stand in no block, with the block that they could be.

    The blocks that follow one another are one program. Where csrc/cpu cannot serve, or a trial found the stages faster
    each for itself, they are called as the host calls them.

    A layer that stands in no block keeps its class, by which counters, pruners and quantisers know it. The network
    keeps a block of its own around it, a piece, which no module holds. It is a step of the program, and where no
    program can be it is called in the layer's place; where it does not serve the layer is called as ever.
    """

    host: type[nn.Module]
    loose: ClassVar[Sequence[tuple[Sequence[str], type[Fused]]]] = ()

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "host" in vars(cls):
            cls._methods = _methods(cls)

    def in_order(self) -> Iterator[nn.Module]:
        """The stem, stages and all else that the host's forward calls on what the one before gave."""
        raise NotImplementedError

    def could_take_in(self) -> Iterator[nn.Module]:
        """The layers that stand in no block and would be in the network's program."""
        for named, cls in self._loose_layers():
            with suppress(Refused):
                cls.around(*named).read_form()
                yield from (layer for _, layer in named)

    def _loose_layers(self) -> Iterator[tuple[list[tuple[str, nn.Module]], type[Fused]]]:
        """Layers one after another that stand in no block, with their names, and the block that they could be."""
        for names, cls in self.loose:
            named = [(name, layer) for name in names if (layer := self._modules.get(name)) is not None]
            layers = [layer for _, layer in named]
            if not any(isinstance(layer, Fused) for layer in layers) and not all(map(_does_nothing, layers)):
                yield named, cls

    def _in_groups(self, x: Tensor) -> list[tuple[nn.Module, tuple[nn.Module, ...]]]:
        """What the host's forward calls one after another, each by itself; those that stand in no block together, with
        the block around them, where it has a plan for inputs like x.
        """
        order = [(layer, (layer,)) for layer in self.in_order()]
        if unfit(x) is not None:
            return order
        kept = self.__dict__.get(PIECES, {})
        for named, cls in self._loose_layers():
            layers = [layer for _, layer in named]
            key = named[0][0]
            if key not in kept or [*kept[key]._modules.values()] != layers:
                kept = self.__dict__[PIECES] = {**kept, key: cls.around(*named)}
            called, blocks = tuple(layer for layer in layers if not _does_nothing(layer)), [block for block, _ in order]
            at = blocks.index(called[0]) if called[0] in blocks else len(blocks)
            if (*blocks[at : at + len(called)],) != called or not all(map(only_forwards, layers)):
                continue
            if kept[key].plan(x, counted=False) is None:
                continue
            order[at : at + len(called)] = [(kept[key], called)]
        return order

    def pieces(self) -> Iterator[Fused]:
        """The blocks that were made around layers that stand in none."""
        return iter(self.__dict__.get(PIECES, {}).values())

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled() or type(x) is not Tensor:
            return super().forward(x)
        by_program = may_be_program(x)
        if not (by_program or any(self._loose_layers())) or transformed() is not None:
            return super().forward(x)
        if any(name in self.__dict__ for name in _CALLED) or getattr(self, _CHECKPOINTING, False):
            return super().forward(x)
        if _methods(type(self)) != self._methods:
            return super().forward(x)
        if not by_program:
            if autocast_enabled(x.device.type):
                return super().forward(x)
            return _one_by_one([block for block, _ in self._in_groups(x)], x)
        found = self.__dict__.get(FOUND)
        if found is not None and found.is_all and (y := found.again(self, x)) is not None:
            return y
        groups = self._in_groups(x)
        known = [isinstance(block, (Fused, Chain)) and not_derived(block) for block, _ in groups] + [False]
        begin = known.index(True) if any(known) else len(groups)
        end = begin + known[begin:].index(False)
        before, within, behind = ([m for _, layers in some for m in layers] for some in _cut(groups, begin, end))
        x = _one_by_one(before, x)
        y = _by_program(self, [block for block, _ in groups[begin:end]], within, not (before or behind), x)
        y = _one_by_one(within, x) if y is None else y
        return _one_by_one(behind, y)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the host's own network. It puts plain blocks in the place of ours where they stand, so
        they stand in containers of its own.
        """
        return _apart(self, self.host)


def may_be_program(x: Tensor) -> bool:
    """Whether a network on x may be one program; where not, its pieces are called in the place of their layers."""
    return x.is_cpu and forced_backend() in (None, "native")


def _cut(some: Sequence, begin: int, end: int) -> tuple[Sequence, Sequence, Sequence]:
    return some[:begin], some[begin:end], some[end:]


def _does_nothing(layer: nn.Module) -> bool:
    return type(layer) is nn.Identity and only_forwards(layer)


def _apart(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A module like this one, of a class, that has the same blocks."""
    apart, children = object.__new__(cls), module._modules.copy()
    for name, child in children.items():
        if child is not None and not isinstance(child, Fused):
            children[name] = _apart(child, type(child).host if isinstance(child, Chain) else type(child))
    state = module.__getstate__() if isinstance(module, Freezable) else module.__dict__
    apart.__dict__ = {**state, "_modules": children}
    return apart


def _methods(cls: type[Network]) -> tuple[Callable, ...]:
    """What a call of the host's network would run, of a class and of the host."""
    return cls.host.forward, *[getattr(cls, name) for name in _CALLED]


def _one_by_one(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _planar(x: Tensor) -> bool:
    """Whether an image is read as it lies, in NCHW."""
    return x.shape[1] <= native.FEW_CHANNELS and not x.is_contiguous(memory_format=torch.channels_last)


def _facts(x: Tensor) -> tuple:
    """What the choice of a program rests on beside the network."""
    facts = (x.shape, x.dtype, _planar(x), torch.get_num_threads(), current_mode(), forced_backend())
    return (*facts, torch.are_deterministic_algorithms_enabled())


def _by_program(
    network: Network, order: Sequence[nn.Module], layers: Sequence[nn.Module], is_all: bool, x: Tensor
) -> Tensor | None:
    """What blocks and stages make of x, by one program; None where another way serves. `layers` are the same as the
    host calls them, `is_all` says that it calls no others.
    """
    if unfit(x) is not None or autocast_enabled("cpu"):
        return None
    found, facts = network.__dict__.get(FOUND), _facts(x)
    if found is not None and facts in found.serving and observer.get() is None:
        seen = found.look()
        y = found.serving[facts](x, partial(found.stands, network, order, x))
        if y is not None:
            found.seen, found.is_all = seen, is_all
            found.count()
            return y
        found = None
    links = _links(order)
    plans = None if links is None else current_plans((child for some in links for child in some), x)
    if plans is None:
        return None
    left = iter(plans)
    staged = [[next(left) for _ in some] for some in links]
    planar = _planar(x)
    program, whole = made(staged, x, planar)
    if program is None:
        return None
    ways: dict[str, Callable] = {"program": program, "blocks": partial(_one_by_one, layers)}
    if forced_backend() is None and not cpu.by_program(whole, ways.__getitem__, planar):
        return None
    if found is None or not found.of_these(network, order, links, staged):
        network.__dict__[FOUND] = None  # the attributes are counted
        found = network.__dict__[FOUND] = _Found(network, order, links, staged)
    if len(found.serving) >= _SERVING_KEPT:
        found.serving.clear()
    found.serving[facts], found.is_all = program, is_all
    found.count()
    if observer.get() is not None:
        y = x
        for some, plans in zip(links, staged, strict=True):
            y = told(some, plans, whole, y)
    return program(x)  # whose head sums in another order: who listens gets what everybody gets


def serving(network: nn.Module) -> Program | None:
    """The program that was last found to serve calls of a network; None where another way serves."""
    found = network.__dict__.get(FOUND)
    return next(reversed(found.serving.values()), None) if found is not None else None


def _links(order: Sequence[nn.Module]) -> list[list[nn.Module]] | None:
    """The blocks of each stage, a stem with those of the stage behind it; None where somebody listens to a stage, or it
    may be more than its blocks.
    """
    links: list[list[nn.Module]] = []
    for i, stage in enumerate(order):
        if not only_forwards(stage) or getattr(stage, _CHECKPOINTING, False):
            return None
        own = list(stage.links()) if isinstance(stage, Chain) else [stage]
        if i == 1 and not isinstance(order[0], Chain):
            links[0] += own
        elif own:
            links.append(own)
    return links


class _Seen(NamedTuple):
    """What a network and its blocks are as far as can be told at once: an attribute that was added may be a replaced
    method, and what is derived from the weights is let go where they may have changed.
    """

    classes: list[type]
    attributes: list[int]
    checkpointing: list[bool]
    children: list[dict[str, nn.Module | None]]
    derived: list[object]


class _Found:
    """The blocks of a network, stage by stage, and their plans, which are current.

    Attributes: `of`, the network and what it calls in its order; `links`, the blocks of each stage; `plans`, likewise;
    `serving`, the program that serves calls of the same facts; `is_all`, whether the network calls nothing else;
    `seen`, what it looked like when all of this was last true.
    """

    def __init__(self, network: Network, order: Sequence[nn.Module], links: list[list[Fused]], plans: list[list[Plan]]):
        self.of, self.links, self.plans = (network, *order), links, plans
        self.serving: dict[tuple, Program] = {}
        self.is_all = False
        self._each = [*zip(chain.from_iterable(links), chain.from_iterable(plans), strict=True)]
        pieces = {*network.__dict__.get(PIECES, {}).values()}
        self._looked_at = [(child, plan) for child, plan in self._each if not plan.frozen]
        self._watch = Joined([plan for _, plan in self._looked_at])
        self._frozen = all(child in pieces for child, _ in self._looked_at)
        blocks = [child for child, _ in self._each]
        inside = {id(m) for child in blocks if child not in pieces for m in child.modules()}
        around = [m for m in network.modules() if id(m) not in inside]
        self._around, self._blocks = [m.__dict__ for m in around], [child.__dict__ for child in blocks]
        self._hooks = [table for m in (*around[1:], *blocks) for table in hooks(m)]
        self._modules = [*around, *blocks]
        self._classes = {*map(type, self._modules)}
        self._checkpointed = [state for state in self._around if _CHECKPOINTING in state]
        self.seen = self.look()

    def look(self) -> _Seen:
        """What the network is now."""
        sizes = [*map(len, self._around), *map(len, self._blocks)]
        children, derived = [*map(dict, map(_CHILDREN, self._around))], [state.get(STATE) for state in self._blocks]
        checkpointing = [*map(_CHECKPOINTS, self._checkpointed)]
        return _Seen([*map(_CLASS, self._modules)], sizes, checkpointing, children, derived)

    def of_these(
        self, network: Network, order: Sequence[nn.Module], links: list[list[Fused]], plans: list[list[Plan]]
    ) -> bool:
        """Whether it was made of the same."""
        return (self.of, self.links, self.plans) == ((network, *order), links, plans)

    def count(self) -> None:
        """The plans were current in one call more."""
        for _, plan in self._each:
            plan.calls += 1

    def again(self, network: Network, x: Tensor) -> Tensor | None:
        """What the program of calls like this one makes of x, where the network is as it was seen, without asking it
        for its order; None where another way may serve.
        """
        if network is not self.of[0] or observer.get() is not None or unfit(x) is not None or autocast_enabled("cpu"):
            return None
        program = self.serving.get(_facts(x))
        y = program(x, partial(self._stays, x)) if program is not None else None
        if y is not None:
            self.count()
        return y

    def stands(self, network: Network, order: Sequence[nn.Module], x: Tensor) -> bool:
        """Whether it is still true of this very network, which calls these in this order."""
        if (network, *order) != self.of:
            return False
        if self._frozen:
            return self._stays(x)
        block, plan = self._each[0]
        same = block.follows(plan, x) and _links(order) == self.links
        return same and all(is_fused(child) and child.follows(plan, x) for child, plan in self._each)

    def _stays(self, x: Tensor) -> bool:
        """Whether the network is as it was seen, nobody listens, and the plans that no promise holds are current."""
        seen = self.seen
        if [*map(_CLASS, self._modules)] != seen.classes or any(self._hooks):
            return False
        if not all(map(calls_forward, self._classes)) or [*map(_CHILDREN, self._around)] != seen.children:
            return False
        if [*map(_CHECKPOINTS, self._checkpointed)] != seen.checkpointing:
            return False
        block, plan = self._each[0]
        if not block.follows(plan, x) or not self._watch.current():
            return False
        if not all(state.get(STATE) is derived for state, derived in zip(self._blocks, seen.derived, strict=True)):
            return False
        return [*map(len, self._around), *map(len, self._blocks)] == seen.attributes
