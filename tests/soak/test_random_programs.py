"""Random sequences of what users do to a model, on ours and on timm's twin, compared after every step.

Networks are smooth, so that gradients have no leaps. Every action that changes a weight changes it by percents and
more, a hundred times what the comparison grants in float32. Both twins take the same optimizer step, with timm's
gradients, so that they never drift apart; the gradients themselves are compared before.
"""

import copy
import inspect
import io
import warnings

import pytest
import torch
from amount import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import FAMILIES, networks
from torch import nn
from torch.func import functional_call

import regnet_fast
from regnet_fast.blocks.fused import FallbackWarning

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

DTYPES = [torch.float32, torch.float64]
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES.append(torch.bfloat16)
GRANTED = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.2}
LARGEST = 1e4  # beyond it a network amplifies rounding


def optimizers():
    """Every optimizer of torch with dense gradients, in each of its implementations, with its rate."""
    rates = dict(Adadelta=3.0, Adafactor=0.1, ASGD=0.1, SGD=0.1, RMSprop=0.003, Rprop=0.03)
    found = []
    for name, cls in sorted(vars(torch.optim).items()):
        if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
            continue
        if name not in ("Optimizer", "SparseAdam", "LBFGS", "Muon"):
            options = [{}, *({one: True} for one in ("foreach", "fused") if one in inspect.signature(cls).parameters)]
            found += [(cls, {"lr": rates.get(name, 0.03), **option}) for option in options]
    return found


OPTIMIZERS = optimizers()


class Different(AssertionError):
    pass


class Over(Exception):
    """timm refuses too, or the numbers are too large to go on."""


class Twins:
    """Our model and timm's, and where a program is with them."""

    def __init__(self, network, theirs):
        self.network, self.theirs = network, theirs
        self.ours = regnet_fast.rebuild(copy.deepcopy(self.theirs)).model
        self.dtype, self.size, self.frozen, self.handles = torch.float32, (40, 40), False, []

    @property
    def both(self):
        return self.ours, self.theirs

    def images(self, random):
        return torch.randn(3, self.network.in_chans, *self.size, generator=random).to(self.dtype)

    def thaw(self):
        """What follows is not covered by the promise of `freeze`."""
        if self.frozen:
            for model in self.both:
                model.eval()
            self.frozen = False

    def same(self, ours, theirs, what, typical=0.0):
        if ours is None or theirs is None:
            if ours is not theirs:
                raise Different(f"{what}: ours {ours}, timm's {theirs}")
            return
        ours, theirs = ours.detach(), theirs.detach()
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Different(f"{what}: ours {ours.dtype} {ours.shape}, timm's {theirs.dtype} {theirs.shape}")
        if not theirs.numel():
            return
        size = theirs.abs().max().item()
        if not size < LARGEST:
            raise Over
        granted = GRANTED[self.dtype] * max(size, typical)
        error = (ours - theirs).abs().max().item()
        if not error <= granted:
            raise Different(f"{what}: differs by {error:.3g} of {size:.3g}, granted {granted:.3g}")

    def each(self, call):
        """`call(model)` of both, which raise alike or not at all."""
        found = []
        for model in self.both:
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FallbackWarning)
                    found.append(call(model))
            except Exception as error:
                found.append(error)
        ours, theirs = found
        if isinstance(theirs, Exception):
            if type(ours) is not type(theirs):
                raise Different(f"ours {ours!r}, timm's {theirs!r}")
            raise Over
        if isinstance(ours, Exception):
            raise Different(f"ours {ours!r}") from ours
        return ours, theirs

    def look(self, random):
        """An evaluation without gradients in the mode that the models are in, and the buffers."""
        x = self.images(random)
        with torch.no_grad():
            self.same(*self.each(lambda model: model(x)), "output")
        for (name, a), b in zip(self.ours.named_buffers(), self.theirs.buffers(), strict=True):
            self.same(a, b, name)

    def gradients(self, random):
        """Forward and backward; timm's gradients are in both afterwards, each in units of its weight."""
        x = self.images(random)
        inputs = []

        def backward(model):
            model.zero_grad()
            image = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
            inputs.append(image)
            y = model(image)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
            (y * weights).sum().backward()
            return y

        self.same(*self.each(backward), "output with gradients")
        leaves = [
            {"the image": x, **dict(model.named_parameters())} for x, model in zip(inputs, self.both, strict=True)
        ]

        def again(model):
            try:
                torch.manual_seed(0)
                backward(model)
            except RuntimeError:  # weights that are computed are of another dtype
                return {}
            return {"the image": inputs[-1].grad, **{name: p.grad for name, p in model.named_parameters()}}

        self.same_gradients(*leaves, "gradient of", again)
        for name, b in self.theirs.named_parameters():
            if b.grad is not None:
                b.grad.mul_(rms(b.detach()).clamp(min=0.1) / rms(b.grad).clamp(min=1e-20))
                leaves[0][name].grad.copy_(b.grad)

    def same_gradients(self, ours, theirs, what, again):
        """Those of leaves by name. One that differs is judged by float64's: `again(model)` are those of another twin of
        timm's by name, or none where it cannot be had.
        """
        sizes = [b.grad.abs().max() for b in theirs.values() if b.grad is not None]
        typical = 1e-2 * torch.stack(sizes).double().median().item() if sizes else 0.0
        exact = None
        for name, b in theirs.items():
            a = ours[name].grad
            try:
                self.same(a, b.grad, f"{what} {name}", typical)
            except Different:
                if exact is None:
                    exact = again(copy.deepcopy(self.theirs).double())
                    rounded = again(copy.deepcopy(self.theirs).to(memory_format=torch.channels_last))
                if not as_exact(a, (b.grad, rounded.get(name)), exact.get(name), typical):
                    raise


