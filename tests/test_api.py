"""The public API: timm's names, arguments and errors, and what an import may touch."""

import inspect
import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import regnet_fast
from regnet_fast.blocks.fused import Fused


def fused(model) -> bool:
    return any(isinstance(m, Fused) for m in model.modules())


def test_signatures_are_timms():
    for name in (
        "create_model",
        "list_models",
        "list_pretrained",
        "is_model",
        "get_pretrained_cfg",
        "model_entrypoint",
    ):
        ours, theirs = (
            {
                k: (p.default, p.kind)
                for k, p in inspect.signature(getattr(m, name), follow_wrapped=False).parameters.items()
            }
            for m in (regnet_fast, timm)
        )
        if name == "create_model":
            assert ours.pop("graph") == (False, inspect.Parameter.KEYWORD_ONLY)  # one that is not timm's
        if name == "list_models":
            assert ours.pop("fused") == (False, inspect.Parameter.KEYWORD_ONLY)  # another
        assert ours == theirs, name


def test_names_fall_through_to_timm():
    assert regnet_fast.list_models("regnety_*") == timm.list_models("regnety_*")
    assert regnet_fast.is_model("repvgg_a0") and not regnet_fast.is_model("nothing")
    assert regnet_fast.data is timm.data and regnet_fast.utils is timm.utils and regnet_fast.layers is timm.layers
    assert regnet_fast.models.RegNet is timm.models.RegNet
    assert regnet_fast.is_scriptable is timm.is_scriptable
    with pytest.raises(AttributeError, match="neither regnet_fast nor timm has an attribute 'nonsense'"):
        _ = regnet_fast.nonsense


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("nonsense",), {}),
        (("regnety_002.nonsense",), {}),
        (("some/path",), {}),
        (("regnety_002",), {"in_chans": -1}),
        (("regnety_002",), {"nonsense": 1}),
        (("regnety_002",), {"output_stride": 7}),
        (("local-dir:/nowhere",), {}),
        (("regnety_002",), {"checkpoint_path": "/nowhere.pth"}),
    ],
)
def test_errors_are_timms(args, kwargs):
    with pytest.raises(Exception) as expected:
        timm.create_model(*args, **kwargs)
    with pytest.raises(type(expected.value)) as found:
        regnet_fast.create_model(*args, **kwargs)
    if "checkpoint_path" not in kwargs:
        assert str(found.value) == str(expected.value)


def test_models_without_known_blocks_scriptable_and_exportable_are_timms():
    assert fused(regnet_fast.create_model("resnet18"))
    assert not fused(regnet_fast.create_model("vit_tiny_patch16_224"))
    assert not fused(regnet_fast.create_model("regnetx_002", scriptable=True))
    assert not fused(regnet_fast.create_model("regnetx_002", exportable=True))
    with timm.layers.set_scriptable(True):
        assert not fused(regnet_fast.create_model("regnetx_002"))
    assert fused(regnet_fast.create_model("regnetx_002"))
    assert fused(regnet_fast.model_entrypoint("regnetx_002")())


@pytest.mark.long
def test_in_the_place_of_timms_create_model(monkeypatch):
    monkeypatch.setattr(timm, "create_model", regnet_fast.create_model)
    monkeypatch.setattr(timm.models, "create_model", regnet_fast.create_model)
    assert fused(timm.create_model("regnetx_002"))
    code = """
        import timm, regnet_fast
        timm.create_model = timm.models.create_model = regnet_fast.create_model
        import sys
        for name in [n for n in sys.modules if n.startswith("regnet_fast")]:
            del sys.modules[name]
        import regnet_fast
        timm.create_model = timm.models.create_model = regnet_fast.create_model
        assert timm.create_model("regnetx_002") is not None
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    # the operators of the first import are still registered, which torch refuses to do twice, in words of its own
    assert done.returncode == 0 or "regnet_fast::" in done.stderr, done.stderr


def test_rebuild_takes_only_modules():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        regnet_fast.rebuild("regnety_002")
    report = regnet_fast.rebuild(torch.nn.Linear(3, 3))
    assert not report.rebuilt and not report.kept and "0 modules rebuilt" in str(report)


def test_explain_reports_every_layer_and_restores_the_mode():
    model = regnet_fast.create_model("resnetv2_50d_gn")
    rows = regnet_fast.explain(model, (1, 3, 64, 64))
    assert model.training
    assert {"dense_conv", "pointwise_conv", "host"} <= {row.operation for row in rows}
    assert {row.backend for row in rows} == {"aten", "host", "torch"}
    assert any("GroupNormAct" in row.reason for row in rows if row.operation == "host")
    assert sum(row.flops for row in rows) > 1e8 and all(row.bytes > 0 or row.layer.endswith(" norm") for row in rows)
    others = regnet_fast.explain(timm.create_model("resnet18"), (1, 3, 64, 64))
    assert {row.operation for row in others} == {"host"}


@pytest.mark.long
def test_importing_touches_nothing():
    """No CUDA, no compiler, no network, no file written, and torch itself only when something is used."""
    code = """
        import builtins, os, socket, subprocess, sys
        written = []
        def audit(event, args):
            if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and args[0] != os.devnull:
                written.append(args[0])
            if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.mkdir",
            "os.rename"):
                written.append((event, args[:1]))
        sys.dont_write_bytecode = True
        import regnet_fast
        assert "torch" not in sys.modules and "timm" not in sys.modules
        import torch, timm
        before = set(sys.modules)
        sys.addaudithook(audit)
        regnet_fast.create_model, regnet_fast.functional, regnet_fast.explain, regnet_fast.backends
        import regnet_fast.inspect.compare, regnet_fast.inspect.verify, regnet_fast.inspect.info, regnet_fast.weights
        assert not torch.cuda.is_initialized()
        new = set(sys.modules) - before
        assert not [name for name in new if name.startswith(("cupy", "triton", "pybind11", "torch._inductor"))], new
        assert not written, written
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
