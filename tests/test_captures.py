"""The class that talks to CUDA, on stand-ins for two GPUs: on which stream a call is recorded, and whether it was.

A stand-in GPU runs what is launched at once, unless the stream is recorded: then it goes into the graph and runs when
that is replayed. So whatever is recorded on a wrong stream shows as stale results.
"""

import threading
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import regnet_fast
from regnet_fast import graphs
from regnet_fast.blocks import fused
from regnet_fast.blocks.fused import FallbackWarning
from regnet_fast.ops import packed as packing
from regnet_fast.trials import cpu


class Stream:
    def __init__(self, card):
        self.card, self.graph = card, None

    def wait_stream(self, other):
        assert other.card == self.card

    def wait_event(self, event):
        pass


class Graph:
    def __init__(self, keep_graph=False):
        self.keep, self.launches, self.ready = keep_graph, [], not keep_graph

    def raw_cuda_graph(self):
        if not self.keep:
            raise RuntimeError("You cannot access the raw cudaGraph_t instance unless CUDAGraph was made to keep it")
        return id(self)

    def instantiate(self):
        self.ready = True

    def replay(self):
        assert self.ready
        for launch in self.launches:
            launch()


class Cards:
    """`torch.cuda` with two GPUs. Tensors are on a CPU; `of_inputs` says on which card they are meant to be."""

    def __init__(self):
        self.of_inputs, self.status, self.graphs, self.usual = 0, 0, {}, [Stream(0), Stream(1)]
        self.recorded_on = []
        self._here, self._default_capture_stream = threading.local(), None

    @property
    def here(self):
        if not hasattr(self._here, "card"):
            self._here.card, self._here.streams = 0, [*self.usual]
        return self._here

    def current_stream(self, device=None):
        assert device is None
        return self.here.streams[self.here.card]

    def current_device(self):
        return self.here.card

    @contextmanager
    def device(self, device):
        here = self.here
        here.card, before = self.of_inputs, here.card
        yield
        here.card = before

    def Stream(self):
        return Stream(self.here.card)

    @contextmanager
    def stream(self, stream):
        here = self.here
        before, card = here.streams[stream.card], here.card
        here.card, here.streams[stream.card] = stream.card, stream
        yield
        here.card, here.streams[stream.card] = card, before

    def CUDAGraph(self, **options):
        made = Graph(**options)
        self.graphs[id(made)] = made
        return made

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        if stream is None:
            self._default_capture_stream = stream = self._default_capture_stream or self.Stream()
        self.recorded_on.append((pool, stream))
        with self.stream(stream):
            stream.graph = graph
            try:
                yield
            finally:
                stream.graph = None
        if not graph.launches:
            warnings.warn("The CUDA Graph is empty. This usually means a wrong device or stream.", stacklevel=2)

    def is_current_stream_capturing(self):
        return self.current_stream().graph is not None

    def graph_pool_handle(self):
        return object()

    class Event:
        def record(self, stream):
            pass

    def launch(self, card, work):
        graph = self.here.streams[card].graph
        work() if graph is None else graph.launches.append(work)

    def CDLL(self, name):
        """The driver, which knows how much a graph holds."""

        def nodes(graph, array, count):
            assert array is None
            count._obj.value = len(self.graphs[graph.value].launches)
            return self.status

        assert name == "libcuda.so.1"
        return SimpleNamespace(cuGraphGetNodes=nodes)


@pytest.fixture
def cards(monkeypatch):
    made = Cards()
    names = ("current_stream", "Stream", "stream", "CUDAGraph", "graph", "is_current_stream_capturing", "Event")
    for name in (*names, "graph_pool_handle", "current_device", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(graphs, "_SIDES", {})
    monkeypatch.setattr(graphs.ctypes, "CDLL", made.CDLL)
    monkeypatch.setattr(graphs.Capture, "refuse", staticmethod(lambda x: None))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return made


class Doubles(nn.Module):
    """2 x, computed on a card."""

    def __init__(self, cards, card):
        super().__init__()
        self.cards, self.card = cards, card

    def forward(self, x):
        y = torch.empty_like(x)
        self.cards.launch(self.card, lambda: torch.mul(x, 2, out=y))
        return y


class Elsewhere(Doubles):
    """On a stream of its own."""

    def forward(self, x):
        with torch.cuda.stream(Stream(self.card)):
            return super().forward(x)


def doubles(cards, model):
    cards.of_inputs = model.card
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4)
            torch.testing.assert_close(model(x), 2 * x)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
def test_each_gpu_records_on_a_stream_of_its_own(cards, order):
    """Whichever is the current one."""
    for card in order:
        model = regnet_fast.graphed(Doubles(cards, card).eval())
        doubles(cards, model)
        assert model._compiled_call_impl.reason is None and len(model._compiled_call_impl) == 1
        assert cards.here.card == 0 and cards.here.streams == cards.usual


