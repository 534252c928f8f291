"""regnet_fast in five steps: load, compare, explain, fine-tune, export.

    pip install ".[onnx]"
    python examples/tour.py

The cells (`# %%`) run one by one in an editor that knows them. Nothing is downloaded: the weights are random, and
`pretrained=True` loads timm's.
"""

# %%
import copy
import tempfile
from pathlib import Path

import timm
import torch

import regnet_fast

torch.manual_seed(0)
images = torch.randn(2, 3, 128, 128)

# %% [markdown]
# ## Load
#
# `create_model` takes timm's names and arguments. The weights have timm's keys, so that they go both ways.

# %%
model = regnet_fast.create_model("resnet18", num_classes=5).eval()
theirs = timm.create_model("resnet18", num_classes=5).eval()
theirs.load_state_dict(model.state_dict())

# %% [markdown]
# ## Compare
#
# Eager PyTorch in float64 says what is right. Both are away from it by their rounding.

# %%
with torch.no_grad():
    exact = copy.deepcopy(theirs).double()(images.double())
    ours, eager = ((net(images).double() - exact).abs().max().item() for net in (model, theirs))
print(f"largest error: ours {ours:.1e}, timm's {eager:.1e}")
assert ours < 2 * eager + 1e-6

# %% [markdown]
# The times of both, of torch.compile and of the runtimes: `regnet-fast compare resnet18`.
#
# ## Explain
#
# What runs for each layer, and why.

# %%
for row in regnet_fast.explain(model, tuple(images.shape))[:6]:
    print(row.layer, row.operation, row.backend, row.label, row.reason)

# %% [markdown]
# ## Fine-tune
#
# Any training loop. Here the labels of eight images are learnt by heart.

# %%
labels = torch.arange(8) % 5
batch = torch.randn(8, 3, 64, 64)
optimizer = torch.optim.SGD(model.train().parameters(), lr=0.02, momentum=0.9)
losses = []
for _ in range(6):
    loss = torch.nn.functional.cross_entropy(model(batch), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("loss", " ".join(f"{each:.2f}" for each in losses))
assert losses[-1] < losses[0]

# %% [markdown]
# ## Export
#
# The ONNX file has timm's own forward and is checked with ONNX Runtime before it appears.

# %%
with tempfile.TemporaryDirectory() as folder:
    found = regnet_fast.export.onnx(model.eval(), Path(folder) / "resnet18.onnx", input_size=(3, 64, 64))
    print(found.inputs, found.outputs, found.checks)
