"""A full disk: one line, nothing half made, and the same command goes on after there is room.

The limit is the system's on the size of a file, which an ordinary user may set, and which simulator processes inherit.
"""

import errno
import os
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import fake
import numpy as np
import pytest
import yaml

from burnish.cli.main import main
from burnish.core.outputs import MARK
from burnish.core.recipe import recipe_to_dict

sys.path += [str(Path(__file__).parent / name) for name in ("evaluate", "weights")]


@contextmanager
def most_bytes(count: int):
    """No file may grow beyond `count` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def fails(capsys):  # in memory: a file of captured lines would be limited too
    def run(words, count):
        capsys.readouterr()
        with most_bytes(count):
            status = main([str(word) for word in words])
        err = capsys.readouterr().err
        line = err.strip().split("\n")[-1]
        assert status == 2 and "no room left while writing" in line and "Traceback" not in err, err

    return run


MORE = ["--train.steps=5", "--train.save_every=2"]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run that never lacked room."""
    from burnish.train.loop import train

    with pytest.MonkeyPatch.context() as patch:
        fake.register(patch.setattr)
        return train(fake.recipe(dataset, tmp_path_factory.mktemp("full") / "whole", *MORE), progress=False).output


@pytest.fixture
def recipe_file(dataset, tmp_path, monkeypatch, curves):
    fake.register(monkeypatch.setattr)
    path = tmp_path / "recipe.yaml"
    more = [f"--data.cache_dir={tmp_path / 'frames'}", *MORE]
    path.write_text(yaml.safe_dump(recipe_to_dict(fake.recipe(dataset, tmp_path / "run", *more))))
    return path


@pytest.mark.parametrize("count", [0, 10, 1000, 5000, 9000])
def test_train(recipe_file, whole, tmp_path, fails, count):
    fails(["train", "--config", recipe_file, "--quiet"], count)
    run = tmp_path / "run"
    assert not (run / "policy").exists() and not (run / "train.json").exists()
    assert [path for path in run.rglob(".*") if path.name != MARK] == []
    assert main(["train", "--config", str(recipe_file), "--quiet"]) == 0
    fake.assert_same_weights(run / "policy", whole / "policy")
    assert fake.figures(run / "metrics.jsonl") == fake.figures(whole / "metrics.jsonl")


def test_a_run_of_all_stages(recipe_file, tmp_path, fails):
    fails(["run", recipe_file], 5000)
    assert not (tmp_path / "run/policy").exists()
    assert main(["run", str(recipe_file)]) == 0


@pytest.mark.parametrize("count", [0, 300, 20_000])
def test_questions(tmp_path, fails, count):
    """In the process that asks, and in the simulators, where a memory map would end in SIGBUS."""
    words = ["data", "questions", "tabletop:reach", "2", str(tmp_path / "made"), "--workers", "1"]
    fails(words, count)
    assert list(tmp_path.iterdir()) == []


def test_questions_after_there_is_room(tmp_path, fails):
    words = ["data", "questions", "tabletop:reach", "3", str(tmp_path / "made"), "--workers", "1"]
    fails(words, 50_000)
    assert main(words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    images = np.load(tmp_path / "made/images.npy", allow_pickle=False)
    assert images.shape == (3, 96, 96, 3) and all(image.std() > 5 for image in images)


def test_questions_need_room_before_they_begin(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 10}))
    assert main(["data", "questions", "tabletop:reach", "4", str(tmp_path / "made")]) == 2
    assert "4 images in" in capfd.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 100, 3000])
def test_demos(tmp_path, fails, count):
    fails(["data", "demos", "tabletop:reach", "1", tmp_path / "made", "--image-size", "32", "--workers", "1"], count)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_pairs(dataset, tmp_path, monkeypatch, capfd):
    """The index and the facts beside it are written both or not at all."""
    from burnish.data import pairs

    (tmp_path / "labels.jsonl").write_text('{"chosen": [0, 0], "rejected": [2, 0]}\n')
    root = fake.make_dataset(tmp_path / "set", episodes=3)
    before = sorted(root.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "pairs.jsonl")

    words = ["data", "pairs", "--labels", str(tmp_path / "labels.jsonl"), "--root", str(root), "--state-tolerance", "9",
             "--image-tolerance", "255"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "write_text", full)
        assert main(words) == 2
    assert "no room left" in capfd.readouterr().err and sorted(root.iterdir()) == before
    assert main(words) == 0


