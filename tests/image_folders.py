"""Small folders of images whose classes are colours, and the options of runs on them that take a second."""

from pathlib import Path

import numpy
from PIL import Image

from regnet_fast.training import run_state
from regnet_fast.training.options import TrainOptions
from regnet_fast.weights.checkpoints import read_content

MODEL = "regnetx_002"
CLASSES = ("blue", "green", "red")
SMALL = ("--model", MODEL, "--img-size", 32, "--workers", 0, "--device", "cpu", "--batch-size", 8, "--epochs", 1)


def image_folder(root: Path, train: int = 8, val: int = 5) -> Path:
    """train/ and val/ with so many noisy images of each class."""
    generator = numpy.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 160, (40, 40, 3), dtype="uint8")
                pixels[..., channel] += 60
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def options(data: Path, output: Path, **given) -> TrainOptions:
    """A run of three epochs of three batches on the CPU, in this process alone."""
    small = {"model": MODEL, "img_size": 32, "batch_size": 8, "epochs": 3, "workers": 0, "device": "cpu"}
    schedule = {"lr": 0.05, "warmup_epochs": 0}
    return TrainOptions(data_dir=data, output=output, **{**small, **schedule, **given})


def weights(result):
    """The tensors that a run has saved: its state_dict, and state_dict_ema where it keeps an average."""
    state = read_content(result.output / run_state.LAST)
    return {kind: state[kind] for kind in ("state_dict", "state_dict_ema") if kind in state}
