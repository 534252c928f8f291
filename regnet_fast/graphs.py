"""Whole-model CUDA graphs: the kernels of a call recorded once for an input shape, then started all at once.

At small batches a GPU waits for Python to start the next kernel. A graph starts hundreds of them with one call.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .backends import forced_backend
from .blocks.fused import FallbackWarning, Fused
from .blocks.network import Network
from .blocks.watch import Watch, hooked, transformed
from .observer import observer
from .recorder import recorder
from .settings import settings
from .trials.modes import current_mode
from .trials.session import session

_KEPT = 8
"""How many recorded calls a model keeps: the last ones used."""

_UNCACHED = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_HIP_MEMORY_CACHING")
"""Which variables, where one is 1, make torch ask the driver for each tensor's memory."""


class _End:
    """Where the last replay of a capture ends, for calls on other streams to wait for."""

    def __init__(self, stream: torch.cuda.Stream):
        self.stream, self.event = stream, torch.cuda.Event()

    def reached(self) -> None:
        """The current stream gets here when all that was asked of it until now is done."""
        self.stream = torch.cuda.current_stream()
        self.event.record(self.stream)

    def wait(self) -> None:
        """Let the current stream wait for it."""
        current = torch.cuda.current_stream()
        if current != self.stream:
            current.wait_event(self.event)


class Capture:
    """One recorded call of a model: its input, its results, and the graph that computes them from it.

    Raises what the call itself raises, and RuntimeError where it does something that no graph can hold, or computes
    nothing on the stream that is recorded: a replay would give the results of the recording.
    """

    def __init__(self, call: Callable[[Tensor], Any], x: Tensor, pool: Any):
        self.input = torch.empty_like(x).copy_(x)
        call(self.input)  # packs weights and compiles kernels
        current, side = torch.cuda.current_stream(), _side()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            call(self.input)  # finds all of it done, as the recording has to
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.results = call(self.input)
        if not _operations(self.graph):
            raise RuntimeError(f"nothing was recorded: the model computes nothing on {x.device}, or on another stream")
        self.graph.instantiate()
        self.end = _End(current)

    @staticmethod
    def refuse(x: Tensor) -> str | None:
        """Why no call on such an input can be recorded, or None."""
        if not x.is_cuda:
            return f"CUDA graphs need a GPU, and the input is on {x.device}"
        if any(os.environ.get(name) == "1" for name in _UNCACHED):
            return f"no graph can hold memory without torch's cache of it, which {' or '.join(_UNCACHED)} switches off"
        if torch.cuda.is_current_stream_capturing():
            return "the stream is recorded already"
        return None

    @staticmethod
    def pool() -> Any:
        """Memory that several captures of one model share, since they never run at the same time."""
        return torch.cuda.graph_pool_handle()

    @staticmethod
    def on(device: torch.device) -> Any:
        """A context in which `device` is the current one."""
        return torch.cuda.device(device)

    @staticmethod
    def here() -> Any:
        """A context for another thread in which the device and the stream are current that are current in this one."""
        return torch.cuda.stream(torch.cuda.current_stream())

    def replay(self, x: Tensor) -> Any:
        """The results for x, in memory of their own. No other capture of the same pool may be running."""
        self.input.copy_(x)
        self.input.record_stream(torch.cuda.current_stream())  # it is not freed while another stream still reads it
        self.graph.replay()
        results = pytree.tree_map_only(Tensor, torch.clone, self.results)
        self.end.reached()
        return results


_SIDES: dict[int, torch.cuda.Stream] = {}


def _side() -> torch.cuda.Stream:
    """The stream on which all calls on the current device are recorded: captures share a pool's memory on one alone."""
    device = torch.cuda.current_device()
    if device not in _SIDES:
        _SIDES[device] = torch.cuda.Stream()
    return _SIDES[device]


def _operations(graph: torch.cuda.CUDAGraph) -> int:
    """How many operations a graph holds, as the driver says. torch itself only warns of an empty one."""
    count = ctypes.c_size_t()
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"the driver does not tell what was recorded: CUDA error {status}")
    return count.value


class _Recorded:
    """A capture and what it rests on: it holds the packed weights that the graph reads, and watches the model's."""

    def __init__(self, model: nn.Module, capture: Capture):
        self.capture, self.watch = capture, Watch(model)
        self.blocks = [module for module in model.modules() if isinstance(module, Fused)]
        pieces = [piece for network in model.modules() if isinstance(network, Network) for piece in network.pieces()]
        self.pieces = [Watch(piece) for piece in pieces]
        self.pins = [block.pin() for block in (*self.blocks, *pieces)]
        self.frozen = self._all_frozen()

    def _all_frozen(self) -> bool:
        """Whether the promise holds of all blocks that it reaches, and those that it does not are as they were."""
        promised = all([block.is_frozen for block in self.blocks]) and bool(self.blocks)
        return promised and all(piece.current() for piece in self.pieces)

    def current(self) -> bool:
        """Whether a replay computes what the model computes now."""
        return self._all_frozen() if self.frozen else self.watch.current()


