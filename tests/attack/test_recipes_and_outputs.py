"""Recipes, study files, places to write and files of a run that are none."""

import json
import os
import typing
from dataclasses import fields, is_dataclass

import fake
import pytest
import yaml

from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.core.recipe import load_recipe, recipe_from_dict, recipe_to_dict

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def recipe(dataset, tmp_path, monkeypatch):
    """Path of a recipe that trains the fake policy in no time; the present folder is empty besides."""
    fake.register(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    values = recipe_to_dict(fake.recipe(dataset, "run", "--train.steps=2", "--eval.env=tabletop:reach"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return "recipe.yaml"


@pytest.mark.parametrize(
    "text",
    [
        BOMB, "a: &a [*a]", "a: &a {b: *a}", "train: {lr: 1, lr: 2}", "[1, 2]", "7", "- train", "train: [",
        "train: null", "train: 1", "train: [steps]", "train: words", "train:\n\tsteps: 1", "%YAML 9\n---\n{}",
        "!!python/object/apply:os.system ['touch ran']", "train: !!python/name:os.system", "train: !me {steps: 1}",
        "? [a, b]\n: 1", "1: 2", "null: 1", "true: {}", "train: {1: 2}", "train: {? {a: 1} : 2}", "name: [a]",
        "name: {a: b}", "name: ..", "name: a//b", "name: ~/x", "name: .hidden", 'name: "a\\nb"', 'output: "a\\0b"',
        'output: [a]', "data: {root: {a: 1}}", 'data: {root: "a\\0b"}', "objectives: align",
        "objectives: {name: align}", "objectives: [align]", "objectives: [null]", "objectives: [[]]",
        "objectives: [{}]", "objectives: [{name: null}]", "objectives: [{name: 1}]", "objectives: [{name: [probe]}]",
        "objectives: [{name: {a: b}}]", "objectives: [{name: ''}]", "objectives: [{name: ' '}]",
        "objectives: [{name: '../probe'}]", "objectives: [{name: ':'}]", "objectives: [{name: 'os:'}]",
        "objectives: [{name: ':system'}]", "objectives: [{name: 'os:system'}]", "objectives: [{name: 'a:b:c'}]",
        "objectives: [{name: 'no.such:Thing'}]", "objectives: [{name: '.:x'}]", 'objectives: [{name: "a\\0b"}]',
        "objectives: [{name: probe, 1: 2}]", "objectives: [{name: probe, nothing: 2}]",
        "objectives: [{name: probe}, {name: probe}]", "train: {betas: [1, 2, 3]}", "train: {betas: [0.9, 1]}",
        "train: {betas: [0.9, x]}", "train: {betas: 0.9}", "train: {precision: fp8}", "train: {precision: 16}",
        "train: {freeze: ['(']}", "train: {freeze: ['']}\nlanguage: {weight: 1}", "train: {train_only: ['[']}",
        "train: {trackers: [1]}", "train: {peft: {method: lora, rank: 1000000000}}", "train: {peft: lora}",
        "train: {peft: {method: lora, rank: 60000}}", "train: {peft: {method: lora, target_modules: '('}}",
        "train: {peft: {method: lora, target_modules: nothing}}", "data: {workers: 1000000}", "data: {workers: 1.5}",
        "data: {cameras: front}", "data: {cameras: [roof]}", "data: {episodes: [99]}", "data: {episodes: [-1]}",
        "data: {episodes: [x]}", "language: {weight: 1}", "eval: {questions: 3}", "eval: {episodes: 0}",
        "recipe: x\nvariants: {}", f"train: {{steps: {'9' * 5000}}}", f"train: {{steps: {'9' * 50}}}",
        f"{'{a: ' * 200}1{'}' * 200}", f"name: {'x' * 300}", r"train: {freeze: ['((.|\w|[a-z.0-9])+)+!']}",
        r"train: {train_only: ['((.|\w|[a-z.0-9])+)+!']}", f"train: {{freeze: ['{'x' * 2000}']}}",
        r"train: {peft: {method: lora, target_modules: '((.|\w|[a-z.0-9])+)+!'}}",
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_recipes(recipe, tmp_path, refused, text):
    values = yaml.safe_load((tmp_path / recipe).read_text())
    (tmp_path / "bad.yaml").write_text(text)
    words = ["train", "--config", "bad.yaml", "--quiet", "--policy.path=fake", "--train.batch_size=2"]
    if "output" not in text:
        words.append("--output=run")
    if "data" not in text:
        words.append(f"--data.root={values['data']['root']}")
    refused(words)
    assert sorted(os.listdir(tmp_path)) == ["bad.yaml", "recipe.yaml"]


@pytest.mark.parametrize("raw", [b"\xff\xfet\x00r\x00", b"train: {steps: 1}\n\x00", b"\x80\x81", b"\xc3\x28: 1"])
def test_recipes_of_odd_bytes(tmp_path, refused, raw):
    (tmp_path / "bad.yaml").write_bytes(raw)
    refused(["train", "--config", tmp_path / "bad.yaml"], "bad.yaml")


@pytest.mark.parametrize("what", ["folder", "pipe", "/dev/zero", "missing", "", "link"])
def test_recipes_that_are_no_file(tmp_path, monkeypatch, refused, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("link")
    refused(["train", f"--config={what}"])
    refused(["run", what])


@pytest.mark.parametrize(
    "words",
    [
        ["--train"], ["--train.lr"], ["--train.lr="], ["--train.lr=["], ["--train.lr=fast"], ["--train.lr=-1"],
        ["--train.lr=.inf"], ["--train.lr=nan"], ["--train.lr=.nan"], ["--=1"], ["--train.=1"], ["--.lr=1"],
        ["---train.lr=1"], ["train.lr=1"], ["-x=1"], ["--train.lr.more=1"], ["--train=1"], ["--train.learning_rate=1"],
        ["--train.steps=1e3"], ["--train.steps=true"], ["--train.steps=0"], ["--train.steps=-5"], ["--train.steps=[1]"],
        ["--objectives=["], ["--objectives=probe"], ["--objectives.name=probe"], ["--data.root=~nobody_here/x"],
        ["--output=~nobody_here/x"], ["--name=../../x"], ["--name=/tmp/x"], ["--name="], ["--data.augment=maybe"],
        ["--train.keep_checkpoints=3"], ["--train.keep_checkpoints=-1"], ["--train.keep_checkpoints=all"],
        ["--train.seed=1.5"], ["--train.seed=x"], ["--data.workers=0"], ["--train.max_minutes=-1"],
        ["--policy.overrides=3"], ["--policy.overrides={1: 2}", "--policy.path="], ["--train.min_lr_ratio=2"],
        ["--train.ema_decay=1"], ["--train.grad_accumulation=0"], ["--train.log_every=0"], ["--train.save_every=0"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_overrides(recipe, tmp_path, refused, words):
    refused(["train", "--config", recipe, "--quiet", *words])
    assert os.listdir(tmp_path) == [recipe]


def leaves(kind, prefix=""):
    hints = typing.get_type_hints(kind)
    for one in fields(kind):
        if is_dataclass(hints[one.name]):
            yield from leaves(hints[one.name], f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", hints[one.name]


WRONG = {
    int: [1.5, "x", [1], {"a": 1}, True, None, float("inf"), 10**400, -(10**20), "0x"],
    float: ["x", [1], {"a": 1}, True, None, float("nan"), float("-inf"), "1e999"],
    bool: ["maybe", 2, [True], {"a": 1}, None, 0.5],
    str: [[1], {"a": 1}, ["x", "y"]],
    list: [5, True, {"a": 1}, 1.5],
    dict: [5, "x", [1], True],
}


@pytest.mark.parametrize(("name", "hint"), leaves(RecipeConfig), ids=lambda value: value if type(value) is str else "")
def test_every_field_refuses_values_of_other_types(name, hint):
    kind = typing.get_origin(hint) or hint
    optional = type(None) in typing.get_args(hint)
    for value in WRONG[int if optional else kind]:
        if value is None and optional:
            continue
        nested = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        with pytest.raises(BurnishError) as caught:
            recipe_from_dict(nested)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500, (name, value)
        assert name.rpartition(".")[2] in str(caught.value), (name, value, str(caught.value))


STUDY = {"name": "two", "recipe": "recipe.yaml", "seeds": [0], "variants": {"plain": {}}}


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""}, {"name": 3}, {"name": "../up"}, {"name": "/etc"}, {"name": "a/../../b"}, {"name": None},
        {"recipe": ""}, {"recipe": "none.yaml"}, {"recipe": ["recipe.yaml"]}, {"recipe": "study.yaml"},
        {"recipe": "/dev/null/x"}, {"recipe": "~nobody_here/x.yaml"}, {"seeds": []}, {"seeds": 3}, {"seeds": ["a"]},
        {"seeds": [1.5]}, {"seeds": [True]}, {"seeds": [0, 0]}, {"seeds": [10**30]}, {"seeds": None}, {"variants": []},
        {"variants": {}}, {"variants": "plain"}, {"variants": {"a/b": {}}}, {"variants": {"..": {}}},
        {"variants": {"": {}}}, {"variants": {1: {}}}, {"variants": {None: {}}}, {"variants": {"a": 3}},
        {"variants": {"a": None}}, {"variants": {"a": [1]}}, {"variants": {"a": {1: 2}}},
        {"variants": {"a": {"stepz": 1}}}, {"variants": {"a": {"train": 1}}},
        {"variants": {"a": {"train": {"lr": -1}}}},
        {"variants": {"a": {"objectives": [{"name": 1}]}}}, {"variants": {"x" * 200: {}}}, {"evals": []},
        {"evals": {"main": {}}}, {"evals": {"../x": {}}}, {"evals": {"b": 3}}, {"evals": {"b": {"episodes": 0}}},
        {"evals": {"b": {"nothing": 0}}}, {"evals": {"b": {"questions": 3}}}, {"evals": {"b": {"workers": "many"}}},
        {"setup": "train"}, {"setup": [3]}, {"setup": [""]}, {"setup": [None]}, {"setup": ["train 'x"]},
        {"reference": "nobody"}, {"reference": 3}, {"reference": ["plain"]}, {"more": 1}, {3: 1},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_studies(recipe, tmp_path, refused, change):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | change))
    refused(["run", "study.yaml"])
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml", "study.yaml"]


@pytest.mark.parametrize(
    "words",
    [["--seeds", "x"], ["--seeds", "1.5"], ["--seeds", ","], ["--seeds", "0,0"], ["--seeds", "9" * 30],
     ["--seeds", "²"], ["--variants", "none"], ["--variants", ","], ["--fresh"], ["--result", "."]],
    ids=" ".join,
)  # fmt: skip
def test_choices_of_a_study(recipe, tmp_path, refused, words):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    refused(["run", "study.yaml", *words])
    assert not (tmp_path / "runs").exists()


COMMANDS = {
    "train": ["train", "--config", "recipe.yaml", "--quiet", "--output=X"],
    "fresh": ["train", "--config", "recipe.yaml", "--quiet", "--output=X", "--fresh"],
    "run": ["run", "recipe.yaml", "--output=X"],
    "demos": ["data", "demos", "tabletop:lift", "1", "X"],
    "questions": ["data", "questions", "tabletop:lift", "1", "X"],
    "pairs": ["data", "pairs", "fake", "tabletop:lift", "--root=X"],
}


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/it", "link", "link/below", "mine", "mine/file.txt",
                                   "x" * 300, "pipe", "."])  # fmt: skip
@pytest.mark.parametrize("command", COMMANDS)
def test_places_that_are_no_output(recipe, tmp_path, refused, untouched, command, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    check, before = untouched(tmp_path / "mine"), sorted(os.listdir(tmp_path))
    refused([word.replace("X", place) for word in COMMANDS[command]])
    check()
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["demos", "questions"])
def test_a_folder_that_only_has_the_name_of_unfinished_work(tmp_path, refused, untouched, command):
    (tmp_path / "X.partial").mkdir()
    (tmp_path / "X.partial/thesis.tex").write_text("mine")
    check = untouched(tmp_path)
    refused([word.replace("X", str(tmp_path / "X")) for word in COMMANDS[command]], "X.partial holds thesis.tex")
    check()


@pytest.mark.parametrize(
    "words",
    [
        ["questions", "tabletop:lift", "0", "X"], ["questions", "tabletop:lift", "-1", "X"],
        ["questions", "tabletop:lift", "1000000000", "X"], ["questions", "tabletop:lift", "90000000", "X"],
        ["questions", "tabletop:lift", "x", "X"], ["questions", "nowhere", "1", "X"], ["questions", "", "1", "X"],
        *(["questions", "tabletop:lift", "1", "X", *more] for more in (
            ["--image-size=0"], ["--image-size=-8"], ["--image-size=100000"], ["--per-scene=-1"], ["--seed=-1"],
            ["--seed=99999999999999999999"], ["--workers=-1"], ["--workers=1000000"], ["--camera=roof"])),
        ["demos", "tabletop:lift", "0", "X"], ["demos", "tabletop:lift", "-3", "X"], ["demos", "nowhere", "1", "X"],
        ["demos", "tabletop:lift", "10000000000", "X"], ["demos", "tabletop:nothing", "1", "X"],
        *(["demos", "tabletop:lift", "1", "X", *more] for more in (
            ["--image-size=0"], ["--image-size=17"], ["--image-size=100000"], ["--seed=-1"], ["--workers=-1"],
            ["--workers=1000000"], ["--seed=99999999999999999999"])),
        *(["pairs", "small", "tabletop:lift", "--root=X", *more] for more in (
            ["--states=0"], ["--states=1000000000"], ["--rollouts=1"], ["--rollouts=100000"], ["--first-state=-1"],
            ["--action-noise=nan"], ["--action-noise=inf"], ["--action-noise=-1"], ["--action-noise=1e9"],
            ["--image-size=-1"], ["--image-size=100000"], ["--limit=-1"], ["--workers=-1"], ["--ties=often"])),
        ["pairs", "--root=X"], ["pairs", "small", "--root=X"], ["pairs", "nowhere", "tabletop:lift", "--root=X"],
        ["pairs", "small", "nowhere", "--root=X"], ["pairs", "--labels=none.jsonl", "--root=X"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_and_names_of_what_is_made(tmp_path, monkeypatch, refused, words):
    monkeypatch.chdir(tmp_path)
    refused(["data", *words])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"request": 3}', '{"request": {}, "expert": 1}'])
@pytest.mark.parametrize("command, file", [("demos", "X/burnish_demos.json"), ("demos", "X.partial/request.json"),
                                           ("questions", "X/meta.json")])  # fmt: skip
def test_cut_files_of_what_was_made(tmp_path, monkeypatch, refused, untouched, command, file, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(content)
    check = untouched(tmp_path)
    line = refused(COMMANDS[command], "X")
    check() if "partial" not in file else None
    assert (tmp_path / file).read_text() == content, line


def test_what_is_right_passes(recipe, tmp_path, accepted):
    accepted(["train", "--config", recipe, "--quiet", "--objectives=[{name: probe}]"], "steps: 2")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"evals": {}, "reference": "plain"}))
    assert load_recipe(tmp_path / "run/recipe.yaml").train.steps == 2
    assert json.loads((tmp_path / "run/.burnish.json").read_text()) == {"kind": "training run"}


def test_a_home_folder_is_meant_by_its_sign(recipe, tmp_path, monkeypatch, accepted):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me").mkdir()
    os.rename(recipe, tmp_path / "me/recipe.yaml")
    accepted(["train", "--config=~/recipe.yaml", "--quiet", "--output=~/out"], str(tmp_path / "me/out/policy"))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"recipe": "~/recipe.yaml"}))
    monkeypatch.setattr("burnish.experiments.study._train_and_measure", lambda study, run: None)
    accepted(["run", "study.yaml"])
    assert not (tmp_path / "~").exists()
