"""Every `regnet-fast` and `torchrun` command of README.md and docs/ runs, each in a folder that holds what it names.

Weights and images are stand-ins that are made here, under the names that the pages use; options behind a command make
it small. What the commands compute has tests of its own.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import timm
import torch
from image_folders import image_folder
from PIL import Image
from safetensors.torch import save_file

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_like_timm.py"
PROGRAM = f"{sys.executable} -m regnet_fast"
TRAINING = "--img-size 32 --batch-size 4 --workers 0 --device cpu"

WORDS = {
    "MODEL...": "regnetx_002",
    "MODEL": "regnetx_002",
    "M": "regnetx_002",
    "IMAGE": "image.png",
    "DIR": "DATA_DIR",
    "SOURCE": "weights.safetensors",
    "SCRIPT.py ...": "train.py DATA_DIR",
    "train.py ...": "train.py DATA_DIR",
    "train.py DATA_DIR --model regnety_016 ...": "train.py DATA_DIR --epochs 1 --batch-size 4",
    "--model regnety_016 ...": "--model regnetx_002",
    "--nproc-per-node 8": "--nproc-per-node 2 --standalone",
    "--no-python regnet-fast": f"--no-python {Path(sys.executable).with_name('regnet-fast')}",
}
"""What stands for the words of a page, longer ones first."""

SMALLER = {
    "classify": "--no-pretrained",
    "verify": "--size 64",
    "compare": "--no-compile --no-runtimes --rounds 1 --size 64",
    "export": "--no-pretrained --size 64",
    "train": f"{TRAINING} --epochs 1",
    "train --resume": f"{TRAINING} --epochs 2",
    "validate": f"{TRAINING} --no-pretrained",
    "validate --checkpoint": TRAINING,
}
"""Options behind a command, by its name."""

NEEDS_A_GPU = "regnet-fast tune"
WITHOUT_ARGUMENTS = [f"regnet-fast {name}" for name in ("convert", "train", "verify")]
"""Names of commands within sentences."""


def shown() -> list[str]:
    found = {c for page in documents.PAGES for c in documents.commands(page)}
    runs = {c for c in found if re.match(r"(regnet-fast|torchrun) ", c) and not c.startswith(NEEDS_A_GPU)}
    return sorted(runs - set(WITHOUT_ARGUMENTS))


def typed(command: str) -> str:
    """A command of a page as it is run here."""
    name = re.sub(r".*(?:regnet-fast|-m regnet_fast) ", "", command).split()[0]
    given = next((f" {option}" for option in ("--resume", "--checkpoint") if option in command), "")
    for word in sorted(WORDS, key=len, reverse=True):
        command = re.sub(rf"(?<!\S){re.escape(word)}(?!\S)", WORDS[word], command)
    end = "" if "--help" in command else SMALLER.get(name + given, SMALLER.get(name, ""))
    if command.startswith("regnet-fast "):
        command = f"{PROGRAM} {command.removeprefix('regnet-fast ')}"
    return re.sub(r"^torchrun ", f"{sys.executable} -m torch.distributed.run ", f"{command} {end}")


def run(command: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(documents.ROOT)}
    captured = {"capture_output": True, "text": True, "timeout": 500}
    done = subprocess.run(shlex.split(command), cwd=folder, env=environment, **captured)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def provide(command: str, folder: Path) -> None:
    """What a command reads."""
    words = command.split()
    if "DATA_DIR" in words:
        image_folder(folder / "DATA_DIR")
    if "train.py" in words:
        (folder / "train.py").write_text(SCRIPT.read_text())
        (folder / "script_neighbour.py").write_text(SCRIPT.with_name("script_neighbour.py").read_text())
    if "image.png" in words:
        Image.new("RGB", (80, 60), "teal").save(folder / "image.png")
    if re.search(r"transformers:FOLDER|convert FOLDER", command):
        transformers = pytest.importorskip("transformers")
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "groups_width": 8}
        transformers.RegNetForImageClassification(transformers.RegNetConfig(**sizes)).save_pretrained(folder / "FOLDER")
    for word in re.findall(r"(?:convert|--checkpoint) (\S+\.safetensors)", command):
        name, classes = ("repvgg_a0", 7) if "--num-classes 7" in command else ("regnety_002", 1000)
        save_file(timm.create_model(name, num_classes=classes).state_dict(), folder / word)
    for word in re.findall(r"convert (\S+\.pth)", command):
        torchvision = pytest.importorskip("torchvision")
        torch.save(torchvision.models.get_model("regnet_y_400mf").state_dict(), folder / word)
    if "import FILE" in command:
        run(f"{PROGRAM} verdicts export FILE", folder)
    if "RUN/" in command:
        model = re.search(r"--model (\S+)", command)[1]
        run(f"{PROGRAM} train DATA_DIR --model {model} --amp --model-ema --output RUN {SMALLER['train']}", folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", shown())
def test_command_runs(command, tmp_path):
    command = typed(command)
    if "export" in command:
        pytest.importorskip("onnxruntime")
    provide(command, tmp_path)
    before = set(tmp_path.rglob("*"))
    printed = run(command, tmp_path)
    assert printed or set(tmp_path.rglob("*")) - before
