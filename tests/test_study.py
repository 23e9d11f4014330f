"""A study in miniature: two arms, two seeds, two evaluations, one table."""

import json

import pytest
import yaml

import burnish.experiments.study
from burnish.core.errors import BurnishError
from burnish.experiments.results import check_result, render_table
from burnish.experiments.study import QUESTIONS, load_study, main, run_study
from burnish.policies.tiny import make_tiny


def write(root, **changes):
    recipe = {
        "name": "tiny/base", "demos": {"env": "tabletop:lift", "episodes": 3, "image_size": 32, "workers": 1},
        "policy": {"path": str(root / "base")}, "train": {"steps": 2, "batch_size": 2, "log_every": 1},
        "eval": {"episodes": 2, "max_steps": 4, "workers": 1,
                 "questions": {"root": str(root / "questions"), "scenes": 2, "per_scene": 3}},
    }  # fmt: skip
    study = {
        "name": "tiny/core", "recipe": "recipe.yaml", "seeds": [0, 1], "reference": "plain",
        "arms": {"plain": {}, "faster": {"train": {"lr": 1.0e-3}}},
        "evals": {"swap": {"instruction_swap": True}},
    } | changes  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return root / "study.yaml"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    make_tiny("smolvla", root / "base", cameras=("front",), state_dim=4, action_dim=4, image_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        study, base = load_study(write(root))
        run_study(study, base, command="burnish study study.yaml", result=root / "core.json")
    return root, study, base


def test_table_has_a_row_for_each_arm_and_evaluation(ran):
    result = json.loads((ran[0] / "core.json").read_text())
    check_result(result, "core.json")
    rows = {(row["label"], row["eval"]): row for row in result["rows"]}
    assert set(rows) == {(arm, e) for arm in ("plain", "faster") for e in ("main", "swap", QUESTIONS)} | {
        ("base", QUESTIONS)
    }
    assert rows["plain", "main"]["n"] == 4 and rows["plain", QUESTIONS]["n"] == 12
    assert rows["base", QUESTIONS]["n"] == 6 and len(rows["plain", QUESTIONS]["minus_base"]) == 3
    assert result["metrics"]["base"]["answer_loss"] > 0
    assert "minus_reference" not in rows["plain", "main"] and len(rows["faster", "main"]["minus_reference"]) == 3
    assert result["metrics"]["runs"]["faster-1"]["answer_loss"] > 0
    assert "+0.0 [-65.8, +65.8]" in render_table(["core"], ran[0])


def test_arms_share_data_and_differ_in_what_they_say(ran):
    runs = ran[0] / "runs/tiny/core"
    recipes = {run.name: yaml.safe_load((run / "recipe.yaml").read_text()) for run in runs.glob("*-?")}
    assert {r["data"]["root"] for r in recipes.values()} == {"data/tiny/base"}
    assert recipes["faster-1"]["train"]["lr"] == 1e-3 and recipes["plain-1"]["train"]["lr"] != 1e-3
    assert recipes["plain-0"]["train"]["seed"] == 0 and recipes["plain-1"]["train"]["seed"] == 1


def test_a_second_call_repeats_nothing(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    files = sorted((root / "runs").rglob("*.safetensors")) + sorted((root / "runs").rglob("episodes.jsonl"))
    before = [file.stat().st_mtime_ns for file in files]
    run_study(study, base, command="burnish study study.yaml", result=root / "core.json")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_questions_are_asked_again_when_they_are_others(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    file = root / "runs/tiny/core/plain-0/retention.json"
    run = burnish.experiments.study._Run("plain", 0, burnish.experiments.study.arm_recipe(study, base, "plain", 0))
    settings = run.recipe.eval
    before = file.stat().st_mtime_ns
    burnish.experiments.study._ask(run.folder / "policy", settings, run.folder)
    assert file.stat().st_mtime_ns == before and len(json.loads(file.read_text())["tuned"]["correct"]) == 6
    settings.questions.limit = 4
    burnish.experiments.study._ask(run.folder / "policy", settings, run.folder)
    assert len(json.loads(file.read_text())["tuned"]["correct"]) == 4
    settings.questions.limit = 0
    burnish.experiments.study._ask(run.folder / "policy", settings, run.folder)


def test_a_mistake_in_the_last_arm_shows_first(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    monkeypatch.setattr(study, "name", "tiny/typo")
    monkeypatch.setattr(study, "arms", {"plain": {}, "typo": {"objectives": [{"name": "alignn"}]}})
    with pytest.raises(BurnishError, match="alignn"):
        run_study(study, base)
    assert not list((root / "runs/tiny/typo").glob("plain-*"))


def test_preparing_commands_run_once_and_stop_the_study_when_they_fail(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    monkeypatch.setattr(study, "arms", {"plain": {}})
    monkeypatch.setattr(study, "name", "tiny/before")
    monkeypatch.setattr(
        study, "before", ["demos --env tabletop:reach --episodes 1 --image-size 32 --root {out}/made-{seed}"]
    )
    monkeypatch.setattr(study, "seeds", [3])
    run_study(study, base)
    made = root / "runs/tiny/before/made-3/meta/info.json"
    stamp = made.stat().st_mtime_ns
    run_study(study, base)
    assert made.stat().st_mtime_ns == stamp
    monkeypatch.setattr(study, "before", ["demos --env nowhere --episodes 1 --root {out}/x"])
    with pytest.raises(BurnishError, match="preparing command failed"):
        run_study(study, base)


def test_arms_with_a_policy_of_their_own_do_without_the_base(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    own = {"policy": {"path": str(root / "base")}, "eval": {"questions": {"root": ""}}}
    monkeypatch.setattr(study, "arms", {"plain": own})
    monkeypatch.setattr(study, "name", "tiny/own")
    monkeypatch.setattr(base.policy, "path", "runs/not/there")
    measured, plain = [], burnish.experiments.study._train_and_measure

    def measure(study, run):
        measured.append(run.recipe.policy.path)
        plain(study, run)

    monkeypatch.setattr("burnish.experiments.study._train_and_measure", measure)
    run_study(study, base, result=root / "own.json")
    assert measured == [str(root / "base")] * 2
    rows = json.loads((root / "own.json").read_text())["rows"]
    assert [(row["label"], row["eval"]) for row in rows] == [("plain", "main"), ("plain", "swap")]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reference": "nobody"}, "reference 'nobody' is no arm"),
        ({"arms": {}}, "'arms' is empty"),
        ({"evals": {"main": {}}}, "called 'main'"),
        ({"sedes": [1]}, "unknown key 'sedes'"),
    ],
)
def test_wrong_studies_are_refused(tmp_path, changes, message):
    with pytest.raises(BurnishError, match=message):
        load_study(write(tmp_path, **changes))


@pytest.mark.parametrize("arms", [{"a": {"train": {"stepz": 1}}}, {"a": {"train": {"steps": 0}}}])
def test_wrong_arm_is_found_before_anything_is_trained(tmp_path, monkeypatch, arms):
    monkeypatch.chdir(tmp_path)
    study, base = load_study(write(tmp_path, arms=arms, reference="a"))
    monkeypatch.setattr("burnish.experiments.pipeline.make_data", lambda *_: None)
    with pytest.raises(BurnishError, match="step"):
        run_study(study, base)
    assert not list((tmp_path / "runs").rglob("policy"))


def test_arms_option_keeps_the_reference(tmp_path, monkeypatch):
    from argparse import Namespace

    path = write(tmp_path)
    with pytest.raises(BurnishError, match="some of plain, faster, with plain"):
        main(Namespace(study=str(path), overrides=[], arms="faster", seeds="", result=""))
