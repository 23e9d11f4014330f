"""The objective in real runs of tiny policies: what the edit may and may not touch, and everything it must survive."""

import fake
import numpy as np
import pytest
import torch
from dissect import Dissected, assert_equal, cut_at, recipe

from burnish.core.errors import BurnishError
from burnish.methods.isolate.options import METHODS, resolve
from burnish.policies import load_policy
from burnish.train import loop
from burnish.train.loop import train

pytestmark = pytest.mark.usefixtures("few_held")
LAYER_OF = r"^(.*?\blayers\.\d+)\."


def by_layer(names):
    import re

    groups = {}
    for name in names:
        found = re.match(LAYER_OF, name)
        groups.setdefault(found[1] if found else "other", []).append(name)
    return groups


def expected_edit(raw, protected):
    """The paper's rule in numpy float64, layer by layer, on the parameters that both losses reach."""
    edited = {name: g.double().numpy() for name, g in raw.items()}
    fired = 0
    for names in by_layer(n for n in protected if n in raw).values():
        a = np.concatenate([raw[n].double().numpy().ravel() for n in names])
        b = np.concatenate([protected[n].double().numpy().ravel() for n in names])
        if (d := a @ b) < 0:
            fired += 1
            for n in names:
                edited[n] = edited[n] - d / (b @ b) * protected[n].double().numpy()
    return edited, fired


@pytest.fixture(scope="module")
def two_views(tmp_path_factory):
    """A data set with the cameras of the tiny policies."""
    return fake.make_dataset(tmp_path_factory.mktemp("isolate") / "data", cameras=("top", "wrist"))


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_u6_u9_paper_rule_through_the_verbs(two_views, questions, tmp_path, request, kind):
    """Task gradient as in a plain run, expert untouched, backbone as the closed form says, on every policy."""
    tiny = request.getfixturevalue(f"tiny_{kind}")
    more = ["--train.batch_size=2", "--train.seed=1"]  # one whose gradients conflict somewhere
    plain = Dissected(recipe(two_views, tiny, tmp_path / "p", "", *more))
    aegis = Dissected(recipe(two_views, tiny, tmp_path / "a", f"method: aegis, questions: {questions}", *more))
    assert_equal(plain.raw, aegis.raw)
    inside = {name for name, _ in aegis.run.policy.backbone_parameters()}
    assert any(n not in inside for n in aegis.raw)
    assert all(torch.equal(aegis.edited[n], aegis.raw[n]) for n in aegis.raw if n not in inside)
    expected, fired = expected_edit(aegis.raw, aegis.protected)
    assert fired > 0
    for name, value in expected.items():
        scale = np.abs(aegis.raw[name].numpy()).max() + 1e-12
        np.testing.assert_allclose(aegis.edited[name].numpy(), value, atol=2e-5 * scale + 1e-9)


@pytest.mark.parametrize("change", ["checkpointing", "bf16"])
def test_u9_under_checkpointing_and_autocast(dataset, two_views, questions, tmp_path, request, change):
    if change == "checkpointing":
        tiny, root = request.getfixturevalue("tiny_pi0"), two_views
        more = ["--policy.overrides={gradient_checkpointing: true}", "--train.batch_size=2"]
    else:
        tiny, root, more = request.getfixturevalue("tiny_smolvla"), dataset, ["--train.precision=bf16"]
    plain = Dissected(recipe(root, tiny, tmp_path / "p", "", *more))
    aegis = Dissected(recipe(root, tiny, tmp_path / "a", f"method: aegis, questions: {questions}", *more))
    assert_equal(plain.raw, aegis.raw)
    expected, fired = expected_edit(aegis.raw, aegis.protected)
    assert fired > 0
    if change == "checkpointing":
        free = Dissected(recipe(root, tiny, tmp_path / "f", f"method: aegis, questions: {questions}", more[1]))
        for name, value in free.protected.items():
            torch.testing.assert_close(aegis.protected[name], value, rtol=1e-4, atol=1e-7)
    for name, value in expected.items():
        scale = np.abs(aegis.raw[name].numpy()).max() + 1e-12
        np.testing.assert_allclose(aegis.edited[name].numpy(), value, atol=2e-5 * scale + 1e-9)


