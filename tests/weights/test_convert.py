"""Weights between timm, transformers and torchvision: every pair of layouts, files and folders, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision.models.regnet
from helpers import assert_close_to_reference
from regnets import (
    BLOCKS,
    CLASSES,
    DEPTHS,
    GROUP_WIDTH,
    HOSTS,
    STEM,
    WIDTHS,
    logits,
    of_timm,
    of_torchvision,
    of_transformers,
    transformers_model,
)
from torch import nn
from typer.testing import CliRunner

import regnet_fast
from regnet_fast.cli import app
from regnet_fast.weights.checkpoints import CheckpointError
from regnet_fast.weights.layouts import LAYOUTS, recognize

pytestmark = pytest.mark.usefixtures("one_thread")

TORCHVISION = [name for name in torchvision.models.regnet.__all__ if name.startswith("regnet_")]
TIMM = [*timm.list_models("regnetx_*"), *timm.list_models("regnety_*")]


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["x", "y"])
@pytest.mark.parametrize(("source", "to"), list(itertools.permutations(HOSTS, 2)))
def test_there_and_back(source, to, kind):
    state = HOSTS[source](kind).state_dict()
    other = HOSTS[to](kind, seed=1)
    assert not same(regnet_fast.convert(other.state_dict(), source), state)
    converted = regnet_fast.convert(state, to)
    other.load_state_dict(converted, strict=True)
    assert same(regnet_fast.convert(other.state_dict(), source), state)
    assert {id(value) for value in converted.values()} == {id(value) for value in state.values()}


@pytest.mark.parametrize("kind", ["x", "y"])
def test_the_hosts_are_one_function(kind):
    """On odd sizes, in float64 to rounding and in float32 within the rule; ours, rebuilt from each, as well."""
    theirs = of_timm(kind)
    models = {"timm": theirs}
    for name in ("torchvision", "transformers") if has_transformers() else ("torchvision",):
        models[name] = HOSTS[name](kind, seed=1)
        models[name].load_state_dict(regnet_fast.convert(theirs.state_dict(), name))
    x = torch.randn(3, 3, 65, 71)
    with torch.no_grad():
        eager = {name: logits(model, x) for name, model in models.items()}
        ours = {name: logits(regnet_fast.rebuild(model).model, x) for name, model in models.items()}
        exact = {name: logits(model.double(), x.double()) for name, model in models.items()}
    for name in models:
        torch.testing.assert_close(exact[name], exact["timm"], rtol=1e-12, atol=1e-12)
        for other in models:
            assert_close_to_reference(ours[name], eager[other], exact["timm"], f"{name}, judged by {other}")


def has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def torchvision_on_meta(name: str, monkeypatch) -> dict:
    """The state dict of a model without memory; torchvision computes its widths with tensors, on the CPU."""
    widths = torchvision.models.regnet.BlockParams.from_init_params

    def on_cpu(**kwargs):
        with torch.device("cpu"):
            return widths(**kwargs)

    monkeypatch.setattr(torchvision.models.regnet.BlockParams, "from_init_params", on_cpu)
    with torch.device("meta"):
        return getattr(torchvision.models.regnet, name)().state_dict()


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_model_of_torchvision(name, monkeypatch):
    state = torchvision_on_meta(name, monkeypatch)
    check_architecture(state, "torchvision", "transformers" if has_transformers() else "torchvision")
    check_architecture(state, "torchvision", "torchvision")


@pytest.mark.parametrize("name", TIMM)
def test_every_model_of_timm(name):
    state = timm.create_model(name, device="meta").state_dict()
    if name == "regnety_040_sgn":
        with pytest.raises(CheckpointError, match=r"missing: stem\.bn\.running_mean"):
            regnet_fast.convert(state, "transformers")
        return
    check_architecture(state, "timm", "transformers" if has_transformers() else "torchvision")


def check_architecture(state: dict, source: str, to: str) -> None:
    """Keys and shapes are those of the other library's model, built from what the weights tell, and so are those of the
    way back.
    """
    weights = recognize(state)
    assert weights.layout == source
    config, converted = weights.config, weights.under(to)
    with torch.device("meta"):
        if to == "transformers":
            from transformers import RegNetConfig, RegNetForImageClassification

            expected = RegNetForImageClassification(RegNetConfig(**config, num_labels=1000)).state_dict()
        else:
            stages, se_ratio = len(config["depths"]), 0.25 if config["layer_type"] == "y" else None
            groups = [min(config["groups_width"], width) for width in config["hidden_sizes"]]
            params = torchvision.models.regnet.BlockParams(
                config["depths"], config["hidden_sizes"], groups, [1.0] * stages, [2] * stages, se_ratio
            )
            expected = torchvision.models.regnet.RegNet(params, stem_width=config["embedding_size"]).state_dict()
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in expected.items()}
    back = regnet_fast.convert(converted, source)
    assert back.keys() == state.keys() and all(back[key] is state[key] for key in state)


def test_what_weights_tell():
    assert recognize(of_torchvision("x").state_dict()).config == {
        "num_channels": 3,
        "embedding_size": STEM,
        "hidden_sizes": list(WIDTHS),
        "depths": list(DEPTHS),
        "groups_width": GROUP_WIDTH,
        "layer_type": "x",
    }


def test_bare_models_of_transformers():
    bare = transformers_model(cls="RegNetModel")
    state = regnet_fast.convert(bare.state_dict(), "timm")
    model = of_timm(num_classes=0, seed=1)
    model.load_state_dict(state, strict=True)
    assert same(regnet_fast.convert(model.state_dict(), "transformers"), bare.state_dict())
    with pytest.raises(CheckpointError, match="no classifier, and torchvision has no RegNet without one"):
        regnet_fast.convert(state, "torchvision")


def test_frozen_norms_have_no_count_of_batches():
    from torchvision.ops import FrozenBatchNorm2d

    state = of_torchvision(norm_layer=FrozenBatchNorm2d).state_dict()
    model = of_timm(seed=1)
    model.load_state_dict(regnet_fast.convert(state, "timm"), strict=False)
    counted = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert same(regnet_fast.convert(counted, "torchvision"), state)


def on_meta(name: str) -> dict:
    return timm.create_model(name, device="meta").state_dict()


def changed(**tensors: torch.Tensor | None) -> dict:
    """A small RegNetY under timm's keys with some tensors replaced or, where None is given, removed."""
    state = {**of_timm().state_dict(), **{key.replace("__", "."): value for key, value in tensors.items()}}
    return {key: value for key, value in state.items() if value is not None}


