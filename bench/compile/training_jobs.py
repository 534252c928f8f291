"""The kernels of a training step as `bench.compile.kernels` compiles them: for the maps and convolutions of models."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from regnet_fast.backends.cuda.plans import PROCESSORS

from ..job import DTYPES, Job, make_job

F32 = "float32"
TERMS = 3


def jobs(operation: dict[str, Any], batch: int, arch: int, dtype: str) -> Iterator[Job]:
    """Every kernel for the result of a convolution, and a grouped convolution's gradients."""
    if "hw" not in operation:
        return
    channels, image = operation["out"], operation["hw"] ** 2
    yield from _tiles(channels, batch, image, arch, dtype)
    if operation.get("groups", 1) > 1:
        yield from _gradients(operation, batch, arch, dtype)


def _norm(i: int | str = "") -> dict[str, str]:
    return {f"{name}{i}": F32 for name in ("mean", "var", "weight", "bias")}


def _tiles(channels: int, batch: int, image: int, arch: int, dtype: str) -> Iterator[Job]:
    from regnet_fast.kernels import channel_tiles as kernels

    def make(
        kernel: str, maps: int, sums: int, pointers: dict, integers: tuple, constants: dict, floats: tuple = ()
    ) -> Job:
        images, pixels = (batch, image) if kernel == "training_passes.image_kernel" else (1, batch * image)
        shape = kernels.Shape(images, pixels, channels, DTYPES[dtype].itemsize, maps, sums, PROCESSORS[arch])
        config = kernels.heuristic(shape)
        refusal = kernels.config_supports(config, shape)
        assert refusal is None, f"{shape}: {config}: {refusal}"
        constants = constants | kernels.constants(config, channels)
        return make_job(kernel, config, arch, dtype, pointers, (*integers, "channel_units"), constants, floats)

    yield make("channel_statistics.statistics_kernel", 1, 2, {"x": dtype, "parts": F32}, ("pixels",), {})
    yield from _merging(arch)
    affine = {"dz": dtype, "y": dtype, "out": dtype, "a": F32, "q": F32, "k": F32}
    for more in ({}, {"identity": dtype}):
        maps = 3 + len(more)
        yield make("training_passes.affine_kernel", maps, 0, affine | more, ("pixels",), {"UPCAST": False})
    for more in ({}, {"times": dtype}):
        pointers = {"x": dtype, "parts": F32, **_norm(), **more}
        integers, floats = ("tiles", "image_pixels"), ("eps", "share")
        activation = {"ACTIVATION": "silu"}
        yield make("training_passes.image_kernel", 1 + len(more), 1, pointers, integers, activation, floats)
    common, floats = ("pixels", "image_pixels"), tuple(f"eps{i}" for i in range(TERMS))
    for activations, terms in JOINS.items():
        for activation in activations.split():
            pointers, constants = _terms(terms, dtype)
            constants |= {"ACTIVATION": activation, "UPCAST": False}
            joined = pointers | {"y": dtype}
            yield make("training_join.join_kernel", len(terms) + 1, 0, joined, common, constants, floats)
    for activation, terms in BACKWARD:
        pointers, constants = _terms(terms, dtype)
        alone = [own != "none" or factor != "none" for _, own, factor in terms]
        summed = [norm for norm, _, _ in terms] + [False] * (TERMS - len(terms))
        pointers |= {f"out{i}": dtype for i, own in enumerate(alone) if own} | {"grad": dtype}
        pointers |= {"parts": F32} if any(summed) else {}
        pointers |= {"y": dtype} if activation == "relu" else {}
        pointers |= {"out": dtype} if activation != "none" and not all(alone) else {}
        pointers |= {"extra": F32} if terms[0][2] == "channel" else {}
        constants |= {"ACTIVATION": activation, "UPCAST": False} | {
            f"SUMS{i}": int(one) for i, one in enumerate(summed)
        }
        written = sum(name.startswith("out") for name in pointers)
        maps, sums = 1 + (activation == "relu") + len(terms) + written, 2 * sum(summed)
        yield make("training_join.backward_kernel", maps, sums, pointers, common, constants, floats)


