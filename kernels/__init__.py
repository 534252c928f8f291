"""Triton kernels, one file for each operation: the kernel, its configurations and its launcher.

They know tensors, not modules. Activations are NHWC in memory, sums are float32, and every result depends on nothing
but its inputs: reductions are stored by tile and added in a fixed order.
"""
