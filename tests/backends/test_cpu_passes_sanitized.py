"""csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer, and in memory that is filled with other bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized as sanitized_calls
import torch

SCRIPT = Path(__file__).parents[1] / "sanitized.py"
OPTIONS = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
MODELS = ("regnety_002", "repvgg_a0", "resnetv2_18")


def run(*what: str, env: dict[str, str], timeout: int = 900) -> subprocess.CompletedProcess:
    root = SCRIPT.parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *what], env=env, capture_output=True, text=True, timeout=timeout
    )


def digest(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stderr[-6000:]
    (line,) = done.stdout.split()
    assert len(line) == 64
    return line


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment of a process whose csrc/cpu is instrumented and whose memory is watched."""
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++, whose runtime is loaded before Python")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            [gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"g++ has no {name}")
        runtimes.append(found)
    return {
        "CXX": f"{gcc} {OPTIONS}",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.slow
def test_a_write_beyond_memory_is_seen(sanitized):
    """What the next tests rely on."""
    done = run("planted", env=sanitized)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "WRITE of size" in done.stderr, done.stderr[
        -3000:
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["passes", "steps", *MODELS])
def test_memory_is_respected(what, sanitized):
    """Direct calls of all widths, every kind of block, and training steps of models on images of odd sizes."""
    digest(run(what, env=sanitized))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["steps", "regnety_002"])
def test_results_do_not_depend_on_what_memory_held(what):
    """glibc fills what it gives and takes back; 255 makes a NaN of every float."""
    assert len({digest(run(what, env={"MALLOC_PERTURB_": value})) for value in ("0", "85", "255")}) == 1


def test_nothing_is_read_before_it_is_written():
    """With torch's own memory full of NaN."""
    digests = []
    before = torch.get_num_threads()
    for filled in (False, True):
        torch.manual_seed(0)
        found = sanitized_calls.Digest()
        try:
            torch.use_deterministic_algorithms(filled)
            assert not filled or torch.empty(3, 5).isnan().all()
            for n, c, h, w in [
                (1, 1, 1, 1),
                (3, 7, 5, 3),
                (2, 24, 9, 9),
                (1, 129, 17, 1),
                (3, 200, 3, 3),
                (1, 2049, 2, 1),
            ]:
                sanitized_calls.one_shape(found, n, c, h, w)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(before)
        digests.append(found.sha.hexdigest())
    assert digests[0] == digests[1]
