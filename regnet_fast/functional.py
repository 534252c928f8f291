"""The public operations, on plain tensors: `regnet_fast.functional`.

Importing this module registers them as `torch.ops.regnet_fast.*`.

Arrays of other libraries, such as CuPy's, are given through DLPack, in the memory that they have:
`torch.from_dlpack(array)` and, of a result, `cupy.from_dlpack(y)`. Each lets the reader's current stream wait for the
writer's.
"""

from .ops.conv import dense_conv, grouped_conv, pack_conv, pointwise_conv
from .ops.convolution import PackedConv
from .ops.fold import BatchNorm, fold
from .ops.norm_act import norm_act
from .ops.squeeze_excite import squeeze_excite

__all__ = [
    "BatchNorm",
    "PackedConv",
    "dense_conv",
    "fold",
    "grouped_conv",
    "norm_act",
    "pack_conv",
    "pointwise_conv",
    "squeeze_excite",
]
