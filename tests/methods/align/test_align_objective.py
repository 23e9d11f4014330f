"""The objective in the loop: weight 0, resuming, what is exported, strength, wrong options."""

import json

import fake
import pytest
import torch
from align_student import load_student, recipe

from burnish.core.errors import BurnishError
from burnish.train.loop import Run, train

TEACHER = "teacher: 'edges:Edges'"
ALIGN = f"{{name: align, {TEACHER}}}"


@pytest.fixture(autouse=True)
def tiny(monkeypatch, edges):
    import burnish.policies

    monkeypatch.setattr(burnish.policies, "load_policy", load_student)


def run(dataset, output, *objectives, more=()):
    return Run(recipe(dataset, output, *objectives, more=more), progress=False)


def rows_of(result):
    return [json.loads(line) for line in result.metrics.read_text().splitlines()]


def test_weight_zero_is_plain_fine_tuning_bit_for_bit_and_needs_no_teacher(dataset, tmp_path):
    plain = train(recipe(dataset, tmp_path / "plain"), progress=False)
    off = train(recipe(dataset, tmp_path / "off", "{name: align, weight: 0, teacher: nonsense}"), progress=False)
    fake.assert_same_weights(plain.policy, off.policy)
    assert fake.figures(plain.metrics) == fake.figures(off.metrics)


def test_aligned_run_learns_the_teacher_keeps_its_projector_and_exports_none(dataset, tmp_path):
    from safetensors.torch import load_file

    more = ["--train.steps=60", "--train.save_every=30", "--train.lr=0.02"]
    result = train(
        recipe(dataset, tmp_path / "a", f"{{name: align, {TEACHER}, weight: 5.0}}", more=more), progress=False
    )
    rows = rows_of(result)
    assert rows[-1]["align_1_1"] < rows[0]["align_1_1"] - 0.1
    exported = load_file(result.policy / "model.safetensors")
    assert not any("align" in name or "projector" in name for name in exported)
    kept = load_file(tmp_path / "a/checkpoints/last/burnish/objectives.safetensors")
    assert any(name.startswith("align.aligner.projectors") for name in kept)


def test_a_run_begun_under_the_old_name_of_an_option_goes_on_under_the_new_one(dataset, tmp_path):
    old, new = (f"{{name: align, {TEACHER}, {n}: 0.5, measure_every: 3}}" for n in ("match", "gradient_norm_ratio"))
    whole = train(recipe(dataset, tmp_path / "whole", new), progress=False)
    begun = train(recipe(dataset, tmp_path / "begun", old), progress=False)
    stored = tmp_path / "begun/train.json"
    facts = json.loads(stored.read_text())
    (entry,) = facts["recipe"]["objectives"]
    entry["match"] = entry.pop("gradient_norm_ratio")
    stored.write_text(json.dumps(facts))
    fake.assert_same_weights(whole.policy, begun.policy)
    assert train(recipe(dataset, tmp_path / "begun", new), progress=False).final == begun.final


def test_one_pair_without_projector_cut_is_the_loss_by_hand(dataset, tmp_path):
    """What the objective adds equals weight times 1 - cosine of projected student tokens and standardised features."""
    training = run(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, pairs: [[1, 1]], weight: 0.5, norm: false}}")
    align, data, policy = training.objectives["align"], training.data, training.policy
    batch = data.finish(data.raw(3), 3)
    with align.watch(training) as _:
        out = policy.loss(batch, policy.draw(5, torch.Generator().manual_seed(0)))
    states = align.captured.hidden[1][:, :4].detach()
    (term,) = align.loss(training, batch, out).values()
    member = align.aligner.projectors.members[0][0]
    projected = torch.nn.functional.gelu(states @ member.fc1.weight.T + member.fc1.bias) @ member.fc2.weight.T
    target = align.targets(batch)[1].flatten(1, 3)
    cosine = torch.cosine_similarity(projected + member.fc2.bias, target, dim=-1)
    assert term.item() == pytest.approx(0.5 * (1 - cosine.mean().item()), abs=1e-5)


