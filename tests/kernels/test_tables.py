"""Measured configurations: what a shape finds, what the kernels make of it, and where it comes from."""

import dataclasses
import json
from typing import get_type_hints

import pytest
import torch

from regnet_fast.kernels import (
    channel_tiles,
    depthwise_conv,
    grouped_input_gradient,
    grouped_weight_gradient,
    implicit_gemm,
    norm_act,
    pointwise_conv,
    pointwise_pair,
    squeeze_excite,
    tables,
)
from regnet_fast.kernels.tables import HEURISTIC
from regnet_fast.observer import observing
from regnet_fast.settings import settings
from regnet_fast.store.environment import environment
from regnet_fast.store.verdicts import Outcome, Verdict, VerdictError, Verdicts, listing

HERE = {"device": "NVIDIA Test-GPU 80GB", "driver": "1"}
SHAPES = {
    pointwise_conv: pointwise_conv.Shape(1000, 24, 56, 2, 0, True, 1, False, 90, 132),
    pointwise_pair: pointwise_pair.Shape(1000, 24, 56, 80, 2, 2, False, False, 90, 132),
    implicit_gemm: implicit_gemm.Shape(1568, 196, 3, 24, 24, 9, 1, 2, False, True, False, 90, 132),
    depthwise_conv: depthwise_conv.Shape(1568, 196, 64, 9, 1, 2, True),
    squeeze_excite: squeeze_excite.Shape(8, 7, 72, 18, 90),
    norm_act: norm_act.Shape(1000, 64, 2, False),
    channel_tiles: channel_tiles.Shape(1, 1000, 64, 2, 3, 2, 132),
    grouped_input_gradient: grouped_input_gradient.Shape(1568, 196, 3, 24, 24, 9, 1, 2, 2, False, 90, 132),
    grouped_weight_gradient: grouped_weight_gradient.Shape(8, 196, 3, 24, 24, 9, 1, 2, 2, True, False, 90, 132),
}


def verdict(kernel, shape, config, us=1.5) -> Verdict:
    chosen = HEURISTIC if config is None else tables.words(config)
    return Verdict(tables.problem(kernel, shape), chosen, {chosen: Outcome("verified", us)})


def known(*found) -> dict:
    """What is known of (shape, configuration) pairs."""
    return {tables.key(shape): HEURISTIC if config is None else tables.words(config) for shape, config in found}


def pixels(count: int, **more):
    return dataclasses.replace(SHAPES[pointwise_conv], pixels=count, **more)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """An empty store, nothing shipped, and an environment that the interpreter takes for its own."""
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tables, "here", lambda device: HERE)
    tables.forget()
    yield
    tables.forget()


def ship(*found, facts=HERE):
    path = tables.shipped_file(facts["device"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(listing((facts, one) for one in found)))


# What a shape finds


@pytest.mark.parametrize("kernel", SHAPES, ids=tables.name)
def test_words_are_read_as_they_were_written(kernel):
    name, key = tables.parsed(tables.problem(kernel, SHAPES[kernel]))
    assert name == tables.name(kernel) and key == tables.key(SHAPES[kernel])
    assert not {"arch", "processors"} & dict(key).keys()
    assert len({tables.words(config) for config in kernel.CONFIGS}) == len(kernel.CONFIGS)


@pytest.mark.parametrize(
    "problem",
    ["", "pointwise_conv 1x8x4x4 -> 8, 1x1, relu, float32", "triton pointwise_conv", "triton pointwise_conv: pixels",
     "triton pointwise_conv: pixels many", "pointwise_conv: pixels 8"],
)  # fmt: skip
def test_other_problems_are_no_kernels(problem):
    assert tables.parsed(problem) is None


@pytest.mark.parametrize("kernel", SHAPES, ids=tables.name)
def test_only_extents_and_the_machine_may_differ(kernel):
    shape = SHAPES[kernel]
    table = known((shape, None))
    for field, kind in get_type_hints(kernel.Shape).items():
        value = getattr(shape, field)
        other = dataclasses.replace(shape, **{field: not value if kind is bool else value + 1})
        found = tables.find(kernel, table, other)
        assert (found is not None) == (field in (*kernel.EXTENTS, *tables.MACHINE)), field


def test_the_nearest_shape_is_taken():
    a, b, c = [config for config in pointwise_conv.CONFIGS if config.resident and config.block_k == 32][:3]
    table = known((pixels(500), a), (pixels(1000), b), (pixels(8000), c))
    for count, config in ((1000, b), (999, b), (800, b), (600, a), (2500, b), (3500, c), (125, a), (32000, c)):
        assert tables.find(pointwise_conv, table, pixels(count)) == tables.words(config), count
    assert tables.find(pointwise_conv, table, pixels(124)) is None
    assert tables.find(pointwise_conv, table, pixels(32001)) is None
    assert tables.find(pointwise_conv, table, pixels(0)) is None


def test_both_extents_count():
    shape, (a, b) = SHAPES[implicit_gemm], implicit_gemm.CONFIGS[:2]
    larger = dataclasses.replace(shape, pixels=2 * shape.pixels)
    elsewhere = dataclasses.replace(larger, image_pixels=shape.image_pixels * 3 // 2)
    table = known((elsewhere, a), (larger, b))
    assert tables.find(implicit_gemm, table, shape) == tables.words(b)
    assert tables.find(implicit_gemm, known((elsewhere, a)), shape) == tables.words(a)


def test_a_configuration_that_cannot_serve_the_shape_is_passed_over():
    large = pointwise_conv.Config(128, 128, 64, 8, 3, True)
    small = pointwise_conv.Config(64, 32, 32, 4, 2, True)
    shape = pixels(1000, itemsize=4, residual=False)
    table = known((shape, large), (dataclasses.replace(shape, pixels=2000), small))
    assert tables.find(pointwise_conv, table, shape) == tables.words(large)
    assert pointwise_conv.config_supports(large, dataclasses.replace(shape, arch=86)) is not None
    assert tables.find(pointwise_conv, table, dataclasses.replace(shape, arch=86)) == tables.words(small)


# What the kernels make of it


def launched(count=1000, **options) -> list[dict]:
    """The arguments of the kernels that a small 1x1 convolution starts; its result is right."""
    heard = []

    def hear(name, arguments):
        heard.append(arguments)
        return True

    x = torch.randn(1, 24, count, 1).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 24)
    with observing(launch=hear):
        y = pointwise_conv.pointwise_conv(x, weight, **options)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight[:, :, None, None]), rtol=1e-4, atol=1e-4)
    return heard


