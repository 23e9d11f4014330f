"""A study in miniature: two variants, two seeds, two evaluations, one table."""

import json
import os
import signal
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from threading import Thread

import pytest
import yaml

import burnish.experiments.study
from burnish.cli.run import run_setup
from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.experiments.recompute import differing, renew
from burnish.experiments.results import check_result, render_table
from burnish.experiments.study import choose, load_study, run_study
from burnish.experiments.variants import QUESTIONS
from workshop.tiny import make_tiny


def write(root, **changes):
    recipe = {
        "name": "tiny/base", "demos": {"env": "tabletop:lift", "episodes": 3, "image_size": 32, "workers": 1},
        "policy": {"path": str(root / "base")}, "train": {"steps": 2, "batch_size": 2, "log_every": 1},
        "eval": {"episodes": 2, "max_steps": 4, "workers": 1,
                 "questions": {"root": str(root / "questions"), "scenes": 2, "per_scene": 3}},
    }  # fmt: skip
    study = {
        "name": "tiny/core", "recipe": "recipe.yaml", "seeds": [0, 1], "reference": "plain",
        "variants": {"plain": {}, "faster": {"train": {"lr": 1.0e-3}}},
        "evals": {"swap": {"instruction_swap": True}}, "stopping": 2, "margin": 0.1,
        "measures": {"mixed": "policy profile {run}/policy --json {file}"}, "lower": ["answer_loss", "mixed"],
        "gates": [{"name": "plain mixes", "measure": "mixed", "check": "plain >= 0.4"},
                  {"name": "it was trained", "measure": "loss", "check": "faster - plain <= 9"}],
    } | changes  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return root / "study.yaml"


