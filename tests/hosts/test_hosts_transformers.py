"""RegNets of Hugging Face transformers, rebuilt: every output, training, folders, pipelines, and what is left alone."""

import copy
import filecmp
import json
import pickle
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import timm
import torch
from helpers import close, reasons
from PIL import Image
from regnets import (
    BLOCKS,
    CLASSES,
    assert_same_function,
    assert_trains_alike,
    of_transformers,
    transformers_config,
    transformers_model,
    with_statistics,
)
from torch import nn
from typer.testing import CliRunner

import regnet_fast
from regnet_fast.blocks.fused import Fused
from regnet_fast.cli import app
from regnet_fast.weights.layouts import recognize

transformers = pytest.importorskip("transformers")
regnet = pytest.importorskip("transformers.models.regnet.modeling_regnet")

pytestmark = pytest.mark.usefixtures("no_silent_fallback", "one_thread")

DTYPES = [torch.float32, torch.bfloat16]
CONFIGS = {
    "y": {},
    "x": {"layer_type": "x"},
    "y silu": {"hidden_act": "silu"},
    "x swish": {"layer_type": "x", "hidden_act": "swish"},
    "y linear": {"hidden_act": "linear"},
    "no downsampling at first": {"downsample_in_first_stage": False},
    "wide groups": {"groups_width": 24, "hidden_sizes": (16, 24, 48, 72)},
    "one channel": {"num_channels": 1},
}
SIZES = ("regnetx_002", "regnety_016", "regnety_040", "regnetx_160", "regnety_320")
"""One architecture of each size class, by timm's name."""


