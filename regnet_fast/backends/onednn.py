"""oneDNN on a CPU: prepacked weights, and bias, residual and activation as post-ops of the convolution.

The calls are the ones that torch.compile emits when it freezes a model (`torch.ops.mkldnn`), so nothing is compiled
here and nothing is slower there. Everything computes in channels_last.
"""

from __future__ import annotations

import math
import struct
from functools import cached_property

import torch
from torch import Tensor

from . import native, reference, winograd
from .activations import ACTIVATIONS
from .problem import Apart, ConvProblem, Geometry, InTurn, NormActProblem, Problem, Run, SqueezeExciteProblem


def refuse(problem: Problem) -> str | None:
    """Why oneDNN cannot serve here, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this build of torch has no oneDNN"
    if not torch._C._get_mkldnn_enabled():
        return "oneDNN is switched off (torch.backends.mkldnn)"
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(problem.dtype)
    if supported is not None:
        name = str(problem.dtype).removeprefix("torch.")
        return None if supported() else f"this CPU has no {name} instructions that oneDNN uses"
    if problem.dtype != torch.float32:
        return f"oneDNN computes in float32, bfloat16 and float16, not in {problem.dtype}"
    return None


def apply_gate(x: Tensor, gate: Tensor, consume: bool) -> Tensor:
    """`x * gate[:, :, None, None]`, in x's own memory where the caller has no more use for x."""
    gate = gate.view(*gate.shape, 1, 1)
    return x.mul_(gate) if consume else x * gate


class Convolution(Run):
    """A convolution bound to its weights, which are packed for one input shape, or serve every shape.

    Attributes: `weight`; `shape` and `geometry` (padding, stride, dilation, groups) of the convolution that it is
    packed for, or None where it is not packed; `layout` of the packed weight, or None where that is not known.
    """

    weight: Tensor
    shape: torch.Size | None = None
    geometry: tuple

    @cached_property
    def layout(self) -> tuple | None:
        return _layout(self.weight)

    @staticmethod
    def packed_for(problem: ConvProblem) -> tuple[int, ...]:
        """The input shape of the convolution that the weight is packed for."""
        return problem.input_shape

    def fits(self, problem: ConvProblem) -> bool:
        """Whether a problem that differs in the input shape alone wants the weight as it is."""
        if self.shape is None:
            return True
        example = torch.empty(self.shape, dtype=problem.dtype, device="cpu", memory_format=torch.channels_last)
        wanted = _layout(_packed(example, self.geometry, self.packed_for(problem)))
        return wanted is not None and wanted == self.layout


