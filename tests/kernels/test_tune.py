"""Tuning in the interpreter with an invented clock: what is measured, what is chosen, what is kept and when."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regnet_fast
from regnet_fast import backends, store
from regnet_fast.backends import ConvProblem, Geometry, backend
from regnet_fast.blocks.fused import Fused
from regnet_fast.cli import app
from regnet_fast.cli import tune as cli_tune
from regnet_fast.inspect import tune, tuner
from regnet_fast.inspect.tune import Search, Subject, TuneError
from regnet_fast.inspect.tuner import Tuner
from regnet_fast.inspect.verify import randomize_norms
from regnet_fast.kernels import common, implicit_gemm, pointwise_conv, pointwise_pair, squeeze_excite, tables
from regnet_fast.kernels.tables import HEURISTIC
from regnet_fast.observer import observing
from regnet_fast.store import environment
from regnet_fast.store.verdicts import Outcome, Verdict, Verdicts, imported
from regnet_fast.trials import process, session
from regnet_fast.trials.process import PHASES

pytestmark = pytest.mark.usefixtures("unchecked_integers")

PLACE = Path(__file__).parent
TRIALS = PLACE.parent / "trials"
HERE = {"device": "a test GPU"}
CONFIGS = {
    pointwise_conv: (
        pointwise_conv.Config(64, 32, 32, 4, 2, True),
        pointwise_conv.Config(128, 32, 64, 4, 2, True),
        pointwise_conv.Config(64, 32, 32, 4, 3, False),
    ),
    pointwise_pair: (
        pointwise_conv.Config(128, 32, 32, 4, 2, False),
        pointwise_conv.Config(64, 32, 64, 4, 3, False),
    ),
    implicit_gemm: (implicit_gemm.Config(64, 16, 32, 4, 2), implicit_gemm.Config(64, 32, 64, 4, 2)),
    squeeze_excite: (squeeze_excite.Config(16, 32, 16, 4, True), squeeze_excite.Config(16, 32, 32, 4, False)),
}
FAST = {kernel: configs[1] for kernel, configs in CONFIGS.items()}


@pytest.fixture(autouse=True)
def few_configurations(monkeypatch, tmp_path):
    """Few configurations, and an environment that the interpreter takes for its own."""
    for kernel, configs in CONFIGS.items():
        monkeypatch.setattr(kernel, "CONFIGS", configs)
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "kernels" / "tuned")
    monkeypatch.setattr(tables, "here", lambda device: HERE)
    store._warned.clear()
    tables.forget()
    yield
    tables.forget()


class Clock:
    """A timer: what is in `FAST` takes 5 us, all else 10; `calls` counts the configurations that were timed."""

    def __init__(self, fast=5.0):
        self.times, self.calls = dict.fromkeys(FAST.values(), fast), Counter()

    def __call__(self, calls, rounds):
        configs = [call.args[0] for call in calls]
        self.calls.update(configs)
        return [[self.times.get(config, 10.0)] * rounds for config in configs]


@pytest.fixture(scope="module")
def model():
    return randomize_norms(regnet_fast.create_model("regnety_002")).eval()


@pytest.fixture(scope="module")
def block(model):
    """A RegNetY block with a shortcut: a pair of 1x1 convolutions, a grouped one, squeeze-excite and a 1x1 one."""
    return model.s2.b1


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 24, 8, 8)


def run(block, x, clock=None, say=tune.silent) -> list:
    """The verdicts on everything that a block launches, kept."""
    one, verdicts = Tuner(block, x, clock or Clock()), Verdicts(HERE)
    found = [verdicts.keep(one.measure(problem, say=say)) for problem in one.shapes]
    tables.forget()
    return found


def of(kernel, found):
    """The verdict on a kernel."""
    (one,) = [verdict for verdict in found if verdict.problem.startswith(f"triton {tables.name(kernel)}: ")]
    return one


def test_every_launch_of_a_model_is_found_once(model, block, x):
    heard = []
    with backend("triton"), torch.no_grad(), observing(choice=heard.append):
        model.s3(torch.randn(1, 56, 4, 4))
    assert len(heard) == 4 + 3 * 4  # the blocks after the first have its conv3, and all else in common with each other
    assert len(Tuner(model.s3, torch.randn(1, 56, 4, 4)).shapes) == 4 + 3
    shapes = Tuner(block, x).shapes.values()
    assert [kernel for kernel, _ in shapes] == [pointwise_pair, implicit_gemm, squeeze_excite, pointwise_conv]
    pair, _, _, conv3 = [shape for _, shape in shapes]
    assert (pair.pixels, pair.channels, pair.out_channels, pair.other_channels, pair.stride) == (128, 24, 56, 56, 2)
    assert (conv3.pixels, conv3.channels, conv3.gate, conv3.residual) == (32, 56, 16, True)


def test_the_fastest_is_chosen_kept_and_taken(block, x):
    results = run(block, x)
    assert len(results) == 4
    for kernel, fast in FAST.items():
        verdict = of(kernel, results)
        assert verdict.chosen == tables.words(fast) and verdict.gain(HEURISTIC) == 2.0
        assert {name: outcome.us for name, outcome in verdict.outcomes.items()} == {
            verdict.chosen: 5.0,
            HEURISTIC: 10.0,
        }
    heard = []
    with backend("triton"), torch.no_grad(), observing(choice=heard.append):
        block(x)
    assert [(choice.config, choice.tuned) for choice in heard] == [(FAST[choice.kernel], True) for choice in heard]
    assert len(heard) == 4


def test_explain_says_what_is_tuned(block, x):
    with backend("triton"):
        assert {row.label for row in regnet_fast.explain(block, tuple(x.shape))} == {"Triton"}
        run(block, x)
        assert {row.label for row in regnet_fast.explain(block, tuple(x.shape))} == {"Triton, tuned"}


@pytest.mark.parametrize(("fast", "chosen"), [(9.85, False), (9.7, True), (11.0, False)])
def test_the_heuristic_stays_unless_another_is_faster_by_more_than_the_noise(block, x, fast, chosen):
    verdict = of(pointwise_conv, run(block, x, Clock(fast)))
    assert verdict.chosen == (tables.words(FAST[pointwise_conv]) if chosen else HEURISTIC)
    assert verdict.outcomes[verdict.chosen].us == (fast if chosen else 10.0)


def spoil(monkeypatch, kernel, spoiled):
    """The kernels of a module, launched with the faster of its configurations, are followed by `spoiled(tensors)`."""
    launch, fast = common.launch, FAST[kernel]

    def launch_wrong(triton_kernel, grid, *arguments, **options):
        tiles = {name.upper(): size for name, size in vars(fast).items() if name.startswith("block_")}
        own = triton_kernel.fn.__module__ == kernel.__name__
        if own and all(options[name] == size for name, size in tiles.items()):
            return spoiled(lambda: launch(triton_kernel, grid, *arguments, **options), arguments)
        return launch(triton_kernel, grid, *arguments, **options)

    monkeypatch.setattr(common, "launch", launch_wrong)


def after(change):
    def spoiled(launch, arguments):
        launch()
        change(arguments)

    return spoiled


def scale_last_column(arguments):
    arguments[9][..., -1] *= 1.01


def scale_one_value(arguments):
    arguments[9][-1, -1, -1, -1] += 0.1


def poison(arguments):
    arguments[9][0, 0, 0, 0] = math.nan


def nothing(launch, arguments):
    pass


def failed(kernel, found, status, reason=""):
    """The faster configuration of a kernel is put aside, and the heuristic's serves."""
    verdict = of(kernel, found)
    outcome = verdict.outcomes[tables.words(FAST[kernel])]
    assert (outcome.status, outcome.us, verdict.chosen) == (status, None, HEURISTIC) and reason in outcome.reason


