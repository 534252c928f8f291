"""The bench: which cases there are, what is refused instead of timed, and what survives of an interrupted run."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from bench import __main__ as command_line
from bench import cases, measure, peers, record, runner, spread
from bench.cases import Case
from regnet_fast.backends import cpu_library
from regnet_fast.backends.passes import COMPILED, TORCH, compiled
from regnet_fast.blocks import training
from regnet_fast.inspect import runtimes

OPERATION = "grouped_conv/152x152-k3s1g19-14-relu"
EAGER = peers.choose(["timm*"], "cpu", "ops")
ROOT = Path(__file__).resolve().parents[2]
FACTS = {"machine": "a CPU, 2 threads", "device": "cpu", "commit": "1234", "torch": "2.11"}


def operation(batch: int = 1, dtype: str = "float32") -> Case:
    return Case("ops", OPERATION, batch, dtype, 64, cases.operations()[OPERATION])


def test_models_are_all_75():
    families = ("regnetx_*", "regnety_*", "regnetv_*", "regnetz_*", "repvgg_*", "resnetv2_*")
    assert set(cases.model_names()) == {name for family in families for name in timm.list_models(family)}


def test_models_are_those_of_which_something_is_rebuilt():
    names = [
        case.name for case in cases.select("models", ["resnet50", "efficientnet_b0", "regnety_002"], [1], ["float32"])
    ]
    assert names == ["resnet50", "efficientnet_b0", "regnety_002"] and set(cases.model_names()) <= set(
        cases.architectures()
    )
    assert cases.blocks("resnet18")[0] == "layer1.0"


def test_operations_are_those_of_a_model():
    """Counted by hand in timm's regnetx_002: stem, 13 blocks of three convolutions, 4 shortcuts."""
    counts: dict[str, int] = {}
    for facts in cases.operations().values():
        counts[facts["op"]] = counts.get(facts["op"], 0) + facts["models"].get("regnetx_002", 0)
    assert counts == {"dense_conv": 1, "pointwise_conv": 13 * 2 + 4, "grouped_conv": 13, "squeeze_excite": 0}


def test_blocks_are_the_distinct_ones():
    assert cases.blocks("regnetx_002") == ["stem", "s1.b1", "s2.b1", "s3.b1", "s3.b2", "s4.b1", "s4.b2", "head"]


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ("models", "regnety_01", "no model is called 'regnety_01'; close: regnety_016"),
        ("ops", "grouped_conv/152x152-k3s1g19-14-relo", f"close: {OPERATION}"),
        ("blocks", "regnetx_002/s9.b1", "no block of regnetx_002 is called 's9.b1'"),
    ],
)
def test_unknown_cases_are_named(kind, pattern, message):
    with pytest.raises(cases.UnknownCaseError, match=message.replace("(", r"\(")):
        cases.select(kind, [pattern], [1], ["float32"])


@pytest.mark.parametrize("wrong", [dict(batches=[0]), dict(dtypes=["int8"]), dict(size=8), dict(kind="kernels")])
def test_impossible_requests(wrong):
    request = {"kind": "models", "patterns": None, "batches": [1], "dtypes": ["float32"], "size": None, **wrong}
    with pytest.raises(ValueError):
        cases.select(**request)


def test_ids_are_distinct():
    for kind in ("ops", "models"):
        chosen = cases.select(kind, None, [1, 8], ["float32", "bfloat16"])
        assert len({case.id for case in chosen}) == len(chosen) > 20


def test_peers_on_each_device():
    def names(patterns, device, kind):
        return [peer.name for peer in peers.choose(patterns, device, kind)]

    assert names(None, "cpu", "ops") == ["timm", "timm channels_last", "compile", "regnet_fast"]
    assert set(runtimes.RUNTIMES) < set(names(None, "cpu", "models")), "of whole models, on a CPU"
    assert not set(runtimes.RUNTIMES) & {*names(None, "cpu", "blocks"), *names(None, "cuda", "models")}
    assert names(None, "cpu", "models")[-2:] == ["regnet_fast frozen", "regnet_fast"]
    backends = {"regnet_fast aten", "regnet_fast cuda", "regnet_fast triton"}
    assert backends <= set(names(None, "cuda", "ops")), "csrc/ and Triton beside cuDNN"
    assert not any("max-autotune" in name for kind in cases.KINDS for name in names(None, "cuda", kind))
    assert "timm graph" in names(None, "cuda", "models") and "regnet_fast frozen" not in names(None, "cuda", "train")
    assert names(["regnet_fast"], "cpu", "ops") == ["regnet_fast"]
    with pytest.raises(peers.UnknownPeerError, match="no peer for ops on cpu is called 'onnx'; there are 'timm'"):
        names(["onnx"], "cpu", "ops")


