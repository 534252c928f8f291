"""Blocks in training mode compute what timm's compute: outputs, gradients, running statistics, and every setting."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import timm
import torch
from helpers import reasons
from problems import LAYOUTS, Untouched, assert_rule
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F
from training_blocks import (
    BLOCKS,
    NETWORKS,
    ONE_OF_EACH,
    assert_equal_states,
    network_pair,
    pair_of,
    state_of,
)

from regnet_fast.backends import BackendError, backend
from regnet_fast.backends.passes import parts
from regnet_fast.blocks.fused import FallbackWarning, Fused

pytestmark = pytest.mark.usefixtures("no_silent_fallback", "one_thread")


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """The larger maps go in two or three parts."""
    monkeypatch.setattr(parts, "_PART_BYTES", 4e4)


# Numbers


def step(block, x, dy, autocast=None):
    """The output, all gradients and all buffers after one step, by name."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = block(x)
    y.backward(dy.to(y.dtype))
    assert all(p.grad is not None for p in block.parameters())
    return {"y": y.detach(), "gradient of x": x.grad} | state_of(block)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_in_float64(name, act, in_float64):
    ours, theirs = (block.double() for block in pair_of(name, act))
    x = torch.randn(5, BLOCKS[name][0], 9, 7).double()
    dy = torch.randn_like(copy.deepcopy(theirs)(x))
    assert reasons(copy.deepcopy(ours), x) == {None}
    assert_equal_states(step(ours, x, dy), step(theirs, x, dy), 1e-12)


class Kinks:
    """How near the ReLUs of a block came to their kinks, where a rounding error changes a gradient by all of it."""

    def __init__(self, block):
        self.nearest = torch.inf
        for module in block.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_pre_hook(self.see)

    def see(self, module, args):
        self.nearest = min(self.nearest, args[0].abs().min().item())


def problem(theirs, channels):
    """Images and an output gradient that keep float64 away from every kink."""
    while True:
        exact = copy.deepcopy(theirs).double()
        kinks = Kinks(exact)
        x = torch.randn(5, channels, 9, 7).contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(exact(x.double())).float()
        if kinks.nearest > 3e-6:
            return x, dy


def judge(name, act, autocast, draws):
    ours, theirs = pair_of(name, act)
    samples, before = {}, copy.deepcopy(theirs.state_dict())
    for _ in range(draws):
        x, dy = problem(theirs, BLOCKS[name][0])
        if autocast is not None:
            x = x.to(autocast)
        exact = copy.deepcopy(theirs).double()
        found = [step(ours, x, dy, autocast), step(theirs, x, dy, autocast), step(exact, x.double(), dy.double())]
        for block in (ours, theirs):
            block.load_state_dict(before)
        for key, reference in found[2].items():
            if reference.is_floating_point():
                samples.setdefault(key, []).append((found[0][key], found[1][key], reference))
            else:
                assert found[0][key] == found[1][key] == reference == 1, key
    for key, sample in samples.items():
        assert_rule(f"{name}: {key}", sample)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_in_float32(name):
    """Every result is held to timm's errors against float64."""
    judge(name, nn.ReLU, None, 12)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_autocast_to_bfloat16(name):
    """With SiLU: on which side of ReLU's kink a rounded value falls is chance."""
    judge(name, nn.SiLU, torch.bfloat16, 16)


@pytest.mark.parametrize("name", ["stem", "Bottleneck of width 8", "PreActBottleneck, strided", "RepVggBlock"])
def test_autocast_to_float16(name):
    judge(name, nn.SiLU, torch.float16, 8)


# Whole steps of small networks, where nothing but the order of additions may differ


def run(model, x, seed=0, times=1):
    """The output, gradients and buffers after `times` steps without an update."""
    for _ in range(times):
        torch.manual_seed(seed)
        y = model(x)
        loss = F.cross_entropy(y, torch.arange(len(y)) % y.shape[1])
        loss.backward()
    return {"y": y.detach(), "loss": loss.detach()} | state_of(model)


