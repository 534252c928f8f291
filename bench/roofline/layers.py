"""What bounds each kernel of a forward pass on a GPU: memory, the last cache, products, or the issue of instructions.

    python -m bench.roofline.layers --model regnety_032 --gpu H100 --batch 1 256

The rebuilt model's own forward runs with `cuda,triton` forced; every launch is heard with its tensors and its
configuration and then left out. Each distinct kernel is compiled for the GPU's architecture, and its instructions are
counted. A launch takes the longest of

    memory   the tensors that it was given, each once (`inspect.counting`), over the speed of a copy
    cache    what its tiles read from the last cache and write to it, over that cache's speed
    issue    the instructions of a warp, times warps over the four quarters of a processor, times the blocks that a
             processor computes one after another, over the clock
    products the operations over the peak

and a launch costs `LAUNCH_S` in any case. Latencies, bank conflicts, and a last cache that keeps a map from one layer
to the next are not in it.

cuDNN is granted that nothing but memory and products bounds it, and that it has every bias, residual and ReLU in the
same call; a gate and any other activation are passes. Beside ours is what it takes so for a convolution of one group,
and in the totals, as "the faster", what ours would be if a trial found that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import regnet_fast
from regnet_fast.backends.cuda import launcher
from regnet_fast.backends.cuda.plans import PROCESSORS, Launch, Target
from regnet_fast.inspect.counting import Kernel, launch_bytes
from regnet_fast.inspect.verify import host_model, input_size
from regnet_fast.observer import observing

from ..compile import csrc, kernels, slots
from ..job import Job
from ..report.markdown import render
from ..report.tables import ABSENT, Table, number
from .model import compiled, eager
from .recording import LIBRARY, record

DTYPE = torch.bfloat16
LAUNCH_S = 1.5e-6
GROUPED = "grouped_conv_forward.cu"
MODELS = ("regnety_032", "regnetz_d8", "regnety_160", "resnetv2_50", "repvgg_a2")


@dataclass(frozen=True)
class Gpu:
    """A GPU: bytes a second of a copy and of the last cache, clocks, and bfloat16 operations a second."""

    arch: int
    bytes_per_s: float
    cached_per_s: float
    clock: float
    flops_per_s: float

    @property
    def processors(self) -> int:
        return PROCESSORS[self.arch]


GPUS = {
    "H100": Gpu(90, 3.0e12, 5.5e12, 1.75e9, 790e12),
    "H200": Gpu(90, 4.3e12, 5.5e12, 1.75e9, 790e12),
    "RTX 4090": Gpu(89, 0.92e12, 5.0e12, 2.5e9, 160e12),
    "A100": Gpu(80, 1.75e12, 4.0e12, 1.41e9, 280e12),
}
"""Of data sheets and of what others measured; nothing of it was measured here."""


@dataclass(frozen=True)
class Heard:
    """A launch of ours. `blocks` are those of the grid, `trips` is how often a block goes through its loop; both are 0
    where not known. `passes` are the bytes of what stands around cuDNN's convolution, None where that is no rival.
    """

    name: str
    bytes: int
    cached: int = 0
    flops: int = 0
    job: Job | csrc.Job | None = None
    label: str = ""
    blocks: int = 0
    trips: float = 0
    passes: int | None = None


@dataclass(frozen=True)
class Built:
    """What the compiler made of a kernel: registers, shared memory, and the clocks in which a quarter of a processor
    issues the instructions of a block.
    """

    registers: int
    shared: int
    slots: float


def heard(model: str, batch: int, gpu: Gpu) -> list[Heard]:
    """Every launch of a forward pass, in order. It takes TRITON_INTERPRET=1 from the start of the process.

    Raises UnknownModelError, and BackendError where a block does not run on the kernels.
    """
    network = regnet_fast.rebuild(host_model(model).to(DTYPE)).model
    shape = (batch, *input_size(network, None))
    found: list[Heard] = []
    chosen: list[Any] = []

    def launch(name: str, arguments: dict[str, Any]) -> bool:
        of_triton = name.endswith("kernel")
        if of_triton:
            found.append(_of_triton(name, arguments, chosen[-1] if chosen else None, gpu))
        return not of_triton

    def run(launch: Launch, tensors: dict[str, Tensor | None]) -> None:
        found.append(_of_csrc(launch, tensors, gpu))

    standing_in = launcher.standing_in(run, Target(gpu.arch, gpu.processors))
    with torch.no_grad(), _imagined(gpu), standing_in, regnet_fast.backend("cuda,triton"):
        with observing(launch=launch, choice=chosen.append):
            network(torch.empty(shape, dtype=DTYPE, device="cpu"))
        rows = regnet_fast.explain(network, shape)
    others = [kernel for row in rows for kernel in row.launches if "." not in kernel.name]
    return found + [Heard(f"torch {one.name}", one.bytes, one.bytes, _products(one)) for one in others]


def _products(kernel: Kernel) -> int:
    """The operations of one of torch's; `explain` has a layer's by its largest kernel."""
    return kernel.flops if kernel.name in LIBRARY else 0


@contextmanager
def _imagined(gpu: Gpu) -> Iterator[None]:
    """The interpreter stands in for a GPU's architecture and processors, and a batch goes through in one part."""
    from regnet_fast.blocks import chain
    from regnet_fast.kernels import common, tables

    with mock.patch.object(common, "INTERPRETED", (gpu.arch, gpu.processors)), mock.patch.object(chain, "parts", _one):
        tables.forget()
        yield
    tables.forget()


