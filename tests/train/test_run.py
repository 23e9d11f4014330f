"""How a run is built: complete before methods see it, and held by nothing that it holds."""

import gc
import weakref

import fake
import numpy as np
import pytest
import torch
from torch import nn

from burnish.core.errors import BurnishError
from burnish.methods.objective import OBJECTIVES, Objective
from burnish.train.run import Run
from burnish.train.setup import own_accelerate_state


class Curious(Objective):
    """Writes down what it sees in `setup`, owns a matrix and a vector, and freezes what it is told to."""

    def __init__(self, freeze="", switch=""):
        super().__init__()
        self.freeze, self.switch = freeze, switch

    def choose_trained(self, recipe, policy):
        for name, parameter in policy.named_parameters():
            if self.freeze and name.startswith(self.freeze):
                parameter.requires_grad_(False)

    def setup(self, run):
        self.saw = {
            "trained": list(run.trained), "step": run.step,
            "optimised": [p for group in run.optimizer.param_groups for p in group["params"]],
        }  # fmt: skip
        self.project = nn.Linear(3, 2)
        if self.switch:
            dict(run.policy.named_parameters())[self.switch].requires_grad_(False)

    def loss(self, run, batch, out):
        return {"curious": self.project(batch["action"].mean((0, 1))).square().sum()}


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    fake.register(monkeypatch.setattr)
    monkeypatch.setitem(OBJECTIVES._entries, "curious", Curious)


def build(root, output, options="", *more):
    with own_accelerate_state():
        objective = f"--objectives=[{{name: curious, {options}}}]"
        return Run(fake.recipe(root, output, "--train.ema_decay=0.9", objective, *more), progress=False)


def test_a_run_is_complete_when_a_method_is_set_up_and_takes_in_what_it_made(dataset, tmp_path):
    run = build(dataset, tmp_path / "r", "freeze: words")
    saw, inside = run.objectives["curious"].saw, [n for n, p in run.policy.named_parameters() if p.requires_grad]
    assert saw["trained"] == inside and not any(name.startswith("words") for name in inside)
    assert {id(p) for p in saw["optimised"]} == {id(run.trained[name]) for name in inside} and saw["step"] == 0
    own = {f"objectives.curious.project.{name}" for name in ("weight", "bias")}
    assert set(run.trained) == set(inside) | own == set(run.average.shadow)
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decays.keys() == {id(p) for p in run.trained.values()}
    for parameter in run.trained.values():  # matrices decay, biases and scales do not, whoever owns them
        assert decays[id(parameter)] == (run.recipe.train.weight_decay if parameter.ndim >= 2 else 0)


def test_what_is_trained_may_not_change_in_setup(dataset, tmp_path):
    with pytest.raises(BurnishError, match="switched requires_grad of 'head.bias' in setup.*choose_trained"):
        build(dataset, tmp_path / "r", "switch: head.bias")


def test_a_run_goes_with_its_last_user(dataset, tmp_path):
    gc.collect()
    gc.disable()
    try:
        run = build(dataset, tmp_path / "r")
        gone = weakref.ref(run)
        del run
        assert gone() is None
    finally:
        gc.enable()


def test_scalar_products_and_norms(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("burnish.methods.gradients.PART_CPU", 7)  # shorter than the tensors
    run, draws = build(dataset, tmp_path / "r"), torch.Generator().manual_seed(0)
    one, two = ({n: torch.randn(p.shape, generator=draws) for n, p in run.trained.items()} for _ in range(2))
    flat = [np.concatenate([t[n].double().numpy().ravel() for n in run.trained]) for t in (one, two)]
    turned = dict(reversed(two.items()))
    for other in (two, turned):  # by name, whatever the order
        assert float(run.dot(one, other)) == pytest.approx(flat[0] @ flat[1], rel=1e-5)
    assert float(run.dot(list(one.values()), list(two.values()))) == pytest.approx(flat[0] @ flat[1], rel=1e-5)
    assert float(run.norm(one)) == pytest.approx(np.linalg.norm(flat[0]), rel=1e-6)
    assert run.dot(one, two).dtype == run.norm({}).dtype == torch.float64 and float(run.norm({})) == 0
