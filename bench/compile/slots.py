"""How many instructions of a grouped convolution one quarter of a processor issues for each tile, counted in its SASS.

    python -m bench.compile.slots --model regnety_032 regnetz_d8 --arch 90 --batch 256

A warp runs on one of a processor's four quarters, each of which issues one instruction a clock. So the warps of a block
over four, times the instructions of one warp for a tile, are the fewest clocks that a tile can take, whatever waits for
whatever. What runs once for each block is left out. Everything in the loop over tiles counts, what only some warps or
tiles take as well; inner loops count as often as the launch's sizes say, by what they contain.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter

from csrc.extension import cuda_launches
from regnet_fast.backends.cuda import plans
from regnet_fast.backends.cuda.plans import Launch, Target

from ..report import markdown
from ..report.tables import Table
from .csrc import Job, built, compile_jobs

_CONFIG = [field.name for field in dataclasses.fields(plans.ForwardConfig)]
SIZES = ("width", *_CONFIG[:4], "stride", *_CONFIG[4:])  # behind the dtype, in the order of the kernel's template
KINDS = {
    "products": ("HMMA",),
    "matrix loads": ("LDSM",),
    "copies": ("LDGSTS",),
    "other shared memory": ("LDS", "STS"),
    "global memory": ("LDG", "STG"),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def instructions(sass: str) -> tuple[list[str], list[Loop], list[Loop]]:
    """One function's instructions, its loops, and what its forward branches skip, from `cuobjdump -sass`."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?) *;", sass)
    place = {int(address, 16): i for i, (address, _) in enumerate(found)}
    loops, skipped = set(), set()
    for i, (_, text) in enumerate(found):
        target = re.search(r"\bBRA\b.* (?:`\()?0x([0-9a-f]+)", text)
        if target:
            to = place[int(target[1], 16)]
            if to > i:
                skipped.add(Loop(i + 1, to - 1))
            elif to < i:  # a branch to itself is the padding behind the program
                loops.add(Loop(to, i))
    return [text for _, text in found], sorted(loops, key=lambda loop: loop.first), list(skipped)


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+ +", "", text).split()[0].split(".")[0]


def sizes_of(launch: Launch) -> dict[str, int]:
    """The compile-time sizes in a launch's instantiation."""
    facts = launch.kernel.partition("<")[2].rstrip(">").split(", ")
    return {name: int(fact) for name, fact in zip(SIZES, facts[1:], strict=False)} | {"in": int(facts[-1])}


def _halo(s: dict[str, int]) -> int:
    """Pixels that a tile is computed from."""
    return ((s["tile_h"] - 1) * s["stride"] + 3) * ((s["tile_w"] - 1) * s["stride"] + 3)


def _trips(contents: set[str], sizes: dict[str, int], threads: int) -> int:
    """How often a warp goes through an inner loop with such instructions for one step."""
    s = sizes
    if "HMMA" in contents and s["in"] and "STG" not in contents:  # pixels behind a convolution in front
        eights, by_two = -(-s["groups"] * s["out_tile"] // (8 * s["warps_n"])), -(-_halo(s) // (32 * s["warps_m"]))
        if eights > 3:  # as the kernel has AT_ONCE
            return -(-_halo(s) // (16 * s["warps_m"]))
        return by_two // 2 if by_two % 2 == 0 else by_two
    if "HMMA" in contents:  # units
        return -(-s["groups"] * s["out_tile"] // (8 * s["unit"] * s["warps_n"]))
    if "LDGSTS" in contents:  # a wide group's weights
        depth = 9 * s["chunk"] // 8
        return -(-s["groups"] * s["out_tile"] // (threads // depth))
    if "SHFL" in contents:  # the moments of each eight channels of a unit
        return s["unit"]
    if {"LDG", "STS"} <= contents:  # chunks that are read through the norm
        return -(-_halo(s) * (s["groups"] * s["chunk"] // 8 | 1) // threads)
    if "LDS" in contents and not contents & {"LDG", "LDGSTS", "STG", "STS"}:  # the warps' moments
        return s["warps_m"]
    raise ValueError(f"a loop that nothing is known of: {sorted(contents)}")


def slots(sass: str, launch: Launch) -> Counter[str]:
    """Instructions by kind that a quarter of a processor issues for a tile: `.total()` are the clocks of issue.

    `sass` is the function's. Raises ValueError for a program without a loop over tiles, or with an inner loop whose
    length it cannot tell.
    """
    texts, loops, skipped = instructions(sass)
    codes, sizes = [opcode(text) for text in texts], sizes_of(launch)

    def contents(part: Loop) -> set[str]:
        return set(codes[part.first : part.last + 1])

    tiles = next((loop for loop in loops if "HMMA" in contents(loop)), None)
    if tiles is None:
        raise ValueError(f"{launch.kernel} has no loop over tiles")
    steps = -(-sizes["width"] // sizes["chunk"])
    often = dict.fromkeys(range(tiles.first, tiles.last + 1), steps * launch.threads / 128)
    for loop in loops:
        if tiles.holds(loop):
            trips = _trips(contents(loop), sizes, launch.threads)
            for i in range(loop.first, loop.last + 1):
                often[i] *= trips
    ends = {  # what the last step of a tile alone does: it stores results
        i
        for part in skipped
        if tiles.holds(part) and "STG" in {code[:3] for code in contents(part)} and "HMMA" not in contents(part)
        for i in range(part.first, part.last + 1)
    }
    kind_of = {code: kind for kind, codes in KINDS.items() for code in codes}
    found: Counter[str] = Counter()
    for i, times in often.items():
        found[kind_of.get(codes[i], "rest")] += times / steps if i in ends else times
    return found


def count(jobs: list[Job]) -> list[Counter[str]]:
    """`slots` of kernels of one source and architecture, which are compiled for it."""
    return [slots(program, job.launch) for job, program in zip(jobs, built(jobs)[1], strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.slots", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--arch", type=int, choices=tuple(plans.PROCESSORS), default=90)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args(arguments)
    target, rows = Target(options.arch, plans.PROCESSORS[options.arch]), []
    for conv in cuda_launches.grouped_convs(options.model):
        problem = conv.problem(options.batch, "bfloat16")
        job = Job(options.arch, plans.grouped_conv_forward(problem, conv.activation, True, target))
        (made,), (found,) = compile_jobs([job]), count([job])
        layer = f"{conv.groups} x {conv.width}, {conv.size}x{conv.size}, stride {conv.stride}"
        of_tile = sizes_of(job.launch)
        tile = f"{of_tile['groups']} x {of_tile['out_tile']}, {of_tile['tile_h']}x{of_tile['tile_w']}"
        facts = (made.registers, made.blocks, round(found.total()), *(round(found[kind]) for kind in KINDS))
        rows.append((layer, tile, *map(str, facts)))
    titles = ("layer", "of a block", "registers", "blocks", "issue slots", *KINDS)
    print(markdown.render([Table(titles, tuple(rows))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
