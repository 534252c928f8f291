"""Some images of a batch at a time, so that what one pass writes the next one still finds in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

ALL = slice(None)

_PART_BYTES = 4e6
"""How many bytes of one map a thread takes at a time (docs/training.md)."""


def parts(x: Tensor, wider: float = 1.0) -> list[slice]:
    """The images to take at a time, so that a thread has `_PART_BYTES` of x, or of a map so many times as large if that
    is more. On a GPU, all.
    """
    n = x.shape[0]
    if not x.is_cpu or n == 1:
        return [ALL]
    step = max(1, int(_PART_BYTES * torch.get_num_threads() * n / (x.nbytes * max(wider, 1.0))))
    if step >= n:
        return [ALL]
    step = -(-n // -(-n // step))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def of(x: Tensor | None, part: slice) -> Tensor | None:
    """Some images."""
    return x if part is ALL or x is None else x[part]
