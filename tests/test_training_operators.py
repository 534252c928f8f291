"""The registered operators of a training step: what a compiler finds in a step, and that it computes the same."""

import copy

import pytest
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F
from training_blocks import BLOCKS, NETWORKS, ONE_OF_EACH, assert_equal_states, network_pair, pair_of, state_of

from regnet_fast.backends import backend, passes
from regnet_fast.ops.training_operators import BATCH, GIVEN, NORMED, RAW

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """The larger maps go in two or three parts."""
    monkeypatch.setattr(passes, "_PART_BYTES", 4e4)


class Compiled:
    """A module compiled whole, and the operators and convolutions that the compiler found in it."""

    def __init__(self, module, **options):
        self.found = set()
        self.compiled = torch.compile(module, backend=self.compile, **{"fullgraph": True} | options)

    def call(self, x):
        with backend("aten,reference"):
            return self.compiled(x)

    def compile(self, graph, inputs):
        self.found |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @property
    def operators(self):
        return {name.split(".")[1] for name in self.found if name.startswith("regnet_fast.training_")}

    @property
    def fused(self):
        return bool(self.operators) and not any("batch_norm" in name for name in self.found)


def step(block, call, x, dy):
    """The output, all gradients and all buffers after one step, by name."""
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(dy)
    return {"y": y.detach(), "gradient of x": x.grad} | state_of(block)


def assert_compiled_same(ours, theirs, x, tolerance=1e-12):
    dy = torch.randn_like(copy.deepcopy(theirs)(x))
    compiled = Compiled(ours, fullgraph=False)
    assert_equal_states(step(ours, compiled.call, x, dy), step(theirs, theirs, x, dy), tolerance)
    assert compiled.fused


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in BLOCKS if name not in ONE_OF_EACH]


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *SLOW])
def test_every_block(name, in_float64):
    ours, theirs = (block.double() for block in pair_of(name, nn.SiLU))
    assert_compiled_same(ours, theirs, torch.randn(5, BLOCKS[name][0], 9, 7).double())


def given_statistics(block):
    return freeze_batch_norm_2d(block)


