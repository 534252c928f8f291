"""Every kernel compiled for every architecture, without a GPU: registers, spills, shared memory, matrix instructions.

    python -m bench.compile.kernels                                 all architectures and dtypes
    python -m bench.compile.kernels --arch 90 --dtype bfloat16      only these

Exit status 1 where a kernel does not compile, spills, needs more shared memory than there is, or multiplies without
matrix instructions.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from regnet_fast.backends.cuda.plans import PROCESSORS

from .. import cases
from ..job import DTYPES, Job, make_job
from . import training_jobs

MODELS = (
    *("regnetx_002", "regnetx_016", "regnetx_032", "regnetx_080"),
    *("regnety_002", "regnety_008", "regnety_016", "regnety_032", "regnety_080", "regnety_160", "regnety_320"),
    *("regnetz_005", "regnetz_040", "regnetz_b16", "regnetz_c16", "regnetz_d8", "regnetz_d32"),
    *("regnetv_040", "repvgg_a2", "repvgg_b1g4", "repvgg_d2se", "resnetv2_50"),
)
NORMS = ("regnetv", "resnetv2", "repvgg_d2se")
"""Models with norms or gates that no convolution computes for every shape."""

BATCHES = (1, 256)
WITHOUT_PRODUCT = ("norm_act.", "depthwise_conv.", "channel_", "training_")
DEPTHWISE = ((32, 56), (96, 28), (240, 14), (1024, 7))
"""Channels and output sizes of depthwise convolutions, which no model of the table has: of custom configurations."""

INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job."""

    job: Job
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instruction: str = ""
    error: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with it, or ''."""
        from regnet_fast.kernels.common import SHARED_BYTES

        if self.error:
            return self.error
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_BYTES[self.job.arch]:
            return f"needs {self.shared} bytes of shared memory, there are {SHARED_BYTES[self.job.arch]}"
        return (
            ""
            if self.instruction or self.job.kernel.startswith(WITHOUT_PRODUCT)
            else "multiplies without matrix instructions"
        )


def jobs(models: Sequence[str], archs: Sequence[int], dtypes: Sequence[str]) -> list[Job]:
    """Every kernel in its default configurations for every operation of some models, each once."""
    operations = [found for found in cases.operations().values() if set(models) & found["models"].keys()]
    found: dict[Job, None] = {}
    for arch in archs:
        for dtype in dtypes:
            for batch in BATCHES:
                for operation in operations:
                    found.update(dict.fromkeys(_KINDS[operation["op"]](operation, batch, arch, dtype)))
                for conv1, shortcut in _pairs(operations):
                    found.update(dict.fromkeys(_pair(conv1, shortcut, batch, arch, dtype)))
                for operation in operations:
                    if "hw" in operation and any(model.startswith(NORMS) for model in operation["models"]):
                        found.update(dict.fromkeys(_norm_act(operation, batch, arch, dtype)))
                for operation in operations:
                    found.update(dict.fromkeys(training_jobs.jobs(operation, batch, arch, dtype)))
                for channels, size in DEPTHWISE:
                    found.update(dict.fromkeys(_depthwise(channels, size, batch, arch, dtype)))
    return list(found)


def _pairs(operations: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A 1x1 convolution and a shortcut that may read the same map."""
    narrow = [one for one in operations if one["op"] == "pointwise_conv"]
    for shortcut in narrow:
        for conv1 in narrow if shortcut["activation"] == "none" else ():
            same = conv1["in"] == shortcut["in"] and conv1["hw"] == shortcut["hw"] * shortcut["stride"]
            if same and conv1["activation"] != "none" and conv1["models"].keys() & shortcut["models"].keys():
                yield conv1, shortcut


def _pair(conv1: dict[str, Any], shortcut: dict[str, Any], batch: int, arch: int, dtype: str) -> Iterator[Job]:
    """Both in one launch; in pre-activation models of a map that they normalise."""
    from regnet_fast.kernels import pointwise_pair as kernels

    before = any(model.startswith(("regnetv", "resnetv2")) for model in conv1["models"])
    widths = (conv1["in"], conv1["out"], shortcut["out"])
    operands = (DTYPES[dtype].itemsize, shortcut["stride"], dtype == "float32", before)
    shape = kernels.Shape(batch * conv1["hw"] ** 2, *widths, *operands, arch, PROCESSORS[arch])
    config = kernels.heuristic(shape)
    refusal = kernels.config_supports(config, shape)
    assert refusal is None, f"{shape}: {config}: {refusal}"
    constants = kernels.constants(config, shape, conv1["activation"], DTYPES[dtype])
    constants |= {"HAS_BIAS": True, "OTHER_BIAS": not before, "UPCAST": False, "NORM": "relu" if before else None}
    pointers = dict.fromkeys(("x", "weight", "y", "other_weight", "other"), dtype) | {"bias": "float32"}
    pointers |= {"scale": "float32", "shift": "float32"} if before else {"other_bias": "float32"}
    integers = ("pixels", "other_pixels", "out_area", "out_width", "in_area", "in_width")
    integers += ("channel_units", "out_units", "other_units", *(("share",) if config.resident else ()))
    form = "resident" if config.resident else "streamed"
    yield make_job(f"pointwise_pair.{form}_kernel", config, arch, dtype, pointers, integers, constants)


