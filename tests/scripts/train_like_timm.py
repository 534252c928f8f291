"""A training script as users of timm write them: its names, and nothing of this package.

It prints one line of JSON: the losses, and what the script has seen of its surroundings.
"""

import argparse
import json
import os
import sys

import script_neighbour
import timm.utils
import torch
from timm import create_model as from_timm
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, load_checkpoint, safe_model_name
from timm.models._factory import create_model as from_factory
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

parser = argparse.ArgumentParser()
parser.add_argument("data_dir")
parser.add_argument("--model", default="regnetx_002")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--output", default="")
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--start-method", default=None)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=2e-5)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--warmup-epochs", type=int, default=0)


class Doubled(torch.utils.data.Dataset):
    """A dataset of the script's own, which a spawned worker finds only by importing the script again."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 2 * len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index // 2]

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform):
        self.dataset.transform = transform


def main():
    args = parser.parse_args()
    if args.start_method:
        torch.multiprocessing.set_start_method(args.start_method)
    device = timm.utils.init_distributed_device(argparse.Namespace(device="cpu"))
    rank = int(os.environ.get("RANK", 0))
    timm.utils.random_seed(42, 0)
    model = create_model(args.model, num_classes=3, drop_path_rate=0.0).to(device)
    config = resolve_data_config({"img_size": 32}, model=model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    ema = ModelEmaV3(model, decay=0.9)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    dataset = Doubled(create_dataset("", root=args.data_dir, split="train", is_training=True))
    keep = {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=True,
        num_workers=args.workers,
        device=device,
        **keep,
    )
    mixup = Mixup(args.mixup, label_smoothing=0.1, num_classes=3) if args.mixup else None
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)
    scaler = NativeScaler("cpu") if args.amp else None
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=args.output) if args.output else None
    losses = []
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        wrapped.train()
        for images, target in loader:
            if mixup:
                images, target = mixup(images, target)
            with torch.autocast("cpu", torch.float16, enabled=args.amp):
                loss = criterion(wrapped(images), target)
            optimizer.zero_grad()
            if scaler:
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            else:
                loss.backward()
                optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        if saver:
            saver.save_checkpoint(epoch, -losses[-1])
    if saver:
        load_checkpoint(create_model(args.model, num_classes=3), os.path.join(args.output, "last.pth.tar"))
    model.eval()
    with torch.inference_mode():
        evaluated = model(torch.ones(1, 3, 32, 32)).tolist()
    same = from_timm is create_model is from_factory is timm.create_model is timm.models.create_model
    seen = {
        "name": __name__,
        "file": __file__,
        "argv": sys.argv,
        "aliases_agree": same,
        "neighbour": script_neighbour.HERE,
        "safe_name": safe_model_name(args.model),
        "classes": sorted({type(module).__module__.partition(".")[0] for module in model.modules()}),
    }
    if rank == 0:
        print(json.dumps({"losses": losses, "evaluated": evaluated, "seen": seen}))


if __name__ == "__main__":
    main()
