"""Which way every method pulls, against gradients taken apart; what it refuses, and when it looks."""

import fake
import pytest
import torch
from dissect import Dissected, cut_at, recipe
from test_isolate_adam import make, step

from burnish.core.errors import BurnishError
from burnish.methods.inputs import question_batches
from burnish.methods.isolate.anchor import Anchor, build
from burnish.methods.isolate.objective import Isolate
from burnish.methods.isolate.project import Direction
from burnish.policies import load_policy
from burnish.train.loop import train


def taken(dataset, tiny, path, objective, *more):
    return Dissected(recipe(dataset, tiny, path, objective, *more))


def inside(run):
    return {name for name, _ in run.run.policy.backbone_parameters()}


def question_gradient(run):
    """Of the mean answer loss on the first question batch, by name."""
    source, policy = run.method.source, run.run.policy
    names, parameters = zip(*run.method._backbone.items(), strict=True)
    loss = policy.language(source.questions.batch(0)).mean
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def test_l2sp_pulls_towards_the_start(dataset, tiny_smolvla, tmp_path):
    run = taken(dataset, tiny_smolvla, tmp_path / "a", "method: l2sp, weight: 0.5")
    name, parameter = next((n, p) for n, p in run.method._backbone.items() if n in run.raw)
    with torch.no_grad():
        parameter.add_(0.1)
    grads = {name: run.raw[name].clone()}
    run.method.edit_gradients(run.run, None, grads)
    torch.testing.assert_close(grads[name], run.raw[name] + 0.5 * 0.1)


def test_replay_adds_the_loss_on_questions(dataset, questions, tiny_smolvla, tmp_path):
    objective = f"method: replay, questions: {questions}, share: 1.0, weight: 0.7"
    plain = taken(dataset, tiny_smolvla, tmp_path / "p", "")
    run = taken(dataset, tiny_smolvla, tmp_path / "a", objective)
    expected = question_gradient(run)
    assert run.terms["replay"] > 0 and expected
    for name, value in expected.items():
        before = plain.raw.get(name, torch.zeros_like(value))
        torch.testing.assert_close(run.raw[name], before + 0.7 * value, rtol=1e-3, atol=1e-6)


def test_the_penalty_is_added(dataset, questions, tiny_smolvla, tmp_path):
    run = taken(dataset, tiny_smolvla, tmp_path / "a", f"method: penalty, questions: {questions}, weight: 0.3")
    assert run.terms["anchor"] > 0
    torch.testing.assert_close(run.total.detach(), run.terms["policy"] + run.terms["anchor"])


def test_insulated_backbone_learns_from_questions_alone(dataset, questions, tiny_smolvla, tmp_path):
    """All that questions reach, be it reached by actions or not; and nothing else."""
    run = taken(
        dataset, tiny_smolvla, tmp_path / "a", f"method: insulate, questions: {questions}, turns: 1, weight: 0.5"
    )
    expected = question_gradient(run)
    assert set(expected) - set(run.raw), "the language head, for one"
    for name in run.method._backbone:
        value = expected.get(name, torch.zeros_like(run.edited[name]))
        torch.testing.assert_close(run.edited[name], 0.5 * value, rtol=1e-3, atol=1e-7)
    assert all(torch.equal(run.edited[n], run.raw[n]) for n in run.raw if n not in inside(run))


@pytest.mark.parametrize("other", ["language", "objective"])
def test_nothing_else_may_train_an_insulated_backbone(dataset, questions, tiny_smolvla, tmp_path, other):
    made = recipe(dataset, tiny_smolvla, tmp_path / "a", f"method: insulate, questions: {questions}")
    if other == "language":
        made.language.root, made.language.weight = str(questions), 1.0
    else:
        made.objectives.append({"name": "align"})
    with pytest.raises(BurnishError, match="learns nothing from"):
        Dissected(made)


@pytest.mark.parametrize("method", ["auto", "self_penalty", "self_anchor"])
def test_a_frozen_backbone_needs_no_protection(dataset, tiny_smolvla, tmp_path, method):
    with pytest.raises(BurnishError, match="nothing to protect"):
        taken(dataset, tiny_smolvla, tmp_path / "a", f"method: {method}", "--train.freeze=[vlm]")


def test_a_run_that_protects_against_itself_looks_again_at_its_second_step(dataset, tiny_smolvla, tmp_path):
    """At the first it is its own start, from which nothing can be protected."""
    result = train(recipe(dataset, tiny_smolvla, tmp_path / "a", "method: self_anchor, every: 8",
                          "--train.save_every=100"), progress=False)  # fmt: skip
    rows = fake.figures(result.metrics)
    assert rows[0]["isolate_protected_loss"] == 0 < rows[1]["isolate_protected_loss"]


