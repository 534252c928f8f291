"""What holds for a whole process, images of changing size, threads, and bad input (F6, F10)."""

import contextlib
import functools
import threading

import pytest
import torch
from beside import FEW, NAMES, SMALL, evaluated, gradients, images, isolated, outcome, quiet, same, same_outcome, twins
from torch import nn

import regnet_fast

pytestmark = pytest.mark.usefixtures("one_thread")

each_of_few = pytest.mark.parametrize("name", FEW)


# Defaults of the process


def with_a_default(name: str, what: str, default: str, batch: int) -> None:
    """A step and evaluations under another default dtype or device, beside timm's."""
    ours, theirs = twins(name)
    x = images(batch, 32)
    for training in (True, False):
        results = []
        for model in (ours, theirs):
            model.train(training)
            if what == "dtype":
                torch.set_default_dtype(getattr(torch, default))
            else:
                torch.set_default_device(default)
            try:
                y = quiet(model, x)
                y.square().mean().backward()
                found = [y.detach(), gradients(model), dict(model.named_buffers())]
                if not training:
                    found += [evaluated(model, x), evaluated(model, x[:1])]
            finally:
                torch.set_default_dtype(torch.float32)
                torch.set_default_device(None)
            results.append(found)
        same(*results, f"training is {training}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "default"), [("dtype", "float64"), ("dtype", "float16"), ("dtype", "bfloat16"), ("device", "meta")]
)
@each_of_few
def test_other_defaults(name, what, default):
    isolated(with_a_default, name, what, default, 4)


@pytest.mark.long
@pytest.mark.parametrize(("what", "default"), [("dtype", "float16"), ("dtype", "float64"), ("device", "meta")])
def test_other_defaults_on_a_whole_model_and_a_batch_in_parts(what, default):
    isolated(with_a_default, "regnety_002", what, default, 64)


def defaults_in_two_threads() -> None:
    """The default dtype is the process's: one thread changes it while two train."""
    models = [twins(name) for name in ("regnet_y", "resnet_v2")]
    dtypes = (torch.float32, torch.float64)
    inputs = [images(4, 64).to(dtype) for dtype in dtypes]
    expected, found, stop = {}, {}, threading.Event()

    def train(k):
        for _ in range(5):
            model = models[k][0].to(dtypes[k]).train()
            model.zero_grad()
            torch.set_default_dtype(dtypes[k])
            y = quiet(model, inputs[k])
            torch.set_default_dtype(dtypes[1 - k])
            y.square().mean().backward()
        found[k] = gradients(model)

    def flip():
        while not stop.is_set():
            for dtype in dtypes:
                torch.set_default_dtype(dtype)

    for k in range(2):
        for _ in range(5):
            model = models[k][1].to(dtypes[k]).train()
            model.zero_grad()
            quiet(model, inputs[k]).square().mean().backward()
        expected[k] = gradients(model)
    threads = [threading.Thread(target=train, args=(k,)) for k in range(2)]
    flipping = threading.Thread(target=flip)
    for thread in (*threads, flipping):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    flipping.join()
    torch.set_default_dtype(torch.float32)
    assert len(found) == 2, "a thread raised"
    same([found[0], found[1]], [expected[0], expected[1]])


def test_two_threads_train_under_changing_default_dtypes():
    isolated(defaults_in_two_threads)


# Sizes


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [*SMALL, "regnety_002", "repvgg_a0"])
def test_images_of_changing_size(name, frozen):
    ours, theirs = twins(name)
    if frozen:
        regnet_fast.freeze(ours)
    sizes = [(32 + 8 * (k % 5), 96 - 8 * (k % 7)) for k in range(12 if name in SMALL else 5)]
    for k, (height, width) in enumerate([*sizes, *sizes[:4]]):
        x = torch.randn(1 + k % 2, 3, height, width)
        same(evaluated(ours, x), evaluated(theirs, x), f"{tuple(x.shape)}")


def test_sizes_change_while_weights_change():
    models = twins("regnet_y")
    for k in range(8):
        x = images(1, 32 + 16 * (k % 4))
        for model in models:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.02)
        same(*(evaluated(model, x) for model in models), f"time {k}")


# Bad input


def other_weight(path, change):
    def apply(model):
        owner, _, key = path.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, key)
        setattr(module, key, nn.Parameter(change(weight.detach())))

    return apply


def added_bias(path):
    def apply(model):
        conv = model.get_submodule(path)
        conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels))

    return apply


