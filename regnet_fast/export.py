"""A model as a file that other runtimes read: ONNX.

What is exported is the host's own forward, since no other runtime knows this package's operators, in the form that is
best to ship: RepVGG reparameterised and standardised weights (BiT) standardised once. Before the file appears under its
name, ONNX Runtime has run it, and its results were held to float64 by the rule of `judging`.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.utils
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .blocks.units import ConvUnit
from .inspect import verify
from .inspect.judging import Check, judge
from .models import restore

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ERROR_RATIO = 4.0
"""How many times eager's error the file's may be: another runtime sums in an order of its own."""

OPSET = 18
"""The operators that torch's exporter writes: older ones it cannot, and newer ones are converted from these."""

SILENT = 4
"""ONNX Runtime's severity of a message: it has a warning for every constant that it does not fold."""


class ExportError(ValueError):
    """The model cannot be exported as was asked; the message says why and what would work."""


class WrongFileError(ExportError):
    """ONNX Runtime does not compute from the exported file what the model computes."""


@dataclass(frozen=True)
class Exported:
    """What `onnx` wrote: the file, its operators, the names and shapes of its inputs and outputs, and the check of each
    output. Words in a shape stand for numbers that may change.
    """

    path: str
    opset: int
    bytes: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    checks: list[Check]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "checks": [check.as_dict() for check in self.checks]}


def onnx(
    model: nn.Module,
    path: str | os.PathLike,
    input_size: tuple[int, int, int] | None = None,
    opset: int = OPSET,
) -> Exported:
    """Write a model in evaluation mode as an ONNX file that takes any number of images, and check the file.

    Args:
        model: a rebuilt model, or any network that takes one batch of images; it stays as it is.
        path: the file to write, which ends in .onnx. Weights of more than 2 GB stand in a second file beside it.
        input_size: (C, H, W) of its input, which is fixed; by default what the model was trained for.
        opset: the version of ONNX's operators.

    The results of ONNX Runtime on the CPU for batches of one, two and three random images are held to float64 by the
    rule of `judging`, with the host's own forward as eager and ERROR_RATIO in the place of 2.

    Raises ExportError where a package of the extra `onnx` is missing, or where the opset, the dtype or the model cannot
    be exported; WrongFileError where the file computes something else, and no file is left then.
    """
    path = Path(path)
    check_request(path, opset)
    host, shipped = _host_form(model), shipped_form(model)
    dtype = next((p.dtype for p in shipped.parameters()), torch.float32)
    if dtype not in (torch.float32, torch.float16):
        raise ExportError(f"ONNX Runtime has no {dtype} convolutions on a CPU; export the model in float32 or float16")
    generator, size = torch.Generator().manual_seed(0), input_size or verify.input_size(model)
    images = [
        torch.randn(batch, *size, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for batch in (2, 1, 3)
    ]
    with torch.no_grad():
        count = len(_tensors(shipped(images[0])))
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = Path(folder) / path.name
        write(shipped, images[0], made, names, opset)
        inputs, outputs, checks = _check(made, host, images)
        size_in_bytes = sum(part.stat().st_size for part in Path(folder).iterdir())
        for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            part.replace(path.parent / part.name)
    return Exported(str(path), opset, size_in_bytes, inputs, outputs, checks)


def check_request(path: Path, opset: int = OPSET) -> None:
    """Raise ExportError for what cannot be written here, whatever the model."""
    if path.suffix != ".onnx":
        raise ExportError(f"'{path}' does not end in .onnx, which is the one format that is written")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder '{path.parent}'")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} not installed; pip install 'regnet_fast[onnx]' brings what ONNX needs")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise ExportError(
            f"opset {opset} cannot be written: torch's exporter begins at {OPSET}, and onnx {onnx.__version__} "
            f"ends at {newest}"
        )


def _host_form(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode, with the host's own blocks."""
    return restore(copy.deepcopy(model)).cpu().eval()


def shipped_form(model: nn.Module) -> nn.Module:
    """The copy that is exported, on the CPU: the same function with fewer and simpler layers of the host's."""
    made = _host_form(model)
    dtype = next((p.dtype for p in made.parameters()), torch.float32)
    with torch.device("cpu"):  # where timm makes the new convolutions, whatever torch's default device is
        made = timm.utils.reparameterize_model(made.float(), inplace=True).to(dtype).requires_grad_(False)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is StdConv2d:
                child.weight.copy_(ConvUnit(name, child, standardize=child.eps).weights()[0])
                child.__class__ = nn.Conv2d
            elif type(child) is nn.ConstantPad2d and child.value == 0:
                setattr(parent, name, _ZeroBorder(child.padding))
    return made


class _ZeroBorder(nn.Module):
    """`F.pad(x, (left, right, top, bottom))` without ONNX's `Pad`, which ONNX Runtime merges into a max pool behind it:
    zeros would become minus infinity.
    """

    def __init__(self, padding: tuple[int, int, int, int]):
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.padding
        n, c, height, width = x.shape
        x = torch.cat([x.new_zeros(n, c, top, width), x, x.new_zeros(n, c, bottom, width)], 2)
        height += top + bottom
        return torch.cat([x.new_zeros(n, c, height, left), x, x.new_zeros(n, c, height, right)], 3)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def write(model: nn.Module, x: Tensor, path: Path, names: list[str], opset: int = OPSET) -> None:
    """Write a module as it is and unchecked, for any number of images, from an example with two or more.

    Raises ExportError where torch's exporter cannot.
    """
    import onnx

    shapes = ({0: torch.export.Dim("batch")},)
    try:
        torch.onnx.export(
            model,
            (x,),
            path,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["input"],
            output_names=names,
            dynamic_shapes=shapes,
            external_data=sum(t.numel() * t.element_size() for t in model.state_dict().values()) >= 2**31 - 2**24,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {reason}") from error
    written = {one.version for one in onnx.load(path, load_external_data=False).opset_import if not one.domain}
    if written != {opset}:  # the exporter warns and keeps its own
        raise ExportError(f"{type(model).__name__} cannot be written in opset {opset}; {max(written)} works")


def _check(path: Path, host: nn.Module, images: list[Tensor]) -> tuple[dict, dict, list[Check]]:
    """Run a file beside the host's own model, which is in float64 afterwards.

    Returns the shapes of the file's inputs and outputs, and the checks.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = SILENT
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = [session.run(None, {session.get_inputs()[0].name: x.numpy()}) for x in images]
    except Exception as error:  # onnxruntime's exceptions have no class in common but this
        raise WrongFileError(f"ONNX Runtime cannot run the exported file: {str(error).strip()}") from error
    last = torch.channels_last
    with torch.no_grad():
        eager = [_tensors(host.to(memory_format=last)(x.contiguous(memory_format=last))) for x in images]
        reference = [_tensors(host.double()(x.double())) for x in images]
    found = [[torch.from_numpy(t) for t in one] for one in found]
    tensors = (map(torch.cat, zip(*run, strict=True)) for run in (found, eager, reference))
    names = [one.name for one in session.get_outputs()]
    checks = [judge(*one, ERROR_RATIO) for one in zip(names, *tensors, strict=True)]
    for check in checks:
        if not check.ok:
            raise WrongFileError(f"ONNX Runtime computes something else from the file: {check.stage}: {check.failure}")
    shapes = ({one.name: list(one.shape) for one in ends} for ends in (session.get_inputs(), session.get_outputs()))
    return *shapes, checks