@pytest.mark.parametrize("spoiled", [after(scale_last_column), after(scale_one_value), after(poison), nothing])
def test_a_wrong_result_is_never_timed_or_chosen(block, x, monkeypatch, spoiled):
    spoil(monkeypatch, pointwise_conv, spoiled)
    clock = Clock()
    failed(pointwise_conv, run(block, x, clock), "wrong")
    assert not clock.calls[FAST[pointwise_conv]] and clock.calls[FAST[implicit_gemm]]


def test_wrong_parts_of_means_are_found(block, x, monkeypatch):
    def spoil_parts(arguments):
        arguments[5][..., 3] *= 1.1

    spoil(monkeypatch, implicit_gemm, after(spoil_parts))
    failed(implicit_gemm, run(block, x), "wrong")


def test_a_wrong_shortcut_is_found(block, x, monkeypatch):
    def spoil_other(arguments):
        arguments[8][:, 3] *= 1.1

    spoil(monkeypatch, pointwise_pair, after(spoil_other))
    failed(pointwise_pair, run(block, x), "wrong")


def test_what_does_not_compile_is_kept_with_its_reason(block, x, monkeypatch):
    class OutOfResources(Exception):
        pass

    def fail(launch, arguments):
        raise OutOfResources("shared memory")

    spoil(monkeypatch, squeeze_excite, fail)
    failed(squeeze_excite, run(block, x), "refused", "OutOfResources: shared memory")


