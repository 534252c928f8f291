"""The questions that a GPU is asked, what decides most first: a slice may end anywhere.

start       one launch of csrc/ and one of Triton, held to float64
cudnn       the convolutions as cuDNN computes them: plain and fused, in both layouts
kernels     the same ones by csrc/ and Triton
joined      1x1 convolutions with the grouped ones behind them, in one launch of csrc/ and in turn
gates       1x1 convolutions with a gate and a residual, and squeeze-excite
models      whole models without torch.compile and without trials
sanitizer   csrc/ under compute-sanitizer
compiled    the same models beside torch.compile, ours as trials choose it
training    training steps
tests       tests/gpu
families    a model of every other family
ops         every operation of these models, by each backend that serves it
tuning      the configurations of Triton's kernels
autotune    one model beside torch.compile with max-autotune
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cases
from ..cases import Case

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Question:
    """What a process is asked once, and the seconds after which it is given up."""

    item: str
    name: str
    seconds: float
    facts: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.item, self.name


@dataclass(frozen=True)
class Item:
    """Questions that a process answers one after another, or with `fresh` each one a process of its own."""

    questions: tuple[Question, ...]
    environment: dict[str, str] = field(default_factory=dict)
    fresh: bool = False


@dataclass(frozen=True)
class Scale:
    """How large a run is. The first name of each kind is the one that decides most; the largest batch is the first.

    Of `files`, a pattern in tests/gpu, those tests are run that the words of `tests` name.
    """

    device: str
    dtype: str
    size: int | None
    batches: tuple[int, ...]
    grouped: tuple[str, ...]
    others: tuple[str, ...]
    gated: tuple[str, ...]
    excite: tuple[str, ...]
    joined: tuple[tuple[str, str], ...]
    models: tuple[str, ...]
    families: tuple[str, ...]
    train: tuple[str, ...]
    train_batch: int
    ops: tuple[str, ...]
    files: str
    tests: str
    eager: tuple[str, ...]
    ours: tuple[str, ...]
    backends: tuple[str, ...]
    trained: tuple[str, ...]
    workers: int
    rounds: int = 7
    compile: str = "compile channels_last"
    autotune: str = "compile max-autotune channels_last"
    environment: dict[str, str] = field(default_factory=dict)


REAL = Scale(
    device="cuda",
    dtype="bfloat16",
    size=None,
    batches=(256, 1),
    grouped=(
        *("576x576-k3s1g24-14-relu", "216x216-k3s1g9-28-relu", "72x72-k3s1g3-56-relu", "72x72-k3s2g3-56-relu"),
        *("1512x1512-k3s2g63-7-relu", "152x152-k3s1g19-14-relu", "256x256-k3s1g32-64-silu", "240x240-k3s1g6-28-relu"),
        *("560x560-k3s1g14-14-relu", "448x448-k3s1g8-28-relu", "896x896-k3s1g16-14-relu", "448x448-k3s1g4-28-relu"),
        *("1232x1232-k3s1g11-14-relu", "1392x1392-k3s1g6-14-relu"),
    ),
    others=(
        *("pointwise_conv/576x576-k1s1g1-14-relu", "pointwise_conv/72x72-k1s1g1-56-relu"),
        *("pointwise_conv/1512x1512-k1s1g1-7-relu", "dense_conv/384x384-k3s1g1-14-relu"),
        *("dense_conv/96x96-k3s1g1-56-relu", "dense_conv/3x32-k3s2g1-112-relu"),
    ),
    gated=("576x576-k1s1g1-14-relu", "216x216-k1s1g1-28-relu", "72x72-k1s1g1-56-relu", "1512x1512-k1s1g1-7-relu"),
    excite=("576-144",),
    joined=(
        *(("32x72-k1s1g1-112-relu", "72x72-k3s2g3-56-relu"), ("72x72-k1s1g1-56-relu", "72x72-k3s1g3-56-relu")),
        *(("72x216-k1s1g1-56-relu", "216x216-k3s2g9-28-relu"), ("64x256-k1s1g1-64-silu", "256x256-k3s1g32-64-silu")),
    ),
    models=("regnety_032", "regnety_016"),
    families=("regnetx_032", "regnetz_d8", "repvgg_a2", "resnetv2_50", "regnetv_040", "regnety_160"),
    train=("regnety_032", "regnety_016", "repvgg_a2", "resnetv2_50"),
    train_batch=128,
    ops=("regnety_032", "regnety_016", "regnetx_032"),
    files="test_*.py",
    tests="",
    eager=("timm channels_last", "timm channels_last graph"),
    ours=("regnet_fast graph", "regnet_fast cuda,aten", "regnet_fast cuda,triton*"),
    backends=("regnet_fast aten", "regnet_fast cuda", "regnet_fast triton"),
    trained=("timm channels_last", "compile channels_last", "regnet_fast channels_last"),
    workers=8,
)
DRY = Scale(
    device="cpu",
    dtype="float32",
    size=64,
    batches=(1,),
    grouped=("24x24-k3s2g3-56-relu",),
    others=("pointwise_conv/24x24-k1s1g1-56-relu",),
    gated=("24x24-k1s1g1-56-relu",),
    excite=("24-8",),
    joined=(("32x24-k1s1g1-112-relu", "24x24-k3s2g3-56-relu"),),
    models=("regnetx_002",),
    families=("repvgg_a0",),
    train=("regnetx_002",),
    train_batch=4,  # smaller norms see too few values
    ops=("grouped_conv/152x152-k3s1g19-14-relu", "squeeze_excite/24-8"),
    files="test_backends_on_a_gpu.py",
    tests="regnetx_002 and float32 and not tun",
    eager=("timm channels_last",),
    ours=("regnet_fast frozen",),
    backends=("regnet_fast aten",),
    trained=("timm channels_last",),
    workers=0,
    rounds=2,
    compile="compile",
    autotune="timm",
    environment={"TRITON_INTERPRET": "1"},
)
MACHINE = {"do": "machine"}
"""What is asked before all: versions, and the ceilings."""

NO_TRIALS = {"REGNET_FAST_TRIALS": "off"}


def items(scale: Scale) -> list[Item]:
    """The whole run, in order."""
    large = scale.batches[0]
    grouped = tuple(f"grouped_conv/{name}" for name in scale.grouped)
    convs = (*grouped, *scale.others)
    alone = (*scale.eager, *scale.ours)
    beside = (*scale.eager, scale.compile, *scale.ours)
    runs = [(model, batch) for model in scale.models for batch in scale.batches]
    others = [(model, batch) for model in scale.families for batch in scale.batches]
    operations = [
        *_trials("start", grouped[:1], 2, scale),
        *(_operation("cudnn", name, 30, large, scale, "", do="cudnn") for name in convs),
        *_trials("kernels", convs, large, scale),
        *_joined(scale),
        *_gates(scale),
    ]
    return [  # before the first one comes `MACHINE`
        _item(operations, {**NO_TRIALS, **scale.environment}),
        _item(_models("models", runs, 180, alone, scale), NO_TRIALS, fresh=True),
        _item(_sanitizer("memcheck")),
        _item(_models("compiled", runs, 240, beside, scale), fresh=True),
        _item(_training(scale), fresh=True),
        _item([*_tests(scale), *_sanitizer("racecheck")]),
        _item(_models("families", others, 240, beside, scale), fresh=True),
        _item(_all_operations(scale), NO_TRIALS),
        _item(_tuning(scale)),
        _item(_models("autotune", [(scale.models[0], large)], 420, (scale.autotune,), scale), fresh=True),
    ]


def _item(questions: Iterable[Question], environment: dict[str, str] | None = None, fresh: bool = False) -> Item:
    return Item(tuple(questions), environment or {}, fresh)


def _operation(item: str, name: str, seconds: float, batch: int, scale: Scale, words: str, **facts: Any) -> Question:
    """A question about an operation of `cases.operations`."""
    facts |= {"name": name, "batch": batch, "dtype": scale.dtype, "size": scale.size}
    facts |= {"device": scale.device, "rounds": scale.rounds}
    return Question(item, f"{name}/b{batch}{words}", seconds, facts)


def _trials(item: str, names: Sequence[str], batch: int, scale: Scale, **facts: Any) -> Iterator[Question]:
    """Each operation by each of our backends that could serve it."""
    for name in names:
        for backend in ("triton",) if name.startswith(("pointwise", "dense")) else ("cuda", "triton"):
            asked = {"do": "trial", "candidate": backend, **facts}
            words = "".join(f" {word}" for word in (*facts, backend))
            yield _operation(item, name, 60, batch, scale, words, **asked)


def _joined(scale: Scale) -> Iterator[Question]:
    """A 1x1 convolution and the grouped one behind it, in one launch and in turn."""
    for first, second in scale.joined:
        for batch in scale.batches:
            for candidate in ("cuda:fused", "cuda:in turn"):
                asked = {"do": "trial", "candidate": candidate, "second": f"grouped_conv/{second}"}
                words = f" {second} {candidate}"
                yield _operation("joined", f"pointwise_conv/{first}", 60, batch, scale, words, **asked)


def _gates(scale: Scale) -> Iterator[Question]:
    large = scale.batches[0]
    operands = {"gate": True, "residual": True}
    for name in [f"pointwise_conv/{name}" for name in scale.gated]:
        yield _operation("gates", name, 30, large, scale, " gate residual", do="cudnn", **operands)
        yield from _trials("gates", [name], large, scale, **operands)
    for batch in reversed(scale.batches):
        yield from _trials("gates", [f"squeeze_excite/{name}" for name in scale.excite], batch, scale)


def _case(item: str, case: Case, seconds: float, peers: Sequence[str], scale: Scale) -> Question:
    facts = {"do": "case", "case": case.as_dict(), "peers": list(peers), "rounds": scale.rounds, "device": scale.device}
    return Question(item, case.id, seconds, facts)


def _models(
    item: str, runs: Sequence[tuple[str, int]], seconds: float, peers: Sequence[str], scale: Scale
) -> Iterator[Question]:
    for model, batch in runs:
        yield _case(item, Case("models", model, batch, scale.dtype, scale.size), seconds, peers, scale)


def _training(scale: Scale) -> Iterator[Question]:
    for model in scale.train:
        case = Case("train", model, scale.train_batch, scale.dtype, scale.size)
        yield _case("training", case, 300, scale.trained, scale)


def _all_operations(scale: Scale) -> Iterator[Question]:
    for case in cases.select("ops", scale.ops, scale.batches, [scale.dtype], scale.size):
        yield _case("ops", case, 60, ("timm*", *scale.backends), scale)


def _tests(scale: Scale) -> Iterator[Question]:
    """A question for each file, so that a deadline costs one of them."""
    only = ["-k", scale.tests] if scale.tests else []
    for path in sorted((ROOT / "tests" / "gpu").glob(scale.files)):
        words = ["-m", "not slow", *only, str(path.relative_to(ROOT))]
        facts = {"do": "tests", "words": words, "device": scale.device, "workers": scale.workers}
        yield Question("tests", path.name, 300, facts)


def _sanitizer(tool: str) -> Iterator[Question]:
    words = ["-m", "slow", "-k", tool, "tests/gpu/test_sanitizer.py"]
    yield Question("sanitizer", tool, 240, {"do": "tests", "words": words, "workers": 0})


def _tuning(scale: Scale) -> Iterator[Question]:
    large = scale.batches[0]
    size = ["--size", str(scale.size)] if scale.size else []
    subject = [scale.models[0], "--batch", str(large), "--dtype", scale.dtype, "--device", scale.device, *size]
    words = ["-m", "regnet_fast", "tune", *subject, "--budget", "300"]
    yield Question("tuning", scale.models[0], 360, {"do": "command", "words": words})
    yield Question("tuning", "verdicts", 30, {"do": "verdicts"})