@pytest.fixture
def folder(tmp_path):
    """A local model and image processor under the name that transformers' documentation uses."""
    path = tmp_path / "facebook" / "regnet-y-040"
    of_transformers(id2label={i: f"cat {i}" for i in range(CLASSES)}).save_pretrained(path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(path)
    return path


def everything(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, hidden states, and for the bare model what it returns in their place."""
    found = model(x, output_hidden_states=True)
    hidden = {f"hidden state {i}": state for i, state in enumerate(found.hidden_states)}
    return {**hidden, **{name: value for name, value in found.items() if name != "hidden_states"}}


def photograph() -> Image.Image:
    return Image.effect_noise((80, 70), 64).convert("RGB")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_output(config, dtype):
    model = transformers_model(**CONFIGS[config])
    torch.manual_seed(3)  # on nine pixels one sum's rounding can pass the rule by chance, as of one draw in thirteen
    x = torch.randn(3, model.config.num_channels, 65, 71).to(dtype)
    assert_same_function(model, x, everything, config)


@pytest.mark.parametrize("config", ["x", "y"])
def test_every_output_of_the_bare_model(config):
    model = transformers_model(cls="RegNetModel", **CONFIGS[config])
    assert set(everything(model, torch.randn(1, 3, 64, 64))) >= {"last_hidden_state", "pooler_output"}
    assert_same_function(model, torch.randn(3, 3, 65, 71), everything, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_size(name, two_threads):
    config = {**recognize(timm.create_model(name, device="meta").state_dict()).config, "num_labels": 1000}
    assert_same_function(transformers_model(**config), torch.randn(2, 3, 64, 96), everything, name)


@pytest.mark.parametrize("hidden", [None, True])
@pytest.mark.parametrize("cls", ["RegNetModel", "RegNetForImageClassification"])
def test_tuples(cls, hidden):
    theirs = transformers_model(cls=cls)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(2, 3, 64, 64)
    options = {"output_hidden_states": hidden, "return_dict": False}
    with torch.no_grad():
        found, expected = (model(pixel_values=x, **options) for model in (ours, theirs))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        for one, other in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
            close(one, other)


@pytest.mark.parametrize(
    ("problem", "labels", "target"),
    [
        ("single_label_classification", CLASSES, torch.tensor([1, 2])),
        ("multi_label_classification", CLASSES, torch.eye(CLASSES)[:2]),
        ("regression", 1, torch.tensor([0.5, 1.5])),
    ],
)
def test_losses(problem, labels, target):
    theirs = transformers_model(num_labels=labels, problem_type=problem)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(2, 3, 64, 64)
    found = [model(x, labels=target) for model in (ours, theirs)]
    close(found[0].loss, found[1].loss)
    assert found[0].keys() == found[1].keys()


@pytest.mark.parametrize("config", ["x", "y"])
def test_training_step(config):
    model = transformers_model(**{**CONFIGS[config], "hidden_act": "silu"})
    assert_trains_alike(model, lambda model, x, target: model(x, labels=target).loss)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training):
    theirs = of_transformers().train(training)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert reasons(copy.deepcopy(ours), x) == {None}
        found, expected = (model(x, labels=torch.arange(4), output_hidden_states=True) for model in (ours, theirs))
    for a, b in zip((*found.hidden_states, found.logits), (*expected.hidden_states, expected.logits), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.detach().abs().max()))
    found.loss.backward()


def test_losses_fall_alike():
    theirs = of_transformers()
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x, target = torch.randn(8, 3, 64, 64), torch.arange(8) % CLASSES
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(pixel_values=x, labels=target).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", ["mish", "gelu_new", "quick_gelu"])
def test_another_activation_is_left_to_transformers(name):
    theirs = transformers_model(hidden_act=name)
    ours = copy.deepcopy(theirs)
    report = regnet_fast.rebuild(ours)
    assert not report.rebuilt and len(report.kept) == BLOCKS
    assert all("which has no fused form" in reason for _, _, reason in report.kept)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x).logits, theirs(x).logits)


def test_the_stem_complains_as_ever():
    with pytest.raises(ValueError, match="channel dimension"):
        regnet_fast.rebuild(of_transformers()).model(torch.randn(1, 4, 64, 64))


class Doubled(regnet.RegNetYLayer):
    """Somebody's own layer."""

    def forward(self, hidden_state):
        return super().forward(hidden_state) * 2


def test_a_layer_of_ones_own_is_left_as_it_is():
    theirs = of_transformers()
    config = transformers_config()
    theirs.regnet.encoder.stages[2].layers[1] = Doubled(config, 32, 32).eval()
    ours = copy.deepcopy(theirs)
    report = regnet_fast.rebuild(ours)
    path = "regnet.encoder.stages.2.layers.1"
    assert report.kept == [(path, "Doubled", "it is derived from RegNetYLayer and may compute something else")]
    assert {where for where, _ in report.rebuilt if where.startswith(path)} == {f"{path}.layer.{i}" for i in (0, 1, 3)}
    x = torch.randn(2, 3, 64, 64)
    for mode in (False, True):
        found = [model.train(mode)(x).logits for model in (ours, theirs)]
        close(*found)
        for logits in found:
            logits.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.layer.append(nn.Identity()), "layer has 5 parts, not 4"),
        (lambda layer: layer.layer.__setitem__(2, nn.Identity()), "layer.2 is Identity, not RegNetSELayer"),
        (lambda layer: layer.layer[2].attention.__setitem__(3, nn.Mish()), "the gate of layer.2 is Mish"),
        (lambda layer: layer.layer[2].attention.__setitem__(1, nn.Mish()), "layer.2.attention.1 is Mish"),
        (lambda layer: setattr(layer, "shortcut", nn.Sequential(layer.shortcut)), "shortcut is Sequential"),
        (lambda layer: setattr(layer.layer[3], "activation", nn.ReLU()), "an activation of its own"),
        (lambda layer: setattr(layer.layer[1].convolution, "padding_mode", "reflect"), "in mode 'reflect'"),
        (lambda layer: layer.layer[0].register_forward_hook(lambda *_: None), "a hook is registered on layer.0"),
    ],
)
def test_a_changed_layer_is_refused_and_computes_what_it_did(change, reason):
    theirs = of_transformers()
    change(theirs.regnet.encoder.stages[0].layers[0])
    ours = copy.deepcopy(theirs)
    report = regnet_fast.rebuild(ours)
    assert len(report.rebuilt) == BLOCKS - 1
    assert len(report.kept) == 1 and reason in report.kept[0][2], report.kept
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(ours(x).logits, theirs(x).logits)


