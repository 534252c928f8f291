"""The kernels of csrc/cpu for evaluation: against float64, on every instruction set that this machine can be told to
compile for, with watched memory, with any number of threads, from several threads and behind a fork.
"""

import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_cases as cases
import pytest
import timm
import torch
from helpers import randomize_bn
from native_cases import BF16, F32
from torch import nn

import regnet_fast
from regnet_fast.backends import NormActProblem, SqueezeExciteProblem, backend, cpu_library, native
from regnet_fast.blocks.chain import Chain
from regnet_fast.blocks.program import Program
from regnet_fast.blocks.units import Refused
from regnet_fast.hosts.timm import Stem
from regnet_fast.trials import cpu
from regnet_fast.trials.modes import mode

ROOT = Path(__file__).parents[2]
ALL = list(cases.problems())

pytestmark = pytest.mark.skipif(native.refuse(ALL[0]) is not None, reason=str(native.refuse(ALL[0])))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Operations


@pytest.mark.parametrize("part", range(8))
def test_convolutions(part):
    for problem in ALL[part::8]:
        assert native.refuse(problem) is None
        assert cases.computed(problem)[2] < 1, problem


def test_no_bit_depends_on_how_a_convolution_is_cut():
    for problem in ALL[::5]:
        assert cases.one_result(problem), problem


def test_a_program_is_cut_for_the_threads_that_there_are(threads):
    model, problem = regnet_fast.rebuild(randomized("regnetx_002")).model, cases.conv((1, 14, 14), 64, 64, 1)
    given, x = cases.operands(problem), torch.randn(1, 3, 64, 64)
    run = native.prepare_conv(problem, given["weight"], given["bias"])
    with torch.inference_mode(), backend("native"):
        for count in (1, 4, 1):
            threads(count)
            model(x)
            run(given["x"], None, None, False, False)
    assert len(run._programs) == len(programs(model.stem)) == 2


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_image_in_nchw(dtype):
    for kernel, stride in ((3, 2), (7, 2), (3, 1), (1, 1)):
        problem = cases.conv((2, 33, 20), 3, 32, kernel, stride, dtype=dtype)
        given = cases.operands(problem)
        run = native.prepare_conv(problem, given["weight"], given["bias"])
        found = [run(x, None, None, False, False) for x in (given["x"], given["x"].contiguous())]
        assert run.any_layout and torch.equal(*found)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("activation", native.ACTIVATION_CODES)
def test_norm_act(dtype, activation):
    for size, channels in (((2, 5, 9), 24), ((1, 1, 1), 7), ((3, 14, 14), 130)):
        for gated in (False, True):
            n, h, w = size
            problem = NormActProblem((n, channels, h, w), activation, gated, dtype, "cpu")
            x, scale, shift = cases.maps(problem.input_shape, dtype), torch.randn(channels), torch.randn(channels)
            gate = torch.rand(n, channels).to(dtype) if gated else None
            z = x.double() * scale.double()[:, None, None] * (1 if gate is None else gate.double()[:, :, None, None])
            expected = cases.ACTIVATIONS[activation].function(z + shift.double()[:, None, None])
            run = native.prepare_norm_act(problem, scale, shift)
            assert cases.error(run(x, gate, False), expected, dtype) < 1
            assert run(x, gate, True) is x and cases.error(x, expected, dtype) < 1


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("activation", native.ACTIVATION_CODES)
def test_activations(activation, dtype):
    """At every number, far from zero, at infinity and at none."""
    assert cases.activated(activation, dtype) < 1


def test_squeeze_excite():
    for batch, channels, hidden in ((1, 24, 8), (3, 336, 84), (8, 17, 1), (5, 888, 222)):
        problem = SqueezeExciteProblem(batch, channels, hidden, "relu", F32, "cpu")
        means, fc1, bias1 = torch.randn(batch, channels), torch.randn(hidden, channels), torch.randn(hidden)
        fc2, bias2 = torch.randn(channels, hidden) / hidden, torch.randn(channels)
        hidden_values = (means.double() @ fc1.double().t() + bias1).relu()
        expected = (hidden_values @ fc2.double().t() + bias2).sigmoid()
        found = native.prepare_squeeze_excite(problem, fc1, bias1, fc2, bias2)(means)
        assert cases.error(found, expected, F32) < 1


