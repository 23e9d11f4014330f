"""Studies as a hostile file or a used folder has them: commands that call themselves, places, sizes, damaged stages."""

import json
import os
import shutil

import fake
import pytest
import yaml

from burnish.core.errors import BurnishError
from burnish.core.outputs import mark
from burnish.core.recipe import recipe_to_dict

STUDY = {"name": "two", "recipe": "recipe.yaml", "seeds": [0], "variants": {"plain": {}}}


@pytest.fixture
def study(dataset, tmp_path, monkeypatch):
    """`study(**changes)` writes study.yaml beside the recipe of the fake policy; the present folder holds no more."""
    fake.register(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BURNISH_INSIDE_A_STUDY", raising=False)
    values = recipe_to_dict(fake.recipe(dataset, "run", "--train.steps=2", "--eval.env=tabletop:reach"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

    def write(**changes):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | changes))
        return ["run", "study.yaml"]

    return write


SETUPS = ["python -m pip install x", "python -c 1", "python", "python evil.py", "python -m",
          "python -m burnish.cli.main", "python -m os", "'python' -m http.server", "a 'b",
          "python -mworkshop"]  # fmt: skip


@pytest.mark.parametrize("line", SETUPS)
def test_commands_that_are_not_ours(study, tmp_path, refused, line):
    refused(study(setup=[line]), "setup")
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml", "study.yaml"]


def test_a_study_that_calls_itself_ends(study, refused, monkeypatch):
    """As a setup command sees it, in the process that runs it."""
    monkeypatch.setenv("BURNISH_INSIDE_A_STUDY", "1")
    refused(study(setup=["run study.yaml"]), "in the setup of a study")


CHANGES = {
    "ten thousand runs": {"seeds": list(range(10_000))},
    "many variants": {"variants": {f"v{i}": {} for i in range(1001)}},
    "an unknown simulator": {"evals": {"far": {"env": "moon:base"}}},
    "an unknown task": {"evals": {"far": {"env": "tabletop:nothing"}}},
    "a list of simulators": {"evals": {"far": {"env": ["tabletop:lift"]}}},
    "no simulator": {"variants": {"plain": {"eval": {"env": ""}}}},
    "half a character": {"variants": {"\ud800": {}}},
    "half a character in a sentence": {"variants": {"plain": {"name": "a\udcff"}}},
    "an unknown method": {"variants": {"plain": {"objectives": [{"name": "nothing"}]}}},
    "a method twice": {"variants": {"plain": {"objectives": [{"name": "probe"}, {"name": "probe"}]}}},
    "other options": {"variants": {"plain": {"objectives": [{"name": "isolate", "method": ["aegis"]}]}}},
    "a list for a folder": {"variants": {"plain": {"data": {"root": [3]}}}},
    "a pattern that is none": {"variants": {"plain": {"train": {"freeze": 3}}}},
    "a name of an evaluation with a slash": {"evals": {"a/b": {}}},
    "an evaluation that is hidden": {"evals": {".x": {}}},
    "questions that are a list": {"variants": {"plain": {"eval": {"questions": [1]}}}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_shows_before_anything_is_trained(study, tmp_path, refused, name):
    refused(study(**CHANGES[name]))
    assert not (tmp_path / "runs").exists()


def test_seeds_of_the_command_line_are_bounded_too(study, refused):
    refused([*study(), "--seeds", ",".join(map(str, range(5000)))], "some of 0")
    refused(study(seeds=list(range(5000))), "runs")


USED = {
    "the folder of all runs is a file": {"runs": "mine"},
    "its folder is a file": {"runs/two": "mine"},
    "its folder is a thesis": {"runs/two/thesis.tex": "mine"},
    "its folder is another kind of ours": {"runs/two/.burnish.json": '{"kind": "evaluation"}', "runs/two/x": ""},
    "a run is a thesis": {"runs/two/.burnish.json": '{"kind": "study"}', "runs/two/plain-0/thesis.tex": "mine"},
    "a run is a file": {"runs/two/.burnish.json": '{"kind": "study"}', "runs/two/plain-0": "mine"},
    "a marker that is cut": {"runs/two/.burnish.json": "{", "runs/two/x": ""},
    "a marker that is a list": {"runs/two/.burnish.json": "[1]", "runs/two/x": ""},
    "stages cut": {"runs/two/.burnish.json": '{"kind": "study"}', "runs/two/data.json": "{"},
    "stages a list": {"runs/two/.burnish.json": '{"kind": "study"}', "runs/two/data.json": "[]"},
    "stages of text": {"runs/two/.burnish.json": '{"kind": "study"}', "runs/two/data.json": '{"stages": "x"}'},
    "stages of numbers": {"runs/two/.burnish.json": '{"kind": "study"}', "runs/two/data.json": '{"stages": [3]}'},
    "minutes of text": {
        "runs/two/.burnish.json": '{"kind": "study"}',
        "runs/two/data.json": '{"stages": [{"name": "a", "minutes": "b"}]}',
    },
    "setup stages cut": {"runs/two/.burnish.json": '{"kind": "study"}', "runs/two/setup-0.json": "{"},
    "commands that are done are a number": {
        "runs/two/.burnish.json": '{"kind": "study"}', "runs/two/setup-0.json": '{"stages": [], "done": 3}',
    },
    "train.json cut": {
        "runs/two/.burnish.json": '{"kind": "study"}', "runs/two/plain-0/.burnish.json": '{"kind": "training run"}',
        "runs/two/plain-0/train.json": "{", "runs/two/plain-0/policy/config.json": "{}",
    },
    "run.json a number": {
        "runs/two/.burnish.json": '{"kind": "study"}', "runs/two/plain-0/.burnish.json": '{"kind": "training run"}',
        "runs/two/plain-0/run.json": "3",
    },
    "a checkpoint that is empty": {
        "runs/two/.burnish.json": '{"kind": "study"}', "runs/two/plain-0/.burnish.json": '{"kind": "training run"}',
        "runs/two/plain-0/checkpoints/000001/config.json": "{}",
    },
    "figures that are none": {
        "runs/two/.burnish.json": '{"kind": "study"}', "runs/two/plain-0/.burnish.json": '{"kind": "training run"}',
        "runs/two/plain-0/run.json": '{"stages": [{"name": "a", "minutes": NaN}]}',
    },
}  # fmt: skip


@pytest.mark.parametrize("name", USED)
def test_folders_that_were_there(study, tmp_path, refused, name):
    words = study(setup=["data inspect nowhere"] if "setup" in name or "done" in name else [])
    for file, content in USED[name].items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    refused(words)
    assert {file: (tmp_path / file).read_text() for file in USED[name]} == USED[name]


@pytest.mark.parametrize("below", ["", "plain-0", "data.json"])
def test_links_and_pipes_in_its_folder(study, tmp_path, refused, untouched, below):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    folder = tmp_path / "runs/two" / below
    folder.parent.mkdir(parents=True)
    if below:
        mark(tmp_path / "runs/two", "study")
    folder.symlink_to(mine) if below != "data.json" else os.mkfifo(folder)
    check = untouched(mine)
    refused(study())
    check()
    assert os.listdir(mine) == ["thesis.tex"]


RESULT = {"recipe": "r", "command": "c", "commit": "", "date": "", "seeds": {}, "hardware": "", "minutes": 1.0,
          "rows": [], "metrics": {}}  # fmt: skip
PLACES = {
    "in a data set": ("set/x.json", {"set/meta/info.json": "{}"}),
    "in a policy": ("p/below/x.json", {"p/config.json": "{}", "p/model.safetensors": ""}),
    "another file": ("x.json", {"x.json": '{"mine": 1}'}),
    "text": ("x.json", {"x.json": "mine"}),
    "a result of another recipe": ("x.json", {"x.json": json.dumps(RESULT | {"recipe": "recipes/other.yaml"})}),
    "rows of numbers": ("x.json", {"x.json": json.dumps(RESULT | {"rows": [3]})}),
    "below a file": ("x.json/y.json", {"x.json": "mine"}),
    "a folder": ("x", {"x/y": ""}),
}


@pytest.mark.parametrize("command", ["study", "recipe"])
@pytest.mark.parametrize("name", PLACES)
def test_places_of_a_result(study, tmp_path, refused, untouched, name, command):
    words, (place, files) = study(), PLACES[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    check = untouched(tmp_path)
    refused(["run", "study.yaml" if command == "study" else "recipe.yaml", *words[2:], "--result", place])
    check()


@pytest.mark.parametrize("env", ["moon:base", "tabletop:", "tabletop:lift+fog", "libero:nothing/9", ":", "a:b:c"])
def test_a_recipe_that_is_measured_nowhere_is_not_trained(study, tmp_path, refused, env):
    study()
    refused(["run", "recipe.yaml", f"--eval.env={env}"])
    assert not (tmp_path / "run").exists()


def test_answers_that_were_changed(study, tmp_path, refused, monkeypatch):
    """retention.json of a run that is finished: the table is not made of it."""
    from burnish.experiments.measures import read_answers

    folder = tmp_path / "runs"
    for content in ('{"tuned": {"loss": "x", "correct": []}}', '{"tuned": {"loss": 1, "correct": "abc"}}',
                    '{"tuned": {"loss": 1, "correct": [2]}}', '{"tuned": [1]}', "[]",
                    '{"tuned": {"loss": NaN}}'):  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "retention.json").write_text(content)
        with pytest.raises(BurnishError, match=r"damaged|holds a list"):
            read_answers(folder)
