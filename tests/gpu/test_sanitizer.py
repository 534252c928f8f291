"""compute-sanitizer sees nothing wrong with csrc/'s kernels; and what it is given launches them all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import small_launches

from regnet_fast.backends.cuda import launcher
from regnet_fast.backends.cuda.plans import Target

PROGRAM = Path(small_launches.__file__)
ROOT = PROGRAM.parents[2]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_hazard(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    ways = launcher.ways(launcher.architecture("cuda:0"))
    if all(ways.values()):
        pytest.skip("; ".join(ways.values()))
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, PROGRAM]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_every_source_is_launched():
    launched = set()

    def run(launch, tensors):
        launched.add(launch.source)
        for name, tensor in tensors.items():
            if name in ("y", "parts", "moments", "mean", "var", "gate", "dx", "sums", "dweight") and tensor is not None:
                tensor.fill_(1)

    with launcher.standing_in(run, Target(90, 3)), torch.inference_mode():
        small_launches.launch_all("cpu")
    assert launched == {path.name for path in (ROOT / "csrc").glob("*.cu")}
