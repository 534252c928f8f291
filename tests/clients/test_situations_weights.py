"""Weights that change in ways torch does not count, or that stand in for one call (F1, F2, F3)."""

import copy
import inspect

import pytest
import timm.optim
import torch
import torch.nn.utils.prune
from beside import FEW, NAMES, SMALL, evaluated, gradients, images, moved, quiet, same, twins
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")

each_small = pytest.mark.parametrize("name", SMALL)
each_of_few = pytest.mark.parametrize("name", FEW)


# Optimizers: writers that bump no version


def torchs_optimizers():
    """Every optimizer of torch with dense gradients, in every implementation that it has, each with another network."""
    found = []
    for name, cls in sorted(vars(torch.optim).items()):
        if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
            continue
        if name in ("Optimizer", "SparseAdam", "LBFGS", "Muon"):  # a base, sparse, with a closure, matrices alone
            continue
        options = inspect.signature(cls).parameters
        for option in ("", *(one for one in ("foreach", "fused") if one in options)):
            network = SMALL[len(found) % len(SMALL)]
            found.append(pytest.param(cls, {option: True} if option else {}, network, id=f"{name} {option}".strip()))
    return found


def rate(cls):
    """A learning rate with which a step changes a weight by some percent."""
    return dict(Adadelta=3.0, Adafactor=0.1, ASGD=0.05, SGD=0.05, RMSprop=0.002, Rprop=0.01).get(cls.__name__, 0.01)


def trains_in_evaluation(ours, theirs, optimizers, steps=2):
    """Steps of two models in evaluation, and an evaluation without gradients after each.

    Both take the same step: timm's gradients, each in units of its weight.
    """
    x, direction = images(4, 32), torch.randn(4, 5)
    before = evaluated(theirs, x)
    same(evaluated(ours, x), before)
    for k in range(steps):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (quiet(model, x) * direction).sum().backward()
        same(gradients(ours), gradients(theirs), f"gradients of step {k}")
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad.mul_(b.detach().square().mean().sqrt() / b.grad.square().mean().sqrt().clamp(min=1e-20))
            a.grad.copy_(b.grad)
        for optimizer in optimizers:
            optimizer.step()
        after = evaluated(theirs, x)
        moved(before, after)
        same(evaluated(ours, x), after, f"after step {k}")
        before = after


@pytest.mark.parametrize(("cls", "options", "name"), torchs_optimizers())
def test_torchs_optimizers_with_the_model_in_evaluation(cls, options, name):
    ours, theirs = twins(name)
    trains_in_evaluation(ours, theirs, [cls(m.parameters(), lr=rate(cls), **options) for m in (ours, theirs)])


@pytest.mark.parametrize(
    ("cls", "name"),
    [(torch.optim.AdamW, "regnety_002"), (torch.optim.AdamW, "repvgg_a0"), (torch.optim.SGD, "regnetx_002")],
)
def test_fused_optimizers_on_whole_models(cls, name):
    models = twins(name)
    x = images()
    before = evaluated(models[1], x)
    same(evaluated(models[0], x), before)
    optimizers = [cls(m.parameters(), lr=0.01 if cls is torch.optim.AdamW else 1.0, fused=True) for m in models]
    for k in range(3):
        gradient = [torch.randn_like(p) * p.detach().std() for p in models[1].parameters()]
        for model, optimizer in zip(models, optimizers, strict=True):
            for p, g in zip(model.parameters(), gradient, strict=True):
                p.grad = g.clone() if cls is torch.optim.AdamW else g.clone() * 0.1
            optimizer.step()
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"after step {k}")
        before = after


class ThroughData(torch.optim.Optimizer):
    """An optimizer that writes through `.data`, as those of many repositories do."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])


class Native(torch.optim.Optimizer):
    """An optimizer that calls torch's fused kernel itself."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        torch._fused_sgd_(
            params,
            [p.grad for p in params],
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=self.param_groups[0]["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=True,
        )


