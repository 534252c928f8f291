"""The plan of csrc/squeeze_excite.cu."""

from __future__ import annotations

from .launch import ACTIVATIONS, H200, MOST, SHARED_BYTES, TYPES, Launch, Target, cdiv

GATES = TYPES | {"float32": "float"}
"""What squeeze-excite's gate may be in."""


def refuse_squeeze_excite(images: int, channels: int, hidden: int, target: Target = H200) -> str | None:
    """Why csrc/ has no squeeze-excite for so many images and channels, or None."""
    if min(images, channels, hidden) < 1:
        return "an empty batch, or no channels"
    if channels % 2:
        return f"{channels} channels: the gate is written in pairs"
    needed = 4 * (channels + hidden)
    if needed > SHARED_BYTES[target.arch]:
        return f"{channels} channels and {hidden} hidden ones need {needed} bytes of shared memory"
    if images > MOST:
        return "too many images to count in 32 bits"
    return None


def squeeze_excite(
    images: int, tiles: int, channels: int, hidden: int, dtype: str, activation: str = "relu", target: Target = H200
) -> Launch:
    """The gate in a dtype of `GATES`: tensors parts (images, tiles, channels), fc1, bias1, fc2, bias2, gate."""
    reason = refuse_squeeze_excite(images, channels, hidden, target)
    if reason is not None:
        raise ValueError(f"no kernel for a gate: {reason}")
    block = next((n for n in (4, 2, 1) if n <= images and images // n >= target.processors), 1)
    while block > 1 and 4 * block * (channels + hidden) > SHARED_BYTES[target.arch]:
        block //= 2
    threads = 512
    return Launch(
        "squeeze_excite.cu",
        f"squeeze_excite<{GATES[dtype]}, {block}, {threads}, {ACTIVATIONS[activation]}>",
        (cdiv(images, block), 1, 1),
        threads,
        4 * block * (channels + hidden),
        ("parts", "fc1", "bias1", "fc2", "bias2", "gate", images, tiles, channels, hidden),
    )
