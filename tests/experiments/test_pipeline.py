"""A whole recipe in miniature: demonstrations, training, measurement, report, result; and the same once more."""

import json

import pytest
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe
from burnish.experiments import pipeline
from burnish.experiments.pipeline import Outcome, Stages, _base, _measure, _write_result, run_facts, run_recipe
from burnish.experiments.plan import _evaluations
from burnish.policies import load_policy
from workshop.tiny import make_tiny


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    base = root / "base"
    make_tiny("smolvla", base, cameras=("front",), state_dim=4, action_dim=4, image_size=32)
    recipe = load_recipe(
        None,
        [
            "--name=tiny/lift", f"--output={root / 'run'}", "--demos.env=tabletop:lift", "--demos.episodes=3",
            "--demos.image_size=32", "--demos.workers=1", f"--policy.path={base}", "--train.steps=2",
            "--train.batch_size=2", "--eval.episodes=2", "--eval.max_steps=4", "--eval.workers=1",
            "--eval.random_object_expert=true", f"--eval.questions.root={root / 'questions'}",
            "--eval.questions.scenes=2", "--eval.questions.per_scene=3",
        ],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        first = run_recipe(recipe, command="burnish run tiny.yaml", result=root / "result.json")
        written = [root / "run" / name for name in ("train.json", "retention.json")]
        before = [file.stat().st_mtime_ns for file in written]
        second = run_recipe(recipe, command="burnish run tiny.yaml")
        repeated = [file.stat().st_mtime_ns for file in written] != before
    return root, first, second, repeated


def test_every_stage_leaves_its_file(ran):
    root, first, _, _ = ran
    assert set(first.evaluations) == {"tuned", "base", "swap", "expert_random_object"}
    assert all(e.overall.n == 2 for e in first.evaluations.values())
    assert first.report.is_file() and "<html" in first.report.read_text()[:200].lower()
    assert (root / "data/tiny/lift/meta/info.json").is_file()
    info = json.loads((root / "run/run.json").read_text())
    assert {"demonstrations", "training", "report"} <= {s["name"] for s in info["stages"]}
    assert info["commands"] == ["burnish run tiny.yaml"] and info["versions"]["lerobot"]


def test_retention_is_measured_before_and_after(ran):
    root, first, _, _ = ran
    content = json.loads((root / "run/retention.json").read_text())
    assert first.retention["base"].n == first.retention["tuned"].n == 6
    assert content["comparison"]["n"] == 6


def test_result_file_is_one_that_tables_are_made_of(ran):
    from burnish.experiments.results import check_result

    root = ran[0]
    result = json.loads((root / "result.json").read_text())
    check_result(result, "result.json")
    assert result["recipe"] == "recipes/tiny/lift.yaml"
    assert {row["label"] for row in result["rows"]} >= {"fine-tuned", "base, not tuned"}


def test_a_result_is_written_without_a_command(ran):
    root, first, _, _ = ran
    recipe = load_recipe(str(root / "run/recipe.yaml"))
    stages = Stages(root / "other.json", run_facts(recipe.name, "", {}))
    _write_result(recipe, stages, first, root / "other_result.json")
    assert json.loads((root / "other_result.json").read_text())["command"] == ""


def test_a_finished_run_is_not_repeated(ran):
    _, first, second, repeated = ran
    assert not repeated and second.retention == first.retention
    assert [r.to_line() for r in second.evaluations["tuned"].records] == [
        r.to_line() for r in first.evaluations["tuned"].records
    ]
    assert second.evaluations["tuned"].new_episodes == 0


def test_a_refused_run_changes_no_record(ran):
    root = ran[0]
    files = [root / "run/recipe.yaml", root / "run/run.json"]
    before = [file.read_bytes() for file in files]
    recipe = load_recipe(str(files[0]), [f"--output={root / 'run'}", "--train.steps=3"])
    with pytest.raises(BurnishError, match="--fresh"):
        run_recipe(recipe, command="another")
    recipe = load_recipe(str(files[0]), [f"--output={root / 'new'}", "--objectives=[{name: alignn}]"])
    with pytest.raises(BurnishError, match="alignn"):
        run_recipe(recipe)
    assert [file.read_bytes() for file in files] == before and not (root / "new").exists()


def test_the_base_is_measured_as_the_run_is_or_not_at_all(ran, tmp_path, caplog):
    root = ran[0]
    recipe = load_recipe(str(root / "run/recipe.yaml"), ["--policy.overrides.n_action_steps=2"])
    base = _base(recipe, root / "run/policy")
    assert base.n_action_steps == 2 != load_policy(root / "base").n_action_steps
    other = tmp_path / "other"
    make_tiny("smolvla", other, cameras=("front",), state_dim=4, action_dim=7, image_size=32)
    recipe.policy.path = str(other)
    recipe.policy.overrides = {}
    assert _base(recipe, root / "run/policy") is None and "actions 7" in caplog.text
    for file in other.glob("*processor*.safetensors"):  # as a base of the hub, trained on nobody's robot
        save_file({f"so100.buffer.{key}": value for key, value in load_file(file).items()}, file)
    assert _base(recipe, root / "run/policy") is None and "not measured: " in caplog.records[-1].getMessage()
    assert "statistic" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(("env", "swaps"), [("tabletop:lift", True), ("weave:plate", False)])
def test_no_instruction_swap_where_the_environment_offers_none(env, swaps, tmp_path, monkeypatch, caplog):
    """It ended the run after its training."""
    monkeypatch.setattr(pipeline, "evaluate_as", lambda *given, **changes: "measured")
    recipe, outcome = load_recipe(None, ["--name=x", f"--eval.env={env}"]), Outcome(tmp_path)
    _measure(recipe, Stages(tmp_path / "run.json", {}), outcome)
    assert [*outcome.evaluations] == ["tuned", "swap"][: 1 + swaps]
    assert (f"no instruction swap is measured: {env} offers none" in caplog.messages) != swaps
    assert ("told another object" in next(_evaluations(recipe))) == swaps


def test_minutes_of_a_continued_run_add_up(tmp_path):
    for _ in range(2):
        stages = Stages(tmp_path / "run.json", {"name": "x"})
        with stages.stage("training"):
            pass
        stages.content["stages"][0]["minutes"] += 1
        stages.write()
    assert stages.minutes == pytest.approx(2, abs=0.01)


def test_a_recipe_without_data_is_refused(tmp_path):
    with pytest.raises(BurnishError, match="neither demos.env nor data.root"):
        run_recipe(load_recipe(None, ["--name=nothing", f"--output={tmp_path / 'run'}"]))
    assert not list(tmp_path.iterdir())


def test_named_data_are_made_where_they_are_absent_and_left_alone_where_not(tmp_path, monkeypatch):
    from burnish.experiments.pipeline import make_data

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        None,
        [
            "--name=another", "--demos.env=tabletop:lift", "--demos.episodes=1", "--demos.image_size=32",
            "--demos.workers=1", "--data.root=shared/lift",
        ],
    )  # fmt: skip
    stages = Stages(tmp_path / "run.json", {})
    make_data(recipe, stages)
    info = tmp_path / "shared/lift/meta/info.json"
    assert json.loads(info.read_text())["total_episodes"] == 1
    before = info.stat().st_mtime_ns
    recipe.demos.episodes = 2
    make_data(recipe, stages)
    assert info.stat().st_mtime_ns == before and not (tmp_path / "data").exists()