class WithoutBase:
    """No subclass of torch's Optimizer."""

    def __init__(self, params, lr):
        self.params, self.lr = list(params), lr

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self):
        for p in self.params:
            with torch.no_grad():
                p.sub_(p.grad, alpha=self.lr)


@each_of_few
@pytest.mark.parametrize("cls", [ThroughData, Native, WithoutBase])
def test_optimizers_of_users(cls, name):
    ours, theirs = twins(name)
    trains_in_evaluation(ours, theirs, [cls(m.parameters(), lr=0.05) for m in (ours, theirs)])


@pytest.mark.parametrize("cls", [torch.optim.SGD, ThroughData])
def test_an_optimizer_for_a_part_of_the_model(cls):
    """Test-time adaptation: the affine parameters of the norms alone, everything in evaluation."""
    ours, theirs = twins("regnet_y")
    optimizers = []
    for model in (ours, theirs):
        chosen = [p for name, p in model.named_parameters() if ".bn." in name]
        optimizers.append(cls(chosen, lr=10.0))
    x = images(4, 32)
    before = evaluated(theirs, x)
    for k in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            y = quiet(model, x).softmax(1)
            (-(y * y.log()).sum(1).mean()).backward()
            optimizer.step()
        after = evaluated(theirs, x)
        same(evaluated(ours, x), after, f"step {k}")
    moved(before, after)


@pytest.mark.parametrize("opt", ["lamb", "lion", "madgrad", "nadamw", "adafactorbv", "laprop", "lookahead_sgdw"])
def test_timms_optimizers(opt):
    lr = {"lamb": 0.05, "lookahead_sgdw": 0.05}.get(opt, 0.01)
    ours, theirs = twins("regnet_y")
    made = [timm.optim.create_optimizer_v2(m, opt=opt, lr=lr) for m in (ours, theirs)]
    trains_in_evaluation(ours, theirs, made, steps=7 if "lookahead" in opt else 2)


def test_lbfgs():
    ours, theirs = twins("regnet_y")
    x, target = images(4, 32), torch.arange(4) % 5
    before = evaluated(theirs, x)
    for model in (ours, theirs):
        optimizer = torch.optim.LBFGS(model.head.parameters(), lr=0.5, max_iter=4)

        def closure():
            optimizer.zero_grad()  # noqa: B023
            loss = F.cross_entropy(quiet(model, x), target)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
    after = evaluated(theirs, x)
    moved(before, after)
    same(evaluated(ours, x), after)


def test_averages_of_weights():
    """timm's and torch's averages write into a copy that is in evaluation all the time."""
    for average in (
        lambda m: timm.utils.ModelEmaV2(m, decay=0.5),
        lambda m: timm.utils.ModelEmaV3(m, decay=0.5, foreach=True),
        lambda m: torch.optim.swa_utils.AveragedModel(m, use_buffers=True),
    ):
        models = twins("regnet_y")
        averages = [average(model) for model in models]
        x = images(4, 32)
        for k in range(4):
            for model, ema in zip(models, averages, strict=True):
                torch.manual_seed(k)
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(torch.randn_like(p) * p.std().nan_to_num(0.1) * 0.5)
                (ema.update_parameters if hasattr(ema, "update_parameters") else ema.update)(model)
            same(evaluated(averages[0].module, x), evaluated(averages[1].module, x), f"update {k}")


def test_a_write_that_nothing_counts_is_seen_after_eval():
    """numpy and DLPack share the memory of a weight: what docs/how-it-works.md asks for after `.data`."""
    ours, theirs = twins("regnet_y")
    x = images()
    before = evaluated(ours, x)
    for model in (ours, theirs):
        model.s1.b1.conv1.conv.weight.detach().numpy()[...] *= 2
        torch.from_dlpack(model.s2.b1.conv1.conv.weight.detach()).mul_(2)
        model.eval()
    moved(before, evaluated(theirs, x))
    same(evaluated(ours, x), evaluated(theirs, x))


# .data


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def scaled(p, k):
    p.data = p.data * (1.3 if k % 2 else 0.6)