def _packed(weight: Tensor, geometry: tuple, input_shape: tuple[int, ...]) -> Tensor:
    """A weight as oneDNN wants it for an input shape."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(input_shape))


_MEMORY_DESC = struct.Struct("=8x12qi4x12q12qqi4x12qi4x12q12q")
"""The members of oneDNN's `dnnl_memory_desc` from the dims to the blocking, without the padding between them, which is
never written: dims, dtype, padded dims and offsets, offset, kind of format, strides, and the inner blocks' number,
sizes and dimensions."""


def _layout(packed: Tensor) -> tuple | None:
    """How oneDNN lays a packed weight out, or None where its description does not read as one of that size."""
    described = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
    found = _MEMORY_DESC.unpack_from(described) if len(described) >= _MEMORY_DESC.size else ()
    return found if math.prod(filter(None, found[:12])) == packed.numel() else None


class DirectConv(Convolution):
    """oneDNN's convolution with packed weights.

    The weights are packed for one input shape, for which oneDNN chooses the blocking; given another blocking it lays
    them out again in each call, which may be very slow. The bias may be float32 beside weights of another dtype: it is
    added to the float32 sums before they are rounded.
    """

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None, packed: bool = True):
        self.label = "oneDNN" if packed else "oneDNN, weights not packed"
        p = problem
        stride, padding, dilation, groups = p.geometry
        self.geometry = (list(padding), list(stride), list(dilation), groups)
        if packed:
            self.shape = weight.shape
            self.weight = _packed(weight, self.geometry, p.input_shape)
        else:
            self.weight = weight.contiguous(memory_format=torch.channels_last)
        wide = bias is not None and not p.residual  # with a residual the call insists on one dtype
        self.bias = bias.contiguous() if wide else None if bias is None else bias.to(p.dtype).contiguous()
        attr, scalars, algorithm = ACTIVATIONS[p.activation].post_op
        # Behind a sum torch's call takes no other post-op than ReLU.
        self.after = ACTIVATIONS[p.activation].in_place if p.residual and attr not in ("none", "relu") else None
        # The call that leaves the residual alone raises for bfloat16 + ReLU in groups, and in torch 2.11 for an output
        # of one pixel or one channel; the call that overwrites it does not.
        self.copies_residual = groups > 1 or p.out_channels == 1
        unary = None if attr == "none" else attr
        epilogue = ("none", [], "") if self.after else (attr, list(scalars), algorithm)
        self.plain = (self.weight, self.bias, *self.geometry, *epilogue)
        self.added = (self.weight, self.bias, *self.geometry, "add", None, unary, [], "")
        self.conv = torch.ops.mkldnn._convolution_pointwise.default
        self.conv_add = torch.ops.mkldnn._convolution_pointwise.binary
        self.conv_add_ = torch.ops.mkldnn._convolution_pointwise_.binary

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        if gate is not None:
            x = apply_gate(x, gate, consume)
        if residual is None:
            return self.conv(x, *self.plain)
        if self.after:
            return self.after(self.conv(x, *self.plain).add_(residual))
        if into_residual:
            return self.conv_add_(residual, x, *self.added)
        if self.copies_residual or residual.shape[2:] == (1, 1):
            return self.conv_add_(residual.clone(memory_format=torch.channels_last), x, *self.added)
        return self.conv_add(x, residual, *self.added)


class MatmulConv(Convolution):
    """A small 1x1 convolution as torch's matrix product.

    A call of oneDNN's convolution costs more, which the smallest layers at batch 1 feel (docs/cpu.md).
    """

    label = "torch addmm"

    def __init__(self, problem: ConvProblem, weight: Tensor, bias: Tensor | None, packed: bool = True):
        self.weight = weight.flatten(1).t()
        self.bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(problem.dtype)
        self.activate = ACTIVATIONS[problem.activation].in_place

    def __call__(
        self, x: Tensor, gate: Tensor | None, residual: Tensor | None, consume: bool, into_residual: bool
    ) -> Tensor:
        if gate is not None:
            x = apply_gate(x, gate, consume)
        n, c, h, w = x.shape
        y = torch.addmm(self.bias, x.permute(0, 2, 3, 1).reshape(-1, c), self.weight)
        y = y.view(n, h, w, -1).permute(0, 3, 1, 2)
        return self.activate(y if residual is None else y.add_(residual))


class WinogradConv(winograd.Transformed, Convolution):
    """`winograd.Transformed`."""


CONVS: dict[str, type[Run]] = {
    "direct": DirectConv,
    "winograd": WinogradConv,
    "matmul": MatmulConv,
    "native": native.Conv,
}
"""The variants of a convolution."""


def conv_variants(problem: ConvProblem) -> tuple[str, ...]:
    """The variants that can compute a convolution, that which is probably the fastest first (docs/cpu.md)."""
    able = {"direct": True, "winograd": winograd.able(problem), "matmul": _matmul_able(problem)}
    able["native"] = native.refuse(problem) is None
    first = "winograd" if winograd.probable(problem) else "matmul" if _matmul_probable(problem) else "direct"
    return (first, *(name for name in CONVS if able[name] and name != first))


def _matmul_able(problem: ConvProblem) -> bool:
    p = problem
    return p.op == "pointwise_conv" and p.dtype == torch.float32 and p.geometry.stride == (1, 1)


def _matmul_probable(problem: ConvProblem) -> bool:
    p = problem
    return _matmul_able(p) and max(p.input_shape[1], p.out_channels) <= 320 and p.flops <= 5e6


def prepare_conv(
    problem: ConvProblem, weight: Tensor, bias: Tensor | None, packed: bool = True, variant: str | None = None
) -> Convolution:
    """The convolution bound to its weights, packed or not, in the probably fastest variant unless one is named.

    A variant serves one input shape, its `shape`, or where that is None every shape.
    """
    return CONVS[variant or conv_variants(problem)[0]](problem, weight, bias, packed)


prepare_pair = Apart.by(prepare_conv)
prepare_back_to_back = InTurn.by(prepare_conv)
prepare_join = reference.join_in_place


class SqueezeExcite(Run):
    """The gate from the means in three matrix calls, in float32 whatever the model's dtype."""

    label = "torch addmm, float32"

    def __init__(
        self, problem: SqueezeExciteProblem, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
    ):
        self.fc1 = fc1_weight.t()  # not copied: as fast, and the sums of one row of means are 2 to 3 times more exact
        self.fc2 = fc2_weight.t()
        self.bias1, self.bias2 = fc1_bias, fc2_bias
        self.activate = ACTIVATIONS[problem.activation].in_place
        self.activate_gate = ACTIVATIONS[problem.gate_activation].in_place

    def __call__(self, means: Tensor) -> Tensor:
        hidden = self.activate(torch.addmm(self.bias1, means, self.fc1))
        return self.activate_gate(torch.addmm(self.bias2, hidden, self.fc2))


