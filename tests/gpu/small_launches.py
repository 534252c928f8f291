"""Every kind of csrc/'s kernels once on small maps, for compute-sanitizer: `python tests/gpu/small_launches.py`.

Odd sizes, so that tiles overhang; narrow groups, wide ones whose channels come in steps, and depthwise. Nothing else of
consequence runs on the GPU.
"""

import torch

from regnet_fast.backends import BackToBackProblem, ConvProblem, Geometry, SqueezeExciteProblem, cuda
from regnet_fast.backends.passes.cuda import CudaConvs
from regnet_fast.backends.passes.operands import Conv, Norm, OutputGrad, OutputNorm, Sums

CASES = [(24, 3, 1, torch.bfloat16), (16, 5, 2, torch.float16), (232, 1, 2, torch.bfloat16), (1, 40, 1, torch.float16)]
"""Group width, groups, stride, dtype."""


def launch_all(device: str) -> None:
    """Inference, then the forward and the gradients of training. Raises AssertionError where a result is not finite."""
    ours = CudaConvs()
    for width, groups, stride, dtype in CASES:
        channels, size = width * groups, (15, 9)

        def of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            t = torch.rand(shape).to(dtype)
            return (t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t).to(device)

        x, weight = of(2, channels, *size, dtype=dtype), of(channels, width, 3, 3, dtype=dtype).div_(width)
        geometry = Geometry((stride, stride), (1, 1), (1, 1), groups)
        problem = ConvProblem(tuple(x.shape), channels, (3, 3), geometry, "silu", False, False, dtype, device)
        y, parts = cuda.prepare_conv(problem, weight, of(channels)).with_parts(x)
        weights = of(8, channels, dtype=dtype), of(8), of(channels, 8, dtype=dtype), of(channels)
        excite = SqueezeExciteProblem(2, channels, 8, "relu", dtype, device)
        results = [y, parts, cuda.prepare_squeeze_excite(excite, *weights).from_parts(parts, dtype)]

        facts = "relu", "silu", stride, dtype, device
        both = BackToBackProblem((2, 40, *size), channels, groups, *facts, means=True)
        if cuda.refuse(both) is None:
            first = of(channels, 40, 1, 1, dtype=dtype), of(channels)
            joined = cuda.prepare_back_to_back(both, *first, weight, of(channels))
            results += joined(of(2, 40, *size, dtype=dtype))

        norm, one = Norm(*(of(channels) for _ in range(4)), 1e-5, "relu"), Conv(weight, geometry)
        ((raw, _),) = ours.convs(x, norm, None, [one], [True])
        own = OutputNorm(
            *(of(channels) for _ in range(3)), 1e-5, Sums(of(channels), of(channels)), raw.numel() / channels
        )
        arriving = [OutputGrad(of(*raw.shape, dtype=dtype), own, raw)]
        gradients = ours.convs_backward(arriving, x, norm, None, [one], True, [True])
        results += [raw, gradients.x, *gradients.weights, *gradients.sums]
        assert all(result.isfinite().all() for result in results)


if __name__ == "__main__":
    launch_all("cuda:0")
    torch.cuda.synchronize()
