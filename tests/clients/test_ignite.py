"""ignite: its trainer and evaluator."""

import pytest
import torch
from beside import evaluated, images, same, twins
from torch.nn import functional as F

engine = pytest.importorskip("ignite.engine")
handlers = pytest.importorskip("ignite.handlers")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_trainer_and_average():
    found, x = [], images()
    batches = [(images(4, 64), torch.arange(4)) for _ in range(3)]
    for model in twins("regnet_y"):
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        trainer = engine.create_supervised_trainer(model, optimizer, F.cross_entropy)
        average = handlers.EMAHandler(model, momentum=0.5)
        average.attach(trainer, event=engine.Events.ITERATION_COMPLETED)
        evaluator = engine.create_supervised_evaluator(model)
        losses = []
        trainer.add_event_handler(
            engine.Events.ITERATION_COMPLETED, lambda e, losses=losses: losses.append(e.state.output)
        )
        trainer.run(batches, max_epochs=1)
        evaluator.run(batches[:1])
        found.append((torch.tensor(losses), evaluator.state.output[0], evaluated(average.ema_model.eval(), x)))
    same(*found)