prepare_squeeze_excite = SqueezeExcite


class AffineNormAct(Run):
    """Scale, shift and activation as one `addcmul` and an activation in place."""

    label = "torch addcmul"

    def __init__(self, problem: NormActProblem, scale: Tensor, shift: Tensor):
        self.scale, self.shift = scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
        self.activate = ACTIVATIONS[problem.activation].in_place

    def __call__(self, x: Tensor, gate: Tensor | None, consume: bool) -> Tensor:
        scale = self.scale if gate is None else self.scale * gate[:, :, None, None]
        return self.activate(torch.addcmul(self.shift, x, scale, out=x if consume else torch.empty_like(x)))


class DepthwiseNormAct(Run):
    """Scale, shift and activation as a depthwise 1x1 convolution with post-ops: one pass where torch makes several.

    In bfloat16 it is faster than `addcmul` and an activation (docs/cpu.md).
    """

    def __init__(self, problem: NormActProblem, scale: Tensor, shift: Tensor):
        channels = problem.input_shape[1]
        facts = problem.activation, problem.gate, False, problem.dtype, problem.device
        conv = ConvProblem(problem.input_shape, channels, (1, 1), Geometry(groups=channels), *facts)
        self.conv = DirectConv(conv, scale.to(problem.dtype).reshape(-1, 1, 1, 1), shift)
        self.label = "oneDNN depthwise"

    def __call__(self, x: Tensor, gate: Tensor | None, consume: bool) -> Tensor:
        return self.conv(x, gate, None, consume, False)


NORM_ACTS: dict[str, type[Run]] = {"addcmul": AffineNormAct, "depthwise": DepthwiseNormAct}
"""The variants of scale, shift and activation."""


def norm_act_variants(problem: NormActProblem) -> tuple[str, ...]:
    """The variants that can compute a problem, that which is probably the fastest first (docs/cpu.md)."""
    return ("addcmul", "depthwise") if problem.dtype == torch.float32 else ("depthwise", "addcmul")


def prepare_norm_act(problem: NormActProblem, scale: Tensor, shift: Tensor, variant: str | None = None) -> Run:
    """The affine map and activation bound to scale and shift, in the probably fastest variant unless one is named."""
    return NORM_ACTS[variant or norm_act_variants(problem)[0]](problem, scale, shift)