def test_an_operation_is_measured():
    found = measure.measure(operation(2), "cpu", EAGER, 2, lambda text: None)
    assert found["status"] == "timed" and found["reason"] == ""
    assert list(found["variants"]) == ["torch", "torch channels_last", "regnet_fast"]
    for variant in found["variants"].values():
        assert variant["status"] == "timed" and variant["first_s"] > 0
        assert [len(process) for process in variant["samples_ms"]] == [2]
        assert variant["images_per_s"] == pytest.approx(2e3 / variant["median_ms"])
    assert found["ratios"]["eager"]["peer"] in ("torch", "torch channels_last") and "compile" not in found["ratios"]
    assert found["details"]["auto"].startswith("aten: ")
    positions = 2 * 4 * 4
    assert found["work"]["flops"] >= 2 * positions * 152 * 8 * 9
    json.dumps(found)


@pytest.fixture
def wrong_kernel(monkeypatch):
    """A kernel of ours that is off by a thousandth."""
    from regnet_fast.backends import onednn

    right = onednn.DirectConv.__call__
    monkeypatch.setattr(onednn.DirectConv, "__call__", lambda self, *args: right(self, *args).mul(1.001))


@pytest.mark.parametrize(
    "case",
    [
        operation(),
        Case("blocks", "regnetx_002/s1.b1", 1, "float32", 64, {"model": "regnetx_002", "path": "s1.b1"}),
        Case("models", "regnetx_002", 1, "float32", 32),
    ],
    ids=lambda case: case.kind,
)
def test_a_wrong_kernel_is_refused_and_not_timed(case, wrong_kernel):
    found = measure.measure(case, "cpu", EAGER, 2, lambda text: None)
    assert found["status"] == "wrong" and "times eager's" in found["reason"]
    assert found["variants"] == {} and found["ratios"] == {}


def test_a_fallback_under_a_forced_backend_is_an_error(monkeypatch):
    """A block that must leave the fused path: its inner module has a hook."""
    from regnet_fast.inspect.timing import silent

    case = Case("blocks", "regnetx_002/s1.b1", 1, "float32", 64, {"model": "regnetx_002", "path": "s1.b1"})
    built = measure.subjects.build(case, "cpu", silent)
    fuse = built.fuse

    def fuse_and_hook(module):
        fused = fuse(module)
        fused.conv2.register_forward_hook(lambda module, inputs, output: None)
        return fused

    built.fuse = fuse_and_hook
    monkeypatch.setattr(measure.subjects, "build", lambda *_: built)
    found = measure.measure(case, "cpu", peers.choose(["timm*", "regnet_fast aten"], "cpu", "blocks"), 2, silent)
    assert found["variants"]["regnet_fast aten"]["status"] == "failed"
    assert "BackendError" in found["variants"]["regnet_fast aten"]["reason"]
    assert found["variants"]["regnet_fast"]["status"] == "skipped", "the host's forward would be timed against itself"
    assert found["ratios"] == {}


def test_an_operation_that_a_backend_cannot_serve_is_skipped_with_its_reason():
    csrc = next(peer for peer in peers.PEERS if peer.name == "regnet_fast cuda")
    found = measure.measure(operation(), "cpu", [csrc, *EAGER], 2, lambda text: None)
    assert found["variants"]["regnet_fast cuda"]["status"] == "skipped" and found["status"] == "timed"
    assert "the CUDA C++ kernels run on an NVIDIA GPU" in found["variants"]["regnet_fast cuda"]["reason"]


def test_plain_torch_is_not_timed_as_ours(monkeypatch):
    from regnet_fast.backends import native, onednn

    for module in (onednn, native):
        monkeypatch.setattr(module, "refuse", lambda problem: "not today")
    found = measure.measure(operation(), "cpu", EAGER, 2, lambda text: None)
    assert found["variants"]["regnet_fast"]["status"] == "skipped"
    assert "not today" in found["variants"]["regnet_fast"]["reason"] and found["ratios"] == {}


