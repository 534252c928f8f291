"""Checkpoint files of every layout, the models to load them into, and what a load must do or leave alone."""

import dataclasses
import re
from functools import partial

import safetensors.torch
import timm
import torch
from helpers import randomize_bn
from timm.layers import GroupNormAct, StdConv2d
from timm.models.byobnet import ByoBlockCfg, ByobNet, RepVggBlock, model_cfgs
from timm.models.resnetv2 import ResNetV2


def tiny_repvgg(variant="repvgg_a0", seed=0, **kwargs):
    """A RepVGG of a few thousand parameters: grouped blocks, identity branches, and for d2se squeeze-excite."""
    blocks = tuple(ByoBlockCfg(type="rep", d=2, c=c, s=2, gs=16 if c > 32 else 0) for c in (16, 32, 64, 64))
    cfg = dataclasses.replace(model_cfgs[variant], blocks=blocks, stem_chs=16)
    torch.manual_seed(seed)
    return randomize_bn(ByobNet(cfg, **{"num_classes": 7, **kwargs}), seed).eval()


def tiny_bit(seed=0):
    torch.manual_seed(seed)
    norm = partial(GroupNormAct, num_groups=4)
    widths = {"layers": (1, 2, 1, 1), "channels": (16, 32, 64, 128), "stem_chs": 8, "num_classes": 5}
    model = ResNetV2(**widths, stem_type="fixed", conv_layer=StdConv2d, norm_layer=norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def regnet(name="regnetx_002", seed=0, **kwargs):
    torch.manual_seed(seed)
    return randomize_bn(timm.create_model(name, **kwargs), seed).eval()


# The layouts


def original_keys(state):
    """timm's RepVGG keys renamed to those of the original repository."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^stages\.(\d+)\.", lambda m: f"stage{int(m[1]) + 1}.", key)
        key = re.sub(r"^stem\.", "stage0.", key)
        key = key.replace("conv_kxk.", "rbr_dense.").replace("reparam_conv.", "rbr_reparam.")
        key = key.replace("conv_1x1.", "rbr_1x1.").replace("identity.", "rbr_identity.")
        key = key.replace("attn.fc1.", "se.down.").replace("attn.fc2.", "se.up.").replace("head.fc.", "linear.")
        renamed[key] = value
    return renamed


def seer_checkpoint(state):
    """timm's RegNetY keys renamed and wrapped as VISSL saves a finetuned SEER model."""
    trunk = {}
    for key, value in state.items():
        if key.startswith("head."):
            continue
        key = key.replace("stem.conv.", "_feature_blocks.conv1.stem.0.")
        key = key.replace("stem.bn.", "_feature_blocks.conv1.stem.1.")
        key = re.sub(r"^s(\d)\.b(\d+)\.", lambda m: f"_feature_blocks.res{m[1]}.block{m[1]}-{int(m[2]) - 1}.", key)
        key = key.replace("downsample.conv.", "proj.").replace("downsample.bn.", "bn.")
        key = key.replace("conv1.conv.", "f.a.0.").replace("conv1.bn.", "f.a.1.")
        key = key.replace("conv2.conv.", "f.b.0.").replace("conv2.bn.", "f.b.1.")
        key = key.replace("conv3.conv.", "f.c.").replace("conv3.bn.", "f.final_bn.")
        key = key.replace("se.fc1.", "f.se.excitation.0.").replace("se.fc2.", "f.se.excitation.2.")
        trunk[key] = value
    heads = {f"0.clf.0.{kind}": state[f"head.fc.{kind}"] for kind in ("weight", "bias")}
    heads["projection_head.0.weight"] = torch.ones(3)
    return {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}}, "phase_idx": 4}


def bit_archive(model):
    """The arrays of an original BiT file with this model's values."""

    def hwio(conv):
        return conv.weight.detach().permute(2, 3, 1, 0).numpy()

    arrays = {"resnet/root_block/standardized_conv2d/kernel": hwio(model.stem.conv)}
    arrays["resnet/head/conv2d/kernel"] = hwio(model.head.fc)
    arrays["resnet/head/conv2d/bias"] = model.head.fc.bias.detach().numpy()
    norms = {"resnet/": model.norm}
    for i, stage in enumerate(model.stages, 1):
        for j, block in enumerate(stage.blocks, 1):
            unit = f"resnet/block{i}/unit{j:02d}/"
            for letter, conv, norm in zip("abc", (1, 2, 3), (1, 2, 3), strict=True):
                arrays[f"{unit}{letter}/standardized_conv2d/kernel"] = hwio(getattr(block, f"conv{conv}"))
                norms[f"{unit}{letter}/"] = getattr(block, f"norm{norm}")
            if block.downsample is not None:
                arrays[f"{unit}a/proj/standardized_conv2d/kernel"] = hwio(block.downsample.conv)
    for prefix, norm in norms.items():
        arrays[f"{prefix}group_norm/gamma"] = norm.weight.detach().numpy()
        arrays[f"{prefix}group_norm/beta"] = norm.bias.detach().numpy()
    return arrays


# The files


def save(path, content):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def write_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


FORMATS = {
    "model.safetensors": safetensors.torch.save_file,
    "model.pth": torch.save,
    "model.pt": write_legacy,
    "model.pth.tar": torch.save,
    "model.bin": safetensors.torch.save_file,  # the extension lies, here and below
    "torch.safetensors": torch.save,
    "legacy.safetensors": write_legacy,
}


# The models


@torch.no_grad()
def output(model, in_chans=3):
    generator = torch.Generator().manual_seed(0)
    return model(torch.randn(2, in_chans, 64, 64, generator=generator))


def snapshot(model):
    """Everything that a failed load may not change: values, modules, their attributes, and gradients' flags."""
    values = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {name: (module, sorted(vars(module)), list(module._modules)) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return values, modules, parameters


def assert_unchanged(model, before):
    values, modules, parameters = snapshot(model)
    assert list(values) == list(before[0])
    assert all(torch.equal(values[key], before[0][key]) for key in values)
    assert modules == before[1]
    assert parameters == before[2]


def assert_equal_states(model, state):
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def is_deployed(model):
    blocks = [m for m in model.modules() if isinstance(m, RepVggBlock)]
    forms = {block.reparam_conv is not None for block in blocks}
    assert len(forms) == 1
    return forms.pop()