def images(n=6, size=64):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def assert_same_step(ours, theirs, x=None, **options):
    x = images() if x is None else x
    assert_equal_states(run(ours, x, **options), run(theirs, x, **options))


each_network = pytest.mark.parametrize("name", NETWORKS)


def in_double(name="regnet_y", **options):
    return tuple(model.double() for model in network_pair(name, **options))


@each_network
def test_networks(name, in_float64):
    ours, theirs = in_double(name)
    assert reasons(copy.deepcopy(ours), images()) == {None}
    assert_same_step(ours, theirs)


@each_network
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_images(name, layout, in_float64):
    ours, theirs = in_double(name)
    x = LAYOUTS[layout](images())
    with Untouched(x):
        found = run(ours, x)
    assert_equal_states(found, run(theirs, x))


@each_network
def test_the_gradient_of_the_images(name, in_float64):
    ours, theirs = in_double(name)
    x = [images().requires_grad_()]
    x.append(x[0].detach().clone().requires_grad_())
    assert_same_step(ours, theirs, None)
    for model, image in zip((ours, theirs), x, strict=True):
        model(image).square().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-10, atol=1e-10)


# Settings of the norms


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def each_norm(change):
    def apply(model):
        for norm in norms(model):
            change(norm)

    return apply


def without_statistics(model):
    for norm in norms(model)[1::2]:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def no_longer_tracked(norm):
    norm.track_running_stats = False


def without_counter(norm):
    norm.num_batches_tracked = None


def without_weight_and_bias(norm):
    norm.weight = norm.bias = None


def without_bias(norm):
    norm.bias = None


def in_evaluation(model, every=1):
    """But not the final norm of ResNetV2, a block by itself, whose evaluation is float32 at most."""
    for norm in [norm for norm in norms(model) if norm is not getattr(model, "norm", None)][::every]:
        norm.eval()


def some_zeroed(model):
    for module in model.modules():
        if hasattr(module, "zero_init_last"):
            module.zero_init_last()


SETTINGS = {
    "momentum None": each_norm(lambda norm: setattr(norm, "momentum", None)),
    "momentum 0": each_norm(lambda norm: setattr(norm, "momentum", 0.0)),
    "momentum 1": each_norm(lambda norm: setattr(norm, "momentum", 1.0)),
    "without statistics": without_statistics,
    "statistics no longer tracked": each_norm(no_longer_tracked),
    "without a counter": each_norm(without_counter),
    "without weight and bias": each_norm(without_weight_and_bias),
    "without bias": each_norm(without_bias),
    "epsilon": each_norm(lambda norm: setattr(norm, "eps", 0.3)),
    "all in evaluation": in_evaluation,
    "some in evaluation": partial(in_evaluation, every=3),
    "frozen": freeze_batch_norm_2d,
    "last norms zeroed": some_zeroed,
}


@each_network
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_norms(name, setting, in_float64):
    ours, theirs = in_double(name)
    for model in (ours, theirs):
        SETTINGS[setting](model)
    with warnings.catch_warnings():
        if setting == "without statistics":  # such blocks are left to timm
            warnings.simplefilter("ignore", FallbackWarning)
        else:
            assert reasons(copy.deepcopy(ours), images()) == {None}
        assert_same_step(ours, theirs, times=2)


