"""Ways to ship a rebuilt model: ONNX files, exported and compiled programs, TorchScript, pickles, other processes."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from helpers import close, randomize_bn, reasons
from timm.layers import GroupNormAct, StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn
from training_blocks import NETWORKS, network_pair
from typer.testing import CliRunner

import regnet_fast
from regnet_fast import export
from regnet_fast.blocks.fused import Fused
from regnet_fast.cli import app

SIZE = (3, 64, 64)
ROOT = Path(__file__).resolve().parent.parent


def small(name="regnet_y"):
    """A small rebuilt network in evaluation mode."""
    return network_pair(name)[0].eval()


def bit():
    """A small BiT: standardised weights, GroupNorm, and a max pool over a border of zeros."""
    config = dict(
        stem_chs=8,
        stem_type="fixed",
        conv_layer=StdConv2d,
        norm_layer=partial(GroupNormAct, num_groups=8),
        num_classes=5,
    )
    model = randomize_bn(ResNetV2((1, 1), (32, 64), **config), 0)
    with torch.no_grad():
        model.stem.conv.weight.sub_(0.01)
    return regnet_fast.rebuild(model).model.eval()


@pytest.fixture
def onnx():
    for name in export.PACKAGES:
        pytest.importorskip(name)
    return pytest.importorskip("onnx")


def run_file(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"input": x.numpy()})]


# ONNX


@pytest.mark.long
@pytest.mark.parametrize("name", [*NETWORKS, "bit"])
def test_onnx_file(name, onnx, tmp_path):
    """It computes what the model computes for any number of images, and the model stays as it was."""
    model = bit() if name == "bit" else small(name)
    model.train()
    found = export.onnx(model, tmp_path / "model.onnx", SIZE)
    assert model.training and any(isinstance(module, Fused) for module in model.modules())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert found.bytes == (tmp_path / "model.onnx").stat().st_size
    assert found.inputs == {"input": ["batch", *SIZE]} and found.outputs == {"output": ["batch", 5]}
    x = torch.randn(5, *SIZE)
    with torch.no_grad():
        close(run_file(tmp_path / "model.onnx", x)[0], model.eval()(x))
    graph = onnx.load(tmp_path / "model.onnx")
    assert [one.version for one in graph.opset_import if not one.domain] == [found.opset]
    convolutions = sum(node.op_type == "Conv" for node in graph.graph.node)
    if name == "repvgg":
        assert convolutions == sum(hasattr(m, "conv_kxk") for m in model.modules())
    if name == "bit":  # its weights are standardised in the file, and no Pad that ONNX Runtime would merge
        assert not {"BatchNormalization", "Pad"} & {node.op_type for node in graph.graph.node}


@pytest.mark.long
def test_a_border_of_zeros_is_not_merged_into_a_max_pool(onnx, tmp_path):
    """ONNX Runtime merges a Pad of zeros into a MaxPool, whose own border is minus infinity."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConstantPad2d((1, 2, 0, 1), 0.0), nn.MaxPool2d(3, 2)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-9.0)
    export.onnx(model, tmp_path / "pool.onnx", (3, 9, 8))
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        close(run_file(tmp_path / "pool.onnx", x)[0], model(x))


@pytest.mark.long
def test_features_and_float16(onnx, tmp_path):
    model = timm.create_model("resnetv2_18", features_only=True, out_indices=(1, 2)).eval()
    model = regnet_fast.rebuild(randomize_bn(model, 0, torch.randn(2, *SIZE))).model.half()
    found = export.onnx(model, tmp_path / "features.onnx", SIZE)
    assert found.outputs == {"output_0": ["batch", 64, 16, 16], "output_1": ["batch", 128, 8, 8]}
    assert all(check.ok for check in found.checks) and len(found.checks) == 2