def test_an_index(tmp_path, fails):
    import dataset_fakes

    root = dataset_fakes.write_v3(tmp_path / "set", pictures=True)
    words = [str(word) for word in ("data", "index", root, "--encoder", "pixels", "-o", tmp_path / "index")]
    assert main(words) == 0  # so that its pictures are decoded
    for count in (0, 20_000):
        for folder in (tmp_path / "index", root / ".vectors"):
            shutil.rmtree(folder, ignore_errors=True)
        fails(words, count)
        assert not (tmp_path / "index").exists()
    assert main(words) == 0


def test_a_retrieval_head_and_what_is_selected_by_it(tmp_path, fails):
    import dataset_fakes

    root, out = dataset_fakes.write_v3(tmp_path / "set", pictures=True), tmp_path / "out"
    small = ["--encoder", "pixels", "--epochs=1", "--hidden=8", "--width=4", "--batch=8"]
    words = [str(word) for word in ("method", "retrieve", "train", root, "-o", out, *small)]
    assert main(words) == 0  # so that its pictures are decoded
    for count in (0, 300, 5000, 20_000):
        for folder in (out, root / ".vectors"):
            shutil.rmtree(folder, ignore_errors=True)
        fails(words, count)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert main(words) == 0
    select = ["data", "select", tmp_path / "index", "2", "-o", tmp_path / "picked.json"]
    assert main(["data", "index", str(root), "--encoder", "pixels", "-o", str(tmp_path / "index")]) == 0
    fails(select, 3)
    assert not (tmp_path / "picked.json").exists() and not list(tmp_path.glob(".picked*"))


@pytest.mark.parametrize("count", [0, 1000])
def test_a_profile(tmp_path, fails, count):
    words = ["policy", "profile", "small", "--repeats", "1", "--warmup", "0", "--output", tmp_path / "profile.json"]
    fails(words, count)
    assert list(tmp_path.iterdir()) == []


def test_study(recipe_file, tmp_path, monkeypatch, fails):
    """The second of two runs meets the full disk; the first one stays, and is not trained again."""
    from burnish.experiments import study

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "evaluate_as", lambda *given, **named: SimpleNamespace(overall="0 of 0"))
    values = yaml.safe_load(recipe_file.read_text())
    values["eval"]["env"] = "tabletop:reach"
    recipe_file.write_text(yaml.safe_dump(values))
    content = {"name": "two", "recipe": "recipe.yaml", "seeds": [0, 1], "variants": {"plain": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    runs, words = tmp_path / "runs/two", ["run", "study.yaml"]
    for count in (0, 300, 5000):
        fails(words, count)
        assert not (runs / "plain-0/policy").exists()
    assert main([*words, "--seeds", "0"]) == 0
    before = (runs / "plain-0/policy/model.safetensors").stat()
    fails(words, 5000)
    assert not (runs / "plain-1/policy").exists() and not list(runs.rglob("*.new"))
    assert main(words) == 0 and (runs / "plain-0/policy/model.safetensors").stat() == before


@pytest.mark.parametrize("count", [0, 100, 5000, 150_000])
@pytest.mark.parametrize("command", ["merge", "extract"])
def test_task_vectors(tmp_path, fails, command, count):
    import weight_files

    make = weight_files.FolderMaker(tmp_path)
    base, tuned = make("base", 0), make("tuned", 1, of="base")
    words = ["weights", command, base, *(["--tuned"] if command == "merge" else []), tuned, "-o", tmp_path / "out"]
    fails(words, count)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
    assert main([str(word) for word in [*words, "--verify"]]) == 0


@pytest.mark.parametrize("count", [0, 200, 1000, 3000])
def test_pairs_of_rollouts(tmp_path, capsys, count):
    """In simulator processes, and where the data set is put together."""
    import pair_fakes

    from burnish.core.errors import BurnishError
    from burnish.evaluate.pairs import collect

    pair_fakes.register()

    def make(root):
        return collect(pair_fakes.make_policy(), "walk:far", root, states=4, rollouts=3, workers=1, progress=False,
                       make=pair_fakes.make_env)  # fmt: skip

    with most_bytes(count), pytest.raises(BurnishError, match="no room left while writing") as caught:
        make(tmp_path / "made")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()
    assert make(tmp_path / "made").episodes == 12
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
