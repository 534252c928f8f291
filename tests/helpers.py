"""What the tests share: random statistics for fresh models, and the project's rule for "the same function".

`randomize_bn(model)` gives every norm random statistics and parameters. A fresh timm model has its last norms zeroed,
which hides half of every block; no numerical test may run without this.

`assert_close_to_reference(ours, eager, reference64, what)` holds our error against float64 to at most twice that of
eager, on the whole tensor and on its border alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

ERROR_RATIO = 2.0  # our error may be this many times eager's
FLOOR_ULPS = {"max": 2.0, "RMS": 0.25}  # granted even where eager is exact, in ulps at the reference's RMS
SHORTCUTS = ("downsample", "shortcut")


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises per channel: it has running statistics, or a vector for its weight and its bias."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    has_vectors = isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim == bias.ndim == 1
    return has_vectors or isinstance(getattr(module, "running_var", None), Tensor)


@torch.no_grad()
def randomize_bn(model: nn.Module, seed: int = 0, example: Tensor | None = None) -> nn.Module:
    """Give every norm of the model a random affine transform and running statistics as training leaves them, in place.

        weight ~ U(0.5, 1.5)    running_var = Var[x] * U(0.5, 1.5)
        bias ~ N(0, 0.2)        running_mean = E[x] + Std[x] * N(0, 0.2)

    E, Var and Std are those of the activations for `example`, a batch of the model's input; a timm model needs none and
    takes noise. Without either they are 0 and 1, which does for one block: through many layers the biases would drown
    the image, and with it every error of the early layers. Where a sum follows, the weights are smaller, so that
    neither activations nor rounding errors grow with depth: U(0.1, 0.3) in the last norm of a residual branch,
    U(0.3, 0.8) in the three branches of a RepVGG block.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_ranges = _summand_ranges(model)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)

    def normal(like: Tensor, std: Tensor | float) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like) * std

    def set_statistics(norm: nn.Module, mean: Tensor | float, var: Tensor | float) -> None:
        norm.running_mean.copy_(mean + normal(norm.running_mean, 0.2) * torch.as_tensor(var).sqrt())
        norm.running_var.copy_(var * uniform(norm.running_var, 0.5, 1.5))

    def calibrate(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
        set_statistics(norm, mean, var + 0.1 * var.mean())  # a channel may be constant on this example only

    norms = [module for module in model.modules() if is_norm(module)]
    with_statistics = [norm for norm in norms if getattr(norm, "running_var", None) is not None]
    for norm in norms:
        if getattr(norm, "weight", None) is not None:
            norm.weight.copy_(uniform(norm.weight, *weight_ranges.get(norm, (0.5, 1.5))))
            norm.bias.copy_(normal(norm.bias, 0.2))
        if isinstance(getattr(norm, "v", None), nn.Parameter):  # EvoNorm: the slope of its gate
            norm.v.copy_(uniform(norm.v, 0.5, 1.5))
        if isinstance(getattr(norm, "tau", None), nn.Parameter):  # filter response norm: its threshold
            norm.tau.copy_(normal(norm.tau, 0.2))
    for norm in with_statistics:
        set_statistics(norm, 0.0, 1.0)

    if example is None and hasattr(model, "pretrained_cfg"):
        first = next(parameter for parameter in model.parameters() if parameter.ndim == 4)
        example = torch.randn(4, first.shape[1], 128, 128, generator=generator).to(first)
    if example is not None and with_statistics:
        hooks = [norm.register_forward_pre_hook(calibrate) for norm in with_statistics]
        training = {module: module.training for module in model.modules()}
        model.eval()(example)
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return model


def _summand_ranges(model: nn.Module) -> dict[nn.Module, tuple[float, float]]:
    """The norms whose output is added to something else, with the range of their weights.

    A block is a smallest module that holds more than one norm beside its shortcut. Its last norm ends the branch; of a
    RepVGG block all three do.
    """
    ranges = {}
    for block in model.modules():
        branch = [child for name, child in block.named_children() if name not in SHORTCUTS]
        norms = [[module for module in child.modules() if is_norm(module)] for child in branch]
        if sum(map(len, norms)) > 1 and all(len(found) <= 1 for found in norms):
            norms = [norm for found in norms for norm in found]
            if "repvgg" in type(block).__name__.lower():
                ranges.update(dict.fromkeys(norms, (0.3, 0.8)))
            else:
                ranges[norms[-1]] = (0.1, 0.3)
    return ranges


def assert_close_to_reference(
    ours: Tensor,
    eager: Tensor,
    reference64: Tensor,
    what: str,
    groups: int | None = None,
) -> None:
    """Assert that `ours` is the same function as `eager`, judged by the float64 result.

        max|ours - ref| <= 2 max|eager - ref| + floor        RMS(ours - ref) <= 2 RMS(eager - ref) + floor

    on the whole tensor, and again on the last image, on the first and last row and column of an NCHW tensor, and, if
    `groups` is given, on the last channel of each group. The floor is FLOOR_ULPS ulps of eager's dtype at the
    reference's RMS. A region of few values says little about eager's error there, so eager is granted what a sample of
    its error over the whole tensor would show: its RMS with a sampling margin, and four times the RMS of its worst
    channel, but never more than its largest error anywhere. A failure prints every broken bound, and for the last of
    them, the most particular, the worst coordinate with its group, values and neighbours.
    """
    shapes = [tuple(tensor.shape) for tensor in (ours, eager, reference64)]
    assert len(set(shapes)) == 1, f"{what}: ours, eager and the reference have the shapes {shapes}"
    assert ours.dtype == eager.dtype, f"{what}: ours is {ours.dtype}, eager is {eager.dtype}"
    assert reference64.dtype == torch.float64, f"{what}: the reference is {reference64.dtype}, not float64"
    if not ours.numel():
        return

    eps = torch.finfo(eager.dtype).eps
    ours, eager, reference = (t.detach().double().cpu() for t in (ours, eager, reference64))
    assert reference.isfinite().all() and eager.isfinite().all(), f"{what}: eager or float64 overflows; smaller data"
    ulp = eps * _rms(reference)
    ours_error, eager_error = (ours - reference).abs().nan_to_num(nan=torch.inf), (eager - reference).abs()
    typical = _rms(eager_error)
    channels = eager_error.transpose(0, 1).flatten(1) if eager_error.ndim > 1 else eager_error[None]
    tail = min(4 * channels.square().mean(1).sqrt().max().item(), eager_error.max().item())

    failures, worst_region = [], None
    for region, mask in _regions(ours.shape, groups):
        k, e = ours_error[mask], eager_error[mask]
        granted = {
            "max": max(e.max().item(), 4 * typical, tail),
            "RMS": max(_rms(e), typical * (1 + 2 / len(k) ** 0.5)),
        }
        if region == "everywhere":
            granted = {"max": e.max().item(), "RMS": typical}
        for measure, error in {"max": k.max().item(), "RMS": _rms(k)}.items():
            if not error <= ERROR_RATIO * granted[measure] + FLOOR_ULPS[measure] * ulp:
                failures.append(f"  {measure} error {region}: {error:.3g}, eager's {granted[measure]:.3g}")
                worst_region = mask
    if failures:
        worst = torch.where(worst_region, ours_error, -1.0).argmax()
        at = tuple(map(int, torch.unravel_index(worst, ours.shape)))
        bound = f"{what}: more than {ERROR_RATIO:g} times eager's error and a few ulps of {ulp:.3g}"
        raise AssertionError("\n".join([bound, *failures, _describe(at, ours, eager, reference, groups)]))


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _regions(shape: torch.Size, groups: int | None) -> Iterator[tuple[str, Tensor]]:
    """Names and masks of the parts on which the rule must hold."""

    def mask(*index) -> Tensor:
        chosen = torch.zeros(shape, dtype=torch.bool)
        chosen[index] = True
        return chosen

    yield "everywhere", torch.ones(shape, dtype=torch.bool)
    if len(shape) > 1:
        yield "in the last image", mask(-1)
    if len(shape) == 4:
        for name, axis in (("row", -2), ("column", -1)):
            for which, position in (("first", 0), ("last", -1)):
                yield f"in the {which} {name}", mask(..., position) if axis == -1 else mask(..., position, slice(None))
    if groups is not None:
        width = shape[1] // groups
        yield "in the last channel of each group", mask(slice(None), slice(width - 1, None, width))


def _describe(at: tuple[int, ...], ours: Tensor, eager: Tensor, reference: Tensor, groups: int | None) -> str:
    place = f"  worst at {at} of {tuple(ours.shape)}"
    if groups is not None:
        width = ours.shape[1] // groups
        place += f": channel {at[1] % width} of {width} in group {at[1] // width} of {groups}"
    values = f"  ours {ours[at]:.9g}  eager {eager[at]:.9g}  float64 {reference[at]:.9g}"
    window = (*at[:-2], *(slice(max(i - 1, 0), i + 2) for i in at[-2:]))
    neighbours = "  its neighbours, ours:", _rows(ours[window]), "  its neighbours, float64:", _rows(reference[window])
    return "\n".join((place, values, *neighbours))


def _rows(window: Tensor) -> str:
    return "\n".join("    " + " ".join(f"{value:12.6g}" for value in row) for row in torch.atleast_2d(window))