SHAPES = {
    "fewer outputs": other_weight("s2.b1.conv1.conv.weight", lambda w: w[:-8]),
    "more outputs": other_weight("s2.b1.conv1.conv.weight", lambda w: torch.cat([w, w])),
    "fewer inputs": other_weight("s2.b1.conv1.conv.weight", lambda w: w[:, :-1]),
    "a larger kernel": other_weight("stem.conv.weight", lambda w: torch.nn.functional.pad(w, (1, 1, 1, 1), value=0.1)),
    "a larger kernel in a block": other_weight(
        "s2.b1.conv2.conv.weight", lambda w: torch.nn.functional.pad(w, (1, 1, 1, 1), value=0.1)
    ),
    "a kernel of 1": other_weight("s2.b1.conv2.conv.weight", lambda w: w[:, :, 1:2, 1:2].contiguous()),
    "one kernel dimension less": other_weight("s2.b1.conv1.conv.weight", lambda w: w[..., 0]),
    "no kernel": other_weight("s2.b1.conv1.conv.weight", lambda w: w[..., 0, 0]),
    "no values": other_weight("s2.b1.conv1.conv.weight", lambda w: w[:0]),
    "another dtype": other_weight("s2.b1.conv1.conv.weight", lambda w: w.double()),
    "a longer norm": other_weight("s2.b1.conv1.bn.weight", lambda w: torch.cat([w, w])),
    "a norm of one": other_weight("s2.b1.conv1.bn.weight", lambda w: w[:1]),
    "another classifier": other_weight("head.fc.weight", lambda w: w[:3]),
    "a transposed classifier": other_weight("head.fc.weight", lambda w: w.t()),
    "a bias": added_bias("s2.b1.conv1.conv"),
    "a bias of the stem": added_bias("stem.conv"),
    "a narrower squeeze": other_weight("s2.b1.se.fc1.weight", lambda w: w[:-1]),
    "no running mean": lambda m: m.s2.b1.conv1.bn.register_buffer("running_mean", None),
    "a longer running mean": lambda m: m.s2.b1.conv1.bn.register_buffer("running_mean", torch.zeros(7)),
    "no weight": lambda m: delattr(m.s2.b1.conv1.conv, "weight"),
    "None as weight": lambda m: setattr(m.s2.b1.conv1.conv, "weight", None),
    "stride of a block": lambda m: setattr(m.s2.b1.conv2.conv, "stride", (4, 4)),
    "wrong groups": lambda m: setattr(m.s2.b1.conv2.conv, "groups", 5),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", SHAPES)
def test_weights_of_another_shape(case, training):
    """timm's result or an error of timm's class."""
    models, x = twins("regnet_y"), images()
    same(*(evaluated(model, x) for model in models))
    for model in models:
        model.train(training)
        SHAPES[case](model)

    def backward(model):
        quiet(model, x).sum().backward()
        found = gradients(model)  # that of a bias before a norm of the batch is 0 but for rounding
        return {name: None if name.endswith("conv.bias") and training else grad for name, grad in found.items()}

    same_outcome(*(functools.partial(evaluated, m, x) for m in models))
    same_outcome(*(functools.partial(backward, m) for m in models))


HOOKS = {
    "a smaller map": ("s2.b1", lambda m, i, o: o[..., ::2, ::2]),
    "a larger map": ("s1", lambda m, i, o: torch.cat([o, o], -1)),
    "one image less": ("s2.b1", lambda m, i, o: o[:-1]),
    "fewer channels": ("s1.b1", lambda m, i, o: o[:, :-1]),
    "no map": ("s3.b1", lambda m, i, o: o.mean((2, 3))),
    "a tuple": ("s3.b1", lambda m, i, o: (o,)),
    "another dtype": ("s3.b1", lambda m, i, o: o.double()),
    "of an inner layer": ("s2.b1.conv1", lambda m, i, o: o[..., ::2, ::2]),
    "of an inner layer, one more": ("s2.b1.conv1", lambda m, i, o: torch.cat([o, o])),
    "of the head": ("head", lambda m, i, o: o.sum()),
}


@pytest.mark.parametrize("late", [False, True], ids=["before any call", "after a call"])
@pytest.mark.parametrize("case", HOOKS)
def test_hooks_that_return_another_shape(case, late):
    models, x = twins("regnet_y"), images()
    path, hook = HOOKS[case]
    for model in models:
        if late:
            evaluated(model, x)
        model.get_submodule(path).register_forward_hook(hook)
    for no_grad in (True, False):
        with torch.no_grad() if no_grad else contextlib.nullcontext():
            same_outcome(*(lambda m=m: m(x) for m in models))
    for model in models:
        model.train()
    same_outcome(*(lambda m=m: m(x) for m in models))


# Threads


@pytest.mark.parametrize("name", ["regnet_y", "resnet_v2", "repvgg"])
def test_a_plan_in_use_while_another_thread_loads_weights(name):
    ours, theirs = twins(name)
    x = images()
    states = []
    for scale in (1.0, 1.4):
        states.append({k: v * scale if v.is_floating_point() else v.clone() for k, v in theirs.state_dict().items()})
    errors, stop = [], threading.Event()

    def evaluates():
        try:
            while not stop.is_set():
                assert evaluated(ours, x).shape == (2, 5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=evaluates) for _ in range(2)]
    for thread in threads:
        thread.start()
    for k in range(30):
        ours.load_state_dict(states[k % 2])
    ours.load_state_dict(states[1])
    during = evaluated(ours, x)
    stop.set()
    for thread in threads:
        thread.join()
    theirs.load_state_dict(states[1])
    assert not errors, errors
    same(during, evaluated(theirs, x))
    same(evaluated(ours, x), evaluated(theirs, x))


def test_a_step_in_one_thread_and_evaluations_in_another():
    ours, theirs = twins("regnet_y")
    x = images()
    stop, errors = threading.Event(), []

    def evaluates():
        try:
            while not stop.is_set():
                evaluated(ours, x)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=evaluates)
    thread.start()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for k in range(10):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.1 * ((i + k) % 3 - 1))
            optimizer.step()
    stop.set()
    thread.join()
    assert not errors, errors
    same(evaluated(ours, x), evaluated(theirs, x))


def test_names_that_are_no_models_raise_as_timm_does():
    assert outcome(lambda: regnet_fast.models.regnety_0002) is AttributeError
    assert all(hasattr(regnet_fast.models, name) for name in NAMES)