def twice(p, k):
    """The address of the first time comes back."""
    p.data = p.data * 1.3
    p.data = p.data * (1.1 if k % 2 else 0.6)


def random(p, k):
    p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * p.data.std()


def flipped(p, k):
    p.data = p.data.flip(0)


def other_strides(p, k):
    """The same memory read in another order: the address is the same."""
    p.data = p.data.transpose(0, 1) if p.shape[0] == p.shape[1] else p.data * 1.1


def rolled_memory(p, k):
    kept = p.data.clone()
    p.data = torch.empty(0)
    p.data = kept.neg_()


def channels_last(p, k):
    p.data = (p.data * 1.5).contiguous(memory_format=torch.channels_last)


def written_and_assigned(p, k):
    fresh = p.data.clone()
    fresh.mul_(1.3 if k % 2 else 0.6)
    p.data = fresh


@each_small
@pytest.mark.parametrize(
    "change",
    [scaled, twice, random, flipped, other_strides, rolled_memory, channels_last, written_and_assigned],
    ids=lambda f: f.__name__,
)
def test_data_assigned_again_and_again(change, name):
    models = twins(name)
    x = images()
    before = evaluated(models[1], x)
    same(evaluated(models[0], x), before)
    for k in range(3):
        for model in models:
            for conv in convolutions(model):
                change(conv.weight, k)
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"time {k}")
        before = after


@pytest.mark.parametrize("name", NAMES)
def test_data_of_whole_models(name):
    models = twins(name)
    x = images()
    for k in range(3):
        before = evaluated(models[1], x)
        for model in models:
            for p in model.parameters():
                scaled(p, k)
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"time {k}")


def test_data_of_buffers_and_norms():
    models = twins("regnet_y")
    x = images()
    for k in range(4):
        before = evaluated(models[1], x)
        for model in models:
            for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.running_mean.data = norm.running_mean.data + 0.3 * norm.running_var.sqrt()
                norm.running_var.data = norm.running_var.data * 1.2
                norm.bias.data = norm.bias.data + 0.1
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"time {k}")


def test_two_layers_exchange_their_memory():
    models = twins("regnet_y")
    x = images()
    for k in range(4):
        before = evaluated(models[1], x)
        for model in models:
            by_shape = {}
            for conv in convolutions(model):
                by_shape.setdefault(conv.weight.shape, []).append(conv.weight)
            pairs = [group[:2] for group in by_shape.values() if len(group) > 1]
            assert pairs
            for a, b in pairs:
                a.data, b.data = b.data, a.data
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"time {k}")


@each_small
def test_vector_to_parameters(name):
    models = twins(name)
    x = images()
    before = evaluated(models[1], x)
    start = torch.nn.utils.parameters_to_vector(models[1].parameters()).detach()
    for k in range(6):
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(k))
        vector = start * (1 + 0.5 * noise)
        for model in models:
            torch.nn.utils.vector_to_parameters(vector.clone(), model.parameters())
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"time {k}")
        before = after


def test_one_vector_whose_parts_are_all_parameters():
    """Parameters that are views of one vector, which is written as a whole, and of another one."""
    models, x = twins("regnet_y"), images()
    vectors = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in models]
    for k in range(4):
        before = evaluated(models[1], x)
        for vector, model in zip(vectors, models, strict=True):
            torch.nn.utils.vector_to_parameters(vector.mul_(0.9), model.parameters())
            model.eval()  # what is written through another alias of a weight's memory nobody can see
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"time {k}")


def test_parameters_set_and_swapped():
    models, x = twins("regnet_y"), images()
    for k in range(3):
        before = evaluated(models[1], x)
        for model in models:
            for conv in convolutions(model):
                with torch.no_grad():
                    conv.weight.set_(conv.weight * 1.3)
            other = nn.Parameter(model.s1.b1.conv1.conv.weight.detach() * -1)
            torch.utils.swap_tensors(model.s1.b1.conv1.conv.weight, other)
        after = evaluated(models[1], x)
        moved(before, after)
        same(evaluated(models[0], x), after, f"time {k}")


