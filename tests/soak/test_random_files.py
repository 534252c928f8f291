"""Random damage to checkpoint files: a clear error and an untouched model, or exactly the weights of the file."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from amount import examples
from checkpoint_files import (
    FORMATS,
    assert_unchanged,
    bit_archive,
    original_keys,
    output,
    snapshot,
    tiny_bit,
    tiny_repvgg,
)
from hypothesis import given
from hypothesis import strategies as st

import regnet_fast
from regnet_fast.weights import CheckpointError, load_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a checkpoint by the name of its file, for every format."""
    folder = tmp_path_factory.mktemp("written")
    state = tiny_repvgg(seed=2).state_dict()
    for name, write in FORMATS.items():
        write(state, folder / name)
    np.savez(folder / "bit.npz", **bit_archive(tiny_bit(2)))
    return {path.name: path.read_bytes() for path in folder.iterdir()}.__getitem__


@pytest.fixture(scope="module")
def target():
    """The rebuilt model that files of a name are loaded into."""
    repvgg, bit = (regnet_fast.rebuild(model).model for model in (tiny_repvgg(seed=1), tiny_bit(1)))
    return lambda name: bit if name == "bit.npz" else repvgg


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """The bytes with some damage; half of it in the first and last 4 kB, where formats keep what they rest on."""

    def place():
        if draw(st.booleans()):
            return draw(st.integers(0, len(data) - 1))
        near = draw(st.integers(0, min(4096, len(data)) - 1))
        return near if draw(st.booleans()) else len(data) - 1 - near

    kind = draw(st.sampled_from(["truncated", "bits", "overwritten", "removed", "inserted", "doubled"]))
    found = bytearray(data)
    at = place()
    if kind == "truncated":
        return bytes(found[:at])
    if kind == "bits":
        for _ in range(draw(st.integers(1, 8))):
            found[place()] ^= 1 << draw(st.integers(0, 7))
    elif kind == "overwritten":
        some = draw(st.binary(min_size=1, max_size=64))
        found[at : at + len(some)] = some
    elif kind == "removed":
        del found[at : at + draw(st.integers(1, 64))]
    elif kind == "inserted":
        found[at:at] = draw(st.binary(min_size=1, max_size=64))
    else:
        found += found[at:]
    return bytes(found)


def independently(path):
    """The tensors of a file as the library of its format reads them."""
    head = path.read_bytes()[:9]
    if head[8:9] == b"{":
        return safetensors.torch.load_file(path)
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def assert_loaded_or_unchanged(model, path, tally):
    """Load; a failure is a CheckpointError with a message and changes nothing, a success is what the file says."""
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    try:
        load_checkpoint(model, path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert_unchanged(model, before)
        return tally.count("files refused")
    tally.count("files loaded")
    if path.suffix != ".npz":
        says = independently(path)
        for key, value in model.state_dict().items():
            expected = says[key].to(value.dtype).reshape(value.shape) if key in says else values[key]
            assert torch.equal(value.view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8)), key
    model.load_state_dict(values)


@pytest.mark.parametrize("name", [*FORMATS, "bit.npz"])
@examples(8)
@given(data=st.data())
def test_damaged_bytes(name, written, target, tmp_path, tally, data):
    path = tmp_path / name
    path.write_bytes(data.draw(damaged(written(name))))
    tally.count("inputs")
    assert_loaded_or_unchanged(target(name), path, tally)


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64)


def renamed(draw, state, key):
    state[draw(st.sampled_from(["module." + key, key + ".x", "", "stem.", key.upper()]))] = state.pop(key)


def swapped(draw, state, key):
    other = draw(st.sampled_from(list(state)))
    state[key], state[other] = state[other], state[key]


def of_another_shape(draw, state, key):
    t = state[key]
    state[key] = draw(st.sampled_from([t.flatten(), t[None], t.transpose(0, -1) if t.ndim else t, t.new_zeros(0)]))


def of_another_dtype(draw, state, key):
    state[key] = state[key].to(draw(st.sampled_from(DTYPES)))


def of_no_number(draw, state, key):
    t = state[key]
    if t.is_floating_point():
        state[key] = torch.full_like(t, draw(st.sampled_from([torch.nan, torch.inf])))


CHANGES = {
    "removed": lambda draw, state, key: state.pop(key),
    "renamed": renamed,
    "swapped": swapped,
    "of another shape": of_another_shape,
    "of another dtype": of_another_dtype,
    "no number": of_no_number,
    "no tensor": lambda draw, state, key: state.update({key: draw(st.sampled_from([None, 1, "x", [1.0], {"a": 1}]))}),
    "unknown": lambda draw, state, key: state.update({key + "_more": torch.ones(3)}),
}


@examples(20)
@given(data=st.data())
def test_changed_entries(target, tmp_path, tally, data):
    """Entries missing, renamed, exchanged, of other shapes, dtypes and kinds, in timm's layout and the original one."""
    model = target("changed.pth")
    state = {key: value.clone() for key, value in tiny_repvgg(seed=2).state_dict().items()}
    original = data.draw(st.booleans())
    if original:
        state = original_keys(state)
    for change in data.draw(st.lists(st.sampled_from(list(CHANGES)), min_size=1, max_size=3)):
        tensors = [key for key, value in state.items() if isinstance(value, torch.Tensor)]
        CHANGES[change](data.draw, state, data.draw(st.sampled_from(tensors)))
    path = tmp_path / "changed.pth"
    torch.save(state, path)
    tally.count("inputs")
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    try:
        load_checkpoint(model, path)
    except CheckpointError as error:
        assert str(error)
        assert_unchanged(model, before)
        return tally.count("files refused")
    tally.count("files loaded")
    said = {key.removeprefix("module."): value for key, value in state.items()}
    if original:
        names = dict(zip(original_keys(values), values, strict=True))
        said = {names.get(key, key): value for key, value in said.items()}
    for key, value in model.state_dict().items():
        counter = key.endswith("num_batches_tracked")
        assert counter or key in said, key
        if isinstance(said.get(key), torch.Tensor):
            expected = said[key].to(value.dtype).reshape(value.shape)
            assert torch.equal(value.nan_to_num(), expected.nan_to_num()), key
    model.load_state_dict(values)


def test_a_refused_file_leaves_packed_weights_valid(written, tmp_path):
    """The outputs of a model that has run are the same before and after a load that fails."""
    model = regnet_fast.rebuild(tiny_repvgg(seed=1)).model
    before = output(model)
    path = tmp_path / "model.pth"
    path.write_bytes(written("model.pth")[:-40])
    with pytest.raises(CheckpointError):
        load_checkpoint(model, path)
    assert torch.equal(output(model), before)
