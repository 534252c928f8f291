"""What `explain` says of every layer in evaluation, and of what runs both ways in a training step, or why not."""

import copy

import pytest
import timm
import torch
from helpers import randomize_bn
from timm.layers import SEModule
from timm.models.byobnet import LayerFn, RepVggBlock
from torch import nn
from training_blocks import network_pair

import regnet_fast
from bench.roofline.model import work
from regnet_fast.backends import backend, cpu_library
from regnet_fast.backends.cuda.launcher import standing_in
from regnet_fast.backends.cuda.plans import Target

SIZE = (2, 3, 64, 64)
FAMILIES = {
    "regnetx_002": ("s1.b1", "head"),
    "regnety_002": ("s1.b1", "head"),
    "regnetz_005": ("final_conv", "head"),
    "regnetv_040": ("s1.b1", "stem"),
    "repvgg_a0": ("stages.0.0", "head"),
    "resnetv2_18": ("stages.0.blocks.0", "stem"),
}
"""By model, a layer that is fused in training and one that is not."""


def explained(model, size=SIZE, **options):
    return {row.layer: row for row in regnet_fast.explain(model, size, **options)}


# Evaluation


def test_every_launch_is_counted_once():
    units = explained(regnet_fast.create_model("resnetv2_50d_gn"), (1, 3, 64, 64))
    assert len(units["stages.0.blocks.0.conv2"].launches) == 3  # the convolution, the norm in one pass, the activation
    assert units["stages.0.blocks.0.conv2 norm"].launches == ()
    assert any("max_pool" in kernel.name for kernel in units["stem.conv3"].launches)  # a stem's own last layer
    assert all(row.bytes == sum(kernel.bytes for kernel in row.launches) for row in units.values())


def test_the_gate_behind_squeeze_excite_is_counted():
    model = regnet_fast.rebuild(nn.Sequential(RepVggBlock(16, 16, layers=LayerFn(attn=SEModule)))).model
    rows = explained(model, (1, 16, 8, 8))
    assert list(rows) == ["0.conv_kxk", "0.attn", "0.act"]
    kernels = [kernel.name for kernel in rows["0.act"].launches]
    assert kernels == ["norm_act"]
    with backend("aten"):
        rows = explained(model, (1, 16, 8, 8))
    kernels = [kernel.name for kernel in rows["0.act"].launches]
    assert kernels == ["mul", "addcmul", "relu"]  # the gate by the scale, which is one; the map; the activation


def test_without_a_classifier():
    rows = regnet_fast.explain(regnet_fast.create_model("regnetx_002", num_classes=0), (1, 3, 32, 32))
    assert rows[-1].layer == "s4.b7.conv3.conv" and all(row.launches for row in rows)


def test_nothing_to_explain():
    for train in (False, True):
        assert regnet_fast.explain(nn.Identity(), (1, 3, 8, 8), train) == []


def test_the_hosts_own_modules_are_counted():
    rows = regnet_fast.explain(timm.create_model("resnet10t"), (1, 3, 64, 64))
    assert all(row.operation == "host" and row.launches for row in rows)
    with torch.device("meta"):
        recorded = timm.create_model("resnet10t")
    assert sum(row.flops for row in rows) == work(recorded, (1, 3, 64, 64))["flops"]


def test_a_block_that_is_left_to_the_host_is_counted():
    model = regnet_fast.create_model("regnetx_002")
    whole = explained(model)["s1.b1.conv2.conv"]
    model.s1.b1.conv2.register_forward_hook(lambda *_: None)
    row = explained(model)["s1.b1"]
    assert (row.operation, row.reason) == ("host", "a hook is registered on conv2")
    names = [kernel.name for kernel in row.launches]
    assert names.count("convolution") == 4 and len(names) > 8  # with norms and activations
    assert row.flops > whole.flops > 0 and row.shape.endswith("-> 2x24x16x16")


