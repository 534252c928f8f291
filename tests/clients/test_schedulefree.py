"""schedulefree: optimizers that exchange the weights for an evaluation."""

import pytest
from beside import evaluated, images, moved, quiet, same, twins

schedulefree = pytest.importorskip("schedulefree")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree"])
def test_weights_of_evaluation(name, foreach):
    models, x = twins("regnet_y"), images(2, 32)
    rate = 0.05 if name.startswith("SGD") else 0.01
    made = [getattr(schedulefree, name)(m.parameters(), lr=rate, foreach=foreach) for m in models]
    before = evaluated(models[1], x)
    for k in range(3):
        for optimizer in made:
            optimizer.train()
        for model in models:
            model.zero_grad()
            quiet(model, x).square().mean().backward()
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            same(a.grad, b.grad)
            b.grad.mul_(b.detach().square().mean().sqrt() / b.grad.square().mean().sqrt().clamp(min=1e-20))
            a.grad.copy_(b.grad)
        for optimizer in made:
            optimizer.step()
        same(*(evaluated(model, x) for model in models), f"step {k}")
        for optimizer in made:
            optimizer.eval()
        after = evaluated(models[1], x)
        same(evaluated(models[0], x), after, f"averages of step {k}")
    moved(before, after)
