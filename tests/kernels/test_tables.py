"""Tables of tuned configurations: what a shape finds in them, what the kernels make of it, and what is no table."""

import dataclasses
import importlib
import json
import os
import warnings
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
from regnet_fast.kernels.tables import Entry, TableError, TableWarning
from regnet_fast.observer import observing

GPU = "test-gpu"
CONDITIONS = {"gpu": "Test GPU", "date": "2026-01-01"}
MODULES = [importlib.import_module(f"regnet_fast.kernels.{name}") for name in tables.KERNELS]
SHAPES = {
    pointwise_conv: pointwise_conv.Shape(1000, 24, 56, 2, False, True, 1, False, 90, 132),
    pointwise_pair: pointwise_pair.Shape(1000, 24, 56, 80, 2, 2, False, False, 90, 132),
    implicit_gemm: implicit_gemm.Shape(1568, 196, 3, 24, 24, 9, 1, 2, False, True, False, 90, 132),
    depthwise_conv: depthwise_conv.Shape(1568, 196, 64, 9, 1, 2, True),
    squeeze_excite: squeeze_excite.Shape(8, 7, 72, 18, 90),
    norm_act: norm_act.Shape(1000, 64, 2, False),
    channel_tiles: channel_tiles.Shape(1, 1000, 64, 2, 3, 2, 132),
    grouped_input_gradient: grouped_input_gradient.Shape(1568, 196, 3, 24, 24, 9, 1, 2, 2, False, 90, 132),
    grouped_weight_gradient: grouped_weight_gradient.Shape(8, 196, 3, 24, 24, 9, 1, 2, 2, True, False, 90, 132),
}


def entry(config, heuristic) -> Entry:
    return Entry(config, 1.5, heuristic, 2.0, CONDITIONS)


def known(kernel, *found) -> dict:
    """A table of (shape, configuration) pairs."""
    return {tables.key(shape): entry(config, kernel.heuristic(shape)) for shape, config in found}


def pixels(count: int, **more):
    return dataclasses.replace(SHAPES[pointwise_conv], pixels=count, **more)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The shipped folder and the user's, both empty, of a GPU that the interpreter takes for its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tables, "gpu", lambda device: GPU)
    tables.forget()
    yield tmp_path / "shipped" / GPU, tables.user_folder() / GPU
    tables.forget()


# What a shape finds


@pytest.mark.parametrize("kernel", MODULES, ids=tables.name)
def test_a_table_is_read_as_it_was_written(kernel, tmp_path):
    shape = SHAPES[kernel]
    other = dataclasses.replace(shape, **{kernel.EXTENTS[0]: 7})
    table = known(kernel, (shape, kernel.CONFIGS[0]), (other, None))
    path = tmp_path / "some" / "folder" / "table.json"
    tables.write(path, kernel, table)
    assert tables.read(path, kernel) == table
    content = json.loads(path.read_text())
    assert content["schema"] == tables.SCHEMA and content["provenance"] == [CONDITIONS]
    assert not {"arch", "processors"} & content["entries"][0]["shape"].keys()


@pytest.mark.parametrize("kernel", MODULES, ids=tables.name)
def test_only_extents_and_the_machine_may_differ(kernel):
    shape = SHAPES[kernel]
    table = known(kernel, (shape, None))
    for field, kind in get_type_hints(kernel.Shape).items():
        value = getattr(shape, field)
        other = dataclasses.replace(shape, **{field: not value if kind is bool else value + 1})
        found = tables.find(kernel, table, other)
        assert (found is not None) == (field in (*kernel.EXTENTS, *tables.MACHINE)), field


