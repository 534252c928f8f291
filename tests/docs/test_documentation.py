"""What README.md and docs/ show works: Python runs, commands and their options are there, links lead somewhere.

The blocks of a page run in their order in one namespace, in an empty folder, as a reader would type them.
"""

import importlib
import re
import shlex
import warnings
from collections.abc import Callable

import documents
import pytest
import timm
import torch
import typer
from documents import PAGES, ROOT
from typer.testing import CliRunner

from regnet_fast.blocks.fused import FallbackWarning
from regnet_fast.cli import app

NEEDS_A_GPU = {
    ("docs/building.md", 'regnet_fast.backend("cuda,triton")'): "the kernels of csrc/ and Triton's are launched",
    ("docs/graphs.md", "graph=True"): "a CUDA graph is recorded",
}
"""Blocks that run on a GPU alone, by their page and a text in them, each with what needs it."""

LARGE = {("docs/deploying.md", "aoti_compile_and_package"): "compiles C++ for a minute"}
"""Blocks that only a run of the slow tests has."""

SHORT = [
    "regnet-fast info",
    "regnet-fast explain regnety_002",
    "regnet-fast explain regnety_002 --train",
    "regnet-fast verify regnety_002",
]
"""Commands that take seconds, which are run as they stand; all of them, smaller, are test_documented_commands.py."""

EXTRAS = {
    "docs/deploying.md": ("onnx", "onnxscript", "onnxruntime", "segmentation_models_pytorch"),
    "docs/torchvision.md": ("torchvision",),
    "docs/transformers.md": ("transformers",),
}
"""What a page needs beside the package; it is left out where that is not installed."""

WITH_PYTHON = [page for page in PAGES if documents.blocks(page, "python")]


def named(table: dict, page: str, code: str) -> str:
    """The reason why a block stands in a table, or ''."""
    return next((reason for (where, text), reason in table.items() if where == page and text in code), "")


@pytest.fixture
def without_downloads(request, monkeypatch):
    """Pretrained weights are random ones, made here: the one thing that is not as a reader has it."""
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: None)
    extras = EXTRAS.get(documents.name(request.getfixturevalue("page")), ())
    for extra in extras:
        pytest.importorskip(extra)
    if "torchvision" in extras:
        import torchvision

        monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", random_weights)
    if "transformers" in extras:
        import transformers

        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(random_regnet))


def random_weights(weights, **_):
    import torchvision

    return torchvision.models.get_model(type(weights).__name__.removesuffix("_Weights").lower()).state_dict()


def random_regnet(cls, name):
    import transformers

    assert name == "facebook/regnet-y-040"  # whose configuration is the default
    return cls(transformers.RegNetConfig(num_labels=1000)).eval()


def run_page(page, wanted: Callable[[str], bool]) -> int:
    namespace, ran = {"__name__": "__main__"}, 0
    for line, code in documents.blocks(page, "python"):
        if wanted(code):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
            ran += 1
    return ran


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_PYTHON, ids=documents.name)
def test_python_runs(page, tmp_path, monkeypatch, without_downloads, one_thread):
    monkeypatch.chdir(tmp_path)
    where, skipped = documents.name(page), {}

    def wanted(code: str) -> bool:
        reason = named(NEEDS_A_GPU, where, code) if not torch.cuda.is_available() else ""
        reason = reason or named(LARGE, where, code)
        skipped.update({code: reason} if reason else {})
        return not reason

    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        ran = run_page(page, wanted)
    if not ran:
        pytest.skip(f"no GPU: {', '.join(skipped.values())}")


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({ROOT / where for where, _ in LARGE}), ids=documents.name)
def test_large_python_runs(page, tmp_path, monkeypatch, without_downloads):
    monkeypatch.chdir(tmp_path)
    assert run_page(page, lambda code: not named(NEEDS_A_GPU, documents.name(page), code))


@pytest.mark.parametrize("table", [NEEDS_A_GPU, LARGE], ids=["gpu", "large"])
def test_every_exception_is_one_block(table):
    for where, text in table:
        assert sum(text in code for _, code in documents.blocks(ROOT / where, "python")) == 1, (where, text)


def commands(program: str) -> list[str]:
    """All commands that are shown anywhere and begin so."""
    return sorted({c for page in PAGES for c in documents.commands(page) if re.match(rf"{program}(?![\w-])", c)})


@pytest.mark.parametrize("command", commands("regnet-fast"))
def test_command_is_understood(command):
    """Its name, options and their values are read."""
    _, *words = shlex.split(command.replace("...", ""))
    program = typer.main.get_command(app)
    if len(words) > 1 and words[1] != "--help":
        with program.commands[words[0]].make_context(*words[:1], words[1:]) as context:
            assert context.params
    else:
        assert not words or words[0] in program.commands


@pytest.mark.long
@pytest.mark.parametrize("command", SHORT)
def test_short_command_runs(command):
    assert any(command in documents.commands(page) for page in PAGES), "no page shows it any more"
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", commands("python -m bench"))
def test_options_of_benchmarks_are_there(command, capsys):
    module, *words = shlex.split(command)[2:]
    is_package = hasattr(importlib.import_module(module), "__path__")
    main = importlib.import_module(f"{module}.__main__" if is_package else module).main
    with pytest.raises(SystemExit) as end:
        main([*(words[:1] if module == "bench" else []), "--help"])
    options = set(re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out))
    assert end.value.code == 0 and {word for word in words if word.startswith("--")} <= options


def test_make_targets_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {command.split()[1] for command in commands("make")}
    assert used and used <= targets


@pytest.mark.parametrize("page", PAGES, ids=documents.name)
def test_links_lead_somewhere(page):
    for target, anchor in documents.links(page):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{target}: no such file"
        assert not anchor or anchor in documents.anchors(found), f"{target}#{anchor}: no such heading"


def test_every_page_is_in_the_navigation():
    navigation = re.search(r"^nav:\n(.*?)^\w", (ROOT / "mkdocs.yml").read_text(), re.DOTALL | re.MULTILINE)[1]
    shown = set(re.findall(r"[\w-]+\.md", navigation))
    assert shown == {page.name for page in PAGES} - {"README.md"}


def test_the_reference_names_what_is_exported():
    import regnet_fast
    from regnet_fast import functional

    text = (ROOT / "docs" / "api.md").read_text()
    for name in {*regnet_fast._HOME, *functional.__all__}:
        assert re.search(rf"\b{name}\b", text), name
    for path in re.findall(r"^::: (\S+)", text, re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path
