"""The short set of tests on every minor version of torch since the oldest, and on every Python on the newest torch.

    python tests/versions/run.py .venv .venv-oldest            all; these two environments are there
    python tests/versions/run.py .venv --only 2.12 --only py3.12

An environment that is there serves for the version that it has. Any other is made in .cache/versions, while the tests
run on the one before, and removed after use. What pip does not offer here, and a Python that is not there, are skipped
with a line. The exit status is 1 if an environment could not be made or a test failed; the last lines say which.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "versions"
TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
PYTHONS = ("3.10", "3.12", "3.13")

# timm 1.0.31 and the rest come with the project; pip finds the torchvision that goes with a torch.
INSTALL = ("-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check")
CONSTRAINTS = ("-c", str(ROOT / "tests" / "constraints.txt"))
OLDER = {"2.11.0": ("numpy<2.4",)}
NOT_OFFERED = re.compile(
    r"Cannot install torch===\S+ because|No matching distribution found for torch"
    r"|The user requested \(constraint\) torch"
)

TESTS = (
    "tests/versions",
    "tests/blocks/test_training_models.py::test_one_step",
    "tests/backends/test_cpu_passes.py::test_statistics",
    "tests/backends/test_cpu_passes.py::test_joins",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The short set of tests on every version.")
    parser.add_argument("environments", nargs="*", type=Path, help="that are there; the first has the newest torch")
    parser.add_argument("--only", action="append", help="versions that begin so: 2.12, or py3.12; all by default")
    parser.add_argument("-n", "--workers", default="2")
    options = parser.parse_args(arguments)
    there = {}
    for folder in options.environments:
        python = folder.absolute() / "bin" / "python"
        there.setdefault(_minor(_torch_of(python)), python)
    plan = [one for one in _plan(there) if not options.only or one[0].startswith(tuple(options.only))]
    results, ahead = [], None
    with ThreadPoolExecutor(1) as pool:
        for one, following in zip(plan, [*plan[1:], None], strict=True):
            start, name = time.monotonic(), one[0]
            made = (ahead or pool.submit(_made, *one)).result()
            ahead = pool.submit(_made, *following) if following else None
            print(f"\n=== {name}", flush=True)
            outcome = made if isinstance(made, tuple) else _tested(made, options.workers)
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            results.append((name, *outcome, time.monotonic() - start))
            print(f"=== {name}: {outcome[0]} in {results[-1][-1]:.0f} s", flush=True)
    print("\n=== versions")
    for name, outcome, versions, seconds in results:
        print(f"{name:12} {outcome:24} {seconds:5.0f} s  {versions}")
    failed = [name for name, outcome, _, _ in results if outcome.startswith("failed")]
    print(f"failed: {', '.join(failed)}" if failed else "none failed", flush=True)
    return 1 if failed or not results else 0


def _plan(there: dict[str, Path]) -> list[tuple[str, Path | None, str | None]]:
    """Names, with an environment that is there, or with what to install: a torch, or None for the newest."""
    minors = {_minor(torch): torch for torch in TORCHES}
    found = [(minor, there.get(minor), minors.get(minor)) for minor in sorted({*minors, *there}, key=_numbers)]
    return found + [(f"py{version}", None, None) for version in PYTHONS]


def _made(name: str, python: Path | None, torch: str | None) -> Path | tuple[str, str]:
    """The Python of an environment, made where none is there, or why there is none."""
    if python is not None:
        return python
    base = _interpreter(name[2:]) if name.startswith("py") else sys.executable
    if base is None:
        return "skipped", f"there is no Python {name[2:]} here"
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    # Not "==", which takes a build with a local version, such as 2.13.0+cpu, before the index's own.
    wanted = [f"torch==={torch}", *OLDER.get(torch, ())] if torch else []
    command = [str(python), *INSTALL, *CONSTRAINTS, *wanted, "--editable", ".[test]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return python
    errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
    print("\n".join(errors[-30:]), flush=True)
    if torch and NOT_OFFERED.search(done.stderr):
        return "skipped", f"pip offers no torch {torch} here"
    return "failed to install", ""


def _tested(python: Path, workers: str) -> tuple[str, str]:
    """Run the set. A torch that is not for CUDA would leave half of it out, and fails."""
    line = [str(python), "tests/versions/here.py"]
    here = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if here.returncode:
        print(here.stderr, flush=True)
        return "failed to import torch", ""
    versions = here.stdout.strip()
    print(versions, flush=True)
    if "not for CUDA" in versions or "no triton" in versions:
        return "failed: no CUDA build", versions
    command = [str(python), "-m", "pytest", "-q", "-n", workers, "-m", "not slow", *TESTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return ("passed" if status == 0 else f"failed (pytest {status})"), versions


def _interpreter(version: str) -> str | None:
    """A Python of a version: on the path, or of pyenv."""
    candidates = [f"python{version}", *map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))]
    for candidate in candidates:
        program = "import sys; print(sys.version_info[:2] == tuple(map(int, sys.argv[1].split('.'))))"
        try:
            done = subprocess.run([candidate, "-c", program, version], capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.stdout.strip() == "True":
            return candidate
    return None


def _torch_of(python: Path) -> str:
    program = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    sys.exit(main())
