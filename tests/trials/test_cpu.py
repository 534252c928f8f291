"""Trials in this process: what is chosen, what is paid for it, and who is left in peace."""

import dataclasses
import itertools
import threading
import time
from functools import partial

import pytest
import torch
from helpers import own_cache
from torch.utils.flop_counter import FlopCounterMode

import regnet_fast
from regnet_fast import store
from regnet_fast.backends import ConvProblem, Geometry, NormActProblem, onednn, reference
from regnet_fast.store.verdicts import entries
from regnet_fast.trials import cpu
from regnet_fast.trials.modes import budget, current_mode, mode

POINTWISE = ConvProblem((1, 64, 8, 8), 32, (1, 1), Geometry(), "relu", False, False, torch.float32, "cpu")
WEIGHTS = torch.randn(32, 64, 1, 1), torch.randn(32)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """As a process that starts with an empty cache folder."""
    own_cache(tmp_path, monkeypatch)
    again(monkeypatch)
    with mode("on"):
        yield


def again(monkeypatch):
    """As the next process with the same folder."""
    monkeypatch.setattr(cpu, "_decided", {})
    monkeypatch.setattr(cpu, "_FIRST_S", 0.0)  # so that the first problem is tried at once
    monkeypatch.setattr(cpu, "_purse", cpu.Purse())
    cpu._verdicts.cache_clear()
    monkeypatch.setattr(cpu, "_NOISY", 1e9)  # this machine may be busy
    store._warned.clear()


@pytest.fixture
def planted(monkeypatch):
    """Two variants of every convolution: the first is said to be the faster one and waits."""

    def plant(slow_s=30e-3, factor=1.0, name="slow"):
        class Slow(onednn.DirectConv):
            def __call__(self, *arguments):
                time.sleep(slow_s)
                return super().__call__(*arguments)

        class Other(onednn.DirectConv):
            def __call__(self, *arguments):
                return super().__call__(*arguments) * factor

        monkeypatch.setattr(onednn, "CONVS", {name: Slow, "other": Other})
        monkeypatch.setattr(onednn, "conv_variants", lambda problem: (name, "other"))

    return plant


def variant(problem=POINTWISE, folded=lambda: WEIGHTS):
    return cpu.conv_variant(problem, folded)


def bound(problem=POINTWISE, weights=WEIGHTS):
    """What `tried` asks for beside names."""
    made = cpu.Operands(problem)
    return lambda name: partial(onednn.prepare_conv(problem, *weights, variant=name), *made.all), made.renew


def forbidden(*_):
    raise AssertionError("nothing is tried here")


def test_a_wrong_prior_is_corrected_and_the_next_process_tries_nothing(planted, monkeypatch):
    planted()
    assert variant() == "other"
    again(monkeypatch)
    monkeypatch.setattr(cpu, "tried", forbidden)
    assert variant() == "other"
    ((_, verdict, _),) = entries()
    assert verdict.chosen == "other" and verdict.gain("slow") > 2
    assert {outcome.status for outcome in verdict.outcomes.values()} == {"verified"}


def test_a_model_takes_what_was_chosen(planted):
    planted()
    model = regnet_fast.create_model("regnetx_002").eval()
    with torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))
    assert set(cpu._decided.values()) <= {"slow", "other", "program", "blocks"} and "other" in cpu._decided.values()


@pytest.mark.parametrize(("gain", "chosen"), [(1.01, "slow"), (1.03, "other")])
def test_what_is_hardly_faster_is_not_taken(planted, monkeypatch, gain, chosen):
    planted(slow_s=0.0)
    monkeypatch.setattr(cpu, "_timed", lambda call: 1e-3 * gain if type(call.func).__name__ == "Slow" else 1e-3)
    assert variant() == chosen


def test_nothing_is_kept_of_a_noisy_machine(planted, monkeypatch):
    planted(slow_s=0.0)
    monkeypatch.setattr(cpu, "_NOISY", 1.3)
    times = itertools.cycle([1e-3, 2e-3, 2e-3])
    monkeypatch.setattr(cpu, "_timed", lambda call: next(times) * (0.5 if type(call.func).__name__ == "Other" else 0.7))
    assert variant() == "slow" and not list(entries())


