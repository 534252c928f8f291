"""How many instructions of a grouped convolution one quarter of a processor issues for each tile, counted in its SASS.

A warp runs on one of a processor's four quarters, each of which issues one instruction a clock. So the warps of a block
over four, times the instructions of one warp for a tile, are the fewest clocks that a tile can take, whatever waits for
whatever. What runs once for each block is left out. Everything in the loop over tiles counts, what only some warps or
tiles take as well; inner loops count as often as the launch's sizes say, by what they contain.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from regnet_fast.backends.cuda.plans import Launch

SIZES = (
    "dtype width groups chunk out_tile unit stride tile_h tile_w warps_m warps_n stages".split()
)  # of both kernels, in the order of their templates
KINDS = {
    "products": ("HMMA",),
    "matrix loads": ("LDSM",),
    "copies": ("LDGSTS",),
    "other shared memory": ("LDS", "STS"),
    "global memory": ("LDG", "STG", "STG.128"),
}


@dataclass(frozen=True)
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
    """Such as STG; STG.128 where it moves sixteen bytes to global memory."""
    words = re.sub(r"^@!?U?P\w+ +", "", text).split()[0].split(".")
    return "STG.128" if words[0] == "STG" and "128" in words else words[0]


def sizes_of(launch: Launch) -> dict[str, int]:
    """The compile-time sizes in a launch's instantiation."""
    facts = launch.kernel.partition("<")[2].rstrip(">").split(", ")
    return {name: int(fact) for name, fact in zip(SIZES[1:], facts[1:], strict=False)}


def _trips(contents: set[str], sizes: dict[str, int], threads: int) -> int:
    """How often a warp goes through an inner loop with such instructions, for one tile or, with steps, for one step."""
    s = sizes
    sixteens = -(-s["tile_h"] * s["tile_w"] // (16 * s["warps_m"]))
    if "HMMA" in contents:
        return -(-s["groups"] * s["out_tile"] // (8 * s["unit"] * s["warps_n"]))
    if "LDGSTS" in contents:
        halo = ((s["tile_h"] - 1) * s["stride"] + 3) * ((s["tile_w"] - 1) * s["stride"] + 3)
        return -(-halo * s["groups"] * s["chunk"] // (8 * threads))
    if "STG.128" in contents:
        return sixteens * s["unit"] // 2
    if "STG" in contents:
        return -(-s["groups"] * s["out_tile"] // threads)
    if not contents & {"LDS", "STS", "LDG", "STG", "SHFL"}:
        return 2 * sixteens
    raise ValueError(f"a loop that nothing is known of: {sorted(contents)}")


def slots(sass: str, launch: Launch) -> Counter[str]:
    """Instructions by kind that each quarter of a processor issues for a tile: `.total()` are the clocks of issue.

    Raises ValueError for a program without a loop over tiles, or with an inner loop whose length it cannot tell.
    """
    texts, loops, skipped = instructions(sass)
    codes, sizes = [opcode(text) for text in texts], sizes_of(launch)
    with_products = [loop for loop in loops if "HMMA" in codes[loop.first : loop.last + 1]]
    if not with_products:
        raise ValueError(f"{launch.kernel} has no loop over tiles")
    tiles = with_products[0]
    inner = [loop for loop in loops if tiles.holds(loop)]
    steps = -(-sizes["width"] // sizes["chunk"])
    often = [1.0] * len(codes)
    for loop in inner:
        trips = _trips(set(codes[loop.first : loop.last + 1]), sizes, launch.threads)
        for i in range(loop.first, loop.last + 1):
            often[i] *= trips
    found: Counter[str] = Counter()
    kind_of = {code: kind for kind, codes in KINDS.items() for code in codes}
    for i in range(tiles.first, tiles.last + 1):
        found[kind_of.get(codes[i], "rest")] += often[i] * steps * launch.threads / 128
    return found
