"""torch's own settings that decide how a GPU computes."""

from __future__ import annotations

from typing import NamedTuple

import torch

_CONV, _MATMUL = ("cuda", "conv"), ("cuda", "matmul")


class Settings(NamedTuple):
    """What torch is told about convolutions and matrix products on a GPU.

    Attributes: `conv_tf32` and `matmul_tf32`, whether float32 operands of convolutions and of matrix products are
    rounded to TF32; `deterministic`, whether equal calls have to give equal bits, by either of torch's two settings;
    `benchmark`, whether cuDNN looks for its fastest kernels anew in each process; `cudnn`, whether it serves at all.
    """

    conv_tf32: bool
    matmul_tf32: bool
    deterministic: bool
    benchmark: bool
    cudnn: bool

    def apply(self) -> None:
        """Tell torch the same in this process."""
        for op, on in ((_CONV, self.conv_tf32), (_MATMUL, self.matmul_tf32)):
            torch._C._set_fp32_precision_setter(*op, "tf32" if on else "ieee")
        torch.backends.cudnn.deterministic = self.deterministic
        torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled = self.benchmark, self.cudnn


def settings() -> Settings:
    """The settings here and now. Never raises.

    TF32 is set through `allow_tf32` and `torch.set_float32_matmul_precision`, or through `fp32_precision` on
    `torch.backends`, `.cudnn`, `.cudnn.conv` and `.cuda.matmul`. Where both were used the first ones raise when they
    are read; `fp32_precision` of an operation is what that operation goes by, whoever set it.
    """
    read = torch._C._get_fp32_precision_getter
    return Settings(
        read(*_CONV) == "tf32",
        read(*_MATMUL) == "tf32",
        torch._C._get_cudnn_deterministic() or torch.are_deterministic_algorithms_enabled(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_enabled(),
    )
