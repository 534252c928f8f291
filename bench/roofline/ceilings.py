"""The ceilings of a machine, measured: its memory, its arithmetic and the least time of a kernel.

On a CPU a library's matrix product is no ceiling by itself, since it may not know the processor's widest instructions:
products in registers (probes.cpp) stand beside it, and the better of both counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from regnet_fast.inspect.timing import Timed

from .probes import Probes, ProbesError

_COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # far more than any cache holds
_PRODUCTS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
_ROUNDS = 3_000_000
_CHAIN = 1000
_BUDGET_S, _GLANCE_S, _SLOW_S = 0.2, 0.01, 0.5


def measure_ceilings(device: str, dtypes: Iterable[str], quick: bool = False) -> dict[str, Any]:
    """The ceilings of a device: what the best stream, the best products and the smallest operation reach.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        dtypes: the names of the dtypes to compute in.
        quick: try whether it works, on little data; the numbers then mean nothing.

    Returns `bytes_per_s` of a copy or, on a CPU, of a triad, bytes read and bytes written both counted; `launch_s`, the
    time of one operation in a chain of tiny ones; `flops_per_s` by dtype; and `measured_by`, in words what reached the
    bandwidth and the peak of each dtype, and under `registers` why products in registers are missing.

    A peak is that of the best of a few square matrix products of random numbers or, on a CPU, of products in registers:
    of pairs in bfloat16 where the processor multiplies them, and for any dtype of fused multiply-adds in float32, in
    which it can be computed. On a GPU float32 is multiplied in TF32, as it is in torch's convolutions.

    Raises RuntimeError for a device that is not there.
    """
    on_gpu = _kind(device) == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"the device {device!r} cannot be used: torch finds no GPU here")
    probes, measured_by = None, {}
    if not on_gpu:
        try:
            probes = Probes()
        except ProbesError as error:
            measured_by["registers"] = f"not measured: {error}"
    with torch.no_grad(), torch.cuda.device(device) if on_gpu else nullcontext():
        bandwidth, measured_by["bytes_per_s"] = max(_bandwidths(device, probes, quick))
        flops = {}
        for dtype in dtypes:
            flops[dtype], measured_by[dtype] = max(_peaks(device, getattr(torch, dtype), probes, quick))
        found = {
            "bytes_per_s": bandwidth,
            "launch_s": _launch(device, quick),
            "flops_per_s": flops,
            "measured_by": measured_by,
        }
        if on_gpu:
            torch.cuda.empty_cache()  # what is measured next may need the memory
    return found


def _bandwidths(device: str, probes: Probes | None, quick: bool) -> Iterator[tuple[float, str]]:
    size = 1 << 20 if quick else _COPIED_BYTES[_kind(device)]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    yield 2 * size / _fastest(lambda: target.copy_(source), device, quick), "a copy"
    if probes:
        other = torch.ones_like(source)
        yield 3 * size / _fastest(lambda: probes.triad(target, source, other), device, quick), "a triad"


def _launch(device: str, quick: bool) -> float:
    x = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(_CHAIN):
            x.add_(1)

    return _fastest(chain, device, quick) / _CHAIN


def _peaks(device: str, dtype: torch.dtype, probes: Probes | None, quick: bool) -> Iterator[tuple[float, str]]:
    yield _matrix_product(device, dtype, quick), "a matrix product"
    if probes:
        rounds = _ROUNDS // 1000 if quick else _ROUNDS
        ways = {"multiply-adds in float32 registers": probes.multiply_adds}
        if dtype == torch.bfloat16:
            ways["products of bfloat16 pairs in registers"] = probes.pair_products
        for by, way in ways.items():
            yield way(rounds) / _fastest(lambda way=way: way(rounds), device, quick), by


def _matrix_product(device: str, dtype: torch.dtype, quick: bool) -> float:
    best = 0.0
    with _tf32(device):
        for n in (128,) if quick else _PRODUCTS[_kind(device)]:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, quick)
            best = max(best, 2 * n**3 / seconds)
            if 8 * seconds > _SLOW_S:  # which the next one takes
                break
    return best


@contextmanager
def _tf32(device: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if _kind(device) == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fastest(call: Callable[[], Any], device: str, quick: bool) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    timed, best = Timed("", call, _kind(device)), math.inf
    timed.sample()
    end = time.perf_counter() + (_GLANCE_S if quick else _BUDGET_S)
    while True:
        best = min(best, timed.sample() / 1e3)
        if time.perf_counter() >= end:
            return best


def _kind(device: str) -> str:
    return torch.device(device).type
