"""A driver for Triton without a GPU: it compiles for a GPU, and launches nothing."""

import gc
import sys
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from regnet_fast.backends import triton as backend
from regnet_fast.kernels import tables

PROCESSORS = 132


class Driver:
    """What Triton asks of a driver; `launched` has the launcher's arguments of each launch, its function the fifth."""

    def __init__(self, arch: int):
        self.arch, self.launched, self.functions = arch, [], count(1)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda *facts: (1, next(self.functions), 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(arguments)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def _kernels() -> list[JITFunction]:
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{tables.__package__}.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]


@contextmanager
def standing_in(arch: int = 90):
    """Tensors of the CPU are taken for those of a GPU with 132 processors."""
    there = SimpleNamespace(major=arch // 10, minor=arch % 10, multi_processor_count=PROCESSORS)
    before, one = driver._active, Driver(arch)
    compiled = [kernel.device_caches for kernel in _kernels()]
    with (
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: there),
        mock.patch.object(backend, "_refuse_device", lambda device: None),
        mock.patch.object(tables, "here", lambda device: None),
    ):
        driver.set_active(one)
        tables.forget()
        for caches in compiled:
            caches.clear()
        try:
            yield one
        finally:
            tables.forget()
            for caches in compiled:
                caches.clear()
            gc.collect()  # what was compiled asks its driver to unload it
            driver.set_active(before)


@contextmanager
def binaries():
    """Collects the binaries that launches ask for, by their hash in Triton's cache: kernel and warps. None is compiled,
    and nothing launched.
    """
    found: dict[str, tuple[str, int]] = {}

    def asked(*, fn, compile, **more):
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        found[source.hash()] = (fn.jit_function.fn.__module__, compile["num_warps"])
        return True

    with mock.patch.object(knobs.runtime, "jit_cache_hook", asked):
        yield found
