"""What is launched where the compiler takes more of a GPU than there is: a stand-in answers for it."""

import importlib
import inspect
import re
import warnings

import pytest
import torch
import triton

from regnet_fast import kernels
from regnet_fast.kernels import norm_act, pointwise_conv, squeeze_excite, tables, training_join
from regnet_fast.observer import observing
from regnet_fast.store.verdicts import Outcome, Verdict, Verdicts

LIMIT = 99 << 10


class Compiler:
    """A kernel whose code takes as many bytes of shared memory as a function of its constants says. Triton's runtime
    raises the same where a kernel's `metadata.shared` is more than the device has.
    """

    def __init__(self, kernel, needed):
        self.kernel, self.needed, self.fn, self.arg_names = kernel, needed, kernel.fn, kernel.arg_names
        self.asked = []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            needed = self.needed(constants)
            self.asked.append((needed, constants))
            if needed > LIMIT:
                raise triton.OutOfResources(needed, LIMIT, "shared memory")
            self.kernel[grid](*arguments, **constants)

        return run


@pytest.fixture(autouse=True)
def anew():
    tables.forget()
    yield
    tables.forget()


def gate(hidden=128, config=None):
    """Of 96 channels; it is right."""
    torch.manual_seed(0)
    parts, fc1, fc2 = torch.randn(2, 3, 96), torch.randn(hidden, 96) / 10, torch.randn(96, hidden) / 10
    bias1, bias2 = torch.randn(hidden), torch.randn(96)
    found = squeeze_excite.squeeze_excite(parts, fc1, bias1, fc2, bias2, config=config)
    expected = torch.sigmoid((parts.sum(1) @ fc1.T + bias1).relu() @ fc2.T + bias2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def stand_in(monkeypatch, module, name, needed):
    compiler = Compiler(getattr(module, name), needed)
    monkeypatch.setattr(module, name, compiler)
    return compiler


def tiles(bytes_of_an_element):
    return lambda constants: bytes_of_an_element * constants["BLOCK_R"] * constants["BLOCK_C"]


def test_a_smaller_configuration_takes_the_place_of_one_that_is_too_large(monkeypatch):
    compiler = stand_in(monkeypatch, squeeze_excite, "whole_kernel", tiles(14))
    reason = r"needs 114688 of shared memory, the device has 101376.*runs instead"
    with pytest.warns(tables.SmallerWarning, match=reason):
        gate()
    assert [needed for needed, _ in compiler.asked] == [114688, 57344]
    assert compiler.asked[-1][1]["num_warps"] == 8, "they hold the same sums"
    compiler.asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", tables.SmallerWarning)
        gate()
    assert [needed for needed, _ in compiler.asked] == [57344], "it was chosen once"


def test_another_form_takes_its_place_where_none_of_its_own_fits(monkeypatch):
    """Two kernels for the one that computes both products."""
    compiler = stand_in(monkeypatch, squeeze_excite, "whole_kernel", lambda constants: 1 << 20)
    with pytest.warns(tables.SmallerWarning):
        gate()
    assert len({tuple(constants.items()) for _, constants in compiler.asked}) == len(compiler.asked) > 1


def test_the_reason_is_told_where_nothing_smaller_is_left(monkeypatch):
    for name in ("whole_kernel", "hidden_kernel"):
        stand_in(monkeypatch, squeeze_excite, name, lambda constants: 1 << 20)
    with pytest.raises(tables.TooLargeError, match=r"needs 1048576 of shared memory.*no smaller configuration"):
        warnings.simplefilter("ignore")
        gate()


def test_a_given_configuration_is_refused_with_the_reason(monkeypatch):
    compiler = stand_in(monkeypatch, squeeze_excite, "whole_kernel", tiles(14))
    config = squeeze_excite.Config(16, 64, 128, 8, True)
    with pytest.raises(tables.TooLargeError, match="it needs 114688 of shared memory, the device has 101376"):
        gate(config=config)
    assert len(compiler.asked) == 1
    gate(config=squeeze_excite.Config(16, 32, 128, 8, True))


def test_a_measured_choice_gives_way_to_the_heuristics(monkeypatch, tmp_path):
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "here", lambda device: {"device": "a GPU"})
    shape = squeeze_excite.Shape(2, 3, 96, 16, 90)
    large, usual = squeeze_excite.Config(16, 64, 128, 8, True), squeeze_excite.heuristic(shape)
    assert squeeze_excite.config_supports(large, shape) is None and usual.block_r == 16
    found = Verdict(
        tables.problem(squeeze_excite, shape), tables.words(large), {tables.words(large): Outcome("verified", 1.0)}
    )
    Verdicts({"device": "a GPU"}).keep(found)
    stand_in(monkeypatch, squeeze_excite, "whole_kernel", tiles(14))
    heard = []
    with observing(choice=heard.append), pytest.warns(tables.SmallerWarning):
        gate(hidden=16)
    assert [(choice.config, choice.tuned) for choice in heard] == [(large, True), (usual, False)]


def test_a_resident_product_is_streamed_where_its_weights_do_not_fit(monkeypatch):
    compiler = stand_in(monkeypatch, pointwise_conv, "resident_kernel", lambda constants: 1 << 20)
    x, weight = torch.randn(1, 24, 9, 9).contiguous(memory_format=torch.channels_last), torch.randn(40, 24)
    with pytest.warns(tables.SmallerWarning):
        found = pointwise_conv.pointwise_conv(x, weight)
    assert compiler.asked
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, weight[:, :, None, None]), rtol=1e-4, atol=1e-4)


def test_a_pass_of_training_takes_smaller_tiles(monkeypatch):
    compiler = stand_in(monkeypatch, training_join, "join_kernel", lambda c: 64 * c["BLOCK_P"] * c["BLOCK_C"])
    x = torch.randn(1, 24, 9, 9).contiguous(memory_format=torch.channels_last)
    with pytest.warns(tables.SmallerWarning):
        found = training_join.join(training_join.ReadMap(x), training_join.ReadMap(x))
    assert len(compiler.asked) > 1 and compiler.asked[-1][0] <= LIMIT
    torch.testing.assert_close(found, 2 * x)


def test_what_else_a_launch_raises_is_not_the_configurations(monkeypatch):
    def needed(constants):
        raise RuntimeError("another error")

    compiler = stand_in(monkeypatch, norm_act, "kernel", needed)
    x = torch.randn(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="another error"):
        norm_act.norm_act(x, torch.ones(8), torch.zeros(8))
    assert not compiler.asked


def test_every_launcher_that_chooses_is_fitting():
    found = {}
    for path in sorted(tables.SHIPPED.parent.resolve().glob("*.py")):
        module = importlib.import_module(f"{kernels.__name__}.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            asks = re.search(r"\bannounce\(\w", inspect.getsource(function))
            if function.__module__ == module.__name__ and asks:
                found[f"{path.stem}.{name}"] = function
    del found["tables.announce"]
    assert len(found) == 13
    assert not [name for name, function in found.items() if not hasattr(function, "__wrapped__")]
