"""Writes the sources of the extension module: `python csrc/extension/instantiate.py FOLDER ARCH...`.

The kernels are those of cuda_launches.py: all that the default plans take for some models, in inference and in
training, and every depthwise one. Kernels of one source, dtype and group width share a translation unit; `kernels.cpp`
is the table of all. They serve every batch at the models' own image sizes. REGNET_FAST_CUDA_MODELS names other models
than shapes.py does. Needs the standard library alone.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

UNIT = """#include "{source}"
#include "entry.h"

Kernels {name}() {{
    return {{
{entries}
    }};
}}
"""

TABLE = """#include "entry.h"

{declarations}

Kernels all_kernels() {{
    Kernels all;
    for (const Kernels& some : {{{calls}}}) all.insert(all.end(), some.begin(), some.end());
    return all;
}}
"""


def launches_module() -> ModuleType:
    """csrc.extension.cuda_launches, with each package as a plain folder of modules: regnet_fast itself needs torch."""
    for name in ("regnet_fast", "regnet_fast.backends", "regnet_fast.backends.cuda", "csrc", "csrc.extension"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    return importlib.import_module("csrc.extension.cuda_launches")


def units(arches: list[int], models: list[str]) -> dict[str, tuple[str, list[str]]]:
    """The source and the kernels, each once, of every translation unit by name.

    Raises ValueError for an unknown architecture or model, and for models without such convolutions.
    """
    launches = launches_module()
    known, dtypes = launches.PROCESSORS, tuple(launches.plans.TYPES)
    if unknown := [arch for arch in arches if arch not in known]:
        raise ValueError(f"no architecture {unknown[0]}; choose from {', '.join(map(str, known))}")
    if not launches.grouped_convs(models):
        raise ValueError(f"none of {', '.join(models)} has a convolution that csrc/ has a kernel for")
    found: dict[str, dict[str, str]] = {}
    for arch in arches:
        of_models = launches.of_models(models, arch, dtypes, launches.all_batches(arch))
        for launch in (*of_models, *launches.of_depthwise(dtypes)):
            name = "_".join(re.findall(r"\w+", launch.kernel)[:3])
            found.setdefault(name, {})[launch.kernel] = launch.source
    return {name: (next(iter(kernels.values())), list(kernels)) for name, kernels in found.items()}


def write(path: Path, text: str) -> None:
    """Write a file unless it says so already: what is older than its object is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_sources(out: Path, found: dict[str, tuple[str, list[str]]]) -> None:
    """Write the translation units and their table into a folder, and no others."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (source, kernels) in found.items():
        entries = "\n".join(f'        entry("{kernel}", {kernel}),' for kernel in kernels)
        write(out / f"{name}.cu", UNIT.format(source=source, name=name, entries=entries))
    declarations = "\n".join(f"Kernels {name}();" for name in found)
    write(out / "kernels.cpp", TABLE.format(declarations=declarations, calls=", ".join(f"{n}()" for n in found)))
    for path in set(out.glob("*.cu")) - {out / f"{name}.cu" for name in found}:
        path.unlink()


def main(folder: str, *arches: str) -> None:
    """Write the sources that the environment asks for."""
    models = os.environ.get("REGNET_FAST_CUDA_MODELS", "").split() or list(launches_module().shapes.MODELS)
    write_sources(Path(folder), units([int(arch) for arch in arches], models))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
