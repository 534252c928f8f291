"""Handwritten digits: a small RegNetY trained with the fused operations and, on the same seeds, by timm alone.

    pip install ".[examples]"
    python examples/digits.py                       three seeds of each, a few minutes on two cores
    python examples/digits.py --seeds 1 --epochs 2  a look

scikit-learn's digits (1797 images of 8x8 pixels) are enlarged to 32x32; every fifth is kept for testing. Writes the
curves to docs/figures/digits.svg and the accuracies beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

import regnet_fast

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "digits.svg"
MODEL = {"in_chans": 1, "num_classes": 10, "w0": 16, "wa": 20.0, "wm": 2.3, "depth": 10, "output_stride": 8}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 32, 32) of mean zero and labels, for training and for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate((images - images.mean()) / images.std(), size=32, mode="bilinear")
    labels = torch.tensor(data.target)
    tested = torch.arange(len(labels)) % 5 == 0
    return images[~tested], labels[~tested], images[tested], labels[tested]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to three pixels."""
    padded = F.pad(images, (3, 3, 3, 3), value=float(images.min()))
    offsets = torch.randint(0, 7, (len(images), 2), generator=generator)
    return torch.stack([p[:, i : i + 32, j : j + 32] for p, (i, j) in zip(padded, offsets.tolist(), strict=True)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that an evaluation gets right."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def train(create: str, seed: int, epochs: int, batch: int = 64) -> list[dict[str, float]]:
    """Loss and test accuracy after every epoch, for `create_model` of timm or of regnet_fast."""
    torch.manual_seed(seed)
    module = {"timm": timm, "regnet_fast": regnet_fast}[create]
    model = module.create_model("regnety_002", drop_path_rate=0.05, **MODEL)
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=4e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=2, warmup_lr=1e-4)
    curve = []
    for epoch in range(epochs):
        model.train()
        losses, start = [], time.perf_counter()
        for chosen in torch.randperm(len(images), generator=generator).split(batch)[:-1]:
            loss = F.cross_entropy(model(shifted(images[chosen], generator)), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        schedule.step(epoch + 1)
        found = accuracy(model, test_images, test_labels)
        curve.append({"loss": statistics.mean(losses), "accuracy": found, "seconds": seconds})
        print(f"{create} seed {seed} epoch {epoch + 1}: loss {curve[-1]['loss']:.4f}, test {found:.2%}", flush=True)
    return curve


def plot(curves: dict[str, list[list[dict[str, float]]]], file: Path) -> None:
    """Loss and test accuracy of every run."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "regnet_fast"
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, runs), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        for seed, run in enumerate(runs):
            epochs = range(1, len(run) + 1)
            label = name if seed == 0 else None
            axes[0].plot(epochs, [e["loss"] for e in run], color=color, alpha=0.7, label=label)
            axes[1].plot(epochs, [100 * e["accuracy"] for e in run], color=color, alpha=0.7, label=label)
    axes[0].set(xlabel="epoch", ylabel="training loss")
    axes[1].set(xlabel="epoch", ylabel="test accuracy, %", ylim=(90, 100))
    axes[0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    """Train, plot and report; the exit status says whether the two agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    curves = {
        name: [train(name, seed, options.epochs) for seed in range(options.seeds)] for name in ("timm", "regnet_fast")
    }
    plot(curves, options.figure)
    last = {name: [run[-1]["accuracy"] for run in runs] for name, runs in curves.items()}
    for name, found in last.items():
        seconds = statistics.median(e["seconds"] for run in curves[name] for e in run)
        print(f"{name}: test accuracy {', '.join(f'{a:.2%}' for a in found)}; {seconds:.2f} s an epoch")
    means = [statistics.mean(found) for found in last.values()]
    spread = max(max(found) - min(found) for found in last.values())
    agree = abs(means[0] - means[1]) <= max(spread, 1 / 360)
    verdict = "agree" if agree else "DIFFER"
    print(f"means differ by {abs(means[0] - means[1]):.2%}, seeds by up to {spread:.2%}: {verdict}")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
