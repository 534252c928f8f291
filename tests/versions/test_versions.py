"""What may break with another torch, Triton or Python, in a minute: `make versions` runs it on all that are supported,
and what `run.py` names beside it.
"""

import copy
import importlib.util
import math
import pkgutil

import pytest
import regnets
import timm
import torch
from helpers import assert_close_to_reference, compare, randomize_bn

import regnet_fast
from bench.compile import csrc, kernels
from csrc.extension import cuda_launches
from regnet_fast.backends.cuda import nvrtc
from regnet_fast.hosts import registry

FAMILIES = dict(regnetx_002=64, regnety_002=64, regnetz_005=64, regnetv_040=64, repvgg_a0=64, resnetv2_18=64)
"""A small model of each, and the size of its images."""

ARCHITECTURES = (80, 89, 90)


def test_every_module_is_imported():
    names = [module.name for module in pkgutil.walk_packages(regnet_fast.__path__, "regnet_fast.")]
    names = [name for name in names if not name.endswith(("__main__", "instantiate"))]
    assert len(names) > 60 and "regnet_fast.kernels.squeeze_excite" in names
    missing = tuple(
        ours for theirs, ours in registry._HOSTS.items() if importlib.util.find_spec(theirs.partition(".")[0]) is None
    )
    for name in names:
        if not name.endswith(missing):  # it is about a library that nobody has to have
            importlib.import_module(name)


def _sources():
    launches = {launch.source: launch for launch in cuda_launches.of_models(["regnety_016"], 90, ["bfloat16"], (1,))}
    return launches | {launch.source: launch for launch in cuda_launches.of_depthwise(["float16"])}


@pytest.mark.parametrize("source", sorted(path.name for path in csrc.CSRC.glob("*.cu")))
def test_nvrtc_compiles(source, monkeypatch, tmp_path):
    """As the package does at first use, for a GPU of the middle."""
    assert nvrtc.refuse() is None
    monkeypatch.setenv("REGNET_FAST_CACHE", str(tmp_path))
    made = nvrtc.compiled(source, _sources()[source].kernel, 90)
    assert made.cubin.startswith(b"\x7fELF") and made.name in made.cubin.decode("latin1")


def _size(job):
    """How much of a GPU a job takes: its tiles and stages, then its operands."""
    sizes = [value for name, value in job.constants if name.startswith(("BLOCK_", "STAGES"))]
    return math.prod(sizes), len(job.arguments)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_triton_compiles(arch):
    """One job of each kernel: the largest where shared memory is the least, else the smallest."""
    kinds = {}
    for job in kernels.jobs(["regnety_016", "resnetv2_18"], [arch], ["bfloat16"]):
        kinds.setdefault(job.kernel, []).append(job)
    assert len(kinds) == 19
    made = [kernels.compile_job((max if arch == 89 else min)(same, key=_size)) for same in kinds.values()]
    faults = [f"{one.job.kernel}, {one.job.config}: {one.fault}" for one in made if one.fault]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("no_silent_fallback")
def test_a_model_of_each_family_is_evaluated(name):
    theirs = timm.create_model(name).eval()
    randomize_bn(theirs)
    compare(theirs, torch.randn(2, 3, FAMILIES[name], FAMILIES[name]), name)


def test_a_compiled_block():
    """By Inductor, without a break in the graph."""
    theirs = regnets.of_timm().eval().s1
    ours = regnet_fast.rebuild(copy.deepcopy(theirs))
    assert ours.rebuilt
    x = torch.randn(2, regnets.STEM, 16, 16)
    with torch.no_grad():
        found = torch.compile(ours.model, fullgraph=True)(x)
        assert_close_to_reference(found, theirs(x), copy.deepcopy(theirs).double()(x.double()), "a compiled block")
