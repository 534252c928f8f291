"""What the tests share: random statistics for fresh models, rebuilt models, and the rule for "the same function".

`randomize_bn(model)` gives every norm random statistics and parameters. A fresh timm model has its last norms zeroed,
which hides half of every block; no numerical test may run without this.

`assert_close_to_reference(ours, eager, reference64, what)` asserts the rule of `regnet_fast.inspect.judging`.
`compare(theirs, x, what)` does so for each stage of a model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import regnet_fast
from regnet_fast import store
from regnet_fast.blocks.fused import FallbackWarning
from regnet_fast.inspect.judging import judge
from regnet_fast.inspect.verify import randomize_norms
from regnet_fast.observer import observing


def own_cache(folder: Path, monkeypatch) -> None:
    """An empty cache folder for this test and its processes, but for what is compiled, which takes half a minute."""
    compiled = store.user_folder()
    compiled.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    (folder / compiled.name).symlink_to(compiled)
    monkeypatch.setenv("REGNET_FAST_CACHE", str(folder))


@torch.no_grad()
def randomize_bn(model: nn.Module, seed: int = 0, example: Tensor | None = None) -> nn.Module:
    """`inspect.verify.randomize_norms`, with the statistics of a batch of the model's input, as training leaves them:

        running_mean = E[x] + Std[x] * N(0, 0.2)           running_var = Var[x] * U(0.5, 1.5)

    A timm model that is given no example has those of noise. Without any they do for one block; in a deep model the
    biases come to drown the image, and with it every error of the early layers.
    """
    generator = torch.Generator().manual_seed(seed)
    randomize_norms(model, generator)
    if example is None and hasattr(model, "pretrained_cfg"):
        first = next(parameter for parameter in model.parameters() if parameter.ndim == 4)
        example = (4, first.shape[1], 128, 128)

    def drawn(draw: Callable, shape: Sequence[int]) -> Tensor:
        return draw(shape, generator=generator, dtype=torch.float32, device="cpu")

    def calibrate(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
        var = var + 0.1 * var.mean()  # a channel may be constant on this example only
        norm.running_mean.copy_(drawn(torch.randn, mean.shape) * 0.2).mul_(var.sqrt()).add_(mean)
        norm.running_var.copy_(drawn(torch.rand, var.shape) + 0.5).mul_(var)

    if isinstance(example, tuple):
        example = drawn(torch.randn, example).to(next(model.parameters()))
    if example is not None:
        training = [(module, module.training) for module in model.modules()]
        norms = [module for module in model.modules() if getattr(module, "running_var", None) is not None]
        handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
        model.eval()(example)
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    return model


def pair(name: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """A rebuilt model in evaluation and timm's own with the same weights."""
    theirs = timm.create_model(name, **kwargs).eval()
    randomize_bn(theirs, 0)
    return regnet_fast.rebuild(copy.deepcopy(theirs)).model, theirs


def reasons(model: nn.Module, x: torch.Tensor) -> set[str | None]:
    """Why each block of a model did or did not run fused (None: it did)."""
    heard = []
    with observing(block=lambda block, x, plan, reason: heard.append(reason)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        model(x)
    assert heard
    return set(heard)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * float(b.detach().abs().max()))


def assert_close_to_reference(
    ours: Tensor,
    eager: Tensor,
    reference64: Tensor,
    what: str,
    groups: int | None = None,
) -> None:
    """Assert that `ours` is the same function as `eager`, by `regnet_fast.inspect.judging.judge`.

    A failure prints every bound that is missed, and for the first of them the worst coordinate with its group, values
    and neighbours.
    """
    assert reference64.dtype == torch.float64, f"{what}: the reference is {reference64.dtype}, not float64"
    check = judge(what, ours, eager, reference64, groups=groups)
    if not check.ok:
        place = _describe(check.where, ours, eager, reference64, groups) if check.where else ""
        raise AssertionError("\n  ".join((f"{what}:", *check.failures)) + place)


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every stage's features and the logits, or the features of a model that gives only these."""
    with torch.no_grad():
        if not hasattr(model, "forward_intermediates"):
            return {f"feature {i}": f for i, f in enumerate(model(x))}
        final, features = model.forward_intermediates(x)
        found = {f"stage {i}": f for i, f in enumerate(features)}
        return {**found, "logits": model.forward_head(final)}