@pytest.mark.parametrize("channels", [368, 2048])
def test_the_error_of_a_classifier_does_not_grow_with_its_terms(channels):
    """Beyond what rounding to float32 makes of a result."""
    x, weight = torch.randn(8, channels), torch.randn(256, channels) / channels**0.5
    run = native.prepare_conv(native.linear(8, 256, channels, "none"), weight[:, :, None, None], None)
    y = run(x.t()[None, :, :, None], None, None, False, False)[0, :, :, 0].t()
    exact = x.double() @ weight.double().t()
    assert (y - exact).square().mean().sqrt() < 2.1e-7 * exact.square().mean().sqrt()


def test_the_largest_of_a_window():
    """To the bit, NaN and infinities as well."""
    for case in cases.largest_cases():
        found, expected = cases.largest(*case)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=str(case))


def test_means_of_a_window():
    for case in cases.window_mean_cases():
        assert cases.window_mean(*case) < 1, case


def test_a_map_is_gated_and_added_to():
    for case in cases.joined_cases():
        assert cases.joined(*case) < 1, case


def test_norms_that_a_convolution_computes_as_it_reads():
    for case in cases.through_cases():
        assert cases.through(*case) < 1, case


def test_averages():
    """Of any number of channels, with a norm and activation before or without; NaN stays in its channel."""
    for case in cases.average_cases():
        assert cases.average(*case)[1] < 1, case
    x = cases.maps((2, 24, 3, 3), F32)
    x[1, 5, 2, 2] = cases.NAN
    y = cases._run_step(native.average_step(x.shape, F32, 0, 1), x, torch.empty(2, 24))
    assert y.isnan().nonzero().tolist() == [[1, 5]]


def test_no_bit_of_these_depends_on_the_number_of_threads(threads):
    for case in [*cases.average_cases()][::7]:
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(cases.average(*case)[0])
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), case


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_one(value, dtype):
    """And reaches no result that it is no term of."""
    for c, kernel, stride, groups in ((24, 1, 1, 1), (152, 1, 1, 1), (24, 3, 1, 1), (24, 3, 1, 3), (96, 3, 2, 2)):
        problem = cases.conv((2, 6, 7), c, c, kernel, stride, groups, activation="none", dtype=dtype)
        given = cases.operands(problem)
        given["x"][0, 3, 2, 1] = value
        y = native.prepare_conv(problem, given["weight"], given["bias"])(given["x"], None, None, False, False)
        assert torch.equal(y.isfinite(), cases.exact(problem, **given).isfinite()), problem