def test_a_forward_that_depends_on_data():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) if x.sum().item() else x

    (row,) = regnet_fast.explain(Picky(), (1, 3, 8, 8))
    assert row.layer == "conv" and row.flops == 2 * 64 * 3 * 4


# A training step


@pytest.mark.parametrize("name", FAMILIES)
def test_what_runs_both_ways(name):
    fused, host = FAMILIES[name]
    rows = explained(regnet_fast.create_model(name), train=True)
    one, other = rows[fused], rows[host]
    passes = "torch" if cpu_library.refuse("passes") else "csrc/cpu"
    assert one.label == one.backward == f"oneDNN convolutions, {passes} passes"
    assert one.backend == "aten" and one.operation != "host" and one.shape.startswith("2x")
    assert one.reason == (cpu_library.refuse("passes") or "")
    assert other.operation == other.backend == "host" and other.backward == "torch autograd" and other.reason
    assert next(iter(rows)) == "stem" and list(rows)[-1] == "head"


def blocks_of(rows, reason):
    return [row.layer for row in rows.values() if row.operation == "host" and reason in row.reason]


def test_why_a_block_is_not_fused():
    model = regnet_fast.create_model("regnety_002").train()
    model.s1.b1.conv2.register_forward_hook(lambda *_: None)
    model.s2.b1.conv3.conv = nn.utils.parametrizations.weight_norm(model.s2.b1.conv3.conv)
    model.s3.b1.conv1.conv = nn.Conv2d(56, 152, 1)
    with pytest.warns(regnet_fast.FallbackWarning):
        rows = explained(model, train=True)
    assert blocks_of(rows, "a hook is registered on conv2") == ["s1.b1"]
    assert rows["s2.b1"].operation == "host" and rows["s2.b1"].reason
    assert blocks_of(rows, "conv1.conv has a bias") == ["s3.b1"]
    assert blocks_of(rows, "ClassifierHead has no fused form in training mode") == ["head"]
    assert {rows[layer].backward for layer in ("s1.b1", "s2.b1", "s3.b1", "head")} == {"torch autograd"}
    groups = explained(regnet_fast.create_model("resnetv2_50d_gn"), train=True)
    assert blocks_of(groups, "no fused form in training mode")[0] == "stem"


def test_a_norm_that_is_left_in_evaluation_stays():
    model = regnet_fast.create_model("regnetx_002").train()
    norm = model.s1.b1.conv1.bn.eval()
    before = norm.running_mean.clone()
    row = explained(model, train=True)["s1.b1"]
    assert row.operation == "Bottleneck" and not norm.training
    assert torch.equal(norm.running_mean, before)


def test_what_needs_no_gradient_has_no_backward():
    model = regnet_fast.create_model("regnetx_002")
    for part in (model.stem, model.s1):
        part.requires_grad_(False)
    rows = explained(model, train=True)
    assert rows["stem"].backward == rows["s1.b1"].backward == ""
    assert rows["s2.b1"].backward and rows["head"].backward
    rows = explained(model.requires_grad_(False), train=True)
    assert not any(row.backward for row in rows.values())


def test_other_dtypes_and_backends():
    model, _ = network_pair()
    row = explained(model.bfloat16(), train=True)["s1.b1"]
    assert row.label == "oneDNN convolutions, torch passes" and "float32 maps on a CPU" in row.reason
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert explained(model, train=True)["s1.b1"].label == row.label
    with backend("aten"):
        row = explained(model, train=True)["s1.b1"]
        assert (row.backend, row.label, row.reason) == ("aten", "oneDNN convolutions, torch passes", "")
    with backend("reference"):
        rows = explained(model, train=True)
    assert {row.operation for row in rows.values()} == {"host"}
    assert rows["s1.b1"].reason == "the reference of a training step is the host's own forward"