def test_duplicated_pairs_change_nothing_when_one_projector_is_shared(dataset, tmp_path):
    terms = []
    for pairs in ("[[1, 1]]", "[[1, 1], [1, 1], [1, 1]]"):
        objective = f"{{name: align, {TEACHER}, pairs: {pairs}, nested: false}}"
        training = run(dataset, tmp_path / "x", objective)
        align, policy = training.objectives["align"], training.policy
        batch = training.data.finish(training.data.raw(0), 0)
        with align.watch(training):
            out = policy.loss(batch, policy.draw(5, torch.Generator().manual_seed(0)))
        (term,) = align.loss(training, batch, out).values()
        grad = torch.autograd.grad(term, policy.embed.weight, retain_graph=True)[0]
        terms.append((term.item(), grad))
    assert terms[0][0] == pytest.approx(terms[1][0], abs=1e-6)
    torch.testing.assert_close(terms[0][1], terms[1][1], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("sharing", ["shared", "independent"])
def test_matched_strength_pushes_every_arm_equally_hard(dataset, tmp_path, sharing):
    """After matching, what really arrives at the shallowest image tokens is the wished share of the task's."""
    options = f"gradient_norm_ratio: 0.5, measure_every: 1, sharing: {sharing}, pairs: [[1, 0], [2, 1]]"
    objective = f"{{name: align, {TEACHER}, {options}}}"
    training = run(dataset, tmp_path / sharing, objective)
    align, policy = training.objectives["align"], training.policy
    batch = training.data.finish(training.data.raw(0), 0)
    for _ in range(2):  # the first measurement sets lambda, the second loss uses it
        with align.watch(training):
            out = policy.loss(batch, policy.draw(5, torch.Generator().manual_seed(0)))
        hidden = align.captured.hidden[0]
        (term,) = align.loss(training, batch, out).values()
    pushed = torch.autograd.grad(term, hidden, retain_graph=True)[0][:, :4].norm()  # the last row is text
    task = torch.autograd.grad(out.total, hidden)[0][:, :4].norm()
    assert pushed.item() == pytest.approx(0.5 * task.item(), rel=1e-3)
    # The projectors' own gradient is not scaled: clipping by the norm of all gradients must not starve the task.
    assert term.item() < 2.1


def test_schedule_of_lambda(dataset, tmp_path):
    more = ["--train.steps=10", "--train.log_every=1"]
    objective = f"{{name: align, {TEACHER}, warmup_steps: 4, decay: true, stop_after: 0.8, measure_every: 0}}"
    result = train(recipe(dataset, tmp_path / "s", objective, more=more), progress=False)
    rows = rows_of(result)
    assert [row.get("loss_align") is None for row in rows] == [False] * 8 + [True] * 2
    mean = [(row["align_0_0"] + row["align_1_1"]) / 2 for row in rows[:8]]
    from math import cos, pi

    for step, (row, m) in enumerate(zip(rows[:8], mean, strict=True)):
        factor = min(1, (step + 1) / 4) * 0.5 * (1 + cos(pi * step / 8))
        assert row["loss_align"] == pytest.approx(0.5 * factor * m, rel=1e-4)


def test_measurements_of_the_gradients_are_logged(dataset, tmp_path):
    more = ["--train.log_every=1", "--train.steps=2"]
    measured = f"{{name: align, {TEACHER}, measure_every: 1}}"
    result = train(recipe(dataset, tmp_path / "m", measured, more=more), progress=False)
    row = rows_of(result)[0]
    assert 0 < row["align_coherence_0"] <= 1 and row["align_coherence_1"] == pytest.approx(1)
    assert -1 <= row["align_task_cosine_0"] <= 1 and row["align_push_0"] > 0 and row["align_task_push_0"] > 0
    assert -1 <= row["align_cosine_0_0_vs_1_1"] <= 1 and row["align_projector_similarity"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("preset: best", "preset is 'best'.*default, spatial_forcing, paper, released_code"),
        ("lambda: 1", "unknown option 'lambda'.*teacher.*weight"),
        ("sharing: both", "sharing is 'both'.*shared, trunk, independent, same_start"),
        ("weight: -1", "weight is -1.*at least 0"),
        ("nested_low: 0.0", "nested_low is 0.0.*above 0 and at most 1"),
        ("nested_low: 0.5, nested_high: 0.4", "0 < low <= high <= 1"),
        ("stop_after: 1.5", "stop_after is 1.5.*above 0 and at most 1"),
        ("late_tokens: -1", "late_tokens is -1.*at least 0"),
        ("select: best", "select is 'best'"),
        (f"{TEACHER}, pairs: [[3, 0]]", "student layer 3.*0 to 2"),
        (f"{TEACHER}, pairs: [[0, 2]]", "teacher layer 2.*0 to 1"),
        (f"{TEACHER}, pair_weights: [1, 2, 3]", r"pair_weights \[1, 2, 3\].*2 numbers"),
        ("teacher: {name: folder, path: nowhere}", "no vision model in nowhere"),
        ("teacher: geometry", "nothing tells where things were"),
    ],
)
def test_wrong_options_are_one_clear_line(dataset, tmp_path, options, words):
    with pytest.raises(BurnishError, match=words) as error:
        run(dataset, tmp_path / "x", f"{{name: align, {options}}}")
    assert "\n" not in str(error.value)