def as_exact(ours, theirs, exact, typical):
    """Whether a gradient is as near to float64's as timm's in one of its two layouts: what cancels out leaves nothing
    but rounding in all of them.

    A difference of more than a typical gradient's hundredth is none of rounding.
    """
    if ours is None or exact is None or any(one is None for one in theirs):
        return False
    error, *others = ((one.double() - exact).abs().max().item() for one in (ours, *theirs))
    return error <= min(8 * max(others), typical)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def rms(t):
    return t.square().mean().sqrt()


def noise(like, random, scale):
    return (torch.randn(like.shape, generator=random) * scale).to(like.dtype)


def layers(model, kind):
    return [(path, m) for path, m in model.named_modules() if isinstance(m, kind)]


def seeded(random):
    """A generator for each twin that gives the same numbers."""
    seed = int(torch.randint(2**31, (), generator=random))
    return lambda: torch.Generator().manual_seed(seed)


def pick(random, some):
    return some[int(torch.randint(len(some), (), generator=random))]


# Actions: (twins, generator). Those in KEEPS_FROZEN keep to the promise of `freeze` or lift it by themselves.


def evaluate(t, random):
    t.look(random)


def evaluate_with_gradients(t, random):
    t.gradients(random)


def train_step(t, random):
    t.thaw()
    was = t.theirs.training
    for model in t.both:
        model.train()
    t.gradients(random)
    step(t, random)
    if pick(random, [True, False]):
        for model in t.both:
            model.train(was)


def step_in_evaluation(t, random):
    t.thaw()
    for model in t.both:
        model.eval()
    for _ in range(2):
        t.gradients(random)
        step(t, random)
        t.look(random)


def step(t, random):
    cls, options = pick(random, OPTIMIZERS)
    for model in t.both:
        trained = [p for p in model.parameters() if p.grad is not None]
        if trained:
            cls(trained, **options).step()


def load_weights(t, random):
    made = seeded(random)
    for model in t.both:
        generator = made()
        state = {
            k: v + noise(v, generator, 0.3) * v.abs().mean() if v.is_floating_point() and "running_var" not in k else v
            for k, v in model.state_dict().items()
        }
        model.load_state_dict(state, assign=False)
    t.frozen = False


def assign_data(t, random):
    """The second time the address of the first one comes back."""
    t.thaw()
    times, made = 1 + int(torch.randint(3, (), generator=random)), seeded(random)
    for model in t.both:
        generator = made()
        for p in model.parameters():
            for _ in range(times):
                factor = 0.7 + 0.6 * torch.rand((), generator=generator).item()
                p.data = p.data * factor


def transpose_data(t, random):
    """The same memory read in another order."""
    t.thaw()
    for model in t.both:
        for _, conv in layers(model, nn.Conv2d):
            if conv.weight.shape[0] == conv.weight.shape[1]:
                conv.weight.data = conv.weight.data.transpose(0, 1)


def exchange_data(t, random):
    t.thaw()
    for model in t.both:
        by_shape = {}
        for _, conv in layers(model, nn.Conv2d):
            by_shape.setdefault(conv.weight.shape, []).append(conv.weight)
        for group in by_shape.values():
            data = [p.data for p in group]
            for p, other in zip(group, [*data[1:], data[0]], strict=True):
                p.data = other.flip(0) if len(group) == 1 else other