def test_u7_accumulation_sums_both_gradients_and_edits_once(dataset, questions, tiny_smolvla, tmp_path):
    """Two micro-batches: both gradients are means over them, and the edit is that of the means."""
    objective = f"method: agem, questions: {questions}, share: 1.0"
    more = ["--train.grad_accumulation=2"]
    two = Dissected(recipe(dataset, tiny_smolvla, tmp_path / "two", objective, *more))
    with torch.enable_grad():
        source, policy = two.method.source, two.run.policy
        total = sum(policy.language(source.questions.batch(k)).mean for k in range(2))
        names, parameters = zip(*two.method._backbone.items(), strict=True)
        exact = dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))
    for name, value in two.protected.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-4, atol=1e-6)
    reached = [n for n in two.protected if n in two.raw]
    a = np.concatenate([two.raw[n].double().numpy().ravel() for n in reached])
    b = np.concatenate([two.protected[n].double().numpy().ravel() for n in reached])
    got = np.concatenate([two.edited[n].double().numpy().ravel() for n in reached])
    np.testing.assert_allclose(got, a - min(a @ b, 0.0) / (b @ b) * b, atol=1e-5 * np.abs(a).max())


def test_lora_projects_the_adapters(dataset, questions, tiny_smolvla, tmp_path):
    more = ["--train.peft.method=lora", "--train.peft.rank=2"]
    run = Dissected(recipe(dataset, tiny_smolvla, tmp_path / "l", f"method: aegis, questions: {questions}", *more))
    assert run.protected and all("lora_" in name for name in run.protected)
    expected, _ = expected_edit(run.raw, run.protected)
    for name, value in expected.items():
        np.testing.assert_allclose(run.edited[name].numpy(), value, atol=2e-5 * np.abs(value).max() + 1e-9)


EVERY = sorted(set(METHODS) - {"lora"})
STATELESS = {"aegis", "agem", "insulate", "naive", "self_penalty", "shuffled", "stop_gradient", "wrong_anchor"}
"""Keep nothing between steps that another method of the list does not keep: they are trained, not resumed; nor is
aegis, which test_matrix resumes."""


@pytest.mark.parametrize("method", EVERY)
def test_every_method_trains_and_a_cut_run_resumes_to_the_same_bits(dataset, questions, tiny_smolvla, tmp_path,
                                                                    monkeypatch, method):  # fmt: skip
    objective = f"method: {method}, questions: {questions}, every: 3"
    whole = train(recipe(dataset, tiny_smolvla, tmp_path / "whole", objective), progress=False)
    if method not in STATELESS:
        with cut_at(monkeypatch, 3):
            train(recipe(dataset, tiny_smolvla, tmp_path / "cut", objective), progress=False)
        train(recipe(dataset, tiny_smolvla, tmp_path / "cut", objective), progress=False)
        fake.assert_same_weights(whole.policy, tmp_path / "cut" / "policy")
    last = fake.figures(whole.metrics)[-1]
    if METHODS[method].get("rule") == "conflict":
        assert 0 <= last["isolate_conflict_rate"] <= 1
        assert 0 <= last["isolate_removed_norm_fraction"] <= last["isolate_removed_norm_fraction_max"] <= 1
        assert -1 <= last["isolate_leak"] <= 1
    moved = fake.weights(whole.policy)["model.safetensors"]
    base = fake.weights(tiny_smolvla)["model.safetensors"]
    backbone = [n for n in base if ".vlm." in n and "vision" in n]
    assert any(not torch.equal(moved[n].float(), base[n].float()) for n in base)
    assert (method == "stop_gradient") == all(torch.equal(moved[n].float(), base[n].float()) for n in backbone)


@pytest.mark.parametrize("options", [
    "rule: always, granularity: tensor", "rule: soft, strength: 0.3, share: 0.5", "optimiser: first_moment",
    "optimiser: preconditioned", "distance: normalised, answers: true, tokens: apart",
    "protect: questions, distance: tokens, share: 0.5", "rule: penalty, protect: self, distance: tokens",
])  # fmt: skip
def test_options_train(dataset, questions, tiny_smolvla, tmp_path, options):
    objective = f"method: aegis, questions: {questions}, {options}"
    probe = f"probe: {{questions: {questions}, samples: 6, every: 2}}"
    result = train(recipe(dataset, tiny_smolvla, tmp_path / "r", f"{objective}, {probe}"), progress=False)
    rows = fake.figures(result.metrics)
    assert all(np.isfinite(v) for row in rows for v in row.values())
    last = rows[-1]
    assert last["drift_robot"] > 0 and last["drift_questions_3"] > 0 and "drift_robot" in rows[1]
    if "penalty" not in options:
        assert max(row.get("isolate_removed_norm_fraction_max", 0) for row in rows) > 0 and last["isolate_cosine"] != 0


