"""The CUDA C++ kernels of csrc/ compiled for every architecture with nvcc, without a GPU: what becomes of them.

    python -m bench.cuda_compilation                       every grouped convolution of the models, all architectures
    python -m bench.cuda_compilation --arch 90 --model regnety_016 --batch 1 256
    python -m bench.cuda_compilation --write               its rows into the table of docs/cuda.md as well

Exit status 1 where a kernel does not compile, spills or uses local memory, needs more shared memory than there is,
copies less than sixteen bytes at a time, or multiplies without matrix instructions.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regnet_fast.backends import cuda_plans
from regnet_fast.backends.cuda_plans import PROCESSORS, SHARED_BYTES, DepthwiseConv, GroupedConv, Launch, Target

from . import cases

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cuda.md"
DEPTHWISE = ((64, 56, 1), (128, 28, 2))
SQUEEZE_EXCITE = ((1, 888, 222), (256, 120, 30), (4096, 888, 222))
THREADS_OF_PROCESSOR = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
RESERVED = 1024  # bytes of shared memory that each block takes besides


@dataclass(frozen=True)
class Job:
    """A kernel that is compiled once: the launch of it that was met first."""

    arch: int
    launch: Launch

    @property
    def products(self) -> bool:
        return self.launch.source.startswith("grouped_conv_")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job; instructions are those of the program, not of a run."""

    job: Job
    registers: int = 0
    local: int = 0
    instructions: int = 0
    products: int = 0
    matrix_loads: int = 0
    wide_copies: int = 0
    narrow_copies: int = 0
    error: str = ""

    @property
    def blocks(self) -> int:
        """Blocks of a processor at once."""
        launch, arch = self.job.launch, self.job.arch
        warps = launch.threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * warps)
        by_shared = (SHARED_BYTES[arch] + RESERVED) // (launch.shared + RESERVED)
        return min(by_registers, by_shared, THREADS_OF_PROCESSOR[arch] // launch.threads, 32)

    @property
    def fault(self) -> str:
        """What is wrong with it, or ''."""
        if self.error:
            return self.error
        if self.local:
            return f"{self.local} bytes of local memory"
        if self.job.launch.shared > SHARED_BYTES[self.job.arch]:
            return f"needs {self.job.launch.shared} bytes of shared memory"
        if not self.blocks:
            return f"{self.registers} registers in {self.job.launch.threads} threads: no block fits"
        if self.job.products and not (self.products and self.matrix_loads):
            return "multiplies without matrix instructions"
        if self.job.products and (self.narrow_copies or not self.wide_copies):
            return "copies less than sixteen bytes at a time"
        return ""


def grouped_convs(models: Sequence[str] | None) -> dict[tuple[int, int, int, int], str]:
    """Groups, width, output size and stride of every grouped convolution, with its activation."""
    found = {}
    for operation in cases.operations().values():
        if operation["op"] != "grouped_conv" or (models and not set(models) & operation["models"].keys()):
            continue
        groups, stride, size = operation["groups"], operation["stride"], operation["hw"]
        width = operation["in"] // groups
        problem = GroupedConv(1, size * stride, size * stride, groups, width, stride, "bfloat16")
        kernel = (operation["kernel"],) * 2
        padding = (operation["kernel"] // 2,) * 2
        if cuda_plans.refuse(problem, kernel=kernel, padding=padding) is None:
            found[groups, width, size, stride] = operation["activation"]
    return found


def launches(models: Sequence[str] | None, arch: int, dtype: str, batches: Sequence[int]) -> Iterator[Launch]:
    """The default plans: forward with parts of the means, backward in training; and samples of the other kernels."""
    target = Target(arch, PROCESSORS[arch])
    training = {"affine": 2, "norm": True, "sums": True, "target": target}
    for (groups, width, size, stride), activation in grouped_convs(models).items():
        for batch in batches:
            problem = GroupedConv(batch, size * stride, size * stride, groups, width, stride, dtype)
            yield cuda_plans.grouped_conv_forward(problem, activation, True, target)
            yield from cuda_plans.grouped_conv_backward(problem, activation=activation, **training)
    for channels, size, stride in DEPTHWISE:
        problem = DepthwiseConv(256, size * stride, size * stride, channels, stride, dtype)
        yield cuda_plans.depthwise_conv_forward(problem, "silu", True)
        yield from cuda_plans.depthwise_conv_backward(problem, activation="silu", **training)
    for images, channels, hidden in SQUEEZE_EXCITE:
        yield cuda_plans.squeeze_excite(images, 4, channels, hidden, dtype, "relu", target)


def jobs(
    models: Sequence[str] | None, archs: Sequence[int], dtypes: Sequence[str], batches: Sequence[int] = (256,)
) -> list[Job]:
    """Every kernel once."""
    found: dict[tuple[int, str], Job] = {}
    for arch in archs:
        for dtype in dtypes:
            for launch in launches(models, arch, dtype, batches):
                found.setdefault((arch, launch.kernel), Job(arch, launch))
    return list(found.values())


@functools.cache
def disassembler() -> str:
    """cuobjdump, of CUDA's own tools or of Triton's copy."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton.backends.nvidia as nvidia

        found = str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")
    return found


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """The instantiations by their mangled names, as `Launch` writes them."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {
        name: re.match(r"(?:void )?(\w+<.*?>)\(", plain)[1]
        for name, plain in zip(names, done.stdout.splitlines(), strict=True)
    }


def compile_jobs(same: Sequence[Job]) -> list[Compiled]:
    """Compile kernels of one source and architecture together, and read what came out."""
    arch, numbers = same[0].arch, {name: str(i) for i, name in enumerate(cuda_plans.ACTIVATIONS.values())}
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        text = f'#include "{same[0].launch.source}"\n__device__ const void* kernels[] = {{\n'
        source.write_text(text + ",\n".join(f"(const void*)&{job.launch.kernel}" for job in same) + "};\n")
        command = ["nvcc", "-std=c++17", f"-arch=sm_{'90a' if arch == 90 else arch}", "-cubin", "-Xptxas", "-v"]
        command += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "device"), "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return [Compiled(job, error=done.stderr.strip()[-400:]) for job in same]
        sass = subprocess.run([disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)"
    pattern += r".*?Used (\d+) registers"
    used = {name: tuple(map(int, rest)) for name, *rest in re.findall(pattern, done.stderr, re.DOTALL)}
    programs = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", sass, re.DOTALL))
    plain, found = _demangled(list(used)), {}
    for name, (stack, stored, loaded, registers) in used.items():

        def count(pattern: str, program: str = programs[name]) -> int:
            return len(re.findall(rf"\b{pattern}", program))

        wide = count(r"LDGSTS\.[\w.]*128")
        found[plain[name]] = (
            registers,
            stack + stored + loaded + count("LDL") + count("STL"),
            len(re.findall(r"/\*[0-9a-f]{4,5}\*/", programs[name])),
            count("HMMA"),
            count("LDSM"),
            wide,
            count("LDGSTS") - wide,
        )
    names = [re.sub("|".join(numbers), lambda match: numbers[match[0]], job.launch.kernel) for job in same]
    return [Compiled(job, *found[name]) for job, name in zip(same, names, strict=True)]


def compile_all(found: Sequence[Job]) -> Iterator[Compiled]:
    """All jobs, a dozen at a time."""
    by_source: dict[tuple[int, str], list[Job]] = {}
    for job in found:
        by_source.setdefault((job.arch, job.launch.source), []).append(job)
    for same in by_source.values():
        for start in range(0, len(same), 12):
            yield from compile_jobs(same[start : start + 12])


def _row_name(launch: Launch) -> tuple[str, int]:
    """The kernel with what it makes, and its group width (0: none)."""
    name, _, rest = launch.kernel.partition("<")
    facts = rest.rstrip(">").split(", ")
    if name == "grouped_conv_backward":
        made = {("true", "true"): "both", ("true", "false"): "dx", ("false", "true"): "dweight"}[facts[12], facts[13]]
        return f"{name}, {made}", int(facts[1])
    return name, int(facts[1]) if name.startswith("grouped") else 0


def _dtype(launch: Launch) -> str:
    """The dtype of a kernel, '-' for one that has none."""
    names = {name: dtype for dtype, name in cuda_plans.TYPES.items()}
    return names.get(launch.kernel.partition("<")[2].partition(",")[0], "-")


def merged(page: str, lines: str) -> str:
    """A document with the rows of a table in its own, in place of those of the same first four cells."""
    begin, end = "<!-- cuda-compilation -->\n", "<!-- /cuda-compilation -->"
    before, _, rest = page.partition(begin)
    old, _, after = rest.partition(end)
    titles = lines.splitlines()[:2]
    rows = {}
    for line in (*old.splitlines()[2:], *lines.splitlines()[2:]):
        kernel, width, arch, dtype = (cell.strip() for cell in line.split("|")[1:5])
        rows[kernel, int(width.replace("-", "0")), int(arch[3:]), dtype] = line
    return before + begin + "\n".join([*titles, *(rows[key] for key in sorted(rows))]) + "\n" + end + after


def table(made: Sequence[Compiled]) -> str:
    """A row for each kernel, group width, architecture and dtype, from the least to the most of its variants."""
    groups: dict[tuple, list[Compiled]] = {}
    for one in made:
        groups.setdefault((*_row_name(one.job.launch), one.job.arch, _dtype(one.job.launch)), []).append(one)

    def span(values: Sequence[int]) -> str:
        return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"

    lines = [
        "| kernel | width | architecture | dtype | variants | threads | registers | shared, KB | blocks | instructions "
        "| HMMA | LDSM | local |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (kernel, width, arch, dtype), same in sorted(groups.items()):
        columns = (
            span([one.job.launch.threads for one in same]),
            span([one.registers for one in same]),
            span([one.job.launch.shared // 1024 for one in same]),
            span([one.blocks for one in same]),
            span([one.instructions for one in same]),
            span([one.products for one in same]),
            span([one.matrix_loads for one in same]),
            span([one.local for one in same]),
        )
        lines.append(f"| {kernel} | {width or '-'} | sm_{arch} | {dtype} | {len(same)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_compilation", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=tuple(SHARED_BYTES), default=tuple(SHARED_BYTES))
    parser.add_argument("--dtype", nargs="+", choices=tuple(cuda_plans.TYPES), default=("bfloat16",))
    parser.add_argument("--model", nargs="+", help="by default all")
    parser.add_argument("--batch", nargs="+", type=int, default=(256,))
    parser.add_argument("--write", action="store_true", help="merge the rows into the table of docs/cuda.md")
    options = parser.parse_args(arguments)
    made = []
    for one in compile_all(jobs(options.model, options.arch, options.dtype, options.batch)):
        made.append(one)
        if one.fault:
            print(f"sm_{one.job.arch}, {one.job.launch.kernel}: {one.fault}", file=sys.stderr, flush=True)
    print(table(made))
    if options.write:
        PAGE.write_text(merged(PAGE.read_text(), table(made)))
    return 1 if any(one.fault for one in made) else 0


if __name__ == "__main__":
    sys.exit(main())
