"""Checkpoints in models: what loads, what does not fit, and that a refusal changes nothing."""

import re

import numpy as np
import pytest
import timm
import torch
from checkpoint_files import (
    assert_equal_states,
    assert_unchanged,
    bit_archive,
    is_deployed,
    original_keys,
    output,
    regnet,
    save,
    seer_checkpoint,
    snapshot,
    tiny_bit,
    tiny_repvgg,
)
from helpers import randomize_bn
from timm.models.byobnet import RepVggBlock
from timm.utils import reparameterize_model

from regnet_fast.weights import CheckpointError, load_checkpoint, pretrained_overlay

# RepVGG


def test_original_repvgg_a0_loads_bit_exactly(tmp_path):
    source, model = regnet("repvgg_a0", seed=1), regnet("repvgg_a0", seed=2)
    path = save(tmp_path / "RepVGG-A0-train.pth", original_keys(source.state_dict()))
    load_checkpoint(model, path)
    assert_equal_states(model, source.state_dict())
    assert torch.equal(output(model), output(source))


def test_original_d2se_loads_bit_exactly(tmp_path):
    source, model = tiny_repvgg("repvgg_d2se", seed=1), tiny_repvgg("repvgg_d2se", seed=2)
    assert any(".se." in key for key in original_keys(source.state_dict()))
    load_checkpoint(
        model, save(tmp_path / "x.pth", {"module." + k: v for k, v in original_keys(source.state_dict()).items()})
    )
    assert_equal_states(model, source.state_dict())
    assert torch.equal(output(model), output(source))


class SubclassedBlock(RepVggBlock):
    """Stands for a rebuilt block."""


@pytest.mark.parametrize("keys", [dict, original_keys])
@pytest.mark.parametrize("variant", ["repvgg_a0", "repvgg_d2se"])
def test_deployed_file_deploys_the_model(tmp_path, variant, keys):
    source, model = tiny_repvgg(variant, seed=1), tiny_repvgg(variant, seed=2)
    for module in model.modules():
        if type(module) is RepVggBlock:
            module.__class__ = SubclassedBlock
    deployed = reparameterize_model(source)
    path = save(tmp_path / "deploy.pth", keys(deployed.state_dict()))
    result = load_checkpoint(model, path)
    assert not result.missing_keys and not result.unexpected_keys
    assert is_deployed(model)
    assert isinstance(model.stem, SubclassedBlock)
    state = model.state_dict()
    assert state.keys() == deployed.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in deployed.state_dict().items())
    assert torch.equal(output(model), output(deployed))
    torch.testing.assert_close(output(model), output(source), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [dict, original_keys])
@pytest.mark.parametrize("variant", ["repvgg_a0", "repvgg_d2se"])
def test_training_file_is_folded_into_a_deployed_model(tmp_path, variant, keys):
    source, model = tiny_repvgg(variant, seed=1), reparameterize_model(tiny_repvgg(variant, seed=2))
    load_checkpoint(model, save(tmp_path / "x.pth", keys(source.state_dict())))
    assert is_deployed(model)
    torch.testing.assert_close(output(model), output(source), atol=1e-5, rtol=1e-5)
    exact = reparameterize_model(source.double()).float().state_dict()
    assert all(torch.equal(value, exact[key]) for key, value in model.state_dict().items())


def test_same_form_loads_plainly_when_deployed(tmp_path):
    source, model = (reparameterize_model(tiny_repvgg(seed=seed)) for seed in (1, 2))
    load_checkpoint(model, save(tmp_path / "x.safetensors", source.state_dict()))
    assert_equal_states(model, source.state_dict())


def test_loading_draws_no_random_numbers_unless_it_deploys(tmp_path):
    for model in (tiny_repvgg(), reparameterize_model(tiny_repvgg())):
        path = save(tmp_path / "x.pth", tiny_repvgg(seed=1).state_dict())
        before = torch.get_rng_state()
        load_checkpoint(model, path)
        assert torch.equal(torch.get_rng_state(), before)


# Other libraries