def test_one_layer_in_two_places():
    theirs = of_transformers()
    layers = theirs.regnet.encoder.stages[2].layers
    layers.append(layers[1])
    ours = copy.deepcopy(theirs)
    assert len(regnet_fast.rebuild(ours).rebuilt) == BLOCKS
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(ours(x).logits, theirs(x).logits)
        assert (theirs(x).logits - of_transformers()(x).logits).abs().max() > 1e-3, "the second call makes a difference"


def test_rebuilt_twice_frozen_copied_pickled_and_restored():
    theirs = of_transformers()
    x = torch.randn(2, 3, 64, 64)
    expected = theirs(x).logits.detach()
    ours = copy.deepcopy(theirs)
    regnet_fast.rebuild(ours)
    again = regnet_fast.rebuild(ours)
    assert not again.rebuilt and not again.kept
    assert list(ours.state_dict()) == list(theirs.state_dict())
    regnet_fast.freeze(ours)
    with torch.no_grad():
        for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert sum(isinstance(module, Fused) for module in model.modules()) == BLOCKS
            close(model(x).logits, expected)
    regnet_fast.restore(ours)
    assert {type(a) for a in ours.modules()} == {type(b) for b in theirs.modules()}
    assert torch.equal(ours(x).logits, expected)


@pytest.mark.long
def test_compiled_in_place_before_it_is_rebuilt(fresh_compiler):
    theirs = of_transformers()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x).logits
        model = copy.deepcopy(theirs)
        model.compile(backend="eager")
        close(model(x).logits, expected)
        assert len(regnet_fast.rebuild(model).rebuilt) == BLOCKS
        close(model(x).logits, expected)


def test_explained():
    rows = regnet_fast.explain(regnet_fast.rebuild(of_transformers()).model, (1, 3, 64, 64))
    names = [row.layer for row in rows if row.operation != "host"]
    assert names[0] == "regnet.embedder.embedder.convolution"
    assert "regnet.encoder.stages.2.layers.1.layer.2" in names
    assert [(row.layer, row.operation) for row in rows[-2:]] == [("regnet.pooler", "host"), ("classifier.1", "host")]
    theirs = regnet_fast.explain(of_transformers(), (1, 3, 64, 64))
    assert sum(len(row.launches) for row in theirs) > sum(len(row.launches) for row in rows)


@pytest.mark.parametrize("cls", ["RegNetModel", "RegNetForImageClassification"])
def test_folders_stay_the_same(cls, tmp_path):
    """What a rebuilt model saves is what transformers would have saved, and either reads it."""
    theirs = transformers_model(cls=cls)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(regnet_fast.transformers, cls).from_pretrained(tmp_path / "theirs")
    assert isinstance(ours, type(theirs)) and not ours.training
    assert sum(isinstance(module, Fused) for module in ours.modules()) == BLOCKS
    ours.save_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert {"config.json", "model.safetensors"} <= set(names)
    same, *rest = filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "ours", names, shallow=False)
    assert sorted(same) == names and rest == [[], []]
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for model in (ours, again):
            close(model(x)[0], theirs(x)[0])
    assert reasons(ours, x) == {None}


def test_from_pretrained_takes_what_transformers_takes(folder):
    ours = regnet_fast.transformers.RegNetForImageClassification
    half, info = ours.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert half.dtype == torch.bfloat16 and not info["missing_keys"]
    assert reasons(half, torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)) == {None}
    other = ours.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    assert other(torch.randn(1, 3, 64, 64)).logits.shape == (1, 2)
    bare = regnet_fast.transformers.RegNetModel.from_pretrained(folder)
    assert torch.equal(bare.embedder.embedder.convolution.weight, other.regnet.embedder.embedder.convolution.weight)


