"""The thread on which calls are recorded: one that lasts, in the caller's place, and that nobody waits for in vain."""

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import Future
from contextvars import ContextVar

import pytest
import torch
from test_graphs import StandIn
from torch import nn

import regnet_fast
from regnet_fast import graphs
from regnet_fast.backends import backend, forced_backend
from regnet_fast.blocks.fused import FallbackWarning
from regnet_fast.recorder import Recorder, recorded_elsewhere, recorder
from regnet_fast.trials.modes import current_mode, mode

TASK = ContextVar("task", default="none")


def seen():
    device = torch.get_default_device().type
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.is_grad_enabled(), autocast, device, forced_backend(), current_mode(), TASK.get()


@pytest.fixture
def captured(monkeypatch):
    """The threads on which calls were recorded."""
    threads = []

    class Noted(StandIn):
        def __init__(self, call, x, pool):
            threads.append(threading.current_thread())
            super().__init__(call, x, pool)

    monkeypatch.setattr(graphs, "Capture", Noted)
    return threads


def in_a_thread(task):
    found = []
    thread = threading.Thread(target=lambda: found.append(task()))
    thread.start()
    thread.join(60)
    assert found, "it waits for ever"
    return found[0]


@torch.no_grad()
def test_all_is_recorded_on_one_thread_that_outlives_its_callers(captured):
    models = [regnet_fast.graphed(nn.Conv2d(2, 2, 1).eval()) for _ in range(2)]
    for size in range(1, 4):
        for model in models:
            in_a_thread(torch.no_grad()(lambda model=model, size=size: model(torch.randn(1, 2, size, size))))
    (thread,) = set(captured)
    assert len(captured) == 6 and thread is not threading.current_thread() and thread.is_alive()


def test_no_thread_is_there_before_something_is_recorded():
    code = "import threading, regnet_fast.graphs; assert threading.active_count() == 1, threading.enumerate()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_callers_settings_hold_inside_and_no_longer():
    assert recorder.run(seen, "cpu") == seen()
    TASK.set("mine")
    with torch.no_grad(), torch.autocast("cpu", torch.float16), torch.device("meta"), backend("reference"), mode("off"):
        inside = seen()
        assert recorder.run(seen, "cpu") == inside
    assert inside == (False, torch.float16, "meta", "reference", "off", "mine")
    assert recorder.run(seen, "cpu") == seen() != inside
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        recorder.run(lambda: 1 / 0, "cpu")
    assert recorder.run(torch.is_grad_enabled, "cpu")


def test_what_is_entered_around_a_task_is_entered_there():
    class Place:
        def __enter__(self):
            self.thread = threading.current_thread()

        def __exit__(self, *_):
            self.left = threading.current_thread()

    place = Place()
    assert recorder.run(threading.current_thread, "cpu", place) is place.thread is place.left


def test_warnings_and_errors_are_the_callers_and_nothing_is_kept():
    def task():
        held = torch.ones(3)
        kept.append(weakref.ref(held))
        warnings.warn("from inside", stacklevel=1)
        raise ValueError("its own")

    kept = []
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="from inside"):
            try:
                recorder.run(task, "cpu")
            except ValueError as error:
                assert str(error) == "its own"
        recorder.run(lambda: None, "cpu")
        assert kept[0]() is None, "the error's frames are freed with it"
    finally:
        gc.enable()


def test_an_interrupted_caller_waits_until_nothing_is_recorded_any_more(monkeypatch):
    done = []

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Future, "result", interrupted)
        recorder.run(lambda: time.sleep(0.3) or done.append(1), "cpu")
    assert done


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


@torch.no_grad()
def test_a_graphed_model_inside_of_one_is_part_of_its_recording(captured):
    inner = regnet_fast.graphed(nn.Conv2d(2, 2, 1).eval())
    outer, x = regnet_fast.graphed(Outer(inner).eval()), torch.randn(1, 2, 3, 3)
    expected = inner._call_impl(x) + 1
    torch.testing.assert_close(outer(x), expected)
    assert len(captured) == 1 and len(inner._compiled_call_impl) == 0
    torch.testing.assert_close(inner(x), expected - 1)
    assert len(captured) == 2


@torch.no_grad()
def test_who_records_a_model_and_who_records_one_inside_of_it_wait_for_each_other_and_end(monkeypatch):
    """The one inside holds its model's lock when the other's recording comes to that model."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(StandIn):
        def __init__(self, call, x, pool):
            if isinstance(getattr(call, "__self__", None), Outer):
                inside.set()
                go_on.wait(60)
            super().__init__(call, x, pool)

    monkeypatch.setattr(graphs, "Capture", Slow)
    inner = regnet_fast.graphed(nn.Conv2d(2, 2, 1).eval())
    outer, x = regnet_fast.graphed(Outer(inner).eval()), torch.randn(1, 2, 3, 3)
    threads = [threading.Thread(target=torch.no_grad()(model), args=(x,), daemon=True) for model in (outer, inner)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    while not inner._compiled_call_impl._lock.locked():
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork_there_is_another_thread():
    recorder.run(lambda: None, "cpu")
    child = os.fork()
    if not child:
        os._exit(0 if recorder.run(lambda: recorder.is_here, "cpu") and not recorder.is_here else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@torch.no_grad()
def test_where_no_thread_can_be_started_any_more_the_model_runs_as_ever(captured, monkeypatch):
    ended = Recorder()
    ended._thread.shutdown()
    monkeypatch.setattr(graphs, "recorder", ended)
    model, x = regnet_fast.graphed(nn.Conv2d(2, 2, 1).eval()), torch.randn(1, 2, 3, 3)
    with pytest.warns(FallbackWarning, match="cannot be recorded: cannot schedule new futures"):
        torch.testing.assert_close(model(x), model._call_impl(x))
    assert not captured


def test_who_else_records(monkeypatch):
    x = torch.empty(1, device="meta")
    assert not recorded_elsewhere(x)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert recorded_elsewhere(x)
    assert not recorder.run(lambda: recorded_elsewhere(x), "cpu"), "our own recordings"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked"))
    assert not recorded_elsewhere(torch.empty(1)), "on a CPU nothing is"
