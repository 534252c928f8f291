"""Sums of maps that are read through their norms, and their gradients, in one pass each:

read(x) = factor * activation((x - mean) / sqrt(var + eps) * weight + bias)        y = activation(sum(read(x)))

Backward every term's gradient is that of its normalised map, before its own activation, and comes with the sums behind
the gradients of its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import (
    Config,
    before_activation,
    chosen_tiles,
    launch_of,
    load,
    new_sums,
    norm_of,
    normalised,
    place_of,
    store,
    tiles,
    total,
)
from .common import SIZES, Launch, activate, interpreting, new_output
from .tables import Chosen, announce, fitting, planned

MOST_TERMS = 3


class Form(NamedTuple):
    """What a launch rests on of a `ReadMap`, but for its size; `factor` says what has its own: "image", "channel" or
    "none".
    """

    dtype: torch.dtype | None = None
    norm: bool = False
    weight: bool = False
    bias: bool = False
    eps: float = 0.0
    activation: str = "none"
    factor: str = "none"
    factor_dtype: torch.dtype | None = None


class ReadMap(NamedTuple):
    """A map and how it is read: mean, biased variance, weight and bias (C, float32), all optional, and epsilon and
    activation; and a factor for each image (N) or for each channel of each image (N, C), contiguous.
    """

    x: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    activation: str = "none"
    factor: Tensor | None = None

    def form(self) -> Form:
        """What a launch rests on."""
        x, mean, _, weight, bias, eps, activation, factor = self
        kind = () if factor is None else ("image" if factor.dim() == 1 else "channel", factor.dtype)
        return Form(x.dtype, mean is not None, weight is not None, bias is not None, eps, activation, *kind)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the kernels' order."""
        return (*self[:5], self.factor)


@triton.jit
def _factor(factor, place, FACTOR: tl.constexpr):
    """The factor of each image, of each of its channels, or 1."""
    _, _, inside, image, known, by_channel = place
    if FACTOR == "image":
        found = tl.load(factor + image, mask=known, other=0.0).to(tl.float32)
    elif FACTOR == "channel":
        found = tl.load(factor + by_channel, mask=inside, other=0.0).to(tl.float32)
    else:
        found = 1.0
    return found


@triton.jit
def _read(x, factor, norm, place, ACTIVATION: tl.constexpr, FACTOR: tl.constexpr):
    """A term as it is summed; 0 where there is none."""
    found = 0.0
    if x is not None:
        found = activate(normalised(x, norm, place), ACTIVATION) * _factor(factor, place, FACTOR)
    return found


