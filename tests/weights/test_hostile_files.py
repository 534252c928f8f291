"""Files that are no checkpoint, damaged, or hostile: each is refused, executes nothing and changes nothing."""

import pickle

import numpy as np
import pytest
import torch
from checkpoint_files import FORMATS, assert_unchanged, bit_archive, save, snapshot, tiny_bit, tiny_repvgg, write_legacy

from regnet_fast.weights import CheckpointError, load_checkpoint, read_state_dict

# No checkpoint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "without tensors; its entries are none"),
        ({"net": {"weight": torch.ones(3)}, "epoch": 1}, "without tensors; its entries are net, epoch"),
        ({"classy_state_dict": {"base_model": {}}}, "no SEER"),
        ({"classy_state_dict": 5}, "no SEER"),
    ],
)
def test_no_checkpoint_is_named_as_such(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(save(tmp_path / "x.pth", content))


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "empty"), (b"<!DOCTYPE html>", "not a readable"), (b"hello world", "not a readable")]
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / name)


# Damaged


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.pt"])
@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused_and_changes_nothing(tmp_path, name, part):
    model = tiny_repvgg(seed=1)
    path = tmp_path / name
    FORMATS[name](tiny_repvgg(seed=2).state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="not a readable"):
        load_checkpoint(model, path)
    assert_unchanged(model, before)


def test_a_record_that_is_marked_as_a_folder_is_refused(tmp_path):
    """One bit of the archive's directory; torch reads nothing for it and shows uninitialised memory as weights."""
    model, path = tiny_repvgg(seed=1), tmp_path / "model.pth"
    torch.save(tiny_repvgg(seed=2).state_dict(), path)
    data = bytearray(path.read_bytes())
    name = data.rindex(b"/data/0")  # in the directory, in an entry whose attributes stand 8 bytes before its name
    entry = data.rindex(b"PK\x01\x02", 0, name)
    data[entry + 38] |= 0x10
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="marked as a folder"):
        load_checkpoint(model, path)
    assert_unchanged(model, before)


def test_a_classifier_that_is_one_number_is_refused(tmp_path):
    model = tiny_repvgg(seed=1)
    state = model.state_dict() | {"head.fc.weight": torch.tensor(1)}
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight is"):
        load_checkpoint(model, save(tmp_path / "model.pth", state))
    assert_unchanged(model, before)


@pytest.mark.parametrize("damage", ["key", "shape", "layout", "truncated"])
def test_bad_bit_archive_changes_nothing(tmp_path, damage):
    model, path = tiny_bit(2), tmp_path / "bit.npz"
    arrays = bit_archive(tiny_bit(1))
    last = "resnet/block4/unit01/c/group_norm/beta"
    if damage == "key":
        del arrays[last]
    elif damage == "shape":
        arrays[last] = np.ones(3, np.float32)
    elif damage == "layout":
        arrays = {"weight": np.ones(3)}
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="cannot load"):
        load_checkpoint(model, path)
    assert_unchanged(model, before)


# Hostile


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        write_legacy,
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ],
    ids=["zip", "legacy", "pickle2", "pickle4"],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickle_is_refused_unexecuted(tmp_path, name, write):
    victim = tmp_path / "written"
    Hostile(victim).__reduce__()[0](victim, "w").close()  # what executing it would do
    assert victim.exists()
    victim.unlink()
    model = tiny_repvgg()
    write({"state_dict": model.state_dict(), "payload": Hostile(victim)}, tmp_path / name)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"needs code execution.*refused"):
        load_checkpoint(model, tmp_path / name)
    assert not victim.exists()
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*TorchScript archive")
def test_files_that_hold_code_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"needs code execution.*torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(tmp_path / "module.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="needs code execution"):
        read_state_dict(tmp_path / "script.pt")