def test_too_little_memory_ends_it(block, x, monkeypatch):
    def fail(launch, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    spoil(monkeypatch, pointwise_conv, fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(block, x)


def test_a_configuration_is_announced_before_it_is_launched_and_those_known_are_left_out(block, x):
    said, one = [], Tuner(block, x, Clock())
    problem = next(iter(one.shapes))
    one.measure(problem, say=said.append)
    assert said[0] == said[-1] == HEURISTIC and tables.words(FAST[pointwise_pair]) in said
    verdict = one.measure(problem, known=[tables.words(FAST[pointwise_pair])])
    assert verdict.chosen == HEURISTIC


def test_results_that_differ_by_rounding_are_the_same():
    y = torch.randn(2, 8, 5, 5)
    for dtype in (torch.float16, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        assert tuner.same((y * (1 + eps)).to(dtype), y.to(dtype), tuner._rounding(dtype))
        assert not tuner.same((y * (1 + 8 * eps)).to(dtype), y.to(dtype), tuner._rounding(dtype))
    inf = y.clone()
    inf[0, 0, 0, 0] = math.inf
    assert tuner.same(inf, inf, 1e-3) and not tuner.same(inf + 1, inf, 1e-3)
    assert tuner.same(y / 0, y / 0, 1e-3) and not tuner.same(y / 0, y, 1e-3) and not tuner.same(y, y / 0, 1e-3)


# The search, in a process of its own


@pytest.fixture
def planted(monkeypatch):
    """The process finds what `planted_tuning` makes of it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLACE), str(TRIALS), str(PLACE.parents[1])]))
    monkeypatch.setattr(process, "END_S", 60.0)
    return lambda fault: monkeypatch.setenv("TUNING_FAULT", fault)


SUBJECT = Subject("regnety_002", 1, 32, torch.float32, "cpu")


def search(verdicts=None, **options):
    return Search(SUBJECT, verdicts or Verdicts(HERE), modules=["planted_tuning"], **options)


def put_aside(verdict):
    """The one configuration that failed, where the heuristic's serves."""
    (outcome,) = [outcome for outcome in verdict.outcomes.values() if outcome.us is None]
    assert verdict.chosen == HEURISTIC and tables.measured(verdict)
    return outcome


def test_a_search_survives_a_crash_and_goes_on_where_it_ended(planted):
    planted("crash")
    said = []
    with search() as one:
        assert len(one.left) == 2 and all(problem.startswith("triton ") for problem in one.left)
        first = next(one.found(said.append))
    crashed = put_aside(first)
    assert crashed.status == "crashed" and "SIGSEGV" in crashed.reason
    assert said.count("triton squeeze_excite: block_i 16, block_c 32, block_r 32, warps 4, whole 0") == 1
    with search() as one:
        (left,) = one.left
        (second,) = one.found()
    assert second.problem == left != first.problem and second.gain(HEURISTIC) == 2.0 and not one.left


def test_a_configuration_that_hangs_is_not_tried_again_where_nothing_can_be_kept(planted, monkeypatch, tmp_path):
    planted("hang")
    monkeypatch.setitem(tune.PHASES, "try", 5.0)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "verdicts").write_text("in the way")
    with pytest.warns(store.CacheWarning), search() as one:
        first, second = one.found()
    hung = put_aside(first)
    assert hung.status == "hung" and "'try: " in hung.reason and second.gain(HEURISTIC) == 2.0 and not one.left


def test_a_process_that_dies_of_nobody_leaves_the_shape(planted, monkeypatch):
    planted("heuristic")
    monkeypatch.setattr(tune, "DEATHS", 1)
    with search() as one:
        (found,) = one.found()
        assert len(one.left) == 1 and one.left[0] != found.problem
    assert not tables.measured(Verdicts(HERE).find(one.left[0]))


def test_too_little_memory_is_said(planted):
    planted("memory")
    with pytest.raises(TuneError, match=r"2 TiB$"), search() as one:
        list(one.found())


# The command

LAYER = ConvProblem((2, 8, 4, 4), 8, (3, 3), Geometry(padding=(1, 1)), "gelu", False, False, torch.float32, "cpu")


@pytest.fixture
def command(planted, monkeypatch):
    """The command as in a process of its own, where a CPU is taken for a GPU: the kernels are planted, and a layer
    waits to be tried when the model runs.
    """
    monkeypatch.syspath_prepend(str(TRIALS))
    monkeypatch.setenv("PLANTED", "Fast,OneValue")
    import planted as candidates

    monkeypatch.setitem(backends._MODULES, "cuda", candidates)
    monkeypatch.setattr(tune, "Search", lambda subject, *rest: Search(subject, *rest, modules=["planted_tuning"]))
    monkeypatch.setattr(tune, "check_device", lambda device: None)
    monkeypatch.setattr(cli_tune, "check_environment", lambda device: None)
    for module in (environment, session):
        monkeypatch.setattr(module, "environment", lambda device: HERE)
    planted("")

    def invoke(*arguments):
        fresh = session.Session(modules=["planted"], phases=dict.fromkeys(PHASES, 60.0), devices=("cpu",))
        monkeypatch.setattr(tune, "session", fresh)
        monkeypatch.setattr(Subject, "built", lambda subject: (lambda x: fresh.chosen(LAYER), None))
        return CliRunner().invoke(app, ["tune", "regnety_002", "--device", "cuda", *map(str, arguments)])

    return invoke


def test_the_command_tries_configurations_and_layers_once(command):
    found = command("--budget", 0)
    assert "0 verdicts" in found.stdout and "3 kernels or layers are left: the same command goes on" in found.stderr
    assert not list(Verdicts(HERE))

    found = command("--json")
    assert found.exit_code == 0 and "left" not in found.stderr, found.output
    first, second, layer = json.loads(found.stdout)
    assert first["problem"].startswith("triton squeeze_excite: ") and second["problem"].startswith("triton norm_act: ")
    assert layer["chosen"] == "cuda:Fast" and layer["outcomes"]["cuda:OneValue"]["status"] == "wrong"
    text = command().stdout
    assert "0 verdicts" in text and "--again" in text

    listed = CliRunner().invoke(app, ["verdicts"]).stdout
    assert "3 verdicts" in listed and "cuda:Fast" in listed and "triton squeeze_excite: images 2" in listed
    kept = CliRunner().invoke(app, ["verdicts", "--json"]).stdout
    assert "3 verdicts removed" in CliRunner().invoke(app, ["verdicts", "--forget"]).stdout
    assert not list(Verdicts(HERE)) and imported(json.loads(kept)) == 3 == len(list(Verdicts(HERE)))


def test_layers_are_tried_where_triton_cannot_serve(command, planted):
    planted("model")
    found = command("--json")
    assert found.exit_code == 0 and "does not run with the backend triton: " in found.stderr
    assert "SIGABRT" in found.stderr
    assert [verdict["chosen"] for verdict in json.loads(found.stdout)] == ["cuda:Fast"]


def test_committing_takes_a_checkout(command):
    found = command("--commit")
    assert found.exit_code == 2 and "git checkout" in found.stderr and not list(Verdicts(HERE))


def test_what_is_shipped_is_what_was_measured(block, x, tmp_path):
    (tmp_path / "kernels").mkdir()
    run(block, x)
    verdicts, older = Verdicts(HERE), {**HERE, "driver": "older"}
    begun = Verdict("triton norm_act: pixels 8", HEURISTIC, {HEURISTIC: Outcome("verified")})
    verdicts.keep(begun)
    tune.ship(Verdicts(older))
    assert tables.shipped(HERE["device"]) == []
    path = tune.ship(verdicts)
    found = tables.shipped(HERE["device"])
    assert {verdict.problem for _, verdict in found} == {verdict.problem for verdict in verdicts} - {begun.problem}
    assert all(set(verdict.outcomes) == {HEURISTIC, verdict.chosen} for _, verdict in found)
    assert path == tables.shipped_file(HERE["device"]) and path.stat().st_mode & 0o777 == 0o644
    tune.ship(Verdicts(older))
    assert tables.shipped(HERE["device"]) == found


def test_what_is_tuned_is_the_rebuilt_model():
    model, x = Subject("regnetx_002", 3, 64, torch.bfloat16, "cpu").built()
    assert x.shape == (3, 3, 64, 64) and x.dtype == torch.bfloat16 and not model.training
    assert any(isinstance(module, Fused) for module in model.modules())


def test_a_model_of_another_family_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(tune, "check_device", lambda device: None)
    found = CliRunner().invoke(app, ["tune", "convnext_atto", "--size", "32", "--device", "cpu"])
    assert found.exit_code == 2 and "nothing of convnext_atto is rebuilt" in found.stderr
