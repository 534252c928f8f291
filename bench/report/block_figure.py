"""The figure docs/figures/block.svg: the kernels of a block under timm eager, and the launches of ours in Triton.

    python -m bench.report.block_figure --write       draws it anew; without --write prints the numbers

Eager's kernels are recorded on meta tensors (`bench.roofline`), ours are counted as they are launched, with the
backend forced (`regnet_fast.inspect.counting`). Nothing is computed or timed, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import regnet_fast
from regnet_fast.inspect.counting import Kernel
from regnet_fast.inspect.verify import host_model

from ..roofline.model import count, kernels
from ..roofline.recording import record
from .figures import INK, MUTED, PAPER, RULE
from .tables import number

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "block.svg"
MODEL, BLOCK, DTYPE = "regnety_016", "s2.b3", torch.bfloat16
IMAGES, SIZE = 32, 224
_EAGER, _OURS = "#e69f00", "#0072b2"
_WIDTH, _ROW, _TOP, _LEFT, _RIGHT, _LONGEST = 820, 20, 66, 116, 545, 190


@dataclass(frozen=True)
class Step:
    """A launch of ours, and the kernels of eager whose work it does or begins."""

    ours: Kernel
    eager: tuple[Kernel, ...]


def steps() -> list[Step]:
    """The launches of the block in order. It takes a GPU, or TRITON_INTERPRET=1 from the start of the process."""
    model = host_model(MODEL).to(DTYPE)
    size = (IMAGES, 3, SIZE, SIZE)
    eager = [k for k in kernels(record(model, size, DTYPE), "eager") if _inside(k.path)]
    with regnet_fast.backend("triton"):
        rows = [row for row in regnet_fast.explain(regnet_fast.rebuild(model).model, size) if _inside(row.layer)]
    firsts = [next(i for i, k in enumerate(eager) if _part(k.path) == _part(row.layer)) for row in rows]
    found = []
    for row, first, end in zip(rows, firsts, [*firsts[1:], len(eager)], strict=True):
        (launch,) = row.launches
        found.append(Step(launch, tuple(eager[first:end])))
    return found


def _inside(path: str) -> bool:
    return f"{path}.".startswith(f"{BLOCK}.")


def _part(path: str) -> str:
    """The block's own part that a path lies in: conv1, conv2, se, conv3."""
    return path.removeprefix(BLOCK).strip(".").partition(".")[0]


def draw(found: Sequence[Step]) -> str:
    """The figure as SVG: the same counts give the same text."""
    before, after = [k for step in found for k in step.eager], [step.ours for step in found]
    scale = _LONGEST / max(k.bytes for k in (*before, *after))
    height = _TOP + _ROW * len(before) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="{PAPER}"/>',
        _text(12, 20, f"A RegNetY block ({MODEL}, {BLOCK}), {IMAGES} images, bfloat16: counted, not measured", INK),
        _text(12, 46, f"timm eager: {_sums(before, 'kernels')}", INK),
        _text(_RIGHT - 100, 46, f"fused, Triton: {_sums(after, 'launches')}", INK),
    ]
    y = _TOP
    for step in found:
        lines.append(f'<line x1="12" x2="{_WIDTH - 12}" y1="{y - 3}" y2="{y - 3}" stroke="{RULE}"/>')
        lines += _bar(_RIGHT, y + _ROW * (len(step.eager) - 1) / 2, step.ours, scale, _OURS, _title(step.ours))
        for kernel in step.eager:
            lines += _bar(_LEFT, y, kernel, scale, _EAGER, f"{_part(kernel.path)} {kernel.name}".strip())
            y += _ROW
    return "\n".join([*lines, "</svg>", ""])


def _title(kernel: Kernel) -> str:
    return kernel.name.partition(".")[0].replace("implicit_gemm", "grouped_conv")


def _sums(some: Sequence[Kernel], unit: str) -> str:
    return f"{len(some)} {unit}, {megabytes(count(some).bytes)} MB moved"


def megabytes(size: int) -> str:
    """Bytes as the figure writes them."""
    return number(size / 1e6)


def _bar(x: float, y: float, kernel: Kernel, scale: float, colour: str, title: str) -> list[str]:
    width = max(1.0, kernel.bytes * scale)
    return [
        _text(x - 6, y + 12, title, INK, anchor="end"),
        f'<rect x="{x}" y="{y + 2:g}" width="{width:.1f}" height="{_ROW - 7}" fill="{colour}"/>',
        _text(x + width + 5, y + 12, f"{megabytes(kernel.bytes)} MB", MUTED),
    ]


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{text}</text>'


def main(arguments: list[str] | None = None) -> None:
    """Print the kernels, or draw them."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.block_figure", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/figures/block.svg, instead of printing")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # no kernel runs, and without a GPU none could be compiled
    found = steps()
    if options.write:
        FIGURE.write_text(draw(found))
        return
    for step in found:
        print(f"{_title(step.ours)}: {megabytes(step.ours.bytes)} MB, instead of")
        for kernel in step.eager:
            print(f"    {_part(kernel.path)} {kernel.name}: {megabytes(kernel.bytes)} MB")


if __name__ == "__main__":
    main()