REFUSALS = {
    "groups of 12": (dict(c=24, k=24, kernel=3, groups=2), "a multiple of 8 channels, not of 12 in and 12 out"),
    "other groups": (dict(c=32, k=16, kernel=3, groups=2), "not of 16 in and 8 out"),
    "float16": (dict(c=8, k=8, kernel=1, dtype=torch.float16), "not in torch.float16"),
    "gelu": (dict(c=8, k=8, kernel=1, activation="gelu"), "has no gelu"),
    "an image smaller than the kernel": (dict(c=8, k=8, kernel=5, padding=0), "the result would have the shape"),
    "a GPU": (dict(c=8, k=8, kernel=1, device="cuda:0"), "not on cuda:0"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_have_a_reason(what):
    facts, reason = REFUSALS[what]
    assert reason in native.refuse(cases.conv((1, 4, 4), **facts))


# Bits


def test_no_result_depends_on_the_number_of_threads(threads):
    for problem in ALL[::23]:
        found = []
        for count in (1, 2, 3, 4):
            threads(count)
            y, means, _ = cases.computed(problem)
            found.append(y if means is None else torch.cat([y.flatten(), means.flatten()]))
        assert all(torch.equal(one, found[0]) for one in found), problem


def test_nor_on_the_other_images_of_a_batch():
    for problem in [p for p in ALL if p.input_shape[0] > 1 and not p.gate and not p.residual][::5]:
        given = cases.operands(problem)
        run, x = native.prepare_conv(problem, given["weight"], given["bias"]), given["x"]
        whole, one = run.with_parts(x), run.with_parts(x[1:2])
        assert torch.equal(whole[0][1:2], one[0]) and torch.equal(whole[1][1:2], one[1]), problem


def test_nor_on_them_where_a_map_is_added():
    for problem in [p for p in ALL if p.input_shape[0] > 1 and p.residual and not p.gate and p.input_shape[1] > 60]:
        given = cases.operands(problem)
        run, x, residual = native.prepare_conv(problem, given["weight"], given["bias"]), given["x"], given["residual"]
        whole, one = (run(x, None, r, False, False) for x, r in ((x, residual), (x[1:2], residual[1:2])))
        assert torch.equal(whole[1:2], one), problem


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["regnety_002", "regnetv_040", "resnetv2_50"])
def test_nor_does_that_of_a_stage(name, dtype, threads):
    model = regnet_fast.rebuild(randomized(name)).model.to(dtype)
    x, found = torch.randn(3, 3, 47, 65).to(dtype), []
    for count in (1, 2, 3, 4):
        threads(count)
        with torch.inference_mode():
            found.append(model(x))
    assert all(torch.equal(one, found[0]) for one in found)


def randomized(name):
    model = timm.create_model(name, num_classes=10).eval()
    randomize_bn(model, 0)
    return model


# The same kernels compiled in other ways


def run_cases(options: str, **environment: str) -> list[str]:
    """What `native_cases.py` prints where csrc/cpu is compiled with further options."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    given = {**os.environ, "PYTHONPATH": paths, "CXX": f"{shutil.which('g++') or 'c++'} {options}", **environment}
    command = [sys.executable, str(ROOT / "tests" / "native_cases.py")]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stderr[-4000:]
    return done.stdout.split()


MARCHES = {"x86-64": (4, set()), "haswell": (8, {"avx2", "fma"}), "skylake-avx512": (16, {"avx512f", "avx512bw"})}


@pytest.mark.long
@pytest.mark.parametrize("march", MARCHES)
def test_other_instruction_sets(march):
    lanes, needed = MARCHES[march]
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    if "sse2" not in flags or not needed <= flags:
        pytest.skip(f"this machine has no {march}")
    _, found, worst = run_cases(f"-march={march}")
    assert int(found) == lanes and float(worst) < 1


@pytest.mark.long
def test_the_matrix_unit_emulated():
    """All that is laid out and cut for it, on a machine that has none."""
    *_, worst = run_cases("-DAMX_EMULATED")
    assert float(worst) < 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", ["-march=native", "-march=haswell", "-march=native -DAMX_EMULATED"])
def test_memory_is_respected(options):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    run_cases(
        f"{options} -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
        LD_PRELOAD=runtimes("libasan.so", "libubsan.so"),
        ASAN_OPTIONS="detect_leaks=0",
        OMP_NUM_THREADS="2",
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_threads_wait_for_each_other():
    """Under ThreadSanitizer, with four threads."""
    run_cases(
        "-O1 -g1 -fsanitize=thread -fno-openmp",
        LD_PRELOAD=runtimes("libtsan.so"),
        TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1",
        OMP_NUM_THREADS="4",
    )


def runtimes(*names):
    """GNU's libraries that are loaded before Python."""
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++, whose runtime is loaded before Python")
    commands = ([gcc, f"-print-file-name={name}"] for name in names)
    return " ".join(subprocess.check_output(command, text=True).strip() for command in commands)


# Programs


def stages(model):
    return [module for module in model.modules() if isinstance(module, Chain)]


@pytest.mark.parametrize(
    "name", ["regnetx_002", "regnety_002", "regnetz_b16", "regnetv_040", "repvgg_a0", "resnetv2_50"]
)
def test_every_stage_of_the_families_is_a_program(name):
    model = regnet_fast.rebuild(randomized(name)).model
    with torch.inference_mode():
        model.forward_features(torch.randn(1, 3, 64, 64))  # each stage by itself
    first = [next(iter(stage.links())) for stage in stages(model)]
    made = [program for block in first for program in programs(block)]
    assert len(made) >= 4 and None not in made


def test_what_is_no_step_is_refused():
    """An activation that csrc/cpu does not have, and a stem's pooling that is none of its own."""
    stem = nn.Conv2d(24, 24, 3), nn.Identity()
    blocks = {
        "gelu": timm.create_model("regnetx_002", act_layer="gelu").s2.b1,
        "AvgPool2d is": Stem(OrderedDict(conv=stem[0], pool=nn.AvgPool2d(3, padding=1))),
        "AdaptiveAvgPool2d is": Stem(OrderedDict(conv=stem[0], pool=nn.AdaptiveAvgPool2d(2))),
        "MaxPool2d is": Stem(OrderedDict(conv=stem[0], pool=nn.MaxPool2d(2, return_indices=True))),
        "no result": Stem(OrderedDict(conv=stem[0], pool=nn.MaxPool2d(9))),
    }
    for reason, block in blocks.items():
        form = regnet_fast.rebuild(block.eval()).model.read_form()
        with pytest.raises(Refused, match=reason):
            Program([[form]], (1, form.in_channels() or 24, 8, 8), F32)


def programs(block):
    """Of the stages that begin with a block."""
    kept = [kept for plan in block._regnet_fast_plans.values() for kept in plan.programs.values()]
    return [one.program for found in kept for one in found.made.values()]


def test_weights_lie_apart_in_memory_that_threads_share():
    room = native.Room()
    sizes = [1, 64, 100, 300 << 10, 5 << 20, 0, 7, 17 << 20, 3] * 8
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(room.take, sizes))
    assert [piece.numel() for piece in pieces] == sizes
    assert all(piece.data_ptr() % native.LINE == 0 for piece in pieces if piece.numel())
    taken = sorted((piece.data_ptr(), piece.numel()) for piece in pieces if piece.numel())
    assert all(start + size <= behind for (start, size), (behind, _) in itertools.pairwise(taken))