# Weights that stand in for one call, or that are computed


def substitutes(model, k, grad):
    """Other weights under the names of a model's parameters: plain tensors."""
    generator = torch.Generator().manual_seed(k)
    return {
        name: (p.detach() * (1 + 0.5 * torch.randn(p.shape, generator=generator))).requires_grad_(grad)
        for name, p in model.named_parameters()
    }


def called_with_substitutes(model, x, k, training):
    given = substitutes(model, k, True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    y = quiet(functional_call, model.train(training), {**given, **buffers}, (x,))
    y.square().mean().backward()
    return {"y": y.detach(), **{name: t.grad for name, t in given.items()}}


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, mode) for name in SMALL for mode in (False, True)), ("resnetv2_18", False)],
)
def test_functional_call_with_gradients(name, training):
    models, x = twins(name), images()
    if not training:
        same(evaluated(models[0], x), evaluated(models[1], x))
    for k in range(2):
        found, expected = (called_with_substitutes(m, x, k, training) for m in models)
        assert all(value is not None for value in expected.values())
        same(found, expected, f"time {k}")
    for model in models:
        assert all(p.grad is None for p in model.parameters())
        model.eval()
    same(evaluated(models[0], x), evaluated(models[1], x), "the weights of its own")


@each_of_few
def test_functional_call_without_gradients(name):
    models, x = twins(name), images()
    own = evaluated(models[1], x)
    for k in range(4):
        results = []
        for model in models:
            given = substitutes(model, k, False)
            with torch.no_grad():
                results.append(functional_call(model, given, (x,)))
        moved(own, results[1])
        same(*results, f"time {k}")
        same(evaluated(models[0], x), own, "the weights of its own")


def test_functional_call_for_some_weights_and_tied_ones():
    models, x = twins("regnet_y"), images()
    for key in ("s1.b1.conv2.conv.weight", "head.fc.bias", "s2.b1.conv1.bn.weight"):
        results = []
        for model in models:
            given = {key: (model.state_dict()[key].clone() * 3).requires_grad_()}
            y = functional_call(model, given, (x,))
            y.sum().backward()
            results.append((y.detach(), given[key].grad, gradients(model)))
            model.zero_grad()
        same(*results, key)


def hypernetwork(model, delete):
    """Every convolution's weight is computed from a generator's parameter."""
    generators = []
    for conv in convolutions(model):
        kept = conv.weight.detach().clone()
        scale = nn.Parameter(torch.ones(len(kept), 1, 1, 1))
        generators.append((conv, kept, scale))
        if delete:
            del conv.weight
    return generators


@each_small
@pytest.mark.parametrize("way", ["attribute", "_parameters", "setattr of a Parameter that requires no grad"])
def test_computed_weights(way, name):
    models, x = twins(name), images()
    same(evaluated(models[0], x), evaluated(models[1], x))
    made = [hypernetwork(model, way == "attribute") for model in models]
    before = None
    for k in range(4):
        results = []
        for model, generators in zip(models, made, strict=True):
            for conv, kept, scale in generators:
                scale.grad = None
                weight = kept * scale * (1 + 0.3 * k)
                if way == "attribute":
                    conv.weight = weight
                elif way == "_parameters":
                    conv._parameters["weight"] = weight
                else:
                    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
            y = quiet(model, x)
            y.square().mean().backward()
            results.append((y.detach(), [scale.grad for _, _, scale in generators], evaluated(model, x)))
        assert way.startswith("setattr") or all(grad is not None for grad in results[1][1])
        same(*results, f"time {k}")
        if before is not None:
            moved(before, results[1][0])
        before = results[1][0]


