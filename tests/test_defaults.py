"""Whatever torch's process-wide defaults of dtype and device are, every call gives the same, bit by bit."""

import copy
import dataclasses
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
import timm
import torch
from helpers import randomize_bn
from torch import Tensor, nn
from training_blocks import NETWORKS, regnet_y, repvgg_net, state_of

import regnet_fast
from regnet_fast import functional
from regnet_fast.backends.passes import parts
from regnet_fast.blocks import program
from regnet_fast.classify import predict
from regnet_fast.inspect.verify import randomize_norms, verify
from regnet_fast.observer import observing
from regnet_fast.training.validate import evaluate

DEFAULTS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "meta": "meta",
}
"""What the process is set to: a dtype, or a device on which none of the tensors is."""

MODELS = {
    "regnet_x": partial(regnet_y, se_ratio=0.0),
    **NETWORKS,
    "repvgg with squeeze-excite": partial(repvgg_net, attn="se"),
    "regnet_z": partial(regnet_y, linear_out=True, act_layer="silu"),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def default(value: torch.dtype | str):
    """torch's default dtype or device is this one."""
    before = torch.get_default_dtype()
    try:
        if isinstance(value, str):
            torch.set_default_device(value)
        else:
            torch.set_default_dtype(value)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def assert_same(found, expected, what: str) -> None:
    """Two results of a call, tensors or what holds tensors, are equal to the bit and alike in dtype and device."""
    assert type(found) is type(expected), f"{what}: {type(found)} instead of {type(expected)}"
    if isinstance(expected, Tensor):
        assert (found.dtype, found.device, found.stride()) == (expected.dtype, expected.device, expected.stride()), what
        assert torch.equal(found, expected), f"{what} differs by {(found - expected).abs().max()}"
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for name, value in expected.items():
            assert_same(found[name], value, f"{what}, {name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{what}, {i}")
    else:
        assert found == expected, what


@pytest.fixture(params=[False, True], ids=["whole", "cut"])
def cut(request, monkeypatch) -> bool:
    """Batches are cut into parts of a few images, as large ones are."""
    if request.param:
        monkeypatch.setattr(parts, "_PART_BYTES", 60_000)
        monkeypatch.setattr(program, "_BYTES_PER_THREAD", 60_000)
    return request.param


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    theirs = randomize_bn(MODELS[name](), 0, (4, 3, 64, 64)).to(dtype).eval()
    report = regnet_fast.rebuild(theirs)
    assert report.rebuilt and not report.kept
    return report.model


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A step, and another one on what it left."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = model.train()(x)
        y.float().square().mean().backward()
    return {"y": y.detach(), "gradient of x": x.grad, **state_of(model)}


def autocast_trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(x)
    y.float().square().mean().backward()
    return {"y": y.detach(), **state_of(model)}


def differentiated(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """In evaluation, with gradients."""
    x = x.clone().requires_grad_()
    y = model.eval()(x)
    y.float().square().mean().backward()
    return {"y": y.detach(), "gradient of x": x.grad, **state_of(model)}


def evaluated(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Features and logits, twice, since the first call packs; and frozen."""
    model, found = model.eval(), []
    with torch.inference_mode():
        for _ in range(2):
            found += [model(x), *model.forward_intermediates(x, intermediates_only=True)]
        found.append(regnet_fast.freeze(model)(x))
    return found


WAYS = {"training": trained, "autocast": autocast_trained, "gradients": differentiated, "evaluation": evaluated}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_networks(name, way, dtype, cut):
    if way == "autocast" and dtype != torch.float32:
        pytest.skip("autocast is for float32 models")
    model = made(name, dtype)
    # Images of odd sizes beside even ones, one alone, and more than a part
    for shape in [(6, 3, 64, 64), (1, 3, 33, 47)]:
        x = torch.randn(shape, dtype=dtype)
        expected = WAYS[way](copy.deepcopy(model), x)
        for what, value in DEFAULTS.items():
            ours = copy.deepcopy(model)
            with default(value):
                found = WAYS[way](ours, x)
            assert_same(found, expected, f"{what}, {shape}")


def test_the_networks_are_cut_and_fused(monkeypatch):
    """What the test above relies on."""
    monkeypatch.setattr(parts, "_PART_BYTES", 60_000)
    monkeypatch.setattr(program, "_BYTES_PER_THREAD", 60_000)
    model, x, heard = made("regnet_y"), torch.randn(6, 3, 64, 64), []
    with observing(block=lambda block, image, plan, reason: heard.append((image.shape[0], reason))), torch.no_grad():
        model(x)
    assert {reason for _, reason in heard} == {None} and min(n for n, _ in heard) < 6
    assert len(parts.parts(torch.empty(6, 8, 32, 32))) > 1


@pytest.mark.parametrize("name", ["regnet_y", "repvgg"])
def test_a_model_on_the_default_device_itself(name):
    """In training shapes are found without computing, as of timm's own model."""
    with default("meta"):
        model = regnet_fast.rebuild(MODELS[name]()).model
        x = torch.randn(2, 3, 64, 64)
        y = model.train()(x)
        y.sum().backward()
        assert (y.shape, y.device.type) == ((2, 5), "meta")
        assert all(p.grad.shape == p.shape and p.grad.is_meta for p in model.parameters())


# The operations


def vectors(count: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.rand(channels) + 0.5).to(dtype) for _ in range(count)]


def operations(dtype: torch.dtype) -> dict:
    """Calls without arguments, each of one operation."""
    x, wide = torch.randn(2, 24, 9, 7).to(dtype), torch.randn(2, 256, 14, 14).to(dtype)
    f = functional
    norm, deeper = f.BatchNorm(*vectors(4, 16), 1e-5), vectors(4, 24)

    def weight(k, c, size):
        return (torch.randn(k, c, size, size) / (c * size * size) ** 0.5).to(dtype)

    one, grouped, dense = weight(16, 24, 1), weight(16, 12, 3), weight(16, 24, 3)
    deep, depthwise = weight(256, 256, 3), weight(24, 1, 3)
    fc1, fc2 = torch.randn(6, 24).to(dtype), torch.randn(24, 6).to(dtype)
    gate, residual = torch.rand(2, 24).to(dtype), torch.randn(2, 16, 9, 7).to(dtype)
    bias = torch.randn(16).to(dtype)
    means = x.float().mean((2, 3)).to(dtype)
    b1, b2 = torch.randn(6).to(dtype), torch.randn(24).to(dtype)
    return {
        "pointwise_conv": (
            lambda x, w, b, g, r: f.pointwise_conv(x, w, b, norm=norm, gate=g, residual=r, activation="silu"),
            (x, one, bias, gate, residual),
        ),
        "pointwise_conv, strided": (lambda x, w: f.pointwise_conv(x, w, stride=2), (x, one)),
        "grouped_conv": (
            lambda x, w, b: f.grouped_conv(x, w, b, norm=norm, groups=2, activation="relu"),
            (x, grouped, bias),
        ),
        "depthwise": (lambda x, w: f.grouped_conv(x, w, groups=24), (x, depthwise)),
        "dense_conv": (lambda x, w, b: f.dense_conv(x, w, b, norm=norm, padding=1), (x, dense, bias)),
        "dense_conv, deep": (lambda x, w: f.dense_conv(x, w, padding=1), (wide, deep)),
        "packed": (lambda x: f.dense_conv(x.detach(), f.pack_conv(dense, bias, norm=norm, padding=1)), (x,)),
        "fold": (lambda w, b: f.fold(w, b, norm), (one, bias)),
        "fold of a convolution without a bias": (lambda w: f.fold(w, None, norm), (one,)),
        "norm_act": (lambda x: f.norm_act(x, f.BatchNorm(*deeper, 1e-5), activation="silu"), (x,)),
        "squeeze_excite": (f.squeeze_excite, (means, fc1, b1, fc2, b2)),
    }


def results(call, given: tuple[Tensor, ...]) -> list[Tensor]:
    """What a call gives without gradients, and what it and its gradients are with them."""
    with torch.no_grad():
        plain = call(*given)
    leaves = [t.clone().requires_grad_() for t in given]
    y = call(*leaves)
    ys = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
    gradients = []
    if ys:
        gradients = torch.autograd.grad(sum(t.float().square().sum() for t in ys), leaves, allow_unused=True)
    return [*(plain if isinstance(plain, tuple) else (plain,)), *(t for t in gradients if t is not None)]


@pytest.mark.parametrize("force", ["auto", "aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", operations(torch.float32))
def test_operations(name, dtype, force):
    if force == "aten" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    call, given = operations(dtype)[name]
    with regnet_fast.backend(force):
        expected = results(call, given)
        for what, value in DEFAULTS.items():
            with default(value):
                found = results(call, given)
            assert_same(found, expected, f"{what}, {name}")


# The helpers


@pytest.mark.parametrize("value", DEFAULTS)
def test_random_norms(value):
    made, expected = (copy.deepcopy(model) for model in [MODELS["regnet_y"]()] * 2)
    randomize_norms(expected, 3)
    with default(DEFAULTS[value]):
        randomize_norms(made, 3)
    assert_same(dict(made.state_dict()), dict(expected.state_dict()), value)


@pytest.mark.parametrize("value", DEFAULTS)
def test_explanations(value):
    model = made("regnet_y")
    expected = regnet_fast.explain(model, (2, 3, 64, 64))
    with default(DEFAULTS[value]):
        assert regnet_fast.explain(model, (2, 3, 64, 64)) == expected
        assert regnet_fast.explain(nn.ReLU(), (1, 3, 8, 8))  # which has no parameter that names a dtype and a device


@pytest.mark.parametrize("value", DEFAULTS)
def test_verification(value):
    """A model that is built under a default dtype has other random weights, so that numbers differ."""
    with default(DEFAULTS[value]):
        found = verify("regnetx_002", size=32)
    assert found.ok and found.dtype == "float32" and found.device == "cpu" and found.rebuilt
    if value == "meta":
        expected = verify("regnetx_002", size=32)
        assert dataclasses.asdict(found) == dataclasses.asdict(expected)


@pytest.mark.long
@pytest.mark.parametrize("value", DEFAULTS)
def test_deployed_weights_into_a_model_in_its_training_form_and_back(value, tmp_path):
    """timm's reparameterisation makes new convolutions, on the default device and of the default dtype."""
    other = timm.utils.reparameterize_model(copy.deepcopy(made("repvgg")), inplace=True)
    for ours, theirs, name in ((made("repvgg"), other, "deployed.pt"), (other, made("repvgg"), "branches.pt")):
        torch.save(theirs.state_dict(), tmp_path / name)
        expected, found = copy.deepcopy(ours), copy.deepcopy(ours)
        regnet_fast.weights.load_checkpoint(expected, tmp_path / name)
        with default(DEFAULTS[value]):
            regnet_fast.weights.load_checkpoint(found, tmp_path / name)
        assert_same(dict(found.state_dict()), dict(expected.state_dict()), name)


@pytest.mark.parametrize("value", DEFAULTS)
def test_classification(value, tmp_path):
    """The images are in the default dtype until they are in the model's: torchvision makes them so."""
    images = pytest.importorskip("PIL.Image")
    for i in range(3):
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
        images.fromarray(pixels).save(tmp_path / f"{i}.png")
    model, paths = made("regnet_y"), sorted(tmp_path.glob("*.png"))
    expected = list(predict(model, paths))
    with default(DEFAULTS[value]):
        found = list(predict(model, paths))
    assert [one.image for one in found] == [one.image for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [p for *_, p in ours.top] == pytest.approx([p for *_, p in theirs.top], abs=1e-2)
    if value in ("meta", "float64"):
        assert [one.top[0][0] for one in found] == [one.top[0][0] for one in expected]


class Loader(list):
    """Batches: torch's own loader takes no other default device."""

    sampler = None


@pytest.mark.parametrize("value", DEFAULTS)
def test_evaluation_on_a_loader(value):
    model = made("regnet_y")
    loader = Loader((torch.randn(n, 3, 32, 32), torch.arange(n) % 5) for n in (3, 3, 1))
    expected = evaluate(model, loader)
    with default(DEFAULTS[value]):
        assert evaluate(model, loader) == expected


# Threads


@pytest.mark.long
@pytest.mark.parametrize("name", ["regnet_y", "resnet_v2"])
def test_two_threads_train_while_another_one_changes_the_default(name):
    """The dtype is the process's: any call may find another one than the call before."""
    models = [made(name), made("repvgg")]
    x = torch.randn(4, 3, 33, 47)
    expected = [trained(copy.deepcopy(model), x) for model in models]
    stop, changes, found = threading.Event(), 0, [[], []]

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(8):
            found[i].append(trained(copy.deepcopy(models[i]), x))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    before, interval = torch.get_default_dtype(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def flip() -> None:
        nonlocal changes
        while not stop.is_set():
            for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
                torch.set_default_dtype(dtype)
                changes += 1
                time.sleep(1e-5)

    flipping = threading.Thread(target=flip)
    try:
        for thread in (flipping, *workers):
            thread.start()
        for worker in workers:
            worker.join()
    finally:
        stop.set()
        flipping.join()
        torch.set_default_dtype(before)
        sys.setswitchinterval(interval)
    assert changes > 100
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 8
        for result in results:
            assert_same(result, right, name)
