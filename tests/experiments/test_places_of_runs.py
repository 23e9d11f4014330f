"""Runs and studies write into their own folders and result files, and into nobody else's."""

import json
import os
from types import SimpleNamespace

import fake
import pytest
import yaml

from burnish.cli.main import main
from burnish.core.outputs import MARK, kind_of
from burnish.core.recipe import recipe_to_dict
from burnish.experiments import study as studies


@pytest.fixture
def place(dataset, tmp_path, monkeypatch):
    """A folder with recipe.yaml and study.yaml (two seeds) over the fake policy; evaluations do nothing."""
    fake.register(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "evaluate_as", lambda *given, **named: SimpleNamespace(overall="0 of 0"))
    values = recipe_to_dict(fake.recipe(dataset, "run", "--train.steps=3"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    study = {
        "name": "two",
        "recipe": "recipe.yaml",
        "seeds": [0, 1],
        "variants": {"plain": {"eval": {"env": "tabletop:reach"}}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    return tmp_path


def said(capsys, *words):
    status = main([*words])
    return status, capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"stages": 3}', '{"stages": [{"name": "training"}]}', '{"stages": [1]}']
)
def test_a_damaged_run_json_is_one_line_with_a_remedy_that_works(place, capsys, content):
    assert main(["run", "recipe.yaml"]) == 0
    (place / "run/run.json").write_text(content)
    status, line = said(capsys, "run", "recipe.yaml")
    assert status == 2 and "run/run.json" in line and "try: rm 'run/run.json'" in line
    (place / "run/run.json").unlink()
    assert main(["run", "recipe.yaml"]) == 0


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_run_leaves_what_is_not_its_own(place, capsys, fresh):
    (place / "run/eval").mkdir(parents=True)
    (place / "run/eval/notes.txt").write_text("mine")
    status, line = said(capsys, "run", "recipe.yaml", *fresh)
    assert status == 2 and "run holds eval, which this would overwrite" in line
    assert os.listdir(place / "run") == ["eval"]


def test_train_and_run_share_a_folder(place):
    assert main(["train", "--config", "recipe.yaml", "--quiet"]) == 0
    before = (place / "run/train.json").stat().st_mtime_ns
    assert main(["run", "recipe.yaml"]) == 0 and main(["train", "--config", "recipe.yaml", "--quiet"]) == 0
    assert (place / "run/train.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["recipe.yaml", "study.yaml"])
@pytest.mark.parametrize("there", ['{"name": "my-app", "version": "1.0"}', "words", "folder", "below"])
def test_a_result_does_not_replace_another_file(place, capsys, name, there):
    path = place / "package.json"
    if there == "folder":
        path.mkdir()
    else:
        path.write_text(there)
    target = path / "x.json" if there == "below" else path
    status, line = said(capsys, "run", name, "--result", str(target))
    assert status == 2 and "--result" in line
    assert not (place / "run").exists() and not (place / "runs").exists()
    assert there in ("folder",) or path.read_text() == there


def test_runs_of_a_study_keep_no_checkpoint_unless_it_is_asked_for(place):
    assert main(["run", "study.yaml"]) == 0
    run = place / "runs/two/plain-0"
    assert not (run / "checkpoints").exists() and (run / "policy/model.safetensors").is_file()
    assert (kind_of(place / "runs/two"), kind_of(run)) == ("study", "training run")
    stamp = (run / "train.json").stat().st_mtime_ns
    assert main(["run", "study.yaml"]) == 0 and (run / "train.json").stat().st_mtime_ns == stamp
    values = yaml.safe_load((place / "study.yaml").read_text()) | {"name": "three"}
    (place / "study.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "study.yaml", "--train.keep_checkpoints=1"]) == 0
    assert sorted(os.listdir(place / "runs/three/plain-1/checkpoints")) == ["000003", "last"]


def test_a_study_of_a_version_without_markers_goes_on(place):
    assert main(["run", "study.yaml", "--seeds", "0"]) == 0
    stamp = (place / "runs/two/plain-0/train.json").stat().st_mtime_ns
    for mark in (place / "runs/two" / MARK, place / "runs/two/plain-0" / MARK):
        mark.unlink()
    assert main(["run", "study.yaml"]) == 0
    assert (place / "runs/two/plain-0/train.json").stat().st_mtime_ns == stamp


def test_a_study_leaves_what_is_not_its_own(place, capsys):
    (place / "runs/two").mkdir(parents=True)
    (place / "runs/two/data.json").write_text('{"mine": 1}')
    status, line = said(capsys, "run", "study.yaml")
    assert status == 2 and "holds data.json, which this would overwrite" in line
    assert json.loads((place / "runs/two/data.json").read_text()) == {"mine": 1}
    (place / "runs/two/data.json").unlink()
    (place / "runs/two/plain-1").mkdir()
    (place / "runs/two/plain-1/notes.txt").write_text("mine")
    assert main(["run", "study.yaml"]) == 2
    assert os.listdir(place / "runs/two/plain-1") == ["notes.txt"]


def test_weights_of_an_earlier_study_may_lie_in_the_folder_already(place):
    """A setup command of another study may have trained into this study's folder before it began."""
    assert main(["train", "--config", "recipe.yaml", "--output=runs/two/weights-0", "--quiet"]) == 0
    assert main(["run", "study.yaml", "--seeds", "0"]) == 0