@each_small
def test_pruned_and_normalised_weights(name):
    """Weights that a hook computes before every call, as plain attributes."""
    models, x = twins(name), images()
    for k, step in enumerate(
        (
            lambda conv: torch.nn.utils.prune.random_unstructured(conv, "weight", 0.4),
            lambda conv: torch.nn.utils.prune.remove(conv, "weight"),
            lambda conv: torch.nn.utils.spectral_norm(conv),
            lambda conv: torch.nn.utils.remove_spectral_norm(conv),
        )
    ):
        for model in models:
            torch.manual_seed(0)
            for conv in convolutions(model):
                step(conv)
        for _ in range(2):
            same(evaluated(models[0], x), evaluated(models[1], x), f"change {k}")


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", SMALL)
def test_replicas_of_data_parallel(name, training):
    """What DataParallel does for each device, on the CPU: replicas whose weights are plain tensors for one call."""
    models, x = twins(name), images()
    factor = 1.2 if training else 0.9  # with the other one rounding is amplified, in timm's gradients too
    results = []
    for model in models:
        model.train(training)
        if not training:
            evaluated(model, x)
        replicas = {id(m): m._replicate_for_data_parallel() for m in model.modules()}
        for replica in replicas.values():
            replica._former_parameters = {}
        for module in model.modules():
            replica = replicas[id(module)]
            for key, child in module._modules.items():
                if child is not None:
                    setattr(replica, key, replicas[id(child)])
            for key, p in module._parameters.items():
                if p is None:
                    replica._parameters[key] = None
                else:
                    setattr(replica, key, p * factor)
                    replica._former_parameters[key] = getattr(replica, key)
            for key, b in module._buffers.items():
                if b is not None:
                    replica._buffers[key] = b.clone()
        y = quiet(replicas[id(model)], x)
        y.square().mean().backward()
        results.append((y.detach(), gradients(model), {n: b.clone() for n, b in model.named_buffers()}))
    assert all(grad is not None for grad in results[1][1].values())
    same(*results)


def loss_of(model, weights, buffers, x):
    return quiet(functional_call, model, (weights, buffers), (x,)).square().mean()


def state(model, k=0):
    generator = torch.Generator().manual_seed(k)
    weights = {
        n: p.detach() * (1 + 0.3 * torch.randn(p.shape, generator=generator)) for n, p in model.named_parameters()
    }
    return weights, {n: b.detach().clone() for n, b in model.named_buffers()}


@each_small
def test_func_grad(name):
    models, x = twins(name), images(2, 32)
    found = [torch.func.grad(loss_of, argnums=1)(m, *state(m), x) for m in models]
    same(*found)


@each_of_few
def test_func_grad_of_each_image(name):
    models, x = twins(name), images(3, 32)
    results = []
    for model in models:
        weights, buffers = state(model)
        one = torch.func.grad(lambda w, image, m=model, b=buffers: loss_of(m, w, b, image[None]))
        results.append(torch.func.vmap(one, (None, 0))(weights, x))
    same(*results)


@each_of_few
def test_func_jacrev_and_jvp(name):
    models, x = twins(name), images(1, 32)
    results = []
    for model in models:
        weights, buffers = state(model)
        bias = next(n for n in weights if n.endswith("fc.bias"))
        norm = next(n for n in weights if ".bn." in n or "norm" in n)

        def run(part, model=model, weights=weights, buffers=buffers):
            return quiet(functional_call, model, ({**weights, **part}, buffers), (x,))

        part = {bias: weights[bias], norm: weights[norm]}
        results.append(
            (
                torch.func.jacrev(run)(part),
                torch.func.jvp(run, (part,), ({n: torch.ones_like(t) for n, t in part.items()},)),
            )
        )
    same(*results)


@each_of_few
def test_an_ensemble_of_stacked_models(name):
    x = images(2, 32)
    results = []
    for side in range(2):
        members = []
        for k in range(3):
            member = twins(name)[side]
            weights, _ = state(member, k)
            member.load_state_dict({**member.state_dict(), **weights})
            evaluated(member, x)
            members.append(member)
        weights, buffers = torch.func.stack_module_state(members)
        base = copy.deepcopy(members[0])

        def run(w, b, base=base):
            return quiet(functional_call, base, (w, b), (x,))

        with torch.no_grad():
            results.append((torch.func.vmap(run)(weights, buffers), [evaluated(member, x) for member in members]))
    same(*results)