def test_what_comes_near_is_timed_for_longer(planted, monkeypatch):
    planted(slow_s=0.0)

    def count(other):
        calls = []

        def timed(call):
            calls.append(call)
            return 1e-3 if type(call.func).__name__ == "Slow" else other

        monkeypatch.setattr(cpu, "_timed", timed)
        cpu.tried("", ("slow", "other"), *bound())
        return len(calls)

    assert count(1.05e-3) > 2 * count(1.2e-3)


def test_maps_are_written_anew_before_each_call(planted, monkeypatch):
    """Blocks overwrite what they read, and so do the calls that are timed."""
    seen = []

    class Writes(onednn.DirectConv):
        def __call__(self, x, gate, residual, consume, into_residual):
            assert consume and into_residual
            seen.append((x.clone(), residual.clone()))
            y = super().__call__(x, gate, residual, consume, into_residual)
            x.zero_()
            return y

    planted(slow_s=0.0)
    monkeypatch.setattr(onednn, "CONVS", {"slow": Writes, "other": Writes})
    problem = dataclasses.replace(POINTWISE, residual=True)
    with torch.inference_mode():
        cpu.conv_variant(problem, lambda: WEIGHTS)
    assert len(seen) > 10
    assert all(torch.equal(x, seen[0][0]) and torch.equal(residual, seen[0][1]) for x, residual in seen)


def test_one_lucky_call_is_not_faster(planted, monkeypatch):
    planted(slow_s=0.0)
    lucky = iter([1e-4])
    monkeypatch.setattr(cpu, "_timed", lambda call: next(lucky, 1e-3) if type(call.func).__name__ == "Other" else 1e-3)
    assert variant() == "slow"


def test_what_computes_something_else_is_never_taken(planted):
    planted(factor=1.2)
    assert variant() == "slow"
    ((_, verdict, _),) = entries()
    assert verdict.outcomes["other"].status == "wrong" and "not those of slow" in verdict.outcomes["other"].reason


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_taken(planted, factor):
    planted(factor=factor)
    assert variant() == "slow"


