"""Modules that were changed, listened to, traced, patched, or whose exact class matters (F7, F11, W1, C-B to C-F)."""

import collections
import copy
import functools

import pytest
import timm
import torch
from beside import (
    FEW,
    MAKE,
    NAMES,
    SMALL,
    evaluated,
    gradients,
    images,
    moved,
    outcome,
    quiet,
    same,
    same_outcome,
    twins,
)
from timm.layers import SelectAdaptivePool2d
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import regnet_fast
from regnet_fast.blocks.chain import Chain
from regnet_fast.blocks.fused import Fused

pytestmark = pytest.mark.usefixtures("one_thread")

each_of_few = pytest.mark.parametrize("name", FEW)
each_name = pytest.mark.parametrize("name", NAMES)


# Changed heads, and other children of a block


class GeM(nn.Module):
    """A pool that somebody wrote: no attribute of timm's."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class Pretender(SelectAdaptivePool2d):
    """A pool derived from timm's that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


def the_pool_replaced(pool):
    def change(model):
        model.head.global_pool = pool()

    return change


def the_inner_pool_replaced(pool):
    def change(model):
        model.head.global_pool.pool = pool()

    return change


def conv_head(model):
    fc = model.head.fc
    conv = nn.Conv2d(fc.in_features, fc.out_features, 1)
    with torch.no_grad():
        conv.weight.copy_(fc.weight[:, :, None, None])
    model.head.global_pool, model.head.fc = nn.AdaptiveAvgPool2d(1), conv
    model.head.flatten = nn.Flatten(1)


def sets(path, value):
    def change(model):
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, value() if callable(value) else value)

    return change


HEADS = {
    "AdaptiveAvgPool2d and flatten": the_pool_replaced(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))),
    "AdaptiveAvgPool2d": the_pool_replaced(lambda: nn.AdaptiveAvgPool2d(1)),
    "AdaptiveAvgPool2d and a convolution": conv_head,
    "GeM": the_pool_replaced(GeM),
    "derived pool": the_pool_replaced(lambda: Pretender(pool_type="avg", flatten=True)),
    "Identity as pool": the_pool_replaced(nn.Identity),
    "maximum": the_pool_replaced(lambda: SelectAdaptivePool2d(pool_type="max", flatten=True)),
    "both": the_pool_replaced(lambda: SelectAdaptivePool2d(pool_type="avgmax", flatten=True)),
    "size 2": the_pool_replaced(lambda: SelectAdaptivePool2d(output_size=2, pool_type="avg", flatten=True)),
    "size 2, maximum": the_pool_replaced(lambda: SelectAdaptivePool2d(output_size=2, pool_type="max", flatten=True)),
    "inner maximum": the_inner_pool_replaced(lambda: nn.AdaptiveMaxPool2d(1)),
    "inner average of size 2": the_inner_pool_replaced(lambda: nn.AdaptiveAvgPool2d(2)),
    "inner LPPool": the_inner_pool_replaced(lambda: nn.LPPool2d(2, 2)),
    "inner Identity": the_inner_pool_replaced(nn.Identity),
    "no flatten in the pool": sets("head.global_pool.flatten", nn.Identity),
    "another flatten of the head": sets("head.flatten", lambda: nn.Flatten(0)),
    "sigmoid as drop": sets("head.drop", nn.Sigmoid),
    "dropout of features": sets("head.drop", lambda: nn.Dropout2d(0.5).eval()),
    "a function as drop": sets("head.drop", lambda: nn.Dropout(0.5).train()),
    "no classifier": sets("head.fc", nn.Identity),
    "a deeper classifier": lambda m: setattr(
        m.head, "fc", nn.Sequential(m.head.fc, nn.SiLU(), nn.Linear(m.num_classes, 3))
    ),
    "a normed classifier": lambda m: setattr(m.head, "fc", nn.Sequential(nn.LayerNorm(m.num_features), m.head.fc)),
    "no bias": lambda m: setattr(m.head.fc, "bias", None),
    "reset to the maximum": lambda m: m.reset_classifier(3, "max"),
    "reset to no pool": lambda m: m.reset_classifier(0, ""),
    "the whole head": lambda m: setattr(m, "head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))),
}


