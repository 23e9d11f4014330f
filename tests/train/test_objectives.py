"""The seat of a method: each hook does what methods/objective.py says, and two methods combine."""

import fake
import pytest

from burnish.methods.objective import OBJECTIVES, Objective
from burnish.train.loop import train


class NearBase(Objective):
    """Pulls the backbone towards its start and scales its gradients."""

    def __init__(self, weight=0.0, share=1.0):
        super().__init__()
        self.weight, self.share = weight, share

    def setup(self, run):
        self.start = {name: p.detach().clone() for name, p in run.policy.backbone_parameters()}

    def loss(self, run, batch, out):
        squared = sum(((p - self.start[name]) ** 2).sum() for name, p in run.policy.backbone_parameters())
        self.distance = squared.detach() ** 0.5
        return {"near": self.weight * squared}

    def edit_gradients(self, run, batch, grads):
        for name in self.start:
            grads[name].mul_(self.share)
        return {"edited": len(grads)}

    def metrics(self):
        return {"near_distance": float(self.distance)}


@pytest.fixture
def near(monkeypatch):
    fake.register(monkeypatch.setattr)
    monkeypatch.setattr(OBJECTIVES, "_entries", OBJECTIVES._entries | {"near": NearBase, "near2": NearBase})


def run(dataset, output, objectives, *more):
    recipe = fake.recipe(
        dataset, output, f"--objectives={objectives}", "--train.weight_decay=0", "--train.steps=30", *more
    )
    result = train(recipe, progress=False)
    tensors, base = fake.weights(result.policy)["model.safetensors"], fake.FakePolicy().state_dict()
    moved = sum(((tensors[n] - base[n]) ** 2).sum() for n in tensors if n.startswith("backbone")) ** 0.5
    return float(moved), fake.figures(result.metrics)


def test_added_loss_and_gradient_edits_act(dataset, tmp_path, near):
    free, _ = run(dataset, tmp_path / "free", "[{name: near}]")
    kept, rows = run(dataset, tmp_path / "kept", "[{name: near, weight: 1000}]")
    still, _ = run(dataset, tmp_path / "still", "[{name: near, share: 0}]")
    assert still == 0 and 0 < kept < 0.7 * free
    assert rows[-1]["near_distance"] > 0 and rows[-1]["loss"] > rows[-1]["loss_policy"]


def test_two_methods_combine(dataset, tmp_path, near):
    _, rows = run(dataset, tmp_path / "r", "[{name: near, weight: 0.1}, {name: 'fake:Probe', weight: 0.3}]")
    assert rows[-1]["loss_near"] > 0 and rows[-1]["loss_probe"] > 0


def test_two_losses_of_one_name_are_an_error(dataset, tmp_path, near):
    from burnish.core.errors import BurnishError

    with pytest.raises(BurnishError, match="'near2' adds a loss called 'near'"):
        run(dataset, tmp_path / "r", "[{name: near}, {name: near2}]")


def test_edits_happen_once_for_all_micro_batches(dataset, tmp_path, near):
    import json

    run(dataset, tmp_path / "r", "[{name: probe}]", "--train.grad_accumulation=3")
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == rows[-1]["probe_calls"] == 30