@each_network
def test_fixed_norms_in_bfloat16_models(name):
    """A model in bfloat16 throughout, norms too, with fixed and with batch statistics."""
    for fixed in (True, False):
        ours, theirs = (model.bfloat16() for model in network_pair(name))
        for model in (ours, theirs):
            for norm in norms(model):
                norm.train(not fixed)
        exact = copy.deepcopy(theirs).double()
        x = images(8).bfloat16()
        assert reasons(copy.deepcopy(ours), x) == {None}
        found, eager, reference = run(ours, x), run(theirs, x), run(exact, x.double())
        assert found.keys() == eager.keys()
        for key, value in reference.items():
            if value is not None and value.is_floating_point():
                assert found[key].dtype == eager[key].dtype, key

        def error(results, reference=reference):
            parts = [(k, v) for k, v in reference.items() if k.startswith("gradient") and v is not None and v.any()]
            return sum(((results[k] - v).norm() / v.norm()).square() for k, v in parts) ** 0.5

        assert error(found) <= 2 * error(eager)


# Stochastic depth and dropout


@each_network
def test_drop_path_takes_timms_random_numbers(name, in_float64):
    ours, theirs = in_double(name, drop_path_rate=0.6, drop_rate=0.2)
    x = images(8)
    for seed in (1, 2):
        assert_same_step(ours, theirs, x, seed=seed)
        states = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            model(x)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
    first, second = (run(copy.deepcopy(ours), x, seed=seed)["y"] for seed in (1, 2))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Bottleneck of width 8", "BottleneckBlock", "PreBottleneck", "PreActBasic"])
@pytest.mark.parametrize("probability", [0.5, 1.0])
@pytest.mark.parametrize("scale", [True, False])
def test_drop_path_of_a_block(name, probability, scale, in_float64):
    ours, theirs = (block.double() for block in pair_of(name))
    x = torch.randn(7, BLOCKS[name][0], 5, 5).double()
    results = []
    for block in (ours, theirs):
        block.drop_path = timm.layers.DropPath(probability, scale).train()
        torch.manual_seed(3)
        results.append(step(block, x, torch.ones(()).double().expand(7, 48, 5, 5)))
    assert_equal_states(*results)


# What requires a gradient


@each_network
def test_some_parameters_alone(name, in_float64):
    def keep(choice):
        ours, theirs = in_double(name)
        for model in (ours, theirs):
            for i, (path, parameter) in enumerate(model.named_parameters()):
                parameter.requires_grad_(choice(i, path, parameter))
        x = images()
        found, expected = run(ours, x), run(theirs, x)
        assert any(v is None for k, v in found.items() if k.startswith("gradient"))
        assert_equal_states(found, expected)

    keep(lambda i, path, p: i % 3 == 0)
    keep(lambda i, path, p: i % 3 == 1)
    keep(lambda i, path, p: p.ndim == 1)  # norms alone
    keep(lambda i, path, p: p.ndim == 4)
    keep(lambda i, path, p: path.startswith(("head", "fc")))
    keep(lambda i, path, p: not path.startswith(("stem", "s1.", "stages.0")))


@each_network
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, mode, in_float64):
    ours, theirs = in_double(name)
    x = images()
    with mode():
        a, b = ours(x), theirs(x)
    assert not a.requires_grad
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert_same_step(ours, theirs, x)


@each_network
def test_gradients_accumulate(name, in_float64):
    ours, theirs = in_double(name)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        first, second = images(4), images(3)
        a, b = model(first).square().sum(), model(second).square().sum()
        (a / 2).backward()
        b.backward()
        results.append(state_of(model))
    assert_equal_states(*results)


