"""skorch: scikit-learn's interface, with its clones."""

import pytest
import torch
from beside import images, same, twins
from torch import nn

skorch = pytest.importorskip("skorch")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_fit_and_predict():
    found = []
    x, target = images(8, 64), torch.arange(8) % 5
    for model in twins("regnet_y"):
        net = skorch.NeuralNetClassifier(
            model,
            criterion=nn.CrossEntropyLoss,
            lr=1e-2,
            max_epochs=2,
            batch_size=4,
            train_split=None,
            verbose=0,
            iterator_train__shuffle=False,
        )
        net.fit(x.numpy(), target.numpy())
        found.append((torch.tensor(net.history[:, "train_loss"]), torch.from_numpy(net.forward(x.numpy()).numpy())))
    same(*found)