def write_measure(line):
    """Stands for a command that measures a policy: flags for `mixed`."""
    run, file = Path(line.split()[2]).parent, Path(line.split()[-1])
    assert (run / "policy/config.json").is_file()
    file.write_text(json.dumps({"values": [True, "plain" in run.name, False]}))
    return 0


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    make_tiny("smolvla", root / "base", cameras=("front",), state_dim=4, action_dim=4, image_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        study, base = load_study(write(root))
        run_study(study, base, command="burnish run study.yaml", result=root / "core.json", run_setup=write_measure)
    return root, study, base


def test_table_has_a_row_for_each_variant_and_evaluation(ran):
    result = json.loads((ran[0] / "core.json").read_text())
    check_result(result, "core.json")
    rows = {(row["label"], row["eval"]): row for row in result["rows"]}
    measured = ("main", "swap", QUESTIONS, "answer_loss", "mixed", "loss")
    assert set(rows) == {(name, e) for name in ("plain", "faster") for e in measured} | {
        ("base", QUESTIONS), ("base", "answer_loss"),
    }  # fmt: skip
    assert rows["plain", "main"]["n"] == 4 and rows["plain", QUESTIONS]["n"] == 12
    assert rows["base", QUESTIONS]["n"] == 6 and len(rows["plain", QUESTIONS]["minus_base"]) == 3
    assert result["metrics"]["base"]["answer_loss"] > 0
    assert "minus_reference" not in rows["plain", "main"] and len(rows["faster", "main"]["minus_reference"]) == 3
    assert result["metrics"]["runs"]["faster-1"]["answer_loss"] > 0
    assert "+0.0 [-65.8, +65.8]" in render_table(["core"], ran[0])


def test_gates_stand_in_the_result_and_its_figures_follow_from_outcomes(ran):
    result = json.loads((ran[0] / "core.json").read_text())
    rows = {(row["label"], row["eval"]): row for row in result["rows"]}
    loss, run = rows["plain", "answer_loss"], json.loads((ran[0] / "runs/tiny/core/plain-0/retention.json").read_text())
    assert (
        loss["by_seed"][0] == pytest.approx(run["tuned"]["loss"], rel=1e-3) and len(loss["outcomes"]["0"].split()) == 6
    )
    assert rows["plain", "mixed"]["rate"] == 2 / 3 and rows["faster", "mixed"]["outcomes"] == {"0": "100", "1": "100"}
    assert [gate["passed"] for gate in result["gates"]] == [True, True] and result["gates"][0]["value"] == 2 / 3
    assert result["declared"]["stopping"] == 2 and result["declared"]["margin"] == 0.1
    assert rows["faster", "mixed"]["verdict"] == "undecided" and rows["faster", "main"]["p"] == 1
    assert all(run["commit"] is not None and run["date"] for run in result["metrics"]["runs"].values())
    assert not differing(result, renew(result))


def test_variants_share_data_and_differ_in_what_they_say(ran):
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
    run_study(study, base, command="burnish run study.yaml", result=root / "core.json")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_questions_are_asked_again_when_they_are_others(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    file = root / "runs/tiny/core/plain-0/retention.json"
    run = burnish.experiments.study._Run("plain", 0, burnish.experiments.study.variant_recipe(study, base, "plain", 0))
    settings = run.recipe.eval
    before = file.stat().st_mtime_ns
    burnish.experiments.study._ask(run.folder / "policy", settings, run.folder)
    assert file.stat().st_mtime_ns == before and len(json.loads(file.read_text())["tuned"]["correct"]) == 6
    settings.questions.limit = 4
    burnish.experiments.study._ask(run.folder / "policy", settings, run.folder)
    assert len(json.loads(file.read_text())["tuned"]["correct"]) == 4
    settings.questions.limit = 0
    burnish.experiments.study._ask(run.folder / "policy", settings, run.folder)


def test_a_mistake_in_the_last_variant_shows_first(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    monkeypatch.setattr(study, "name", "tiny/typo")
    monkeypatch.setattr(study, "variants", {"plain": {}, "typo": {"objectives": [{"name": "alignn"}]}})
    with pytest.raises(BurnishError, match="alignn"):
        run_study(study, base)
    assert not list((root / "runs/tiny/typo").glob("plain-*"))


def test_setup_commands_run_once_and_stop_the_study_when_they_fail(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    monkeypatch.setattr(study, "variants", {"plain": {}})
    monkeypatch.setattr(study, "name", "tiny/setup")
    monkeypatch.setattr(study, "measures", {})
    monkeypatch.setattr(study, "setup", ["data demos tabletop:reach 1 {out}/made-{seed} --image-size 32"])
    monkeypatch.setattr(study, "seeds", [3])
    monkeypatch.setattr(study, "evals", {})
    monkeypatch.setattr("burnish.experiments.study.finish_runs", lambda *_: iter(()))  # which come after them
    run_study(study, base, run_setup=run_setup)
    made = root / "runs/tiny/setup/made-3/meta/info.json"
    stamp = made.stat().st_mtime_ns
    run_study(study, base, run_setup=run_setup)
    assert made.stat().st_mtime_ns == stamp
    monkeypatch.setattr(study, "setup", ["data demos nowhere 1 {out}/x"])
    with pytest.raises(BurnishError, match="setup command failed"):
        run_study(study, base, run_setup=run_setup)
    with pytest.raises(BurnishError, match="nothing runs the setup command"):
        run_study(study, base)


def test_minutes_that_another_process_has_noted_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny("smolvla", tmp_path / "base", cameras=("front",), state_dim=4, action_dim=4, image_size=32)
    study, base = load_study(write(tmp_path, setup=["data demos {out}"]))
    base.eval.questions.root = ""
    noted = {"stages": [{"name": "elsewhere", "minutes": 5.0}]}

    def alone(folder):  # waits for a process that notes its minutes
        for name in ("data", "setup-0", "setup-1"):
            if not (folder / f"{name}.json").exists():
                write_json(folder / f"{name}.json", noted)
        return nullcontext()

    monkeypatch.setattr(burnish.experiments.study, "alone", alone)
    monkeypatch.setattr(burnish.experiments.study, "finish_runs", lambda *_: iter(()))
    monkeypatch.setattr("burnish.data.demos.make_demos", lambda *_, **__: "demonstrations")
    folder = run_study(study, base, run_setup=lambda line: 0)
    for name in ("data", "setup-0", "setup-1"):
        stages = json.loads((folder / f"{name}.json").read_text())["stages"]
        assert len(stages) == 2 and stages[0] == noted["stages"][0]


def test_a_setup_command_ends_with_the_study_that_is_told_to_end():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()

    def stop():
        while True:
            with socket.socket() as client:
                if client.connect_ex(address) == 0:
                    return os.kill(os.getpid(), signal.SIGTERM)  # as a batch system does
            time.sleep(0.02)

    Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_setup(f"python -m http.server {address[1]} --bind 127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 1)


def test_variants_with_a_policy_of_their_own_do_without_the_base(ran, monkeypatch):
    root, study, base = ran
    monkeypatch.chdir(root)
    own = {"policy": {"path": str(root / "base")}, "eval": {"questions": {"root": ""}}}
    monkeypatch.setattr(study, "variants", {"plain": own})
    monkeypatch.setattr(study, "name", "tiny/own")
    monkeypatch.setattr(study, "seeds", [0])
    monkeypatch.setattr(base.policy, "path", "runs/not/there")
    measured, plain = [], burnish.experiments.study._train_and_measure

    def measure(study, run):
        measured.append(run.recipe.policy.path)
        plain(study, run)

    monkeypatch.setattr("burnish.experiments.study._train_and_measure", measure)
    run_study(study, base, result=root / "own.json", run_setup=write_measure)
    assert measured == [str(root / "base")]
    rows = json.loads((root / "own.json").read_text())["rows"]
    assert [(row["label"], row["eval"]) for row in rows] == [
        ("plain", "main"), ("plain", "swap"), ("plain", "mixed"), ("plain", "loss")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reference": "nobody"}, "reference 'nobody' is no variant"),
        ({"variants": {}}, "'variants' is empty"),
        ({"evals": {"main": {}}}, "called 'main'"),
        ({"sedes": [1]}, "unknown key 'sedes'"),
        ({"stopping": 3}, "stopping says 3 seeds, seeds lists 2"),
        ({"gates": [{"check": "nobody >= 1"}]}, "gate 1 names 'nobody'"),
        ({"measures": {"swap": "policy profile {run} {file}"}}, "a measure is called 'swap'"),
        ({"measures": {"mixed": "policy profile {run}"}}, "a command with {run} and {file}"),
        ({"margin": 0.0}, "margin is 0.0"),
    ],
)
def test_wrong_studies_are_refused(tmp_path, changes, message):
    with pytest.raises(BurnishError, match=message):
        load_study(write(tmp_path, **changes))


@pytest.mark.parametrize("variants", [{"a": {"train": {"stepz": 1}}}, {"a": {"train": {"steps": 0}}}])
def test_wrong_variant_is_found_before_anything_is_trained(tmp_path, monkeypatch, variants):
    monkeypatch.chdir(tmp_path)
    study, base = load_study(write(tmp_path, variants=variants, reference="a", gates=[]))
    monkeypatch.setattr("burnish.experiments.study.make_data", lambda *_: None)
    with pytest.raises(BurnishError, match="step"):
        run_study(study, base)
    assert not list((tmp_path / "runs").rglob("policy"))


def test_a_choice_keeps_the_reference(tmp_path):
    study, _ = load_study(write(tmp_path))
    with pytest.raises(BurnishError, match="some of plain, faster, with plain"):
        choose(study, "faster")
    for seeds in ("0,one", "0,0", "3,4"):  # others than the declared ones would pass for them
        with pytest.raises(BurnishError, match="some of 0, 1, each once"):
            choose(study, seeds=seeds)
    choose(study, "plain", "1")
    assert list(study.variants) == ["plain"] and study.seeds == [1]


def test_old_keys_of_a_study_are_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("burnish.core.renames._told", set())
    path = write(tmp_path)
    values = yaml.safe_load(path.read_text())
    values |= {"arms": values.pop("variants"), "before": ["data inspect x"]}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    study, _ = load_study(path)
    assert list(study.variants) == ["plain", "faster"] and study.setup == ["data inspect x"]
    assert "arms is now called variants" in caplog.text and "before is now called setup" in caplog.text


def test_a_policy_that_is_made_new_has_a_start_that_can_be_asked(tmp_path, monkeypatch):
    made = []

    class New:
        def save(self, folder, home):
            made.append(home)
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr("burnish.train.setup.policy_and_data", lambda recipe, progress: (New(), None, ""))
    for _ in range(2):
        assert burnish.experiments.study._start(None, tmp_path / "start") == tmp_path / "start"
    assert made == [tmp_path / "start"] and (tmp_path / "start" / "config.json").is_file()
