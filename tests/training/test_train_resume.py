"""Training that goes on to the bit where it was interrupted, and in two processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from image_folders import MODEL, SMALL, image_folder, options, weights
from typer.testing import CliRunner

from regnet_fast.cli import app
from regnet_fast.training import run_state
from regnet_fast.training.train import train
from regnet_fast.training.validate import ValidateOptions, validate
from regnet_fast.weights import load_checkpoint
from regnet_fast.weights.checkpoints import read_content

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).resolve().parents[1]
EVERYTHING = {
    "mixup": 0.2,
    "cutmix": 1.0,
    "aa": "rand-m9-mstd0.5",
    "reprob": 0.5,
    "drop": 0.2,
    "drop_path": 0.2,
    "model_ema": True,
    "model_ema_warmup": True,
    "opt": "adamw",
    "lr": 0.002,
    "clip_grad": 1.0,
    "grad_accum_steps": 2,
    "layer_decay": 0.9,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


class Interrupted(Exception):
    pass


def interrupt_after(epoch):
    def stop(done):
        if done.epoch == epoch:
            raise Interrupted

    return stop


def curve(result):
    """What must not depend on an interruption: everything but the time."""
    rows = [epoch.as_dict() for epoch in result.epochs]
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in rows]


def assert_same_run(one, other):
    assert curve(one) == curve(other)
    states = [read_content(result.output / run_state.LAST) for result in (one, other)]
    for part in ("plateau", "amp_scaler", "best", "epoch"):
        assert states[0].get(part) == states[1].get(part), part
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for kind in ours:
        assert ours[kind].keys() == theirs[kind].keys()
        for key, value in ours[kind].items():
            assert torch.equal(value, theirs[kind][key]), (kind, key)


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_bit(data, tmp_path):
    """SIGKILL in the middle of the second epoch of three, against a run that nobody killed."""
    code = f"""
        import os, signal, sys, torch
        torch.set_num_threads(1)
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        from image_folders import options
        from regnet_fast.train import train

        def kill(text):
            if text.startswith("epoch 1: batch 1"):
                os.kill(os.getpid(), signal.SIGKILL)

        train(options(Path({str(data)!r}), Path({str(tmp_path / "killed")!r}), **{EVERYTHING!r}), kill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    last = tmp_path / "killed" / run_state.LAST
    assert read_content(last)["epoch"] == 0
    resumed = train(options(data, None, resume=last, **EVERYTHING))
    assert resumed.output == last.parent and resumed.resumed_after == 0
    whole = train(options(data, tmp_path / "whole", **EVERYTHING))
    assert_same_run(resumed, whole)
    summaries = [(result.output / "summary.csv").read_text() for result in (resumed, whole)]
    assert summaries[0] == summaries[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"workers": 1, "aa": "rand-m9-mstd0.5", "reprob": 0.5}, id="workers"),
        pytest.param({"sched": "plateau", "opt": "lookahead_adam"}, id="plateau"),
        pytest.param({"amp": True, "opt": "nadamw", "lr": 0.001, "channels_last": True, "epochs": 2}, id="scaled"),
    ],
)
def test_an_interrupted_run_goes_on_to_the_bit(data, tmp_path, given):
    with pytest.raises(Interrupted):
        train(options(data, tmp_path / "broken", **given), on_epoch=interrupt_after(0))
    torch.rand(7)  # whatever else draws in between
    resumed = train(options(data, None, resume=tmp_path / "broken" / run_state.LAST, **given))
    assert_same_run(resumed, train(options(data, tmp_path / "whole", **given)))


def test_interrupted_writing_leaves_the_last_state(data, tmp_path, monkeypatch):
    run = options(data, tmp_path / "run", epochs=1)
    train(run)
    last = run.output / run_state.LAST
    before = last.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        train(dataclasses.replace(run, resume=last, epochs=2))
    assert last.read_bytes() == before
    assert not list(run.output.glob("*.new"))