@pytest.mark.long
def test_onnx_by_torch_alone(onnx, tmp_path):
    """Both of torch's exporters record the host's own forward."""
    model, x = small(), torch.randn(2, *SIZE)
    torch.onnx.export(model, (x,), tmp_path / "new.onnx", input_names=["input"], verbose=False)
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(model, (x,), tmp_path / "old.onnx", dynamo=False, input_names=["input"])
    with torch.no_grad():
        for name in ("new.onnx", "old.onnx"):
            close(run_file(tmp_path / name, x)[0], model(x))


@pytest.mark.parametrize("opset", [7, 17, 999])
def test_opsets_that_cannot_be_written(opset, onnx, tmp_path):
    with pytest.raises(export.ExportError, match=rf"opset {opset} cannot be written.*begins at 18.*ends at \d+"):
        export.onnx(small(), tmp_path / "model.onnx", SIZE, opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_an_opset_that_torch_does_not_keep_is_refused(onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "OPSET", 17)
    with pytest.raises(export.ExportError, match=r"RegNet cannot be written in opset 17; 18 works"):
        export.onnx(small(), tmp_path / "model.onnx", SIZE, opset=17)
    assert not list(tmp_path.iterdir())


def test_a_newer_opset(onnx, tmp_path):
    found = export.onnx(small("repvgg"), tmp_path / "model.onnx", SIZE, opset=20)
    graph = onnx.load(tmp_path / "model.onnx")
    assert found.opset == 20 and [one.version for one in graph.opset_import if not one.domain] == [20]


def test_requests_that_cannot_be_met(onnx, tmp_path, monkeypatch):
    model = small("repvgg")
    with pytest.raises(export.ExportError, match=r"model\.pb' does not end in \.onnx"):
        export.onnx(model, tmp_path / "model.pb", SIZE)
    with pytest.raises(export.ExportError, match="there is no folder"):
        export.onnx(model, tmp_path / "nowhere" / "model.onnx", SIZE)
    with pytest.raises(export.ExportError, match=r"bfloat16.*export the model in float32 or float16"):
        export.onnx(small("repvgg").bfloat16(), tmp_path / "model.onnx", SIZE)

    class Undecided(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(export.ExportError, match="torch cannot export Undecided to ONNX: "):
        export.onnx(Undecided(), tmp_path / "model.onnx", SIZE)
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(export.ExportError, match=r"onnxruntime not installed; pip install 'regnet_fast\[onnx\]'"):
        export.onnx(model, tmp_path / "model.onnx", SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_no_wrong_file_is_left(onnx, tmp_path, monkeypatch):
    shipped = export.shipped_form

    def damaged(model):
        made = shipped(model)
        next(made.parameters())[0].mul_(1.001)
        return made

    monkeypatch.setattr(export, "shipped_form", damaged)
    with pytest.raises(export.WrongFileError, match=r"something else from the file: output: the .* error"):
        export.onnx(small("repvgg"), tmp_path / "model.onnx", SIZE)
    assert not list(tmp_path.iterdir())


def command(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.long
def test_command(onnx, tmp_path):
    checkpoint, file = tmp_path / "weights.pt", tmp_path / "model.onnx"
    model = randomize_bn(timm.create_model("repvgg_a0", num_classes=3)).eval()
    torch.save(model.state_dict(), checkpoint)
    options = ["--checkpoint", checkpoint, "--num-classes", 3, "--size", 32]
    result = command("repvgg_a0", file, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["path"] == str(file) and found["inputs"] == {"input": ["batch", 3, 32, 32]}
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        close(run_file(file, x)[0], model(x))


def test_command_refuses_before_it_loads(onnx, tmp_path, monkeypatch):
    monkeypatch.setattr("regnet_fast.classify.load", lambda *a: pytest.fail("loaded"))
    for arguments, message in (
        (["regnety_002", tmp_path / "a.onnx", "--opset", 11], "opset 11 cannot be written"),
        (["regnety_002", tmp_path / "a.tflite"], "does not end in .onnx"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    monkeypatch.undo()
    result = command("regnety_06", tmp_path / "a.onnx", "--no-pretrained")
    assert result.exit_code == 2 and "regnety_006" in result.stderr


# Other processes


LATE = """
import sys, torch
folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt")
found = {}
found["script"] = torch.jit.load(f"{folder}/script.pt")(x)
found["host program"] = torch.export.load(f"{folder}/host.pt2").module()(x)
assert "regnet_fast" not in sys.modules and "timm" not in sys.modules
model = torch.load(f"{folder}/model.pt", weights_only=False)
assert type(model.s1.b1).__module__ == "regnet_fast.hosts.timm.regnet"
found["model"] = model(x)
import regnet_fast.functional
found["program"] = torch.export.load(f"{folder}/ours.pt2").module()(x)
torch.save({name: y.detach() for name, y in found.items()}, f"{folder}/found.pt")
"""


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_process_that_imports_regnet_fast_late_or_never(tmp_path):
    """Pickles import it, exported programs need its operators, TorchScript and the host's programs need nothing."""
    ours, theirs = (model.eval() for model in network_pair())
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        expected = ours(x)
    batch = {0: torch.export.Dim("batch")}
    torch.save(x, tmp_path / "x.pt")
    torch.save(ours, tmp_path / "model.pt")
    torch.export.save(torch.export.export(ours, (x,), dynamic_shapes=(batch,)), tmp_path / "ours.pt2")
    torch.export.save(torch.export.export(theirs, (x,), dynamic_shapes=(batch,)), tmp_path / "host.pt2")
    torch.jit.script(theirs).save(tmp_path / "script.pt")
    code = [sys.executable, "-W", "ignore", "-c", LATE, str(tmp_path)]
    subprocess.run(code, cwd=ROOT, check=True, capture_output=True, timeout=500)
    found = torch.load(tmp_path / "found.pt")
    assert set(found) == {"script", "host program", "model", "program"}
    for y in found.values():
        close(y, expected)


class Features(torch.utils.data.Dataset):
    """A dataset that runs a model on what it loads, in the process of its worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, index):
        x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, *SIZE) * (index + 1)
        return self.model(x)[0], reasons(self.model, x) == {None}


@pytest.mark.long
def test_spawned_workers():
    model = small()
    dataset = Features(model)
    dataset[0]  # with weights packed here, which do not travel
    loader = torch.utils.data.DataLoader(dataset, 2, num_workers=1, multiprocessing_context="spawn")
    for batch, (y, fused) in enumerate(loader):
        assert fused.all()
        close(y, torch.stack([dataset[2 * batch + i][0] for i in range(2)]))
    assert batch == 1


# Compiled ahead of time


COMPILED = """
import sys, torch
folder, which = sys.argv[1:]
if which == "ours":
    import regnet_fast.functional
compiled = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
torch.save([compiled(x) for x in torch.load(f"{folder}/x.pt")], f"{folder}/found.pt")
assert which == "ours" or not {"regnet_fast", "timm"} & set(sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("which", ["ours", "host"])
def test_aot_inductor(which, tmp_path):
    """Compiled here, and run in another process: ours with its operators, the host's blocks with torch alone."""
    model = small()
    images = [torch.randn(batch, *SIZE) for batch in (2, 1, 5)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    if which == "host":
        regnet_fast.restore(model)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (images[0],), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    torch.save(images, tmp_path / "x.pt")
    code = [sys.executable, "-W", "ignore", "-c", COMPILED, str(tmp_path), which]
    subprocess.run(code, cwd=ROOT, check=True, capture_output=True, timeout=500)
    for y, e in zip(torch.load(tmp_path / "found.pt"), expected, strict=True):
        close(y.detach(), e)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("flag", ["scriptable", "exportable"])
def test_scriptable_and_exportable_models(flag):
    model = regnet_fast.create_model("resnetv2_18", **{flag: True}).eval()
    randomize_bn(model, 0)
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        made = torch.jit.script(model) if flag == "scriptable" else torch.export.export(model, (x,)).module()
        close(made(x), regnet_fast.rebuild(model).model(x))
