"""The examples run, and show what they say."""

import importlib.util
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    every = module.digits()
    monkeypatch.setattr(module, "digits", lambda: tuple(t[:256] for t in every))
    return module


def test_digits(digits, tmp_path, capsys):
    figure = tmp_path / "new" / "digits.svg"
    assert digits.main(["--epochs", "1", "--seeds", "1", "--figure", str(figure)]) == 0
    assert figure.read_text().count("<path") > 2
    assert "agree" in capsys.readouterr().out


@pytest.mark.long
def test_the_two_libraries_train_alike(digits):
    curves = [digits.train(name, 0, 1) for name in ("timm", "regnet_fast")]
    assert abs(curves[0][0]["loss"] - curves[1][0]["loss"]) < 1e-3
    assert digits.train("regnet_fast", 1, 1)[0]["loss"] != curves[1][0]["loss"]


def test_a_difference_is_told(digits, tmp_path, monkeypatch, capsys):
    curve = {"timm": 0.99, "regnet_fast": 0.5}
    result = [{"loss": 1.0, "accuracy": 0.0, "seconds": 1.0}]
    monkeypatch.setattr(digits, "train", lambda name, *_: [{**result[0], "accuracy": curve[name]}])
    assert digits.main(["--seeds", "2", "--figure", str(tmp_path / "d.svg")]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_tour(capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    runpy.run_path(str(EXAMPLES / "tour.py"))
    told = capsys.readouterr().out
    assert "largest error" in told and "loss" in told and "input" in told


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= {name.removeprefix("test_") for name in globals()}
