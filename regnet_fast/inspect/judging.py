"""The rule of "the same function": a result of ours (k) is held to eager's (e) by the float64 result (r).

    max|k - r| <= 2 max|e - r| + 2 ulps        RMS(k - r) <= 2 RMS(e - r) + 1/4 ulp

on the whole tensor and on each part of its border. An ulp is the compute dtype's at the RMS of r; for the largest error
at the value itself where that is larger, since the last rounding of one outlier outweighs all else. A quarter of an ulp
is about the RMS error of the last rounding alone, the largest of which is half an ulp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ERROR_RATIO = 2.0
MAX_ULPS, RMS_ULPS = 2.0, 0.25  # granted even where eager is exact


@dataclass(frozen=True)
class Check:
    """One output: its largest and RMS errors against float64, ours and eager's, and the verdict.

    `failures` are all bounds of the rule that ours misses, from the whole tensor to the smallest part. `where` is the
    index of our largest error, on the part of the first of them if there is one, and `values` are ours, eager's and
    float64's there. `floor` is that of the largest error.
    """

    stage: str
    shape: tuple[int, ...]
    max_ours: float
    max_eager: float
    rms_ours: float
    rms_eager: float
    floor: float
    failures: tuple[str, ...] = ()
    where: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failure(self) -> str:
        """Why ours is not the same function as eager, or ''."""
        return next(iter(self.failures), "")

    @property
    def ratio(self) -> float:
        """Our largest error in units of eager's, or of the floor where that is larger."""
        return self.max_ours / max(self.max_eager, self.floor, 1e-300)

    @property
    def place(self) -> str:
        """`where` and `values` in words."""
        axes = {2: ("image", "class"), 4: ("image", "channel", "row", "column")}.get(len(self.where))
        words = axes or [f"axis {i}" for i in range(len(self.where))]
        place = ", ".join(f"{word} {index}" for word, index in zip(words, self.where, strict=True))
        return f"{place}: " + ", ".join(map("{} {:.9g}".format, ("ours", "timm", "float64"), self.values))

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "failure": self.failure, "ratio": self.ratio, "ok": self.ok}


def judge(
    stage: str,
    ours: Tensor,
    eager: Tensor,
    reference: Tensor,
    error_ratio: float = ERROR_RATIO,
    groups: int | None = None,
    largest: bool = True,
) -> Check:
    """Judge one output by the rule of this module; another `error_ratio` stands in the place of its 2. The `largest`
    error may be left aside: where values change their side of a ReLU, it is chance.

    The parts are the last image, of (N, C, H, W) the first and last row and column, and with `groups` the last channel
    of each group. A part has few values and says little about eager's error there, so on it eager is granted what a
    sample of its error over the whole tensor would show: its RMS error with a margin, and for the largest four times
    the RMS error of its worst channel, but no more than its largest error anywhere.
    """
    shape = tuple(reference.shape)
    if not tuple(ours.shape) == tuple(eager.shape) == shape or ours.dtype != eager.dtype:
        failure = f"ours is {tuple(ours.shape)} {ours.dtype}, eager {tuple(eager.shape)} {eager.dtype}"
        return Check(stage, shape, float("inf"), 0.0, float("inf"), 0.0, 0.0, (failure,))
    if not reference.numel():
        return Check(stage, shape, 0.0, 0.0, 0.0, 0.0, 0.0)
    dtype, eps = eager.dtype, torch.finfo(eager.dtype).eps
    ours, eager, reference = (t.detach().to(reference.device, torch.float64) for t in (ours, eager, reference))
    ours_error, eager_error = (ours - reference).abs().nan_to_num(nan=torch.inf), (eager - reference).abs()
    max_eager, rms_eager = eager_error.max().item(), _rms(eager_error)
    worst_channel = max(map(_rms, eager_error.unbind(1))) if eager_error.ndim == 4 else rms_eager
    max_floor, rms_floor = (ulps * eps * _rms(reference) for ulps in (MAX_ULPS, RMS_ULPS))
    beyond_rounding = ours_error - (MAX_ULPS * eps * reference.abs() - max_floor).clamp(min=0)

    failures, first = [], ()
    for part, index in _parts(shape, groups):
        k, e = ours_error[index], eager_error[index]
        max_granted, rms_granted = max_eager, rms_eager
        if part != "everywhere":
            max_granted = max(e.max().item(), min(4 * worst_channel, max_eager))
            rms_granted = max(_rms(e), rms_eager * (1 + 2 / k.numel() ** 0.5))
        for measure, error, granted, floor in (
            ("largest", beyond_rounding[index].max().item(), max_granted, max_floor),
            ("RMS", _rms(k), rms_granted, rms_floor),
        ):
            if (largest or measure == "RMS") and not error <= error_ratio * granted + floor:
                first = first if failures else index
                allowed = f"{error_ratio:g} times eager's {granted:.3g} plus {floor:.3g}"
                failures.append(f"the {measure} error {part} is {error:.3g}; allowed is {allowed}")
    if not eager_error.isfinite().all():
        failures = [f"timm itself overflows in {dtype}, so there is nothing to hold ours to"]
    shown = torch.full_like(ours_error, -1.0)
    shown[first] = ours_error[first]
    where = tuple(int(i) for i in torch.unravel_index(shown.argmax(), shape))
    values = tuple(t[where].item() for t in (ours, eager, reference))
    errors = ours_error.max().item(), max_eager, _rms(ours_error), rms_eager
    return Check(stage, shape, *errors, max_floor, tuple(failures), where, values)


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _parts(shape: tuple[int, ...], groups: int | None) -> Iterator[tuple[str, tuple]]:
    """Names and indices of the whole and of the parts on which the rule must hold."""
    yield "everywhere", ()
    if len(shape) > 1:
        yield "in the last image", (-1,)
    if len(shape) == 4:
        yield "in the first row", (..., 0, slice(None))
        yield "in the last row", (..., -1, slice(None))
        yield "in the first column", (..., 0)
        yield "in the last column", (..., -1)
    if groups is not None:
        width = shape[1] // groups
        yield "in the last channel of each group", (slice(None), slice(width - 1, None, width))