def write_in_place(t, random):
    t.thaw()
    made = seeded(random)
    for model in t.both:
        generator = made()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(noise(p, generator, 0.3) * p.abs().mean())


def call_with_substitutes(t, random):
    t.thaw()
    x, made, wanted = t.images(random), seeded(random), pick(random, [True, False])
    given = []

    def call(model):
        generator = made()
        weights = {
            n: (p.detach() * (1 + noise(p, generator, 0.3))).requires_grad_(wanted) for n, p in model.named_parameters()
        }
        given.append(weights)
        with torch.set_grad_enabled(wanted):
            y = functional_call(model, weights, (x,))
        if wanted:
            y.square().mean().backward()
        return y

    def again(model):
        """timm's with the same weights."""
        dtype = next(model.parameters()).dtype
        weights = {n: w.detach().to(dtype, copy=True) for n, w in given[1].items()}
        if dtype == t.dtype:
            weights = {n: channels_last(w) for n, w in weights.items()}
        weights = {n: w.requires_grad_() for n, w in weights.items()}
        functional_call(model, weights, (x.to(dtype),)).square().mean().backward()
        return {n: w.grad for n, w in weights.items()}

    t.same(*t.each(call), "output of functional_call")
    t.same_gradients(*given, "gradient of the substitute of", again)


def compute_weights(t, random):
    """Some convolutions' weights are computed for a while, as a hypernetwork does."""
    t.thaw()
    paths = [path for path, m in layers(t.theirs, nn.Conv2d) if isinstance(m._parameters.get("weight"), nn.Parameter)]
    chosen = [path for path in paths if pick(random, [True, False])]
    kept = [{path: model.get_submodule(path).weight for path in chosen} for model in t.both]
    scale = torch.tensor(1.3, dtype=t.dtype)
    for k in range(2):
        for model, weights in zip(t.both, kept, strict=True):
            for path, weight in weights.items():
                conv = model.get_submodule(path)
                conv._parameters.pop("weight", None)
                conv.__dict__["weight"] = weight.detach() * scale**k
        t.look(random)
    for model, weights in zip(t.both, kept, strict=True):
        for path, weight in weights.items():
            conv = model.get_submodule(path)
            del conv.__dict__["weight"]
            conv.weight = weight


def replace_a_layer(t, random):
    t.thaw()
    kind = pick(random, [nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.SiLU, nn.Parameter])
    if kind is nn.Parameter:
        path, made = pick(random, [n for n, _ in t.theirs.named_parameters()]), seeded(random)
        for model in t.both:
            owner, _, key = path.rpartition(".")
            old = model.get_parameter(path)
            fresh = nn.Parameter(old.detach() * (1 + noise(old, made(), 0.5)), old.requires_grad)
            setattr(model.get_submodule(owner), key, fresh)
        return
    paths = [path for path, _ in layers(t.theirs, kind)]
    if not paths:
        return
    path, made, wraps = pick(random, paths), seeded(random), pick(random, [True, False])
    for model in t.both:
        fresh = nn.Hardswish() if kind is nn.SiLU else copy.deepcopy(model.get_submodule(path))
        with torch.no_grad():
            for p in fresh.parameters():
                p.mul_(1 + noise(p, made(), 0.5))
        if kind is nn.Conv2d and wraps:
            fresh = nn.Sequential(fresh)
        model.set_submodule(path, fresh.train(model.training))


class Scale:
    def __call__(self, module, inputs, output):
        return output * 1.3 if isinstance(output, torch.Tensor) else output


def add_a_hook(t, random):
    t.thaw()
    path = pick(random, [path for path, _ in t.theirs.named_modules()])
    for model in t.both:
        t.handles.append(model.get_submodule(path).register_forward_hook(Scale()))


def remove_hooks(t, random):
    t.thaw()
    for handle in t.handles:
        handle.remove()
    t.handles.clear()


def change_dtype(t, random):
    """Statistics that differ by a rounding of the old dtype are timm's from here on."""
    t.dtype = pick(random, DTYPES)
    with torch.no_grad():
        for a, b in zip(t.ours.buffers(), t.theirs.buffers(), strict=True):
            a.copy_(b)
    for model in t.both:
        model.to(t.dtype)
    t.frozen = False


def freeze(t, random):
    if t.theirs.training:
        for model in t.both:
            model.eval()
    regnet_fast.freeze(t.ours)
    t.frozen = True