def _pointwise(operation: dict[str, Any], batch: int, arch: int, dtype: str) -> Iterator[Job]:
    """A 1x1 convolution as it is, with a residual, and with a gate and a residual; in pre-activation models of what it
    normalises itself.
    """
    from regnet_fast.kernels import pointwise_conv as kernels

    integers = ("pixels", "out_area", "out_width", "in_area", "in_width", "channel_units", "out_units")
    after = operation["activation"]
    forms = [(gate, residual, None, None, True, after) for gate in (False, True) for residual in (False, True)]
    if any(model.startswith("regnetz") for model in operation["models"]):
        forms += [(gate, residual, None, None, True, "none") for gate in (False, True) for residual in (False, True)]
    if any(model.startswith(("regnetv", "resnetv2")) for model in operation["models"]):
        forms += [(False, True, None, None, False, "none"), (False, False, "relu", None, True, after)]
        forms += [(False, True, None, "relu", True, after), (True, True, "relu", "relu", True, after)]
    for gate, residual, norm, residual_norm, bias, activation in forms:
        if operation["stride"] > 1 and (gate or residual):
            continue  # only shortcuts have a stride
        pixels = batch * operation["hw"] ** 2
        size = DTYPES[dtype].itemsize
        area = operation["hw"] ** 2 if gate else 0
        operands = (size, area, residual, operation["stride"], dtype == "float32")
        norms = (norm is not None, residual_norm is not None)
        shape = kernels.Shape(pixels, operation["in"], operation["out"], *operands, arch, PROCESSORS[arch], *norms)
        config = kernels.heuristic(shape)
        refusal = kernels.config_supports(config, shape)
        assert refusal is None, f"{shape}: {config}: {refusal}"
        constants = kernels.constants(config, shape, operation["stride"], activation, DTYPES[dtype])
        constants |= {"HAS_BIAS": bias, "UPCAST": False, "NORM": norm, "RESIDUAL_NORM": residual_norm}
        pointers = {"x": dtype, "weight": dtype, "y": dtype} | ({"bias": "float32"} if bias else {})
        pointers |= {name: dtype for name, there in (("gate", gate), ("residual", residual)) if there}
        pointers |= dict.fromkeys(("scale", "shift"), "float32") if norm else {}
        pointers |= dict.fromkeys(("residual_scale", "residual_shift"), "float32") if residual_norm else {}
        form = "resident" if config.resident else "streamed"
        yield make_job(f"pointwise_conv.{form}_kernel", config, arch, dtype, pointers, integers, constants)