def _one(*_: Any) -> int:
    return 1


def _of_triton(name: str, arguments: dict[str, Any], choice: Any, gpu: Gpu) -> Heard:
    from regnet_fast import kernels as ours

    module, _, function = name.partition(".")
    names = getattr(getattr(ours, module), function).arg_names
    constexpr = {key for key in arguments if key.isupper()}
    short = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}
    typed = {}
    for key in names:
        value = arguments.get(key)
        if isinstance(value, Tensor):
            typed[key] = short[value.dtype]
        elif isinstance(value, int) and key not in constexpr:
            typed[key] = "i32"
    constants = {key: arguments[key] for key in constexpr} | {"UPCAST": False}
    constants = {key: value for key, value in constants.items() if key in names}
    job = Job(
        name,
        gpu.arch,
        "bfloat16",
        arguments["num_warps"],
        tuple(sorted(typed.items())),
        tuple(sorted(constants.items())),
        "",
    )
    size = launch_bytes(arguments)
    found = Heard(name, size, size, job=job, label=_label(arguments))
    if choice is None or choice.kernel.__name__.rpartition(".")[2] != module:
        return found
    facts = tiles(module, choice.shape, choice.config)
    if facts is None:
        return found
    rival = module != "implicit_gemm" or choice.shape.groups == 1
    return replace(found, **facts, passes=_passes(arguments) if rival else None)


def _passes(arguments: dict[str, Any]) -> int:
    """Bytes that are read and written around a convolution of cuDNN's: of its gated input, and of its result."""
    x, y = (arguments[name].numel() * arguments[name].element_size() for name in "xy")
    around = 2 * x if arguments.get("gate") is not None else 0
    if arguments["ACTIVATION"] in ("none", "relu"):
        return around
    return around + 2 * y + (3 * y if arguments.get("residual") is not None else 0)


