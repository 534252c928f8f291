"""peft: LoRA on convolutions and the classifier: trained, switched off, merged, unloaded."""

import pytest
import torch
from beside import evaluated, images, moved, quiet, same, twins

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("target", [r"head\.fc", r".*\.(conv1|conv3)\.conv|head\.fc", r"stem\.conv"])
def test_lora(target):
    found, x = [], images(4, 64)
    for model in twins("regnet_y"):
        before = evaluated(model, x)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=target, r=2, init_lora_weights=False)).eval()
        seen = [before, evaluated(model, x)]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        quiet(model.train(), x).square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        seen.append(evaluated(model.eval(), x))
        with model.disable_adapter():
            seen.append(evaluated(model, x))
        model.merge_adapter()
        seen.append(evaluated(model, x))
        model.unmerge_adapter()
        seen.append(evaluated(model, x))
        seen.append(evaluated(model.merge_and_unload(), x))
        found.append((seen, grads))
    moved(found[1][0][0], found[1][0][1])
    same(*found)