def without(part: str) -> dict:
    return {key: value for key, value in of_timm().state_dict().items() if not key.startswith(part)}


SPOILT = {
    "nothing": (dict, "their keys are none"),
    "a linear layer": (lambda: nn.Linear(2, 2).state_dict(), "their keys are weight, bias"),
    "RegNetZ": (lambda: on_meta("regnetz_005"), r"unknown: final_conv\."),
    "RegNetZ of byobnet": (lambda: on_meta("regnetz_b16"), "no weights of a RegNetX or RegNetY of timm"),
    "RegNetV": (lambda: on_meta("regnetv_040"), "no weights of a RegNetX or RegNetY of timm"),
    "a key is missing": (lambda: changed(s3__b2__conv2__bn__bias=None), r"missing: s3\.b2\.conv2\.bn\.bias"),
    "a key too many": (lambda: changed(s3__b2__conv9__weight=torch.ones(1)), r"unknown: s3\.b2\.conv9\.weight"),
    "half of squeeze-excite": (lambda: changed(s1__b1__se__fc2__weight=None), r"missing: s1\.b1\.se\.fc2\.weight"),
    "a first block without a shortcut": (lambda: without("s2.b1.downsample"), "in stage 2 the blocks with a shortcut"),
    "another squeeze-excite": (lambda: changed(s1__b1__se__fc1__bias=torch.ones(9)), r"bias is \(9,\) and not \(8,\)"),
    "widened inside": (lambda: changed(s2__b1__conv1__conv__weight=torch.ones(48, 16, 1, 1)), "keeps its width"),
    "a vector for a kernel": (lambda: changed(stem__conv__weight=torch.ones(3)), "no weight of a convolution"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_refused(case):
    make, message = SPOILT[case]
    state = make()
    for to in LAYOUTS:
        with pytest.raises(CheckpointError, match=message):
            regnet_fast.convert(state, to)


def test_an_unknown_layout():
    with pytest.raises(ValueError, match=r"'keras'; choose one of timm, transformers, torchvision"):
        regnet_fast.convert(of_timm().state_dict(), "keras")


def test_other_input_channels():
    state = of_timm(in_chans=1).state_dict()
    assert recognize(state).under("transformers")
    with pytest.raises(CheckpointError, match="take 1 input channels, and torchvision's RegNets take 3"):
        regnet_fast.convert(state, "torchvision")


# Files and folders


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(("source", "to"), [("timm", "torchvision"), ("torchvision", "timm")])
def test_files(source, to, suffix, tmp_path):
    state = HOSTS[source]().state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pth")
    found = regnet_fast.convert_checkpoint(tmp_path / "a.pth", tmp_path / f"b{suffix}", to)
    assert (found.layout, found.to, found.tensors) == (source, to, len(state))
    again = regnet_fast.convert_checkpoint(tmp_path / f"b{suffix}", tmp_path / "c.safetensors", source)
    assert again.layout == to
    assert same(safetensors.torch.load_file(tmp_path / "c.safetensors"), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.pth", f"b{suffix}", "c.safetensors"])


def test_views_are_written_alone(tmp_path):
    """A checkpoint whose tensors are parts of one memory, and a weight that is not contiguous."""
    state = of_timm().state_dict()
    memory = torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
    parts = memory.split([value.numel() for value in state.values() if value.is_floating_point()])
    values = iter(parts)
    viewed = {k: next(values).view(v.shape) if v.is_floating_point() else v for k, v in state.items()}
    viewed["stem.conv.weight"] = viewed["stem.conv.weight"].to(memory_format=torch.channels_last)
    torch.save(viewed, tmp_path / "a.pth")
    regnet_fast.convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.safetensors", "torchvision")
    regnet_fast.convert_checkpoint(tmp_path / "a.pth", tmp_path / "c.pth", "timm")
    assert same(regnet_fast.convert(safetensors.torch.load_file(tmp_path / "b.safetensors"), "timm"), state)
    assert (tmp_path / "c.pth").stat().st_size < 2 * (tmp_path / "b.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_a_folder_of_transformers_and_back(dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = of_timm().to(dtype)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    regnet_fast.convert_checkpoint(tmp_path / "timm.safetensors", tmp_path / "folder")
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "folder", dtype="auto", output_loading_info=True
    )
    assert type(model) is transformers.RegNetForImageClassification and model.dtype == dtype
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == CLASSES and model.config.label2id["LABEL_4"] == 4
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x.double()).logits, theirs.double()(x.double()))
    regnet_fast.convert_checkpoint(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(
        safetensors.torch.load_file(tmp_path / "back.safetensors"),
        safetensors.torch.load_file(tmp_path / "timm.safetensors"),
    )
    model = regnet_fast.transformers.RegNetForImageClassification.from_pretrained(tmp_path / "folder")
    assert len(regnet_fast.rebuild(regnet_fast.restore(model)).rebuilt) == BLOCKS


def test_a_folder_of_a_bare_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.save(of_timm(num_classes=0).state_dict(), tmp_path / "a.pth")
    regnet_fast.convert_checkpoint(tmp_path / "a.pth", tmp_path / "folder")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert type(model) is transformers.RegNetModel
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_folder_in_parts_of_transformers(tmp_path):
    theirs = of_transformers()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for name in ("whole", "parts"):
        regnet_fast.convert_checkpoint(tmp_path / name, tmp_path / f"{name}.safetensors")
    whole, parts = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert same(whole, parts) and same(regnet_fast.convert(whole, "transformers"), theirs.state_dict())


def test_the_configuration_of_transformers_is_kept(tmp_path):
    """Labels and whatever else a folder of transformers says are copied where it is converted to a folder again."""
    of_transformers(id2label={i: f"cat {i}" for i in range(CLASSES)}, hidden_act="silu").save_pretrained(tmp_path / "a")
    regnet_fast.convert_checkpoint(tmp_path / "a", tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert a == b and a["id2label"]["1"] == "cat 1"


def refusals(tmp_path: Path) -> dict:
    """Conversions of files that cannot be: source, destination, layout, error, message."""
    timm_file = tmp_path / "timm.safetensors"
    safetensors.torch.save_file(of_timm().state_dict(), timm_file)
    for name, config in {
        "silu": {"hidden_act": "silu"},
        "early": {"downsample_in_first_stage": False},
        "mismatch": {"depths": [1, 1, 1, 1]},
        "bert": {"model_type": "bert"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        weights = regnet_fast.convert(of_timm().state_dict(), "transformers")
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "regnet", **config}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text("{")
    (tmp_path / "wild").mkdir()
    (tmp_path / "wild" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../timm.safetensors"}}')
    safetensors.torch.save_file(nn.Linear(2, 2).state_dict(), tmp_path / "linear.safetensors")
    (tmp_path / "there.pth").write_text("precious")
    new = tmp_path / "new.safetensors"
    return {
        "another activation": (
            tmp_path / "silu",
            new,
            None,
            CheckpointError,
            "hidden_act='silu', and the RegNets of timm",
        ),
        "no downsampling": (tmp_path / "early", new, "torchvision", CheckpointError, "downsample_in_first_stage=False"),
        "config of another": (
            tmp_path / "mismatch",
            new,
            None,
            CheckpointError,
            r"depths=\[1, 1, 1, 1\], and its weigh",
        ),
        "another type": (tmp_path / "bert", new, None, CheckpointError, "a model of type 'bert', not a RegNet"),
        "no weights": (tmp_path / "empty", new, None, CheckpointError, "holds none of model.safetensors"),
        "damaged config": (tmp_path / "cut", new, None, CheckpointError, "is no JSON"),
        "parts elsewhere": (tmp_path / "wild", new, None, CheckpointError, "does not name the files of the weights"),
        "not there": (tmp_path / "nothing.pth", new, None, FileNotFoundError, "there is no checkpoint file"),
        "another model": (tmp_path / "linear.safetensors", new, None, CheckpointError, "their keys are"),
        "destination there": (timm_file, tmp_path / "there.pth", None, FileExistsError, "exists already"),
        "no folder": (timm_file, tmp_path / "no" / "b.pth", None, FileNotFoundError, "there is no folder"),
        "a file for a folder": (timm_file, new, "transformers", ValueError, "a transformers model is a folder"),
        "a folder for a file": (timm_file, tmp_path / "b", "torchvision", ValueError, r"one file, \.safetensors, \.pt"),
        "unknown layout": (timm_file, new, "keras", ValueError, "unknown layout 'keras'"),
    }


CASES = (
    "another activation", "no downsampling", "config of another", "another type", "no weights", "damaged config",
    "parts elsewhere", "not there", "another model", "destination there", "no folder", "a file for a folder",
    "a folder for a file", "unknown layout",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_written(case, tmp_path):
    cases = refusals(tmp_path)
    assert set(cases) == set(CASES)
    source, destination, to, error, message = cases[case]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        regnet_fast.convert_checkpoint(source, destination, to)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    options = [] if to is None else ["--to", to]
    result = CliRunner().invoke(app, ["convert", str(source), str(destination), *options])
    assert result.exit_code == (2 if error is ValueError else 3), result.output


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    torch.save(of_timm().state_dict(), tmp_path / "a.pth")

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for name, to in (("b.safetensors", "torchvision"), ("folder", "transformers")):
        with pytest.raises(OSError, match="no space"):
            regnet_fast.convert_checkpoint(tmp_path / "a.pth", tmp_path / name, to)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_the_command(tmp_path):
    torch.save(of_torchvision("x").state_dict(), tmp_path / "a.pth")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "a.pth"), str(tmp_path / "folder"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["layout"], found["to"], found["config"]["layer_type"]) == ("torchvision", "transformers", "x")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "folder"), str(tmp_path / "b.safetensors")])
    assert result.exit_code == 0, result.output
    assert "RegNetX with 1, 1, 2, 1 blocks" in " ".join(result.stdout.split())
    assert same(
        regnet_fast.convert(of_torchvision("x").state_dict(), "timm"),
        safetensors.torch.load_file(tmp_path / "b.safetensors"),
    )