def tiles(kernel: str, shape: Any, config: Any) -> dict[str, Any] | None:
    """What a launch's tiles read from the last cache and write to it, its operations, blocks, and the trips of each
    through its loop; None for a kernel whose loops are not known.
    """
    if kernel in ("pointwise_conv", "pointwise_pair"):
        from regnet_fast.kernels.pointwise_tiles import cached_bytes, programs

        shapes = shape.both if kernel == "pointwise_pair" else (shape,)
        counts = [config.tiles(one) for one in shapes]
        blocks = sum(share * across for share, (across, _) in zip(programs(config, *shapes), counts, strict=True))
        of_all = sum(across * down for across, down in counts)
        trips = of_all / blocks if config.resident else -(-shape.channels // config.block_k)
        flops = sum(2 * one.pixels * one.channels * one.out_channels for one in shapes)
        return {"cached": cached_bytes(config, *shapes), "flops": flops, "blocks": blocks, "trips": trips}
    if kernel == "implicit_gemm":
        depth, across = shape.taps * shape.width, -(-shape.out_width // config.block_n)
        images = shape.pixels // shape.image_pixels
        blocks = images * -(-shape.image_pixels // config.block_m) * shape.groups * across
        values = shape.pixels * shape.groups * (depth * across + shape.out_width * (1 + shape.residual))
        values += blocks * depth * min(config.block_n, shape.out_width)
        flops = 2 * shape.pixels * shape.groups * depth * shape.out_width
        return {
            "cached": values * shape.itemsize,
            "flops": flops,
            "blocks": blocks,
            "trips": -(-depth // config.block_k),
        }
    return None


def _of_csrc(launch: Launch, tensors: dict[str, Tensor | None], gpu: Gpu) -> Heard:
    size = launch_bytes(tensors)
    found = Heard(launch.source, size, size, job=csrc.Job(gpu.arch, launch), label=_label(tensors))
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    if launch.source == "squeeze_excite.cu":  # weights for each part of the images, values for each part of the outputs
        times = dict.fromkeys(("fc1", "fc2"), launch.grid[0]) | dict.fromkeys(("parts", "values"), launch.grid[1])
        read = {name: t.numel() * t.element_size() for name, t in tensors.items() if name in times and t is not None}
        again = sum((times[name] - 1) * bytes for name, bytes in read.items())
        return replace(found, cached=size + again, blocks=blocks)
    if launch.source != GROUPED:
        return found
    of, y = slots.sizes_of(launch), tensors["y"]
    slabs = -(-y.shape[1] // (of["groups"] * of["out_tile"]))
    count = y.shape[0] * -(-y.shape[2] // of["tile_h"]) * -(-y.shape[3] // of["tile_w"])
    halo = ((of["tile_h"] - 1) * of["stride"] + 3) * ((of["tile_w"] - 1) * of["stride"] + 3)
    weights = of["groups"] * of["out_tile"] * (9 * of["width"] + 8 * of["in"])
    loads = count * slabs if of["chunk"] < of["width"] else blocks
    read = 8 * of["in"] or of["groups"] * of["width"]
    values = count * slabs * halo * read + loads * weights + y.numel()
    flops = 2 * y.numel() * 9 * of["width"] + 2 * count * halo * 8 * of["in"] * y.shape[1]
    return replace(found, cached=2 * values, flops=flops, blocks=blocks, trips=count * slabs / blocks)


def _label(arguments: dict[str, Any]) -> str:
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    x, y = (tensors.get(key) for key in ("x", "y"))
    if x is None or y is None or y.ndim != 4:
        return ""
    words = [f"{x.shape[1]}x{y.shape[1]}@{y.shape[2]}"]
    words += ["stride 2"] if x.shape[2] > y.shape[2] else []
    return " ".join(words + [key for key in ("gate", "residual") if key in tensors])


def build(job: Job | csrc.Job, trips: float) -> Built:
    """A kernel compiled for its architecture; `trips` is how often a block goes through its loop."""
    if isinstance(job, csrc.Job):
        ((*_, registers),), (sass,) = csrc.built([job])
        of_tile = slots.slots(sass, job.launch).total() if job.launch.source == GROUPED else 0
        return Built(registers, job.launch.shared, of_tile * trips)
    made = kernels.build(job)
    of_block = _triton_slots(made, job.warps, trips) if trips else 0
    return Built(kernels.usage(made.asm["cubin"])[0], made.metadata.shared, of_block)


def _triton_slots(made: Any, warps: int, trips: float) -> float:
    """Those of the loop with the products as often as a block goes through it, and all others once. Of two such loops a
    block takes one, the longer in the worst case, and half of the others.
    """
    texts, loops, _ = slots.instructions(kernels.tool(made.asm["cubin"], "-sass"))
    codes = [slots.opcode(text) for text in texts]
    products = ("HMMA", "HGMMA")
    holding = [codes[loop.first : loop.last + 1] for loop in loops]
    inner = [len(some) - some.count("NOP") for some in holding if any(code in products for code in some)]
    outer = len(codes) - codes.count("NOP") - sum(inner)
    return (outer / max(1, len(inner)) + trips * max(inner, default=0)) * warps / 4


def terms(one: Heard, built: Built | None, gpu: Gpu) -> dict[str, float]:
    """Seconds of a launch by what could bound it."""
    share = min(1.0, one.blocks / gpu.processors) if one.blocks else 1.0  # of the processors, each with its own port
    found = {
        "memory": one.bytes / gpu.bytes_per_s / share,
        "cache": one.cached / gpu.cached_per_s / share,
        "products": one.flops / gpu.flops_per_s / share,
    }
    if built is not None and built.slots:
        found["issue"] = -(-one.blocks // gpu.processors) * built.slots / gpu.clock
    return found


def seconds(one: Heard, built: Built | None, gpu: Gpu) -> float:
    return max(LAUNCH_S, *terms(one, built, gpu).values())


def by_library(one: Heard, gpu: Gpu) -> float | None:
    """Seconds of cuDNN for the same, None where it is no rival."""
    if one.passes is None:
        return None
    found = max(LAUNCH_S, one.bytes / gpu.bytes_per_s, one.flops / gpu.flops_per_s)
    return found + max(LAUNCH_S, one.passes / gpu.bytes_per_s) if one.passes else found


def cudnn(model: str, batch: int, gpu: Gpu) -> dict[str, float]:
    """Seconds of the host's operations one by one, and fused by a compiler, by memory and products alone."""
    network = host_model(model).to(DTYPE)
    recording = record(network, (batch, *input_size(network, None)), DTYPE)
    return {
        name: sum(max(LAUNCH_S, k.bytes / gpu.bytes_per_s, k.flops / gpu.flops_per_s) for k in execution(recording))
        for name, execution in (("unfused", eager), ("compiled", compiled))
    }


def blocks_of_a_processor(built: Built, job: Job | csrc.Job) -> int:
    threads = job.launch.threads if isinstance(job, csrc.Job) else 32 * job.warps
    return csrc.blocks(job.arch, threads, built.registers, built.shared)


_TITLES = ("kernel", "layer", "times", "registers", "shared, KB", "blocks of a processor", "issue slots of a block")
_TITLES += ("cache, MB", "memory, MB", "bound by", "us", "% of copy", "cuDNN, us")


def table(launches: Sequence[Heard], found: dict[Any, Built | None], gpu: Gpu) -> Table:
    """A row for each distinct launch, what takes most of the time first."""
    counts = Counter(launches)
    rows = []
    for one in sorted(counts, key=lambda one: -counts[one] * seconds(one, found.get(_key(one)), gpu)):
        built, times = found.get(_key(one)), terms(one, found.get(_key(one)), gpu)
        bound = max(times, key=times.get) if max(times.values()) > LAUNCH_S else "launch"
        us = 1e6 * seconds(one, built, gpu)
        of = [ABSENT] * 4
        if built is not None:
            held, slots_of = blocks_of_a_processor(built, one.job), number(built.slots) if built.slots else ABSENT
            of = [str(built.registers), number(built.shared / 1024), str(held), slots_of]
        copy = number(100 * one.bytes / gpu.bytes_per_s / (us / 1e6), 2)
        sizes, library = (number(one.cached / 1e6), number(one.bytes / 1e6)), by_library(one, gpu)
        times = number(us), copy, ABSENT if library is None else number(1e6 * library)
        rows.append((one.name, one.label or ABSENT, str(counts[one]), *of, *sizes, bound, *times))
    return Table(_TITLES, tuple(rows))


def _key(one: Heard) -> tuple:
    return one.job, one.trips


def main(arguments: list[str] | None = None) -> int:
    """Print the tables. Exit status 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=tuple(GPUS))
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 256), metavar="N", help="images [1 256]")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # what runs is only heard
    totals = []
    try:
        asked = [(m, g, n) for m in options.model for g in options.gpu for n in options.batch]
        launches = {one: heard(one[0], one[2], GPUS[one[1]]) for one in asked}
    except (ValueError, RuntimeError) as error:
        print(f"bench.roofline.layers: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    del os.environ["TRITON_INTERPRET"]
    jobs = dict.fromkeys(_key(one) for some in launches.values() for one in some if one.job is not None)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = dict(zip(jobs, pool.map(build, *zip(*jobs, strict=True)), strict=True))
    for (model, name, batch), some in launches.items():
        gpu = GPUS[name]
        print(f"{model}, batch {batch}, {name}\n\n{render([table(some, found, gpu)])}")
        times = [(seconds(one, found.get(_key(one)), gpu), by_library(one, gpu)) for one in some]
        ours, faster = sum(mine for mine, _ in times), sum(min(filter(None, both)) for both in times)
        others = cudnn(model, batch, gpu)
        ms, gains = (*others.values(), ours, faster), (others["compiled"] / t for t in (ours, faster))
        totals.append((model, str(batch), name, *(number(1e3 * t) for t in ms), *(f"{gain:.2f}x" for gain in gains)))
    titles = ("model", "batch", "GPU", "unfused, ms", "compiled, ms", "ours, ms", "the faster, ms")
    titles += ("ours over compiled", "the faster over compiled")
    print(render([Table(titles, tuple(totals))]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
