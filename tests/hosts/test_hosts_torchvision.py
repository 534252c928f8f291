"""RegNets of torchvision, rebuilt: numbers of every stage, training, and what is left to torchvision."""

import copy
import json
import pickle

import pytest
import torch
import torchvision.models.regnet as host
from helpers import close, reasons
from regnets import BLOCKS, assert_same_function, assert_trains_alike, of_torchvision, with_statistics
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d
from typer.testing import CliRunner

import regnet_fast
from regnet_fast.blocks.fused import FallbackWarning, Fused
from regnet_fast.cli import app

pytestmark = pytest.mark.usefixtures("no_silent_fallback", "one_thread")

DTYPES = [torch.float32, torch.bfloat16]
NAMES = [name for name in sorted(host.__all__) if name.startswith("regnet_")]
QUICK = ("regnet_x_400mf", "regnet_y_400mf")
TOO_LARGE = ("regnet_y_128gf",)  # 2.6 GB of weights, three times over and in float64


def stages(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the stem, every stage and the classifier return."""
    found = {"stem": model.stem(x)}
    y = found["stem"]
    for name, stage in model.trunk_output.named_children():
        found[name] = y = stage(y)
    return {**found, "logits": model(x)}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU], ids=["relu", "silu"])
@pytest.mark.parametrize("kind", ["x", "y"])
def test_every_stage(kind, activation, dtype):
    model = of_torchvision(kind, activation=activation)
    assert_same_function(model, torch.randn(3, 3, 65, 71).to(dtype), stages, f"{kind} {activation.__name__}")


def assert_same_architecture(name: str) -> None:
    torch.manual_seed(0)
    model = with_statistics(getattr(host, name)(), 0)
    assert_same_function(model, torch.randn(2, 3, 64, 96), stages, name)


@pytest.mark.parametrize("name", QUICK)
def test_the_smallest_architectures(name):
    assert_same_architecture(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK + TOO_LARGE])
def test_every_architecture(name, two_threads):
    assert_same_architecture(name)


@pytest.mark.parametrize("kind", ["x", "y"])
def test_training_step(kind):
    model = of_torchvision(kind, activation=nn.SiLU)
    assert_trains_alike(model, lambda model, x, target: F.cross_entropy(model(x), target))


def test_gradient_in_evaluation():
    theirs = of_torchvision()
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(2, 3, 64, 64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)


@pytest.mark.parametrize("training", [False, True])
def test_frozen_norms(training):
    """torchvision's FrozenBatchNorm2d is the same map in both modes, and is folded like another."""
    theirs = of_torchvision(norm_layer=FrozenBatchNorm2d)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(2, 3, 64, 64)
    assert reasons(copy.deepcopy(ours).train(training), x) == {None}
    found = [model.train(training)(x) for model in (ours, theirs)]
    close(*found)
    for logits in found:
        logits.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a.grad, b.grad)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_group_norm_runs_between_fused_convolutions():
    model = of_torchvision(norm_layer=lambda channels: nn.GroupNorm(4, channels))
    assert_same_function(model, torch.randn(2, 3, 64, 64), stages, "GroupNorm")


def test_another_activation_is_left_to_torchvision():
    theirs = of_torchvision(activation=nn.Mish)
    ours = copy.deepcopy(theirs)
    report = regnet_fast.rebuild(ours)
    assert not report.rebuilt and len(report.kept) == BLOCKS
    assert all("Mish, which has no fused form" in reason for _, _, reason in report.kept)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


def test_a_block_of_ones_own_is_left_as_it_is():
    class Halved(host.ResBottleneckBlock):
        def forward(self, x):
            return super().forward(x) / 2

    theirs = of_torchvision(block_type=Halved)
    ours = copy.deepcopy(theirs)
    report = regnet_fast.rebuild(ours)
    rebuilt = dict(report.rebuilt)
    assert rebuilt.pop("stem") and {*rebuilt.values()} == {"Conv2dNormActivation"}, "only what stands in the blocks"
    reason = "it is derived from ResBottleneckBlock and may compute something else"
    assert {(kind, why) for _, kind, why in report.kept} == {("Halved", reason)} and len(report.kept) == BLOCKS - 1
    x = torch.randn(2, 3, 64, 64)
    close(ours(x), theirs(x))


