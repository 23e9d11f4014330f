import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.recipe import (
    demos_root,
    find_recipe,
    flatten,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    run_folder,
    save_recipe,
)


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_yaml_then_overrides(tmp_path):
    path = write(tmp_path, "name: a\ntrain: {lr: 1e-4, steps: 7}\nobjectives: [{name: x, weight: 2}]\n")
    recipe = load_recipe(path, ["--train.steps=9", "--train.freeze=[vision, head]", "--data.augment", "false"])
    assert (recipe.name, recipe.train.lr, recipe.train.steps) == ("a", 1e-4, 9)
    assert recipe.train.freeze == ["vision", "head"] and recipe.data.augment is False
    assert recipe.objectives == [{"name": "x", "weight": 2}]
    assert recipe.train.batch_size == 32


def test_free_mappings_take_any_key(tmp_path):
    recipe = load_recipe(None, ["--policy.overrides.n_action_steps=8"])
    assert recipe.policy.overrides == {"n_action_steps": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian: {lr: 1}", ["recipe.yaml", "'trian'", "'train'"]),
        ("train: {learning_rate: 1}", ["'train.learning_rate'", "expected 'train.lr'"]),
        ("learning_rate: 1", ["'learning_rate'", "expected 'train.lr'"]),
        ("train: {weight_decays: 1}", ["expected 'train.weight_decay'"]),
        ("train: {warm_up: 1}", ["'train.warm_up'", "train.warmup_steps"]),
        ("train: {epochs: 1}", ["expected 'train.steps'"]),
        ("train: {gradient_accumulation_steps: 1}", ["expected 'train.grad_accumulation'"]),
        ("train: {save_freq: 1}", ["expected 'train.save_every'"]),
        ("output_dir: x", ["expected 'output'"]),
        ("dataset: {root: x}", ["expected 'data.root'"]),
        ("policy: {pretrained_path: x}", ["expected 'policy.path'"]),
        ("train: {peft: {lora_alpha: 1}}", ["expected 'train.peft.alpha'"]),
        ("name: ../x", ["name is '../x'", "expected letters"]),
        ("name: /etc", ["name is '/etc'"]),
        ("name: ''", ["name is ''"]),
        ("train: {seed: 1" + 40 * "0" + "}", ["train.seed", "at most 18 digits"]),
        ("lr: 1", ["'lr'", "'train.lr'"]),
        ("train: {peft: {ranks: 4}}", ["'train.peft.ranks'", "'train.peft.rank'"]),
        ("train: {steps: many}", ["train.steps", "many"]),
        ("train: {steps: 1.5}", ["train.steps", "1.5"]),
        ("train: 5", ["'train' is 5"]),
        ("train: {precision: fp8}", ["train.precision", "bf16"]),
        ("train: {batch_size: 0}", ["train.batch_size is 0", "at least 1"]),
        ("train: {ema_decay: 1.0}", ["train.ema_decay"]),
        ("objectives: [{weight: 1}]", ["objectives", "no name"]),
        ("language: {weight: 0.5}", ["language.root"]),
        ("train: [", ["recipe.yaml", "YAML"]),
        ("just words", ["recipe.yaml", "str"]),
    ],
)
def test_every_mistake_is_one_clear_line(tmp_path, text, words):
    with pytest.raises(BurnishError) as caught:
        load_recipe(write(tmp_path, text))
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_mistakes_on_the_command_line():
    with pytest.raises(BurnishError, match="unknown key 'train.stepz'.*'train.steps'"):
        load_recipe(None, ["--train.stepz=3"])
    with pytest.raises(BurnishError, match="unexpected argument 'steps'"):
        load_recipe(None, ["steps"])
    with pytest.raises(BurnishError, match="no value"):
        load_recipe(None, ["--train.steps"])


