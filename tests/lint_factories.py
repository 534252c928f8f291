"""Every tensor that the package makes names its dtype and device: torch's defaults of both are the user's to change.

    python tests/lint_factories.py [FILE OR FOLDER ...]

prints `file:line: what is wrong` for every call of a factory of torch without both `device=` and `dtype=`, and ends
with status 1 if there is one. What cannot be followed is wrong as well: a factory that is passed on as a value,
`**options` in place of the two, and the constructors of torch's older tensor types, which take neither. `empty_like`,
`new_empty` and their kin inherit both and are no factories.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOOKED_AT = ("regnet_fast", "kernels")


def _named(module: str, names: str) -> set[str]:
    return {f"{module}.{name}" for name in names.split()}


FACTORIES = _named(
    "torch",
    "arange as_tensor asarray bartlett_window blackman_window empty empty_permuted empty_quantized empty_strided eye "
    "full hamming_window hann_window kaiser_window linspace logspace normal ones rand randint randn randperm range "
    "scalar_tensor sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor "
    "sparse_csr_tensor tensor tril_indices triu_indices zeros fft.fftfreq fft.rfftfreq nested.nested_tensor "
    "nested.as_nested_tensor",
)

LAYERS = _named(
    "torch.nn",
    "AdaptiveLogSoftmaxWithLoss BatchNorm1d BatchNorm2d BatchNorm3d Bilinear Conv1d Conv2d Conv3d ConvTranspose1d "
    "ConvTranspose2d ConvTranspose3d Embedding EmbeddingBag GRU GRUCell GroupNorm InstanceNorm1d InstanceNorm2d "
    "InstanceNorm3d LSTM LSTMCell LayerNorm LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d LazyConv1d LazyConv2d "
    "LazyConv3d LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d LazyInstanceNorm1d LazyInstanceNorm2d "
    "LazyInstanceNorm3d LazyLinear Linear LinearCrossEntropyLoss MultiheadAttention PReLU RMSNorm RNN RNNBase RNNCell "
    "RNNCellBase SyncBatchNorm Transformer TransformerDecoder TransformerDecoderLayer TransformerEncoder "
    "TransformerEncoderLayer UninitializedBuffer UninitializedParameter",
)
"""Classes, which may be named freely, and make their parameters where they are called."""

OLDER = {
    f"{module}.{kind}Tensor"
    for module in ("torch", "torch.cuda")
    for kind in ("", "Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
} - {"torch.cuda.Tensor"}

NEEDED = ("device", "dtype")


class _Finder(ast.NodeVisitor):
    """Collects (line, what is wrong) of one file."""

    def __init__(self, tree: ast.Module):
        self.names: dict[str, str] = {}
        self.found: list[tuple[int, str]] = []
        self.called: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "torch":
                        self.names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    if alias.name == "*":
                        self.found.append((node.lineno, f"from {node.module} import * hides factories"))
        self.visit(tree)

    def _name(self, node: ast.expr) -> str | None:
        """What an expression names in torch: "torch.empty", by whatever name the file has it."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._name(node.value)
            return owner and f"{owner}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner = self._name(node.args[0]) if len(node.args) > 1 else None
            if owner and isinstance(node.args[1], ast.Constant):
                return f"{owner}.{node.args[1].value}"
        return None

    def visit_Call(self, node: ast.Call) -> None:
        name = self._name(node.func)
        if name in OLDER:
            self.found.append(
                (node.lineno, f"{name}(...) takes neither dtype nor device; use torch.tensor or torch.empty")
            )
        elif name in FACTORIES or name in LAYERS:
            self.called.add(id(node.func))
            missing = [keyword for keyword in NEEDED if keyword not in {one.arg for one in node.keywords}]
            if missing:
                self.found.append((node.lineno, f"{name}(...) without {' and '.join(f'{word}=' for word in missing)}"))
        elif self._name(node) in FACTORIES and id(node) not in self.called:
            self._value(node)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if id(node) not in self.called and self._name(node) in FACTORIES:
            self._value(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if id(node) not in self.called and self._name(node) in FACTORIES:
            self._value(node)
        self.generic_visit(node)

    def _value(self, node: ast.expr) -> None:
        self.found.append(
            (node.lineno, f"{self._name(node)} as a value: call it where it is named, with both keywords")
        )


def problems(source: str) -> list[tuple[int, str]]:
    """The line and the words for everything that is wrong in a file, in the order of the lines."""
    return sorted(_Finder(ast.parse(source)).found)


def lint(paths: list[Path]) -> Iterator[str]:
    """`file:line: what is wrong` of all files, and of those in folders."""
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for line, what in problems(file.read_text(encoding="utf-8")):
                name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
                yield f"{name}:{line}: {what}"


def main(arguments: list[str]) -> int:
    """Print what is wrong; the status of the process."""
    wrong = list(lint([Path(one).resolve() for one in arguments] or [ROOT / folder for folder in LOOKED_AT]))
    print("\n".join(wrong) if wrong else "Every tensor names its dtype and its device.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
