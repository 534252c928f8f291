"""The passes of a training step on the kernels of kernels/.

1x1 convolutions, and the gradients of grouped ones, normalise what they read, and the latter make the gradient of their
raw result as they read it as well; for all others the map is made first. Dense convolutions and the gradients of 1x1
convolutions are the framework's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import grouped_input_gradient, implicit_gemm, training_join
from ...kernels.channel_statistics import statistics as kernel_statistics
from ...kernels.channel_tiles import total
from ...kernels.grouped_weight_gradient import weight_gradient
from ...kernels.pointwise_conv import pointwise_conv
from ...kernels.squeeze_excite import squeeze_excite
from ...kernels.training_passes import image_parts, raw_gradient
from ..triton import current
from .cuda import CudaConvs
from .operands import Conv, ConvGradients, Excite, Norm, OutputGrad, OutputNorm, Sums, Term
from .torch import Gate, Passes, convolution_backward

_LAST = torch.channels_last


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _read(x: Tensor, norm: Norm | None, factor: Tensor | None = None) -> training_join.ReadMap:
    """A map as the kernels read it."""
    factor = None if factor is None else factor.contiguous()
    if norm is None:
        return training_join.ReadMap(x, factor=factor)
    return training_join.ReadMap(x, *map(_wide, norm[:4]), norm.eps, norm.activation, factor)


def _means(term: training_join.ReadMap) -> Tensor:
    """Parts of the channel means of every image."""
    return image_parts(term, share=1.0 / (term.x.shape[2] * term.x.shape[3]))


def _convolved(x: Tensor, norm: Norm | None, excite: Excite | None, weight: Tensor, geometry: Sequence) -> Tensor:
    stride, padding, dilation, groups = geometry
    pointwise = weight.shape[2:] == (1, 1) and groups == 1 and not any(padding) and stride[0] == stride[1]
    if norm is not None and excite is None and pointwise:
        x, packed = x.contiguous(memory_format=_LAST), weight.flatten(1).contiguous()
        return pointwise_conv(x, packed, stride=stride[0], norm=(*norm.affine(), norm.activation))
    if norm is not None or excite is not None:
        term = _read(x.contiguous(memory_format=_LAST), norm)
        if excite is not None:
            weights = [t.float().contiguous() for t in excite[:4]]
            gate = squeeze_excite(_means(term), *weights, activation=excite.activation, dtype=torch.float32)
            term = term._replace(factor=gate)
        x = training_join.join(term)
    if _is_grouped(weight, geometry):
        x = x.contiguous(memory_format=_LAST)
        packed, size = implicit_gemm.packed_weight(weight), tuple(weight.shape[2:])
        return implicit_gemm.convolution(
            x, packed, None, None, size, tuple(stride), tuple(padding), tuple(dilation), groups, "none"
        )[0]
    return torch.conv2d(x, weight, None, *geometry).contiguous(memory_format=_LAST)


def _is_grouped(weight: Tensor, geometry: Sequence) -> bool:
    """Whether there are kernels for a convolution's groups."""
    stride, _, _, groups = geometry
    width, out_width = weight.shape[1], weight.shape[0] // groups
    return groups > 1 and width % 4 == 0 and out_width % 4 == 0 and max(stride) <= 2


