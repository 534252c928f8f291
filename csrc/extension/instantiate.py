"""Writes the sources of the extension module: `python csrc/extension/instantiate.py FOLDER ARCH...`.

One translation unit for each kernel that a default plan launches for a model's grouped convolutions in inference, with
the parts of the means and without, and `kernels.cpp`, the table of them. REGNET_FAST_CUDA_MODELS and
REGNET_FAST_CUDA_BATCHES name other models and batches than bench/cases.py does. Needs the standard library alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("bfloat16", "float16")

UNIT = """#include "{source}"
#include "entry.h"

Kernel kernel_{index}() {{ return entry("{kernel}", {kernel}); }}
"""

TABLE = """#include "entry.h"

{declarations}

std::vector<Kernel> all_kernels() {{ return {{{calls}}}; }}
"""


def module(path: str) -> ModuleType:
    """A module of the repository from its file, without the package around it."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def instantiations(arches: list[int], models: list[str], batches: list[int]) -> list[tuple[str, str]]:
    """Sources and kernels of the models, each once. Raises ValueError for an unknown architecture or model."""
    plans, cases = module("regnet_fast/backends/cuda_plans.py"), module("bench/cases.py")
    unknown = [arch for arch in arches if arch not in plans.PROCESSORS]
    if unknown:
        raise ValueError(f"no architecture {unknown[0]}; choose from {', '.join(map(str, plans.PROCESSORS))}")
    operations = cases.operations().values()
    if missing := set(models) - set(cases.model_names()):
        raise ValueError(f"no model is called {missing.pop()!r}")
    found: dict[tuple[str, str], None] = {}
    for facts in operations:
        if facts["op"] != "grouped_conv" or not facts["models"].keys() & set(models):
            continue
        size, stride, groups = facts["hw"] * facts["stride"], facts["stride"], facts["groups"]
        for dtype in DTYPES:
            for batch in batches:
                problem = plans.GroupedConv(batch, size, size, groups, facts["in"] // groups, stride, dtype)
                if facts["dilation"] != 1 or facts["in"] != facts["out"] or plans.refuse(problem):
                    continue
                for parts in (False, True):
                    for arch in arches:
                        target = plans.Target(arch, plans.PROCESSORS[arch])
                        launch = plans.grouped_conv_forward(problem, facts["activation"], parts, target)
                        found[launch.source, launch.kernel] = None
    return list(found)


def write(path: Path, text: str) -> None:
    """Write a file unless it says so already: what is older than its object is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main(folder: str, *arches: str) -> None:
    """Write all sources into a folder, and no others."""
    models = os.environ.get("REGNET_FAST_CUDA_MODELS", "").split() or module("bench/cases.py").DEFAULT_MODELS
    batches = os.environ.get("REGNET_FAST_CUDA_BATCHES", "").split() or module("bench/cases.py").DEFAULT_BATCHES["cuda"]
    kernels = instantiations([int(arch) for arch in arches], list(models), [int(batch) for batch in batches])
    if not kernels:
        raise ValueError(f"none of {', '.join(models)} has a convolution that csrc/ has a kernel for")
    out, names = Path(folder), [f"kernel_{i}" for i in range(len(kernels))]
    out.mkdir(parents=True, exist_ok=True)
    for index, (source, kernel) in enumerate(kernels):
        write(out / f"kernel_{index}.cu", UNIT.format(source=source, kernel=kernel, index=index))
    declarations = "\n".join(f"Kernel {name}();" for name in names)
    write(out / "kernels.cpp", TABLE.format(declarations=declarations, calls=", ".join(f"{n}()" for n in names)))
    for path in set(out.glob("kernel_*.cu")) - {out / f"{name}.cu" for name in names}:
        path.unlink()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