@pytest.mark.parametrize("first", [True, False], ids=["after a call", "before any call"])
@pytest.mark.parametrize("head", HEADS)
def test_changed_heads(head, first):
    models, x = twins("regnet_y"), images()
    if first:
        same(*(evaluated(model, x) for model in models))
    for model in models:
        torch.manual_seed(0)
        HEADS[head](model)
    same_outcome(*(functools.partial(evaluated, model, x) for model in models))
    for model in models:
        model.train()
    same_outcome(*(functools.partial(model, x) for model in models))


def deletes(path):
    def change(model):
        parent, _, key = path.rpartition(".")
        delattr(model.get_submodule(parent), key)

    return change


class OtherAttention(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


BLOCK_CHANGES = {
    "another gate": sets("s2.b1.se.gate", nn.Hardsigmoid),
    "a maximum in the squeeze": sets("s2.b1.se.add_maxpool", True),
    "a norm in the squeeze": sets("s2.b1.se.bn", lambda: nn.GroupNorm(1, 6)),
    "no activation in the squeeze": sets("s2.b1.se.act", nn.Identity),
    "other attention": sets("s2.b1.se", OtherAttention),
    "no attention": sets("s2.b1.se", nn.Identity),
    "attention without a gate": deletes("s2.b1.se.gate"),
    "no norm": sets("s2.b1.conv1.bn", nn.Identity),
    "another norm": lambda m: setattr(m.s2.b1.conv1, "bn", nn.GroupNorm(1, m.s2.b1.conv1.conv.out_channels)),
    "InstanceNorm": lambda m: setattr(
        m.s2.b1.conv1, "bn", nn.InstanceNorm2d(m.s2.b1.conv1.conv.out_channels, track_running_stats=True)
    ),
    "BatchNorm of torch": lambda m: setattr(
        m.s2.b1.conv1, "bn", nn.BatchNorm2d(m.s2.b1.conv1.conv.out_channels).eval()
    ),
    "a norm without its activation": deletes("s2.b1.conv1.bn.act"),
    "a norm without its drop": deletes("s2.b1.conv1.bn.drop"),
    "a norm with another drop": sets("s2.b1.conv1.bn.drop", nn.Tanh),
    "a norm with an activation": sets("s2.b1.conv1.bn.act", nn.LeakyReLU),
    "the last activation": sets("s2.b1.act3", nn.Tanh),
    "no convolution": sets("s2.b1.conv1", nn.Identity),
    "a convolution that pads by itself": sets("s2.b1.conv2.conv.padding", "same"),
    "no statistics": lambda m: (
        setattr(m.s2.b1.conv1.bn, "running_mean", None),
        setattr(m.s2.b1.conv1.bn, "running_var", None),
    ),
    "a momentum of None": sets("s2.b1.conv1.bn.momentum", None),
    "an affine norm without affine": lambda m: (
        setattr(m.s2.b1.conv1.bn, "weight", None),
        setattr(m.s2.b1.conv1.bn, "bias", None),
    ),
    "a lazy convolution": lambda m: setattr(
        m.s2.b1.conv1, "conv", nn.LazyConv2d(m.s2.b1.conv1.conv.out_channels, 1, bias=False)
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("change", BLOCK_CHANGES)
def test_changed_blocks(change, training):
    models, x = twins("regnet_y"), images()
    same(*(evaluated(model, x) for model in models))
    for model in models:
        model.train(training)
        torch.manual_seed(0)
        BLOCK_CHANGES[change](model)

    def run(model):
        y = model(x)
        y.square().mean().backward()
        return y.detach(), gradients(model), dict(model.named_buffers())

    same_outcome(*(functools.partial(run, model) for model in models))
    same_outcome(*(functools.partial(evaluated, model, x) for model in models))


# restore


def types(model):
    return [type(m) for m in model.modules()]


class Mine:
    """What a user puts before the class of a module."""


def on_top(path):
    def change(model):
        module = model.get_submodule(path)
        module.__class__ = type("Changed", (Mine, type(module)), {})

    return change


RESTORED = {
    "weight_norm of the stem": ("resnetv2_18", lambda m: parametrizations.weight_norm(m.stem.conv)),
    "orthogonal stem": ("resnetv2_18", lambda m: parametrizations.orthogonal(m.stem.conv)),
    "weight_norm of a convolution": ("regnet_y", lambda m: parametrizations.weight_norm(m.s2.b1.conv1.conv)),
    "parametrised norm": (
        "resnet_v2",
        lambda m: parametrize.register_parametrization(m.norm, "weight", nn.Softplus()),
    ),
    "parametrised classifier": ("regnet_y", lambda m: parametrizations.spectral_norm(m.head.fc)),
    "a class on top of a block": ("regnet_y", on_top("s2.b1")),
    "a class on top of a stage": ("regnet_y", on_top("s2")),
    "a class on top of the last one": ("repvgg", on_top("head")),
}


@pytest.mark.parametrize("case", RESTORED)
def test_restore_is_all_or_nothing(case):
    """Either the model has timm's classes again, below what somebody put on top, or an error left it as it was."""
    name, change = RESTORED[case]
    models, x = twins(name), images()
    for model in models:
        torch.manual_seed(0)
        evaluated(model, x)
        change(model)
    ours, theirs = models
    before = types(ours)
    try:
        regnet_fast.restore(ours)
    except Exception as error:
        assert isinstance(error, (TypeError, ValueError, RuntimeError)) and str(error), error
        assert types(ours) == before
    else:
        assert not any(isinstance(m, (Fused, Chain)) for m in ours.modules())
        assert len(types(ours)) == len(before)
    same(evaluated(ours, x), evaluated(theirs, x))


# timm's functions by their own names


@pytest.mark.parametrize("name", [*NAMES, "regnetz_005", "resnetv2_18d", "repvgg_a1"])
def test_functions_of_models_rebuild(name):
    ours = getattr(regnet_fast.models, name)(num_classes=3)
    by_entrypoint = regnet_fast.models.model_entrypoint(name)(num_classes=3)
    assert any(isinstance(m, Fused) for m in by_entrypoint.modules())
    assert types(ours) == types(by_entrypoint)
    scope = {}
    exec(f"from regnet_fast.models import {name}", scope)
    assert types(scope[name](num_classes=3)) == types(by_entrypoint)


def test_functions_of_models_without_a_known_block_make_timms():
    assert types(regnet_fast.models.vit_tiny_patch16_224()) == types(timm.models.vit_tiny_patch16_224())
    assert types(regnet_fast.models.resnet10t()) != types(timm.models.resnet10t())


# Hooks, counters and modes


REGISTER = {
    "pre": lambda heard: module_hooks.register_module_forward_pre_hook(lambda m, i: heard.append(id(m))),
    "forward": lambda heard: module_hooks.register_module_forward_hook(lambda m, i, o: heard.append(id(m))),
    "backward": lambda heard: module_hooks.register_module_full_backward_hook(lambda m, i, o: heard.append(id(m))),
    "backward pre": lambda heard: module_hooks.register_module_full_backward_pre_hook(lambda m, o: heard.append(id(m))),
}


LISTENED = [
    (name, hook, how)
    for name in (*SMALL, *NAMES)
    for hook in REGISTER
    for how in ("no_grad", "evaluation", "training")
    if (how == "no_grad") <= ("backward" not in hook) and (name in FEW or (hook, how) == ("forward", "no_grad"))
    if name != "repvgg" or "backward" not in hook  # timm's own sum in place is refused by torch there
]


@pytest.mark.parametrize(("name", "hook", "how"), LISTENED)
def test_global_hooks_hear_every_module(name, hook, how):
    results, x = [], images()
    for model in twins(name):
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # torch's backward hooks allow no other
        evaluated(model, x)
        model.train(how == "training")
        paths = {id(m): path for path, m in model.named_modules()}
        heard = []
        handle = REGISTER[hook](heard)
        try:
            with torch.set_grad_enabled(how != "no_grad"):
                y = quiet(model, x)
                if how != "no_grad":
                    y.sum().backward()
        finally:
            handle.remove()
        results.append((y.detach(), [paths[one] for one in heard]))
        evaluated(model.eval(), x)
    assert len(results[1][1]) > 20
    same(*results)


@pytest.mark.parametrize("late", [False, True], ids=["before any call", "after a call"])
@each_name
def test_hooks_on_every_module(name, late):
    """As probes, profilers and summaries register them; the same calls in the same order, and their removal."""
    results, x = [], images()
    for model in twins(name):
        if late:
            evaluated(model, x)
        heard = []
        handles = [
            m.register_forward_hook(lambda m, i, o, path=path, heard=heard: heard.append((path, tuple(o.shape))))
            for path, m in model.named_modules()
        ]
        found = [evaluated(model, x)]
        for handle in handles:
            handle.remove()
        found.append(evaluated(model, x))
        results.append((found, heard))
    same(*results)


@pytest.mark.parametrize("how", ["no_grad", "evaluation", "training"])
@each_name
def test_flop_counter(name, how):
    """The totals of every module, forward and backward."""
    results, x = [], images()
    for model in twins(name):
        evaluated(model, x)
        model.train(how == "training")
        with torch.set_grad_enabled(how != "no_grad"), FlopCounterMode(display=False) as counter:
            y = quiet(model, x)
            if how != "no_grad":
                y.sum().backward()
        rows = {path: {str(op): n for op, n in row.items()} for path, row in counter.get_flop_counts().items()}
        results.append((counter.get_total_flops(), rows))
    same(*results)


class Counts(TorchFunctionMode):
    """Counts calls of torch's functions, and changes what convolutions give."""

    COUNTED = (F.conv2d, F.batch_norm, F.linear)

    def __init__(self, double):
        self.calls, self.double = collections.Counter(), double

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.COUNTED:
            self.calls[function.__name__] += 1
        y = function(*args, **(kwargs or {}))
        return y * 1.2 if self.double and function is F.conv2d else y


@pytest.mark.parametrize("how", ["no_grad", "evaluation", "training"])
@pytest.mark.parametrize("double", [False, True])
@each_of_few
def test_function_modes(name, double, how):
    results, x = [], images()
    for model in twins(name):
        evaluated(model, x)
        model.train(how == "training")
        with torch.set_grad_enabled(how != "no_grad"), Counts(double) as counts:
            y = quiet(model, x)
        results.append((y.detach(), counts.calls))
        evaluated(model.eval(), x)
    assert results[1][1]["conv2d"] > 3
    same(*results)


def test_a_default_device_is_no_reason_to_lose_speed():
    """`with torch.device("cpu")` is a mode too, with which timm's numbers must come out."""
    models, x = twins("regnet_y"), images()
    results = []
    for model in models:
        with torch.device("cpu"):
            found = [evaluated(model, x)]
            y = quiet(model.train(), x)
            y.sum().backward()
        results.append((found, y.detach(), gradients(model)))
    same(*results)


# Patched instances


def scaled(method):
    def patched(*args, **kwargs):
        return method(*args, **kwargs) * 1.1

    return patched


def patch_conv_forward(model):
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv._conv_forward = scaled(conv._conv_forward)


def patch_forward(model):
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.forward = scaled(conv.forward)


def patch_norms(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.forward = scaled(norm.forward)


def patch_blocks(model):
    for child in model.children():
        child.forward = scaled(child.forward)
        for block in child.children():
            block.forward = scaled(block.forward)


def patch_activations(model):
    for act in (m for m in model.modules() if isinstance(m, nn.SiLU)):
        act.forward = scaled(act.forward)


def patch_the_class_of_one(model):
    """Everything keeps its instance; one convolution gets a class of its own."""
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    kind = type(conv)
    conv.__class__ = type("Doubled", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})


PATCHES = (patch_conv_forward, patch_forward, patch_norms, patch_blocks, patch_activations, patch_the_class_of_one)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda f: f.__name__)
@each_of_few
def test_patched_instances(name, patch, training):
    models, x = twins(name), images()
    before = evaluated(models[1], x)
    same(evaluated(models[0], x), before)
    results = []
    for model in models:
        patch(model)
        model.train(training)
        y = quiet(model, x)
        y.square().mean().backward()
        results.append((y.detach(), gradients(model), evaluated(model.eval(), x)))
    moved(before, results[1][2])
    same(*results)


# Tracing


@pytest.mark.long
@pytest.mark.parametrize("how", ["evaluation", "no_grad", "after a gradient", "of a stage"])
@each_of_few
def test_jit_trace_with_default_settings(name, how):
    results = []
    for model in twins(name):
        x = torch.ones(2, 3, 32, 32).cumsum(3).cos()
        if how == "after a gradient":
            quiet(model, x).sum().backward()
        if how == "of a stage":
            path = next(p for p in ("s1", "stages.0") if p.split(".")[0] in dict(model.named_children()))
            heard = []
            with model.get_submodule(path).register_forward_pre_hook(lambda m, i, heard=heard: heard.append(i[0])):
                evaluated(model, x)
            model, x = model.get_submodule(path), heard[0].clone()
        with torch.set_grad_enabled(how != "no_grad"):
            traced = quiet(torch.jit.trace, model, x)
        results.append([evaluated(traced, x + 1), evaluated(model, x + 1)])
    same(*results)


# Exact classes


@pytest.mark.parametrize("name", [*NAMES, *MAKE, "regnetv_040", "regnetz_005", "resnetv2_18d", "resnetv2_50x1_bit"])
def test_layers_keep_their_exact_class(name):
    """Tools look up what they know by `type(module)`."""
    if name in (*NAMES, *MAKE):
        ours, theirs = twins(name)
    else:
        with torch.device("meta"):
            theirs = timm.create_model(name)
        ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    changed = []
    for (path, module), twin in zip(ours.named_modules(), theirs.modules(), strict=True):
        layer = not list(twin.children()) or isinstance(twin, (nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase))
        if layer and type(module) is not type(twin):
            changed.append(f"{path}: {type(module)}, timm's {type(twin)}")
    assert not changed, changed
    assert any(isinstance(m, Fused) for m in ours.modules())


def test_features_only_keeps_exact_classes():
    theirs = timm.create_model("resnetv2_18", features_only=True)
    ours = regnet_fast.rebuild(copy.deepcopy(theirs)).model
    for (path, module), twin in zip(ours.named_modules(), theirs.modules(), strict=True):
        if isinstance(twin, (nn.Conv2d, nn.BatchNorm2d)):
            assert type(module) is type(twin), path


# Subclasses of Tensor


class Strict(torch.Tensor):
    """A weight that may be computed with, and not looked into."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data.detach(), data.requires_grad)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        owner = getattr(getattr(function, "__self__", None), "__name__", "")
        if name in ("data_ptr", "is_inference", "untyped_storage") or owner == "_version":
            raise NotImplementedError(f"Strict has no {name or owner}")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", ["attribute", "functional_call"])
@each_of_few
def test_subclasses_are_not_touched(name, kind, training):
    results, x = [], images()
    for model in twins(name):
        evaluated(model, x)
        model.train(training)
        weights = {n: Strict(p.detach() * 1.5) for n, p in model.named_parameters() if p.ndim == 4}
        if kind == "functional_call":
            y = quiet(torch.func.functional_call, model, weights, (x,))
        else:
            for path, weight in weights.items():
                owner, _, key = path.rpartition(".")
                model.get_submodule(owner)._parameters[key] = weight
            y = quiet(model, x)
        results.append(y.detach().as_subclass(torch.Tensor))
    same(*results)


def test_gradients_of_each_image_by_expanded_weights():
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    results, x = [], images(3, 32)
    for model in twins("resnet_v2_gn"):
        evaluated(model, x)

        def run(model=model):
            quiet(call_for_per_sample_grads(model), x).sum().backward()
            return {n: p.grad_sample for n, p in model.named_parameters() if hasattr(p, "grad_sample")}

        results.append(outcome(run))
    same(*results)
    assert not isinstance(results[1], type), results[1]
    assert results[1]


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    x = images()
    results = []
    for model in twins("regnet_y"):
        evaluated(model, x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            found = [tuple(quiet(model, mode.from_tensor(x)).shape)]
        results.append((found, evaluated(model, x)))
    same(*results)