def deep_copy(t, random):
    remove_hooks(t, random)
    t.ours, t.theirs = copy.deepcopy(t.ours), copy.deepcopy(t.theirs)
    t.frozen = False


def saved_and_loaded(t, random):
    remove_hooks(t, random)
    found = []
    for model in t.both:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        found.append(torch.load(file, weights_only=False))
    t.ours, t.theirs = found
    t.frozen = False


def change_the_size(t, random):
    t.size = pick(random, [(40, 40), (48, 32), (32, 56), (33, 41)])


def toggle_requires_grad(t, random):
    seeds = torch.rand(len(list(t.theirs.parameters())), generator=random) < 0.7
    for model in t.both:
        for p, wanted in zip(model.parameters(), seeds.tolist(), strict=True):
            p.requires_grad_(wanted)


def change_the_mode(t, random):
    training = pick(random, [True, False])
    for model in t.both:
        model.train(training)
    t.frozen = False


def norms_in_evaluation(t, random):
    """Training with frozen norms."""
    t.thaw()
    for model in t.both:
        model.train()
        for _, norm in layers(model, nn.modules.batchnorm._BatchNorm):
            norm.eval()


def change_norms(t, random):
    t.thaw()
    eps, momentum = pick(random, [1e-5, 1e-3, 0.3]), pick(random, [0.1, 0.5, None])
    for model in t.both:
        for _, norm in layers(model, nn.modules.batchnorm._BatchNorm):
            norm.eps, norm.momentum = eps, momentum


def change_statistics(t, random):
    t.thaw()
    for model in t.both:
        for _, norm in layers(model, nn.modules.batchnorm._BatchNorm):
            if norm.running_mean is not None:
                norm.running_mean.add_(0.3 * norm.running_var.sqrt())
                norm.running_var.mul_(1.3)


def reset_classifier(t, random):
    t.thaw()
    classes = pick(random, [3, 7, 0])
    for model in t.both:
        torch.manual_seed(1)
        model.reset_classifier(classes)
        model.to(t.dtype)


def rebuild_again(t, random):
    remove_hooks(t, random)
    regnet_fast.restore(t.ours)
    if pick(random, [True, False]):
        t.look(random)
    regnet_fast.rebuild(t.ours)
    t.frozen = False


ACTIONS = (
    evaluate,
    evaluate_with_gradients,
    train_step,
    step_in_evaluation,
    load_weights,
    assign_data,
    transpose_data,
    exchange_data,
    write_in_place,
    call_with_substitutes,
    compute_weights,
    replace_a_layer,
    add_a_hook,
    remove_hooks,
    change_dtype,
    freeze,
    deep_copy,
    saved_and_loaded,
    change_the_size,
    toggle_requires_grad,
    change_the_mode,
    norms_in_evaluation,
    change_norms,
    change_statistics,
    reset_classifier,
    rebuild_again,
)
NAMED = {action.__name__: action for action in ACTIONS}

programs = st.lists(
    st.tuples(st.sampled_from(sorted(NAMED)), st.integers(0, 2**16), st.booleans()), min_size=3, max_size=8
)
"""Actions, the seed of each, and whether somebody looks at the result of it."""


def run(network, program, model=None):
    """How many actions were done before timm refused one, all if it did not. Raises `Different`."""
    twins = Twins(network, model or network.make())
    done = []
    try:
        twins.look(torch.Generator().manual_seed(0))
        for name, seed, looks in [*program, ("evaluate", 1, True)]:
            done.append(name)
            random = torch.Generator().manual_seed(seed)
            NAMED[name](twins, random)
            if looks:
                twins.look(random)
    except Over:
        return len(done) - 1
    except Different as error:
        raise Different(f"after {', '.join(done)}: {error}\nrun({network!r}, {program!r})") from error
    return len(done)


def beyond_memory(model):
    """Strided 1x1 convolutions of few channels, in which timm's own step in channels_last writes beyond its memory
    (docs/training.md).
    """
    strided = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) < m.stride)
    return any(conv.in_channels < 16 for conv in strided)


@pytest.mark.parametrize("family", FAMILIES)
@examples(67)
@given(data=st.data())
def test_programs(family, tally, data):
    """200 programs together in the short form."""
    network, program = data.draw(networks(family, smooth=True)), data.draw(programs)
    model = network.make()
    assume(not beyond_memory(model))
    tally.count("inputs")
    done = run(network, program, model)
    tally.count("actions", done)
    if done <= len(program):
        tally.count("programs that ended where timm refused too")