@each_network
def test_a_graph_can_be_run_twice(name, in_float64):
    ours, _ = in_double(name)
    loss = ours(images()).square().sum()
    parameters = list(ours.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_network
def test_a_second_derivative_is_an_error(name):
    ours, _ = network_pair(name)
    x = images().float().requires_grad_()
    for loss in (torch.Tensor.sum, lambda y: y.square().sum()):  # of the first, torch's own check sees nothing
        with pytest.raises(RuntimeError, match="the gradient of a gradient"):
            torch.autograd.grad(loss(ours(x)), x, create_graph=True)


@each_network
def test_batched_gradients_are_an_error(name):
    ours, _ = network_pair(name)
    x = images().float().requires_grad_()
    y = ours(x)
    with pytest.raises(RuntimeError, match="many gradients at once"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)


@each_network
def test_a_weight_changed_before_backward_is_an_error(name):
    for which in (nn.Conv2d, nn.BatchNorm2d):
        ours, _ = network_pair(name)
        loss = ours(images().float()).square().sum()
        weight = [m for m in ours.modules() if isinstance(m, which)][2].weight
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Checkpointing, and other places to keep what backward needs


@each_network
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(name, reentrant, in_float64, monkeypatch):
    """Also the running statistics, which computing again brings in again."""
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    ours, theirs = in_double(name, drop_path_rate=0.3)
    for model in (ours, theirs):
        model.set_grad_checkpointing()
    assert_same_step(ours, theirs, times=2)


def test_checkpointed_gradients_are_those_of_the_whole(in_float64):
    ours, _ = in_double("regnet_y")
    checkpointed = copy.deepcopy(ours)
    checkpointed.set_grad_checkpointing()
    x = images()
    found, expected = run(checkpointed, x), run(ours, x)
    keys = [k for k in expected if k.startswith(("gradient", "loss"))]
    assert_equal_states({k: found[k] for k in keys}, {k: expected[k] for k in keys})


@each_network
def test_what_is_saved_may_be_moved(name, in_float64):
    ours, theirs = in_double(name)
    x = images()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        found = run(ours, x)
    assert_equal_states(found, run(theirs, x))


# Low precision in whole networks


@each_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaled_losses(name, dtype):
    """Gradients by norm against float64, and infinite ones where the scale is too large."""
    ours, theirs = network_pair(name)
    exact = copy.deepcopy(theirs).double()
    x = images(16).float()
    run(exact, x.double())
    errors = []
    for model in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with torch.autocast("cpu", dtype):
            y = model(x)
            loss = F.cross_entropy(y, torch.arange(16) % 5)
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), exact.parameters(), strict=True) if b.grad.any()]
        found = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
        errors.append(found.square().mean().sqrt())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert errors[0] <= 2 * errors[1]
    if dtype == torch.float16:
        ours.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = ours(x).float().square().sum()
        (loss * 1e8).backward()
        assert not all(p.grad.isfinite().all() for p in ours.parameters())


def test_under_autocast_everything_runs_fused():
    for name in NETWORKS:
        ours, _ = network_pair(name)
        with torch.autocast("cpu", torch.bfloat16):
            found = reasons(ours, images().float())
        assert all(reason is None or "adds its torch.float32 input" in reason for reason in found), found


# Values


@each_network
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_timm(name, value):
    ours, theirs = network_pair(name)
    x = images().float()
    x[2, 1, 5, 5] = value
    found, expected = run(ours, x), run(theirs, x)
    for key, b in expected.items():
        if b is not None and b.is_floating_point():
            assert torch.equal(found[key].isnan(), b.isnan()), key


@pytest.mark.parametrize("name", ["stem", "Bottleneck of width 8", "PreActBasic", "RepVggBlock"])
def test_a_channel_of_one_value_is_torchs_error(name):
    messages = []
    for block in pair_of(name):
        with pytest.raises(ValueError) as error:
            block(torch.randn(1, BLOCKS[name][0], 1, 1))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_empty_batches_are_left_to_timm():
    ours, theirs = (model(torch.empty(0, 3, 64, 64)) for model in network_pair())
    assert ours.shape == theirs.shape == (0, 5)


# Hooks


def test_a_hook_inside_a_block_is_called_and_named_once():
    ours, theirs = (model.float() for model in network_pair())
    seen = []
    for model in (ours, theirs):
        model.s1.b1.conv2.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    x = images().float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        results = [run(model, x, times=3) for model in (ours, theirs)]
    assert_equal_states(*results, 1e-4)
    assert len(seen) == 6
    (warning,) = [w for w in caught if issubclass(w.category, FallbackWarning)]
    assert "a hook is registered on conv2" in str(warning.message)