@triton.jit(do_not_specialize=SIZES)
def join_kernel(
    x0, mean0, var0, weight0, bias0, factor0, x1, mean1, var1, weight1, bias1, factor1,
    x2, mean2, var2, weight2, bias2, factor2, y, eps0, eps1, eps2, pixels, image_pixels, channel_units,
    ACTIVATION0: tl.constexpr, FACTOR0: tl.constexpr, ACTIVATION1: tl.constexpr, FACTOR1: tl.constexpr,
    ACTIVATION2: tl.constexpr, FACTOR2: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some channels of some pixels."""
    channels = channel_units * UNIT
    first = tl.program_id(0) * (BLOCK_P * STEPS)
    base, cs = first.to(tl.int64) * channels, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    norm0 = norm_of(mean0, var0, weight0, bias0, eps0, cs, cs < channels)
    norm1 = norm_of(mean1, var1, weight1, bias1, eps1, cs, cs < channels)
    norm2 = norm_of(mean2, var2, weight2, bias2, eps2, cs, cs < channels)
    for step in tl.range(STEPS):
        place = place_of(step, base, first, pixels, image_pixels, cs, channels, BLOCK_P)
        z = _read(x0, factor0, norm0, place, ACTIVATION0, FACTOR0)
        z += _read(x1, factor1, norm1, place, ACTIVATION1, FACTOR1)
        z += _read(x2, factor2, norm2, place, ACTIVATION2, FACTOR2)
        store(y, activate(z, ACTIVATION), place, UPCAST)


@triton.jit
def _term_backward(
    d, shared, x, factor, extra, out, norm, sums, place,
    ACTIVATION: tl.constexpr, FACTOR: tl.constexpr, SUMS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One term's gradient, which is the shared one or its own, and its sums so far."""
    product, plain = sums
    if out is not None:
        own = d * _factor(factor, place, FACTOR)
        if extra is not None:
            own += tl.load(extra + place[5], mask=place[2], other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            own = before_activation(own, normalised(x, norm, place), ACTIVATION)
        shared = store(out, own, place, UPCAST)
    if SUMS:
        product += shared * (load(x, place) - norm[0])
        plain += shared
    return product, plain


@triton.jit
def _store_sums(parts, slot, sums, norm, cs, channels, SUMS: tl.constexpr):
    if SUMS:
        product, plain = sums
        known = (cs < channels)[None, :]
        parts += slot * channels + cs[None, :]
        tl.store(parts, tl.sum(product, 0)[None, :] * norm[1], mask=known)
        tl.store(parts + channels, tl.sum(plain, 0)[None, :], mask=known)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad, y, extra, out, x0, mean0, var0, weight0, bias0, factor0, out0,
    x1, mean1, var1, weight1, bias1, factor1, out1, x2, mean2, var2, weight2, bias2, factor2, out2,
    parts, eps0, eps1, eps2, pixels, image_pixels, channel_units,
    ACTIVATION0: tl.constexpr, FACTOR0: tl.constexpr, SUMS0: tl.constexpr,
    ACTIVATION1: tl.constexpr, FACTOR1: tl.constexpr, SUMS1: tl.constexpr,
    ACTIVATION2: tl.constexpr, FACTOR2: tl.constexpr, SUMS2: tl.constexpr,
    ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some channels of some pixels; the sums of the terms follow each other in its part."""
    channels = channel_units * UNIT
    first = tl.program_id(0) * (BLOCK_P * STEPS)
    base, cs = first.to(tl.int64) * channels, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    norm0 = norm_of(mean0, var0, weight0, bias0, eps0, cs, cs < channels)
    norm1 = norm_of(mean1, var1, weight1, bias1, eps1, cs, cs < channels)
    norm2 = norm_of(mean2, var2, weight2, bias2, eps2, cs, cs < channels)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sums0, sums1, sums2 = (zeros, zeros), (zeros, zeros), (zeros, zeros)
    for step in tl.range(STEPS):
        place = place_of(step, base, first, pixels, image_pixels, cs, channels, BLOCK_P)
        d = load(grad, place)
        if ACTIVATION == "relu":
            d = tl.where(load(y, place) <= 0, 0.0, d)
        elif ACTIVATION == "silu":
            z = _read(x0, factor0, norm0, place, ACTIVATION0, FACTOR0)
            z += _read(x1, factor1, norm1, place, ACTIVATION1, FACTOR1)
            z += _read(x2, factor2, norm2, place, ACTIVATION2, FACTOR2)
            d = before_activation(d, z, ACTIVATION)
        else:
            tl.static_assert(ACTIVATION == "none", "an activation that the kernels do not have")
        shared = d
        if out is not None:
            shared = store(out, d, place, UPCAST)
        sums0 = _term_backward(
            d, shared, x0, factor0, extra, out0, norm0, sums0, place, ACTIVATION0, FACTOR0, SUMS0, UPCAST
        )
        sums1 = _term_backward(
            d, shared, x1, factor1, None, out1, norm1, sums1, place, ACTIVATION1, FACTOR1, SUMS1, UPCAST
        )
        sums2 = _term_backward(
            d, shared, x2, factor2, None, out2, norm2, sums2, place, ACTIVATION2, FACTOR2, SUMS2, UPCAST
        )
    slots: tl.constexpr = 2 * (SUMS0 + SUMS1 + SUMS2)
    if slots > 0:
        part = parts + tl.program_id(0).to(tl.int64) * slots * channels
        _store_sums(part, 0, sums0, norm0, cs, channels, SUMS0)
        _store_sums(part, 2 * SUMS0, sums1, norm1, cs, channels, SUMS1)
        _store_sums(part, 2 * (SUMS0 + SUMS1), sums2, norm2, cs, channels, SUMS2)


def _launch_of(
    kernel: Any, choice: Chosen, size: torch.Size, forms: tuple[Form, ...], activation: str, **more: Any
) -> Launch:
    """What launches a pass over terms, of which the last may be missing."""
    each = (*forms, *[Form()] * (MOST_TERMS - len(forms)))
    for i, form in enumerate(each):
        more |= {f"ACTIVATION{i}": form.activation, f"FACTOR{i}": form.factor}
    sizes = (*(form.eps for form in each), choice.shape.pixels, size[2] * size[3])
    return launch_of(kernel, choice, *sizes, ACTIVATION=activation, UPCAST=interpreting(), **more)


@planned
def _plan_join(
    size: torch.Size, device: torch.device, forms: tuple[Form, ...], activation: str, config: Config | None
) -> tuple[Chosen, Launch]:
    """The choice, and what launches it."""
    choice = chosen_tiles(size, forms[0].dtype, device, len(forms) + 1, 0, config)
    return choice, _launch_of(join_kernel, choice, size, forms, activation)


@fitting
def join(*terms: ReadMap, activation: str = "none", config: Config | None = None) -> Tensor:
    """`activation(sum(read(x)))` of one to three terms.

    Args:
        terms: of channels_last maps of one size and dtype: float32, float16 or bfloat16.
        config: by default a tuned one, or that of `heuristic`.

    Returns a new channels_last tensor of their dtype. Computes in float32.
    """
    x = terms[0].x
    choice, launch = _plan_join(x.shape, x.device, tuple([term.form() for term in terms]), activation, config)

    def run(config: Config) -> Tensor:
        return join(*terms, activation=activation, config=config)

    announce(choice, run)
    y = new_output(x.shape, x)
    tensors = [t for term in terms for t in term.tensors()]
    launch(*tensors, *[None] * (6 * (MOST_TERMS - len(terms))), y)
    return y


class Gradient(NamedTuple):
    """The gradient dz of a normalised map, and the float32 sums of dz * xhat and of dz over all pixels."""

    dz: Tensor | None
    product: Tensor | None
    plain: Tensor | None


@planned
def _plan_backward(
    size: torch.Size, dtype: torch.dtype, device: torch.device, forms: tuple[Form, ...], activation: str,
    needs: tuple[bool, ...], extra: torch.dtype | None, config: Config | None,
) -> tuple[Chosen | None, Launch | None, bool, list[bool], list[bool], tuple[int, int, int] | None]:  # fmt: skip
    """The choice and what launches it, where anything is computed; whether there is a gradient that terms share, which
    have their own, which have sums, and the size of their parts.
    """
    alone = [form.factor != "none" or form.activation != "none" for form in forms]
    alone[0] = alone[0] or extra is not None
    shared = activation != "none" and any(need and not one for need, one in zip(needs, alone, strict=True))
    own = [need and one for need, one in zip(needs, alone, strict=True)]
    summed = [need and form.norm for need, form in zip(needs, forms, strict=True)]
    maps, sums = shared + sum(own), 2 * sum(summed)
    if not maps and not sums:
        return None, None, shared, own, summed, None
    choice = chosen_tiles(size, dtype, device, 1 + (activation == "relu") + len(forms) + maps, sums, config)
    constants = {f"SUMS{i}": int(i < len(forms) and summed[i]) for i in range(MOST_TERMS)}
    launch = _launch_of(backward_kernel, choice, size, forms, activation, **constants)
    parts = (1, tiles(choice.config, choice.shape), sums * size[1]) if sums else None
    return choice, launch, shared, own, summed, parts


@fitting
def join_backward(
    grad: Tensor,
    y: Tensor | None,
    terms: Sequence[ReadMap],
    activation: str = "none",
    needs: Sequence[bool] | None = None,
    extra: Tensor | None = None,
    config: Config | None = None,
) -> list[Gradient]:
    """The gradients of a join, from that of its result y:

    dz = (grad * activation'(sum) * factor + extra) * own_activation'(normalised)

    Args:
        grad, y: channels_last, of one dtype; y only behind a relu.
        needs: which terms need a gradient, by default all.
        extra: (N, C), contiguous: a summand of the first term alone.
        config: by default a tuned one, or that of `heuristic`.

    Returns dz for each term in grad's dtype, and the sums where it has a norm. Terms without factor and activation
    share one dz, which is `grad` itself where there is no activation behind them either.
    """
    needs = (True,) * len(terms) if needs is None else tuple(needs)
    choice, launch, shared, own, summed, size = _plan_backward(
        grad.shape, grad.dtype, grad.device, tuple([term.form() for term in terms]), activation, needs,
        None if extra is None else extra.dtype, config,
    )  # fmt: skip
    out = new_output(grad.shape, grad) if shared else None
    outs = [new_output(grad.shape, grad) if one else None for one in own]
    parts = None if size is None else new_sums(size, grad)
    if launch is not None:

        def run(config: Config) -> list[Gradient]:
            return join_backward(grad, y, terms, activation, needs, extra, config)

        announce(choice, run)
        tensors = [t for term, one in zip(terms, outs, strict=True) for t in (*term.tensors(), one)]
        tensors += [None] * (7 * (MOST_TERMS - len(terms)))
        launch(grad, y if activation == "relu" else None, extra, out, *tensors, parts)
    sums = iter(() if parts is None else total(parts).view(-1, grad.shape[1]).unbind())
    shared = grad if out is None else out
    return [
        Gradient(shared if need and one is None else one, *((next(sums), next(sums)) if has else (None, None)))
        for one, need, has in zip(outs, needs, summed, strict=True)
    ]


def activation_backward(
    grad: Tensor, term: ReadMap, extra: Tensor | None = None, config: Config | None = None
) -> Gradient:
    """`(grad * factor + extra) * activation'(normalised)`: `join_backward` of one term."""
    return join_backward(grad, None, [term], extra=extra, config=config)[0]
