"""Training: the numbers of a plain timm loop, and one line for whatever goes wrong."""

import csv
import json
import logging
import os
import shutil
import signal

import pytest
import timm
import torch
from image_folders import MODEL, SMALL, image_folder, options, weights
from timm.optim import create_optimizer_v2
from torch import nn
from typer.testing import CliRunner

from regnet_fast.classify import UnreadableImageError
from regnet_fast.cli import app
from regnet_fast.training import datasets, run_state
from regnet_fast.training.options import OptionError
from regnet_fast.training.train import TrainingError, train
from regnet_fast.training.validate import ValidateOptions, validate
from regnet_fast.weights.checkpoints import CheckpointError, read_content

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


# The numbers


def plain_loop(data, steps):
    """Three epochs with nothing but timm's model and torch's optimizer: mean losses, then the model."""
    folder = timm.data.create_dataset("", root=str(data), split="train")
    model = timm.create_model(MODEL)
    config = timm.data.resolve_data_config({"img_size": 32}, model=model)
    keep = {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
    folder.transform = timm.data.create_transform(**keep, is_training=True, no_aug=True)
    images, targets = (torch.stack([torch.as_tensor(sample[part]) for sample in folder]) for part in (0, 1))
    torch.manual_seed(42)
    model = timm.create_model(MODEL, num_classes=3).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=2e-5)
    criterion, losses = nn.CrossEntropyLoss(label_smoothing=0.1), []
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 3)).item()) / 2
        order = torch.randperm(24, generator=torch.Generator().manual_seed(42 + epoch)).split(8)
        found = []
        for index, batch in enumerate(order):
            together = 1 if index == 2 and steps == 2 else steps  # the third batch has no second
            loss = criterion(model(images[batch]), targets[batch])
            (loss / together).backward()
            found.append(loss.item())
            if (index + 1) % steps == 0 or index == 2:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(sum(found) / 3)
    return losses, model


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("plain", [True, False], ids=["timm", "rebuilt"])
def test_the_numbers_are_those_of_a_plain_timm_loop(data, tmp_path, plain, steps):
    result = train(options(data, tmp_path / "run", no_aug=True, timm=plain, grad_accum_steps=steps))
    losses, model = plain_loop(data, steps)
    assert [epoch.train_loss for epoch in result.epochs] == pytest.approx(losses, rel=1e-5 if plain else 1e-3)
    assert result.epochs[2].train_loss < result.epochs[0].train_loss
    found = weights(result)["state_dict"]
    for key, value in model.state_dict().items():
        near = {"rtol": 1e-4, "atol": 1e-4} if plain else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(found[key], value, **near, msg=lambda text, key=key: f"{key}: {text}")
    assert (result.rebuilt == 0) == plain and result.num_classes == 3


def test_the_summary_is_timms(data, tmp_path):
    result = train(options(data, tmp_path / "run"))
    with (result.output / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert [float(row["train_loss"]) for row in rows] == [epoch.train_loss for epoch in result.epochs]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.05, 0.0375, 0.0125])


def test_memory_formats_and_checkpointing_change_no_number_beyond_rounding(data, tmp_path):
    base = train(options(data, tmp_path / "base", epochs=1, no_aug=True))
    for name in ("channels_last", "grad_checkpointing"):
        other = train(options(data, tmp_path / name, epochs=1, no_aug=True, **{name: True}))
        assert other.epochs[0].train_loss == pytest.approx(base.epochs[0].train_loss, rel=1e-3), name


def test_the_average_of_the_weights_is_what_is_evaluated(data, tmp_path):
    result = train(options(data, tmp_path / "run", model_ema=True, model_ema_decay=0.5))
    last = result.output / run_state.LAST
    arguments = {"data_dir": data, "model": MODEL, "img_size": 32, "workers": 0, "device": "cpu", "timm": True}
    found = validate(ValidateOptions(checkpoint=last, **arguments)).evaluation  # which prefers the average
    assert found.loss == pytest.approx(result.epochs[-1].evaluation.loss, rel=1e-4)
    assert found.images == 15
    kinds = weights(result)
    assert not torch.equal(kinds["state_dict"]["stem.conv.weight"], kinds["state_dict_ema"]["stem.conv.weight"])