def _grouped_backward(
    grad: Tensor,
    behind: OutputNorm | None,
    y: Tensor | None,
    x: Tensor,
    norm: Norm | None,
    weight: Tensor,
    geometry: Sequence,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the map that a grouped convolution reads, and of its weight."""
    *pairs, groups = geometry
    shape, affine = (tuple(weight.shape[2:]), *map(tuple, pairs)), None if behind is None else behind.vectors()
    da = dweight = None
    if needs_x:
        packed = grouped_input_gradient.packed_weight(weight, groups)
        da = grouped_input_gradient.input_gradient(grad, y, affine, packed, tuple(x.shape[2:]), *shape, groups)
    if needs_weight:
        read = None if norm is None else (*norm.affine(), norm.activation)
        dweight = weight_gradient(x, read, grad, y, affine, *shape, groups).to(weight.dtype)
    return da, dweight


def _terms(terms: Sequence[Term]) -> list[training_join.ReadMap]:
    return [_read(x, norm, None if factor is None else factor.flatten()) for x, norm, factor in terms]


class TritonPasses(Passes):
    """The passes of kernels/."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with current(x):
            return kernel_statistics(x)

    def convs(
        self, x: Tensor, norm: Norm | None, excite: Excite | None, convs: Sequence[Conv], measured: Sequence[bool]
    ) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """`Passes.convs`; the map is read for every convolution."""
        with current(x):
            results = [_convolved(x, norm, excite, *one) for one in convs]
            return [(y, kernel_statistics(y) if taken else None) for y, taken in zip(results, measured, strict=True)]

    def convs_backward(
        self,
        grads: Sequence[OutputGrad],
        x: Tensor,
        norm: Norm | None,
        excite: Excite | None,
        convs: Sequence[Conv],
        needs_x: bool,
        needs_weights: Sequence[bool],
        through: bool = True,
    ) -> ConvGradients:
        with current(x):
            x = x.contiguous(memory_format=_LAST)
            term, factor, found = _read(x, norm), None, None
            if excite is not None:
                gate = Gate(total(_means(term)), excite)
                factor = gate.gate.float()
            da, read, dweights = None, None, []
            for (grad, behind, y), (weight, geometry), needs in zip(grads, convs, needs_weights, strict=True):
                if excite is None and _is_grouped(weight, geometry):
                    one, dweight = _grouped_backward(grad, behind, y, x, norm, weight, geometry, needs_x, needs)
                else:
                    if read is None and (factor is not None or (norm is not None and needs)):
                        read = training_join.join(term._replace(factor=factor))
                    dy = grad if behind is None else raw_gradient(grad, y, *behind.vectors())
                    one, dweight = convolution_backward(
                        dy, x if read is None else read, weight, geometry, needs_x, needs
                    )
                if needs_x:
                    one = one.contiguous(memory_format=_LAST)
                    da = one if da is None else da.add_(one)
                dweights.append(dweight)
            if not needs_x:
                return ConvGradients(None, None, None, dweights)
            extra = None
            if excite is not None:
                dmeans, found = gate.backward(total(image_parts(term, da)))
                extra = dmeans / (x.shape[2] * x.shape[3])
            if not through:
                term = _read(x, None)
            if excite is None and term.mean is None:
                return ConvGradients(da, None, None, dweights)
            dz, product, plain = training_join.activation_backward(da, term._replace(factor=factor), extra)
            return ConvGradients(dz, None if product is None else Sums(product, plain), found, dweights)

    def join(self, terms: Sequence[Term], activation: str) -> Tensor:
        """`Passes.join` of at most three terms."""
        with current(terms[0].x):
            return training_join.join(*_terms(terms), activation=activation)

    def join_backward(
        self, grad: Tensor, y: Tensor | None, terms: Sequence[Term], activation: str, needs: Sequence[bool]
    ) -> list[tuple[Tensor | None, Sums | None]]:
        with current(grad):
            found = training_join.join_backward(grad, y, _terms(terms), activation, needs)
        return [(one.dz, None if one.product is None else Sums(one.product, one.plain)) for one in found]

    def entered_backward(self, grad: Tensor, norm: OutputNorm, x: Tensor, identity: Tensor | None) -> Tensor:
        with current(x):
            identity = None if identity is None else identity.contiguous(memory_format=_LAST)
            return raw_gradient(grad, x, *norm.vectors(), identity=identity)


class CudaTritonPasses(CudaConvs, TritonPasses):
    """The grouped convolutions of csrc/, and kernels/ for the rest."""
