"""A network as other runtimes compute it on a CPU, to be timed beside ours: OpenVINO and ONNX Runtime.

Both are given what `regnet_fast.export` ships, in float32, and images in float32 as they lie in memory. Where the
network computes in bfloat16, OpenVINO is asked for that precision, as its users do; ONNX Runtime has none.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import export
from ..hosts import named

_PACKAGES = {"openvino": ("openvino",), "onnxruntime": export.PACKAGES}
_DTYPES = {"openvino": (torch.float32, torch.bfloat16), "onnxruntime": (torch.float32,)}
_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}

RUNTIMES = tuple(_PACKAGES)
ERROR_RATIO = 8.0
"""How many times eager's error a runtime's may be. Another precision or another function is thousands of times further
off; OpenVINO's sums in float32 are up to five times, and to leave it out for that would flatter ours.
"""


def refuse(name: str, dtype: torch.dtype) -> str | None:
    """Why a runtime cannot be timed here in a dtype, or None."""
    missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} not installed; pip install 'regnet_fast[runtimes]' brings the runtimes"
    shown = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES[name]:
        return f"it computes no {shown} on a CPU"
    return f"it computes no {shown} on this CPU" if dtype == torch.bfloat16 and not _knows_bfloat16() else None


def _knows_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU; elsewhere it would take float32 without a word."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def settings(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a runtime is told: as many threads as torch has, one call at a time."""
    threads = torch.get_num_threads()
    if name == "openvino":
        return {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[dtype],
        }
    return {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "session.intra_op.allow_spinning": "1",  # which is its default
    }


class Call:
    """A module's logits for one batch of images, by a runtime. The first call converts and compiles it for this batch.

    A result is valid until the next call. Raises in the first call whatever the runtime raises for the module.
    """

    def __init__(self, name: str, module: nn.Module, x: Tensor):
        self.settings = settings(name, x.dtype)
        self._name, self._module, self._x = name, module, x.float().contiguous()

    def __call__(self) -> Tensor:
        return self._run()

    @cached_property
    def _run(self) -> Callable[[], Tensor]:
        convert = {"openvino": _by_openvino, "onnxruntime": _by_onnxruntime}[self._name]
        shipped = _Logits(export.shipped_form(self._module).float()).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tracing, and about what the runtimes call in torch
            return convert(shipped, self._x, self.settings)


class _Logits(nn.Module):
    """A network whose result is its logits alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return named.logits(self.network(x))


def _by_openvino(network: nn.Module, x: Tensor, told: dict[str, Any]) -> Callable[[], Tensor]:
    import openvino

    model = openvino.convert_model(network, example_input=x, input=[list(x.shape)])
    request = openvino.Core().compile_model(model, "CPU", told).create_infer_request()
    image = x.numpy()
    return lambda: torch.from_numpy(request.infer([image], share_inputs=True, share_outputs=True)[0])


def _by_onnxruntime(network: nn.Module, x: Tensor, told: dict[str, Any]) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = told["intra_op_num_threads"]
    options.inter_op_num_threads = told["inter_op_num_threads"]
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, told["graph_optimization_level"])
    options.add_session_config_entry("session.intra_op.allow_spinning", told["session.intra_op.allow_spinning"])
    options.log_severity_level = export.SILENT
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export.write(network, torch.cat([x, x]), path, ["output"])  # of one image the exporter makes a constant
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = {"input": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, images)[0])
