"""Tuning in the interpreter with an invented clock: what is measured, what is chosen, what is written and when."""

import json
import math
import time
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

import regnet_fast
from regnet_fast.backends import backend
from regnet_fast.blocks.fused import Fused
from regnet_fast.cli import app
from regnet_fast.inspect import tune
from regnet_fast.inspect.verify import randomize_norms
from regnet_fast.kernels import implicit_gemm, pointwise_conv, pointwise_pair, squeeze_excite, tables
from regnet_fast.kernels.tables import TableError
from regnet_fast.observer import observing

pytestmark = pytest.mark.usefixtures("unchecked_integers")

GPU = "test-gpu"
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
    """Few configurations, and folders of a GPU that the interpreter takes for its own."""
    for kernel, configs in CONFIGS.items():
        monkeypatch.setattr(kernel, "CONFIGS", configs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "kernels" / "tuned")
    monkeypatch.setattr(tables, "gpu", lambda device: GPU)
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


def folder():
    return tables.user_folder()


def run(block, x, clock=None, again=False, **options) -> list:
    found = tune.missing(block, x, folder(), again)
    return list(tune.tune(block, x, found, folder(), timer=clock or Clock(), **options))


def table(kernel) -> dict:
    return tables.read(folder() / GPU / f"{tables.name(kernel)}.json", kernel)


def test_every_launch_of_a_model_is_found_once(model, block, x):
    heard = []
    with backend("triton"), torch.no_grad(), observing(choice=heard.append):
        model.s3(torch.randn(1, 56, 4, 4))
    assert len(heard) == 4 + 3 * 4  # the blocks after the first have its conv3, and all else in common with each other
    assert len(tune.missing(model.s3, torch.randn(1, 56, 4, 4), folder())) == 4 + 3
    shapes = tune.missing(block, x, folder())
    assert [kernel for kernel, _ in shapes] == [pointwise_pair, implicit_gemm, squeeze_excite, pointwise_conv]
    pair, _, _, conv3 = [shape for _, shape in shapes]
    assert (pair.pixels, pair.channels, pair.out_channels, pair.other_channels, pair.stride) == (128, 24, 56, 56, 2)
    assert (conv3.pixels, conv3.channels, conv3.gate, conv3.residual) == (32, 56, True, True)


def test_the_fastest_is_chosen_written_and_taken(block, x):
    results = run(block, x)
    assert len(results) == 4
    for kernel, fast in FAST.items():
        entries = table(kernel)
        for entry in entries.values():
            assert (entry.config, entry.microseconds, entry.heuristic_microseconds) == (fast, 5.0, 10.0)
            assert entry.conditions["torch"] == torch.__version__ and entry.conditions["date"]
    assert all(result.gain == 2.0 and not result.skipped for result in results)
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
    run(block, x, Clock(fast))
    for entry in table(pointwise_conv).values():
        assert (entry.config is not None) == chosen
        assert entry.microseconds == (fast if chosen else 10.0)


def spoil(monkeypatch, kernel, spoiled):
    """The kernels of a module, launched with the faster of its configurations, are followed by `spoiled(tensors)`."""
    launch, fast = kernel.launch, FAST[kernel]

    def launch_wrong(triton_kernel, grid, *arguments, **options):
        tiles = {name.upper(): size for name, size in vars(fast).items() if name.startswith("block_")}
        if all(options[name] == size for name, size in tiles.items()):
            return spoiled(lambda: launch(triton_kernel, grid, *arguments, **options), arguments)
        return launch(triton_kernel, grid, *arguments, **options)

    monkeypatch.setattr(kernel, "launch", launch_wrong)


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


@pytest.mark.parametrize("spoiled", [after(scale_last_column), after(scale_one_value), after(poison), nothing])
def test_a_wrong_result_is_never_timed_or_chosen(block, x, monkeypatch, spoiled):
    spoil(monkeypatch, pointwise_conv, spoiled)
    clock = Clock()
    results = run(block, x, clock)
    (wrong,) = [result for result in results if result.kernel == "pointwise_conv"]
    assert wrong.skipped == {tune.WRONG: 1}
    assert not clock.calls[FAST[pointwise_conv]] and clock.calls[FAST[implicit_gemm]]
    assert all(entry.config is None for entry in table(pointwise_conv).values())


def test_wrong_parts_of_means_are_found(block, x, monkeypatch):
    def spoil_parts(arguments):
        arguments[5][..., 3] *= 1.1

    spoil(monkeypatch, implicit_gemm, after(spoil_parts))
    (result,) = [result for result in run(block, x) if result.kernel == "implicit_gemm"]
    assert result.skipped == {tune.WRONG: 1} and result.entry.config is None


def test_a_wrong_shortcut_is_found(block, x, monkeypatch):
    def spoil_other(arguments):
        arguments[8][:, 3] *= 1.1

    spoil(monkeypatch, pointwise_pair, after(spoil_other))
    (result,) = [result for result in run(block, x) if result.kernel == "pointwise_pair"]
    assert result.skipped == {tune.WRONG: 1} and result.entry.config is None