def _convolution(operation: dict[str, Any], batch: int, arch: int, dtype: str) -> Iterator[Job]:
    """Any other convolution: as it is, with parts of its means where it has groups, with a residual where not; on
    images in both layouts.
    """
    size, groups = operation["kernel"], operation["groups"]
    geometry = [(size, size), (operation["stride"],) * 2, (operation["dilation"] * (size // 2),) * 2]
    geometry.append((operation["dilation"],) * 2)
    integers = ("tiles", "image_pixels", "out_columns", "height", "columns", "channel_units", "out_units")
    from regnet_fast.kernels import implicit_gemm as kernels

    widths = operation["in"] // groups, operation["out"] // groups
    pixels, steps = operation["hw"] ** 2, operation["stride"] ** 2
    operands = (DTYPES[dtype].itemsize, False, False, dtype == "float32")
    machine = (arch, PROCESSORS[arch])
    shape = kernels.Shape(batch * pixels, pixels, groups, *widths, size * size, steps, *operands, *machine)
    if groups > 1 and (widths[0] % 4 or widths[1] % 4):
        return  # refused
    config = kernels.heuristic(shape)
    refusal = kernels.config_supports(config, shape)
    assert refusal is None, f"{shape}: {config}: {refusal}"
    image = operation["in"] == 3
    forms = [(False, False, True), (True, False, True), *([(False, True, True)] if image else [])]
    if image and any(model.startswith("resnetv2") for model in operation["models"]):
        forms += [(False, False, False), (False, True, False)]  # its norm comes later
    for more, channels_first, bias in forms:
        constants = kernels.constants(
            config, shape, *geometry, operation["activation"] if bias else "none", DTYPES[dtype]
        )
        constants |= {"HAS_BIAS": bias, "UPCAST": False, "CHANNELS_FIRST": channels_first}
        constants |= {"HAS_PARTIAL": more and groups > 1, "HAS_RESIDUAL": more and groups == 1}
        pointers = {"x": dtype, "weight": dtype, "y": dtype} | ({"bias": "float32"} if bias else {})
        pointers |= {"partial": "float32"} if constants["HAS_PARTIAL"] else {}
        pointers |= {"residual": dtype} if constants["HAS_RESIDUAL"] else {}
        yield make_job("implicit_gemm.kernel", config, arch, dtype, pointers, integers, constants)


def _norm_act(operation: dict[str, Any], batch: int, arch: int, dtype: str) -> Iterator[Job]:
    """The norm before a convolution, and RepVGG's gate and activation behind one."""
    from regnet_fast.kernels import norm_act as kernels

    for gate, activation, channels in ((False, "relu", operation["in"]), (True, "relu", operation["out"])):
        shape = kernels.Shape(batch * operation["hw"] ** 2, channels, DTYPES[dtype].itemsize, gate)
        config = kernels.heuristic(shape)
        pointers = {"x": dtype, "scale": "float32", "shift": "float32", "y": dtype} | ({"gate": dtype} if gate else {})
        constants = {"UNIT": kernels.unit(channels), "ACTIVATION": activation, "HAS_GATE": gate, "UPCAST": False}
        constants |= {"BLOCK_P": config.block_p, "BLOCK_C": config.block_c}
        integers = ("pixels", "image_pixels", "channel_units")
        yield make_job("norm_act.kernel", config, arch, dtype, pointers, integers, constants)


def _depthwise(channels: int, size: int, batch: int, arch: int, dtype: str) -> Iterator[Job]:
    """A 3x3 depthwise convolution in both strides, with and without parts of its means."""
    from regnet_fast.kernels import depthwise_conv as kernels

    for stride, means in ((1, False), (1, True), (2, False), (2, True)):
        operands = (9, stride**2, DTYPES[dtype].itemsize, means)
        config = kernels.heuristic(kernels.Shape(batch * size**2, size**2, channels, *operands))
        pointers = {"x": dtype, "weight": dtype, "bias": "float32", "y": dtype} | (
            {"partial": "float32"} if means else {}
        )
        constants = {"UNIT": kernels.unit(channels), "KH": 3, "KW": 3, "STRIDE_H": stride, "STRIDE_W": stride}
        constants |= {"PAD_H": 1, "PAD_W": 1, "DILATION_H": 1, "DILATION_W": 1, "ACTIVATION": "silu"}
        constants |= {"HAS_BIAS": True, "HAS_PARTIAL": means, "UPCAST": False}
        constants |= {"BLOCK_P": config.block_p, "BLOCK_C": config.block_c}
        integers = ("tiles", "image_pixels", "out_columns", "height", "columns", "channel_units")
        yield make_job("depthwise_conv.kernel", config, arch, dtype, pointers, integers, constants)


def _squeeze_excite(operation: dict[str, Any], batch: int, arch: int, dtype: str) -> Iterator[Job]:
    from regnet_fast.kernels import common
    from regnet_fast.kernels import squeeze_excite as kernels

    config = kernels.heuristic(kernels.Shape(batch, 1, operation["in"], operation["out"], arch))
    blocks = {"BLOCK_I": config.block_i, "BLOCK_C": config.block_c, "BLOCK_R": config.block_r, "PRECISION": "tf32x3"}
    blocks |= {"UNIT": common.unit(operation["in"]), "HIDDEN_UNIT": common.unit(operation["out"])}
    narrow = {"GATE": "sigmoid", "UPCAST": False}
    first = dict.fromkeys(("parts", "fc1", "bias1"), "float32")
    second = {**dict.fromkeys(("fc2", "bias2"), "float32"), "gate": dtype}
    counts = ("images", "channel_units", "hidden_units")
    acts = [{"ACTIVATION": name} for name in ("relu", "silu")]
    if config.whole:
        name, pointers = "squeeze_excite.whole_kernel", {**first, **second}
        for act in acts:
            yield make_job(name, config, arch, dtype, pointers, (*counts, "tiles"), {**blocks, **act, **narrow})
        return
    pointers = {**first, "result": "float32"}
    for act in acts:
        name = "squeeze_excite.hidden_kernel"
        yield make_job(name, config, arch, "float32", pointers, (*counts, "tiles"), {**blocks, **act})
    pointers = {"values": "float32", **second}
    yield make_job("squeeze_excite.gate_kernel", config, arch, dtype, pointers, counts, {**blocks, **narrow})


_KINDS = {
    "pointwise_conv": _pointwise,
    "grouped_conv": _convolution,
    "dense_conv": _convolution,
    "squeeze_excite": _squeeze_excite,
}


def source(job: Job) -> tuple[Any, dict[str, Any]]:
    """A job as `triton.compile` takes it, source and options: the same as of a launch, and so the same in its cache."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    from regnet_fast import kernels

    module, _, name = job.kernel.partition(".")
    for needed in (module, "common"):
        importlib.import_module(f"{kernels.__name__}.{needed}")
    kernel = getattr(getattr(kernels, module), name)
    kinds, values = dict(job.arguments), dict.fromkeys(kernel.arg_names) | dict(job.constants)
    facts = [
        (kinds[name], "D" if kinds[name].startswith("*") else None) if name in kinds else ("constexpr", value)
        for name, value in values.items()
    ]
    options = {"num_warps": job.warps, **kernels.common.LIMITS, "debug": False, "instrumentation_mode": ""}
    backend = make_backend(GPUTarget("cuda", job.arch, 32))
    made, signature, constants, attributes = kernel._pack_args(backend, options, values, facts, options)
    return ASTSource(kernel, signature, constants, attributes), made.__dict__


def build(job: Job) -> Any:
    """What Triton makes of a job ahead of time. Raises what its compiler raises."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it is anyway, without a warning
    import triton
    from triton.backends.compiler import GPUTarget

    code, options = source(job)
    return triton.compile(code, target=GPUTarget("cuda", job.arch, 32), options=options)


def compile_job(job: Job) -> Compiled:
    """Compile ahead of time and read what came out."""
    try:
        made = build(job)
    except Exception as error:
        return Compiled(job, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}")
    registers, spilled = usage(made.asm["cubin"])
    found = next((name for name, text in INSTRUCTIONS.items() if text in made.asm["ptx"]), "")
    return Compiled(job, registers, spilled, made.metadata.shared, found)


def tool(cubin: bytes, option: str) -> str:
    """What Triton's cuobjdump says of a binary."""
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills."""
    text = tool(cubin, "-res-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def compile_all(found: Sequence[Job], workers: int | None = None) -> list[Compiled]:
    """All jobs, in several processes, with a progress bar."""
    from tqdm import tqdm

    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(compile_job, found, chunksize=4), total=len(found), unit="kernel", disable=None))


def table(made: Sequence[Compiled]) -> str:
    """A row for each kernel, dtype and architecture: how many variants, and the most that any of them takes."""
    groups: dict[tuple, list[Compiled]] = {}
    for one in made:
        groups.setdefault((one.job.kernel, one.job.dtype, one.job.arch), []).append(one)
    lines = []
    for (kernel, dtype, arch), same in sorted(groups.items()):
        registers, shared = [one.registers for one in same], [one.shared / 1024 for one in same]
        instructions = ", ".join(sorted({one.instruction or "fma" for one in same}))
        lines.append(
            f"| {kernel} | {dtype} | sm_{arch} | {len(same)} | {len({one.job.config for one in same})} "
            f"| {min(registers)}-{max(registers)} | {min(shared):.0f}-{max(shared):.0f} "
            f"| {sum(one.spilled > 0 for one in same)} | {instructions} |"
        )
    return _COLUMNS + "\n".join(lines)


_COLUMNS = (
    "| kernel | dtype | architecture | variants | tiles | registers | shared, KB | spills | multiplies with |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---|\n"
)


def main(arguments: list[str] | None = None) -> int:
    from regnet_fast.kernels.common import ARCHITECTURES

    parser = argparse.ArgumentParser(prog="python -m bench.compile.kernels", description="Compiled without a GPU.")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--kernel", nargs="+", default=("",), help="only kernels whose names begin so")
    options = parser.parse_args(arguments)
    chosen = jobs(options.model, options.arch, options.dtype)
    made = compile_all([job for job in chosen if job.kernel.startswith(tuple(options.kernel))])
    for one in made:
        if one.fault:
            print(
                f"{one.job.kernel}, sm_{one.job.arch}, {one.job.dtype}, {one.job.config}: {one.fault}", file=sys.stderr
            )
    print(table(made))
    return 1 if any(one.fault for one in made) else 0


if __name__ == "__main__":
    sys.exit(main())