def _merging(arch: int) -> Iterator[Job]:
    """What adds the parts."""
    from regnet_fast.kernels import channel_statistics, channel_tiles

    for unit in (1, 2, 4, 8):
        sizes = ("tiles", "pixels", "tile_pixels", "channel_units")
        pointers = dict.fromkeys(("parts", "mean", "var"), F32)
        constants = channel_statistics.BLOCKS | {"UNIT": unit}
        yield make_job("channel_statistics.merge_kernel", MERGING, arch, F32, pointers, sizes, constants)
        pointers, sizes = dict.fromkeys(("parts", "sums"), F32), ("tiles", "column_units")
        constants = channel_tiles.BLOCKS | {"UNIT": unit}
        yield make_job("channel_tiles.total_kernel", MERGING, arch, F32, pointers, sizes, constants)


MERGING = SimpleNamespace(warps=4)
NORMED, PLAIN, DEPTH = (True, "none", "none"), (False, "none", "none"), (True, "none", "image")
"""Terms: whether there is a norm, the activation behind it, and the factor."""

JOINS = {
    "none": [(True, "silu", "channel")],
    "relu": [DEPTH, NORMED],
    "relu silu": [DEPTH, DEPTH, NORMED],
}
BACKWARD = (
    ("none", [(True, "relu", "none")]),
    ("none", [(True, "silu", "none")]),
    ("none", [(True, "silu", "channel")]),
    ("none", [DEPTH, PLAIN]),
    ("relu", [NORMED, NORMED]),
    ("relu", [DEPTH, PLAIN]),
    ("relu", [NORMED, NORMED, NORMED]),
    ("relu", [DEPTH, DEPTH, NORMED]),
    ("silu", [DEPTH, DEPTH, NORMED]),
)


def _terms(terms: list[tuple[bool, str, str]], dtype: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Pointers and compile-time arguments of the terms."""
    pointers: dict[str, str] = {}
    constants: dict[str, Any] = {f"ACTIVATION{i}": "none" for i in range(TERMS)}
    constants |= {f"FACTOR{i}": "none" for i in range(TERMS)}
    for i, (norm, activation, factor) in enumerate(terms):
        pointers |= {f"x{i}": dtype} | (_norm(i) if norm else {})
        pointers |= {} if factor == "none" else {f"factor{i}": F32 if factor == "channel" else dtype}
        constants |= {f"ACTIVATION{i}": activation, f"FACTOR{i}": factor}
    return pointers, constants


def _gradients(operation: dict[str, Any], batch: int, arch: int, dtype: str) -> Iterator[Job]:
    """Of input and weight, behind a norm with the batch's statistics."""
    from regnet_fast.kernels import grouped_input_gradient, grouped_weight_gradient

    groups, size, stride = operation["groups"], operation["kernel"], operation["stride"]
    widths = operation["in"] // groups, operation["out"] // groups
    if widths[0] % 4 or widths[1] % 4:
        return
    geometry = [(size, size), (stride,) * 2, (operation["dilation"] * (size // 2),) * 2, (operation["dilation"],) * 2]
    out, image = operation["hw"] ** 2, (operation["hw"] * stride) ** 2
    tf32, machine, itemsize = dtype == F32, (arch, PROCESSORS[arch]), DTYPES[dtype].itemsize
    sizes = ("tiles", "out_columns", "height", "columns", "channel_units", "out_units")
    affine = {"dz": dtype, "y": dtype, "a": F32, "q": F32, "b": F32}

    kernels = grouped_input_gradient
    shape = kernels.Shape(batch * image, image, groups, *widths, size * size, stride**2, itemsize, 2, tf32, *machine)
    config = kernels.heuristic(shape)
    assert kernels.config_supports(config, shape) is None, f"{shape}: {config}"
    constants = kernels.constants(config, shape, *geometry, DTYPES[dtype]) | {"UPCAST": False}
    pointers = affine | {"weight": dtype, "dx": dtype}
    name = "grouped_input_gradient.kernel"
    for one in kernels.classes(*geometry):
        yield make_job(name, config, arch, dtype, pointers, ("out_height", *sizes), constants | one)

    kernels = grouped_weight_gradient
    operands = (itemsize, 2, True, tf32)
    shape = kernels.Shape(batch, out, groups, *widths, size * size, stride**2, *operands, *machine)
    config = kernels.heuristic(shape)
    assert kernels.config_supports(config, shape) is None, f"{shape}: {config}"
    constants = kernels.constants(config, shape, *geometry, "silu", DTYPES[dtype]) | {"UPCAST": False}
    pointers = affine | {"x": dtype, "scale": F32, "shift": F32, "parts": F32}
    integers = ("share", "all_tiles", "image_pixels", *sizes)
    yield make_job("grouped_weight_gradient.kernel", config, arch, dtype, pointers, integers, constants)
