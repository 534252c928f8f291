"""The plans of csrc/depthwise_conv_forward.cu and csrc/depthwise_conv_backward.cu."""

from __future__ import annotations

from dataclasses import dataclass

from .grouped import GroupedConv, refuse
from .launch import ACTIVATIONS, H200, TYPES, Launch, Target, cdiv, ordered_sum


@dataclass(frozen=True)
class DepthwiseConv:
    """A 3x3 convolution with padding 1 of (images, height, columns, channels), one channel in a group."""

    images: int
    height: int
    columns: int
    channels: int
    stride: int
    dtype: str

    @property
    def out_size(self) -> tuple[int, int]:
        return cdiv(self.height, self.stride), cdiv(self.columns, self.stride)


def refuse_depthwise(problem: DepthwiseConv, **geometry) -> str | None:
    """Why csrc/ has no depthwise convolution for a problem, or None; `geometry` as for `refuse`."""
    p = problem
    if p.channels % 8 or p.channels < 8:
        return f"{p.channels} channels: only multiples of 8"
    return refuse(GroupedConv(p.images, p.height, p.columns, p.channels // 8, 8, p.stride, p.dtype), **geometry)


_DEPTHWISE_THREADS = 128


def _depthwise(problem: DepthwiseConv, run: int) -> tuple[int, int, int]:
    """Lanes of eight channels, tiles of an image, and blocks that cover the channels; checks the problem."""
    reason = refuse_depthwise(problem)
    if reason is not None:
        raise ValueError(f"no kernel for {problem}: {reason}")
    chunks = problem.channels // 8
    lanes = min((1, 2, 4, 8, 16), key=lambda n: (cdiv(chunks, n) * n, -n))
    runs = problem.out_size[0] * cdiv(problem.out_size[1], run)
    return lanes, cdiv(runs, _DEPTHWISE_THREADS // lanes), cdiv(chunks, lanes)


def depthwise_conv_forward(problem: DepthwiseConv, activation: str = "none", parts: bool = False) -> Launch:
    """As `grouped_conv_forward`, with the weight as (9, channels)."""
    p, run = problem, 4 if problem.stride == 1 else 2
    lanes, tiles, across = _depthwise(p, run)
    facts = (TYPES[p.dtype], lanes, run, _DEPTHWISE_THREADS, p.stride, ACTIVATIONS[activation], str(parts).lower())
    return Launch(
        "depthwise_conv_forward.cu",
        f"depthwise_conv_forward<{', '.join(map(str, facts))}>",
        (p.images * tiles, across, 1),
        _DEPTHWISE_THREADS,
        32 * _DEPTHWISE_THREADS * parts,
        ("x", "weight", "bias", "y", "parts", tiles, p.height, p.columns, *p.out_size, p.channels),
        {"parts": (p.images, tiles, p.channels)} if parts else {},
    )


def depthwise_conv_backward(
    problem: DepthwiseConv,
    *,
    needs_input: bool = True,
    needs_weight: bool = True,
    affine: int = 0,
    norm: bool = False,
    sums: bool = False,
    activation: str = "none",
    target: Target = H200,
) -> tuple[Launch, ...]:
    """As `grouped_conv_backward`, always in a single pass; weight and dweight are (9, channels)."""
    p, run = problem, 2 if problem.stride == 1 else 1
    lanes, tiles, across = _depthwise(p, run)
    norm, sums = norm and needs_weight, sums and needs_input
    switches = (str(s).lower() for s in (needs_input, needs_weight, affine, norm, sums))
    facts = (TYPES[p.dtype], lanes, run, _DEPTHWISE_THREADS, p.stride, *switches, ACTIVATIONS[activation])
    workers = min(p.images * tiles, max(1, cdiv(4 * target.processors, across))) if needs_weight else p.images * tiles
    buffers = {"parts": (workers, 9, p.channels)} if needs_weight else {}
    launch = Launch(
        "depthwise_conv_backward.cu",
        f"depthwise_conv_backward<{', '.join(map(str, facts))}>",
        (workers, across, 1),
        _DEPTHWISE_THREADS,
        32 * _DEPTHWISE_THREADS * (needs_weight or sums),
        ("dz", "y", "a", "q", "b", "x", "scale", "shift", "mean", "invstd", "weight", "dx", "sums", "parts", p.images,
         tiles, p.height, p.columns, *p.out_size, p.channels),
        buffers | ({"sums": (p.images, tiles, 2, p.channels)} if sums else {}),
    )  # fmt: skip
    return (launch, *(ordered_sum(workers, (9, p.channels)) for _ in range(needs_weight)))