def blocks_by_name(model):
    return [path for path, module in model.named_modules() if isinstance(module, Fused)]


@each_network
def test_gradients_that_are_retained_or_hooked(name, in_float64):
    """Of every block's output, the stem's among them."""
    x, results = images(), []
    ours, theirs = in_double(name)
    paths = blocks_by_name(ours)
    assert len(paths) >= 4
    for model in (ours, theirs):
        kept, seen = {}, {}

        def keep(path, kept=kept, seen=seen):
            def hook(module, inputs, output):
                output.retain_grad()
                output.register_hook(lambda grad: seen.__setitem__(path, grad.clone()))
                kept[path] = output

            return hook

        for path in paths:
            model.get_submodule(path).register_forward_hook(keep(path))
        state = run(model, x)
        retained = {f"retained {path}": t.grad for path, t in kept.items()}
        results.append(state | retained | {f"seen {path}": g for path, g in seen.items()})
        assert kept.keys() == seen.keys() == set(paths)
    assert_equal_states(*results)


@each_network
def test_gradients_of_a_block_that_a_tensor_hook_changes(name, in_float64):
    x, results = images(), []
    ours, theirs = in_double(name)
    for model in (ours, theirs):
        for path in blocks_by_name(ours):
            model.get_submodule(path).register_forward_hook(lambda m, i, o: o.register_hook(lambda g: g * 1.5) and None)
        results.append(run(model, x))
    assert_equal_states(*results)


CHANGES = {
    "in place": lambda y: y.mul_(2.0),
    "in place, some channels": lambda y: y[:, ::2].add_(1.0) is None or y,
    "in place, without a gradient": lambda y: y.detach().mul_(2.0) is None or y,
    "a copy": lambda y: y * 2.0,
    "detached": lambda y: y.detach(),
}


@pytest.mark.parametrize("change", CHANGES)
@each_network
def test_an_output_that_is_changed_before_the_next_block(name, change, in_float64):
    """By a hook, as in-place dropout does. What torch refuses may be refused; nothing is computed wrong."""
    x = images(4)
    ours, theirs = in_double(name)

    def after(model, path, first=lambda y: y):
        model = copy.deepcopy(model)
        model.get_submodule(path).register_forward_hook(lambda module, inputs, y: CHANGES[change](first(y)))
        try:
            return run(model, x)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return None

    for path in blocks_by_name(ours)[:3]:
        found = after(ours, path)
        if found is None:
            assert after(theirs, path) is None, f"{path}: timm takes this"
        else:
            assert_equal_states(found, after(theirs, path, torch.clone))


# A model as an object


def test_copies_and_pickles_train(in_float64):
    ours, theirs = in_double("regnet_y")
    x = images()
    run(ours, x)
    ours.zero_grad(set_to_none=True)
    run(theirs, x)
    theirs.zero_grad(set_to_none=True)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    expected = run(theirs, x)
    for model in copies:
        assert model.training and isinstance(model.s1.b1, Fused)
        assert_equal_states(run(model, x), expected)


def test_other_parameters_for_one_call(in_float64):
    ours, theirs = in_double("regnet_y")
    x, results = images(), []
    for model in (ours, theirs):
        given = {k: (v.detach() * 1.1).requires_grad_() for k, v in theirs.named_parameters()}
        y = torch.func.functional_call(model, given, x)
        results.append(dict(zip(given, torch.autograd.grad(y.square().sum(), list(given.values())), strict=True)))
    assert_equal_states(*results)


def test_training_and_evaluation_in_turn():
    """Evaluation sees the statistics and weights that the last step left."""
    ours, theirs = network_pair()
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (ours, theirs)]
    x, before = images().float(), None
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            run(model.train(), x)
            optimizer.step()
        with torch.no_grad():
            assert reasons(ours.eval(), x) == {None}
            a, b = ours(x), theirs.eval()(x)
        assert (a - b).norm() <= 1e-4 * b.norm()
        assert before is None or (a - before).norm() > 1e-2 * b.norm()
        before = a


