"""What timm's model cards and pages tell users to type, with `import regnet_fast as timm`: it gives what timm gives.

The calls are those of the cards of regnety_002, resnetv2_50 and repvgg_a2 and of timm's page on RegNetY. Downloads
alone are stand-ins: a photograph made here, and weights that timm's own loader takes for those of the hub.
"""

import functools
import importlib
import io
import urllib.request

import helpers
import pytest
import timm
import torch
from PIL import Image

from regnet_fast.blocks.fused import Fused

CLASSIFICATION = """
from urllib.request import urlopen
from PIL import Image
import timm

img = Image.open(urlopen(
    'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/beignets-task-guide.png'
))

model = timm.create_model('{name}', pretrained=True)
model = model.eval()

# get model specific transforms (normalization, resize)
data_config = timm.data.resolve_model_data_config(model)
transforms = timm.data.create_transform(**data_config, is_training=False)

output = model(transforms(img).unsqueeze(0))  # unsqueeze single image into batch of 1

top5_probabilities, top5_class_indices = torch.topk(output.softmax(dim=1) * 100, k=5)
"""

FEATURE_MAPS = """
from urllib.request import urlopen
from PIL import Image
import timm

img = Image.open(urlopen(
    'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/beignets-task-guide.png'
))

model = timm.create_model(
    '{name}',
    pretrained=True,
    features_only=True,
)
model = model.eval()

# get model specific transforms (normalization, resize)
data_config = timm.data.resolve_model_data_config(model)
transforms = timm.data.create_transform(**data_config, is_training=False)

output = model(transforms(img).unsqueeze(0))  # unsqueeze single image into batch of 1

for o in output:
    print(o.shape)
"""

EMBEDDINGS = """
from urllib.request import urlopen
from PIL import Image
import timm

img = Image.open(urlopen(
    'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/beignets-task-guide.png'
))

model = timm.create_model(
    '{name}',
    pretrained=True,
    num_classes=0,  # remove classifier nn.Linear
)
model = model.eval()

# get model specific transforms (normalization, resize)
data_config = timm.data.resolve_model_data_config(model)
transforms = timm.data.create_transform(**data_config, is_training=False)

output = model(transforms(img).unsqueeze(0))  # output is (batch_size, num_features) shaped tensor
embedding = output

# or equivalently (without needing to set num_classes=0)

output = model.forward_features(transforms(img).unsqueeze(0))
unpooled = output

output = model.forward_head(output, pre_logits=True)
"""

PAGE = """
import timm
model = timm.create_model('{name}', pretrained=True)
model.eval()

import urllib
from PIL import Image
from timm.data import resolve_data_config
from timm.data.transforms_factory import create_transform

config = resolve_data_config({{}}, model=model)
transform = create_transform(**config)

url, filename = ("https://github.com/pytorch/hub/raw/master/images/dog.jpg", "dog.jpg")
urllib.request.urlretrieve(url, filename)
img = Image.open(filename).convert('RGB')
tensor = transform(img).unsqueeze(0) # transform and add batch dimension

import torch
with torch.no_grad():
    out = model(tensor)
probabilities = torch.nn.functional.softmax(out[0], dim=0)
print(probabilities.shape)

# Get imagenet class mappings
url, filename = ("https://raw.githubusercontent.com/pytorch/hub/master/imagenet_classes.txt", "imagenet_classes.txt")
urllib.request.urlretrieve(url, filename)
with open("imagenet_classes.txt", "r") as f:
    categories = [s.strip() for s in f.readlines()]

# Print top categories per image
top5_prob, top5_catid = torch.topk(probabilities, 5)
for i in range(top5_prob.size(0)):
    print(categories[top5_catid[i]], top5_prob[i].item())
"""

FINETUNE = """
model = timm.create_model('{name}', pretrained=True, num_classes=NUM_FINETUNE_CLASSES)
"""

