"""The ceilings of a machine, measured: its memory, its arithmetic and the least time of a kernel."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from regnet_fast.inspect.timing import Timed

_COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # far more than any cache holds
_PRODUCTS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
_CHAIN = 1000
_BUDGET_S, _GLANCE_S, _SLOW_S = 0.2, 0.01, 0.5


def measure_ceilings(device: str, dtypes: Iterable[str], quick: bool = False) -> dict[str, Any]:
    """The ceilings of a device: what the largest copy, the best matrix product and the smallest operation reach.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        dtypes: the names of the dtypes to multiply matrices in.
        quick: try whether it works, on little data; the numbers then mean nothing.

    Returns `bytes_per_s` of a copy, bytes read and bytes written both counted; `launch_s`, the time of one operation in
    a chain of tiny ones; and `flops_per_s` by dtype, the best of a few square matrix products of random numbers. On a
    GPU float32 is multiplied in TF32, as it is in torch's convolutions. Raises RuntimeError for a device that is not
    there.
    """
    on_gpu = _kind(device) == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"the device {device!r} cannot be used: torch finds no GPU here")
    with torch.no_grad(), torch.cuda.device(device) if on_gpu else nullcontext():
        found = {
            "bytes_per_s": _bandwidth(device, quick),
            "launch_s": _launch(device, quick),
            "flops_per_s": {dtype: _peak(device, getattr(torch, dtype), quick) for dtype in dtypes},
        }
        if on_gpu:
            torch.cuda.empty_cache()  # what is measured next may need the memory
    return found


def _bandwidth(device: str, quick: bool) -> float:
    size = 1 << 20 if quick else _COPIED_BYTES[_kind(device)]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, quick)


def _launch(device: str, quick: bool) -> float:
    x = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(_CHAIN):
            x.add_(1)

    return _fastest(chain, device, quick) / _CHAIN


def _peak(device: str, dtype: torch.dtype, quick: bool) -> float:
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
