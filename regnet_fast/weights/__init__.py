"""Weights of a model from a checkpoint file: what timm reads, and the RepVGG layouts that it does not.

A file is read (`checkpoints`), compared with the model key by key and shape by shape, and only then written: a failure
leaves the model's values and its module structure as they were.

    file  ->  read_state_dict  ->  timm's keys  ->  check  ->  [fold | reparameterize]  ->  load_state_dict

Beyond timm's own `load_checkpoint`: torchvision and SEER RegNets, original RepVGG files, and RepVGG files in another
form than the model: a deployed file reparameterises the model's blocks, and a training-form file is folded into a model
that is already deployed.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.models.byobnet import RepVggBlock
from torch import Tensor, nn

from .checkpoints import (
    NUMPY_SUFFIXES,
    CheckpointError,
    StateDict,
    abridged,
    convert_repvgg,
    is_original_repvgg,
    read_state_dict,
    to_timm_keys,
)

__all__ = ["CheckpointError", "convert_repvgg", "load_checkpoint", "pretrained_overlay", "read_state_dict"]

# A key of each layout, and what a file that has it looks like.
_LAYOUTS = (
    ("s1.b1.conv1.conv.weight", "a timm RegNet"),
    ("s1.b1.conv1.weight", "a timm RegNetV"),
    ("stages.0.0.conv_kxk.conv.weight", "a RepVGG in training form"),
    ("stages.0.0.reparam_conv.weight", "a deployed (reparameterised) RepVGG"),
    ("stages.0.0.conv1_1x1.conv.weight", "a timm ByobNet such as regnetz_b16"),
    ("stages.0.blocks.0.conv1.weight", "a timm ResNetV2"),
    ("s1.b1.f.a.weight", "an original pycls RegNet, which timm converts offline: use its pycls_in1k tags"),
    (
        "regnet.embedder.embedder.convolution.weight",
        "a transformers RegNet, which `regnet-fast convert` renames",
    ),
    ("layer1.0.conv1.weight", "a ResNet"),
    ("blocks.0.attn.qkv.weight", "a vision transformer"),
)


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | PathLike,
    use_ema: bool = True,
    device: str | torch.device = "cpu",
    strict: bool = True,
) -> Any:
    """Loads a checkpoint file into `model`: timm's `load_checkpoint`, for more layouts, and all or nothing.

    `.npz` files go to the model's own `load_pretrained`. A RepVGG block is reparameterised where the file holds its
    deployed form; where only the model is deployed, the file's branches are folded in float64 (with BatchNorm's default
    eps, which a checkpoint does not record).

    Returns what `model.load_state_dict` returns (missing and unexpected keys), None for `.npz`.
    Raises FileNotFoundError; CheckpointError if the file cannot be read, if a shape differs, if nothing matches, or,
    if `strict`, if a key is missing or unexpected. After any exception the model is as it was.
    """
    if Path(checkpoint_path).suffix.lower() in NUMPY_SUFFIXES:
        return _load_numpy(model, checkpoint_path)
    state = to_timm_keys(read_state_dict(checkpoint_path, use_ema, device))
    to_deploy, to_fold = _repvgg_form_changes(model, state)
    expected = _expected_tensors(model, to_deploy, to_fold)
    _check(model, checkpoint_path, state, expected, strict)
    try:
        for prefix, twin in to_fold.items():
            _fold(state, prefix, twin)
        template = model.state_dict() if to_fold else expected
        state = {key: value.to(template[key].dtype) if key in template else value for key, value in state.items()}
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"cannot load '{checkpoint_path}' into {_name(model)}: {error}") from error
    with _structure_kept_on_failure(to_deploy.values()):
        for block in to_deploy.values():
            with torch.device(block.conv_kxk.conv.weight.device):  # where timm makes the new convolution
                block.reparameterize()
        return model.load_state_dict(state, strict=False)  # strictness was checked before the first write


def pretrained_overlay(overlay: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Makes a `pretrained_cfg_overlay` whose `file` is an original RepVGG checkpoint readable for timm.

    Returns an overlay with the converted `state_dict` in place of `file` (timm then adapts `in_chans` and `num_classes`
    itself), or `overlay` itself where timm reads the file, or where it names none. Only worth calling if weights are to
    be loaded, since it reads the file. timm keeps the overlay, tensors included, in `model.pretrained_cfg`.
    Raises what `read_state_dict` raises, and CheckpointError for a deployed RepVGG, which timm cannot load.
    """
    if not overlay or not overlay.get("file") or overlay.get("state_dict") or overlay.get("custom_load"):
        return overlay
    state = read_state_dict(overlay["file"])
    if "stem.reparam_conv.weight" in state or "stage0.rbr_reparam.weight" in state:
        raise CheckpointError(
            f"'{overlay['file']}' is a deployed (reparameterised) RepVGG, which cannot be adapted as pretrained "
            f"weights: use create_model(..., checkpoint_path='{overlay['file']}')"
        )
    if not is_original_repvgg(state):
        return overlay
    return {**{key: value for key, value in overlay.items() if key != "file"}, "state_dict": convert_repvgg(state)}


