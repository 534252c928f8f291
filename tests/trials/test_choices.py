"""What trials choose on this CPU with wrong priors, against a careful measurement, for a machine that is idle.

`pytest -s -m slow tests/trials/test_choices.py` prints what was counted.
"""

import statistics
import time

import pytest
import torch

import regnet_fast
from regnet_fast.backends import onednn
from regnet_fast.trials import cpu
from regnet_fast.trials.modes import mode

MODELS = ("regnety_016", "regnetz_b16", "repvgg_a2", "resnetv2_50")
ROUNDS = 41
ALIKE = 1.03
"""Two variants whose medians are nearer to each other are one to a trial, which keeps the first."""


def convolutions(model, dtype, batch, monkeypatch):
    """Every convolution of a model with its weights, as often as it stands there."""
    found, chosen = [], cpu.conv_variant

    def heard(problem, folded):
        found.append((problem, folded))
        return chosen(problem, folded)

    fast = regnet_fast.create_model(model, num_classes=10).eval().to(dtype)
    with monkeypatch.context() as patch, mode("off"), torch.inference_mode():
        patch.setattr(cpu, "conv_variant", heard)
        patch.setattr(cpu, "by_program", lambda *_: False)
        fast(torch.randn(batch, 3, 224, 224).to(dtype))
    return found


def measured(calls, renew):
    """The median of each call's times, in rounds; none follows itself, as none does in a model."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in calls:
            renew()
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trials_choose_what_is_measured_as_the_fastest(dtype, batch, monkeypatch):
    agreed, known, counted, worst = 0, {}, 0, (1.0, "")
    for model in MODELS:
        for problem, folded in convolutions(model, dtype, batch, monkeypatch):
            counted += 1
            if problem not in known:
                variants = onednn.conv_variants(problem)[::-1]

                def once(variants=variants, problem=problem, folded=folded):
                    """A trial's choice and how many times as slow as the fastest it is, of maps that lie anywhere."""
                    made = cpu.Operands(problem)

                    def bind(variant):
                        return made.call(onednn.prepare_conv(problem, *folded(), variant=variant))

                    yield cpu.tried("", variants, bind, made.renew).chosen
                    yield measured({name: bind(name) for name in variants}, made.renew)

                with torch.inference_mode(False), torch.no_grad():
                    chosen, times = once()
                    slower = times[chosen] / min(times.values())
                    if slower > ALIKE:  # where a map lies changes its time by more, as does what runs just then
                        again = [times[chosen] / min(times.values()) for _, times in (once(), once(), once(), once())]
                        slower = statistics.median([slower, *again])
                worst = max(worst, (slower, f"{cpu.words(problem)}: {chosen} {times}"))
                known[problem] = slower <= ALIKE
            agreed += known[problem]
    several = sum(len(onednn.conv_variants(problem)) > 1 for problem in known)
    print(
        f"\n{dtype}, batch {batch}: {agreed} of {counted} convolutions, {several} of {len(known)} shapes with a choice;"
    )
    print(f"right for {sum(known.values())} shapes; the worst is {worst[0]:.3f} times the fastest: {worst[1]}")
    assert counted > 100 and agreed >= 0.95 * counted
    assert worst[0] <= 1.05