def without_affine(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight = module.bias = None
            module.affine = False
    return block


def without_gradients(block):
    for i, parameter in enumerate(block.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    return block


CHANGES = (given_statistics, without_affine, without_gradients)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["Bottleneck of width 8", "PreActBottleneck, strided", "RepVggBlock"])
def test_other_norms_and_gradients(name, change, in_float64):
    ours, theirs = (block.double() for block in pair_of(name))
    if change is given_statistics:
        ours, theirs = (nn.Sequential(change(block)) for block in (ours, theirs))
    else:
        ours, theirs = change(ours), change(theirs)
    assert_compiled_same(ours, theirs, torch.randn(5, BLOCKS[name][0], 9, 7).double())


def assert_one_graph(ours, shape):
    torch._dynamo.utils.counters.clear()
    eager, compiled = copy.deepcopy(ours), Compiled(ours, dynamic=True)
    for n in (4, 6, 3):
        x, found = torch.randn(n, *shape), []
        for model, call in ((ours, compiled.call), (eager, eager)):
            model.zero_grad()
            torch.manual_seed(n)
            call(x).square().mean().backward()
            found.append(state_of(model))
        assert_equal_states(*found, 1e-6)
    assert compiled.fused and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_any_batch():
    assert_one_graph(pair_of("Bottleneck of width 8")[0], (48, 9, 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_at_any_batch(name):
    """With stochastic depth."""
    assert_one_graph(network_pair(name, drop_path_rate=0.3)[0], (3, 48, 32))


def test_under_autocast():
    ours, _ = pair_of("BottleneckBlock, strided")
    eager, compiled, x = copy.deepcopy(ours), Compiled(ours), torch.randn(4, 24, 9, 7)
    found = []
    for model, call in ((ours, compiled.call), (eager, eager)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x).square().mean()
        loss.backward()
        found.append(state_of(model))
    assert compiled.operators
    for key, value in found[0].items():
        if value.is_floating_point():
            assert (value - found[1][key]).norm() <= 0.02 * found[1][key].norm() + 1e-5, key


@pytest.mark.slow
def test_with_checkpointing(in_float64):
    """A compiler computes a block again without its running statistics, ours as timm's."""
    pair, x = network_pair(), torch.randn(4, 3, 32, 32).double()
    found = []
    for model in pair:
        model.double().set_grad_checkpointing()
        F.cross_entropy(Compiled(model).call(x), torch.arange(4)).backward()
        found.append(state_of(model))
    assert_equal_states(*found)


def test_through_inductor():
    ours, theirs = pair_of("Bottleneck of width 8")
    x, dy = torch.randn(4, 48, 9, 7), torch.randn(4, 48, 9, 7)
    compiled = torch.compile(ours, fullgraph=True)
    with backend("aten"):
        found = step(ours, compiled, x, dy)
    assert_equal_states(found, step(theirs, theirs, x, dy), 1e-4)


def averaged(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def hooked(block):
    block.conv2.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [averaged, hooked])
def test_what_a_compiler_gets_from_the_host(change, in_float64):
    ours, theirs = (block.double() for block in pair_of("Bottleneck of width 8"))
    change(ours), change(theirs)
    x, dy = torch.randn(4, 48, 9, 7).double(), torch.randn(4, 48, 9, 7).double()
    compiled = Compiled(ours, fullgraph=False)
    assert_equal_states(step(ours, compiled.call, x, dy), step(theirs, theirs, x, dy))
    assert not compiled.operators


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_only_where_a_backend_is_forced(name):
    ours, _ = pair_of("Bottleneck of width 8")
    compiled = Compiled(ours)
    with backend(name):
        compiled.compiled(torch.randn(2, 48, 6, 6))
    assert compiled.found and not compiled.operators


def test_a_second_derivative_is_refused(in_float64):
    ours, _ = (block.double() for block in pair_of("Bottleneck of width 8"))
    x = torch.randn(2, 48, 6, 6).double().requires_grad_()
    y = Compiled(ours).call(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd"):
        dx.sum().backward()


# Registration


def norm(channels, dtype):
    """Mean, variance, weight and bias of a map that is about normal."""
    found = (torch.randn(channels) * 0.1, torch.rand(channels) + 0.5, torch.rand(channels) + 0.5, torch.randn(channels))
    return [t.to(dtype).requires_grad_(i > 1) for i, t in enumerate(found)]


def calls(dtype):
    """Arguments of every operator with a gradient."""
    wide = torch.promote_types(dtype, torch.float32)

    def leaf(*shape, scale=1.0):
        t = (scale * torch.randn(shape)).to(dtype)
        return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()

    x = leaf(3, 12, 6, 5)
    strided, plain = [2, 2, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 3]
    given = [t.detach() for t in norm(8, wide)[:3]]
    two = [leaf(10, 12, 1, 1), leaf(8, 12, 1, 1)]
    pair = (two, [*strided, *strided], [None, None, None, given[2], *given[:2]], [1e-5, 1e-3], [True, False])
    excite = [
        t.to(wide).requires_grad_() for t in (torch.randn(3, 12), torch.randn(3), torch.randn(12, 3), torch.randn(12))
    ]
    grouped = ([leaf(12, 4, 3, 3)], plain, [None] * 3, [1e-5], [True])
    yield "training_convs", (x, norm(12, wide), 1e-5, "silu", NORMED, excite, "relu", *grouped, "auto")
    yield "training_convs", (x, norm(12, wide), 1e-5, "relu", BATCH, [], "none", *pair, "auto")
    yield "training_convs", (x, norm(12, wide), 1e-5, "silu", GIVEN, [], "none", *pair, "aten")
    yield "training_convs", (x, [], 0.0, "none", RAW, [], "none", *pair, "auto")
    factor, y = torch.rand(3, 1, 1, 1).to(dtype), leaf(3, 12, 6, 5)
    for activation in ("none", "relu", "silu"):
        for own, how in (("none", NORMED), ("silu", NORMED), ("none", BATCH)):
            arguments = (
                [x, y],
                norm(12, wide),
                [1e-5, 0.0],
                f"{own} none",
                [how, RAW],
                [None, None],
                activation,
                "auto",
            )
            yield "training_join", arguments
    both = norm(12, wide) + norm(12, wide)
    yield "training_join", ([x, y], both, [1e-5] * 2, "none none", [NORMED, NORMED], [factor, None], "relu", "auto")
    yield "training_enter", (x, "auto")
    weights, geometries = [leaf(12, 12, 3, 3, scale=0.1), leaf(12, 12, 1, 1)], [*plain[:6], 1, 1, 1, 0, 0, 1, 1, 1]
    for count in (2, 3):
        affines = [t.requires_grad_() for _ in range(count) for t in norm(12, wide)[2:]]
        given = [None, None] * count
        branches = (weights, geometries, affines, given, [1e-5] * count, [True] * count)
        yield "training_repvgg", (factor if count == 3 else None, x, *branches, "relu", "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for i, (name, arguments) in enumerate(calls(dtype)):
        more = ["test_aot_dispatch_dynamic"] if dtype == torch.float64 and i % 4 == 0 else []
        torch.library.opcheck(getattr(torch.ops.regnet_fast, name), arguments, test_utils=checks + more)
