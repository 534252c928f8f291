"""Evaluation: the numbers of a plain timm loop, on folders and datasets, and one line for whatever goes wrong."""

import json

import pytest
import timm
import torch
from helpers import randomize_bn
from image_folders import MODEL, image_folder
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from regnet_fast.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--model", MODEL, "--img-size", 64, "--workers", 0, "--device", "cpu", "--batch-size", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), train=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model whose norms and classes are no defaults, and the file of its weights."""
    torch.manual_seed(0)
    model = randomize_bn(timm.create_model(MODEL, num_classes=7), 0).eval()
    with torch.no_grad():  # classes of which each image has another order
        model.head.fc.weight.normal_()
        features = model.forward_head(model.forward_features(torch.randn(64, 3, 64, 64)), pre_logits=True)
        model.head.fc.bias.copy_(-model.head.fc(features).mean(0))
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(model.state_dict(), file)
    return model, file


def run(*arguments):
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


def run_json(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def expected(model, data):
    """Top-1, top-5 and loss, image by image."""
    folder = timm.data.create_dataset("", root=str(data), split="validation")
    config = timm.data.resolve_data_config({"img_size": 64}, model=model)
    folder.transform = timm.data.create_transform(**config, is_training=False)
    images, targets = zip(*folder, strict=True)
    targets = torch.tensor(targets)
    with torch.inference_mode():
        logits = model(torch.stack(images))
    places = (logits > logits.gather(1, targets[:, None])).sum(1)
    top1, top5 = (100 * (places < top).double().mean().item() for top in (1, 5))
    return {"loss": cross_entropy(logits, targets).item(), "top1": top1, "top5": top5, "images": 15}


@pytest.mark.parametrize("plain", [(), ("--timm",)], ids=["rebuilt", "timm"])
def test_the_numbers_are_those_of_a_plain_timm_loop(data, trained, plain):
    model, file = trained
    found = run_json(data, *SMALL, "--checkpoint", file, "--num-classes", 7, *plain)
    want = expected(model, data)
    assert 0 < want["top5"] < 100  # else the weights tell nothing apart
    assert {key: found[key] for key in want} == pytest.approx(want, rel=1e-4)
    assert (found["rebuilt"] == 0) == bool(plain)
    assert (found["img_size"], found["interpolation"]) == (64, "bicubic")


def test_other_precisions_and_layouts_are_near(data, trained):
    model, file = trained
    want = expected(model, data)["loss"]
    for given in (("--amp", "--amp-dtype", "bfloat16"), ("--channels-last",)):
        found = run_json(data, *SMALL, "--checkpoint", file, "--num-classes", 7, *given)
        assert found["loss"] == pytest.approx(want, rel=0.05), given


def test_folders_splits_and_datasets(data, trained):
    _, file = trained
    arguments = (*SMALL, "--checkpoint", file, "--num-classes", 7)
    whole = run_json(data, *arguments)
    for other in (
        run_json(data / "val", *arguments),
        run_json(data / "val", *arguments, "--dataset", "torch/image_folder"),
    ):
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert run_json(data, *arguments, "--val-split", "train")["images"] == 3


def test_the_text_has_the_numbers(data, trained):
    _, file = trained
    result = run(data, *SMALL, "--checkpoint", file, "--num-classes", 7)
    assert result.exit_code == 0 and "15 images" in result.stdout and "64 pixels" in result.stdout
    result = run(data, *SMALL, "--no-pretrained")
    assert "the weights are random" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("--model", "regnetx_003", "--no-pretrained"), 2, "Unknown model"),
        (("--no-pretrained", "--num-classes", "2"), 2, "3 classes and the model 2"),
        (("--checkpoint", "/nowhere.pth"), 3, "/nowhere.pth"),
        (("--dataset", "torch/nonsense"), 3, "nonsense"),
        (("--device", "nonsense"), 2, "cannot be used"),
        (("--batch-size", "0"), 2, "batch_size"),
    ],
)
def test_bad_input_is_one_line(data, arguments, status, text):
    result = run(data, *SMALL, *arguments)
    assert result.exit_code == status, result.output
    assert len(result.stderr.splitlines()) == 1 and text in result.stderr


def test_a_checkpoint_of_another_number_of_classes_does_not_fit(data, trained):
    _, file = trained
    result = run(data, *SMALL, "--checkpoint", file)  # 3 classes, by the folder
    assert result.exit_code == 3 and "head.fc" in result.stderr