def in_channels_last(model: nn.Module) -> nn.Module:
    """The model itself, moved as `Module.to` moves it, which refuses the five dimensions of a Conv3d's weight."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def compare(theirs: nn.Module, x: Tensor, what: str) -> None:
    """Assert that the rebuilt model is the same function as timm's in channels_last, all of it fused. Uses theirs up.

    The hooks keep eager in channels_last where torch would leave it: after a convolution of a one-channel image.
    """
    dtype = x.dtype
    theirs.to(dtype).eval()
    ours = regnet_fast.rebuild(theirs)
    assert ours.rebuilt
    heard = []
    with observing(block=lambda block, image, plan, reason: heard.append(reason)):
        fused = outputs(theirs, x)
    assert heard and set(heard) == {None}, f"{what}: not fused: {set(heard)}"
    regnet_fast.restore(theirs)
    eager_form = in_channels_last(copy.deepcopy(theirs))
    if (
        "repvgg" in what or "mobileone" in what
    ):  # the branches of training sum in another order; as deployed they are one convolution
        eager_form = timm.utils.reparameterize_model(eager_form, inplace=True)
    for conv in (module for module in eager_form.modules() if isinstance(module, nn.Conv2d)):
        conv.register_forward_hook(lambda conv, inputs, y: y.contiguous(memory_format=torch.channels_last))
    eager = outputs(eager_form, x.contiguous(memory_format=torch.channels_last))
    del eager_form
    exact = outputs(theirs.double(), x.double())
    for stage in exact:
        assert_close_to_reference(fused[stage], eager[stage], exact[stage], f"{what}, {stage}")


def _describe(at: tuple[int, ...], ours: Tensor, eager: Tensor, reference: Tensor, groups: int | None) -> str:
    place = f"\n  worst at {at} of {tuple(ours.shape)}"
    if groups is not None:
        width = ours.shape[1] // groups
        place += f": channel {at[1] % width} of {width} in group {at[1] // width} of {groups}"
    values = f"  ours {ours[at]:.9g}  eager {eager[at]:.9g}  float64 {reference[at]:.9g}"
    window = (*at[:-2], *(slice(max(i - 1, 0), i + 2) for i in at[-2:]))
    neighbours = "  its neighbours, ours:", _rows(ours[window]), "  its neighbours, float64:", _rows(reference[window])
    return "\n".join((place, values, *neighbours))


def _rows(window: Tensor) -> str:
    return "\n".join("    " + " ".join(f"{value:12.6g}" for value in row) for row in torch.atleast_2d(window))


def assert_same_step(ours: nn.Module, theirs: nn.Module, exact: nn.Module, losses: list[Tensor]) -> None:
    """Assert that a training step of ours was the same function as the host's, judged by the same step in float64.

    `losses` are those of the three. All gradients are judged together, each in units of its RMS, and the RMS of each
    alone; so are the running statistics. Some gradients are zero but for rounding, those of a bias before a norm: they
    are judged in units of the others.
    """
    eps = torch.finfo(torch.float32).eps
    error, granted = ((loss.double() - losses[2]).abs().item() for loss in losses[:2])
    assert error <= 2 * granted + 2 * eps * losses[2].item()

    for what in ("gradients", "running statistics"):
        kept = []
        for model in (ours, theirs, exact):
            if what == "gradients":
                kept.append({n: p.grad for n, p in model.named_parameters()})
            else:
                kept.append({n: b for n, b in model.named_buffers() if b.is_floating_point()})
        assert kept[0].keys() == kept[1].keys() == kept[2].keys()
        typical = torch.stack([r.square().mean().sqrt() for r in kept[2].values()]).median().item()
        units = [{n: relative(k[n], r, 1e-6 * typical).flatten() for n, r in kept[2].items()} for k in kept[:2]]
        for n, a in units[0].items():
            b = units[1][n]
            rms = [e.square().mean().sqrt().item() for e in (a, b)]
            assert rms[0] <= 2 * rms[1] * (1 + 2 / a.numel() ** 0.5) + eps, f"{what}, {n}: {rms}"
        ours_error, error = (torch.cat(list(u.values())) for u in units)
        assert_close_to_reference(ours_error.float(), error.float(), torch.zeros_like(error), what)
    for (path, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert a.is_floating_point() or torch.equal(a, b), path


def relative(found: Tensor, reference: Tensor, least: float) -> Tensor:
    """A tensor's error in units of its reference, or of `least` where that is larger."""
    return (found.double() - reference) / reference.square().mean().sqrt().clamp(min=least)