def test_a_home_folder_is_meant_wherever_a_path_may_stand(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(None, [
        "--output=~/out", "--data.root=~/set", "--policy.path", "~/base", "--policy.overrides.vlm_model_name=~/vlm",
        "--objectives=[{name: align, teacher: {name: folder, path: ~/dino}, cache: ~/cache, note: 'a ~/b'}]",
    ])  # fmt: skip
    assert (recipe.output, recipe.data.root, recipe.policy.path) == ("/home/me/out", "/home/me/set", "/home/me/base")
    assert recipe.policy.overrides == {"vlm_model_name": "/home/me/vlm"}
    entry = recipe.objectives[0]
    assert (
        entry["teacher"]["path"] == "/home/me/dino" and entry["cache"] == "/home/me/cache" and entry["note"] == "a ~/b"
    )


def test_missing_file(tmp_path):
    with pytest.raises(BurnishError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


@settings(max_examples=25, deadline=None)  # each writes a file and forces it to disk
@given(lr=st.floats(0, 1), steps=st.integers(1, 10**6), name=st.text("abc-_", min_size=1, max_size=8))
def test_round_trip(tmp_path_factory, lr, steps, name):
    recipe = recipe_from_dict(
        {"name": name, "train": {"lr": lr, "steps": steps}, "objectives": [{"name": "a", "b": [1]}]}
    )
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_flatten_and_places():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    recipe = load_recipe(None, ["--name=x"])
    assert str(demos_root(recipe)) == "data/x" and str(run_folder(recipe)) == "runs/x"
    recipe = load_recipe(None, ["--data.root=here", "--output=there"])
    assert str(demos_root(recipe)) == "here" and str(run_folder(recipe)) == "there"


def test_no_is_a_precision_however_yaml_reads_it():
    assert load_recipe(None, ["--train.precision=no"]).train.precision == "no"


@pytest.mark.parametrize(
    "name", ["tabletop/quickstart", "tabletop/quickstart.yaml", "recipes/tabletop/quickstart.yaml"]
)
def test_shipped_recipes_are_found_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "tabletop/quickstart"
    assert find_recipe("recipes/isolate/facts.jsonl").is_file()


def test_an_existing_file_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tabletop").mkdir()
    (tmp_path / "tabletop/quickstart").write_text("name: mine\n")
    assert load_recipe("tabletop/quickstart").name == "mine"
    (tmp_path / "tabletop/base.yaml").write_text("name: beside\n")
    assert find_recipe("base.yaml", beside=tmp_path / "tabletop/study.yaml").read_text() == "name: beside\n"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("tabletop/quikstart", "tabletop/quickstart"),
        ("quickstart", "tabletop/quickstart"),
        ("qqq", "tabletop/smolvla_small"),
    ],
)
def test_a_missing_recipe_names_near_ones(tmp_path, monkeypatch, name, near):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BurnishError, match=f"no recipe at {name}; expected a file, or .*{near}"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["../recipes/tabletop/quickstart.yaml", "/tabletop/quickstart.yaml"])
def test_a_name_does_not_leave_the_package(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BurnishError, match="no recipe"):
        find_recipe(name)


def test_a_study_is_no_recipe():
    with pytest.raises(
        BurnishError, match="is a study, not a recipe; expected a recipe; try: burnish run isolate/answers"
    ):
        load_recipe("isolate/answers")


def test_every_range_of_a_recipe_stands_in_its_fields(tmp_path):
    """What a section refuses by itself a whole recipe refuses too, with the full name of the field."""
    for line, words in {
        "train: {peft: {rank: 0}}": "train.peft.rank is 0; expected at least 1",
        "train: {lr: .nan}": "train.lr is nan",
        "train: {ema_decay: -0.1}": "train.ema_decay is -0.1; expected at least 0 and below 1",
        "language: {turns: 0}": "language.turns is 0; expected at least 1",
        "data: {workers: 0}": "data.workers is 0",
        "train: {peft: {method: qlora}}": "train.peft.method is 'qlora'; expected one of none, lora, dora",
    }.items():
        with pytest.raises(BurnishError, match=words):
            load_recipe(write(tmp_path, line))
