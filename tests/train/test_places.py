"""Where a run may write: its own folder and nobody else's, and how much it keeps there."""

import json
import os
import shutil
from pathlib import Path

import fake
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.outputs import MARK, kind_of
from burnish.core.recipe import save_recipe
from burnish.train import checkpoint, loop
from burnish.train.loop import train


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    fake.register(monkeypatch.setattr)


def run(root, output, *more, resume=True):
    return train(fake.recipe(root, output, *more), resume=resume, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "policy/config.json", ".policy.mine/x", "eval/notes.txt", "adapter/x", "checkpoints/last/x", "metrics.jsonl",
        "curves.png", "recipe.yaml", "train.json", "run.json", "report.html", "retention.json", "burnish/meta.json",
    ],
)  # fmt: skip
def test_a_folder_of_somebody_else_stays_as_it_is(dataset, tmp_path, name, fresh):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(BurnishError, match="which this would overwrite; expected a new or empty folder"):
        run(dataset, tmp_path / "out", resume=not fresh)
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_starting_over_spares_the_policy_that_training_starts_from(dataset, tmp_path):
    run(dataset, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(BurnishError, match="would delete the policy .* that training starts from"):
        run(dataset, tmp_path / "out", f"--policy.path={tmp_path / 'out' / 'policy'}", resume=False)
    assert contents(tmp_path / "out") == before


def test_the_data_set_and_the_policy_are_no_output(dataset, tmp_path):
    before = contents(dataset)
    for place in (dataset, dataset / "meta", dataset / "videos"):
        with pytest.raises(BurnishError, match="which this would overwrite|would lie in a data set"):
            run(dataset, place, resume=False)
    assert contents(dataset) == before


def test_starting_over_deletes_what_the_run_made_and_nothing_else(dataset, tmp_path):
    run(dataset, tmp_path / "r")
    for name, files in {"tuned": ("settings.json", "episodes.jsonl"), "mine": ("notes.txt",)}.items():
        (tmp_path / "r/eval" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "r/eval" / name / file).write_text("{}")
    (tmp_path / "r/thesis.tex").write_text("mine")
    run(dataset, tmp_path / "r", resume=False)
    assert os.listdir(tmp_path / "r/eval") == ["mine"] and (tmp_path / "r/thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("left", ["train.json", "checkpoints"])
def test_a_run_of_a_version_without_markers_is_known_by_its_files(dataset, tmp_path, left):
    whole = run(dataset, tmp_path / "r", "--train.keep_checkpoints=1")
    before = fake.weights(whole.policy)["model.safetensors"]
    (tmp_path / "r" / MARK).unlink()
    if left == "checkpoints":
        (tmp_path / "r/train.json").unlink()
    again = run(dataset, tmp_path / "r")
    after = fake.weights(again.policy)["model.safetensors"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert kind_of(tmp_path / "r") == "training run" and again.steps == 12


def test_a_recipe_that_says_the_same_keeps_its_comments(dataset, tmp_path):
    recipe = fake.recipe(dataset, tmp_path / "r")
    train(recipe, progress=False)
    path = tmp_path / "r/recipe.yaml"
    path.write_text("# why this rate\n" + path.read_text())
    train(recipe, resume=False, progress=False)
    assert path.read_text().startswith("# why")
    recipe.train.log_every = 5
    train(recipe, resume=False, progress=False)
    assert "log_every: 5" in path.read_text()


def test_a_hand_written_recipe_is_not_replaced(dataset, tmp_path):
    path = tmp_path / "x/recipe.yaml"
    path.parent.mkdir()
    save_recipe(fake.recipe(dataset, tmp_path / "x"), path)
    before = path.read_bytes()
    with pytest.raises(BurnishError, match="holds recipe.yaml, which this would overwrite"):
        run(dataset, tmp_path / "x")
    assert path.read_bytes() == before and os.listdir(path.parent) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("more", "kept"),
    [([], ["000012", "last"]), (["--train.keep_checkpoints=2"], ["000010", "000012", "last"]),
     (["--train.keep_checkpoints=0"], None)],
)  # fmt: skip
def test_after_the_end_one_checkpoint_stays_or_as_many_as_are_asked_for(dataset, tmp_path, more, kept):
    run(dataset, tmp_path / "r", "--train.save_every=2", *more)
    folder = tmp_path / "r/checkpoints"
    assert (sorted(os.listdir(folder)) if folder.exists() else None) == kept
    assert run(dataset, tmp_path / "r", "--train.keep_checkpoints=0").steps == 12  # of a finished run too
    assert not folder.exists() and not [p for p in os.listdir(tmp_path / "r") if p.startswith(".") and p != MARK]


def test_a_run_out_of_time_keeps_the_checkpoint_that_it_needs(dataset, tmp_path):
    more = "--train.keep_checkpoints=0"
    assert run(dataset, tmp_path / "r", more, "--train.max_minutes=0.000001").steps == 1
    assert sorted(os.listdir(tmp_path / "r/checkpoints")) == ["000001", "last"]
    assert run(dataset, tmp_path / "r", more).steps == 12
    assert not (tmp_path / "r/checkpoints").exists()


def test_what_a_killed_writer_left_is_swept(dataset, tmp_path):
    run(dataset, tmp_path / "r")
    for name in ("checkpoints/.000004.gone", "checkpoints/.000008.new", ".policy.gone", ".adapter.new"):
        (tmp_path / "r" / name / "burnish").mkdir(parents=True)
    run(dataset, tmp_path / "r")
    assert sorted(os.listdir(tmp_path / "r/checkpoints")) == ["000012", "last"]
    assert [name for name in os.listdir(tmp_path / "r") if name.startswith(".")] == [MARK]


@pytest.mark.parametrize(("at", "kept"), [(12, ["000004", "000008", "last"]), (8, ["000004", "last"])])
def test_weights_that_are_not_finite_are_neither_exported_nor_kept(dataset, tmp_path, monkeypatch, at, kept):
    """Loss and gradient of the last step are finite, the step itself overflows."""
    plain = loop.train_step

    def overflow(run, *given, **named):
        edits = plain(run, *given, **named)
        if run.step == at:
            run.trained["head.weight"].data[0, 0] = float("inf")
        return edits

    monkeypatch.setattr(loop, "train_step", overflow)
    with pytest.raises(BurnishError, match=f"step {at}: 1 of 8 tensors are not finite, such as 'head.weight'"):
        run(dataset, tmp_path / "r")
    assert not (tmp_path / "r/policy").exists()
    assert sorted(os.listdir(tmp_path / "r/checkpoints")) == kept
    monkeypatch.setattr(loop, "train_step", plain)
    assert run(dataset, tmp_path / "r").steps == 12


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"recipe": 1}', "\xff", '{"steps": "x", "recipe": {}}'])
@pytest.mark.parametrize("file", ["train.json", "checkpoints/000012/burnish/meta.json", "metrics.jsonl"])
def test_damaged_files_of_a_run_are_one_clear_line(dataset, tmp_path, whole, file, content):
    output = tmp_path / "r"
    shutil.copytree(whole, output, symlinks=True)
    if file == "metrics.jsonl":  # whose last line may be cut
        content = f"{content or '1'}\n{{}}"
    (output / file).write_text(content, encoding="latin-1")
    if file != "train.json":
        (output / "train.json").unlink()
    with pytest.raises(BurnishError, match=file.rpartition("/")[2]) as caught:
        run(dataset, output)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        fake.register(patch.setattr)
        run(dataset, folder)
    return folder


def test_the_last_line_of_figures_may_be_cut(dataset, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "r", symlinks=True)
    (tmp_path / "r/train.json").unlink()
    with open(tmp_path / "r/metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')
    assert run(dataset, tmp_path / "r").steps == 12
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12


def test_an_adapter_wider_than_any_layer_is_refused(dataset, tmp_path):
    more = ["--train.peft.method=lora", "--train.peft.target_modules=head", "--train.peft.rank=60000"]
    with pytest.raises(BurnishError, match="train.peft.rank is 60000; expected at most 33"):
        run(dataset, tmp_path / "r", *more)


def test_old_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("999998", "1000000", "2", "notes", ".000001.gone"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.latest(tmp_path).name == "1000000"