def test_resuming_with_another_save_every_still_edits(dataset, questions, tiny_smolvla, tmp_path, monkeypatch):
    """The direction of the cut run is gone; a new one is taken at once."""
    objective = f"method: question_anchor, questions: {questions}, every: 100"
    with cut_at(monkeypatch, 3):
        train(recipe(dataset, tiny_smolvla, tmp_path / "a", objective), progress=False)
    again = recipe(dataset, tiny_smolvla, tmp_path / "a", objective, "--train.save_every=50")
    rows = fake.figures(train(again, progress=False).metrics)
    assert all("isolate_removed_norm_fraction" in row for row in rows)


@pytest.mark.parametrize("mode", ["first_moment", "preconditioned"])
def test_clipping_and_a_later_method_leave_adam_in_order(mode):
    """Clipped hard, a preconditioned step still leaks nothing; a gradient put in place of the edited one is no NaN."""
    parameters, optimizer, layout, watch, draws = make(momentum=0.0)
    for number in range(1, 6):
        step(parameters, optimizer, layout, watch, draws, mode, number, max_norm=1.0)
        leak = float(watch.leak.abs().max())
        assert number == 1 or leak < 1e-3 or mode == "first_moment"
    edited = [torch.full((20,), 5.0)] * 2
    watch.route(edited, Direction([torch.full((20,), 1.0)] * 2, layout), torch.full((2,), -4.999, dtype=torch.float64))
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-4)  # another method's
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in parameters.values())
    assert all((optimizer.state[p]["exp_avg_sq"] >= 0).all() for p in parameters.values())


@pytest.mark.parametrize("options", [
    {"anchor_samples": 0}, {"anchor_samples": "many"}, {"questions": 5}, {"anchor": 5}, {"probe": {"evry": 5}},
    {"probe": {"text": 5}}, {"probe": {"every": "a"}},
], ids=str)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(BurnishError):
        Isolate(**options)


def test_a_mistyped_probe_folder_is_told(dataset, tiny_smolvla, tmp_path):
    with pytest.raises(BurnishError, match="no question folder"):
        taken(dataset, tiny_smolvla, tmp_path / "a", "method: l2sp, probe: {questions: nowhere}")


@pytest.mark.parametrize(("samples", "batch_size", "used"), [(40, 32, 40), (40, 3, 40), (40, 64, 40), (10, 4, 10)])
def test_an_anchor_takes_every_question_once(tiny_smolvla, questions, samples, batch_size, used):
    batches = list(question_batches(questions, samples, batch_size, 0, "cpu"))
    asked = [(q, i.sum().item()) for b in batches for q, i in zip(b["question"], next(iter(_images(b))), strict=True)]
    assert len(asked) == used


def _images(batch):
    return [value for key, value in batch.items() if "image" in key]


def test_damaged_anchors(tiny_smolvla, questions, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file
    from test_isolate_anchor import about

    policy = load_policy(tiny_smolvla)
    build(policy, question_batches(questions, 8, 8, 0, "cpu"), about(policy)).save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(n for n in tensors if n.endswith("mean"))
    layer = name.split(".")[0]
    damages = {
        "nan": tensors | {name: torch.full_like(tensors[name], torch.nan)},
        "no mean": {n: t for n, t in tensors.items() if n != name},
        "no layer": {n: t for n, t in tensors.items() if n.split(".")[0] != layer},
        "odd name": tensors | {"x": torch.zeros(1)},
        "width": tensors | {name: tensors[name][:-1].clone()},
    }
    for what, damaged in damages.items():
        save_file(damaged, tmp_path / "b.safetensors", metadata=metadata)
        with pytest.raises(BurnishError, match="damaged"):
            Anchor.load(tmp_path / "b.safetensors")
            pytest.fail(what)


def test_an_anchor_made_otherwise_is_refused(dataset, tiny_smolvla, questions, tmp_path, capsys):
    from burnish.cli.main import main

    file = tmp_path / "a.safetensors"
    assert (
        main(["method", "isolate", "anchor", str(tiny_smolvla), str(questions), "-o", str(file), "--samples", "8"]) == 0
    )
    with pytest.raises(BurnishError, match="burnish method isolate anchor --tokens pooled"):
        taken(dataset, tiny_smolvla, tmp_path / "r", f"method: aegis, questions: {questions}, anchor: {file}")
