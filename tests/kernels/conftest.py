"""These tests run in Triton's interpreter, in a process of their own: TRITON_INTERPRET=1 must be set from the start."""

import dataclasses
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Results lie between guards, which must stay; yields the function that puts an input between NaNs."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield None
        return
    from regnet_fast.kernels import (
        channel_statistics,
        channel_tiles,
        common,
        depthwise_conv,
        grouped_input_gradient,
        grouped_weight_gradient,
        implicit_gemm,
        norm_act,
        pointwise_conv,
        pointwise_pair,
        training_join,
        training_passes,
    )

    guards = []

    def between(tensor: torch.Tensor, value: float) -> torch.Tensor:
        """The same values and strides inside a longer buffer of one value."""
        flat = torch.full((tensor.numel() + 512,), value, dtype=tensor.dtype)
        inner = flat[256:-256].as_strided(tensor.shape, tensor.stride(), 256)
        inner.copy_(tensor)
        guards.append((flat, value))
        return inner

    def new_output(size, like):
        return between(common.new_output(size, like).zero_(), 7.0)

    def new_sums(size, like):
        return between(original(size, like).zero_(), 7.0)

    original, passes = channel_tiles.new_sums, (training_join, training_passes)
    convolutions = (pointwise_conv, pointwise_pair, implicit_gemm, depthwise_conv, grouped_input_gradient)
    for module in (*convolutions, norm_act, *passes):
        monkeypatch.setattr(module, "new_output", new_output)
    for module in (channel_statistics, channel_tiles, grouped_weight_gradient, *passes):
        monkeypatch.setattr(module, "new_sums", new_sums)
    yield lambda tensor: None if tensor is None else between(tensor, float("nan"))
    for flat, value in guards:
        ends = torch.cat([flat[:256], flat[-256:]])
        assert bool((ends.isnan() if value != value else ends == value).all()), "a kernel wrote outside its result"


@pytest.fixture
def unchecked_integers(monkeypatch):
    """For networks and for every configuration: the kernels' other tests check each sum of integers for overflow, which
    is half of their time.
    """
    from triton.runtime.interpreter import interpreter_builder

    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", options)
