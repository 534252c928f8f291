"""What is measured: cases by name.

models, train   regnety_016                   every architecture of which something is rebuilt
blocks          regnety_016/s2.b1             every distinct block of a model
ops             grouped_conv/192x192-k3s1g8-28  every distinct operation of a RegNet, RepVGG or ResNetV2
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from csrc.extension.shapes import BATCHES, MODELS, model_names, operations

KINDS = ("ops", "blocks", "models", "train")
FRESH_PROCESS = ("models", "train")  # their first results are timed, so nothing may be loaded or compiled before
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_BATCHES = {"cpu": (1, 8), "cuda": BATCHES}


class UnknownCaseError(ValueError):
    """No case has such a name; the message says which come close."""


@dataclass(frozen=True)
class Case:
    """One thing to measure: what, on how many images, of which size and dtype.

    `size` is the height and width of the model's image, None for the size it was trained for; for `ops` and `blocks` it
    scales the inputs with it. `details` are the facts of an operation.
    """

    kind: str
    name: str
    batch: int
    dtype: str
    size: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        size = f"/{self.size}px" if self.size else ""
        return f"{self.name}/b{self.batch}/{self.dtype}{size}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def architectures() -> list[str]:
    """The models of which something is rebuilt."""
    from regnet_fast.models import fused_shares

    return list(fused_shares())


def blocks(model: str) -> list[str]:
    """The path of the first of each distinct block of a model, in the order of execution."""
    import timm
    import torch

    from regnet_fast.hosts.registry import candidates

    network = timm.create_model(model, device="meta").eval()
    found: dict[tuple, str] = {}
    hooks = []

    def hear(path: str):
        def hook(module, inputs, output):
            state = tuple(tuple(t.shape) for t in module.state_dict().values())
            found.setdefault((type(module), tuple(inputs[0].shape), tuple(output.shape), state), path)

        return hook

    for path, module, _ in candidates(network):
        hooks.append(module.register_forward_hook(hear(path)))
    network(torch.empty(1, *network.pretrained_cfg["input_size"], device="meta"))
    for hook in hooks:
        hook.remove()
    return list(found.values())


def _matching(patterns: Sequence[str], names: Sequence[str], what: str) -> list[str]:
    """The names that match any pattern, in the order of the patterns. Raises UnknownCaseError for one without any."""
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.5)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise UnknownCaseError(f"no {what} is called {pattern!r}{hint}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _operation_cases(patterns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Operations by their own name, or all operations of the models that a pattern names."""
    all_of_them = operations()
    names: dict[str, None] = {}
    for pattern in patterns:
        if "/" in pattern:
            names.update(dict.fromkeys(_matching([pattern], list(all_of_them), "operation")))
            continue
        models = set(_matching([pattern], model_names(), "model"))
        names.update(dict.fromkeys(name for name, facts in all_of_them.items() if models & facts["models"].keys()))
    for name in names:
        yield name, all_of_them[name]


def _block_cases(patterns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Blocks as `MODEL/PATH`; a pattern without a path names all distinct blocks of its models."""
    for pattern in patterns:
        model_pattern, _, path_pattern = pattern.partition("/")
        for model in _matching([model_pattern], architectures(), "model"):
            for path in _matching([path_pattern or "*"], blocks(model), f"block of {model}"):
                yield f"{model}/{path}", {"model": model, "path": path}


def select(
    kind: str,
    patterns: Sequence[str] | None,
    batches: Sequence[int],
    dtypes: Sequence[str],
    size: int | None = None,
) -> list[Case]:
    """The cases of a kind that the patterns name, by default those of `MODELS`, each once, batch by batch.

    Raises UnknownCaseError for a pattern, and ValueError for a kind, batch or dtype, that names nothing.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if any(batch < 1 for batch in batches) or (size is not None and size < 32):
        raise ValueError("a batch has at least 1 image, and an image at least 32 pixels a side")
    patterns = patterns or MODELS
    if kind == "ops":
        named = _operation_cases(patterns)
    elif kind == "blocks":
        named = _block_cases(patterns)
    else:
        named = ((name, {}) for name in _matching(patterns, architectures(), "model"))
    return [
        Case(kind, name, batch, dtype, size, details)
        for batch, (name, details), dtype in itertools.product(batches, dict(named).items(), dtypes)
    ]
