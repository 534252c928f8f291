"""A rebuilt network in evaluation on a CPU is one program, and is timm's as soon as somebody comes between."""

import copy
import functools
import gc
import io
import itertools
import pickle
import threading
import warnings
import weakref

import pytest
import timm
import torch
from helpers import assert_close_to_reference, close, randomize_bn
from torch import nn

import regnet_fast
from regnet_fast.backends import BackendError, ConvProblem, Geometry, native
from regnet_fast.blocks import program
from regnet_fast.blocks.fused import FallbackWarning
from regnet_fast.blocks.network import Network
from regnet_fast.hosts import timm as hosts
from regnet_fast.trials import cpu

REASON = native.refuse(ConvProblem((1, 8, 8, 8), 8, (1, 1), Geometry(), "relu", False, False, torch.float32, "cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LAST = torch.channels_last
NETWORKS = ["regnetx_002", "regnety_002", "regnetz_005", "regnetv_040", "repvgg_a0", "resnetv2_18", "resnetv2_50"]
# A network of each class, with a stage of it and two of that stage's blocks.
PLACES = {
    "regnety_002": ("s3", "s3.b2", "s3.b3"),
    "repvgg_a0": ("stages.2", "stages.2.1", "stages.2.2"),
    "resnetv2_18": ("stages.2", "stages.2.blocks.0", "stages.2.blocks.1"),
}
LOOSE = {
    ("regnetv_040", "stem"): ("hook", "other layer", "weights"),
    ("regnetv_040", "final_conv"): ("hook", "other layer", "nothing in its place"),
    ("regnetz_040", "final_conv"): ("hook", "other layer", "nothing in its place"),
    ("resnetv2_18", "norm"): ("hook", "other layer", "nothing in its place", "weights", "statistics", "training"),
}
"""Layers that stand in no block and belong to a network's program, and what may happen to them."""
ORDERS = ("change, promise, call", "promise, change, call", "promise, call, change", "change, call", "call, change")
"""When a model is changed, for one that is frozen and for one that is not."""


@functools.cache
def made(name: str, classes: int = 10) -> nn.Module:
    return randomize_bn(timm.create_model(name, num_classes=classes).eval(), 0)


def twins(name: str, classes: int = 10) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours."""
    theirs = copy.deepcopy(made(name, classes))
    return theirs, regnet_fast.rebuild(copy.deepcopy(theirs)).model


@pytest.fixture(params=PLACES)
def name(request) -> str:
    return request.param


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def ran(monkeypatch) -> list[program.Program]:
    """The programs of blocks, in the order of their calls that counted."""
    heard, call = [], program.Program.__call__

    def listening(self, x, check=None):
        y = call(self, x, check)
        if y is not None:
            heard.append(self)
        return y

    monkeypatch.setattr(program.Program, "__call__", listening)
    return heard


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# What it computes


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deployed", [False, True], ids=["as trained", "deployed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_same_function_by_one_program(name, deployed, dtype, ran, monkeypatch):
    """Of one image, of three and of a batch in parts, in NCHW and channels_last, held to float64."""
    if deployed and name != "repvgg_a0":
        pytest.skip("it has no other form")
    theirs = copy.deepcopy(made(name, 1000)).to(dtype)
    exact, eager = copy.deepcopy(theirs).double(), timm.utils.reparameterize_model(theirs).to(memory_format=LAST)
    ours = regnet_fast.rebuild(copy.deepcopy(eager if deployed else theirs)).model
    monkeypatch.setattr(program, "_BYTES_PER_THREAD", 1e9)
    for shape in [(1, 3, 64, 64), (3, 3, 47, 65)]:
        x, ours = torch.randn(shape).to(dtype), copy.deepcopy(ours)
        expected, theirs = exact(x.double()), eager(x.contiguous(memory_format=LAST))
        found = ours(x)
        assert_close_to_reference(found, theirs, expected, f"{name}, {shape}")
        assert len(ran) == 1
        last = ours(x.contiguous(memory_format=LAST))
        assert torch.equal(last, found) or (name == "regnetv_040" and len(ran) == 2)  # whose stem is the host's
        close(last, found)
        if shape[0] > 1:
            whole = len(ran[-1]._run._places)
            for room in (30_000, 120_000):  # neighbouring stages take as many images, all of them or some
                monkeypatch.setattr(program, "_BYTES_PER_THREAD", room)
                assert torch.equal(copy.deepcopy(ours)(x), found) and len(ran[-1]._run._places) > whole
            with monkeypatch.context() as patch:  # in parts for the matrix unit alone, on any machine
                patch.setattr(program, "_BYTES_PER_THREAD", 1e9)
                patch.setattr(program, "_beside_the_matrix_unit", lambda steps: 2)
                assert torch.equal(copy.deepcopy(ours)(x), found) and len(ran[-1]._run._places) > whole
        ran.clear()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_the_number_of_threads(name, dtype, threads):
    found, x = [], torch.randn(3, 3, 47, 65).to(dtype)
    for count in (1, 2, 3):
        threads(count)
        found.append(twins(name)[1].to(dtype)(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_images_beside_the_matrix_unit(threads):
    """As many as the widest map fits for, in powers of two, where the weights of all steps fit as well."""

    def step(images, c, k, side, way):
        geometry = Geometry(padding=(1, 1))
        facts = ("relu", False, False, torch.bfloat16, "cpu")
        made = native.conv_step(ConvProblem((images, c, side, side), k, (3, 3), geometry, *facts))
        made.way = way
        return made

    threads(2)
    assert program._beside_the_matrix_unit([]) is None
    assert program._beside_the_matrix_unit([step(64, 64, 64, 56, native.DIRECT)]) is None
    narrow, wide = step(64, 64, 64, 28, native.MATRIX), step(64, 64, 256, 56, native.MATRIX)
    assert program._beside_the_matrix_unit([narrow]) == 32  # of 0.1 MB in 5 MB
    assert program._beside_the_matrix_unit([narrow, wide]) == 2  # of 1.6 MB
    assert program._beside_the_matrix_unit([narrow, step(64, 4, 8, 700, native.MATRIX)]) == 1  # of 7.8 MB
    threads(1)
    assert program._beside_the_matrix_unit([narrow, wide]) == 1
    assert program._beside_the_matrix_unit([narrow, step(64, 1024, 512, 14, native.MATRIX)]) is None  # 9 MB of weights


@torch.no_grad()
def test_other_sizes_share_the_packed_weights(name, ran, monkeypatch):
    """Of each size the result is right, also behind more sizes than programs are kept for."""
    theirs, ours = twins(name)
    packed, init = [], native.Weights.__init__
    monkeypatch.setattr(native.Weights, "__init__", lambda self, *given: packed.append(1) or init(self, *given))
    images = [torch.randn(n, 3, h, w) for n, h, w in itertools.product((1, 2), (32, 33, 64), (47, 80))]
    for x in images * 2:
        close(ours(x), theirs(x))
    assert len(ran) == 2 * len(images)
    once = len(packed)
    close(twins(name)[1](images[0]), theirs(images[0]))
    assert len(packed) == 2 * once


@torch.no_grad()
def test_odd_images(name, ran):
    """Views, repeated rows and memory of other layouts are read as what they say, and stay as they are."""
    theirs, ours = twins(name)
    x = torch.randn(2, 3, 64, 64)
    for view in (
        x.flip(3),
        x.transpose(2, 3),
        x[:1].expand(3, -1, -1, -1),
        torch.randn(4, 3, 130, 130)[::2, :, 1:-1:2, 1:-1:2],
        torch._neg_view(x),
        nn.Parameter(x),
        torch.randn(64, 64, 2, 3).permute(2, 3, 0, 1),
    ):
        kept = view.clone()
        close(ours(view), theirs(view))
        assert torch.equal(view, kept)


@torch.no_grad()
def test_what_timm_refuses_raises_what_timm_raises(name, x):
    theirs, ours = twins(name)
    close(ours(x), theirs(x))
    for wrong in (x[:, :1], x.repeat(1, 2, 1, 1), x.double(), x.bfloat16(), x.long(), x[0, 0], None):
        errors = []
        for model in (theirs, ours):
            with pytest.raises(Exception) as caught, warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                model(wrong)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    assert ours(x[:0]).shape == theirs(x[:0]).shape == (0, 10)
    close(ours(x), theirs(x))


# Who comes between


def assert_followed(name, x, change, orders=ORDERS):
    """What `change` does to a model it does to ours, whenever it does; it gives a list of what was called, if anything.

    It has to change something: the result or the list.
    """
    for order in orders:
        theirs, ours = twins(name)
        results, lists = [], []
        for model in (theirs, ours):
            before = made(name)(x)
            for step in order.split(", "):
                if step == "promise" and model is ours:
                    regnet_fast.freeze(model)
                if step == "call":
                    model(x)
                if step == "change":
                    lists.append(change(model))
            if lists[-1]:
                lists[-1].clear()
            results.append(model(x))
            assert lists[-1] or results[-1].shape != before.shape or not torch.allclose(results[-1], before), order
        close(results[1], results[0])
        assert lists[0] is None or len(lists[0]) == len(lists[1]), order
        close(ours(x), results[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["forward", "pre", "with what it gives"])
def test_a_hook_is_called(name, x, kind):
    """On the network, the stem, a stage, a block, and the head."""

    def listen(path):
        def change(model):
            called, module = [], model.get_submodule(path)
            if kind == "pre":
                module.register_forward_pre_hook(lambda module, given: called.append(1))
            elif kind == "forward":
                module.register_forward_hook(lambda module, given, y: called.append(1))
            else:
                module.register_forward_hook(lambda module, given, y: called.append(1) or 2 * y)
            return called

        return change

    for path in ("", "stem", *PLACES[name], "head"):
        assert_followed(name, x, listen(path))


@torch.no_grad()
@pytest.mark.parametrize("of", ["layer", "container", "nothing"])
def test_a_hook_where_the_promise_does_not_reach_is_called(name, x, of):
    """On a layer inside a block of a model that is not frozen; on what stands around the blocks, be it an Identity."""
    path, orders = {
        "layer": (f"{PLACES[name][1]}.{'conv_kxk.conv' if name == 'repvgg_a0' else 'conv1'}", ORDERS[3:]),
        "container": ("" if name == "regnety_002" else "stages", ORDERS),
        "nothing": ("norm" if name == "resnetv2_18" else "final_conv", ORDERS),
    }[of]

    def change(model):
        called = []
        model.get_submodule(path).register_forward_hook(lambda module, given, y: called.append(1) or y * 2)
        return called

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_followed(name, x, change, orders)


@torch.no_grad()
def test_a_hook_that_was_removed_leaves_one_program(name, x, ran):
    behind = "norm" if name == "resnetv2_18" else "final_conv"
    for promise, path in itertools.product((False, True), ("stem", *PLACES[name], behind, "head")):
        _, ours = twins(name)
        if promise:
            regnet_fast.freeze(ours)
        expected = ours(x)
        handle = ours.get_submodule(path).register_forward_hook(lambda *given: None)
        ours(x)
        handle.remove()
        ran.clear()
        assert torch.equal(ours(x), expected) and len(ran) == 1


@torch.no_grad()
@pytest.mark.parametrize(("name", "path", "kind"), [(*place, kind) for place, kinds in LOOSE.items() for kind in kinds])
def test_a_layer_in_no_block_is_followed(name, path, kind, x):
    """It is a part of the network's program, and looked at in every call."""

    def change(model):
        torch.manual_seed(1)
        layer, called = model.get_submodule(path), None
        if kind == "hook":
            called = []
            layer.register_forward_hook(lambda module, given, y: called.append(1) or 2 * y)
        elif kind == "weights":
            layer.weight.mul_(torch.rand_like(layer.weight))
        elif kind == "statistics":
            layer.running_mean.add_(torch.rand_like(layer.running_mean))
        elif kind == "training":
            layer.train()
        elif kind == "nothing in its place":
            model.set_submodule(path, nn.Identity())
        elif path == "final_conv":
            model.set_submodule(path, nn.Hardtanh())
        else:
            new = copy.deepcopy(layer)
            new.weight.mul_(torch.rand_like(new.weight))
            model.set_submodule(path, new)
        return called

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_followed(name, x, change)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("promise", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", ["regnetv_040", "regnetz_040", "resnetv2_18", "resnetv2_50", "resnet18"])
def test_layers_in_no_block_belong_to_the_program(name, promise, dtype, ran, monkeypatch):
    """None of timm's layers is called, the result is that of float64, and autocast and autograd are timm's."""
    theirs = copy.deepcopy(made(name, 1000)).to(dtype)
    exact, eager = copy.deepcopy(theirs).double(), copy.deepcopy(theirs).to(memory_format=LAST)
    ours, plain = (regnet_fast.rebuild(copy.deepcopy(theirs)).model for _ in range(2))
    if promise:
        regnet_fast.freeze(ours)
    called = []
    for shape in [(1, 3, 64, 64), (3, 3, 47, 65)]:
        x = torch.randn(shape).to(dtype)
        expected = exact(x.double())
        with monkeypatch.context() as patch:
            for cls in {type(m) for m in theirs.modules() if not [*m.children()]} - {nn.Identity}:
                forward = cls.forward
                patch.setattr(cls, "forward", lambda self, x, f=forward: called.append(type(self)) or f(self, x))
            found = ours(x)
            assert not called and len(ran) == 1
        assert_close_to_reference(found, eager(x.contiguous(memory_format=LAST)), expected, f"{name}, {shape}")
        assert torch.equal(ours(x.contiguous(memory_format=LAST)), found)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == theirs(x).dtype
            assert torch.equal(ours(x), plain(x))
        ran.clear()
    with torch.enable_grad():
        x = x.float().to(dtype).requires_grad_()
        assert torch.equal(ours(x), plain(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["regnetv_040", "resnetv2_18"])
def test_nothing_of_a_layer_in_no_block_is_left(name, x):
    """Its class is timm's; what was derived from it goes neither into copies nor files, and ends with the promise."""
    theirs, ours = twins(name)
    before, classes = set(ours.__dict__), [type(m) for m in theirs.modules() if not [*m.children()]]

    def frozen():
        ours(x)
        regnet_fast.freeze(ours)
        ours(x)
        assert set(ours.__dict__) > before

    frozen()
    assert [type(m) for m in ours.modules() if not [*m.children()]] == classes
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert set(copied.__dict__) == before
        close(copied(x), theirs(x))
    for lift in (
        lambda: ours.eval(),
        lambda: ours.train().eval(),
        lambda: ours.to(torch.float64).to(torch.float32),
        lambda: ours.load_state_dict(theirs.state_dict()),
        lambda: nn.Sequential(ours).eval(),
        lambda: regnet_fast.restore(ours),
    ):
        frozen()
        lift()
        assert set(ours.__dict__) == before
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    close(ours(x), theirs(x))


@torch.no_grad()
@pytest.mark.parametrize(("name", "path"), [("regnetv_040", "stem"), ("resnetv2_18", "norm")])
def test_a_layer_in_no_block_is_taken_in_again(name, path, x, ran, monkeypatch):
    """Behind changes in call after call, and another one in its place, which lets the first one go."""
    _, ours = twins(name)
    regnet_fast.freeze(ours)(x)
    steps = len(ran[-1]._run._places)
    for _ in range(6):
        ours.get_submodule(path).weight.mul_(1.01)
        ours(x)
    ran.clear()
    for _ in range(3):
        ours(x)
    assert len(ran[-1]._run._places) == steps and len(ran) == 3
    before = weakref.ref(ours.get_submodule(path))
    ours.set_submodule(path, copy.deepcopy(before()))
    for _ in range(3):
        ours(x)
    ran.clear()
    ours(x)
    gc.collect()
    assert before() is None and len(ran[-1]._run._places) == steps


@torch.no_grad()
@pytest.mark.parametrize("promise", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("network", [*PLACES, "resnet18"])
def test_a_network_is_not_asked_for_its_order_again(network, promise, x, ran, monkeypatch):
    """Where all that it calls is one program and it is as it was seen; one that took its place, or was changed, is."""
    _, ours = twins(network)
    if promise:
        regnet_fast.freeze(ours)
    expected, asked = ours(x), []
    in_order = type(ours).in_order
    monkeypatch.setattr(type(ours), "in_order", lambda self: asked.append(self) or in_order(self))
    assert torch.equal(ours(x), expected) and not asked and len(ran) == 2
    other = copy.copy(ours)
    other.__dict__.update(ours.__dict__)
    assert torch.equal(other(x), expected) and asked
    if promise:
        ours.eval()
    stage = ours.get_submodule(PLACES[network][0] if network in PLACES else "layer3")
    for change in (
        lambda: next(p for p in stage.parameters() if p.dim() == 4).mul_(1.001),
        lambda: setattr(stage, "added", True),
    ):
        ours(x), ours(x)
        asked.clear()
        change()
        ours(x)
        assert asked
        asked.clear()
        ours(x), ours(x)
        assert len(asked) <= 1


@torch.no_grad()
def test_a_last_layer_that_no_program_has_is_the_hosts(x, ran):
    """The rest stays one program."""
    theirs, ours = twins("regnetv_040")
    for model in (theirs, ours):
        model.final_conv = nn.GELU()
    close(regnet_fast.freeze(ours)(x), theirs(x))
    assert len(ran) == 1


@torch.no_grad()
def test_another_number_of_classes(name, x):
    """timm's `reset_classifier` lifts the promise of the head."""
    theirs, ours = twins(name)
    regnet_fast.freeze(ours)(x)
    for classes in (7, 0):
        theirs.reset_classifier(classes)
        ours.reset_classifier(classes)
        ours.load_state_dict(theirs.state_dict())
        found = regnet_fast.freeze(ours)(x)
        close(found, theirs(x))
        ours.reset_classifier(5)
        theirs.reset_classifier(5)
        assert ours(x).shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_admits_nothing_behind_it(name, x, dtype):
    """Weights of another dtype than the input's are timm's error, also where a call under autocast went before."""
    theirs, ours = twins(name)
    for model in (theirs, ours):
        with torch.autocast("cpu", dtype):
            model(x)
        with pytest.raises(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            model(x.to(dtype))


def replaced(path, new):
    def change(model):
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, new(old))

    return change


@torch.no_grad()
def test_a_replaced_part_is_called(name, x):
    """The stem, a stage, a block, the head: by nothing, by a twin of timm's with other weights, by one of ours."""
    stage, first, second = PLACES[name]

    def other(old):
        new = regnet_fast.restore(copy.deepcopy(old))
        for tensor in new.parameters():
            tensor.mul_(1.3)
        return new

    for path in ("stem", stage, first, second, "head"):
        assert_followed(name, x, replaced(path, other))
        assert_followed(name, x, replaced(path, lambda old: regnet_fast.rebuild(other(old)).model))
    for path in (second, "head"):
        assert_followed(name, x, replaced(path, lambda old: nn.Identity()))


@torch.no_grad()
def test_a_replaced_method_is_called(name, x):
    """Of the network, of a stage, of a block, of the head."""
    stage, block, _ = PLACES[name]

    def twice(path, method):
        def change(model):
            module, called = model.get_submodule(path), []
            old = getattr(module, method)
            setattr(module, method, lambda *given, **options: called.append(1) or 2 * old(*given, **options))
            return called

        return change

    for path, method in (
        *(("", method) for method in ("forward", "forward_features", "forward_head")),
        *((path, "forward") for path in (stage, block, "head")),
    ):
        assert_followed(name, x, twice(path, method))


@torch.no_grad()
@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_head"])
def test_a_derived_class_is_called(name, x, method):
    def change(model):
        called = []

        def twice(self, *given, **options):
            called.append(1)
            return 2 * getattr(super(derived, self), method)(*given, **options)

        derived = type("Derived", (type(model),), {method: twice})
        model.__class__ = derived
        return called

    assert_followed(name, x, change)


@torch.no_grad()
def test_a_class_derived_from_a_parts_is_called(name, x):
    stage, block, _ = PLACES[name]

    def derive(path):
        def change(model):
            module = model.get_submodule(path)
            derived = type("Derived", (type(module),), {"forward": lambda self, x: 2 * super(derived, self).forward(x)})
            module.__class__ = derived

        return change

    for path in ("stem", stage, "head"):
        assert_followed(name, x, derive(path))
    assert_followed(name, x, derive(block), [order for order in ORDERS if order != "promise, call, change"])


@torch.no_grad()
@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_head"])
def test_timms_own_class_may_be_changed(name, x, method, monkeypatch):
    theirs, ours = twins(name)
    close(ours(x), theirs(x))
    host, called = type(theirs), []
    old = getattr(host, method)

    def twice(self, *given, **options):
        called.append(self)
        return 2 * old(self, *given, **options)

    monkeypatch.setattr(host, method, twice)
    close(ours(x), theirs(x))
    assert {id(model) for model in called} == {id(ours), id(theirs)}


@torch.no_grad()
def test_a_restored_part_is_timms(name, x):
    for path in ("stem", *PLACES[name], "head"):
        for promise in (False, True):
            theirs, ours = twins(name)
            if promise:
                regnet_fast.freeze(ours)
            close(ours(x), theirs(x))
            regnet_fast.restore(ours.get_submodule(path))
            close(ours(x), theirs(x))


# What changes


@torch.no_grad()
def test_a_changed_weight_is_seen(name, x):
    """In place and through `.data`, behind a new storage and as another parameter; a buffer; one of the stem, of a
    block, of the head.
    """

    def of(kind, index):
        def change(model):
            tensors = [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]
            if kind == "in place":
                tensors[index].add_(0.5)
            elif kind == "data":
                tensors[index].data = tensors[index].data + 0.5
            else:
                key = [key for key, t in model.state_dict().items() if t.is_floating_point()][index]
                path, _, last = key.rpartition(".")
                module, t = model.get_submodule(path), tensors[index]
                setattr(module, last, nn.Parameter(t + 0.5) if isinstance(t, nn.Parameter) else t + 0.5)

        return change

    for kind, index in itertools.product(("in place", "data", "another"), (0, 3, 40, -1, -2)):
        assert_followed(name, x, of(kind, index), ORDERS[3:])


@torch.no_grad()
def test_a_changed_setting_is_seen(x):
    """Of the max pool in a stem, which a program has made its own; of a convolution; of the statistics' epsilon."""

    def setting(find, **values):
        def change(model):
            module = next(m for m in model.modules() if find(m))
            for key, value in values.items():
                setattr(module, key, value)

        return change

    def is_pool(m):
        return isinstance(m, nn.MaxPool2d)

    for change in (
        setting(is_pool, kernel_size=5),
        setting(is_pool, padding=0),
        setting(is_pool, stride=1),
        setting(is_pool, dilation=2),
        setting(is_pool, ceil_mode=True, padding=0),
        setting(lambda m: isinstance(m, nn.Conv2d), padding=(0, 0)),
        setting(lambda m: isinstance(m, nn.BatchNorm2d), eps=0.5),
    ):
        assert_followed("resnetv2_18", x, change, ORDERS[3:])


@pytest.mark.parametrize("fused", [None, True], ids=["plain", "fused"])
def test_an_optimizers_step_is_seen(name, x, fused):
    theirs, ours = twins(name)
    for _ in range(2):
        results = []
        for model in (theirs, ours):
            with torch.no_grad():
                results.append(model(x))
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter).sign()
            torch.optim.SGD(model.parameters(), lr=0.01, fused=fused).step()
        close(results[1], results[0])
    with torch.no_grad():
        close(ours(x), theirs(x))


LIFTS = {
    "train": lambda module: module.train().eval(),
    "eval": lambda module: module.eval(),
    "load_state_dict": lambda module: module.load_state_dict(module.state_dict()),
    "to": lambda module: module.to(torch.float64).to(torch.float32),
    "memory_format": lambda module: module.to(memory_format=LAST),
}


@torch.no_grad()
@pytest.mark.parametrize("lift", LIFTS)
def test_what_lifts_the_promise(name, x, lift):
    """Of the whole network, of its container, of one stage, of one block: for what stands in it."""
    stage, block, _ = PLACES[name]
    for path in ("", stage, block):
        theirs, ours = twins(name)
        regnet_fast.freeze(ours)
        close(ours(x), theirs(x))
        for model in (theirs, ours):
            LIFTS[lift](model.get_submodule(path))
            weight = next(p for p in model.get_submodule(block).parameters() if p.dim() > 1)
            weight.mul_(2)
        close(ours(x), theirs(x))


@torch.no_grad()
def test_a_stage_in_training_mode_is_timms(name, x):
    """Under the promise as well, and back in evaluation with the statistics that it left."""
    for promise in (False, True):
        theirs, ours = twins(name)
        if promise:
            regnet_fast.freeze(ours)
        close(ours(x), theirs(x))
        for model in (theirs, ours):
            model.get_submodule(PLACES[name][0]).train()
        close(ours(x), theirs(x))
        for model in (theirs, ours):
            model.eval()
        close(ours(x), theirs(x))


@torch.no_grad()
def test_the_promise_holds(name, x):
    """A frozen network does not see a weight written in place, and takes the new one when it is frozen again."""
    theirs, ours = twins(name)
    expected = regnet_fast.freeze(ours)(x)
    for model in (theirs, ours):
        next(p for p in model.get_submodule(PLACES[name][1]).parameters() if p.dim() > 1).mul_(2)
    assert torch.equal(ours(x), expected)
    close(regnet_fast.freeze(ours)(x), theirs(x))


@torch.no_grad()
def test_a_part_that_is_frozen_again_and_called_by_itself(name, x):
    """The network then takes the weights that the part has."""
    stage, block, _ = PLACES[name]
    theirs, ours = twins(name)
    regnet_fast.freeze(ours)(x)
    for model in (theirs, ours):
        next(p for p in model.get_submodule(block).parameters() if p.dim() > 1).mul_(2)
    regnet_fast.freeze(ours.get_submodule(stage))
    ours.forward_features(x)
    close(ours(x), theirs(x))


@torch.no_grad()
def test_another_classifier(name, x, ran):
    """By timm's `reset_classifier`, of any number of classes; frozen again before, where the model was frozen."""
    for promise in (False, True):
        theirs, ours = twins(name)
        for classes in (10, 0, 7):
            for model in (theirs, ours):
                model.reset_classifier(classes)
                if classes:
                    torch.manual_seed(0)
                    nn.init.normal_(model.head.get_submodule("fc").weight)
                    model.head.get_submodule("fc").bias.fill_(0.5)
            if promise:
                regnet_fast.freeze(ours)
            ran.clear()
            close(ours(x), theirs(x))
            assert len(ran) == 1
            close(ours(x), theirs(x))
        for pool in ("max", "", "avg"):
            for model in (theirs, ours):
                model.reset_classifier(0, pool)
                model.eval()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                close(ours(x), theirs(x))


# Ways to call it


@torch.no_grad()
def test_other_methods(name, x):
    """Before and after a call of the whole network; frozen or not."""
    calls = (
        lambda model: model.forward_features(x),
        lambda model: model.forward_head(model.forward_features(x)),
        lambda model: model.forward_head(model.forward_features(x), pre_logits=True),
        lambda model: model.forward_intermediates(x),
        lambda model: model.forward_intermediates(x, indices=2, intermediates_only=True),
        lambda model: model(x=x) if "x" in type(model).forward.__code__.co_varnames else model(x),
    )
    for promise in (False, True):
        theirs, ours = twins(name)
        if promise:
            regnet_fast.freeze(ours)
        for call in calls + calls:
            leaves = [torch.utils._pytree.tree_leaves(call(model)) for model in (ours, theirs)]
            for found, expected in zip(*leaves, strict=True):
                close(found, expected)
            close(ours(x), theirs(x))


@torch.no_grad()
def test_the_stages_by_themselves_and_the_network_keep_their_weights(monkeypatch, x):
    """Of regnetv_040, whose stem is the host's, a stage and the network begin with the same block."""
    theirs, ours = twins("regnetv_040")
    packed, init = [], native.Weights.__init__
    monkeypatch.setattr(native.Weights, "__init__", lambda self, *given: packed.append(1) or init(self, *given))
    counts = []
    for _ in range(3):
        close(ours(x), theirs(x))
        close(ours.forward_features(x), theirs.forward_features(x))
        counts.append(len(packed))
    assert counts[0] == counts[1] == counts[2] > 0


@torch.no_grad()
def test_autocast(name, x):
    theirs, ours = twins(name)
    for promise in (False, True):
        expected = regnet_fast.freeze(ours)(x) if promise else ours(x)
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = ours(x), theirs(x)
        assert found.dtype == wanted.dtype
        assert_close_to_reference(found, wanted, copy.deepcopy(theirs).double()(x.double()), name)
        assert torch.equal(ours(x), expected)


def test_gradients(name, x, ran):
    """Where gradients may be asked for the network is called as the host calls it."""
    theirs, ours = twins(name)
    gradients = []
    for model in (theirs, ours):
        image = x.clone().requires_grad_()
        model(image).square().sum().backward()
        gradients.append(image.grad)
    assert not ran
    assert (gradients[1] - gradients[0]).norm() < 2e-2 * gradients[0].norm()  # a ReLU at zero may turn
    with torch.inference_mode():
        close(ours(x), theirs(x))
    assert len(ran) == 1


@torch.no_grad()
def test_copies(name, x, ran):
    """Each of them frozen or not, apart from the model that they were made of."""

    def saved(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for promise in (False, True):
        _, ours = twins(name)
        expected = regnet_fast.freeze(ours)(x) if promise else ours(x)
        for way in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved, copy.copy):
            twin = way(ours)
            assert isinstance(twin, Network)
            ran.clear()
            found = twin(x)
            close(found, expected)  # to the bit where both have the same program
            assert torch.equal(found, expected) or (promise and name == "resnetv2_18")
            assert torch.equal(ours(x), expected) and len(ran) == 2
            if way is copy.copy:
                continue
            next(twin.parameters()).mul_(2)
            assert not torch.allclose(twin(x), expected) and torch.equal(ours(x), expected)


@torch.no_grad()
def test_a_shallow_copy_has_parts_of_its_own(name, x):
    """A part that is replaced in it is not replaced in the model, frozen or not."""
    for promise in (False, True):
        theirs, ours = twins(name)
        if promise:
            regnet_fast.freeze(ours)
        expected = ours(x)
        twin, other = copy.copy(ours), copy.copy(theirs)
        for model in (twin, other):
            model._modules = dict(model._modules)
            model.head = nn.Identity()
        for _ in range(2):
            close(twin(x), other(x))
            assert torch.equal(ours(x), expected)


@torch.no_grad()
def test_restore_gives_timms_class_back(name, x, ran):
    theirs, ours = twins(name)
    assert type(ours) is hosts.NETWORKS[type(theirs)]
    ours(x)
    ran.clear()
    regnet_fast.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(ours(x), theirs(x)) and not ran
    close(regnet_fast.rebuild(ours).model(x), theirs(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_graphs_of_torch(name, x, frozen):
    """torch.jit's trace and script, torch.fx and torch.export record it as before."""
    theirs, ours = twins(name)
    if frozen:
        regnet_fast.freeze(ours)
    expected, before = ours(x), [type(m) for m in ours.modules()]
    for record in (
        lambda model: torch.jit.trace(model, x),
        torch.jit.script,
        torch.fx.symbolic_trace,
        lambda model: torch.export.export(model, (x,)).module(),
    ):
        graph, classes = record(ours), [type(m) for m in ours.modules()]
        for image in (x, x.flip(3)):
            close(graph(image), theirs(image))
        assert torch.equal(ours(x), expected) and [type(m) for m in ours.modules()] == classes == before


def replica(model):
    """As `DataParallel` makes them: with copies of the tensors as plain attributes."""
    twin = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    for name, tensor in model._parameters.items():
        if tensor is None:
            twin._parameters[name] = None
        else:
            setattr(twin, name, tensor.detach().clone())
    return twin


@torch.no_grad()
def test_a_network_inside_other_modules(name, x, ran):
    """In a Sequential, as a replica for another device, and behind `functional_call`."""
    theirs, ours = twins(name)
    expected = theirs(x)
    for around in (nn.Sequential(ours, nn.Identity()), regnet_fast.rebuild(nn.Sequential(ours)).model, replica(ours)):
        ran.clear()
        close(around(x), expected)
        assert len(ran) == 1
    weights = {key: t * 1.5 if t.is_floating_point() else t for key, t in ours.state_dict().items()}
    called = [torch.func.functional_call(model, weights, (x,)) for model in (ours, theirs)]
    close(*called)
    close(ours(x), expected)


@torch.no_grad()
def test_a_stem_that_two_networks_share(name, x):
    """Frozen or not, called in turns."""
    for promise in (False, True):
        first, second = twins(name), twins(name)
        for pair in (first, second):
            randomize_bn(pair[0], 1 if pair is first else 2)
            pair[1].load_state_dict(pair[0].state_dict())
        for one, other in zip(first, second, strict=True):
            other.stem = one.stem
        if promise:
            regnet_fast.freeze(first[1])
            regnet_fast.freeze(second[1])
        for _ in range(2):
            for theirs, ours in (first, second):
                close(ours(x), theirs(x))


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_several_threads(name, frozen):
    """Two with one model and two with another, with images of several sizes, to the bit."""

    def made_ready(model):
        return regnet_fast.freeze(model) if frozen else model

    models = [made_ready(twins(other)[1]) for other in (name, "regnetx_002")]
    images = [torch.randn(n, 3, size, size) for n, size in ((1, 64), (2, 32), (1, 48))]
    expected = [[made_ready(copy.deepcopy(model))(x) for x in images] for model in models]
    wrong, start = [], threading.Barrier(4)

    def run(i):
        start.wait()
        with torch.inference_mode():
            for j in range(24):
                found = models[i % 2](images[(i + j) % 3])
                if not torch.equal(found, expected[i % 2][(i + j) % 3]):
                    wrong.append((i, j))

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@torch.no_grad()
def test_the_result_is_the_callers(name, x):
    """Another call does not write into it, nor does who writes into it change the next one."""
    _, ours = twins(name)
    first = ours(x)
    kept = first.clone()
    ours(torch.randn_like(x))
    assert torch.equal(first, kept)
    first.fill_(float("nan"))
    assert torch.equal(ours(x), kept)


@torch.no_grad()
def test_grad_checkpointing_is_timms(name, x, ran):
    theirs, ours = twins(name)
    close(ours(x), theirs(x))
    (whole,) = [program.shape for program in ran]
    ran.clear()
    for model in (theirs, ours):
        model.set_grad_checkpointing()
    close(ours(x), theirs(x))
    assert whole not in [program.shape for program in ran]
    ours.set_grad_checkpointing(False)
    ran.clear()
    close(ours(x), theirs(x))
    assert [program.shape for program in ran] == [whole]


@torch.no_grad()
@pytest.mark.parametrize("force", ["aten", "native", "reference"])
def test_a_forced_backend(name, x, force, ran):
    """csrc/cpu runs the program, and no other backend does."""
    theirs, ours = twins(name)
    close(ours(x), theirs(x))
    ran.clear()
    try:
        with regnet_fast.backend(force):
            close(ours(x), theirs(x))
    except BackendError:
        assert force == "native"
    assert len(ran) == (force == "native")


@torch.no_grad()
def test_a_network_that_its_stages_serve_better_packs_nothing_anew(x, monkeypatch):
    """Where a trial found the program slower it is not made again in every call."""
    theirs, ours = twins("regnetv_040")
    packed, init = [], native.Weights.__init__
    monkeypatch.setattr(native.Weights, "__init__", lambda self, *given: packed.append(1) or init(self, *given))
    monkeypatch.setattr(cpu, "by_program", lambda stage, bind, planar=False: stage.blocks.count("PreAct(") < 20)
    close(ours(x), theirs(x))
    once = len(packed)
    close(ours(x), theirs(x))
    assert len(packed) == once