def test_one_block_in_two_places():
    theirs = of_torchvision()
    stage = theirs.trunk_output.block3
    stage.append(stage[1])
    ours = copy.deepcopy(theirs)
    assert len(regnet_fast.rebuild(ours).rebuilt) == BLOCKS
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(ours(x), theirs(x))
        assert (theirs(x) - of_torchvision()(x)).abs().max() > 1e-3, "the second call makes a difference"


def test_rebuilt_twice_frozen_copied_pickled_and_restored():
    theirs = of_torchvision()
    x = torch.randn(2, 3, 64, 64)
    expected = theirs(x).detach()
    ours = copy.deepcopy(theirs)
    regnet_fast.rebuild(ours)
    again = regnet_fast.rebuild(ours)
    assert not again.rebuilt and not again.kept
    assert list(ours.state_dict()) == list(theirs.state_dict())
    regnet_fast.freeze(ours)
    with torch.no_grad():
        for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert sum(isinstance(module, Fused) for module in model.modules()) == BLOCKS
            close(model(x), expected)
    regnet_fast.restore(ours)
    assert {type(a) for a in ours.modules()} == {type(b) for b in theirs.modules()}
    assert torch.equal(ours(x), expected)


@pytest.mark.long
def test_compiled_before_it_is_rebuilt(fresh_compiler):
    theirs = of_torchvision()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        model = torch.compile(copy.deepcopy(theirs), backend="eager")
        close(model(x), expected)
        assert len(regnet_fast.rebuild(model).rebuilt) == BLOCKS
        close(model(x), expected)


def test_feature_extractors_trace_torchvisions_own_forward():
    theirs = of_torchvision()
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    x = torch.randn(2, 3, 64, 64)
    found = [create_feature_extractor(m, ["trunk_output.block2", "fc"])(x) for m in (ours, theirs)]
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        close(found[0][name], found[1][name])


def test_explained():
    model = regnet_fast.rebuild(of_torchvision()).model
    rows = regnet_fast.explain(model, (1, 3, 64, 64))
    names = [row.layer for row in rows if row.operation != "host"]
    assert names[0] == "stem.0" and "trunk_output.block3.block3-1.f.se" in names
    assert [(row.layer, row.operation) for row in rows[-2:]] == [("avgpool", "host"), ("fc", "host")]
    theirs = regnet_fast.explain(of_torchvision(), (1, 3, 64, 64))
    assert sum(len(row.launches) for row in theirs) > sum(len(row.launches) for row in rows)
    kept = regnet_fast.explain(of_torchvision(activation=nn.Mish), (1, 3, 64, 64))
    assert {row.operation for row in kept} == {"host"} and "Mish" in kept[0].reason


def test_by_name_on_the_command_line():
    def run(*arguments):
        return CliRunner().invoke(app, [*arguments, "--json"])

    result = run("verify", "torchvision:regnet_y_400mf", "--size", "64")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["verifications"]
    assert found["rebuilt"] == 17 and [check["stage"] for check in found["checks"]] == ["logits"]
    result = run("explain", "torchvision:regnet_y_400mf", "--size", "64")
    assert json.loads(result.stdout)["totals"]["layers_by_backend"]["host"] == 2
    result = run(
        "compare", "torchvision:regnet_x_400mf", "--size", "32", "--rounds", "1", "--no-compile", "--no-runtimes"
    )
    assert json.loads(result.stdout)["cases"][0]["correct"]
    result = run("verify", "torchvision:regnet_y_40mf")
    assert result.exit_code == 2 and "Close: regnet_y_400mf" in result.stderr


def test_a_changed_layer_is_noticed():
    ours = regnet_fast.rebuild(of_torchvision()).model
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours(x)
        ours.trunk_output.block1[0].f.a[2] = nn.Mish()
        with pytest.warns(FallbackWarning, match=r"f\.a\.2 is Mish"):
            found = ours(x)
        close(found, regnet_fast.restore(ours)(x))
