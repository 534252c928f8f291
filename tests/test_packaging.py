"""What a wheel holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_wheel_ships_the_kernels_and_their_tables(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    (source / "regnet_fast").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "regnet_fast" / "__init__.py", source / "regnet_fast")
    shutil.copytree(ROOT / "kernels", source / "kernels")
    (source / "regnet_fast" / "kernels").symlink_to("../kernels")
    table = source / "kernels" / "tuned" / "some-gpu" / "pointwise_conv.json"
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "regnet_fast/kernels/tuned/some-gpu/pointwise_conv.json" in names
    assert "regnet_fast/kernels/tables.py" in names and {name.partition("/")[0] for name in names} == {
        "regnet_fast",
        next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA")),
    }
