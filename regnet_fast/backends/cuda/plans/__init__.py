"""What the CUDA C++ kernels of csrc/ are launched with: pure Python, for the extension module, NVRTC and the simulator.

A `Launch` names a source file of csrc/ and a template instantiation in it, and holds grid, threads of a block, bytes of
dynamic shared memory and arguments. The first of them are strings, which name tensors: the address is passed as 64 bits
(a null pointer where the option that would use it is off). Behind these an int is passed as int32, a float as float32.
All tensors are dense and 16-byte aligned; feature maps are NHWC. `buffers` are float32, and the plan decides their
shapes.

    problem = GroupedConv(images, height, columns, groups, width, stride, "bfloat16")
    reason = refuse(problem)                                         why there is no kernel, or None
    launch = grouped_conv_forward(problem, "relu", parts=True)       a Launch; parts: of the channel means
    launches = grouped_conv_backward(problem, affine=2, norm=True, sums=True, activation="relu")       in this order
    DepthwiseConv, refuse_depthwise, depthwise_conv_forward, depthwise_conv_backward                   the same
    launches = squeeze_excite(images, tiles, channels, hidden, "bfloat16")                             parts to gate

Sources are compiled as C++17 with `-I csrc -I csrc/device`; a launch above 48 KB of shared memory needs the function's
attribute for it. Choices are made once for each problem and are never a matter of measurement here.
"""

from .depthwise import DepthwiseConv, depthwise_conv_backward, depthwise_conv_forward, refuse_depthwise
from .gate import GATES, refuse_squeeze_excite, squeeze_excite
from .grouped import FEW, MANY, WIDEST, GroupedConv, refuse
from .grouped_backward import BackwardConfig, BackwardWork, backward_config, grouped_conv_backward
from .grouped_forward import ForwardConfig, forward_config, grouped_conv_forward, merged_moments, refuse_in_front
from .launch import ACTIVATIONS, PROCESSORS, SHARED_BYTES, TYPES, Launch, Target

__all__ = [
    "ACTIVATIONS",
    "FEW",
    "GATES",
    "MANY",
    "PROCESSORS",
    "SHARED_BYTES",
    "TYPES",
    "WIDEST",
    "BackwardConfig",
    "BackwardWork",
    "DepthwiseConv",
    "ForwardConfig",
    "GroupedConv",
    "Launch",
    "Target",
    "backward_config",
    "depthwise_conv_backward",
    "depthwise_conv_forward",
    "forward_config",
    "grouped_conv_backward",
    "grouped_conv_forward",
    "merged_moments",
    "refuse",
    "refuse_depthwise",
    "refuse_in_front",
    "refuse_squeeze_excite",
    "squeeze_excite",
]
