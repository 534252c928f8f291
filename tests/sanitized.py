"""Every pass of csrc/cpu and whole training steps, for a process that watches memory: `test_cpu_passes_sanitized.py`.

    python tests/sanitized.py passes|planted|steps|MODEL ...

prints a digest of all results: what is read before it is written shows as another digest where memory is filled with
other bytes. `planted` writes a float too far on purpose.
"""

from __future__ import annotations

import hashlib
import itertools
import sys

import timm
import torch
from helpers import randomize_bn
from torch import Tensor
from training_blocks import BLOCKS, NETWORKS, pair_of

import regnet_fast
from regnet_fast.backends import cpu_library
from regnet_fast.backends.passes import COMPILED, compiled
from regnet_fast.backends.passes.operands import Conv, Excite, Norm, OutputGrad, OutputNorm, Sums, Term

# Widths below, at and above a row and a vector, of a pixel and of many; batches of one and three
CHANNELS = (1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 33, 56, 127, 128, 129, 200, 2049)
SIZES = ((1, 1), (1, 2), (5, 3), (17, 1), (33, 35))
ACTIVATIONS = ("none", "relu", "silu")


class Digest:
    """The digest of tensors, and that they are finite."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def add(self, *tensors: Tensor | None) -> None:
        for t in tensors:
            if t is not None:
                assert t.isfinite().all()
                self.sha.update(t.detach().contiguous().numpy().tobytes())


def nhwc(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, activation: str, affine: bool = True) -> Norm:
    weight, bias = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    return Norm(torch.randn(channels), torch.rand(channels) + 0.1, weight, bias, 1e-3, activation)


def one_shape(digest: Digest, n: int, c: int, h: int, w: int) -> None:
    """All passes over maps of a shape."""
    x, grad = nhwc(n, c, h, w), nhwc(n, c, h, w)
    fc1, fc2 = torch.randn(3, c), torch.randn(c, 3)
    one = [Conv(torch.randn(5, c, 1, 1), ((1, 1), (0, 0), (1, 1), 1))]
    for activation, gated in itertools.product(ACTIVATIONS, (False, True)):
        norm = norm_of(c, activation, affine=not gated)
        excite = Excite(fc1, torch.randn(3), fc2, torch.randn(c), "relu", []) if gated else None
        ((y, (mean, var)),) = COMPILED.convs(x, norm, excite, one, [True])
        own = OutputNorm(mean, var, None, 1e-3, Sums(mean, var), float(n * h * w))
        for through in (True, False):
            found = COMPILED.convs_backward([OutputGrad(y, own, y)], x, norm, excite, one, True, [True], through)
            digest.add(found.x, *(found.sums or ()), *found.weights, *(found.excite or ()))
        digest.add(y, mean, var)
    for activation, inner in itertools.product(ACTIVATIONS, ACTIVATIONS):
        terms = [Term(x, norm_of(c, inner), torch.rand(n, 1, 1, 1)), Term(grad, norm_of(c, "none"), None)]
        for some in (terms, terms[:1], [terms[0], Term(grad, None, None)]):
            y = COMPILED.join(some, activation)
            found = COMPILED.join_backward(grad, y, some, activation, [True] * len(some))
            digest.add(y, *(t for dx, sums in found for t in (dx, *(sums or ()))))
    mean, var = COMPILED.statistics(x)
    own = OutputNorm(mean, var, torch.rand(c), 1e-3, Sums(mean, var), float(n * h * w))
    for one, identity in itertools.product((own, own._replace(sums=None)), (None, grad)):
        digest.add(COMPILED.entered_backward(grad, one, x, identity))
    digest.add(mean, var)


def passes(digest: Digest) -> None:
    """The direct calls."""
    for n, c, (h, w) in itertools.product((1, 3), CHANNELS, SIZES):
        if c * h * w <= 300_000:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                one_shape(digest, n, c, h, w)
    torch.set_num_threads(1)


def step(digest: Digest, model: torch.nn.Module, *shapes: tuple[int, int, int, int]) -> None:
    for shape in shapes:
        x = torch.randn(shape, requires_grad=True)
        model.train().zero_grad()
        y = model(x)
        y.square().mean().backward()
        digest.add(
            y, x.grad, *(p.grad for p in model.parameters()), *(b for b in model.buffers() if b.is_floating_point())
        )


def steps(digest: Digest) -> None:
    """Every kind of block, and small networks."""
    for name in BLOCKS:
        step(digest, pair_of(name)[0], (3, BLOCKS[name][0], 7, 9), (2, BLOCKS[name][0], 8, 5))
    for name in NETWORKS:
        made = randomize_bn(NETWORKS[name](), 0, (4, 3, 64, 64))
        step(digest, regnet_fast.rebuild(made).model, (3, 3, 33, 47))


def whole(digest: Digest, name: str) -> None:
    """A model, with images of odd sizes and batches of one where the last map has more than one pixel."""
    made = randomize_bn(timm.create_model(name, num_classes=5), 0)
    step(digest, regnet_fast.rebuild(made).model, (1, 3, 47, 35), (3, 3, 33, 47), (3, 3, 35, 33))


def planted() -> None:
    """One float beyond the memory of a result."""
    x, rows = nhwc(1, 16, 3, 3), torch.zeros(4, compiled._row(16))
    out = torch.empty(x.numel() - 1)
    cpu_library.library("passes").read_map(*compiled._at(x, out, rows, None), 0, *compiled._sizes(x.shape, 1))


def main(what: list[str]) -> None:
    assert cpu_library.refuse("passes") is None, cpu_library.refuse("passes")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digest = Digest()
    for one in what:
        if one == "planted":
            planted()
        elif one in ("passes", "steps"):
            {"passes": passes, "steps": steps}[one](digest)
        else:
            whole(digest, one)
    print(digest.sha.hexdigest())


if __name__ == "__main__":
    main(sys.argv[1:])