def test_torchvision_regnet(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(1)
    source = randomize_bn(torchvision.models.regnet_y_400mf(), 1).eval()
    model = regnet("regnety_004", seed=2)
    load_checkpoint(model, save(tmp_path / "regnet_y_400mf.pth", source.state_dict()))
    assert torch.equal(model.s1.b1.conv2.conv.weight, source.trunk_output.block1[0].f.b[0].weight)
    torch.testing.assert_close(output(model), output(source), atol=1e-5, rtol=1e-5)


def test_seer_regnet(tmp_path):
    source, model = regnet("regnety_002", seed=1), regnet("regnety_002", seed=2)
    load_checkpoint(model, save(tmp_path / "seer.torch", seer_checkpoint(source.state_dict())))
    assert_equal_states(model, source.state_dict())
    assert torch.equal(output(model), output(source))


def test_bit_archive(tmp_path):
    source, model = tiny_bit(1), tiny_bit(2)
    np.savez(tmp_path / "bit.npz", **bit_archive(source))
    assert load_checkpoint(model, tmp_path / "bit.npz") is None
    assert_equal_states(model, source.state_dict())
    assert torch.equal(output(model), output(source))


def test_numpy_archive_for_a_model_without_a_reader(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match=r"RegNet regnetx_002 has no load_pretrained"):
        load_checkpoint(regnet(), tmp_path / "x.npz")


# The same as timm


@pytest.mark.parametrize("strict", [True, False])
def test_agrees_with_timm(tmp_path, strict):
    state = regnet(seed=1).state_dict()
    if not strict:
        del state["head.fc.weight"]
        state["extra"] = torch.ones(2)
    path = save(tmp_path / "x.pth", {"state_dict": state})
    ours, theirs = regnet(seed=2), regnet(seed=2)
    result = load_checkpoint(ours, path, strict=strict)
    assert result == timm.models.load_checkpoint(theirs, str(path), strict=strict)
    assert result.missing_keys == ([] if strict else ["head.fc.weight"])
    assert_equal_states(ours, theirs.state_dict())


@pytest.mark.parametrize("change", [lambda key, t: None, lambda key, t: t.reshape(1)], ids=["absent", "vector"])
def test_old_batch_counts_load(tmp_path, change):
    state = {}
    for key, value in regnet(seed=1).state_dict().items():
        value = change(key, value) if key.endswith("num_batches_tracked") else value
        state.update({} if value is None else {key: value})
    ours, theirs = regnet(seed=2), regnet(seed=2)
    path = save(tmp_path / "x.pth", state)
    load_checkpoint(ours, path)
    timm.models.load_checkpoint(theirs, str(path))
    assert_equal_states(ours, theirs.state_dict())


def test_frozen_batch_norm_takes_a_full_checkpoint(tmp_path):
    path = save(tmp_path / "x.pth", regnet(seed=1).state_dict())
    model = timm.layers.freeze_batch_norm_2d(regnet(seed=2))
    assert not any(key.endswith("num_batches_tracked") for key in model.state_dict())
    load_checkpoint(model, path)
    assert torch.equal(output(model), output(timm.layers.freeze_batch_norm_2d(regnet(seed=1))))


def test_values_take_the_models_dtype(tmp_path):
    source, model = tiny_repvgg(seed=1), reparameterize_model(tiny_repvgg(seed=2)).bfloat16()
    load_checkpoint(model, save(tmp_path / "x.pth", source.state_dict()))
    expected = reparameterize_model(source.double()).bfloat16().state_dict()
    assert_equal_states(model, {key: expected[key] for key in model.state_dict()})
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


# What does not fit


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


def deployed_state(seed=1, **kwargs):
    return reparameterize_model(tiny_repvgg(seed=seed, **kwargs)).state_dict()


MISFITS = {
    "missing": lambda: without(tiny_repvgg(seed=1).state_dict(), "stages.3.1.conv_kxk.bn.bias"),
    "shape": lambda: {**tiny_repvgg(seed=1).state_dict(), "stages.3.1.conv_kxk.bn.bias": torch.ones(3)},
    "sparse": lambda: {**tiny_repvgg(seed=1).state_dict(), "head.fc.bias": torch.ones(7).to_sparse()},
    "complex": lambda: {**tiny_repvgg(seed=1).state_dict(), "head.fc.bias": torch.ones(7) * 1j},
    "quantized": lambda: {
        **tiny_repvgg(seed=1).state_dict(),
        "head.fc.bias": torch.quantize_per_tensor(torch.ones(7), 0.1, 0, torch.qint8),
    },
    "deployed, missing": lambda: without(deployed_state(), "stages.3.1.reparam_conv.bias"),
    "deployed, shape": lambda: {**deployed_state(), "stages.3.1.reparam_conv.weight": torch.ones(3)},
    "deployed, classes": lambda: deployed_state(num_classes=3),
    "deployed, extra": lambda: {**deployed_state(), "extra": torch.ones(3)},
    "original, missing": lambda: original_keys(without(tiny_repvgg(seed=1).state_dict(), "head.fc.bias")),
    "original, extra": lambda: {**original_keys(tiny_repvgg(seed=1).state_dict()), "extra": torch.ones(3)},
    "another variant": lambda: tiny_repvgg("repvgg_d2se", seed=1).state_dict(),
    "another model": lambda: regnet().state_dict(),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("deployed", [False, True], ids=["training", "deployed"])
@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*TypedStorage", "ignore:Validating sparse")
def test_misfit_changes_nothing(tmp_path, misfit, deployed):
    model = tiny_repvgg(seed=2)
    if deployed:
        model = reparameterize_model(model)
    path = save(tmp_path / "x.pth", MISFITS[misfit]())
    before = snapshot(model)
    with pytest.raises(CheckpointError):
        load_checkpoint(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("fails", ["sixth block", "write"])
def test_failure_while_deploying_restores_the_structure(tmp_path, monkeypatch, fails):
    model = tiny_repvgg("repvgg_d2se", seed=2)
    path = save(tmp_path / "x.pth", reparameterize_model(tiny_repvgg("repvgg_d2se", seed=1)).state_dict())
    before, done = snapshot(model), []
    reparameterize = RepVggBlock.reparameterize

    def failing(block):
        if fails == "sixth block" and len(done) == 5:
            raise KeyboardInterrupt
        reparameterize(block)
        done.append(block)

    def failing_write(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(RepVggBlock, "reparameterize", failing)
    if fails == "write":
        monkeypatch.setattr(model, "load_state_dict", failing_write)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(model, path)
    monkeypatch.undo()
    assert len(done) == (5 if fails == "sixth block" else 9)
    assert_unchanged(model, before)
    assert not is_deployed(model)
    load_checkpoint(model, path)
    assert is_deployed(model)


def test_classifier_of_other_size_names_what_works(tmp_path):
    source = regnet(seed=1, num_classes=10)
    path = save(tmp_path / "x.pth", source.state_dict())
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(regnet(seed=2, num_classes=4), path)
    message = str(error.value)
    assert "head.fc.weight is (10, 368) in the file, (4, 368) in the model" in message
    assert "264 of its 266 keys match" in message
    assert "with num_classes=10" in message
    model = regnet(seed=2, num_classes=10)
    load_checkpoint(model, path)
    assert_equal_states(model, source.state_dict())

    call = re.search(r"create_model\(\.\.\., (.*\))\)\.", message)
    model = eval(f"timm.create_model('regnetx_002', {call[1]})", {"timm": timm, "dict": dict})
    assert model.head.fc.out_features == 4
    assert torch.equal(model.s4.b7.conv3.conv.weight, source.s4.b7.conv3.conv.weight)


def test_input_channels_of_other_number_name_what_works(tmp_path):
    source = tiny_repvgg(seed=1, in_chans=1)
    for state in (source.state_dict(), reparameterize_model(source).state_dict()):
        path = save(tmp_path / "x.pth", state)
        with pytest.raises(CheckpointError, match=r"is \(16, 1, [13], [13]\) in the file, \(16, 3, ") as error:
            load_checkpoint(tiny_repvgg(seed=2), path)
        assert "create the model with in_chans=1" in str(error.value)
        model = tiny_repvgg(seed=2, in_chans=1)
        load_checkpoint(model, path)
        torch.testing.assert_close(output(model, 1), output(source, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("file", "model", "advice"), [(5, 0, "with num_classes=5"), (0, 5, "with num_classes=0")])
def test_classifier_on_one_side_only(tmp_path, file, model, advice):
    source, target = tiny_repvgg(seed=1, num_classes=file), tiny_repvgg(seed=2, num_classes=model)
    path = save(tmp_path / "x.pth", source.state_dict())
    with pytest.raises(CheckpointError, match=rf"{advice}, or load with strict=False"):
        load_checkpoint(target, path)
    load_checkpoint(target, path, strict=False)
    assert torch.equal(target.stem.conv_kxk.conv.weight, source.stem.conv_kxk.conv.weight)


@pytest.mark.parametrize(
    ("make", "looks"),
    [
        (lambda: regnet("regnety_002"), "a timm RegNet, of another size"),
        (lambda: tiny_repvgg(), "a RepVGG in training form."),
        (lambda: reparameterize_model(tiny_repvgg()), "a deployed (reparameterised) RepVGG."),
        (lambda: timm.create_model("resnetv2_18"), "a timm ResNetV2."),
        (lambda: timm.create_model("resnet18"), "a ResNet."),
    ],
)
def test_checkpoint_of_another_model_is_recognised(tmp_path, make, looks):
    model = regnet("regnetx_008")
    path = save(tmp_path / "x.pth", make().state_dict())
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path)
    message = str(error.value)
    assert re.search(r"into RegNet regnetx_008: \d+ of its \d+ keys match\. It is unchanged\.", message)
    assert re.search(r"missing from the file \(\d+\): \S+, \S+, \S+, \S+, \.\.\.", message)
    assert f"The file looks like {looks}" in message
    assert_unchanged(model, before)


def test_strict_false_still_refuses_what_cannot_be_meant(tmp_path):
    model = tiny_repvgg(seed=2)
    before = snapshot(model)
    for state in ({"other": torch.ones(3)}, {**model.state_dict(), "head.fc.bias": torch.ones(3)}):
        with pytest.raises(CheckpointError):
            load_checkpoint(model, save(tmp_path / "x.pth", state), strict=False)
        assert_unchanged(model, before)

    model = reparameterize_model(model)
    before = snapshot(model)
    path = save(tmp_path / "x.pth", without(tiny_repvgg().state_dict(), "stages.1.1.identity.weight"))
    with pytest.raises(CheckpointError, match=r"identity\.weight"):
        load_checkpoint(model, path, strict=False)
    assert_unchanged(model, before)


# As pretrained weights


def test_original_repvgg_as_pretrained_weights(tmp_path):
    source = regnet("repvgg_a0", seed=1)
    path = save(tmp_path / "RepVGG-A0-train.pth", original_keys(source.state_dict()))
    given = {"file": str(path), "crop_pct": 0.9}
    overlay = pretrained_overlay(given)
    assert given == {"file": str(path), "crop_pct": 0.9}
    assert set(overlay) == {"state_dict", "crop_pct"}

    model = timm.create_model("repvgg_a0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(output(model), output(source))

    model = timm.create_model(
        "repvgg_a0", pretrained=True, pretrained_cfg_overlay=pretrained_overlay(given), in_chans=1, num_classes=10
    )
    weight = source.stem.conv_kxk.conv.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.conv_kxk.conv.weight, weight)
    assert model.head.fc.out_features == 10
    assert torch.equal(model.stages[3][0].conv_1x1.conv.weight, source.stages[3][0].conv_1x1.conv.weight)


def test_overlay_that_timm_reads_is_returned_as_it_is(tmp_path):
    path = save(tmp_path / "x.safetensors", tiny_repvgg().state_dict())
    for overlay in (
        None,
        {},
        {"num_classes": 10},
        {"file": path},
        {"file": tmp_path / "bit.npz", "custom_load": True},
        {"file": tmp_path / "unread.pth", "state_dict": {"a": torch.ones(1)}},
    ):
        assert pretrained_overlay(overlay) is overlay


@pytest.mark.parametrize("keys", [dict, original_keys])
def test_deployed_overlay_points_to_checkpoint_path(tmp_path, keys):
    path = save(tmp_path / "deploy.pth", keys(deployed_state()))
    with pytest.raises(CheckpointError, match=rf"checkpoint_path='{re.escape(str(path))}'"):
        pretrained_overlay({"file": str(path)})


def test_overlay_errors_are_those_of_reading(tmp_path):
    with pytest.raises(FileNotFoundError):
        pretrained_overlay({"file": tmp_path / "nothing.pth"})
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        pretrained_overlay({"file": tmp_path / "x.pth"})
