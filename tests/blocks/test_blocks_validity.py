"""When a block runs fused and when the host's forward does, and that nothing it keeps outlives its weights."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import close, pair, reasons
from timm.layers import ConvNormAct
from torch import nn

import regnet_fast
from regnet_fast.backends import BackendError, backend
from regnet_fast.blocks.fused import FallbackWarning, Fused

pytestmark = pytest.mark.usefixtures("no_silent_fallback")


# Changes


def changes():
    def load(m):
        m.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in m.state_dict().items()})

    def in_place(m):
        with torch.no_grad():
            m.s2.b1.conv2.conv.weight.mul_(1.5)

    def statistics(m):
        m.s3.b1.conv1.bn.running_var.mul_(2.0)

    def data_assigned(m):
        m.s1.b1.conv1.conv.weight.data = m.s1.b1.conv1.conv.weight.data * 2

    def replaced(m):
        m.s4.b1.conv3.conv.weight = nn.Parameter(m.s4.b1.conv3.conv.weight.detach() * 3)

    def data_in_place_then_eval(m):
        m.s1.b1.conv1.conv.weight.data.mul_(3)
        m.eval()

    def momentum_step(m):
        m.train()(torch.randn(2, 3, 64, 64))
        m.eval()

    def epsilon(m):
        m.s1.b1.conv1.bn.eps = 0.5

    def stride(m):
        for block in (m.s4.b1.conv2, m.s4.b1.downsample):
            block.conv.stride = (1, 1)

    def dilation(m):
        m.s4.b1.conv2.conv.dilation = m.s4.b1.conv2.conv.padding = (2, 2)

    def removed_se(m):
        m.s3.b1.se = nn.Identity()

    def act(m):
        m.s3.b1.act3 = nn.SiLU()

    def swapped_conv(m):
        m.s2.b1.conv1.conv = copy.deepcopy(m.s2.b1.conv1.conv)
        with torch.no_grad():
            m.s2.b1.conv1.conv.weight.neg_()

    def head(m):
        torch.manual_seed(1)
        m.reset_classifier(7)

    return [
        load,
        in_place,
        statistics,
        data_assigned,
        replaced,
        data_in_place_then_eval,
        momentum_step,
        epsilon,
        stride,
        dilation,
        removed_se,
        act,
        swapped_conv,
        head,
    ]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_no_stale_weights(change):
    """After every kind of change the next call gives what timm gives, and something else than before."""
    ours, theirs = pair("regnety_002")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = ours(x)
    for model in (ours, theirs):
        torch.manual_seed(0)
        change(model)
    with torch.no_grad():
        after, expected = ours(x), theirs(x)
    close(after, expected)
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3)


@pytest.mark.long
def test_compiled_weights_follow_changes():
    ours, theirs = pair("regnety_002")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled(x)
        for model in (ours, theirs):
            model.s1.b1.conv1.conv.weight.mul_(2)
        close(compiled(x), theirs(x))


def test_backward_after_train_and_after_a_changed_weight():
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    for model in (ours, theirs):
        y = model(x)
        model.train()
        y.sum().backward()
        model.eval()
    y = ours(x)
    with torch.no_grad():
        ours.s1.b1.conv2.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed between forward and backward"):
        y.sum().backward()


@pytest.mark.long
def test_copies_and_pickles_keep_the_fused_class_and_no_cache(tmp_path):
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours(x)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        assert len(buffer.getvalue()) < 1.3 * sum(t.numel() * t.element_size() for t in ours.state_dict().values())
        buffer.seek(0)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
            assert isinstance(twin.s1.b1, Fused) and "_regnet_fast_plans" not in twin.s1.b1.__dict__
            assert torch.equal(twin(x), expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_changing_shapes_do_not_grow_memory():
    ours, _ = pair("regnety_002")
    block = ours.s1.b1
    with torch.no_grad():
        for size in range(8, 48):
            block(torch.randn(1, 32, size, size))
    (plan,) = block.__dict__["_regnet_fast_plans"].values()
    for unit in (plan.form.conv1, plan.form.conv2, plan.form.conv3):
        runs = [*unit._runs.values(), *unit._unpacked.values()]
        assert len(runs) <= 33 and len({id(run.weight) for run in runs}) <= 2


# Hooks


def test_hooks_are_honoured_while_they_are_there():
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64)
    seen = []
    handle = ours.s2.b1.conv2.register_forward_hook(lambda m, i, o: seen.append(o) or o * 2)
    other = theirs.s2.b1.conv2.register_forward_hook(lambda m, i, o: o * 2)
    with torch.no_grad():
        assert reasons(ours, x) == {None, "a hook is registered on conv2"}
        with warnings.catch_warnings(), pytest.warns(FallbackWarning, match="hook"):
            warnings.simplefilter("always")
            close(ours(x), theirs(x))
    assert seen
    handle.remove(), other.remove()
    with torch.no_grad():
        assert reasons(ours, x) == {None}
        close(ours(x), theirs(x))


def test_hooks_on_the_block_itself_do_not_unfuse_it():
    ours, _ = pair("regnety_002")
    seen = []
    ours.s2.b1.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with torch.no_grad():
        assert reasons(ours, torch.randn(1, 3, 64, 64)) == {None}
    assert seen


# The host's forward


def host_cases():
    def half_training(m):
        m.s1.b1.conv1.bn.train()

    def parametrised(m):
        nn.utils.parametrizations.weight_norm(m.s1.b1.conv1.conv)

    def wrapped(m):
        class Lora(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x) * 1.5

        m.s1.b1.conv1.conv = Lora(m.s1.b1.conv1.conv)

    def patched(m):
        conv = m.s1.b1.conv2
        forward = conv.forward
        conv.forward = lambda x: forward(x) + 1

    def circular(m):
        m.s1.b1.conv2.conv.padding_mode = "circular"
        m.s1.b1.conv2.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]

    def mish(m):
        m.s1.b1.conv2.bn.act = nn.Mish()

    def one_stride(m):  # for both directions
        m.s1.b1.conv2.conv.stride = 2

    def one_padding(m):
        m.s1.b1.conv2.conv.padding = 1

    def one_dilation(m):
        m.s1.b1.conv1.conv.dilation = 1

    def bounds(m):
        m.s1.b1.conv2.bn.act.max_val = 0.1

    return [
        *(half_training, parametrised, wrapped, patched, circular, mish),
        *(one_stride, one_padding, one_dilation, bounds),
    ]


@pytest.mark.parametrize("case", host_cases(), ids=lambda f: f.__name__)
def test_what_is_not_the_same_function_runs_the_host(case):
    ours, theirs = pair("regnety_002")
    x = torch.randn(2, 3, 64, 64)
    for model in (ours, theirs):
        model.s1.b1.conv2.bn.act = nn.ReLU6()
        with torch.no_grad():
            model(x)
        case(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        close(ours(x), theirs(x))
        found = reasons(ours, x) - {None}
    assert len(found) == 1 and ("conv" in (reason := found.pop()) or "ReLU6" in reason)
    with torch.no_grad(), backend("aten"), pytest.raises(BackendError, match=r"Bottleneck.*aten.*(conv|ReLU6)"):
        ours(x)


class Lora(nn.Module):
    """A convolution with an addition of low rank, as peft and others wrap one."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self):
        self.base.weight.add_(torch.einsum("or,rihw->oihw", self.up.weight[:, :, 0, 0], self.down.weight))
        return self.base