def test_pipeline(folder):
    model = regnet_fast.transformers.RegNetForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = photograph()
    theirs = transformers.RegNetForImageClassification.from_pretrained(folder)
    found, expected = (
        transformers.pipeline("image-classification", model=one, image_processor=processor)(image, top_k=CLASSES)
        for one in (model, theirs)
    )
    assert [answer["label"] for answer in found] == [answer["label"] for answer in expected]
    assert {answer["label"] for answer in found} == {f"cat {i}" for i in range(CLASSES)}
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=1e-3)


def test_a_timm_model_inside():
    config = transformers.TimmBackboneConfig(backbone="regnetx_002", use_pretrained_backbone=False, out_indices=(1, 2))
    theirs = with_statistics(transformers.TimmBackbone(config), 0)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(1, 3, 64, 64)
    assert reasons(ours, x) == {None}
    for a, b in zip(ours(x).feature_maps, theirs(x).feature_maps, strict=True):
        close(a, b)


def test_by_name_on_the_command_line(folder):
    def run(*arguments):
        return CliRunner().invoke(app, [*arguments, "--json"])

    name = f"transformers:{folder}"
    result = run("verify", name, "--size", "64")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["verifications"]
    stages = [f"hidden state {i}" for i in range(5)]
    assert found["rebuilt"] == BLOCKS and [check["stage"] for check in found["checks"]] == [*stages, "logits"]
    result = run("explain", name, "--size", "64")
    assert json.loads(result.stdout)["totals"]["layers_by_backend"]["host"] == 2
    result = run("compare", name, "--size", "32", "--rounds", "1", "--no-compile")
    assert json.loads(result.stdout)["cases"][0]["correct"]


CLASSIFY = """
    from transformers import AutoImageProcessor, RegNetForImageClassification
    import torch
    from datasets import load_dataset

    dataset = load_dataset("huggingface/cats-image")
    image = dataset["test"]["image"][0]

    image_processor = AutoImageProcessor.from_pretrained("facebook/regnet-y-040")
    model = RegNetForImageClassification.from_pretrained("facebook/regnet-y-040")

    inputs = image_processor(image, return_tensors="pt")

    with torch.no_grad():
        logits = model(**inputs).logits

    predicted_label = logits.argmax(-1).item()
    label = model.config.id2label[predicted_label]
"""
"""From transformers' page on RegNet, which prints the label."""

OURS = CLASSIFY.replace(
    "from transformers import AutoImageProcessor, RegNetForImageClassification",
    "from transformers import AutoImageProcessor\nfrom regnet_fast.transformers import RegNetForImageClassification",
)


def test_the_example_of_transformers_documentation(folder, monkeypatch):
    datasets = types.ModuleType("datasets")
    image = photograph()
    datasets.load_dataset = lambda name: {"test": {"image": [image]}}
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.chdir(folder.parent.parent)
    theirs, ours = {}, {}
    exec(textwrap.dedent(CLASSIFY), theirs)
    exec("\n".join(line.strip() if "import" in line else line[4:] for line in OURS.splitlines()), ours)
    assert sum(isinstance(module, Fused) for module in ours["model"].modules()) == BLOCKS
    close(ours["logits"], theirs["logits"])
    assert ours["label"] == theirs["label"]


def test_a_configuration_makes_a_model():
    """The other example: a model from a configuration, and its configuration again."""
    configuration = transformers_config()
    model = regnet_fast.transformers.RegNetModel(configuration)
    assert model.config is configuration
    assert sum(isinstance(module, Fused) for module in model.modules()) == BLOCKS


def run(code: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.long
def test_it_is_imported_by_nobody_else():
    found = run(
        """
        import sys
        import regnet_fast
        model = regnet_fast.create_model("regnetx_002")
        assert regnet_fast.rebuild(regnet_fast.restore(model)).rebuilt
        exec("from regnet_fast import *")
        assert "transformers" not in sys.modules
        sys.modules["transformers"] = None  # as where it is not installed
        try:
            regnet_fast.transformers
        except ImportError as error:
            print(error)
        """
    )
    assert found.returncode == 0, found.stderr
    assert "pip install 'regnet_fast[transformers]'" in found.stdout
