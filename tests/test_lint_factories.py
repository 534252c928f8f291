"""The lint of factories: it finds what is planted, and nothing in the package."""

import inspect
import subprocess
import sys
from pathlib import Path

import lint_factories
import pytest
import torch
from lint_factories import FACTORIES, LAYERS, LOOKED_AT, ROOT, lint, problems

BOTH = "dtype=torch.float32, device='cpu'"

WRONG = {
    "neither": ("import torch\nx = torch.empty(3)", 2, "torch.empty(...) without device= and dtype="),
    "no dtype": ("import torch\nx = torch.zeros(3, device='cpu')", 2, "without dtype="),
    "no device": ("import torch\n\nx = torch.arange(3, dtype=torch.int64)", 3, "without device="),
    "another name of torch": ("import torch as t\nx = t.randn(3)", 2, "torch.randn(...)"),
    "imported itself": ("from torch import empty\nx = empty(3)", 2, "torch.empty(...)"),
    "imported under another name": ("from torch import full as fill\nx = fill((3,), 1)", 2, "torch.full(...)"),
    "imported in a function": ("def f():\n    import torch\n    return torch.eye(3)", 3, "torch.eye(...)"),
    "a value": ("import torch\nf = torch.empty", 2, "torch.empty as a value"),
    "an argument": (f"import torch\nx = list(f(3, {BOTH}) for f in (torch.ones,))", 2, "torch.ones as a value"),
    "an imported value": ("from torch import rand\nfs = {'a': rand}", 2, "torch.rand as a value"),
    "partial": (f"import torch\nf = partial(torch.ones, {BOTH})", 2, "torch.ones as a value"),
    "getattr": ("import torch\nf = getattr(torch, 'ones')", 2, "torch.ones as a value"),
    "getattr, called": ("import torch\nx = getattr(torch, 'ones')(3)", 2, "torch.ones(...) without"),
    "options": ("import torch\nx = torch.empty(3, **options)", 2, "without device= and dtype="),
    "options and one": ("import torch\nx = torch.empty(3, dtype=d, **options)", 2, "without device="),
    "in a default": ("import torch\ndef f(x=torch.tensor(1.0)): pass", 2, "torch.tensor(...)"),
    "in an argument of one that is right": (
        f"import torch\nx = torch.full((3,), torch.tensor(1.0), {BOTH})",
        2,
        "tensor",
    ),
    "on several lines": ("import torch\nx = (\n    torch.linspace(\n0, 1, 3)\n)", 3, "torch.linspace(...)"),
    "a module's": ("from torch import fft\nx = fft.fftfreq(3)", 2, "torch.fft.fftfreq(...)"),
    "a tensor's class": ("import torch\nx = torch.Tensor(3)", 2, "torch.Tensor(...) takes neither"),
    "a tensor's class, imported": ("from torch import Tensor\nx = Tensor([1.0])", 2, "torch.Tensor(...)"),
    "an older class": ("import torch\nx = torch.cuda.FloatTensor(3)", 2, "torch.cuda.FloatTensor(...)"),
    "a layer": ("from torch import nn\nx = nn.Conv2d(3, 3, 1)", 2, "torch.nn.Conv2d(...)"),
    "a layer by its module": ("import torch.nn as layers\nx = layers.Linear(3, 3, device=d)", 2, "without dtype="),
    "everything": ("from torch import *", 1, "hides factories"),
}

RIGHT = [
    f"import torch\nx = torch.empty(3, {BOTH})",
    f"import torch\nx = torch.empty(3, {BOTH}, **options)",
    f"from torch import empty\nx = empty(3, {BOTH})",
    "import torch\nx = torch.empty_like(y).new_zeros(3)",
    "import numpy\nx = numpy.empty(3)",
    "def empty(n): return n\nx = empty(3)",
    "import triton.language as tl\nx = tl.arange(0, 3)",
    "import torch\nx = isinstance(y, (torch.Tensor, torch.nn.Conv2d))",
    "from torch import Tensor\ndef f(x: Tensor) -> Tensor: return Tensor.clone(x)",
    "import torch\nx = y.tensor(3) + torch.cuda.device_count()",
    "import torch\nx = getattr(torch, name)",
]


@pytest.mark.parametrize("what", WRONG)
def test_what_is_planted_is_found(what, tmp_path):
    source, line, words = WRONG[what]
    found = problems(source)
    assert [at for at, _ in found] == [line] and words in found[0][1], found
    file = tmp_path / "planted.py"
    file.write_text(source)
    assert list(lint([tmp_path])) == [f"{file}:{line}: {found[0][1]}"]


@pytest.mark.parametrize("source", RIGHT)
def test_what_is_right_is_left_alone(source):
    assert problems(source) == []


def test_the_package_names_dtype_and_device():
    assert list(lint([ROOT / folder for folder in LOOKED_AT])) == []


def test_all_of_the_package_is_looked_at():
    files = {path for folder in LOOKED_AT for path in (ROOT / folder).rglob("*.py")}
    assert len(files) > 80 and ROOT / "regnet_fast" / "backends" / "passes" / "compiled.py" in files


def test_the_lint_knows_torch_s_factories():
    """All that a default device changes, by torch's own list, and all layers with parameters: torch gains some."""
    from torch.utils._device import _device_constructors

    named = {id(getattr(owner, name)): f"{prefix}.{name}" for prefix, owner in owners() for name in dir(owner)}
    unknown = {named[id(f)] for f in _device_constructors() if id(f) in named} - FACTORIES
    assert not unknown
    assert len(FACTORIES & set(named.values())) >= len(_device_constructors()) - 2
    for name, cls in vars(torch.nn).items():
        if isinstance(cls, type) and {"device", "dtype"} <= inspect.signature(cls).parameters.keys():
            assert f"torch.nn.{name}" in LAYERS


def owners():
    return ("torch", torch), ("torch.fft", torch.fft), ("torch.nested", torch.nested)


def test_as_a_command(tmp_path):
    """As `make lint` calls it."""

    def run(*paths: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, lint_factories.__file__, *map(str, paths)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    found = run()
    assert (found.returncode, found.stdout) == (0, "Every tensor names its dtype and its device.\n")
    (tmp_path / "planted.py").write_text("import torch\nx = torch.empty(3)\n")
    found = run(tmp_path)
    assert found.returncode == 1 and found.stdout.startswith(f"{tmp_path}/planted.py:2: torch.empty")