def wrap(model):
    for name in ("s1.b1.conv1", "s2.b1.downsample"):
        torch.manual_seed(0)
        unit = model.get_submodule(name)
        unit.conv = Lora(unit.conv)
    return model


def unwrap(model):
    for module in model.modules():
        if isinstance(getattr(module, "conv", None), Lora):
            module.conv = module.conv.merged()
    return model


def by_peft(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    target = r"s\d\.b1\.(conv1|conv3)\.conv|head\.fc"
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=target, r=2, init_lora_weights=False)).eval()


@pytest.mark.parametrize(
    ("adapt", "merge"), [(wrap, unwrap), (by_peft, lambda m: m.merge_and_unload())], ids=["wrapper", "peft"]
)
def test_adapters_train_and_merge(adapt, merge):
    """Blocks with a wrapped convolution run the host's forward and name the wrapper; merged, they run fused again."""
    ours, theirs = (adapt(model) for model in pair("regnety_002"))
    x, gradients = torch.randn(2, 3, 64, 64), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        with torch.no_grad():
            close(ours(x), theirs(x))
            refused = reasons(ours, x)
        for model in (ours, theirs):
            model.train()(x).square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("lora" in name or "up" in name for name in gradients[0])
    for name in (name for name in gradients[1] if "lora" in name or ".up." in name):
        expected = gradients[1][name]
        torch.testing.assert_close(gradients[0][name], expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert None in refused
    assert any(r and r.startswith("conv1.conv is ") and ("Lora" in r or "peft.tuners.lora" in r) for r in refused)
    ours, theirs = (merge(model.eval()) for model in (ours, theirs))
    with torch.no_grad():
        close(ours(x), theirs(x))
        assert reasons(ours, x) == {None}


class Quantised(torch.Tensor):
    """Eight-bit weights that are multiplied out wherever they are used, as torchao's are."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __repr__(self, **kwargs):
        return f"Quantised({tuple(self.shape)})"

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.values * t.scale, (args, kwargs or {}))
        return function(*plain[0], **plain[1])

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().max() / 127
        return nn.Parameter(cls((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)


def quantise(model):
    for layer in (model.s1.b1.conv1.conv, model.head.fc):
        layer.weight = Quantised.of(layer.weight)


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize(("change", "layer"), [(quantise, "conv1.conv"), (quantise, "fc"), (by_torchao, "fc")])
def test_quantised_weights_run_the_host(change, layer):
    ours, theirs = pair("regnety_002")
    x = torch.randn(2, 3, 64, 64)
    for model in (ours, theirs):
        change(model)
    with torch.no_grad():
        found = reasons(ours, x)
        assert any(r and r.startswith(f"{layer}.weight is a tensor of the class ") for r in found) and None in found
        with pytest.warns(FallbackWarning, match="computes in a way of its own"), warnings.catch_warnings():
            warnings.simplefilter("always")
            close(ours(x), theirs(x))
        with backend("aten"), pytest.raises(BackendError, match="weight is a tensor of the class"):
            ours(x)


@pytest.mark.long
def test_quantised_weights_compiled_and_trained(fresh_compiler):
    ours, theirs = pair("regnety_002")
    x = torch.randn(2, 3, 64, 64)
    for model in (ours, theirs):
        quantise(model)
    with torch.no_grad():
        stem = theirs.stem(x)
        close(torch.compile(ours.s1, backend="aot_eager", fullgraph=True)(stem), theirs.s1(stem))
    ours, theirs = pair("regnety_002")
    for model in (ours, theirs):
        model.train()(x)
        quantise(model)  # after a step, in training mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        close(ours(x), theirs(x))


def test_a_differentiated_block_runs_the_host_afterwards_and_second_derivatives_hold():
    ours, theirs = pair("regnety_002")
    ours, theirs = ours.s2.double().float(), theirs.s2.double().float()
    x = torch.randn(1, 24, 16, 16, requires_grad=True)
    results = []
    for stage in (ours, theirs, ours):
        (g,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x)
        results.append((g, gg))
    for g, gg in results:
        close(g, results[1][0])
        close(gg, results[1][1])
    plan = next(iter(ours.b1.__dict__["_regnet_fast_plans"].values()))
    assert plan.differentiated


@pytest.mark.parametrize("training", [False, True])
def test_the_caller_may_write_to_the_output(training):
    """As after timm's block, also where a matrix product computed it and the result is a view of another shape."""
    theirs = ConvNormAct(16, 24, 1, apply_act=False).train(training)
    ours = copy.deepcopy(theirs)
    regnet_fast.rebuild(ours)
    x = torch.randn(2, 16, 5, 7)
    found = []
    for block in (ours, theirs):
        y = block(x)
        y += 1
        y.relu_().square().sum().backward()
        found.append([y, *(p.grad for p in block.parameters())])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_float64_and_meta_run_the_host():
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(ours.double()(x), theirs.double()(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert ours.to("meta")(x.to("meta")).shape == (1, 1000)


def test_inference_mode_and_weights_made_in_it():
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        close(ours(x), theirs(x))
        assert reasons(ours, x) == {None}
    close(ours(x), theirs(x))
    with torch.inference_mode():
        made = copy.deepcopy(ours)
        assert reasons(made, x) == {"its weights were made in inference mode, where changes to them cannot be seen"}


def test_bad_input_raises_as_timm_does():
    ours, theirs = pair("regnety_002")
    bad = [
        torch.randn(3, 64, 64),
        torch.randn(1, 4, 64, 64),
        torch.randint(0, 9, (1, 3, 64, 64)),
        torch.randn(1, 3, 64, 64).double(),
        torch.randn(1, 3, 64, 64, dtype=torch.complex64),
        torch.randn(1, 3, 64, 64).bfloat16(),
        torch.randn(3, 3),
    ]
    for x in bad:
        with torch.no_grad(), pytest.raises(Exception) as expected:
            theirs(x)
        with torch.no_grad(), warnings.catch_warnings(), pytest.raises(type(expected.value)) as found:
            warnings.simplefilter("ignore", FallbackWarning)
            ours(x)
        assert str(found.value) == str(expected.value)
    with torch.no_grad():
        assert ours(torch.randn(0, 3, 64, 64)).shape == theirs(torch.randn(0, 3, 64, 64)).shape


def test_a_model_half_moved_to_another_dtype_raises_as_timm_does():
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64)
    for model in (ours, theirs):
        model.s3.bfloat16()
    with torch.no_grad(), pytest.raises(RuntimeError) as expected:
        theirs(x)
    with torch.no_grad(), warnings.catch_warnings(), pytest.raises(RuntimeError) as found:
        warnings.simplefilter("ignore", FallbackWarning)
        ours(x)
    assert str(found.value) == str(expected.value)


# Out of the fused classes


def test_restore_gives_timms_own_classes_back():
    ours, theirs = pair("regnetz_b16")
    before = {k: v.data_ptr() for k, v in ours.state_dict().items()}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours(x)
        plain = regnet_fast.restore(ours)
        assert plain is ours
        assert [type(m) for m in plain.modules()] == [type(m) for m in theirs.modules()]
        assert {k: v.data_ptr() for k, v in plain.state_dict().items()} == before
        assert torch.equal(plain(x), theirs(x))


def test_jit_trace_records_the_host():
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        traced = torch.jit.trace(ours, x, check_trace=False)
        close(traced(torch.cat([x, x]))[:1], expected)
        assert reasons(ours, x) == {None}


@pytest.mark.long
def test_scripting_compiles_timms_blocks_and_leaves_ours():
    """torch.jit.script puts what it compiles where it found it, which is in a network of its own."""
    ours, theirs = pair("regnety_002")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        close(torch.jit.script(ours)(x), expected)
        assert reasons(ours, x) == {None}
        close(ours(x), expected)