def test_other_threads_and_problems_are_tried_again(planted, monkeypatch):
    planted()
    variant()
    again(monkeypatch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        variant()
    finally:
        torch.set_num_threads(before)
    assert len(list(entries())) == 2
    monkeypatch.setattr(cpu, "_purse", cpu.Purse())
    variant(ConvProblem((2, 64, 8, 8), *list(vars(POINTWISE).values())[1:]))
    assert len(list(entries())) == 3


def test_a_new_variant_is_tried_beside_the_known_ones(planted, monkeypatch):
    planted()
    variant()
    again(monkeypatch)
    planted(name="direct")
    assert variant() == "other"
    ((_, verdict, _),) = entries()
    assert set(verdict.outcomes) == {"slow", "direct", "other"}


@pytest.mark.parametrize("how", ["off", "stored"])
def test_modes(planted, monkeypatch, how):
    planted()
    with mode(how):
        assert variant() == "slow" and not list(entries())
    again(monkeypatch)
    assert variant() == "other"
    again(monkeypatch)
    with mode(how):
        assert variant() == ("slow" if how == "off" else "other")


def test_the_environment_sets_the_mode(monkeypatch):
    def in_a_thread():
        found = []
        one = threading.Thread(target=lambda: found.append(current_mode()))
        one.start()
        one.join()
        return found[0]

    for how in ("stored", "off"):
        monkeypatch.setenv("REGNET_FAST_TRIALS", how)
        assert in_a_thread() == how and current_mode() == "on"


def test_a_mode_is_set_with_and_without_a_block():
    with mode("off"):
        assert current_mode() == "off"
        mode("stored")
        assert current_mode() == "stored"
    assert current_mode() == "on"
    with pytest.raises(ValueError, match="choose one of: on, stored, off"):
        mode("maybe")


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_a_budget_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("REGNET_FAST_TRIALS_BUDGET", text)
    with pytest.raises(ValueError, match="number of seconds"):
        budget(2.0)


def test_deterministic_algorithms_are_never_a_matter_of_time(planted):
    planted()
    torch.use_deterministic_algorithms(True)
    try:
        assert variant() == "slow" and not list(entries())
    finally:
        torch.use_deterministic_algorithms(False)


def test_who_counts_operations_sees_no_trials(planted):
    planted()
    with FlopCounterMode(display=False) as counter:
        assert variant() == "slow"
    assert counter.get_total_flops() == 0 and not list(entries())


def test_a_decision_holds_to_the_end_of_the_process(planted):
    """Every call of a model gives the same bits, also where there was no time for a trial at first."""
    planted()
    with FlopCounterMode(display=False):
        assert variant() == "slow"
    assert variant() == "slow"


def test_random_numbers_and_gradients_are_left_alone(planted):
    planted()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    weight = WEIGHTS[0].clone().requires_grad_()
    assert variant(folded=lambda: (weight, None)) == "other"
    assert torch.equal(torch.rand(3), expected)


def test_two_threads_decide_alike(planted):
    planted(slow_s=0.02)
    found = []
    both = [threading.Thread(target=lambda: found.append(variant())) for _ in range(4)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(set(found)) == 1


def test_a_lock_that_nobody_gives_back_costs_the_trial(planted, monkeypatch):
    planted()
    monkeypatch.setattr(cpu, "BUDGET_S", 0.05)
    held, done = threading.Event(), threading.Event()

    def hold():
        with cpu._lock:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    assert variant() == "slow"
    done.set()
    holder.join()
    assert variant() == "other"


def test_a_folder_that_cannot_be_written_costs_the_keeping(planted, tmp_path, monkeypatch):
    planted()
    (tmp_path / "verdicts").write_text("in the way")
    with pytest.warns(store.CacheWarning):
        assert variant() == "other"
    assert variant() == "other"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_trials_take_a_quarter_of_a_row_of_calls(monkeypatch):
    monkeypatch.setattr(cpu, "_FIRST_S", 0.05)
    clock = Clock()
    purse = cpu.Purse(clock)

    def trial(seconds):
        def run():
            clock.now += seconds
            return "verdict"

        return run

    assert not purse.allows(), "before anything was called"
    clock.now += 0.3
    assert purse.allows() and purse.time(trial(0.1)) == "verdict"
    assert not purse.allows()
    spent, begin = 0.1, 100.0
    for _ in range(60):
        clock.now += 0.05  # other work
        if purse.allows():
            purse.time(trial(0.04))
            spent += 0.04
        assert spent <= (clock.now - begin) / 4 + 1e-9
    assert spent >= (clock.now - begin) / 5


def test_trials_end_with_their_budget_and_begin_anew_with_the_next_row(monkeypatch):
    monkeypatch.setenv("REGNET_FAST_TRIALS_BUDGET", "0.5")
    clock = Clock()
    purse, count = cpu.Purse(clock), 0
    for _ in range(100):
        clock.now += 0.9
        if purse.allows():
            purse.time(lambda: setattr(clock, "now", clock.now + 0.2))
            count += 1
    assert count == 2
    clock.now += 60
    assert not purse.allows()
    clock.now += 0.9
    assert purse.allows()


def test_a_trial_that_fails_is_raised_and_decides_nothing(planted, monkeypatch):
    planted()

    def broken():
        raise RuntimeError("of the weights")

    with pytest.raises(RuntimeError, match="of the weights"):
        variant(folded=broken)
    monkeypatch.setattr(cpu, "_purse", cpu.Purse())
    assert variant() == "other"


def test_what_cannot_run_is_refused(planted, monkeypatch):
    planted()

    def no(*_):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(onednn.CONVS["other"], "__call__", no)
    assert variant() == "slow"
    ((_, verdict, _),) = entries()
    assert verdict.outcomes["other"].status == "refused" and "primitive" in verdict.outcomes["other"].reason


# What is tried


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_variant_runs_on_what_it_is_tried_with(kernel, dtype, residual, gate):
    geometry = Geometry(padding=(kernel // 2,) * 2)
    problem = ConvProblem((2, 64, 9, 7), 64, (kernel, kernel), geometry, "silu", gate, residual, dtype, "cpu")
    if onednn.refuse(problem):
        pytest.skip(onednn.refuse(problem))
    weights = (torch.randn(64, 64, kernel, kernel) / 8).to(dtype), torch.randn(64)
    names = onednn.conv_variants(problem)
    assert names[0] == "direct" or dtype == torch.float32
    found = cpu.tried(cpu.words(problem), names, *bound(problem, weights))
    assert {outcome.status for outcome in found.outcomes.values()} == {"verified"} and set(found.outcomes) == set(names)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", onednn.NORM_ACTS)
def test_every_variant_of_a_norm_gives_its_dtype(variant, dtype, gate, consume):
    problem = NormActProblem((2, 24, 5, 7), "relu", gate, dtype, "cpu")
    if onednn.refuse(problem):
        pytest.skip(onednn.refuse(problem))
    x = torch.randn(2, 24, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    scale, shift, factor = torch.randn(24), torch.randn(24), torch.rand(2, 24).to(dtype) if gate else None
    expected = reference.norm_act(x.double(), scale, shift, None if factor is None else factor.double(), "relu")
    y = onednn.prepare_norm_act(problem, scale, shift, variant)(x, factor, consume)
    assert y.dtype == dtype and (y.double() - expected).norm() < 1e-2 * expected.norm()


def test_which_variants_there_are():
    def names(**changes):
        return set(onednn.conv_variants(ConvProblem(**{**vars(POINTWISE), **changes})))

    same = dict(kernel=(3, 3), geometry=Geometry(padding=(1, 1)), out_channels=64)
    assert names() == {"direct", "matmul", "native"} and names(dtype=torch.bfloat16) == {"direct", "native"}
    assert names(**same) == {"direct", "winograd", "native"}
    assert names(**{**same, "out_channels": 32}) == names(**same, gate=True) == {"direct", "native"}
    assert names(kernel=(3, 3), geometry=Geometry(padding=(1, 1), groups=2)) == {"direct"}
    assert names(geometry=Geometry(stride=(2, 2))) == {"direct", "native"}
    assert names(activation="gelu") == {"direct", "matmul"} and names(dtype=torch.float16) == {"direct"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_act(dtype):
    problem = NormActProblem((2, 16, 9, 7), "relu", True, dtype, "cpu")
    if onednn.refuse(problem):
        pytest.skip(onednn.refuse(problem))
    assert cpu.norm_act_variant(problem, torch.rand(16) + 0.5, torch.randn(16)) in onednn.NORM_ACTS
    ((_, verdict, _),) = entries()
    assert set(verdict.outcomes) == set(onednn.NORM_ACTS)


def test_large_problems_are_tried_with_fewer_images():
    problem = ConvProblem((512, 64, 56, 56), 64, (1, 1), Geometry(), "relu", False, True, torch.float32, "cpu")
    x, _, residual, *_ = cpu.Operands(problem).all
    assert 1 <= x.shape[0] < 32 and residual.shape == x.shape
    assert x.is_contiguous(memory_format=torch.channels_last) and x.std() > 0.3 and x.isfinite().all()


# A stage


@pytest.fixture
def stage():
    model = regnet_fast.create_model("regnetx_002").eval()
    return model, torch.randn(8, 3, 64, 64)


def sizes(model, x):
    """Of the parts of the second stage."""
    from regnet_fast.observer import observing

    found = []
    with torch.inference_mode(), observing(block=lambda block, x, *_: found.append((block, len(x)))):
        model(x)
    return [n for block, n in found if block is model.s2.b1]


def test_a_stage_is_tried_where_there_is_time(stage, monkeypatch):
    from regnet_fast.blocks import chain

    model, x = stage
    monkeypatch.setattr(cpu, "by_program", lambda *_: False)
    monkeypatch.setattr(chain, "images", lambda form, shape, dtype: 2)
    assert sizes(model, x) == [2] * 4
    monkeypatch.setattr(cpu, "_decided", {})
    monkeypatch.setattr(cpu, "_timed", lambda call: 1e-3 / (call.args[0] if len(call.args) == 1 else 1))
    with cpu.unhurried():
        assert sizes(model, x) == [4, 4]
    assert sizes(model, x) == [4, 4]
    again(monkeypatch)
    assert sizes(model, x) == [4, 4], "another process takes it from the verdict"
    assert sizes(model, x[:3]) == [2, 1], "which does not fit a smaller batch"


def test_a_problem_in_words():
    def words(**changes):
        return cpu.words(ConvProblem(**{**vars(POINTWISE), **changes}))

    assert words() == "pointwise_conv 1x64x8x8 -> 32, 1x1, relu, float32"
    grouped = dict(kernel=(3, 3), geometry=Geometry((2, 2), (1, 1), (1, 1), 4), dtype=torch.bfloat16)
    assert (
        words(**grouped) == "grouped_conv 1x64x8x8 -> 32, 3x3, stride (2, 2), padding (1, 1), groups 4, relu, bfloat16"
    )
    facts = dict(gate=True, residual=True, means=True, activation="silu")
    assert len({words(), *(words(**{field: value}) for field, value in facts.items())}) == 5
    assert cpu.words(cpu.Stage("A(1x2) B(3)", (8, 4, 4), torch.float32)) == "stage 8x4x4 float32: A(1x2) B(3)"
