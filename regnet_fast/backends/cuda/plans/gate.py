"""The plans of csrc/squeeze_excite.cu."""

from __future__ import annotations

from .launch import ACTIVATIONS, H200, MOST, SHARED_BYTES, TYPES, Launch, Target, cdiv

GATES = TYPES | {"float32": "float"}
"""What squeeze-excite's gate may be in."""


_THREADS = 512


def refuse_squeeze_excite(images: int, channels: int, hidden: int, target: Target = H200) -> str | None:
    """Why csrc/ has no squeeze-excite for so many images and channels, or None."""
    if min(images, channels, hidden) < 1:
        return "an empty batch, or no channels"
    needed = 4 * max(channels, hidden)
    if needed > SHARED_BYTES[target.arch]:
        return f"{channels} channels and {hidden} hidden ones need {needed} bytes of shared memory"
    if images > MOST:
        return "too many images to count in 32 bits"
    return None


def squeeze_excite(
    images: int,
    tiles: int,
    channels: int,
    hidden: int,
    dtype: str,
    activation: str = "relu",
    target: Target = H200,
    gate_activation: str = "sigmoid",
) -> tuple[Launch, Launch]:
    """The gate in a dtype of `GATES`, in two launches with the same kernels for any batch.

    Tensors: parts (images, tiles, channels), fc1 (hidden, channels), bias1, fc2 (channels, hidden), bias2, gate; and
    hidden (images, hidden), which the second launch takes for its values.
    """
    reason = refuse_squeeze_excite(images, channels, hidden, target)
    if reason is not None:
        raise ValueError(f"no kernel for a gate: {reason}")
    into = ("parts", "fc1", "bias1", "hidden"), (images, tiles, channels, hidden)
    back = ("values", "fc2", "bias2", "gate"), (images, 1, hidden, channels)
    first = _layer(*into, ("float", ACTIVATIONS[activation]), target)
    return first, _layer(*back, (GATES[dtype], ACTIVATIONS[gate_activation]), target)


def _layer(
    tensors: tuple[str, ...], sizes: tuple[int, int, int, int], facts: tuple[str, str], target: Target
) -> Launch:
    """Blocks for every processor, as long as each of a block's warps has an output."""
    images, _, inputs, outputs = sizes
    dtype, activation = facts
    together = next(n for n in (8, 4, 2, 1) if 4 * n * inputs <= SHARED_BYTES[target.arch])
    blocks = cdiv(images, together)
    rows = max(_THREADS // 32, cdiv(outputs, max(1, target.processors // blocks)))
    return Launch(
        "squeeze_excite.cu",
        f"squeeze_excite<{', '.join(map(str, (dtype, together, _THREADS, activation)))}>",
        (blocks, cdiv(outputs, rows), 1),
        _THREADS,
        4 * together * inputs,
        (*tensors, *sizes, rows),
        {"hidden": (images, outputs)} if "hidden" in tensors else {},
    )
