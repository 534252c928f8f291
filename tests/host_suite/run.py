"""Run timm's own model tests with regnet_fast.create_model in the place of timm's.

    python tests/host_suite/run.py [--quick] [--models 'regnety_*,repvgg_a0'] [-n WORKERS] [-- PYTEST OPTIONS]

The tests come from the source distribution of the installed timm version, downloaded once into .cache/. They are
restricted to the architectures that are rebuilt here. `--baseline` runs timm's own create_model instead: a test that
fails there too is not about us.

The exit code is pytest's; 10 if timm's tests cannot be had; 11 if the run does not prove that our models were tested.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import substitution
import timm
import torch

CACHE = Path(__file__).resolve().parents[2] / ".cache"
FILES = ("pyproject.toml", "tests/conftest.py", "tests/test_models.py")  # pyproject.toml declares the markers
NO_TESTS, NOT_PROVEN = 10, 11

FAMILIES = ("regnetx_*", "regnety_*", "regnetv_*", "regnetz_*", "repvgg_*", "resnetv2_*")
# A small model of every kind of block, norm and stem.
QUICK = (
    "regnetx_002 regnety_002 regnety_040_sgn regnetv_040 regnetv_064 regnetz_005 regnetz_040_h regnetz_b16 regnetz_d8 "
    "repvgg_a0 repvgg_b1g4 resnetv2_18 resnetv2_50 resnetv2_50d_gn resnetv2_50d_evos resnetv2_50x1_bit"
).replace(" ", ",")

# Millions of parameters; the other architectures have fewer than 110.
LARGE = {
    "repvgg_b3": 123, "repvgg_d2se": 133, "regnety_320": 145, "resnetv2_50x3_bit": 217, "resnetv2_152x2_bit": 236,
    "regnety_640": 281, "resnetv2_101x3_bit": 388, "regnety_1280": 645, "resnetv2_152x4_bit": 937, "regnety_2560": 1283,
}  # fmt: skip
# The heaviest test holds a model, pruned copies, and the packed weights of each: as measured on the large ones.
BYTES_PER_PARAMETER = 50
GIGABYTES_PER_WORKER = 1.5
SECONDS_PER_TEST = 900  # timm's limits are for faster machines than two cores


def fetch_tests(version: str) -> Path:
    """The folder with timm's tests of this version, from the cache or from the source distribution."""
    folder = CACHE / f"timm-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as download:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-qq",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-binary=timm",
            "--dest",
            download,
            f"timm=={version}",
        ]
        failed = subprocess.run(command).returncode
        archives = list(Path(download).glob("timm-*.tar.gz"))
        if failed or not archives:
            print(
                f"host suite: pip cannot download the source distribution of timm {version}, which holds its tests.\n"
                f"It needs the network once; or unpack it yourself as {folder}.",
                file=sys.stderr,
            )
            sys.exit(NO_TESTS)
        unpacked = Path(download) / "unpacked"
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                target = unpacked / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    source = archive.extractfile(f"timm-{version}/{name}")
                except KeyError:
                    continue
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        if not (unpacked / "tests" / "test_models.py").is_file():
            print(f"host suite: timm {version}'s source distribution holds no tests/test_models.py", file=sys.stderr)
            sys.exit(NO_TESTS)
        unpacked.rename(folder)
    return folder


def select(patterns: str) -> list[str]:
    """Architectures of our families that match a comma-separated list of patterns."""
    ours = [name for family in FAMILIES for name in timm.list_models(family)]
    wanted = patterns.split(",")
    for pattern in wanted:
        if not fnmatch.filter(ours, pattern):
            sys.exit(f"host suite: no architecture of ours matches {pattern!r}")
    return [name for name in ours if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]


def needed_gigabytes(architecture: str) -> float:
    """Memory that the heaviest test of an architecture takes."""
    return LARGE.get(architecture, 110) * BYTES_PER_PARAMETER / 1e3 + GIGABYTES_PER_WORKER


def available_gigabytes() -> float:
    """The machine's memory, less what the system takes."""
    return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def not_proven(expected: list[str]) -> str:
    """Why the run does not prove that our models were tested; empty if it does."""
    tally = substitution.tally
    if not tally.calls:
        return "no test that passed called the substituted create_model"
    families = {name.split("_")[0] for name in expected}
    missing = families - {name.split("_")[0] for name, count in tally.rebuilt.items() if count}
    return f"not one model was rebuilt of: {', '.join(sorted(missing))}" if missing else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(FAMILIES), help="architectures, comma-separated, with wildcards")
    parser.add_argument("--quick", action="store_const", dest="models", const=QUICK, help="a small model of every kind")
    parser.add_argument("-n", "--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--memory", type=float, default=available_gigabytes(), help="GB that all workers may take")
    parser.add_argument("--baseline", action="store_true", help="timm's own create_model, for comparison")
    parser.add_argument("pytest_options", nargs="*", help="after --")
    options = parser.parse_args()

    folder = fetch_tests(timm.__version__)
    selected = select(options.models)
    per_worker = options.memory / options.workers
    too_big = {name: gb for name in selected if (gb := needed_gigabytes(name)) > per_worker}
    runnable = [name for name in selected if name not in too_big]

    # Each worker computes with its share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.workers)))
    substitute = "timm.models._factory:create_model" if options.baseline else "regnet_fast:create_model"
    code = pytest.main([
        str(folder / "tests" / "test_models.py"), "--rootdir", str(folder), "--import-mode=importlib",
        "-p", "substitution", "--substitute", substitute, f"--architectures={','.join(runnable)}",
        f"--meta-only={','.join(too_big)}", f"--test-timeout={SECONDS_PER_TEST}",
        "-q", "-rfE", "-p", "no:cacheprovider",
        "-W", "ignore:`torch.jit", "-W", "ignore::pytest.PytestAssertRewriteWarning",
        *(["-n", str(options.workers)] if options.workers > 1 else []), *options.pytest_options,
    ])  # fmt: skip

    tally = substitution.tally
    print(f"\nhost suite: timm {timm.__version__}, torch {torch.__version__}, {substitute.replace(':', '.')}")
    print(f"  {tally.calls} calls in tests that passed, {tally.rebuilt.total()} of them returned a rebuilt model")
    print(f"  {sum(n > 0 for n in tally.rebuilt.values())} of {len(selected)} architectures were rebuilt")
    for name, gigabytes in too_big.items():
        print(f"  {name}: configuration only; the rest needs {gigabytes:.0f} GB, a worker has {per_worker:.0f}")
    if options.baseline:
        return code
    for name in (name for name in selected if not tally.rebuilt[name]):
        print(f"  {name}: never rebuilt")
    for test in tally.tests_without_call:
        print(f"  {test}: passed without calling create_model")
    if reason := not_proven(selected):
        print(f"host suite: not proven: {reason}")
        return code or NOT_PROVEN
    return code


if __name__ == "__main__":
    sys.exit(main())