@torch.no_grad()
def test_a_recording_waits_for_the_callers_stream(cards):
    """On the caller's stream, not on the one that the recording thread would have by itself."""
    waited, usual = [], Stream(0)
    with torch.cuda.stream(usual), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "wait_stream", lambda self, other: waited.append((self, other)))
        regnet_fast.graphed(Doubles(cards, 0).eval())(torch.ones(2))
    (_, side), *_ = cards.recorded_on
    assert waited == [(side, usual), (usual, side)]


@torch.no_grad()
def test_what_shares_a_pool_is_recorded_on_one_stream(cards):
    """Memory that was let go on one stream is not given to another."""
    model = regnet_fast.graphed(Doubles(cards, 1).eval())
    cards.of_inputs = 1
    for size in range(1, 4):
        torch.testing.assert_close(model(torch.ones(size)), 2 * torch.ones(size))
    assert len(cards.recorded_on) == 3 and len(set(cards.recorded_on)) == 1


@pytest.mark.parametrize("model", [Elsewhere, lambda cards, card: Doubles(cards, 1 - card)], ids=["stream", "GPU"])
def test_a_recording_of_nothing_is_refused(cards, model):
    model = regnet_fast.graphed(model(cards, 0).eval())
    x = torch.randn(4)
    cards.of_inputs = 0
    with torch.no_grad(), pytest.warns(FallbackWarning, match="cannot be recorded: nothing was recorded") as warned:
        for _ in range(3):
            torch.testing.assert_close(model(x), 2 * x)
            x = x + 1
    assert len([one for one in warned if issubclass(one.category, FallbackWarning)]) == 1
    assert len(model._compiled_call_impl) == 0


def test_where_the_driver_does_not_tell_the_call_is_not_recorded(cards):
    cards.status = 999
    model = regnet_fast.graphed(Doubles(cards, 0).eval())
    with pytest.warns(FallbackWarning, match="cannot be recorded: the driver does not tell .* error 999"):
        doubles(cards, model)


@pytest.mark.parametrize("name", ["PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_HIP_MEMORY_CACHING"])
def test_without_torchs_cache_of_memory_nothing_is_recorded(monkeypatch, name):
    x = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs.Capture.refuse(x) is None
    monkeypatch.setenv(name, "0")
    assert graphs.Capture.refuse(x) is None, "torch keeps its cache"
    monkeypatch.setenv(name, "1")
    assert name in graphs.Capture.refuse(x)


# Somebody else records


def test_inside_of_a_recording_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert graphs.Capture.refuse(SimpleNamespace(is_cuda=True)) == "the stream is recorded already"


@pytest.fixture
def recorded(monkeypatch):
    """Whether somebody records the stream; on a CPU nobody can, and networks run as programs, which no GPU has."""
    state = SimpleNamespace(now=False)
    monkeypatch.setattr(cpu, "by_program", lambda *_: False)
    for module in (fused, packing):
        monkeypatch.setattr(module, "recorded_elsewhere", lambda x: state.now)
    return state


@torch.no_grad()
@pytest.mark.parametrize("called", [False, True])
def test_a_recording_by_somebody_else_is_of_the_hosts_own_forward(recorded, called):
    """It reads the weights that the model will have then, not what was packed of them, which may be gone."""
    model = regnet_fast.create_model("regnety_002", num_classes=8).eval()
    x, hosts = torch.randn(1, 3, 64, 64), []
    block = type(model.s1.b1)
    if called:
        model(x)
    plans = {name: [*m.__dict__.get(fused.STATE, {}).values()] for name, m in model.named_modules()}
    own = block.host.forward

    def counted(self, x):
        hosts.append(self)
        return own(self, x)

    recorded.now = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block.host, "forward", counted)
        with pytest.warns(FallbackWarning, match=r"somebody records the stream .* regnet_fast\.graphed"):
            found = model(x)
    assert len(hosts) == len([m for m in model.modules() if isinstance(m, block)])
    torch.testing.assert_close(found, type(model).host.forward(model, x), rtol=1e-3, atol=1e-3)
    for name, m in model.named_modules():
        for plan in plans[name]:
            assert any(plan is one for one in m.__dict__[fused.STATE].values()), "what was packed before is still there"
        bound = [plan for plan in m.__dict__.get(fused.STATE, {}).values() if "form" in vars(plan)]
        assert called or not bound, "nothing is packed"
    with regnet_fast.backend("aten"), pytest.raises(regnet_fast.BackendError, match="somebody records the stream"):
        model(x)


@torch.no_grad()
def test_weights_that_are_packed_meanwhile_are_in_the_graph_alone(recorded):
    one = regnet_fast.functional.pack_conv(torch.randn(4, 3, 1, 1))
    x = torch.randn(1, 3, 5, 5)
    recorded.now = True
    first = regnet_fast.functional.pointwise_conv(x, one)
    assert not one._runs and not one._provisional
    recorded.now = False
    torch.testing.assert_close(regnet_fast.functional.pointwise_conv(x, one), first)
    assert one._runs
