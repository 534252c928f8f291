"""Scripts that are written for timm, run unchanged: their numbers, their surroundings, their ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from image_folders import image_folder
from typer.testing import CliRunner

from regnet_fast import models
from regnet_fast.blocks.fused import Fused
from regnet_fast.cli import app
from regnet_fast.run import run_script

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS / "scripts" / "train_like_timm.py"
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
OURS = (sys.executable, "-m", "regnet_fast", "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), train=4, val=1)


def start(*command, status=0, env=HERE):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == status, (done.stdout, done.stderr)
    return done


@pytest.mark.long
def test_the_script_does_what_it_does_under_python(data, tmp_path):
    arguments = (data, "--mixup", "0.2", "--output", tmp_path)
    plain = json.loads(start(sys.executable, SCRIPT, data, "--mixup", "0.2", "--output", tmp_path).stdout)
    done = start(*OURS, SCRIPT, *arguments)
    ours = json.loads(done.stdout)
    assert len(ours["losses"]) == 6 and ours["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    torch.testing.assert_close(*(torch.tensor(one["evaluated"]) for one in (ours, plain)), rtol=2e-2, atol=2e-3)
    assert ours["seen"].pop("classes") == ["regnet_fast", "timm", "torch"]
    assert plain["seen"].pop("classes") == ["timm", "torch"]
    assert ours["seen"] == plain["seen"] and ours["seen"]["name"] == "__main__"
    (line,) = done.stderr.splitlines()
    assert line.startswith("regnet-fast: regnetx_002: ") and line.endswith(" modules rebuilt (2 times)")


@pytest.mark.long
def test_mixed_precision_and_spawned_workers(data):
    """A worker that is spawned imports the script again, and finds the dataset that is defined there."""
    arguments = (data, "--epochs", "1", "--workers", "1", "--start-method", "spawn", "--amp")
    found = json.loads(start(*OURS, SCRIPT, *arguments).stdout)
    assert len(found["losses"]) == 3 and "regnet_fast" in found["seen"]["classes"]


@pytest.mark.long
def test_under_torchrun(data):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(*command, "-m", "regnet_fast", "run", SCRIPT, data, "--epochs", "1")
    assert "regnet_fast" in json.loads(done.stdout)["seen"]["classes"]
    assert done.stderr.count("modules rebuilt") == 1  # the first process speaks for all


# In this process


def test_the_scripts_options_help_and_status_are_its_own(monkeypatch):
    def invoke(*arguments):
        monkeypatch.delitem(sys.modules, "script_neighbour", raising=False)
        return CliRunner().invoke(app, ["run", *map(str, arguments)])

    result = invoke(SCRIPT, "--help")
    assert result.exit_code == 0 and "--start-method" in result.stdout and "SCRIPT" not in result.stdout
    result = invoke(SCRIPT, "folder", "--nonsense", "--json")
    assert result.exit_code == 2 and "unrecognized arguments: --nonsense --json" in result.stderr
    result = invoke("nowhere.py")
    assert result.exit_code == 2 and "there is no script 'nowhere.py'" in result.stderr


def run(tmp_path, text, *arguments):
    """What a script returns, and what is said of it."""
    script, said = tmp_path / "script.py", []
    script.write_text(text)
    return run_script(script, arguments, said.append), said


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", None),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('a message')", "a message"),
        ("raise KeyboardInterrupt", 130),
        ("raise ValueError('of the script')", 1),
        ("raise EOFError('of the script')", 1),
        ("def f(:", 1),
    ],
)
def test_the_end_of_the_script_is_ours(tmp_path, text, status, capsys):
    before = (sys.argv, list(sys.path), timm.create_model, sys.modules["__main__"])
    assert run(tmp_path, text)[0] == status
    assert before == (sys.argv, sys.path, timm.create_model, sys.modules["__main__"])
    shown = capsys.readouterr().err
    if "of the script" in text:
        assert "of the script" in shown and "script.py" in shown and "runpy" not in shown and "run.py" not in shown
    if "def" in text:
        assert "SyntaxError" in shown


def test_every_alias_is_replaced_while_the_script_runs_and_no_longer(tmp_path):
    text = """
import warnings
warnings.simplefilter("ignore")
import timm, timm.models, timm.models._factory, timm.models.factory, timm.task.distillation
from timm import create_model as a
from timm.models import create_model as b
from timm.models.factory import create_model as c
assert a is b is c is timm.create_model is timm.models.create_model is timm.models._factory.create_model
assert a is timm.task.distillation.create_model
import inspect
assert list(inspect.signature(a).parameters)[:3] == ["model_name", "pretrained", "pretrained_cfg"]
from regnet_fast.blocks.fused import Fused
def fused(model):
    return any(isinstance(module, Fused) for module in model.modules())
assert fused(a("regnetx_002")) and fused(b(model_name="resnetv2_18")) and not fused(c("convnext_atto"))
import regnet_fast
assert fused(regnet_fast.create_model("regnetx_002"))
"""
    original = timm.create_model
    status, said = run(tmp_path, text)
    assert status is None
    assert said == [
        f"regnetx_002: {count_of('regnetx_002')} modules rebuilt; resnetv2_18: {count_of('resnetv2_18')} "
        "modules rebuilt; convnext_atto: as timm makes it"
    ]
    for name in ("timm", "timm.models", "timm.models._factory", "timm.models.factory", "timm.task.distillation"):
        assert sys.modules[name].create_model is original is models._create_model


def count_of(name):
    return sum(isinstance(module, Fused) for module in models.create_model(name).modules())


def test_a_script_without_models_is_told_so(tmp_path):
    assert run(tmp_path, "print(1)")[1] == ["the script built no model with timm's create_model"]


@pytest.mark.long
def test_control_c_reaches_the_script(tmp_path):
    script = tmp_path / "script.py"
    waits = "try:\n    time.sleep(60)\nfinally:\n    print('cleaned')\n"
    script.write_text(f"import time\nprint('ready', flush=True)\n{waits}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [*OURS, str(script)],
        **pipes,
        text=True,
        env=HERE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's background jobs
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "cleaned\n" and "Traceback" not in err
