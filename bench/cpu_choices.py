"""The measurements behind the CPU backend's choices, as the Markdown tables of docs/cpu.md and docs/training.md.

    python bench/cpu_choices.py

Medians of interleaved rounds on random data; ratios hold within one run only.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import regnet_fast
from regnet_fast.backends import ConvProblem, Geometry, NormActProblem
from regnet_fast.backends.onednn import (
    AffineNormAct,
    DepthwiseNormAct,
    DirectConv,
    MatmulConv,
    WinogradConv,
    conv_variants,
    prepare_norm_act,
)
from regnet_fast.backends.passes import COMPILED, TORCH
from regnet_fast.backends.passes.operands import Norm, OutputNorm, Sums, Term
from regnet_fast.backends.passes.sums import _beside, sums_of_norm
from regnet_fast.backends.passes.torch import normaliser
from regnet_fast.blocks import chain
from regnet_fast.inspect.verify import host_model, randomize_norms
from regnet_fast.ops.convolution import pixel_means


def interleaved(calls: dict[str, Callable], rounds: int = 11, warmups: int = 3) -> dict[str, float]:
    """Median milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmups + rounds):
        for name in list(calls) if i % 2 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            if i >= warmups:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def nhwc(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def rms(error: torch.Tensor, reference: torch.Tensor) -> float:
    return float(error.square().mean().sqrt() / reference.square().mean().sqrt())


def winograd() -> None:
    """Direct and Winograd 3x3 convolutions, and which one is taken."""
    print("| batch | channels | map | direct ms | Winograd ms | ratio | RMS error direct | Winograd | taken |")
    print("|---|---|---|---|---|---|---|---|---|")
    shapes = [
        (64, 56),
        (96, 56),
        (128, 56),
        (128, 28),
        (192, 28),
        (256, 28),
        (128, 14),
        (192, 14),
        (256, 14),
        (384, 14),
        (512, 14),
        (512, 7),
    ]
    for batch in (1, 8):
        for channels, size in shapes:
            facts = "relu", False, False, torch.float32, "cpu"
            problem = ConvProblem((batch, channels, size, size), channels, (3, 3), Geometry(padding=(1, 1)), *facts)
            x, weight, bias = (
                nhwc(batch, channels, size, size),
                torch.randn(channels, channels, 3, 3) * 0.02,
                torch.randn(channels),
            )
            direct, fast = DirectConv(problem, weight, bias), WinogradConv(problem, weight, bias)
            t = interleaved(
                {
                    "direct": partial(direct, x, None, None, False, False),
                    "winograd": partial(fast, x, None, None, False, False),
                }
            )
            exact = F.relu(F.conv2d(x[:1].double(), weight.double(), bias.double(), padding=1))
            errors = [rms(run(x, None, None, False, False)[:1] - exact, exact) for run in (direct, fast)]
            print(
                f"| {batch} | {channels} | {size}x{size} | {t['direct']:.2f} | {t['winograd']:.2f} "
                f"| {t['direct'] / t['winograd']:.2f} "
                f"| {errors[0]:.1e} | {errors[1]:.1e} | {conv_variants(problem)[0]} |"
            )


def pointwise() -> None:
    """1x1 convolutions in float32: oneDNN's convolution and torch's matrix product, and which one is taken."""
    print("| input | out channels | oneDNN us | addmm us | ratio | taken |\n|---|---|---|---|---|---|")
    shapes = [(1, 24, 24, 56), (1, 48, 48, 56), (1, 56, 56, 28), (1, 120, 120, 28), (1, 152, 152, 14), (1, 96, 288, 14)]
    shapes += [(1, 336, 336, 14), (1, 368, 368, 7), (1, 888, 888, 7), (8, 24, 24, 56), (8, 152, 152, 14)]
    for batch, channels, out_channels, size in shapes:
        shape = (batch, channels, size, size)
        facts = "relu", False, False, torch.float32, "cpu"
        problem = ConvProblem(shape, out_channels, (1, 1), Geometry(), *facts)
        x, weight, bias = nhwc(*shape), torch.randn(out_channels, channels, 1, 1) * 0.1, torch.randn(out_channels)
        direct, product = DirectConv(problem, weight, bias), MatmulConv(problem, weight, bias)
        arguments = (x, None, None, False, False)
        t = interleaved({"direct": partial(direct, *arguments), "product": partial(product, *arguments)}, 31)
        print(
            f"| {'x'.join(map(str, shape))} | {out_channels} | {1e3 * t['direct']:.0f} | {1e3 * t['product']:.0f} "
            f"| {t['direct'] / t['product']:.2f} | {conv_variants(problem)[0]} |"
        )


def norm_act() -> None:
    """Scale, shift and activation: torch's passes and oneDNN's depthwise convolution, and which one is taken."""
    print("| dtype | shape | activation | addcmul us | depthwise us | taken |\n|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 128, 56, 56), (8, 128, 56, 56), (8, 256, 56, 56), (8, 512, 14, 14)):
            for activation in ("relu", "silu"):
                problem = NormActProblem(shape, activation, False, dtype, "cpu")
                x, scale, shift = nhwc(*shape, dtype=dtype), torch.rand(shape[1]), torch.randn(shape[1])
                affine, depthwise = (
                    AffineNormAct(problem, scale.to(dtype), shift.to(dtype)),
                    DepthwiseNormAct(problem, scale, shift),
                )
                t = interleaved(
                    {"addcmul": partial(affine, x, None, False), "depthwise": partial(depthwise, x, None, False)}, 31
                )
                print(
                    f"| {str(dtype)[6:]} | {'x'.join(map(str, shape))} | {activation} | {1e3 * t['addcmul']:.0f} "
                    f"| {1e3 * t['depthwise']:.0f} | {prepare_norm_act(problem, scale, shift).label} |"
                )


def means() -> None:
    """Channel means: torch's mean against one sum over rows of channels."""
    print("| dtype | shape | mean us | ours us |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 64, 56, 56), (8, 120, 28, 28), (8, 888, 7, 7)):
            x = nhwc(*shape, dtype=dtype)
            t = interleaved({"mean": partial(x.mean, (2, 3)), "ours": partial(pixel_means, x)}, 31)
            print(f"| {str(dtype)[6:]} | {'x'.join(map(str, shape))} | {1e3 * t['mean']:.0f} | {1e3 * t['ours']:.0f} |")


def sums() -> None:
    """Sums over the pixels of a training step, in microseconds: torch's of the map as it is, and ours."""
    print("| dtype | shape | statistics, torch | ours | backward, torch | ours | pixels side by side |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 24, 112, 112), (4, 32, 112, 112), (8, 56, 56, 56), (16, 120, 28, 28), (16, 152, 14, 14)):
            x, grad = nhwc(*shape, dtype=dtype), nhwc(*shape, dtype=dtype)
            mean, var = TORCH.statistics(x)
            norm, running = Norm(mean, var, None, None, 1e-5, "none"), [torch.zeros_like(mean) for _ in range(2)]
            backward = partial(
                torch.ops.aten.native_batch_norm_backward, grad, x, None, None, None, mean, var, True, 1e-5
            )
            t = interleaved(
                {
                    "statistics": partial(torch.batch_norm_update_stats, x, *running, 0.0),
                    "ours": partial(TORCH.statistics, x),
                    "backward": partial(backward, [False, True, True]),
                    "our backward": partial(sums_of_norm, grad, x, norm),
                },
                31,
            )
            times = " | ".join(f"{1e3 * time:.0f}" for time in t.values())
            print(f"| {str(dtype)[6:]} | {'x'.join(map(str, shape))} | {times} | {_beside(x)} |")


def normalised() -> None:
    """A map read through its norm, float32, in microseconds: torch's batch norm and one multiply-add."""
    print("| shape | torch | ours |\n|---|---|---|")
    for shape in ((4, 48, 112, 112), (6, 120, 56, 56), (16, 120, 28, 28), (16, 336, 14, 14), (16, 888, 7, 7)):
        x, c = nhwc(*shape), shape[1]
        norm = Norm(torch.randn(c), torch.rand(c) + 0.5, torch.rand(c), torch.randn(c), 1e-5, "none")
        facts = (norm.weight, norm.bias, norm.mean, norm.var, False, 0.0, norm.eps)
        calls = {
            "torch": partial(torch.native_batch_norm, x, *facts),
            "ours": lambda x=x, norm=norm: normaliser(norm, x)(x),
        }
        times = " | ".join(f"{1e3 * time:.0f}" for time in interleaved(calls, 31).values())
        print(f"| {'x'.join(map(str, shape))} | {times} |")


def compiled_passes() -> None:
    """Passes of a training step, float32 with SiLU, in microseconds: torch's calls / compiled; and a copy."""
    names = ("read", "statistics", "back through", "raw gradient", "join", "gradient of join")
    print(f"| shape | copy | {' | '.join(names)} |\n|---|---:|{'---:|' * len(names)}")
    for shape in ((4, 32, 112, 112), (8, 48, 56, 56), (16, 120, 28, 28), (16, 336, 14, 14), (16, 888, 7, 7)):
        x, grad, c = nhwc(*shape), nhwc(*shape), shape[1]
        norm = Norm(torch.randn(c), torch.rand(c) + 0.5, torch.rand(c), torch.randn(c), 1e-5, "silu")
        behind = OutputNorm(*norm[:3], norm.eps, Sums(torch.randn(c), torch.randn(c)), float(x.numel() // c))
        terms = [Term(x, norm._replace(activation="none"), None), Term(grad, None, None)]
        calls, out = {"copy": partial(torch.empty_like(x).copy_, x)}, torch.empty_like(x)
        for how, kit in (("torch", TORCH), ("compiled", COMPILED)):
            reader = kit.backward_reader(x, norm, None)
            reader.read(slice(None))
            made = [
                partial(kit.reader(x, norm, None).read, slice(None)),
                partial(kit.statistics, x),
                partial(reader.back, grad, out, True),
                partial(kit.gradient_reader(grad, behind, x).read, slice(None)),
                partial(kit.join, terms, "silu"),
                partial(kit.join_backward, grad, None, terms, "silu", [True, True]),
            ]
            calls |= {f"{name} {how}": call for name, call in zip(names, made, strict=True)}
        t = {name: f"{1e3 * time:.0f}" for name, time in interleaved(calls, 31).items()}
        pairs = (f"{t[f'{name} torch']} / {t[f'{name} compiled']}" for name in names)
        print(f"| {'x'.join(map(str, shape))} | {t['copy']} | {' | '.join(pairs)} |")


def compiled_steps() -> None:
    """A training step of batch 16 in float32, channels_last, in milliseconds: eager, and through torch.compile."""
    print("| model | timm | timm, compiled | regnet_fast |\n|---|---|---|---|")
    x, labels = nhwc(16, 3, 224, 224), torch.randint(0, 1000, (16,))
    for name in ("regnety_002", "regnety_016"):
        calls = {}
        for who in ("timm", "timm, compiled", "regnet_fast"):
            model = randomize_norms(host_model(name), 0).train().to(memory_format=torch.channels_last)
            if who == "regnet_fast":
                regnet_fast.rebuild(model)
            forward = torch.compile(model) if who == "timm, compiled" else model
            optimizer = torch.optim.SGD(model.parameters(), 1e-4, fused=True)
            calls[who] = partial(_training_step, forward, optimizer, x, labels)
        times = " | ".join(f"{time:.0f}" for time in interleaved(calls, 9).values())
        torch._dynamo.reset()
        print(f"| {name} | {times} |")


@torch.enable_grad()
def _training_step(forward: Callable, optimizer: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(forward(x), labels).backward()
    optimizer.step()


def parts() -> None:
    """A stage's time for each image of a batch of 16, by how many images go through all its blocks at a time."""
    print("| model | stage | dtype | threads | widest map, MB | 1 | 2 | 4 | 8 | 16 | taken |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    threads = torch.get_num_threads()
    stages = [("regnetx_032", ("s1", "s2", "s3", "s4")), ("regnetz_b16", ("stages.0", "stages.1", "stages.2"))]
    for name, paths in stages:
        for dtype in (torch.float32, torch.bfloat16):
            model = regnet_fast.freeze(regnet_fast.create_model(name).eval().to(dtype))
            x = model.stem(nhwc(16, 3, 224, 224, dtype=dtype))
            for path in paths:
                stage = model.get_submodule(path)
                first = next(stage.children()).plan(x)
                widest = first.unbound.widest(*x.shape[1:]) * x.element_size()
                for count in (1, threads):
                    torch.set_num_threads(count)
                    t = interleaved({str(n): partial(_in_parts, stage, x, n) for n in (1, 2, 4, 8, 16)}, 5, 1)
                    times = " | ".join(f"{time / 16:.2f}" for time in t.values())
                    taken = 16 // chain.parts(first, x)
                    print(f"| {name} | {path} | {str(dtype)[6:]} | {count} | {widest / 1e6:.2f} | {times} | {taken} |")
                x = stage(x)


def _in_parts(stage: torch.nn.Module, x: torch.Tensor, images: int) -> torch.Tensor:
    y = []
    for part in x.split(images):
        own = False
        for block in stage.children():
            part, own = block.step(part, own)
        y.append(part)
    return torch.cat(y)


def main() -> None:
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {time.strftime('%Y-%m-%d')}"
    )
    with torch.no_grad():
        for table in (parts, winograd, pointwise, norm_act, means, normalised, sums, compiled_passes, compiled_steps):
            print(f"\n{table.__doc__}\n")
            table()


if __name__ == "__main__":
    main()
