"""The CUDA C++ kernels of csrc/ compiled for every architecture with nvcc, without a GPU: what becomes of them.

    python -m bench.compile.csrc                       all that models take, every width, all architectures
    python -m bench.compile.csrc --model regnety_016 --arch 90 --batch 1 256        what some models take

What was compiled once is kept in .cache/cuda-compilation by all that it was made from: a run goes on where the last
one ended, and after a change compiles what the change touches.

Exit status 1 where a kernel does not compile, spills or uses local memory, needs more shared memory than there is,
copies less than sixteen bytes at a time, or multiplies without matrix instructions.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csrc.extension import cuda_launches
from regnet_fast import store
from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import SHARED_BYTES, WIDEST, Launch

from ..report import markdown
from ..report.tables import Table

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
KEPT = ROOT / ".cache" / "cuda-compilation"
BATCHES = (256,)
TOGETHER = 24  # kernels that the compiler takes at a time: two to four times as fast as one by one
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
        return blocks(self.job.arch, self.job.launch.threads, self.registers, self.job.launch.shared)

    @property
    def occupancy(self) -> int:
        """The threads of a processor at once, in per cent of what it takes."""
        return 100 * self.blocks * self.job.launch.threads // THREADS_OF_PROCESSOR[self.job.arch]

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


def blocks(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of so many threads, registers of a thread and bytes of shared memory that a processor holds at once."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * (threads // 32))
    by_shared = (SHARED_BYTES[arch] + RESERVED) // (shared + RESERVED)
    return min(by_registers, by_shared, THREADS_OF_PROCESSOR[arch] // threads, 32)


def other_widths() -> list[cuda_launches.Conv]:
    """A convolution of every width and stride that no model has."""
    known = {(conv.width, conv.stride) for conv in cuda_launches.grouped_convs()}
    return [
        cuda_launches.Conv(max(2, 448 // width), width, 14, stride, "relu")
        for width in range(8, WIDEST + 1, 8)
        for stride in (1, 2)
        if (width, stride) not in known
    ]


def jobs(
    models: Sequence[str] | None = None,
    archs: Sequence[int] = tuple(SHARED_BYTES),
    dtypes: Sequence[str] = tuple(plans.TYPES),
    batches: Sequence[int] = BATCHES,
) -> list[Job]:
    """Every kernel that some models take, once; without models everything there is."""
    asked: list[tuple[int, Iterable[Launch]]] = []
    for dtype in dtypes:
        asked += [(arch, cuda_launches.of_models(models, arch, (dtype,), batches)) for arch in archs]
        if not models:
            asked += [(arch, cuda_launches.of_convs(other_widths(), arch, (dtype,), batches)) for arch in archs]
            asked += [(arch, cuda_launches.of_depthwise((dtype,))) for arch in archs]
    found: dict[tuple[int, str], Job] = {}
    for arch, launches in asked:
        for launch in launches:
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


@functools.cache
def compiler_version() -> str:
    """The words of nvcc about itself."""
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def release() -> str:
    """nvcc's release, such as 13.0.88."""
    return re.search(r"V([\d.]+)", compiler_version())[1]


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """The instantiations by their mangled names, as `Launch` writes them."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {
        name: re.match(r"(?:void )?(\w+<.*?>)\(", plain)[1]
        for name, plain in zip(names, done.stdout.splitlines(), strict=True)
    }


def compile_jobs(same: Sequence[Job]) -> list[Compiled]:
    """Compile kernels of one source and architecture together, and read what came out."""
    try:
        used, programs = built(same)
    except subprocess.CalledProcessError as error:
        if len(same) > 1:
            return [one for job in same for one in compile_jobs([job])]
        return [Compiled(same[0], error=error.stderr.strip()[-400:])]
    made = []
    for job, (stack, stored, loaded, registers), program in zip(same, used, programs, strict=True):

        def count(pattern: str, program: str = program) -> int:
            return len(re.findall(rf"\b{pattern}", program))

        local = stack + stored + loaded + count("LDL") + count("STL")
        instructions = len(re.findall(r"/\*[0-9a-f]{4,5}\*/", program))
        wide = count(r"LDGSTS\.[\w.]*128")
        narrow = count("LDGSTS") - wide
        made.append(Compiled(job, registers, local, instructions, count("HMMA"), count("LDSM"), wide, narrow))
    return made


def built(same: Sequence[Job]) -> tuple[list[tuple[int, ...]], list[str]]:
    """Of kernels of one source and architecture: stack, bytes spilled, loaded again, and registers; and their SASS.

    Raises subprocess.CalledProcessError where the compiler refuses one.
    """
    numbers = {name: str(i) for i, name in enumerate(plans.ACTIVATIONS.values())}
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        text = f'#include "{same[0].launch.source}"\n__device__ const void* kernels[] = {{\n'
        source.write_text(text + ",\n".join(f"(const void*)&{job.launch.kernel}" for job in same) + "};\n")
        includes = ("-I", str(CSRC), "-I", str(CSRC / "device"))
        command = ["nvcc", *_options(same[0].arch), *includes, "-o", str(cubin), str(source)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)"
    pattern += r".*?Used (\d+) registers"
    used = {name: tuple(map(int, rest)) for name, *rest in re.findall(pattern, said, re.DOTALL)}
    programs = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", sass, re.DOTALL))
    mangled = {plain: name for name, plain in _demangled(list(used)).items()}
    names = re.compile(rf"\b({'|'.join(numbers)})\b")
    kernels = [names.sub(lambda match: numbers[match[0]], job.launch.kernel) for job in same]
    return [used[mangled[kernel]] for kernel in kernels], [programs[mangled[kernel]] for kernel in kernels]


def _options(arch: int) -> tuple[str, ...]:
    return "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"


def key(job: Job) -> str:
    """The digest of all that becomes of a job depends on."""
    return store.key(compiler_version(), *_options(job.arch), _content(job.launch.source), job.launch.kernel)


@functools.cache
def _content(source: str) -> str:
    """The digest of a source and the headers that it includes."""
    found: dict[Path, str] = {}
    left = [CSRC / source]
    while left:
        path = left.pop()
        if path not in found:
            found[path] = path.read_text()
            names = re.findall(r'^#include ["<](.+?)[">]', found[path], re.MULTILINE)
            places = [folder / name for name in names for folder in (CSRC, CSRC / "device")]
            left += [place for place in places if place.exists()]
    return store.key(*(found[path] for path in sorted(found)))


class Kept:
    """What was compiled before: a file with a line for each kernel, to which every batch is added at once."""

    def __init__(self, folder: Path = KEPT):
        self.path, self.found = folder / "kernels.jsonl", {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for line in lines:
            try:
                name, *facts = json.loads(line)
            except ValueError:  # of a process that was killed as it wrote
                continue
            self.found[name] = facts

    def get(self, job: Job) -> Compiled | None:
        facts = self.found.get(key(job))
        return facts and Compiled(job, *facts)

    def add(self, made: Iterable[Compiled]) -> None:
        lines = [json.dumps([key(one.job), *list(vars(one).values())[1:-1]]) for one in made if not one.error]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(f"\n{line}" for line in lines))


def compile_all(found: Sequence[Job], kept: Kept) -> Iterator[Compiled]:
    """All jobs: first those that were compiled before, then the others, some at a time."""
    by_source: dict[tuple[int, str], list[Job]] = {}
    for job in found:
        before = kept.get(job)
        if before is not None:
            yield before
        else:
            by_source.setdefault((job.arch, job.launch.source), []).append(job)
    parts = [same[i : i + TOGETHER] for same in by_source.values() for i in range(0, len(same), TOGETHER)]
    order = {id(job): place for place, job in enumerate(found)}
    for part in sorted(parts, key=lambda part: order[id(part[0])]):
        made = compile_jobs(part)
        kept.add(made)
        yield from made


def kind(job: Job) -> str:
    """The kernel; of a backward kernel also what it makes."""
    name, _, facts = job.launch.kernel.rstrip(">").partition("<")
    if name != "grouped_conv_backward":
        return name
    made = {("true", "true"): "both", ("true", "false"): "dx", ("false", "true"): "dweight"}
    return f"{name}, {made[tuple(facts.split(', ')[12:14])]}"


def summary(made: Iterable[Compiled]) -> str:
    """The worst of each kind of kernel on each architecture, as a table of Markdown."""
    groups: dict[tuple[str, int], list[Compiled]] = {}
    for one in made:
        groups.setdefault((kind(one.job), one.job.arch), []).append(one)
    rows = []
    for (name, arch), same in sorted(groups.items()):
        shared = max(one.job.launch.shared for one in same) // 1024
        worst = max(one.registers for one in same), shared, min(one.occupancy for one in same)
        rows.append((name, f"sm_{arch}", *map(str, (len(same), *worst))))
    titles = "kernel", "architecture", "kernels", "registers", "shared, KB", "occupancy, %"
    return markdown.render([Table(titles, tuple(rows))])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.csrc", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=tuple(SHARED_BYTES), default=tuple(SHARED_BYTES))
    parser.add_argument("--dtype", nargs="+", choices=tuple(plans.TYPES), default=tuple(plans.TYPES))
    parser.add_argument("--model", nargs="+", help="by default all, and every width that none has")
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    options = parser.parse_args(arguments)
    kept, made, wrong = Kept(), [], 0
    found = jobs(options.model, options.arch, options.dtype, options.batch)
    for one in compile_all(found, kept):
        made.append(one)
        if one.fault:
            wrong += 1
            print(f"sm_{one.job.arch}, {one.job.launch.kernel}: {one.fault}", file=sys.stderr, flush=True)
        if sys.stderr.isatty() and not len(made) % TOGETHER:
            print(f"\r{len(made)} of {len(found)}", end="", file=sys.stderr, flush=True)
    good = [one for one in made if not one.error]
    print(f"nvcc {release()}: {len(good)} of {len(found)} kernels\n\n{summary(good)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