def test_weights_of_a_run_load_into_timm_and_into_ours(data, tmp_path):
    result = train(options(data, tmp_path / "run", epochs=1))
    best = result.output / run_state.BEST
    model = timm.create_model(MODEL, num_classes=3, checkpoint_path=str(best))
    assert torch.equal(model.stem.conv.weight, weights(result)["state_dict"]["stem.conv.weight"])
    load_checkpoint(timm.create_model(MODEL, num_classes=3), best)
    continued = train(options(data, tmp_path / "more", epochs=1, initial_checkpoint=best, lr=1e-8))
    after = weights(continued)["state_dict"]["stem.conv.weight"]
    torch.testing.assert_close(after, model.stem.conv.weight.detach(), rtol=1e-4, atol=1e-5)


def test_a_resumption_under_other_conditions_says_so(data, tmp_path, caplog):
    train(options(data, tmp_path / "run", epochs=1))
    last = tmp_path / "run" / run_state.LAST
    train(options(data, None, resume=last, epochs=2, lr=0.01))
    assert "epochs is 2 and was 1, lr is 0.01 and was 0.05" in caplog.text


def damaged(path, kind):
    content = {
        "empty": b"",
        "text": b"not a checkpoint",
        "truncated": path.read_bytes()[:1000],
    }
    if kind in content:
        path.write_bytes(content[kind])
        return "empty" if kind == "empty" else "not a readable"
    if kind == "timm":
        torch.save({"epoch": 3, "arch": MODEL, "state_dict": {}, "optimizer": {}}, path)
        return "no state of a training run"
    if kind == "other model":
        state = read_content(path)
        torch.save({**state, "arch": "regnety_002"}, path)
        return "of a run of regnety_002"
    state = read_content(path)
    state["state_dict"].popitem()
    torch.save(state, path)
    return "does not fit this run"


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "timm", "other model", "missing key"])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line_and_status_3(data, tmp_path, kind):
    train(options(data, tmp_path / "run", epochs=1))
    last = tmp_path / "run" / run_state.LAST
    expected = damaged(last, kind)
    result = run(data, *SMALL, "--resume", last)
    assert result.exit_code == 3 and len(result.stderr.splitlines()) == 1, result.output
    assert expected in result.stderr and str(last) in result.stderr


def test_options_that_a_resumed_run_cannot_change_are_named(data, tmp_path):
    train(options(data, tmp_path / "run", epochs=1))
    result = run(data, *SMALL, "--amp", "--resume", tmp_path / "run" / run_state.LAST)
    assert result.exit_code == 3 and "amp is True and was False" in result.stderr, result.output


# Two processes


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_two_processes_train_one_model_and_go_on_to_the_bit(data, tmp_path):
    """Under torchrun with gloo: every image evaluated once, one summary, and exact resumption."""
    given = {"batch_size": 4, "epochs": 2, "aa": "rand-m9-mstd0.5", "drop_path": 0.1, "grad_accum_steps": 2}
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    whole = ("--lr", 0.05, "--warmup-epochs", 0, "--output", tmp_path / "whole", "--json")
    shown = json.loads(torchrun("-m", "regnet_fast", "train", data, *SMALL, *words, *whole))
    assert [epoch["eval_images"] for epoch in shown["epochs"]] == [15, 15]
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        import torch.distributed as dist
        from image_folders import options
        from regnet_fast.train import train
        data, here = Path({str(data)!r}), Path({str(tmp_path)!r})
        def stop(epoch):
            raise InterruptedError
        dist.init_process_group("gloo")
        try:
            train(options(data, here / "broken", **{given!r}), on_epoch=stop)
        except InterruptedError:
            dist.barrier()
        train(options(data, None, resume=here / "broken" / "last.pth.tar", **{given!r}))
        dist.destroy_process_group()
    """)
    )
    torchrun(script)
    states = [read_content(tmp_path / name / run_state.LAST) for name in ("whole", "broken")]
    losses = [[epoch["train_loss"] for epoch in state["history"]] for state in states]
    assert losses[0] == losses[1] == [epoch["train_loss"] for epoch in shown["epochs"]]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    arguments = {"data_dir": data, "model": MODEL, "img_size": 32, "workers": 0, "device": "cpu", "timm": True}
    one = validate(ValidateOptions(checkpoint=tmp_path / "whole" / run_state.LAST, **arguments)).evaluation
    two = states[0]["history"][-1]["evaluation"]
    assert two["loss"] == pytest.approx(one.loss, rel=1e-4) and two["top1"] == pytest.approx(one.top1)