@pytest.mark.parametrize("error", [RuntimeError("no compiler found\nand more"), torch.OutOfMemoryError("too large")])
def test_a_peer_that_fails_is_named_and_the_others_are_timed(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", fail)
    found = measure.measure(operation(), "cpu", peers.choose(None, "cpu", "ops"), 2, lambda text: None)
    assert found["variants"]["compile"] == {
        "status": "failed",
        "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}",
    }
    assert found["status"] == "timed" and found["ratios"]["eager"]["ratio"] > 0


SMALL_MODEL = Case("models", "regnetx_002", 1, "float32", 32)


def as_runtime(factor):
    """What stands for `runtimes.Call`: torch's result, so many times as large."""

    class Call:
        def __init__(self, name, module, x):
            self.call, self.settings = lambda: factor * module(x), {"threads": 1}

        def __call__(self):
            return self.call()

    return Call


def with_runtimes():
    return peers.choose(["timm", *runtimes.RUNTIMES], "cpu", "models")


def test_a_runtime_is_measured_where_there_is_one(monkeypatch):
    monkeypatch.setattr(runtimes, "Call", as_runtime(1))
    missing = {"onnxruntime": "onnx not installed"}
    monkeypatch.setattr(runtimes, "refuse", lambda name, dtype: missing.get(name))
    found = measure.measure(SMALL_MODEL, "cpu", with_runtimes(), 2, lambda text: None)
    assert found["status"] == "timed" and set(found["ratios"]) == {"eager", "runtime", "peer"}
    assert found["ratios"]["runtime"]["peer"] == "openvino"
    assert found["variants"]["openvino"]["settings"] == {"threads": 1}
    assert found["variants"]["onnxruntime"] == {"status": "skipped", "reason": "onnx not installed"}
    pooled = spread.pooled([found, found])
    assert pooled["ratios"].keys() == found["ratios"].keys()
    assert pooled["variants"]["openvino"]["settings"] == {"threads": 1}
    json.dumps(found)


def test_a_runtime_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(runtimes, "Call", as_runtime(1.001))
    monkeypatch.setattr(runtimes, "refuse", lambda name, dtype: None)
    found = measure.measure(SMALL_MODEL, "cpu", with_runtimes(), 2, lambda text: None)
    assert found["status"] == "timed" and set(found["ratios"]) == {"eager", "peer"}
    failed = found["variants"]["openvino"]
    assert failed["status"] == "failed" and "WrongResult: output" in failed["reason"]


@pytest.mark.long
@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_each_runtime_is_measured(name):
    if reason := runtimes.refuse(name, torch.float32):
        pytest.skip(reason)
    found = measure.measure(SMALL_MODEL, "cpu", peers.choose([name], "cpu", "models"), 1, lambda text: None)
    variant = found["variants"][name]
    assert variant["status"] == "timed" and found["ratios"]["peer"]["peer"] == name, variant
    assert torch.get_num_threads() in variant["settings"].values()


FROZEN = "regnet_fast frozen"


@pytest.mark.skipif(cpu_library.refuse("program") is not None, reason=str(cpu_library.refuse("program")))
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("regnety_002", ["1x1", "3x3 groups of 8", "means, norms, pools", "stem", "vectors (gates, classifier)"]),
        (
            "repvgg_a0",
            ["3x3 dense", "3x3 dense, Winograd", "means, norms, pools", "stem", "vectors (gates, classifier)"],
        ),
    ],
)
def test_the_steps_of_a_frozen_network_are_timed(name, classes):
    case = Case("models", name, 2, "float32", 64)
    found = measure.measure(case, "cpu", peers.choose([FROZEN], "cpu", "models"), 2, lambda text: None)
    steps = found["variants"][FROZEN]["steps"]
    assert {one["what"] for one in steps} == {*classes, "stem", "means, norms, pools", "vectors (gates, classifier)"}
    assert sum(one["flops"] for one in steps) == found["work"]["flops"]
    assert all(one["ms"] > 0 and one["steps"] > 0 for one in steps)
    assert [one["ms"] for one in steps] == sorted((one["ms"] for one in steps), reverse=True)
    assert "steps" not in found["variants"]["regnet_fast"]


def test_calls_take_turns_on_copies_of_the_inputs():
    subject = measure.subjects.build(operation(), "cpu", lambda text: None)
    subject.copies = 3
    one, module = peers.make(EAGER[0], subject, "torch")
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].data_ptr()))
    with torch.no_grad():
        results = [one.call() for _ in range(4)]
    assert len(set(seen[:3])) == 3 and seen[3] == seen[0] and torch.equal(results[0], results[2])


TRAINING = Case("train", "regnetx_002", 2, "float32", 64)


@pytest.mark.long
def test_training_is_measured():
    found = measure.measure(TRAINING, "cpu", EAGER, 2, lambda text: None)
    assert found["status"] == "timed"
    assert found["details"]["auto"] == "14 of 14 blocks fused" and found["ratios"]["eager"]["ratio"] > 0
    for name in ("timm", "regnet_fast"):
        step = found["variants"][name]
        assert 0 < step["forward_ms"] < 10 * step["median_ms"] and step["backward_ms"] > 0