def test_the_nearest_shape_is_taken():
    a, b, c = [config for config in pointwise_conv.CONFIGS if config.resident and config.block_k == 32][:3]
    table = known(pointwise_conv, (pixels(500), a), (pixels(1000), b), (pixels(8000), c))
    for count, config in ((1000, b), (999, b), (800, b), (600, a), (2500, b), (3500, c), (125, a), (32000, c)):
        assert tables.find(pointwise_conv, table, pixels(count)).config == config, count
    assert tables.find(pointwise_conv, table, pixels(124)) is None
    assert tables.find(pointwise_conv, table, pixels(32001)) is None
    assert tables.find(pointwise_conv, table, pixels(0)) is None


def test_both_extents_count():
    shape, (a, b) = SHAPES[implicit_gemm], implicit_gemm.CONFIGS[:2]
    larger = dataclasses.replace(shape, pixels=2 * shape.pixels)
    elsewhere = dataclasses.replace(larger, image_pixels=shape.image_pixels * 3 // 2)
    table = known(implicit_gemm, (elsewhere, a), (larger, b))
    assert tables.find(implicit_gemm, table, shape).config == b
    assert tables.find(implicit_gemm, known(implicit_gemm, (elsewhere, a)), shape).config == a


def test_a_configuration_that_cannot_serve_the_shape_is_passed_over():
    large = pointwise_conv.Config(256, 64, 32, 8, 2, True)
    small = pointwise_conv.Config(64, 16, 32, 4, 2, True)
    shape = pixels(1000, itemsize=4, residual=False)
    table = known(pointwise_conv, (shape, large), (dataclasses.replace(shape, pixels=2000), small))
    assert tables.find(pointwise_conv, table, shape).config == large
    assert pointwise_conv.config_supports(large, dataclasses.replace(shape, arch=86)) is not None
    assert tables.find(pointwise_conv, table, dataclasses.replace(shape, arch=86)).config == small


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
    return pointwise_conv.Shape(count, 24, 8, 4, False, False, 1, torch.backends.cudnn.allow_tf32, 90, 1)


FIRST, SECOND = pointwise_conv.Config(64, 16, 32, 4, 2, True), pointwise_conv.Config(256, 16, 32, 8, 2, True)


def test_the_users_table_wins_over_the_shipped_one(folders):
    shipped, own = folders
    tables.write(shipped / "pointwise_conv.json", pointwise_conv, known(pointwise_conv, (small_shape(), FIRST)))
    assert launched()[0]["BLOCK_M"] == 64
    tables.write(own / "pointwise_conv.json", pointwise_conv, known(pointwise_conv, (small_shape(), SECOND)))
    assert launched()[0]["BLOCK_M"] == 64
    tables.forget()
    assert launched()[0]["BLOCK_M"] == 256
    assert launched(config=FIRST)[0]["BLOCK_M"] == 64


def test_the_heuristic_serves_where_it_was_measured_to_be_the_fastest(folders):
    shape = small_shape(300)
    tables.write(folders[1] / "pointwise_conv.json", pointwise_conv, known(pointwise_conv, (small_shape(), None)))
    heard = []
    with observing(choice=heard.append):
        launched(300)
        launched(100)
    near, far = heard
    assert (near.config, near.tuned) == (pointwise_conv.heuristic(shape), True)
    assert not far.tuned


def test_tables_are_read_once(folders, monkeypatch):
    tables.write(folders[1] / "pointwise_conv.json", pointwise_conv, known(pointwise_conv, (small_shape(), SECOND)))
    reads, read = [], tables.read
    monkeypatch.setattr(tables, "read", lambda path, kernel: reads.append(path) or read(path, kernel))
    for count in (1000, 1000, 900):
        assert launched(count)[0]["BLOCK_M"] == 256
    assert len(reads) == 2


def test_the_interpreter_has_no_table():
    assert tables.gpu(torch.device("cpu")) is None
    assert tables.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


# What is no table


def changed(**changes) -> bytes:
    """A good table for pointwise_conv, with changes to its head or, where the field is there, to its only entry."""
    line = {
        "shape": dict(tables.key(small_shape())),
        "config": vars(FIRST),
        "microseconds": 1.5,
        "heuristic": vars(FIRST),
        "heuristic_microseconds": 2.0,
        "provenance": 0,
    }
    head = {"schema": tables.SCHEMA, "kernel": "pointwise_conv", "provenance": [CONDITIONS], "entries": [line]}
    for field, value in changes.items():
        where = head if field in head and field != "provenance" else line
        where[field] = value
    return json.dumps(head).encode()


HOSTILE = {
    "empty": (b"", "Expecting value"),
    "cut off": (changed()[:-20], "cannot be used"),
    "binary": (b"\xff\xfe\x00\xd8", "cannot be used"),
    "deep": (b"[" * 100_000, "cannot be used"),
    "list": (b"[1, 2]", "an object with the fields schema"),
    "older schema": (changed(schema=0), "it has schema 0, this version of regnet_fast reads 1"),
    "no schema": (b'{"entries": []}', "an object with the fields schema"),
    "other kernel": (changed(kernel="norm_act"), "it is for the kernel 'norm_act'"),
    "entries": (changed(entries={}), "the field entries"),
    "entry": (changed(entries=[5]), "an object with the fields shape"),
    "shape": (changed(shape={"pixels": 1}), "an object with the fields pixels, channels"),
    "true for one": (changed(shape=dict(tables.key(small_shape())) | {"stride": True}), "the field stride is 'True'"),
    "text": (changed(config=vars(FIRST) | {"block_m": "64"}), "the field block_m"),
    "odd tile": (changed(config=vars(FIRST) | {"block_m": 48}), "none of the configurations of pointwise_conv"),
    "huge tile": (changed(config=vars(FIRST) | {"block_m": 1 << 60}), "none of the configurations"),
    "negative time": (changed(microseconds=-1.0), "no positive number"),
    "no number": (changed(microseconds=float("nan")), "no positive number"),
    "infinite": (changed(heuristic_microseconds=float("inf")), "no positive number"),
    "nowhere": (changed(provenance=1), "does not say where"),
    "backwards": (changed(provenance=-1), "does not say where"),
    "endless digits": (b'{"schema": ' + b"1" * 10_000 + b"}", "cannot be used"),
}


@pytest.mark.parametrize("content", HOSTILE)
def test_what_is_no_table_is_refused_by_name(content, tmp_path):
    data, message = HOSTILE[content]
    path = tmp_path / "pointwise_conv.json"
    path.write_bytes(data)
    with pytest.raises(TableError, match=message) as raised:
        tables.read(path, pointwise_conv)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 500 + len(str(path))


def test_the_unchanged_table_is_one(tmp_path):
    path = tmp_path / "pointwise_conv.json"
    path.write_bytes(changed())
    assert tables.read(path, pointwise_conv) == {tables.key(small_shape()): entry(FIRST, FIRST)}
    assert tables.read(tmp_path / "nothing.json", pointwise_conv) == {}


def test_what_is_no_file_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TableError, match="it is no file"):
        tables.read(tmp_path, pointwise_conv)
    path = tmp_path / "table.json"
    path.write_bytes(changed())
    monkeypatch.setattr(tables, "LARGEST", 100)
    with pytest.raises(TableError, match="it is no file of at most"):
        tables.read(path, pointwise_conv)


def test_the_kernels_run_without_a_table_that_cannot_be_used(folders):
    shipped, own = folders
    tables.write(shipped / "pointwise_conv.json", pointwise_conv, known(pointwise_conv, (small_shape(), SECOND)))
    own.mkdir(parents=True)
    (own / "pointwise_conv.json").write_bytes(b"{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert launched(1000)[0]["BLOCK_M"] == launched(900)[0]["BLOCK_M"] == 256
        launched(10)
    (message,) = [str(warning.message) for warning in caught if warning.category is TableWarning]
    assert message.startswith(str(own / "pointwise_conv.json"))


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_bytes(changed())

    def fail(*names):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        tables.write(path, pointwise_conv, {})
    assert path.read_bytes() == changed() and os.listdir(tmp_path) == ["table.json"]