def small_shape(count=1000):
    return pointwise_conv.Shape(count, 24, 8, 4, 0, False, 1, settings().conv_tf32, 90, 1)


FIRST, SECOND = pointwise_conv.Config(64, 32, 32, 4, 2, True), pointwise_conv.Config(128, 32, 32, 8, 2, True)


def test_what_was_found_here_wins_over_what_is_shipped():
    ship(verdict(pointwise_conv, small_shape(), FIRST))
    assert launched()[0]["BLOCK_M"] == 64
    Verdicts(HERE).keep(verdict(pointwise_conv, small_shape(), SECOND))
    assert launched()[0]["BLOCK_M"] == 64
    tables.forget()
    assert launched()[0]["BLOCK_M"] == 128
    assert launched(config=FIRST)[0]["BLOCK_M"] == 64


def test_the_heuristic_serves_where_it_was_measured_to_be_the_fastest():
    shape = small_shape(300)
    Verdicts(HERE).keep(verdict(pointwise_conv, small_shape(), None))
    heard = []
    with observing(choice=heard.append):
        launched(300)
        launched(100)
    near, far = heard
    assert (near.config, near.tuned) == (pointwise_conv.heuristic(shape), True)
    assert not far.tuned


def test_the_store_is_read_once(monkeypatch):
    Verdicts(HERE).keep(verdict(pointwise_conv, small_shape(), SECOND))
    reads, shipped = [], tables.shipped
    monkeypatch.setattr(tables, "shipped", lambda gpu: reads.append(gpu) or shipped(gpu))
    for count in (1000, 1000, 900):
        assert launched(count)[0]["BLOCK_M"] == 128
    assert reads == [HERE["device"]]


def test_the_interpreter_knows_nothing(monkeypatch):
    monkeypatch.undo()
    assert tables.here(torch.device("cpu")) is None and tables.known(torch.device("cpu")) == {}


def measured_here(**options) -> bool:
    """Whether a launch finds anything measured."""
    heard = []
    with observing(choice=heard.append):
        launched(**options)
    return heard[0].tuned


@pytest.mark.parametrize("fact", ["device", "driver", "cuda", "cudnn", "triton", "torch", "regnet_fast", "kernels"])
def test_whatever_differs_on_a_gpu_is_measured_again(fact, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    facts = environment("cuda:0")
    assert set(facts) == {"device", "driver", "cuda", "cudnn", "triton", "torch", "regnet_fast", "kernels"}
    monkeypatch.setattr(tables, "here", lambda device: facts)
    Verdicts({**facts, fact: "another"}).keep(verdict(pointwise_conv, small_shape(), SECOND))
    assert not measured_here()
    tables.forget()
    Verdicts(facts).keep(verdict(pointwise_conv, small_shape(), SECOND))
    assert measured_here()


USELESS = {
    "begun": verdict(pointwise_conv, small_shape(), SECOND, us=None),
    "a configuration that is none": Verdict(
        tables.problem(pointwise_conv, small_shape()), "block_m 48", {"block_m 48": Outcome("verified", 1.0)}
    ),
    "another form of shape": Verdict(
        "triton pointwise_conv: pixels 1000, channels 24", HEURISTIC, {HEURISTIC: Outcome("verified", 1.0)}
    ),
    "another kernel": verdict(norm_act, SHAPES[norm_act], None),
    "a layer": Verdict("pointwise_conv 1x24x1000x1", "aten", {"aten": Outcome("verified", 1.0)}),
}


@pytest.mark.parametrize("what", USELESS)
@pytest.mark.parametrize("where", [ship, lambda one: Verdicts(HERE).keep(one)], ids=["shipped", "found"])
def test_what_says_nothing_is_passed_over(what, where):
    where(USELESS[what])
    assert not measured_here()


def test_only_the_same_model_of_gpu_is_shipped_for():
    other = {**HERE, "device": "NVIDIA Test GPU 80GB"}
    assert tables.shipped_file(other["device"]) == tables.shipped_file(HERE["device"])
    ship(verdict(pointwise_conv, small_shape(), SECOND), facts=other)
    assert not measured_here()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"schema": 99, "verdicts": []}', b"\xff\xfe"])
def test_a_damaged_package_is_named(content):
    ship()
    tables.shipped_file(HERE["device"]).write_bytes(content)
    with pytest.raises(VerdictError, match=r"nvidia-test-gpu-80gb\.json"):
        launched()


def test_what_the_package_ships_can_be_read(monkeypatch):
    monkeypatch.undo()
    for path in tables.SHIPPED.glob("*"):
        (gpu,) = {one["environment"]["device"] for one in json.loads(path.read_bytes())["verdicts"]}
        assert tables.shipped_file(gpu) == path and tables.shipped(gpu)
