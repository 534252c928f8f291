"""torch's settings through both of its interfaces, one after another in every order: read without raising, told to
another process, and in every key that rests on them. Each order is set in a process of its own.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from itertools import permutations, product
from operator import attrgetter

import pytest
import torch

from regnet_fast import backends, graphs
from regnet_fast.backends import ConvProblem, Geometry, NormActProblem, SqueezeExciteProblem
from regnet_fast.blocks import fused
from regnet_fast.functional import pack_conv
from regnet_fast.inspect import tuner
from regnet_fast.settings import Settings, settings
from regnet_fast.trials import cpu

NEW = ("backends", "backends.cudnn", "backends.cudnn.conv", "backends.cudnn.rnn", "backends.cuda.matmul")
WRITES = [
    *((f"{place}.fp32_precision", value) for place in NEW for value in ("none", "ieee", "tf32")),
    *((f"backends.{place}.allow_tf32", on) for place in ("cudnn", "cuda.matmul") for on in (True, False)),
    *(("set_float32_matmul_precision", value) for value in ("highest", "high", "medium")),
]
CONV = ConvProblem((2, 8, 4, 4), 8, (1, 1), Geometry(), "relu", False, False, torch.float32, "cuda:0")
GATE = SqueezeExciteProblem(2, 8, 4, "relu", torch.float32, "cuda:0")
NORM = NormActProblem((2, 8, 4, 4), "relu", False, torch.float32, "cuda:0")


def write(name, value):
    if name.startswith("set_"):
        getattr(torch, name)(value)
    else:
        place, _, attribute = name.rpartition(".")
        setattr(attrgetter(place)(torch), attribute, value)


def outcome(read):
    try:
        return read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def precision():
    from regnet_fast.kernels import common

    return common.precision(torch.float32)


READS = {
    "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "settings": lambda: [*settings()],
    "told to a process": lambda: settings().apply() or [*settings()],
    "a graph's key": lambda: str(graphs._key(torch.zeros(1, 1, 1, 1))),
    "a plan's key": lambda: str(fused._key(torch.zeros(1, device="meta"), torch.float32, False)),
    "a kernel's products": precision,
    "tuning's rounding": lambda: tuner._rounding(torch.float32),
    "a verdict's words": lambda: [cpu.words(problem) for problem in (CONV, GATE, NORM)],
}

OURS = [*READS][3:]


def main():
    """Read everything after each order of writes, in a fork that nothing was set in."""
    precision()  # imports Triton once
    for writes in [*permutations(WRITES, 1), *permutations(WRITES, 2)]:
        if os.fork():
            if os.wait()[1]:
                sys.exit(1)
            continue
        for one in writes:
            write(*one)
        print(json.dumps([writes, {name: outcome(read) for name, read in READS.items()}]), flush=True)
        os._exit(0)


@lru_cache
def table():
    found = subprocess.run([sys.executable, "-W", "error", __file__], capture_output=True, text=True, check=False)
    assert not found.returncode, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def raised(value):
    return isinstance(value, str) and value.startswith("RuntimeError: PyTorch is checking")


def test_whatever_was_set_all_that_rests_on_it_is_read():
    wrong = [(writes, name, found[name]) for writes, found in table() for name in OURS if "Error" in str(found[name])]
    assert not wrong
    assert len(table()) == len(WRITES) ** 2


@pytest.mark.parametrize(("old", "index"), [("cudnn.allow_tf32", 0), ("matmul.allow_tf32", 1)])
def test_it_is_what_the_older_interface_says_where_that_does_not_raise(old, index):
    says = [(found[old], found["settings"][index]) for _, found in table() if not raised(found[old])]
    assert {(one, other) for one, other in says} == {(True, True), (False, False)}
    assert sum(raised(found[old]) for _, found in table()) > 50, "mixed, it does raise"


def test_another_process_is_told_the_same():
    assert all(found["told to a process"] == found["settings"] for _, found in table())


def test_keys_and_products_follow():
    for name in ("a graph's key", "a plan's key"):
        of = {}
        for _, found in table():
            of.setdefault(tuple(found["settings"]), set()).add(found[name])
        assert len(of) == 4 and all(len(keys) == 1 for keys in of.values()) and len(set.union(*of.values())) == 4
    for _, found in table():
        conv, matmul, *_ = found["settings"]
        assert found["a kernel's products"] == ("tf32" if conv else "ieee")
        assert found["tuning's rounding"] == (2**-10 if conv else 2**-16)
        for words in found["a verdict's words"]:
            assert ("tf32 convolutions" in words, "tf32 products" in words) == (conv, matmul)


@pytest.fixture
def restored():
    before = settings()
    yield
    before.apply()
    torch.backends.cuda.matmul.fp32_precision = "none"  # which it is by itself


@pytest.mark.parametrize("given", [*product([False, True], repeat=5)], ids=str)
def test_all_of_it_is_told(restored, given):
    Settings(*given).apply()
    assert settings() == given


@pytest.mark.parametrize("algorithms", [False, True])
def test_both_settings_ask_for_equal_bits(restored, algorithms):
    assert not settings().deterministic
    if algorithms:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = not algorithms
    try:
        assert settings().deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_words_of_a_problem_on_a_cpu_and_in_half_name_no_products(restored):
    torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled = True, False
    half = ConvProblem(*[*vars(CONV).values()][:7], torch.float16, "cuda:0")
    assert cpu.words(half).endswith("relu, float16, benchmark, without cuDNN")
    assert cpu.words(ConvProblem(*[*vars(CONV).values()][:8], "cpu")).endswith("relu, float32")


def test_packed_weights_serve_each_settings_apart(restored):
    packed, x = pack_conv(torch.randn(4, 8, 1, 1)), torch.empty(1, 8, 2, 2, device="meta")
    one = packed.here(x)
    assert packed.here(x) is one
    torch.backends.cudnn.deterministic = True
    other = packed.here(x)
    assert other is not one and other.weight is one.weight and other._runs is not one._runs
    with backends.backend("reference"):
        assert packed.here(x) not in (one, other)
    torch.backends.cudnn.deterministic = False
    assert packed.here(x) is one
    on_cpu = torch.empty(1, 8, 2, 2)
    assert packed.here(on_cpu) is packed, "on a CPU they decide nothing"


if __name__ == "__main__":
    main()
