"""A task vector of two runs that differ in more than their methods: told, or refused; recorded either way."""

import json
import os
import shutil

import pytest

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.weights.extract import differences, extract

RECIPE = {
    "name": "aux", "output": "runs/aux", "objectives": [{"name": "align"}], "policy": {"path": "small"},
    "data": {"root": "data/x", "image_size": 0, "workers": 1}, "train": {"seed": 0, "lr": 1e-4, "log_every": 10},
}  # fmt: skip


def changed(recipe, **values):
    """The recipe with "section__field" replaced."""
    made = json.loads(json.dumps(recipe))
    for key, value in values.items():
        section, _, field = key.rpartition("__")
        (made[section] if section else made)[field] = value
    return made


def run(root, name, weights, recipe, steps=200, data="d0"):
    """A run folder as `burnish train` leaves it, with the weights of `weights`."""
    shutil.copytree(weights, root / name / "policy")
    about = {"steps": steps, "data_hash": data, "final": {}, "recipe": recipe}
    (root / name / "train.json").write_text(json.dumps(about))
    return root / name / "policy"


@pytest.fixture
def pair(family, tmp_path):
    """base, and functions that make the two runs."""
    base, tuned, control = family
    one = run(tmp_path, "aux", tuned, RECIPE)
    return base, one, lambda **facts: run(tmp_path, "plain", control, **facts)


def test_methods_names_and_what_touches_no_number_may_differ(pair, tmp_path, caplog):
    base, one, make = pair
    plain = changed(RECIPE, objectives=[], name="plain", output="runs/plain", data__workers=4, train__log_every=1)
    other = make(recipe=plain)
    delta = extract(base, one, other, output=tmp_path / "delta", strict=True)
    assert delta.meta["runs_differ"] == [] and "differ" not in caplog.text


@pytest.mark.parametrize(("facts", "words"), [
    ({"recipe": changed(RECIPE, train__seed=1)}, ["train.seed 0 and 1"]),
    ({"steps": 300}, ["steps 200 and 300"]),
    ({"data": "d1"}, ["data 'd0' and 'd1'"]),
    ({"recipe": changed(RECIPE, train__lr=2e-4, policy__path="other"), "steps": 7},
     ["policy.path 'small' and 'other'", "steps 200 and 7", "train.lr 0.0001 and 0.0002"]),
])  # fmt: skip
def test_what_else_differs(pair, tmp_path, caplog, capsys, facts, words):
    base, one, make = pair
    other = make(**{"recipe": RECIPE, **facts})
    with pytest.raises(BurnishError) as caught:
        extract(base, one, other, output=tmp_path / "delta", strict=True)
    assert all(word in str(caught.value) for word in words) and not (tmp_path / "delta").exists()
    delta = extract(base, one, other, output=tmp_path / "delta")
    assert delta.meta["runs_differ"] == words
    assert all(word in caplog.text for word in words)
    assert main(["weights", "inspect", str(delta.path)]) == 0
    assert words[0] in capsys.readouterr().out
    command = ["weights", "extract", str(base), str(one), "--control", str(other), "-o", str(tmp_path / "new")]
    assert main([*command, "--strict"]) == 2 and words[0] in capsys.readouterr().err
    assert main(command) == 0


def test_runs_of_which_nothing_is_recorded(family, pair, tmp_path):
    base, one, _ = pair
    other = family[2]
    assert differences(one, other) == [f"nothing is recorded of the training of {other}"]
    (other.parent / "train.json").write_text('{"of": "another tool"}')
    with pytest.raises(BurnishError, match="nothing is recorded"):
        extract(base, one, other, output=tmp_path / "delta", strict=True)
    assert extract(base, one, output=tmp_path / "delta", strict=True).meta["runs_differ"] == []  # one run is no pair


def test_checkpoints_and_links_to_them(family, pair, tmp_path):
    _, one, _ = pair
    folder = tmp_path / "plain/checkpoints/000100"
    shutil.copytree(family[2], folder)
    (folder / "burnish").mkdir()
    (folder / "burnish/meta.json").write_text(json.dumps({"step": 100, "data_hash": "d0", "recipe": RECIPE}))
    os.symlink("000100", folder.parent / "last")
    assert differences(one, folder.parent / "last") == ["steps 200 and 100"]
    assert differences(one / "model.safetensors", folder / "model.safetensors") == ["steps 200 and 100"]
    (folder / "burnish/meta.json").write_text("[" * 9999)
    with pytest.raises(BurnishError, match=r"meta\.json"):
        differences(one, folder)