def test_a_step_that_overflows_is_left_out(data, tmp_path, monkeypatch):
    """The first scale is so large that no gradient is finite: the weights stay, the scale falls, training goes on."""
    scale = 2.0**60
    monkeypatch.setattr(
        "regnet_fast.training.train.NativeScaler",
        lambda device: scaler_from(torch.amp.GradScaler(device, init_scale=scale)),
    )

    def scaler_from(inner):
        scaler = timm.utils.NativeScaler("cpu")
        scaler._scaler = inner
        return scaler

    one = train(options(data, tmp_path / "run", amp=True, amp_dtype="float16", epochs=1, weight_decay=0.0))
    torch.manual_seed(42)
    first = timm.create_model(MODEL, num_classes=3).state_dict()
    found = weights(one)["state_dict"]
    assert torch.equal(found["stem.conv.weight"], first["stem.conv.weight"])
    state = read_content(one.output / run_state.LAST)
    assert state["amp_scaler"]["scale"] == 2.0**57
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.long
def test_bfloat16_learns(data, tmp_path):
    result = train(options(data, tmp_path / "run", amp=True, amp_dtype="bfloat16"))
    assert result.epochs[2].train_loss < result.epochs[0].train_loss
    assert result.best_top1 > 60


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("--model", "regnetx_003"), 2, "Close: regnetx_0"),
        (("--opt", "sgdd"), 2, "sgdd"),
        (("--sched", "cosin"), 2, "cosin"),
        (("--model", "vit_tiny_patch16_224"), 2, "takes no other img_size than 224"),
        (("--batch-size", "64"), 2, "no whole batch of 24 training images"),
        (("--num-classes", "2"), 2, "3 classes and the model 2"),
        (("--aa", "nonsense"), 2, "timm's loader refuses"),
        (("--mixup", "0.2", "--batch-size", "7"), 2, "pairs"),
        (("--device", "cuda:99"), 2, "cannot be used"),
        (("--amp-dtype", "float8"), 2, "float16, bfloat16"),
        (("--sync-bn",), 2, "sync_bn"),
        (("--dataset", "torch/nonsense"), 3, "nonsense"),
        (("--initial-checkpoint", "/nowhere.pth"), 3, "/nowhere.pth"),
        (("--resume", "/nowhere.pth"), 3, "/nowhere.pth"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(data, tmp_path, arguments, status, text):
    result = run(data, *SMALL, "--output", tmp_path / "run", *arguments)
    assert result.exit_code == status, result.output
    assert len(result.stderr.splitlines()) == 1 and text in result.stderr
    assert not (tmp_path / "run").exists()


def test_folders_that_are_not_there(data, tmp_path):
    result = run(tmp_path / "nowhere", *SMALL)
    assert result.exit_code == 3 and "there is no data folder" in result.stderr
    assert run(*SMALL).exit_code == 2
    shutil.copytree(data / "train", tmp_path / "images" / "train")
    result = run(tmp_path / "images", *SMALL)
    assert result.exit_code == 2 and "has no folder 'val'" in result.stderr
    (tmp_path / "images" / "val").mkdir()
    result = run(tmp_path / "images", *SMALL)
    assert result.exit_code == 3 and "Found 0 images" in result.stderr


def test_the_folder_of_another_run_is_not_written_over(data, tmp_path):
    train(options(data, tmp_path / "run", epochs=1))
    with pytest.raises(OptionError, match="another run"):
        train(options(data, tmp_path / "run", epochs=1))


def test_classes_of_the_validation_images_have_the_numbers_of_the_training_images(data, tmp_path):
    shutil.copytree(data, tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "val" / "blue")
    _, evaluated = datasets.open_training(options(tmp_path / "images", tmp_path / "run"))
    assert {target for _, target in evaluated.reader.samples} == {1, 2}
    shutil.copytree(data / "val" / "blue", tmp_path / "images" / "val" / "azure")
    with pytest.raises(OptionError, match="without training images: azure"):
        datasets.open_training(options(tmp_path / "images", tmp_path / "run"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_left_out(data, tmp_path, workers, capfd, monkeypatch):
    monkeypatch.setattr(datasets._logger, "handlers", [logging.StreamHandler()])  # as pytest's catches none of a worker
    shutil.copytree(data, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "green" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    result = train(options(tmp_path / "images", tmp_path / "run", workers=workers, epochs=1))
    assert len(result.epochs) == 1
    assert f"'{broken}' is not an image that can be read" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images_is_an_error_that_names_them(data, tmp_path, workers):
    shutil.copytree(data, tmp_path / "images")
    for file in (tmp_path / "images" / "train").rglob("*.png"):
        file.write_bytes(b"nothing")
    small = (*SMALL, "--workers", workers, "--output", tmp_path / "run")
    result = run(tmp_path / "images", *small)
    assert result.exit_code == 3 and len(result.stderr.splitlines()) == 1, result.output
    assert "images in a row" in result.stderr and str(tmp_path / "images" / "train") in result.stderr
    result = run(tmp_path / "images", *small, "--dataset", "torch/image_folder")  # which has no second try
    assert result.exit_code == 3 and ".png' is not an image that can be read" in result.stderr, result.output


def test_torchvisions_datasets(data, tmp_path):
    result = train(options(data, tmp_path / "run", dataset="torch/image_folder", epochs=1))
    assert result.num_classes == 3 and result.epochs[0].evaluation.images == 15


def test_a_worker_that_dies_is_an_error_and_no_hang(data, tmp_path, monkeypatch):
    def die(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(datasets._Named, "__getitem__", die)
    with pytest.raises(datasets.DatasetError, match="a process that reads images died"):
        train(options(data, tmp_path / "run", workers=1, epochs=1))


def test_a_loss_that_is_no_number_ends_the_run_with_its_files_as_they_were(data, tmp_path):
    with pytest.raises(TrainingError, match="nan"):
        train(options(data, tmp_path / "run", lr=1e30))
    assert not (tmp_path / "run" / run_state.LAST).exists()


def test_json_is_alone_on_standard_output(data, tmp_path):
    result = run(data, *SMALL, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["best_top1"] == found["epochs"][0]["eval_top1"] and found["output"] == str(tmp_path / "run")
    shown = run(data, *SMALL, "--output", tmp_path / "again")
    assert f"loss {found['epochs'][0]['train_loss']:.4f} in training" in shown.stdout


def test_errors_of_the_library(data, tmp_path):
    for given in ({"batch_size": 0}, {"smoothing": 2.0}, {"seed": -1}, {"clip_grad": 0.0}, {"workers": -1}):
        with pytest.raises(OptionError, match=next(iter(given))):
            train(options(data, tmp_path / "run", **given))
    assert issubclass(UnreadableImageError, RuntimeError) and issubclass(CheckpointError, RuntimeError)