def test_training_by_the_host_is_not_called_ours(monkeypatch):
    monkeypatch.setattr(training, "unserved", lambda x: "it is Sunday")
    found = measure.measure(TRAINING, "cpu", EAGER, 2, lambda text: None)
    assert found["status"] == "timed" and found["ratios"] == {}
    assert "it is Sunday" in found["variants"]["regnet_fast"]["reason"]


@pytest.mark.parametrize("serving", [COMPILED, TORCH], ids=["compiled", "aten"])
def test_a_wrong_gradient_is_refused_and_not_timed(serving, monkeypatch):
    right = serving.convs_backward

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(weights=[None if dw is None else dw * 1.001 for dw in found.weights])

    monkeypatch.setattr(serving, "convs_backward", wrong)
    if serving is TORCH:
        monkeypatch.setattr(compiled, "refuse", lambda x: "it is Sunday")
    found = measure.measure(TRAINING, "cpu", EAGER, 2, lambda text: None)
    assert found["status"] == "wrong" and "gradients are" in found["reason"] and not found["variants"]


@pytest.mark.long
def test_a_peer_that_corrupts_memory_is_left_out():
    case, chosen = Case("train", "repvgg_a0", 2, "float32", 32), peers.choose(["timm*"], "cpu", "train")
    found = measure.measure(case, "cpu", chosen, 1, lambda text: None)
    assert found["status"] == "timed" and "oneDNN" in found["variants"]["timm channels_last"]["reason"]


# A run, its processes and its file


@pytest.mark.long
def test_a_run_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "ops.json"
    chosen = [operation(1), operation(2)]

    def go(chosen, budget=None):
        return runner.run("ops", chosen, "cpu", ["timm"], 1, 1, "command", path, budget, quick=True)

    first = go(chosen[:1])
    assert [case["id"] for case in first["cases"]] == [chosen[0].id] and first["finished"]
    stopped = go(chosen, budget=0)
    assert stopped["finished"] is None and len(stopped["cases"]) == 1
    second = go(chosen)
    assert second["cases"][0] == first["cases"][0] and len(second["cases"]) == 2 and second["finished"]
    assert record.load(path) == second


@pytest.mark.long
def test_a_case_that_ends_its_process_fails_alone():
    worker = runner.Worker("ops", "cpu", ["timm"], 1)
    try:
        found = worker.measure(operation(), None, lambda text: worker.process.kill())
    finally:
        worker.stop(kill=True)
    assert found["status"] == "failed" and "SIGKILL: probably too little memory" in found["reason"]


def test_a_case_that_takes_too_long_is_stopped():
    worker = runner.Worker("ops", "cpu", ["timm"], 1)
    assert worker.measure(operation(), 0.0, lambda text: None) is None
    assert not worker.process.is_alive()


@pytest.mark.long
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path):
    path = tmp_path / "ops.json"
    words = ["ops", "--case", "squeeze_excite/24-8", OPERATION, "--dtype", "float32", "--peers", "timm"]
    command = [sys.executable, "-m", "bench", *words, "--rounds", "1", "--batch", "1", "2", "--json", str(path)]
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's background jobs
    )
    while not path.exists():
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate()
    before = record.load(path)
    assert run.returncode == 130 and "goes on from the file" in error and "Traceback" not in error
    assert 1 <= len(before["cases"]) < 4 and before["finished"] is None
    subprocess.run(command, cwd=ROOT, check=True)
    after = record.load(path)
    assert after["cases"][: len(before["cases"])] == before["cases"] and len(after["cases"]) == 4 and after["finished"]


