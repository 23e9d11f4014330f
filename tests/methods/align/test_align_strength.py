"""Strength: what arrives at the shallowest image tokens is what was asked for, at every step of a run."""

import math

import pytest
import torch
from align_student import load_student, recipe

from burnish.core.types import PolicyLoss
from burnish.train.loop import Run

TEACHER = "teacher: 'edges:Edges'"


@pytest.fixture(autouse=True)
def tiny(monkeypatch, edges):
    import burnish.policies

    monkeypatch.setattr(burnish.policies, "load_policy", load_student)


def ratios(run, steps, drift):
    """Norm of alignment's gradient over the task's at the first captured state, for each step of a training.

    The task's loss is multiplied by `drift(step)`, so that the ratio would run away under a lambda that lags.
    """
    align, policy, found = run.objectives["align"], run.policy, []
    for step in range(steps):
        run.step = step
        run.seed_step()
        batch = run.data.finish(run.data.raw(step), step)
        with align.watch(run):
            out = policy.loss(batch, policy.draw(5, run.generator))
        out = PolicyLoss(drift(step) * out.total, out.per_sample, out.parts)
        state = align.captured.hidden[0]
        (term,) = align.loss(run, batch, out).values()
        pushes = [torch.autograd.grad(v, state, retain_graph=True)[0][:, :4].norm() for v in (term, out.total)]
        found.append(float(pushes[0] / pushes[1]))
        run.optimizer.zero_grad()
        (out.total + term).backward()
        run.optimizer.step()
    return torch.tensor(found)


@pytest.mark.parametrize("sharing", ["shared", "independent"])
def test_a_whole_run_is_pulled_as_hard_as_asked_while_the_task_drifts(dataset, tmp_path, sharing):
    options = f"gradient_norm_ratio: 0.5, sharing: {sharing}"
    made = recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, {options}}}", more=["--train.steps=300"])
    training = Run(made, progress=False)
    found = ratios(training, 300, lambda step: math.exp(3 * math.sin(step / 20)))
    assert len(found) == 300 and ((found - 0.5).abs() < 0.05).all(), (found.min(), found.max())


def test_the_schedule_multiplies_the_ratio(dataset, tmp_path):
    options = "gradient_norm_ratio: 0.4, warmup_steps: 8"
    training = Run(recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, {options}}}"), progress=False)
    found = ratios(training, 12, lambda step: 1.0)
    expected = [0.4 * min(1, (step + 1) / 8) for step in range(12)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_a_measurement_beside_it_changes_no_gradient(dataset, tmp_path):
    found = []
    for every in (0, 1):
        options = f"gradient_norm_ratio: 0.5, measure_every: {every}"
        training = Run(recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, {options}}}"), progress=False)
        ratios(training, 3, lambda step: 1.0)
        found.append([p.detach().clone() for p in training.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_measured_unless_asked_and_then_at_two_layers(dataset, tmp_path, monkeypatch):
    def figures(options):
        made = recipe(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, {options}}}")
        training = Run(made, progress=False)
        ratios(training, 1, lambda step: 1.0)
        return training.objectives["align"].metrics()

    calls, original = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or original(*a, **k))
    plain = figures("pairs: [[0, 0], [1, 0], [2, 1]]")
    assert len(calls) == 2 and not any("coherence" in name for name in plain)  # the test's own two
    whole = figures("pairs: [[0, 0], [1, 0], [2, 1]], measure_every: 1")
    assert len(calls) == 2 + 2 + 4  # three pairs and the task
    assert [name for name in whole if name.startswith("align_push")] == ["align_push_0", "align_push_2"]
