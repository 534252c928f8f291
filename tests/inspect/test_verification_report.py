"""What `regnet-fast verify` says of the layers, draws and writes."""

import json
import sys
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from regnet_fast.backends import onednn
from regnet_fast.cli import app
from regnet_fast.inspect import verification_report, verify
from regnet_fast.trials import cpu

MODEL, OTHER = "resnetv2_18", "convnext_atto"


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments), "--size", "32"])


@pytest.fixture
def wrong_layer(monkeypatch):
    """The convolutions of 256 channels, which begin in the third stage, compute one value wrong."""
    prepare = onednn.prepare_conv

    def prepare_wrong(*arguments):
        conv = prepare(*arguments)

        class Wrong(onednn.Convolution):
            label = "wrong"

            def __call__(self, *operands):
                y = conv(*operands)
                if y.shape[1] == 256:
                    y[1, 7, 1, 0] += 0.5
                return y

        return Wrong()

    monkeypatch.setattr(onednn, "prepare_conv", prepare_wrong)
    monkeypatch.setattr(cpu, "by_program", lambda *_: False)


class Page(HTMLParser):
    """The text of a page by tag, and everything that it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        urls = [found[name] for name in ("src", "href", "xlink:href") if name in found]
        self.loads += [url for url in urls if not url.startswith("#")]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []


def test_layers_are_judged_in_the_order_of_execution():
    found = verify.verify("resnetv2_18", 2, 32)
    names = [check.stage for check in found.layers]
    assert len(names) == found.rebuilt and names[0].startswith("stem") and names[-2:] == ["stages.3.blocks.1", "head"]
    assert names.index("stages.0.blocks.0") < names.index("stages.3.blocks.1")
    by_name = {check.stage: check for check in found.layers}
    assert by_name["stages.1.blocks.1"].max_ours > 0 and found.first_fault is None
    assert found.worst.ratio == max(check.ratio for check in found.layers)
    last = found.layers[-2]
    image, channel, row, column = last.where
    ours, timm, exact = last.values
    assert last.place.startswith(f"image {image}, channel {channel}, row {row}, column {column}: ours {ours:.9g}, timm")
    assert abs(ours - exact) == pytest.approx(last.max_ours) and timm != exact
    content = json.loads(json.dumps(found.as_dict()))
    assert content["worst_layer"] == found.worst.stage and content["first_faulty_layer"] is None
    assert [layer["stage"] for layer in content["layers"]] == names


def test_the_place_of_a_fault(wrong_layer):
    result = run(MODEL)
    assert result.exit_code == 1
    first = next(line for line in result.output.splitlines() if line.startswith("first layer beyond the rule: "))
    assert first.startswith("first layer beyond the rule: stages.2.blocks.0: the largest error everywhere")
    found = verify.verify(MODEL, 2, 32)
    assert found.first_fault.stage == "stages.2.blocks.0" and found.first_fault.ratio > 100
    assert found.first_fault.where == (1, 7, 1, 0) and "image 1, channel 7, row 1, column 0" in found.first_fault.place
    assert not found.worst.ok and found.worst.ratio >= found.first_fault.ratio


def test_figure_and_page(tmp_path):
    pytest.importorskip("matplotlib")
    figure, page = tmp_path / "errors.png", tmp_path / "report.html"
    result = run(MODEL, "--dtype", "float32", "--dtype", "bfloat16", "--figure", figure, "--html", page)
    assert result.exit_code == 0, result.output
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.loads == [] and found.tags.count("svg") == 1 and found.tags.count("table") == 4
    assert f"<b>{MODEL} is the same function as timm's.</b>" in text
    for words in ("stages.3.blocks.1", "Worst layer: ", "image ", torch.__version__, "2x3x32x32, bfloat16, cpu"):
        assert words in text


def test_the_lines_of_a_figure_are_the_errors():
    pytest.importorskip("matplotlib")
    found = verify.verify(MODEL, 1, 32)
    (axes,) = verification_report.figure([found]).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["ours"] == [check.max_ours for check in found.layers]
    assert lines["timm"] == [check.max_eager for check in found.layers]
    assert all(a >= 2 * b for a, b in zip(lines["allowed"], lines["timm"], strict=True))
    assert [label.get_text() for label in axes.get_xticklabels()] == [check.stage for check in found.layers]


def test_a_page_of_a_fault_and_of_another_family(wrong_layer, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    assert run(MODEL, "--html", page).exit_code == 1
    text = page.read_text(encoding="utf-8")
    assert "NOT the same function" in text and '<tr class="wrong">' in text and "times eager&#x27;s" in text
    result = run(OTHER, "--html", page, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["verifications"][0]["layers"] == []
    assert "passed through as it is" in page.read_text(encoding="utf-8")


def test_files_that_cannot_be_written_are_usage_errors(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(verify, "verify", lambda *options: pytest.fail("ran first"))
    for option, file, message in (
        ("--figure", tmp_path / "errors.xyz", "ends in none of the formats of figures: "),
        ("--html", tmp_path / "nowhere" / "report.html", "there is no folder"),
    ):
        result = run(MODEL, option, file)
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    result = run(MODEL, "--figure", tmp_path / "errors.png")
    assert result.exit_code == 2 and "pip install 'regnet_fast[report]'" in result.stderr