def test_results_of_other_conditions_are_refused(tmp_path):
    path = tmp_path / "models.json"
    record.save(record.new_run("models", "command", FACTS, {}), path)
    assert record.resume(path, "models", FACTS)["command"] == "command"
    assert record.resume(tmp_path / "none.json", "models", FACTS) is None
    with pytest.raises(record.RecordError, match=r"machine was a CPU, 2 threads, is another"):
        record.resume(path, "models", {**FACTS, "machine": "another"})
    with pytest.raises(record.RecordError, match="holds models, not ops"):
        record.resume(path, "ops", FACTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "an older form"),
        ('{"cases": []}', "an older form"),
        ('{"schema": 99}', "schema 99, this is schema 2"),
        ('{"schema": 2, "kind": "ops"}', "lacks command"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "ops.json"
    path.write_text(content)
    with pytest.raises(record.RecordError, match=message):
        record.load(path)
    assert path.read_text() == content


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "ops.json"
    run = record.new_run("ops", "command", FACTS, {})
    record.save(run, path)
    with pytest.raises(TypeError):
        record.save({**run, "cases": [object()]}, path)
    assert record.load(path) == run and list(tmp_path.iterdir()) == [path]


def test_processes_are_pooled():
    """Quotients 2 and 8 of two processes: their mean is 4; within one process the rounds tell the spread."""

    def one(timm, ours):
        def variant(group, samples):
            return {
                "status": "timed",
                "group": group,
                "median_ms": statistics.median(samples),
                "images_per_s": 2000 / statistics.median(samples),
                "first_s": samples[0],
                "samples_ms": [samples],
            }

        variants = {"timm": variant("eager", timm), "regnet_fast": variant("ours", ours)}
        return {"id": "a", "status": "timed", "variants": variants, "ratios": {}}

    first, second = one([4.0, 2.0, 3.0], [1.0, 1.0, 2.0]), one([8.0, 8.0, 8.0], [1.0, 1.0, 1.0])
    found = spread.pooled([first, first])["ratios"]["eager"]
    assert found == {"peer": "timm", "ratio": pytest.approx(3), "low": pytest.approx(3), "high": pytest.approx(3)}
    found = spread.pooled([first, {**second}])
    assert found["ratios"]["eager"]["ratio"] == pytest.approx(24**0.5)
    assert found["ratios"]["eager"]["low"] < 3 and found["ratios"]["eager"]["high"] > 8
    timm = found["variants"]["timm"]
    assert timm["samples_ms"] == [[4.0, 2.0, 3.0], [8.0, 8.0, 8.0]] and timm["median_ms"] == 6.0
    assert timm["images_per_s"] == pytest.approx(2000 / 6) and timm["first_s"] == 4.0
    assert spread.pooled([first])["ratios"]["eager"] == {"peer": "timm", "ratio": 2.0, "low": 1.75, "high": 3.0}
    failed = {"id": "a", "status": "wrong", "reason": "off"}
    assert spread.pooled([first, failed]) == failed
    failed = {**second, "variants": {**second["variants"], "timm": {"status": "failed", "reason": "no"}}}
    assert spread.pooled([first, failed])["ratios"] == {}


def test_a_confidence_interval_holds_the_mean_of_another_run():
    """Of many pairs of runs, each of three processes that differ by 3 %, the spreads of nearly all overlap."""
    draw = random.Random(0)

    def run():
        return spread.ratio([[1.0]] * 3, [[draw.gauss(1, 0.03)] for _ in range(3)])

    pairs = [(run(), run()) for _ in range(300)]
    overlap = [max(a["low"], b["low"]) <= min(a["high"], b["high"]) for a, b in pairs]
    assert sum(overlap) >= 0.97 * len(overlap)


@pytest.mark.long
@pytest.mark.parametrize("peers", [["timm"], pytest.param(["timm", "compile"], marks=pytest.mark.slow)])
def test_models_are_measured_in_several_processes(peers, tmp_path):
    """With torch.compile the first process compiles, and the others find what it compiled."""
    path = tmp_path / "models.json"
    case = Case("models", "regnetx_002", 1, "float32", 32)
    found = runner.run("models", [case], "cpu", peers, 2, 2, "command", path, quick=True)["cases"][0]
    assert found["status"] == "timed"
    assert all([len(process) for process in v["samples_ms"]] == [2, 2] for v in found["variants"].values())
    assert set(found["ratios"]) == {"eager", "peer"} | ({"compile"} & set(peers))


@pytest.mark.parametrize(
    ("facts", "slug"),
    [
        ({"device": "cpu", "machine": "AMD EPYC, 2 threads"}, "cpu-amd-epyc-2-threads"),
        ({"device": "cuda", "machine": "NVIDIA H200"}, "nvidia-h200"),
    ],
)
def test_folders_of_machines(facts, slug):
    assert record.slug(facts) == slug


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--case", "nope"], "no model is called 'nope'"),
        (["models", "--device", "nope"], "the device 'nope' cannot be used"),
        (["ops", "--peers", "nope"], "no peer for ops on cpu"),
        (["ops", "--rounds", "0"], "--rounds is at least 1"),
    ],
)
def test_requests_that_cannot_be_served(capsys, arguments, message):
    assert command_line.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_lists_cases(capsys):
    assert command_line.main(["ops", "--case", "grouped_conv/152x152-*", "--list"]) == 0
    assert OPERATION in capsys.readouterr().out.splitlines()
