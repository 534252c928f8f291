"""Winograd's F(2x2, 3x3) convolution in float32 on a CPU: 2.25 times fewer multiplications than the direct one.

A 3x3 convolution with stride 1 is computed on 2x2 tiles of outputs: with d a 4x4 tile of the padded input and g the
kernel, `y = A^T [ (G g G^T) * (B^T d B) ] A`. The sixteen products become one grouped 1x1 convolution over the tiles;
G g G^T is made once, in float64. On data of unit variance the result is closer to float64 than the direct
convolution's, since far fewer products are summed (docs/cpu.md has the errors and the times).

Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv 1509.09308.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .problem import ConvProblem

LEAST_CHANNELS = 64
"""With fewer the direct convolution sums so few products that it is the more exact one."""


def able(problem: ConvProblem) -> bool:
    """Whether a problem is a dense 3x3 convolution in float32 with stride 1, of channels enough to be as exact."""
    p = problem
    same = p.kernel == (3, 3) and p.geometry == ((1, 1), (1, 1), (1, 1), 1) and not p.gate
    return same and p.dtype == torch.float32 and min(p.input_shape[1], p.out_channels) >= LEAST_CHANNELS


def probable(problem: ConvProblem) -> bool:
    """Whether Winograd is probably faster than oneDNN's direct convolution: so it was measured (docs/cpu.md).

    It needs channels enough for the products to outweigh the transforms, work enough to outweigh some forty calls,
    and maps small enough for the transformed tiles to stay in the cache.
    """
    p = problem
    if not able(p):
        return False
    n, c, h, w = p.input_shape
    tiles = n * ((h + 1) // 2) * ((w + 1) // 2)
    least = 1e7 if h % 2 == w % 2 == 0 else 4e7  # an odd size leaves part of its last tiles unused
    transformed = 16 * tiles * max(c, p.out_channels) * p.dtype.itemsize
    cached = max(h, w) <= 16 or (max(h, w) <= 32 and transformed <= 16e6)
    return min(c, p.out_channels) >= 256 and cached and tiles * c * p.out_channels >= least


def transformed_weights(weight: Tensor) -> Tensor:
    """G g G^T of (K, C, 3, 3) weights as (16 * K, C, 1, 1), ordered by tile position, in the weights' dtype."""
    g = torch.tensor(
        [[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64, device=weight.device
    )
    u = torch.einsum("ai,kcij,bj->abkc", g, weight.double(), g)
    return u.reshape(-1, weight.shape[1], 1, 1).to(weight.dtype)


class Transformed:
    """The convolution bound to transformed and packed weights; it takes no gate."""

    label = "Winograd F(2x2, 3x3) over oneDNN"

    geometry = ([0, 0], [1, 1], [1, 1], 16)

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None, packed: bool = True):
        self.out_channels = problem.out_channels
        self.weight = transformed_weights(weight).contiguous(memory_format=torch.channels_last)
        if packed:
            self.shape = self.weight.shape
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, *self.geometry, list(self.packed_for(problem))
            )
        self.bias = bias
        self.activate = ACTIVATIONS[problem.activation].in_place

    @staticmethod
    def packed_for(problem: ConvProblem) -> tuple[int, ...]:
        """The input shape of the grouped 1x1 convolution over the tiles."""
        n, c, h, w = problem.input_shape
        return 1, 16 * c, n * ((h + 1) // 2) * ((w + 1) // 2), 1

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        n, c, h, w = x.shape
        th, tw = (h + 1) // 2, (w + 1) // 2
        k = self.out_channels
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + 2 * tw - w, 1, 1 + 2 * th - h))
        d = [padded[:, i : i + 2 * th : 2] for i in range(4)]
        v = x.new_empty((n, th, tw, 4, 4, c))
        for a, row in enumerate((d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])):
            e = [row[:, :, j : j + 2 * tw : 2] for j in range(4)]
            torch.sub(e[0], e[2], out=v[:, :, :, a, 0])
            torch.add(e[1], e[2], out=v[:, :, :, a, 1])
            torch.sub(e[2], e[1], out=v[:, :, :, a, 2])
            torch.sub(e[1], e[3], out=v[:, :, :, a, 3])
        flat = v.view(1, n * th * tw, 1, 16 * c).permute(0, 3, 1, 2)
        m = torch.ops.mkldnn._convolution_pointwise.default(flat, self.weight, None, *self.geometry, "none", [], "")
        m = m.permute(0, 2, 3, 1).reshape(n, th, tw, 4, 4, k)
        y = x.new_empty((n, 2 * th, 2 * tw, k))
        for i in range(2):
            t = m[..., 0, :, :] + m[..., 1, :, :] if i == 0 else m[..., 1, :, :] - m[..., 2, :, :]
            t = t.add_(m[..., 2, :, :]) if i == 0 else t.sub_(m[..., 3, :, :])
            torch.add(t[..., 0, :], t[..., 1, :], out=y[:, i::2, 0::2]).add_(t[..., 2, :])
            torch.sub(t[..., 1, :], t[..., 2, :], out=y[:, i::2, 1::2]).sub_(t[..., 3, :])
        if (2 * th, 2 * tw) != (h, w):
            y = y[:, :h, :w].contiguous()
        y = y.permute(0, 3, 1, 2)
        if residual is not None:
            y = y.add_(residual)
        if self.bias is not None:
            y = y.add_(self.bias.reshape(1, -1, 1, 1))
        return self.activate(y)