SHAPES = {  # as the cards print them
    "regnety_002.pycls_in1k": [(32, 112), (24, 56), (56, 28), (152, 14), (368, 7)],
    "resnetv2_50.a1h_in1k": [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)],
    "repvgg_a2.rvgg_in1k": [(64, 112), (96, 56), (192, 28), (384, 14), (1408, 7)],
}


@functools.cache
def weights_of(hub_name):
    """What stands for the pretrained weights of a name on the hub: random ones, with statistics."""
    return helpers.randomize_bn(timm.create_model(hub_name.removeprefix("timm/"))).state_dict()


@pytest.fixture
def internet(monkeypatch, tmp_path):
    """The three things that the calls fetch, without fetching them."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (260, 340, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    photograph = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(photograph, "PNG")

    def fetch(url, filename):
        classes = b"".join(b"class %d\n" % i for i in range(1000))
        (tmp_path / filename).write_bytes(classes if filename.endswith(".txt") else photograph.getvalue())

    monkeypatch.setattr(urllib.request, "urlopen", lambda url: io.BytesIO(photograph.getvalue()))
    monkeypatch.setattr(urllib.request, "urlretrieve", fetch)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda name, **_: dict(weights_of(name)))


def typed(snippet, name, library, **given):
    """What a user has after typing a snippet, with timm or with this package in its place."""
    namespace = {"torch": torch, "timm": importlib.import_module(library), **given}
    exec(snippet.format(name=name).replace("import timm\n", f"import {library} as timm\n"), namespace)
    assert any(isinstance(m, Fused) for m in namespace["model"].modules()) == (library == "regnet_fast")
    return namespace


def both(snippet, name, **given):
    return [typed(snippet, name, library, **given) for library in ("regnet_fast", "timm")]


@pytest.mark.parametrize("name", SHAPES)
def test_image_classification(name, internet, no_silent_fallback):
    ours, theirs = both(CLASSIFICATION, name)
    helpers.close(ours["output"], theirs["output"])
    helpers.close(ours["top5_probabilities"], theirs["top5_probabilities"])
    assert ours["top5_class_indices"].tolist() == theirs["top5_class_indices"].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_feature_map_extraction(name, internet, no_silent_fallback, capsys):
    ours, theirs = both(FEATURE_MAPS, name)
    shapes = [f"torch.Size([1, {channels}, {size}, {size}])" for channels, size in SHAPES[name]]
    assert capsys.readouterr().out.split("\n")[:-1] == 2 * shapes
    for a, b in zip(ours["output"], theirs["output"], strict=True):
        helpers.close(a, b)


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_image_embeddings(name, internet, no_silent_fallback):
    ours, theirs = both(EMBEDDINGS, name)
    channels, size = SHAPES[name][-1]
    assert ours["embedding"].shape == (1, channels) and ours["unpooled"].shape == (1, channels, size, size)
    for what in ("embedding", "unpooled", "output"):
        helpers.close(ours[what], theirs[what])


def test_the_page_on_regnety(internet, no_silent_fallback, capsys):
    ours, theirs = both(PAGE, "regnety_002")
    printed = capsys.readouterr().out.split("\n")[:-1]
    first, second = (lines[0] for lines in (printed[:6], printed[6:]))
    assert first == second == "torch.Size([1000])"
    assert [line.rpartition(" ")[0] for line in printed[1:6]] == [line.rpartition(" ")[0] for line in printed[7:]]
    helpers.close(ours["probabilities"], theirs["probabilities"])


def test_a_new_classifier_on_pretrained_weights(internet):
    """Every weight but the classifier's is the pretrained one, and the model trains."""
    ours, theirs = (found["model"].eval() for found in both(FINETUNE, "regnety_002", NUM_FINETUNE_CLASSES=7))
    for (name, a), (key, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == key and (name.startswith("head.fc") or torch.equal(a, b)), name
    ours.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert ours.head.fc.out_features == 7 and all(p.grad is not None for p in ours.parameters())
