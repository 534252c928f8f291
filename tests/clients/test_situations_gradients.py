"""Gradients: hooks and shared weights, checkpointing, batched gradients and gradients of gradients (F4, F5, F8, F9)."""

import re

import pytest
import torch
from beside import FEW, SMALL, evaluated, gradients, images, outcome, quiet, same, twins
from torch import nn
from torch.utils import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

each_small = pytest.mark.parametrize("name", SMALL)
each_of_few = pytest.mark.parametrize("name", FEW)
each_mode = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def stepped(model, x, call=lambda model, x: model(x)):
    """Output, gradients and buffers after one backward pass."""
    x = x.clone().requires_grad_()
    y = quiet(call, model, x)
    y.square().mean().backward()
    return y.detach(), x.grad, gradients(model), dict(model.named_buffers())


# Hooks of tensors, and weights in two places


@each_mode
@pytest.mark.parametrize("name", [*SMALL, "regnety_002"])
def test_hooks_of_parameters_are_called_once(name, training):
    results, x = [], images()
    for model in twins(name):
        model.train(training)
        calls, accumulated = [], []
        for path, p in model.named_parameters():
            p.register_hook(lambda g, path=path, calls=calls: calls.append(path))
            p.register_post_accumulate_grad_hook(lambda p, path=path, heard=accumulated: heard.append(path))
        for k in range(3):
            stepped(model, x + k)
        results.append((sorted(calls), sorted(accumulated), gradients(model)))
    assert len(results[1][0]) == 3 * len(results[1][2])
    same(*results)


@each_mode
@each_of_few
def test_hooks_of_parameters_that_change_the_gradient(name, training):
    results, x = [], images()
    for model in twins(name):
        model.train(training)
        for p in model.parameters():
            p.register_hook(lambda g: g * 3)
        results.append([stepped(model, x)[2] for _ in range(2)])
    same(*results)


@each_mode
@each_small
def test_optimizers_within_the_backward_pass(name, training):
    """A step in each parameter's hook, as users save memory with; the weights differ from then on."""
    results, x = [], images()
    for model in twins(name):
        model.train(training)

        def step(p):
            with torch.no_grad():
                p.mul_(0.9)
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(2):
            quiet(model, x).square().mean().backward()
        results.append([p.detach() for p in model.parameters()])
    same(*results)


def share(model, pairs):
    """Give the second layer of each pair the first one's parameters."""
    for first, second in pairs:
        a, b = model.get_submodule(first), model.get_submodule(second)
        for key in a._parameters:
            if a._parameters[key] is not None:
                assert a._parameters[key].shape == b._parameters[key].shape
                setattr(b, key, a._parameters[key])


def layers_of_one_shape(model):
    """Two convolutions and two norms of one shape, by path: of one block where there are such, and of two."""
    by_shape, found = {}, []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) and ".fc" not in path:
            by_shape.setdefault((type(module), *module.weight.shape), []).append(path)
    for paths in by_shape.values():
        if len(paths) > 1:
            found.append((paths[0], paths[1]))
            found.append((paths[0], paths[-1]))
    assert found
    return found


@each_mode
@pytest.mark.parametrize("name", [*SMALL, "regnety_002"])
def test_parameters_that_stand_in_two_layers(name, training):
    results, x = [], images()
    models = twins(name)
    pairs = layers_of_one_shape(models[1])
    for model in models:
        share(model, pairs)
        calls = []
        for p in model.parameters():
            p.register_hook(lambda g, calls=calls: calls.append(tuple(g.shape)))
        first = [None if g is None else g.clone() for g in gradients(model.train(training)).values()]
        assert not any(g is not None for g in first)
        results.append([stepped(model, x), stepped(model, x), sorted(calls)])
    same(*results)


@each_mode
def test_a_block_that_stands_in_two_places(training):
    results, x = [], images()
    for model in twins("regnet_y"):
        block = model.s4.b2 if hasattr(model.s4, "b2") else list(model.s3.children())[-1]
        network = nn.Sequential(model.stem, model.s1, model.s2, model.s3, model.s4, block, block, model.head)
        network.train(training)
        results.append([stepped(network, x) for _ in range(2)])
    same(*results)


@each_mode
@each_of_few
def test_some_parameters_are_fixed_and_freed_again(name, training):
    results, x = [], images()
    for model in twins(name):
        found = []
        model.train(training)
        for k in range(3):
            for i, p in enumerate(model.parameters()):
                p.requires_grad_(i % 3 != k)
            model.zero_grad()
            found.append(stepped(model, x)[2])
        results.append(found)
    assert any(g is None for g in results[1][0].values())
    same(*results)


# Checkpointing, and calls between forward and backward


def twice(model, x):
    return model(x) - model(x + 1)


def by_checkpoint(reentrant):
    def call(model, x):
        return checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    return call


def by_checkpoint_twice(reentrant):
    def call(model, x):
        return by_checkpoint(reentrant)(model, x) - by_checkpoint(reentrant)(model, x + 1)

    return call


def with_saved_on_cpu(model, x):
    with torch.autograd.graph.save_on_cpu():
        return twice(model, x)


def with_hooks_on_saved_tensors(model, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone().numpy(), torch.from_numpy):
        return twice(model, x)


def with_selective_checkpoint(model, x):
    def contexts():
        return checkpoint.create_selective_checkpoint_contexts(
            [torch.ops.aten.convolution.default], allow_cache_entry_mutation=True
        )

    return checkpoint.checkpoint(model, x, use_reentrant=False, context_fn=contexts)