class Graphs:
    """The recorded calls of one model: what `model(x)` runs after `graphed(model)`.

    Attributes: `reason`, why the last call was not replayed, or None.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._recorded: OrderedDict[tuple, _Recorded] = OrderedDict()
        self._refused: dict[tuple, str] = {}
        self._pool: Any = None
        self._last: _End | None = None
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self.reason: str | None = None

    def __len__(self) -> int:
        """How many calls are recorded now."""
        return len(self._recorded)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if (
            torch.compiler.is_compiling()
            or model.training
            or observer.get() is not None
            or recorder.is_here
            or torch._C._get_tracing_state() is not None
        ):
            return model._call_impl(*args, **kwargs)
        reason = _unfit(model, args, kwargs)
        if reason is None:
            x, key = args[0], _key(args[0])
            with self._lock, torch.inference_mode(False), torch.no_grad(), Capture.on(x.device):
                capture, reason = self._capture(model, key, x)
                if capture is not None:
                    self.reason = None
                    return self._replay(capture, x)
        self._tell(reason)
        return model._call_impl(*args, **kwargs)

    def _replay(self, capture: Capture, x: Tensor) -> Any:
        """Replay after all that was replayed before: the captures of a model share their memory."""
        if self._last is not None:
            self._last.wait()
        self._last = capture.end
        return capture.replay(x)

    def _capture(self, model: nn.Module, key: tuple, x: Tensor) -> tuple[Capture | None, str | None]:
        """The capture for an input, made anew where the model has changed; or the reason why there is none."""
        found = self._recorded.pop(key, None)
        if found is not None and found.current():
            self._recorded[key] = found  # the last one used is the last one dropped
            return found.capture, None
        found = None  # the next may have its memory
        if any(map(hooked, model.modules())):
            return None, "a hook is registered on one of its modules"
        if key in self._refused:
            return None, self._refused[key]
        if self._pool is None:
            self._pool = Capture.pool()
        if self._last is not None:
            self._last.wait()
        try:
            call = _uncached(model, x)
            if current_mode() == "on":
                call(x)  # notes what was never tried
                session.settle()
            capture = recorder.run(lambda: Capture(call, x, self._pool), x.device.type, Capture.here())
            found = _Recorded(model, capture)
        except RuntimeError as error:
            model._call_impl(x)  # the model's own error, if this input has one
            self._refused[key] = f"the call cannot be recorded: {str(error).strip().splitlines()[0]}"
            return None, self._refused[key]
        if found.watch.blind and not found.frozen:
            return None, found.watch.blind
        while len(self._recorded) >= _KEPT:
            self._recorded.popitem(last=False)
        self._recorded[key] = found
        return found.capture, None

    def _tell(self, reason: str) -> None:
        """Keep the reason, and warn the first time."""
        self.reason = reason
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"the model runs without its CUDA graph: {reason}", FallbackWarning, stacklevel=3)


def _key(x: Tensor) -> tuple:
    """All that decides on which kernels run, but for the model."""
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    return (
        x.shape,
        x.dtype,
        x.device,
        x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else None,
        autocast,
        forced_backend(),
        settings(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_accumulation(),
    )


def _unfit(model: nn.Module, args: tuple, kwargs: dict) -> str | None:
    """Why a call is not recorded, from what is known without running it."""
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return "only calls with one plain tensor are recorded"
    x = args[0]
    if x.numel() == 0:
        return f"an input of shape {tuple(x.shape)} is empty"
    reason = Capture.refuse(x) or transformed()
    if reason is not None:
        return reason
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in model.parameters())):
        return "a gradient may be asked for; call it under torch.inference_mode() or torch.no_grad()"
    if hooked(model):
        return "a hook is registered on one of its modules"
    return None


def _uncached(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """The model's call, without autocast's cache of weights, which would be freed while the graph still reads them."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return model._call_impl

    def call(x: Tensor) -> Any:
        torch.clear_autocast_cache()
        with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
            return model._call_impl(x)

    return call


def graphed(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Run the model's calls in evaluation as CUDA graphs from now on, in place, and return the model.

    The first call for a shape, dtype and device is recorded; later ones copy their input in, replay all kernels at once
    and return copies of the results, so that no result changes with a later call. Where a weight, a buffer, a setting
    or a layer has changed, the call is recorded anew; looking for changes costs Python time in every call, which
    `freeze(model)` saves.

    A call that cannot be recorded runs as ever, with a `FallbackWarning` that says why the first time: on a CPU, where
    a gradient may be asked for, with hooks, with other arguments than one tensor, or where the model does something
    that no graph can hold. Training mode, tracing, torch.compile and `explain` pass by quietly.

    Calls from several threads and streams wait for each other. The last eight recorded calls are kept; they share
    memory, and `ungraphed(model)` frees it. Deep copies and pickles of the model are not graphed.

    Args:
        model: any module whose forward takes one tensor. Its keys, attributes and methods stay as they are; methods
            such as `forward_features` run without a graph.
        example: an input to record at once.

    Raises TypeError for anything but a module, and ValueError for one that `module.compile()` has compiled in place.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"graphed takes a torch.nn.Module, got {type(model).__name__}")
    if model._compiled_call_impl is not None and not isinstance(model._compiled_call_impl, Graphs):
        raise ValueError("graphed: the model was compiled in place with model.compile(); graph a model that is not")
    model._compiled_call_impl = Graphs(model)
    if example is not None:
        with torch.no_grad():
            model(example)
    return model


def ungraphed(model: nn.Module) -> nn.Module:
    """Undo `graphed` in place, free the memory of the recorded calls, and return the model."""
    if isinstance(model._compiled_call_impl, Graphs):
        model._compiled_call_impl = None
    return model
