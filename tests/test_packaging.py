"""What a wheel holds."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_wheel_ships_the_kernels_and_what_was_measured(tmp_path):
    """Triton's with what was tuned, the sources of csrc/, and nothing compiled by another build."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    (source / "regnet_fast").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "regnet_fast" / "__init__.py", source / "regnet_fast")
    for name in ("kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name)
        (source / "regnet_fast" / name).symlink_to(f"../{name}")
    shutil.copytree(ROOT / "regnet_fast" / "backends", source / "regnet_fast" / "backends")
    (source / "regnet_fast" / "backends" / "build_info.json").write_text("{}")
    measured = source / "kernels" / "tuned" / "some-gpu.json"
    measured.parent.mkdir(parents=True)
    measured.write_text("{}")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    environment = {name: value for name, value in os.environ.items() if name != "REGNET_FAST_BUILD_CUDA"}
    subprocess.run([sys.executable, "-c", build], cwd=source, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "regnet_fast/kernels/tuned/some-gpu.json" in names
    sources = {path.name for path in (ROOT / "csrc").glob("*.cu*")} | {"device/primitives.cuh"}
    sources |= {f"cpu/{path.name}" for path in (ROOT / "csrc" / "cpu").iterdir()}
    assert sources == {name.removeprefix("regnet_fast/csrc/") for name in names if "/csrc/" in name}
    assert not [name for name in names if name.endswith(".so") or "build_info" in name]
    assert "regnet_fast/kernels/tables.py" in names and {name.partition("/")[0] for name in names} == {
        "regnet_fast",
        next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA")),
    }