def _repvgg_form_changes(model: nn.Module, state: StateDict) -> tuple[dict[str, RepVggBlock], dict[str, RepVggBlock]]:
    """Finds the RepVGG blocks that have one form in the model and the other in the file, by key prefix.

    Returns the model's blocks that have to be deployed, and a training-form twin for each block to be folded into.
    """
    to_deploy, to_fold = {}, {}
    for name, block in model.named_modules():
        if not isinstance(block, RepVggBlock):
            continue
        prefix = f"{name}." if name else ""
        if block.reparam_conv is None and f"{prefix}reparam_conv.weight" in state:
            to_deploy[prefix] = block
        elif block.reparam_conv is not None and f"{prefix}conv_kxk.conv.weight" in state:
            to_fold[prefix] = _training_twin(block.reparam_conv)
    return to_deploy, to_fold


def _training_twin(conv: nn.Conv2d) -> RepVggBlock:
    """Returns the training-form block whose deployed form is `conv`, in float64 and without storage."""
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.dilation)
    with torch.device("meta"):
        return RepVggBlock(*shape, group_size=conv.in_channels // conv.groups).double()


def _expected_tensors(
    model: nn.Module, to_deploy: Mapping[str, RepVggBlock], to_fold: Mapping[str, RepVggBlock]
) -> StateDict:
    """Returns a tensor of the right shape and dtype for every key that the file should have."""
    expected = dict(model.state_dict())
    for prefix, block in to_deploy.items():
        kernel = block.conv_kxk.conv.weight
        for key in block.state_dict():
            if not key.startswith("attn."):
                del expected[prefix + key]
        expected[f"{prefix}reparam_conv.weight"] = kernel
        expected[f"{prefix}reparam_conv.bias"] = kernel[:, 0, 0, 0]
    for prefix, twin in to_fold.items():
        del expected[f"{prefix}reparam_conv.weight"], expected[f"{prefix}reparam_conv.bias"]
        expected.update({prefix + key: value for key, value in twin.state_dict().items()})
    return expected


def _fold(state: StateDict, prefix: str, twin: RepVggBlock) -> None:
    """Replaces one block's branches in `state` by the kernel and bias of its deployed form, computed in float64.

    Raises RuntimeError if a branch is incomplete.
    """
    branches = {key: state.pop(prefix + key).double() for key in twin.state_dict() if prefix + key in state}
    twin.load_state_dict(branches, assign=True)
    with torch.no_grad():
        state[f"{prefix}reparam_conv.weight"], state[f"{prefix}reparam_conv.bias"] = twin._get_kernel_bias()


@contextmanager
def _structure_kept_on_failure(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Gives `blocks` their attributes, children and `requires_grad` back if the body raises."""
    before = [
        (block, dict(vars(block)), dict(block._modules), [(p, p.requires_grad) for p in block.parameters()])
        for block in blocks
    ]
    try:
        yield
    except BaseException:
        for block, attributes, children, gradients in before:
            vars(block).clear()
            vars(block).update(attributes)
            block._modules.clear()
            block._modules.update(children)
            for parameter, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)
        raise


def _load_numpy(model: nn.Module, path: str | PathLike) -> None:
    if not hasattr(model, "load_pretrained"):
        raise CheckpointError(
            f"'{path}' is a NumPy archive, and {_name(model)} has no load_pretrained() to read it: timm reads the "
            ".npz files of the BiT models (resnetv2_*_bit)"
        )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.load_pretrained(str(path))
    except BaseException as error:
        model.load_state_dict(before)
        if isinstance(error, FileNotFoundError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"cannot load '{path}' into {_name(model)}: {error}") from error


def _check(model: nn.Module, path: str | PathLike, state: StateDict, expected: StateDict, strict: bool) -> None:
    """Raises CheckpointError, with what would work, unless every tensor of the file has its place in the model.

    As in torch, `num_batches_tracked` may be missing, or left over where a BatchNorm was frozen, or have shape (1,).
    """
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected and _frozen_statistic(key) not in expected]
    common = [key for key in state if key in expected]
    wrong = [key for key in common if not _fits(state[key], expected[key])]
    if common and not wrong and not (strict and (missing or unexpected)):
        return

    right = len(common) - len(wrong)
    lines = [f"cannot load '{path}' into {_name(model)}: {right} of its {len(expected)} keys match. It is unchanged."]
    if wrong:
        shapes = (f"{key} is {_form(state[key])} in the file, {_form(expected[key])} in the model" for key in wrong)
        lines.append(f"wrong shape ({len(wrong)}): {abridged(shapes, '; ')}")
    if missing:
        lines.append(f"missing from the file ({len(missing)}): {abridged(missing)}")
    if unexpected:
        lines.append(f"unknown to the model ({len(unexpected)}): {abridged(unexpected)}")
    if right < len(expected) // 2:
        layout, own = _layout(state), _layout(expected)
        lines += [f"The file looks like {layout}{', of another size' if layout == own else ''}."] if layout else []
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        lines += _classifier_advice(f"{config.get('classifier') or 'head.fc'}.weight", path, state, expected)
        lines += _stem_advice(wrong, state, expected)
    raise CheckpointError("\n  ".join(lines))


def _classifier_advice(key: str, path: str | PathLike, state: StateDict, expected: StateDict) -> Iterator[str]:
    """Yields what to do about a classifier (whose weight is `key`) of other size, or on one side only."""
    if key in state and not state[key].ndim:
        return
    if key not in state and key in expected:
        yield "The file has no classifier: create the model with num_classes=0, or load with strict=False."
    elif key in state and key not in expected:
        yield f"The model has no classifier: create it with num_classes={len(state[key])}, or load with strict=False."
    elif key in state and len(state[key]) != len(expected[key]):
        found, wanted = len(state[key]), len(expected[key])
        yield f"The file has {found} classes: create the model with num_classes={found}."
        if not any("reparam_conv" in key for key in state):
            yield (
                "To leave the file's classifier out: create_model(..., pretrained=True, "
                f"num_classes={wanted}, pretrained_cfg_overlay=dict(file='{path}', num_classes={found}))."
            )


def _stem_advice(wrong: Iterable[str], state: StateDict, expected: StateDict) -> Iterator[str]:
    """Yields what to do about a first convolution that has other input channels."""
    for key in wrong:
        found, wanted = state[key].shape, expected[key].shape
        if key.startswith("stem") and len(found) == len(wanted) == 4 and found[1] != wanted[1]:
            yield f"The file takes {found[1]} input channels: create the model with in_chans={found[1]}."
            return


def _fits(value: Tensor, target: Tensor) -> bool:
    same_shape = value.shape == target.shape or (target.ndim == 0 and value.shape == (1,))
    return same_shape and value.layout == target.layout and value.is_complex() == target.is_complex()


def _form(tensor: Tensor) -> str:
    plain = tensor.layout == torch.strided and not tensor.is_complex()
    return f"{tuple(tensor.shape)}{'' if plain else f' {tensor.layout} {tensor.dtype}'}"


def _frozen_statistic(key: str) -> str:
    """Returns the key that a frozen BatchNorm still has beside the `num_batches_tracked` that it gave up."""
    return key.removesuffix("num_batches_tracked") + "running_mean" if key.endswith("num_batches_tracked") else key


def _layout(state: StateDict) -> str:
    return next((layout for key, layout in _LAYOUTS if key in state), "")


def _name(model: nn.Module) -> str:
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return f"{type(model).__name__} {architecture}" if architecture else type(model).__name__
