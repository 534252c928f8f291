"""Reading checkpoint files: their formats, the wrappers that are opened, and the keys that are brought to timm's."""

import argparse
import re

import numpy as np
import pytest
import timm
import torch
from checkpoint_files import FORMATS, assert_equal_states, original_keys, output, regnet, save, tiny_bit, tiny_repvgg

from regnet_fast.weights import load_checkpoint
from regnet_fast.weights.checkpoints import CheckpointError, convert_repvgg, read_state_dict


@pytest.mark.parametrize("name", FORMATS)
def test_formats_load_bit_exactly(tmp_path, name):
    source, model = regnet(seed=1), regnet(seed=2)
    FORMATS[name](source.state_dict(), tmp_path / name)
    assert not torch.equal(output(model), output(source))
    result = load_checkpoint(model, tmp_path / name)
    assert not result.missing_keys and not result.unexpected_keys
    assert_equal_states(model, source.state_dict())
    assert torch.equal(output(model), output(source))


@pytest.mark.parametrize(
    ("wrap", "use_ema", "value"),
    [
        (lambda a, b: {"state_dict": a, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, True, 1),
        (lambda a, b: {"model": a}, True, 1),
        (lambda a, b: {"state_dict": a, "state_dict_ema": b}, True, 2),
        (lambda a, b: {"state_dict": a, "state_dict_ema": b}, False, 1),
        (lambda a, b: {"model": a, "model_ema": b}, True, 2),
        (lambda a, b: {"state_dict": a, "state_dict_ema": None}, True, 1),
        (lambda a, b: {f"module.{key}": t for key, t in a.items()}, True, 1),
        (lambda a, b: {"state_dict": {f"_orig_mod.module.{key}": t for key, t in a.items()}}, True, 1),
    ],
)
def test_wrappers_are_opened(tmp_path, wrap, use_ema, value):
    one, two = {"a.weight": torch.full((3,), 1.0)}, {"a.weight": torch.full((3,), 2.0)}
    state = read_state_dict(save(tmp_path / "x.pth", wrap(one, two)), use_ema=use_ema)
    assert list(state) == ["a.weight"]
    assert torch.equal(state["a.weight"], torch.full((3,), float(value)))


def test_entries_that_are_no_tensors_are_left_out(tmp_path):
    state = read_state_dict(save(tmp_path / "x.pth", {"weight": torch.ones(2), "epoch": 3, 7: torch.ones(1)}))
    assert list(state) == ["weight"]


def test_missing_file_stays_file_not_found(tmp_path):
    model = tiny_repvgg()
    for name in ("nothing.pth", "nothing.safetensors", "nothing.npz"):
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            load_checkpoint(tiny_bit() if name.endswith("npz") else model, tmp_path / name)


def test_directory_and_numpy_archive_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a directory.*local-dir"):
        read_state_dict(tmp_path)
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match=r"NumPy archive.*custom_load"):
        read_state_dict(tmp_path / "x.npz")


# Original RepVGG


REPVGG = [f"repvgg_{size}" for size in ["a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4", "d2se"]]


@pytest.mark.parametrize("name", REPVGG)
def test_convert_gives_every_key_and_shape(name):
    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    original = original_keys(expected)
    assert not set(original) & set(expected)
    converted = convert_repvgg(original)
    assert list(converted) == list(expected)
    assert all(converted[key].shape == expected[key].shape for key in expected)


def test_convert_is_pure_and_refuses_other_keys():
    state = original_keys(tiny_repvgg("repvgg_d2se").state_dict())
    before = dict(state)
    converted = convert_repvgg(state)
    assert state == before
    assert [id(value) for value in converted.values()] == [id(value) for value in before.values()]
    for key in ("stage1_aux.weight", "stage0.1.rbr_dense.conv.weight", "stage1.rbr_dense.conv.weight", "stem.weight"):
        with pytest.raises(CheckpointError, match=re.escape(f"'{key}'")):
            convert_repvgg({**state, key: torch.ones(1)})
