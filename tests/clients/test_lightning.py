"""Lightning: its loop, its averaging of weights, and its precision plugins."""

import pytest
import torch
from beside import evaluated, images, same, twins
from torch.nn import functional as F

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def task(model):
    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.heard = model, []

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.heard.append(self.model(batch[0]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-2, momentum=0.9)

    return Task()


def test_fit_and_validate(tmp_path):
    found = []
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(images(8, 64), torch.arange(8) % 5)
    x = images()
    for model in twins("regnet_y"):
        loader = torch.utils.data.DataLoader(data, 4)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = task(model.train())
        trainer.fit(module, loader, loader)
        found.append((module.heard[-2:], evaluated(model.eval(), x)))
    same(*found)
