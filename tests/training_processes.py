"""What each process of the tests of distributed training does: every scenario, with its results in a file."""

import copy
import datetime
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import reasons
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as timms_conversion
from torch import nn
from torch.nn import functional as F
from training_blocks import network_pair, state_of

from regnet_fast.blocks import fused

WORLD = 2
EVEN, UNEVEN = (4, 4), (5, 3)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=generator), torch.arange(8) % 5


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return tuple(model.double() for model in network_pair(name))


def share(split: tuple[int, int], rank: int) -> slice:
    return slice(0, split[0]) if rank == 0 else slice(split[0], None)


def freeze_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def torchs_conversion(model: nn.Module) -> nn.Module:
    """Which does not know timm's norms and drops their activations."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def without_activations(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.act = nn.Identity()
    return model


CONVERSIONS = {"timm": timms_conversion, "torch": torchs_conversion}
SYNCHRONISED = [
    (network, conversion, split)
    for network, conversion in (("regnet_y", "timm"), ("regnet_y", "torch"), ("repvgg", "timm"), ("repvgg", "torch"))
    for split in (EVEN, UNEVEN)
]


def ddp(rank: int) -> dict:
    """Two steps of data-parallel training with fixed norms."""
    model, _ = networks("regnet_y")
    x, target = (t[share(EVEN, rank)] for t in images())
    parallel = nn.parallel.DistributedDataParallel(freeze_norms(model))
    for _ in range(2):
        F.cross_entropy(parallel(x), target).backward()
    return state_of(model)


def ddp_statistics(rank: int) -> dict:
    """With norms of each process's own batch."""
    model, _ = networks("repvgg")
    x, target = (t[share(EVEN, rank)] for t in images())
    parallel = nn.parallel.DistributedDataParallel(model)
    F.cross_entropy(parallel(x), target).backward()
    return state_of(model)


def synchronised(rank: int, network: str, conversion: str, split: tuple[int, int]) -> dict:
    """The loss over all images; gradients are summed over the processes."""
    model = CONVERSIONS[conversion](networks(network)[0])
    x, target = (t[share(split, rank)] for t in images())
    for _ in range(2):
        loss = F.cross_entropy(model(x), target, reduction="sum") / 8
        loss.backward()
    dist.all_reduce(total := loss.detach().clone())
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    found = reasons(copy.deepcopy(model), x)
    return {"loss": total, "reasons": found} | state_of(model)


def sharded(rank: int, stem_too: bool) -> dict:
    """FSDP of every block and of the rest, two steps of SGD."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, _ = networks("regnet_y")
    mesh = init_device_mesh("cpu", (WORLD,))
    for path, module in list(model.named_modules()):
        if isinstance(module, fused.Fused) and (stem_too or path != "stem"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, target = (t[share(EVEN, rank)] for t in images())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        losses.append(loss.detach())
        gradients = {f"gradient of {name}": p.grad.full_tensor() for name, p in model.named_parameters()}
        optimizer.step()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"losses": torch.stack(losses)} | gradients | buffers


SCENARIOS = {
    "ddp": ddp,
    "ddp_statistics": ddp_statistics,
    **{f"sync {case}": lambda rank, case=case: synchronised(rank, *case) for case in SYNCHRONISED},
    "fsdp": lambda rank: sharded(rank, False),
    "fsdp with the stem": lambda rank: sharded(rank, True),
}


def main(rank: int, folder: str) -> None:
    """All scenarios in one process group. A failure in one is its result; the others go on where they can."""
    torch.set_num_threads(1)
    fused._DTYPES = (*fused._DTYPES, torch.float64)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    for i, (name, scenario) in enumerate(SCENARIOS.items()):
        try:
            found = scenario(rank)
        except Exception:
            found = traceback.format_exc()
            print(name, found, file=sys.stderr)
        torch.save(found, Path(folder) / f"{i}-{rank}.pt")
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # at an ordinary end a thread of torch's process groups may be left that nobody joins, which aborts