def a_call_without_gradients_between(model, x):
    y = model(x)
    evaluated(model, x + 1)
    return y


CALLS = {
    "two calls": twice,
    "checkpoint": by_checkpoint(False),
    "reentrant checkpoint": by_checkpoint(True),
    "two checkpoints": by_checkpoint_twice(False),
    "two reentrant checkpoints": by_checkpoint_twice(True),
    "save_on_cpu": with_saved_on_cpu,
    "hooks on saved tensors": with_hooks_on_saved_tensors,
    "selective checkpoint": with_selective_checkpoint,
    "a call between": a_call_without_gradients_between,
}


@each_mode
@pytest.mark.parametrize("call", CALLS)
@each_of_few
def test_calls_before_backward(name, call, training):
    results, x = [], images()
    for model in twins(name):
        model.train(training)
        found = []
        for _ in range(2):
            model.zero_grad()
            found.append(stepped(model, x, CALLS[call]))
        results.append(found)
    same(*results)


@each_mode
@pytest.mark.parametrize("call", ["one call", "two calls"])
@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_of_timm(name, call, training):
    results, x = [], images(4, 64)
    for model in twins(name):
        model.set_grad_checkpointing()
        model.train(training)
        results.append([stepped(model, x, twice if call == "two calls" else lambda m, x: m(x)) for _ in range(2)])
    same(*results)


@each_small
def test_the_first_of_two_results_is_differentiated_after_the_second(name):
    """The path of a block may not change between a forward pass and its backward pass."""
    results, x = [], images()
    for model in twins(name):
        first, second = quiet(model, x), quiet(model, x + 1)
        second.sum().backward()
        third = quiet(model, x + 2)
        first.sum().backward()
        third.sum().backward()
        again = quiet(model, x)
        again.sum().backward(retain_graph=True)
        again.sum().backward()
        results.append(gradients(model))
    same(*results)


# Gradients of gradients


IN_WORDS = re.compile(r"second derivative|gradient of (a|the) gradient|twice|double backward|create_graph", re.I)


def penalty(model, x):
    """A gradient penalty: the loss holds the gradient of the output with respect to the images."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(quiet(model, x).sum(), x, create_graph=True)
    assert g.requires_grad
    g.square().sum().backward()
    return g.detach(), gradients(model)


def penalty_of_weights(model, x):
    weights = [p for p in model.parameters() if p.ndim == 4]
    found = torch.autograd.grad(quiet(model, x).square().mean(), weights, create_graph=True)
    sum(g.square().sum() for g in found).backward()
    return gradients(model)


def hessian_vector_product(model, x):
    return torch.autograd.functional.hvp(lambda x: quiet(model, x).square().mean(), x, torch.ones_like(x))[1]


PENALTIES = {f.__name__: f for f in (penalty, penalty_of_weights, hessian_vector_product)}


@pytest.mark.parametrize("what", PENALTIES)
@each_of_few
def test_gradient_of_a_gradient_in_evaluation(name, what):
    x = images(2, 32)
    ours, theirs = twins(name)
    for _ in range(2):
        same(PENALTIES[what](ours, x), PENALTIES[what](theirs, x))


@pytest.mark.parametrize("what", PENALTIES)
@pytest.mark.parametrize(("name", "act"), [*((name, "silu") for name in SMALL), ("regnety_002", "relu")])
def test_gradient_of_a_gradient_in_training_is_right_or_refused_in_words(name, act, what):
    x = images(2, 64)
    ours, theirs = (model.train() for model in twins(name, act))
    expected = PENALTIES[what](theirs, x)
    try:
        found = PENALTIES[what](ours, x)
    except RuntimeError as error:
        assert IN_WORDS.search(str(error)), error
    else:
        same(found, expected)


@each_small
def test_create_graph_in_training_without_a_second_derivative(name):
    """`backward(create_graph=True)` alone: refused in words, or the first derivative is right."""
    x = images()
    ours, theirs = (model.train() for model in twins(name))
    theirs(x).square().mean().backward(create_graph=True)
    try:
        quiet(ours, x).square().mean().backward(create_graph=True)
    except RuntimeError as error:
        assert IN_WORDS.search(str(error)), error
        return
    for a, b in zip(gradients(ours).values(), gradients(theirs).values(), strict=True):
        same(a.detach(), b.detach())
        assert a.requires_grad == b.requires_grad


# Several gradients at once


BATCHED = re.compile(r"is_grads_batched|batched gradients|vmap over (a|the) backward", re.I)


def batched(model, x):
    y = quiet(model, x)
    found = torch.autograd.grad(
        y,
        list(model.parameters()),
        torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0)),
        is_grads_batched=True,
    )
    return [g.detach() for g in found]


def vectorised_jacobian(model, x):
    return torch.autograd.functional.jacobian(lambda x: quiet(model, x), x, vectorize=True)


@each_mode
@pytest.mark.parametrize("what", [batched, vectorised_jacobian], ids=lambda f: f.__name__)
@each_of_few
def test_batched_gradients(name, what, training):
    """They work; in training they may be refused, in words."""
    x = images(2, 32)
    ours, theirs = (model.train(training) for model in twins(name))
    expected = outcome(what, theirs, x)
    try:
        found = what(ours, x)
    except RuntimeError as error:
        assert training and BATCHED.search(str(error)), error
    else:
        same(found, expected)