def test_cache_of_another_data_set_is_refused(dataset, tmp_path):
    other = fake.make_dataset(tmp_path / "other", episodes=2, seed=3)
    cache = f"cache: '{tmp_path / 'cache'}'"
    run(other, tmp_path / "x", f"{{name: align, {TEACHER}, {cache}}}")
    with pytest.raises(BurnishError, match="features of another data set"):
        run(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, {cache}}}")


def test_teacher_of_other_width_under_one_shared_projector(dataset, tmp_path, monkeypatch):
    import edges

    monkeypatch.setattr(edges.Edges, "widths", (12, 5))
    original = edges.Edges.features
    monkeypatch.setattr(
        edges.Edges, "features",
        lambda self, views, layers: {k: f[..., : (12, 5)[k]] for k, f in original(self, views, layers).items()},
    )  # fmt: skip
    with pytest.raises(BurnishError, match=r"widths \[12, 5\] under one shared projector.*sharing: trunk"):
        run(dataset, tmp_path / "x", f"{{name: align, {TEACHER}, cache: '{tmp_path / 'c'}'}}")
    run(dataset, tmp_path / "y", f"{{name: align, {TEACHER}, sharing: trunk, cache: '{tmp_path / 'c'}'}}")


def test_teacher_of_another_grid_is_pooled_and_no_tokens_are_told(dataset, tmp_path):
    training = run(dataset, tmp_path / "x", "{name: align, teacher: {name: 'edges:Edges', grid: [6, 6]}}")
    assert training.objectives["align"].targets.cache.arrays[0].shape[1:] == (1, 2, 2, 12)
    align = training.objectives["align"]
    with align.watch(training):
        batch = training.data.finish(training.data.raw(0), 0)
        out = training.policy.loss(batch, training.policy.draw(5, torch.Generator().manual_seed(0)))
    align.captured.cameras["front"] = slice(0, 3)
    with pytest.raises(BurnishError, match="3 student tokens but 4 of the teacher"):
        align.loss(training, batch, out)


def test_frozen_backbone_is_told(dataset, tmp_path):
    more = ["--train.train_only=[head]"]
    with pytest.raises(BurnishError, match="backbone is frozen.*try: --train.train_only='\\[\\]'$"):
        train(recipe(dataset, tmp_path / "x", ALIGN, more=more), progress=False)
    more += ["--train.train_only=[]"]
    assert train(recipe(dataset, tmp_path / "x", ALIGN, more=more), progress=False)


def test_presets_are_what_their_names_say(dataset, tmp_path):
    def align(preset):
        return run(dataset, tmp_path / preset, f"{{name: align, preset: {preset}, {TEACHER}}}").objectives["align"]

    single, paper, released, ours = (align(p) for p in ("spatial_forcing", "paper", "released_code", "default"))
    assert single.aligner.pairs == [(1, 1)] and single.aligner.projectors.widths == [16]
    assert single.config.positional == 0.1 and single.config.pooling == "bilinear"
    assert paper.aligner.pairs == [(2, 1)] and paper.config.positional == 0.1 and paper.config.pooling == "bilinear"
    assert isinstance(paper.aligner.projectors.members[0][0].norm, torch.nn.Identity)
    assert released.aligner.pairs == [(1, 1)] and released.aligner.late_tokens == 1
    assert released.aligner.projectors.widths == [3]  # a fifth of 16, rounded down: one pair by the code's formula
    assert ours.aligner.pairs == [(0, 0), (1, 1)] and ours.aligner.projectors.widths == [4, 16]