def test_modes_that_are_set_by_hand():
    """Without `train()` and `eval()`, which drop the packed weights."""
    ours, theirs = network_pair()
    x = images().float()
    for training in (False, True, False, True, False):
        outputs = []
        for model in (ours, theirs):
            for module in model.modules():
                module.training = training
            if training:
                run(model, x)
            else:
                with torch.no_grad():
                    outputs.append(model(x))
        if not training:
            assert (outputs[0] - outputs[1]).norm() <= 1e-5 * outputs[1].norm()


# Around the operations


@pytest.mark.long
@pytest.mark.parametrize(("name", "compiler"), [("regnet_v", "eager"), ("repvgg", "eager"), ("regnet_y", "aot_eager")])
def test_compiled_steps(name, compiler, in_float64, fresh_compiler):
    ours, theirs = in_double(name)
    x = images(4)
    expected = run(theirs, x)
    compiled = torch.compile(ours, backend=compiler)
    y = compiled(x)
    loss = F.cross_entropy(y, torch.arange(4) % 5)
    loss.backward()
    assert_equal_states({"y": y.detach(), "loss": loss.detach()} | state_of(ours), expected)


def test_forced_backends():
    x = images().float()
    ours, theirs = network_pair()
    with backend("reference"):
        found = run(ours, x)
    expected = run(theirs, x)
    assert all(v is None or torch.equal(found[k], v) for k, v in expected.items())  # timm's own forward
    ours, theirs = network_pair()
    with backend("aten"):
        assert reasons(copy.deepcopy(ours), x) == {None}
        found = run(ours, x)
        assert_equal_states(found, run(network_pair()[0], x), 0.0)
    assert_equal_states(found, run(network_pair()[0], x), 1e-4)  # compiled passes, by themselves
    with backend("triton"), pytest.raises(BackendError, match=r"triton.*training"):
        ours(x)
    ours.s1.b1.conv2.register_forward_hook(lambda m, i, o: None)
    with backend("aten"), pytest.raises(BackendError, match=r"aten.*hook is registered on conv2"):
        ours(x)


@each_network
def test_deterministic_algorithms(name):
    ours, _ = network_pair(name)
    x = images().float()
    torch.use_deterministic_algorithms(True)
    try:
        first = run(copy.deepcopy(ours), x)
        second = run(copy.deepcopy(ours), x)
    finally:
        torch.use_deterministic_algorithms(False)
    third = run(copy.deepcopy(ours), x)
    assert_equal_states(first, second, 0.0)
    assert_equal_states(first, third, 0.0)


def test_float64_meta_and_transforms_run_timms_forward():
    ours, theirs = (model.double() for model in network_pair())
    x = images()
    found, expected = run(ours, x), run(theirs, x)
    assert_equal_states(found, expected, 0.0)
    ours.to("meta")(x.to("meta"))


def test_parametrized_weights_run_timms_forward(in_float64):
    ours, theirs = in_double("regnet_y")
    for model in (ours, theirs):
        nn.utils.parametrizations.weight_norm(model.s1.b1.conv1.conv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_same_step(ours, theirs)


@pytest.mark.parametrize("name", sorted({*ONE_OF_EACH} - {"PreBottleneck", "RepVggBlock with squeeze-excite"}))
def test_a_backward_inside_autocast_casts_nothing(name):
    """Of a forward outside of it: the same bits. In the two others torch's own calls around the gate are cast."""
    block, x = pair_of(name)[0].train(), torch.randn(3, BLOCKS[name][0], 7, 9, requires_grad=True)
    found = []
    for autocast in (False, True):
        y = copy.deepcopy(block)(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y.backward(torch.ones_like(y))
        found.append(x.grad)
        x.grad = None
    assert torch.equal(*found)