def test_csrc_beside_another_backend():
    model, _ = network_pair()
    with standing_in(lambda launch, tensors: None, Target(90, 3)), backend("cuda,aten"):
        rows = explained(model.bfloat16(), train=True)
    assert rows["s1.b1"].label == "oneDNN convolutions, torch passes"  # of one group
    assert rows["s2.b1"].backend == "cuda,aten"
    assert rows["s2.b1"].label == "CUDA C++ grouped convolutions; else oneDNN convolutions, torch passes"
    assert rows["stem"].label == "oneDNN convolutions, torch passes"


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["regnety_002", "repvgg_a0", "resnetv2_18"])
def test_the_model_is_as_it_was(name, train):
    model = regnet_fast.create_model(name, drop_path_rate=0.5 if name == "regnety_002" else 0.0)
    randomize_bn(model, 0)
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    parameters[0].grad = given = torch.ones_like(parameters[0])
    called = []
    parameters[1].register_post_accumulate_grad_hook(lambda p: called.append(p))
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    facts = [(p.data_ptr(), p._version, p.requires_grad) for p in parameters]
    modes = [module.training for module in model.modules()]
    state, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    regnet_fast.explain(model, SIZE, train)
    assert torch.equal(torch.get_rng_state(), numbers) and not called
    assert [module.training for module in model.modules()] == modes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [(p.data_ptr(), p._version, p.requires_grad) for p in parameters] == facts
    assert parameters[0].grad is given and torch.equal(given, torch.ones_like(given))
    assert all(p.grad is None for p in parameters[1:])
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_model_stays_frozen(train):
    model = regnet_fast.freeze(regnet_fast.create_model("regnetx_002").eval())
    regnet_fast.explain(model, SIZE, train)
    assert model.stem.is_frozen and model.s1.b1.is_frozen and not model.training


def test_without_gradients_around():
    model = regnet_fast.create_model("regnetx_002")
    for around in (torch.no_grad(), torch.inference_mode()):
        with around:
            assert explained(model, train=True)["s1.b1"].backward
    assert all(p.grad is None for p in model.parameters())


def test_a_mode_is_restored_where_the_step_fails():
    model = regnet_fast.create_model("regnetx_002").eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        regnet_fast.explain(model, (1, 3, 32, 32), train=True)
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_norm_with_its_activation_is_one_row():
    model = regnet_fast.create_model("resnetv2_18", pretrained=False).eval()
    (row,) = (row for row in regnet_fast.explain(model, (1, 3, 64, 64)) if row.layer.startswith("norm"))
    assert (row.layer, row.operation, row.label) == ("norm", "host", "BatchNormAct2d")
    assert [kernel.name for kernel in row.launches][-1] == "relu" and len(row.launches) == 2


def test_a_layer_that_the_program_would_take_in_is_told():
    """And none that its program has not."""
    model = regnet_fast.create_model("regnetv_040", num_classes=10).eval()

    def told():
        rows = [row for row in regnet_fast.explain(model, (1, 3, 64, 64)) if row.backend == "host"]
        return {row.layer: "may be a step of the network's program" in row.reason for row in rows}

    assert told() == {"stem": True, "final_conv": True}
    model.final_conv = torch.nn.GELU()
    assert told() == {"stem": True, "final_conv": False}


@pytest.mark.parametrize(
    ("name", "by_torch"),
    [
        ("seresnext26t_32x4d", {"linear"}),
        ("ecaresnet26t", {"channel_conv", "linear"}),
        ("efficientnetv2_rw_t", {"linear"}),
        ("tf_mobilenetv3_small_minimal_100", {"linear"}),
    ],
)
def test_every_kind_of_unit_has_a_row(name, by_torch):
    """Where no program serves; the sums and gates that torch computes as well."""
    model = regnet_fast.create_model(name).eval()
    with backend("aten"):
        rows = regnet_fast.explain(model, (1, 3, 64, 64))
    assert {row.operation for row in rows if row.backend == "torch"} == by_torch
    assert ("join" in {row.operation for row in rows}) == (not name.startswith("tf_"))
    assert all(row.shape and row.label for row in rows)