def test_what_does_not_compile_is_counted_by_its_reason(block, x, monkeypatch):
    class OutOfResources(Exception):
        pass

    def fail(launch, arguments):
        raise OutOfResources("shared memory")

    spoil(monkeypatch, squeeze_excite, fail)
    (result,) = [result for result in run(block, x) if result.kernel == "squeeze_excite"]
    assert result.skipped == {"OutOfResources": 1} and result.entry.config is None


def test_too_little_memory_ends_it(block, x, monkeypatch):
    def fail(launch, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    spoil(monkeypatch, pointwise_conv, fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(block, x)


def test_an_interrupted_run_goes_on_where_it_ended(block, x):
    class Interrupted(Clock):
        def __call__(self, calls, rounds):
            if sum(self.calls.values()) > 8:
                raise KeyboardInterrupt
            return super().__call__(calls, rounds)

    everything = tune.missing(block, x, folder())
    with pytest.raises(KeyboardInterrupt):
        run(block, x, Interrupted())
    left = tune.missing(block, x, folder())
    assert 0 < len(left) < len(everything) and left == everything[-len(left) :]
    assert len(run(block, x)) == len(left)
    assert tune.missing(block, x, folder()) == []
    assert tune.missing(block, x, folder(), again=True) == everything
    assert len(run(block, x, again=True)) == len(everything)


def test_nothing_is_written_where_the_measurement_fails(block, x):
    def broken(calls, rounds):
        raise RuntimeError("no clock")

    with pytest.raises(RuntimeError, match="no clock"):
        run(block, x, broken)
    assert not folder().exists()


def test_no_shape_is_begun_after_the_deadline(block, x):
    clock = Clock()
    assert run(block, x, clock, deadline=time.monotonic()) == []
    assert not clock.calls and not folder().exists()


def test_a_table_that_cannot_be_used_is_left_as_it_is(block, x):
    path = folder() / GPU / "implicit_gemm.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(TableError, match="implicit_gemm"), pytest.warns(tables.TableWarning):
        run(block, x)
    assert path.read_text() == "{}"


def test_results_that_differ_by_rounding_are_the_same():
    y = torch.randn(2, 8, 5, 5)
    for dtype in (torch.float16, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        assert tune.same((y * (1 + eps)).to(dtype), y.to(dtype), tune._rounding(dtype))
        assert not tune.same((y * (1 + 8 * eps)).to(dtype), y.to(dtype), tune._rounding(dtype))
    inf = y.clone()
    inf[0, 0, 0, 0] = math.inf
    assert tune.same(inf, inf, 1e-3) and not tune.same(inf + 1, inf, 1e-3)
    assert tune.same(y / 0, y / 0, 1e-3) and not tune.same(y / 0, y, 1e-3) and not tune.same(y, y / 0, 1e-3)


# The command


def command(*arguments):
    options = ("--size", "32", "--device", "cpu")
    return CliRunner().invoke(app, ["tune", *map(str, arguments), *options])


@pytest.fixture
def clock(monkeypatch, block, x):
    """The command's own timer, where any device will do, for one block in place of a model."""
    clock = Clock()
    monkeypatch.setattr(tune, "GpuTimer", lambda device: clock)
    monkeypatch.setattr(tune, "check_device", lambda device: None)
    monkeypatch.setattr(tune, "subject", lambda *options: (block, x))
    return clock


def test_the_command_measures_once(clock):
    found = command("regnetx_002", "--json")
    assert found.exit_code == 0, found.output
    content = json.loads(found.stdout)
    assert content["left"] == 0 and len(content["results"]) == 4
    first = content["results"][0]
    assert first["gain"] == 2.0 and first["entry"]["config"]["block_k"] == 64 and first["shape"]["pixels"] == 128
    text = command("regnetx_002").output
    assert "0 shapes measured" in text and "--again" in text


def test_the_command_stops_and_goes_on(clock):
    text = command("regnetx_002", "--budget", 0).output
    assert "0 shapes measured" in text and "4 shapes are left: the same command goes on" in text
    assert not folder().exists()
    text = command("regnetx_002").output
    assert "4 shapes measured, 4 of them faster" in text and "are left" not in text
    assert all(word in text for word in ("pointwise_conv", "pixels 128, channels 24,", "2.00x"))


def test_a_wrong_configuration_is_reported(clock, monkeypatch):
    spoil(monkeypatch, pointwise_conv, after(scale_last_column))
    found = command("regnetx_002")
    assert found.exit_code == 0 and "results are wrong" in found.stderr


def test_committing_takes_a_checkout(clock, tmp_path):
    found = command("regnetx_002", "--commit")
    assert found.exit_code == 2 and "git checkout" in found.stderr and not clock.calls
    (tmp_path / ".git").mkdir()
    assert command("regnetx_002", "--commit").exit_code == 0
    assert (tmp_path / "kernels" / "tuned" / GPU / "pointwise_conv.json").exists() and not folder().exists()


def test_what_is_tuned_is_the_rebuilt_model():
    model, x = tune.subject("regnetx_002", 3, 64, torch.bfloat16, "cpu")
    assert x.shape == (3, 3, 64, 64) and x.dtype == torch.bfloat16 and not model.training
    assert any(isinstance(module, Fused) for module in model.modules())


def test_a_model_of_another_family_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(tune, "check_device", lambda device: None)
    found = command("resnet10t")
    assert found.exit_code == 2 and "nothing of resnet10t is rebuilt" in found.stderr
