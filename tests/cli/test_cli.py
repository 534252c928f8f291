"""The command line: its exit statuses, its JSON, and that it finds a wrong result."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import timm
import torch
from typer.testing import CliRunner

from regnet_fast import classify
from regnet_fast.backends import onednn, triton
from regnet_fast.cli import app
from regnet_fast.cli import explain as explain_command
from regnet_fast.inspect import compare, info, runtimes, verify
from regnet_fast.store.verdicts import Outcome, Verdict, Verdicts

MODEL, OTHER = "resnetv2_18", "convnext_atto"  # one of our families, and one that is not
SMALL = ["--size", "32"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments, status=0):
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


@pytest.fixture
def wrong_operation(monkeypatch):
    """Every convolution of the backend computes its last column wrong."""
    prepare = onednn.prepare_conv

    def prepare_wrong(*arguments):
        conv = prepare(*arguments)

        class Wrong(onednn.Convolution):
            label = "wrong"

            def __call__(self, *operands):
                y = conv(*operands)
                y[..., -1] *= 1.01
                return y

        return Wrong()

    monkeypatch.setattr(onednn, "prepare_conv", prepare_wrong)


@pytest.fixture
def photograph(tmp_path):
    from PIL import Image

    path = tmp_path / "image.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return path


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine without a network, whose hub cache is empty."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(classify, "_answers", lambda url, timeout: False)
    return constants


def test_help_imports_no_torch():
    code = "import sys, regnet_fast.cli; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    result = run("--help")
    assert result.exit_code == 0
    commands = (
        "info",
        "classify",
        "explain",
        "compare",
        "tune",
        "convert",
        "demo",
        "verify",
        "export",
        "train",
        "validate",
        "run",
    )
    assert all(command in result.output for command in commands)


def test_version():
    import regnet_fast

    assert run("--version").output.strip() == regnet_fast.__version__


def test_info():
    facts = run_json("info")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu"
    rows = [row for row in facts["backends"] if row["device"] == "cpu" and row["backend"] == "reference"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert all(row["available"] for row in rows)
    assert all(row["available"] or row["reason"] for row in facts["backends"])
    assert run("info").exit_code == 0


def test_info_says_where_tuning_would_help(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from regnet_fast.kernels import pointwise_conv, tables

    gpu = {"device": "cuda:0", "name": "Test GPU", "capability": "9.0"}
    monkeypatch.setattr(info, "devices", lambda: [{"device": "cpu", "name": "a CPU"}, gpu])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(triton, "refuse", lambda problem: None)
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "here", lambda device: {"device": "Test GPU"})
    tables.forget()
    assert "Triton kernels on cuda:0: heuristics only; `regnet-fast tune MODEL` measures" in run("info").output
    shape, config = pointwise_conv.Shape(9, 8, 8, 2, 0, False, 1, False, 90, 132), pointwise_conv.CONFIGS[0]
    outcomes = {tables.words(config): Outcome("verified", 1.0)}
    Verdicts({"device": "Test GPU"}).keep(Verdict(tables.problem(pointwise_conv, shape), *outcomes, outcomes))
    tables.forget()
    assert run_json("info")["tuned"] == [{"device": "cuda:0", "shapes": 1}]
    assert "1 tuned shapes; " in run("info").output
    tables.forget()


@pytest.mark.parametrize("options", [("cpu", "--commit"), ("cuda",)], ids=lambda options: options[0])
def test_what_takes_a_gpu_to_tune(options, tmp_path, monkeypatch):
    if options[0] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    result = run("tune", MODEL, "--device", *options)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert f"on the device '{options[0]}', but" in result.stderr and "compute capability 8.0" in result.stderr
    assert not list(tmp_path.iterdir())


def test_explain():
    found = run_json("explain", MODEL, *SMALL, "--batch", 2)
    assert found["input_shape"] == [2, 3, 32, 32]
    assert found["totals"]["flops"] == sum(row["flops"] for row in found["layers"]) > 0
    assert sum(found["totals"]["layers_by_backend"].values()) == len(found["layers"])
    assert found["totals"]["bytes"] == sum(row["bytes"] for row in found["layers"]) > 0
    assert found["totals"]["launches"] == sum(len(row["launches"]) for row in found["layers"]) > 0
    table = run("explain", MODEL, *SMALL).output
    assert all(row["layer"] in table for row in found["layers"])
    assert "norm: host, because BatchNormAct2d is no part of a fused block" in table
    assert max(map(len, table.splitlines())) <= 120


def test_explain_of_a_training_step():
    found = run_json("explain", MODEL, *SMALL, "--batch", 2, "--train")
    assert found["train"]
    rows = {row["layer"]: row for row in found["layers"]}
    assert rows["stages.0.blocks.0"]["backend"] == "aten" and rows["stages.0.blocks.0"]["backward"]
    assert rows["stem"]["backend"] == "host" and "training mode" in rows["stem"]["reason"]
    output = run("explain", MODEL, *SMALL, "--batch", 2, "--train").output
    assert "a training step" in output and all(row in output for row in rows)
    assert f"{len(rows)} layers (aten 8, host 3)" in output


def test_explain_of_a_batch_that_cannot_be_trained_on():
    result = run("explain", MODEL, *SMALL, "--train")
    assert result.exit_code == 2 and "Expected more than 1 value per channel" in result.stderr


@pytest.mark.parametrize(("label", "advised"), [("Triton", True), ("Triton, tuned", False)])
def test_explain_says_where_tuning_would_help(monkeypatch, label, advised):
    found = info.explain_model(MODEL, 2, 32, torch.float32, "cpu")
    found["layers"][0]["label"], found["device"] = label, "cuda"
    monkeypatch.setattr(info, "explain_model", lambda *options: found)
    monkeypatch.setattr(explain_command, "check_environment", lambda device: None)
    output = run("explain", MODEL, "--batch", 2, "--device", "cuda").output
    assert (f"1 layers run in heuristic configurations; `regnet-fast tune {MODEL} --batch 2" in output) == advised


def test_explain_says_that_another_family_is_passed_through():
    result = run("explain", OTHER, *SMALL)
    assert result.exit_code == 0
    assert "passed through as it is" in " ".join(result.output.split())


@pytest.mark.parametrize("command", ["explain", "verify", "compare", "demo"])
def test_an_unknown_model_is_a_usage_error(command):
    arguments = ["--model", "regnety_06", "--no-pretrained"] if command == "demo" else ["regnety_06"]
    result = run(command, *arguments)
    assert result.exit_code == 2
    message = [line for line in result.stderr.splitlines() if line]
    assert len(message) == 1
    assert "Unknown model (regnety_06)" in message[0] and "regnety_006" in message[0]


def test_an_unknown_tag_is_a_usage_error(photograph):
    result = run("classify", photograph, "--model", "regnety_002.nosuch")
    assert result.exit_code == 2
    assert "regnety_002.pycls_in1k" in result.stderr


@pytest.mark.parametrize("options", [["--dtype", "int8"], ["--device", "nosuch"], ["--batch", "0"], ["--size", "0"]])
def test_impossible_options_are_usage_errors(options):
    result = run("verify", MODEL, *options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_verify_passes():
    found = run_json("verify", MODEL, *SMALL, "--dtype", "float32", "--dtype", "bfloat16")
    assert found["ok"]
    assert [one["dtype"] for one in found["verifications"]] == ["float32", "bfloat16"]
    stages = [check["stage"] for check in found["verifications"][0]["checks"]]
    assert stages[-1] == "logits" and len(stages) == 6
    assert found["verifications"][0]["rebuilt"] > 0


def test_verify_of_another_family_says_that_nothing_is_rebuilt():
    result = run("verify", OTHER, *SMALL)
    assert result.exit_code == 0
    assert "passed through as it is" in " ".join(result.output.split())


def test_verify_finds_a_wrong_operation(wrong_operation):
    found = run_json("verify", MODEL, *SMALL, status=1)
    assert not found["ok"]
    result = run("verify", MODEL, *SMALL)
    assert result.exit_code == 1
    assert "FAIL" in result.output


def judge(ours, eager, reference):
    return verify.judge("stage", ours, eager, reference)


def test_judge(seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(2, 8, 9, 9, generator=generator, dtype=torch.float64)
    eager = (reference + 1e-5 * torch.randn(reference.shape, generator=generator)).float()
    assert judge(eager, eager, reference).ok
    assert not judge(eager.half().float(), eager, reference).ok
    assert "RMS" in judge((reference + 2.5e-5).float(), eager, reference).failure
    assert judge(eager.half(), eager, reference).failure.startswith("ours is")
    assert "overflows" in judge(eager, eager / 0, reference).failure
    poisoned = eager.clone()
    poisoned[1, 3, 4, 5] = math.nan
    check = judge(poisoned, eager, reference)
    assert not check.ok and check.where == (1, 3, 4, 5)


def test_judge_looks_at_the_border_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.zeros(2, 8, 64, 64, dtype=torch.float64)
    eager = 1e-4 * torch.randn(reference.shape, generator=generator)
    ours = eager.clone()
    ours[..., 0] += 4e-4  # four times eager's RMS error, on a 64th of the tensor
    check = judge(ours, eager, reference)
    assert "first column" in check.failure
    assert check.max_ours < 2 * check.max_eager and check.rms_ours < 2 * check.rms_eager


def test_randomized_norms_are_reproducible_and_hide_nothing():
    model = verify.randomize_norms(verify.host_model("regnety_002"), seed=3)
    again = verify.randomize_norms(verify.host_model("regnety_002"), seed=3)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((norm.weight > 0).all() and norm.running_var.std() > 0 for norm in norms)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert ".bn." not in name or torch.equal(a, b)
    features = model(torch.randn(2, 3, 64, 64))
    assert features.isfinite().all() and 1e-3 < features.std() < 1e3


@pytest.mark.parametrize("content", [None, b"", b"no image at all", b"\x89PNG\r\n\x1a\n damaged"])
def test_an_unreadable_image_has_its_own_status(tmp_path, content):
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    result = run("classify", path, "--model", MODEL, "--no-pretrained")
    assert result.exit_code == 3
    assert str(path) in result.stderr and "Traceback" not in result.output


def test_classify_does_as_timm_does(tmp_path, photograph):
    torch.manual_seed(0)
    model = verify.randomize_norms(timm.create_model(MODEL)).eval()
    checkpoint = tmp_path / "weights.pt"
    torch.save(model.state_dict(), checkpoint)
    with torch.no_grad():
        image = classify.preprocessing(model)(classify.open_image(photograph))[None]
        expected = model(image)[0].softmax(-1).topk(3)
    found = run_json("classify", photograph, photograph, "--model", MODEL, "--checkpoint", checkpoint, "--top", 3)
    assert len(found["predictions"]) == 2
    top = found["predictions"][1]["top"]
    assert [one["index"] for one in top] == expected.indices.tolist()
    assert [one["probability"] for one in top] == pytest.approx(expected.values.tolist(), rel=1e-4)
    names = timm.data.ImageNetInfo("imagenet-1k").label_descriptions()
    assert [one["class"] for one in top] == [names[one["index"]] for one in top]
    assert run("classify", photograph, "--model", MODEL, "--checkpoint", tmp_path / "nosuch.pt").exit_code == 3
    checkpoint.write_bytes(b"damaged")
    assert run("classify", photograph, "--model", MODEL, "--checkpoint", checkpoint).exit_code == 3


def test_classify_makes_no_prediction_without_the_weights(no_hub, photograph):
    result = run("classify", photograph, "--model", MODEL)
    assert result.exit_code == 3
    assert result.stdout == "" and "does not answer" in result.stderr
    assert not no_hub.HF_HUB_OFFLINE
    result = run("classify", photograph, "--model", MODEL, "--no-pretrained")
    assert result.exit_code == 0
    assert "random" in result.stderr


def test_class_names_only_where_they_are_known():
    assert len(classify.class_names(verify.host_model(MODEL))) == 1000
    assert classify.class_names(verify.host_model(MODEL, num_classes=7)) == {}


def test_compare():
    found = run_json(
        "compare", MODEL, *SMALL, "--batch", 1, "--batch", 3, "--rounds", 2, "--no-compile", "--no-runtimes"
    )
    assert set(found) == {"command", "conditions", "cases", "geometric_means"}
    assert found["conditions"]["torch"] == torch.__version__ and found["conditions"]["threads"] > 0
    assert [case["batch"] for case in found["cases"]] == [1, 3]
    for case in found["cases"]:
        assert case["correct"] and case["rebuilt"] > 0 and case["size"] == [32, 32]
        assert set(case["variants"]) == {"timm", "timm channels_last", "regnet_fast"}
        for timed in case["variants"].values():
            assert len(timed["samples_ms"]) == 2 and timed["first_s"] > 0
            assert timed["q1_ms"] <= timed["median_ms"] <= timed["q3_ms"]
        assert case["over_eager"]["ratio"] > 0 and "over_compile" not in case
    ratios = [case["over_eager"]["ratio"] for case in found["cases"]]
    mean = found["geometric_means"]["over_eager"]
    assert mean["cases"] == 2 and mean["ratio"] == pytest.approx(math.sqrt(math.prod(ratios)))


def test_compare_prints_markdown():
    result = run("compare", MODEL, *SMALL, "--rounds", 1, "--no-compile", "--no-runtimes", "--markdown")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| model |") and lines[2].startswith(f"| {MODEL} | 1 | float32 |")
    assert f"torch {torch.__version__}" in lines[-1]


def test_compare_times_no_wrong_result(wrong_operation):
    found = run_json("compare", MODEL, *SMALL, "--rounds", 1, "--no-compile", "--no-runtimes", status=1)
    (case,) = found["cases"]
    assert not case["correct"] and case["refused"] and case["variants"] == {}
    assert found["geometric_means"] == {}
    assert "not timed" in run("compare", MODEL, *SMALL, "--rounds", 1, "--no-compile", "--no-runtimes").output


def test_compare_goes_on_where_a_peer_fails(monkeypatch):
    def fail(model, **options):
        def forward(x):
            raise RuntimeError("no compiler found\nand much more")

        return forward

    monkeypatch.setattr(torch, "compile", fail)
    found = run_json("compare", MODEL, *SMALL, "--rounds", 1, "--no-runtimes")
    (case,) = found["cases"]
    assert case["variants"]["compile"] == {"error": "RuntimeError: no compiler found"}
    assert case["over_eager"]["ratio"] > 0 and "over_compile" not in case
    assert any("no compiler found" in line for line in compare.summary(found["cases"]))


class TorchAsRuntime:
    """What stands for `runtimes.Call`: torch itself; what is called onnxruntime is wrong."""

    def __init__(self, name, module, x):
        self.call = lambda: module(x).float() * (1.5 if name == "onnxruntime" else 1)

    def __call__(self):
        return self.call()


def test_compare_with_runtimes(monkeypatch):
    monkeypatch.setattr(runtimes, "Call", TorchAsRuntime)
    monkeypatch.setattr(runtimes, "refuse", lambda name, dtype: None)
    found = run_json("compare", MODEL, *SMALL, "--rounds", 1, "--no-compile")
    (case,) = found["cases"]
    assert case["variants"]["openvino"]["median_ms"] > 0 and case["over_runtime"]["peer"] == "openvino"
    assert "times eager's" in case["variants"]["onnxruntime"]["error"], "a wrong result is not timed"
    assert found["geometric_means"]["over_runtime"]["cases"] == 1 and case["left_out"] == {}
    titles, row = compare.table(found["cases"])
    shown = dict(zip(titles, row, strict=True))
    assert float(shown["openvino, ms"]) > 0 and shown["onnxruntime, ms"] == "failed" and "x (" in shown["over runtimes"]
    assert "compile, ms" not in titles


def test_compare_without_a_runtime_says_why(monkeypatch):
    monkeypatch.setattr(runtimes, "refuse", lambda name, dtype: "not installed")
    arguments = ("compare", MODEL, *SMALL, "--rounds", 1, "--no-compile")
    found = run_json(*arguments)
    (case,) = found["cases"]
    assert "over_runtime" not in case and case["left_out"] == dict.fromkeys(runtimes.RUNTIMES, "not installed")
    result = run(*arguments, "--markdown")
    assert "openvino, ms" not in result.stdout and "openvino left out: not installed" in result.stdout


def test_ratios_are_those_of_the_medians():
    def variant(name, *samples):
        return compare.Variant(name, None, None, samples=list(samples))

    found = [
        variant("timm", 6.0, 12.0, 9.0),
        variant("timm channels_last", 8.0, 16.0, 12.0),
        variant("compile", 1.0, 1.5, 6.0),
        variant("regnet_fast", 2.0, 4.0, 3.0),
    ]
    ratios = compare.ratios(found)
    assert (ratios["over_eager"]["peer"], ratios["over_eager"]["ratio"]) == ("timm", 3.0)
    assert (ratios["over_peer"]["peer"], ratios["over_peer"]["ratio"]) == ("compile", 0.5)
    means = compare.geometric_means([ratios, {"over_eager": {"ratio": 0.75}}, {}])
    assert means["over_eager"] == {"ratio": pytest.approx(1.5), "cases": 2, "slower": 1}


def test_demo_without_a_network(no_hub, photograph):
    result = run("demo", "--model", MODEL, "--image", photograph, "--size", 64, "--rounds", 2)
    assert result.exit_code == 0, result.output
    assert "does not answer" in result.output and "random weights instead" in result.output
    assert "Difference" in result.output and "x as fast as timm" in result.output and "Ran on" in result.output


def test_demo_photograph():
    pytest.importorskip("matplotlib")
    from regnet_fast.inspect.demo import photograph

    assert classify.open_image(photograph()).size == (512, 600)