def test_a_large_piece_begins_with_a_large_page():
    assert native.aligned(native.LARGE_PAGE).data_ptr() % native.LARGE_PAGE == 0


@pytest.mark.parametrize("changed", ["b1", "b2"])
def test_programs_of_weights_that_have_changed_are_let_go(changed):
    """At once, without the collector of cycles; those of other shapes as well."""
    stage = regnet_fast.rebuild(randomized("regnetx_002")).model.s3
    with torch.no_grad():
        for size in (16, 24):
            stage(torch.randn(1, 56, size, size))
        made = [weakref.ref(program) for program in programs(stage.b1)]
        weight = stage.get_submodule(changed).conv2.bn.weight
        weight.data = weight.data * 2
        gc.disable()
        try:
            stage(torch.randn(1, 56, 16, 16))
            assert len(made) == 2 and all(ref() is None for ref in made)
        finally:
            gc.enable()


def test_a_check_is_asked_while_the_other_threads_begin(threads):
    problem = NormActProblem((64, 64, 32, 32), "relu", False, F32, "cpu")
    program = native.prepare_norm_act(problem, torch.randn(64), torch.randn(64))._program
    x, y = cases.maps(problem.input_shape, F32), torch.full((64, 32, 32, 64), cases.NAN)
    expected = y.clone()
    assert program([x.data_ptr(), expected.data_ptr(), None])

    def check():
        deadline = time.monotonic() + 20
        while y.isnan().all() and time.monotonic() < deadline:
            time.sleep(1e-3)
        return time.monotonic() < deadline

    threads(2)
    assert program([x.data_ptr(), y.data_ptr(), None], check) and torch.equal(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_does_not_count_is_no_result(count, threads):
    threads(count)
    stage = stages(regnet_fast.rebuild(randomized("regnetx_002")).model)[1]
    x = cases.maps((4, 24, 40, 40), F32)
    program = Program([[block.read_form() for block in stage.links()]], x.shape, F32)
    expected = program(x)
    assert program(x, lambda: False) is None
    assert torch.equal(program(x, lambda: True), expected)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program(x, interrupted)
    assert torch.equal(program(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_steps_are_timed_inside_the_run(count, threads):
    threads(count)
    stage = stages(regnet_fast.rebuild(randomized("regnety_002")).model)[2]
    x = cases.maps((2, 56, 64, 64), F32)
    program = Program([[block.read_form() for block in stage.links()]], x.shape, F32)
    shares = []
    for _ in range(20):
        begin = time.perf_counter()
        found = program.timed(x)
        passed = time.perf_counter() - begin
        seconds = [each for _, each in found]
        assert all(each > 0 for each in seconds)
        shares.append(sum(seconds) / passed)
    assert 0.5 < max(shares) <= 1, "of the time of a call that no other process disturbed"
    assert [step.kind for step, _ in found] == [step.kind for step in program._run.steps]


def test_a_negated_view_is_read_as_what_it_says():
    model = regnet_fast.rebuild(randomized("regnetx_002")).model
    x = torch._neg_view(torch.randn(1, 56, 8, 8))
    with torch.inference_mode():
        assert (model.s3(x) - model.s3(x.resolve_neg())).abs().max() < 1e-4


def test_two_models_in_two_threads():
    models = [regnet_fast.rebuild(randomized(name)).model for name in ("regnety_002", "regnetx_002")]
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = [model(x) for model in models]
    found = [[] for _ in range(4)]

    def run(i):
        with torch.inference_mode():
            for _ in range(20):
                found[i].append(models[i % 2](x))

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(y, expected[i % 2]) for i in range(4) for y in found[i])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_behind_a_fork():
    """The child has one thread and computes; the parent goes on."""
    code = """
import os, sys, torch, regnet_fast
torch.set_num_threads(2)
model = regnet_fast.create_model("regnetx_002").eval()
x = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    expected = model.s4(model.s3(model.s2(model.s1(x.new_ones(1, 32, 32, 32)))))
    if os.fork() == 0:
        torch.set_num_threads(2)
        found = model.s4(model.s3(model.s2(model.s1(x.new_ones(1, 32, 32, 32)))))
        os._exit(0 if torch.equal(found, expected) else 3)
    _, status = os.wait()
    model(x)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_broken_kernel_is_put_aside_by_its_trial(monkeypatch, tmp_path):
    """It gives other values than the blocks: the network and its stages run block by block, and verdicts say why."""
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_decided", {})
    monkeypatch.setattr(cpu, "_NOISY", 1e9)
    cpu._verdicts.cache_clear()
    call = native.Program.__call__

    def broken(self, pointers, check=None):
        counts = call(self, pointers, check)
        torch.frombuffer((native.ctypes.c_float * 8).from_address(pointers[1]), dtype=F32).fill_(1e4)
        return counts

    monkeypatch.setattr(native.Program, "__call__", broken)
    theirs = randomized("regnetx_002")
    model, x = (
        regnet_fast.rebuild(timm.create_model("regnetx_002", num_classes=10)).model.eval(),
        torch.randn(1, 3, 64, 64),
    )
    model.load_state_dict(theirs.state_dict())
    with mode("on"), cpu.unhurried(), cpu.heard() as verdicts, torch.inference_mode():
        found = model(x)
        assert (found - theirs(x)).norm() < 1e-4 * found.norm()
    statuses = [one.outcomes["program"].status for one in verdicts if one.problem.startswith("stage ")]
    assert statuses == ["wrong"] * (1 + 4)
    cpu._verdicts.cache_clear()


def test_without_a_compiler_the_library_serves(monkeypatch):
    monkeypatch.setattr(cpu_library, "refuse", lambda name: "no compiler")
    model, x = regnet_fast.rebuild(randomized("regnetx_002")).model, torch.randn(1, 3, 64, 64)
    rows = regnet_fast.explain(model, (1, 3, 64, 64))
    assert {row.backend for row in rows if row.operation.endswith("conv")} == {"aten"}
    with torch.inference_mode(), backend("aten"):
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_a_process_that_finds_another_one_compiling_goes_on_without(monkeypatch, tmp_path):
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    cpu_library._loaded.cache_clear()
    held = threading.Event(), threading.Event()

    def slow(*_):
        held[0].set()
        held[1].wait(60)
        raise cpu_library.LibraryError("never mind")

    monkeypatch.setattr(cpu_library, "_compile", slow)
    first = threading.Thread(target=lambda: cpu_library._loaded.__wrapped__("program"))
    try:
        first.start()
        assert held[0].wait(60)
        found = cpu_library._loaded.__wrapped__("program")
        assert "another process is compiling" in str(found)
    finally:
        held[1].set()
        first.join()
        cpu_library._loaded.cache_clear()