def test_probe_reads_text_and_starts_at_zero_drift(dataset, questions, tiny_smolvla, tmp_path):
    (tmp_path / "text.txt").write_text("the cube is red\n\nopen the drawer\n")
    objective = f"method: naive, probe: {{questions: {questions}, text: {tmp_path / 'text.txt'}, samples: 6}}"
    run = loop.Run(recipe(dataset, tiny_smolvla, tmp_path / "r", objective, "--train.steps=1"), progress=False)
    figures = run.objectives["isolate"].probe.measure(1)
    assert figures["drift_robot"] == figures["drift_questions"] == 0
    assert figures["text_loss"] == figures["text_loss_base"] > 1  # a random model knows nothing
    with pytest.raises(BurnishError, match="no file at none.txt"):
        loop.Run(recipe(dataset, tiny_smolvla, tmp_path / "r2", "probe: {text: none.txt}"), progress=False)


def test_lora_arm_trains_adapters_in_the_backbone_and_the_expert_in_full(dataset, tiny_smolvla, tmp_path, caplog):
    more = ["--train.peft.method=lora", "--train.peft.rank=2", "--train.peft.target_modules=.*vlm\\..*q_proj"]
    result = train(recipe(dataset, tiny_smolvla, tmp_path / "whole", "method: lora", *more), progress=False)
    assert load_policy(result.policy).action_dim == 3 and "were trained beside the adapters, such as" in caplog.text
    run = Dissected(recipe(dataset, tiny_smolvla, tmp_path / "l", "method: lora", *more)).run
    inside = {name for name, _ in run.policy.backbone_parameters()}
    assert all("lora_" in n for n in run.trained if n in inside) and any("lora_" in n for n in run.trained)
    assert all(p.requires_grad for n, p in run.policy.named_parameters() if n not in inside)


def test_the_probe_also_measures_where_the_time_is_over(dataset, questions, tiny_smolvla, tmp_path):
    objective = f"method: naive, probe: {{questions: {questions}, samples: 6}}"
    more = "--train.max_minutes=0.000001"
    result = train(recipe(dataset, tiny_smolvla, tmp_path / "r", objective, more), progress=False)
    assert result.steps == 1 and result.final["drift_robot"] > 0


@pytest.mark.parametrize(("words", "objective"), [
    ("unknown option 'ruel'", "method: aegis, ruel: 1"), ("method 'aegs'", "method: aegs"),
    ("needs a question folder", "method: replay"), ("granularity is 'row'", "method: random, granularity: row"),
    ("nothing to build the anchor from", "method: aegis"), ("share is 2", "method: self_anchor, share: 2"),
    ("needs adapters", "method: lora"), ("unknown option 'directions'", "method: random, directions: 2"),
    ("no anchor at", "method: aegis, anchor: none.safetensors"),
    ("protect is self and distance w2; expected distance tokens", "method: aegis, protect: self"),
])  # fmt: skip
def test_mistakes_are_one_clear_line(dataset, tiny_smolvla, tmp_path, words, objective):
    with pytest.raises(BurnishError, match=words):
        loop.Run(recipe(dataset, tiny_smolvla, tmp_path / "r", objective), progress=False)


def test_frozen_backbone_has_nothing_to_edit(dataset, tiny_smolvla, tmp_path):
    with pytest.raises(BurnishError, match="nothing to protect"):
        loop.Run(recipe(dataset, tiny_smolvla, tmp_path / "r", "method: self_anchor", "--train.freeze=[vlm]"))


def test_auto_is_the_same_with_questions_and_without():
    from burnish.methods.isolate.options import AUTO

    name, options = resolve("auto", {})
    assert name == AUTO and not options.asks
