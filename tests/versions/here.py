"""The versions that this Python has, as a line: `python tests/versions/here.py`."""

import importlib.metadata
import platform

PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy")


def line() -> str:
    """Such as "Python 3.11.7, torch 2.15.0 (CUDA 13.2), torchvision 0.29.2, ...", "no triton" where it is missing."""
    import torch

    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    found[1] += f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (not for CUDA)"
    return ", ".join(found)


if __name__ == "__main__":
    print(line(), flush=True)
