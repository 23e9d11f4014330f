"""Output folders: ours or nobody's, and one writer at a time."""

import multiprocessing
import os
from contextlib import suppress

import pytest

from burnish.core import outputs
from burnish.core.errors import BurnishError
from burnish.core.outputs import MARK, claim, kind_of, mark, require_own, share


def test_a_new_an_empty_and_our_own_folder_are_taken(tmp_path):
    for _ in range(2):
        with claim(tmp_path / "a" / "run", "training run") as folder:
            assert kind_of(folder) == "training run"
    (tmp_path / "empty").mkdir()
    with claim(tmp_path / "empty", "evaluation"):
        pass


def test_what_is_not_ours_is_not_touched(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "thesis.tex").write_text("x")
    told = pytest.raises(BurnishError, match="holds policy, thesis.tex, which this would overwrite")
    with told, claim(tmp_path, "training run"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["policy", "thesis.tex"]


def test_another_kind_of_ours_is_not_touched_either(tmp_path):
    with claim(tmp_path / "a", "evaluation") as folder:
        (folder / "summary.json").touch()
    with pytest.raises(BurnishError, match="holds what burnish made as .evaluation"):
        require_own(tmp_path / "a", "training run")


def test_a_folder_of_before_is_told_by_its_files(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    with claim(tmp_path, "training run", lambda folder: (folder / "train.json").is_file()):
        pass
    assert kind_of(tmp_path) == "training run"


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BurnishError, match="is a file"), claim(tmp_path / "file" / below, "evaluation"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_marker_cut_off_at_its_start_counts_as_empty(tmp_path):
    (tmp_path / MARK).touch()
    with claim(tmp_path, "evaluation"):
        assert kind_of(tmp_path) == "evaluation"


def _hold(folder, ready, done):
    with claim(folder, "evaluation"):
        ready.set()
        done.wait(30)


def test_one_process_at_a_time(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path / "out", ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(BurnishError, match="another process is writing"), claim(tmp_path / "out", "evaluation"):
            pass
    finally:
        done.set()
        other.join(30)
    with claim(tmp_path / "out", "evaluation"), claim(tmp_path / "out", "evaluation"):
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path / "out", ready, done))
    other.start()
    assert ready.wait(30)
    other.kill()
    other.join(30)
    with claim(tmp_path / "out", "evaluation"):
        pass


def test_a_folder_of_marked_folders_is_nobodys(tmp_path):
    """An evaluation of the base may come before the training: runs/x/eval/base, then runs/x."""
    with claim(tmp_path / "x/eval/base", "evaluation") as folder:
        (folder / "summary.json").touch()
    with claim(tmp_path / "x", "training run"):
        pass
    (tmp_path / "y/eval/base").mkdir(parents=True)
    (tmp_path / "y/eval/base/notes.txt").touch()
    with pytest.raises(BurnishError, match="holds eval"):
        require_own(tmp_path / "y", "training run")


@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path, fails):
    with suppress(RuntimeError), claim(tmp_path / "a/b/c", "evaluation"):
        if fails:
            raise RuntimeError
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with claim(tmp_path / "mine", "evaluation"):
        pass
    assert os.listdir(tmp_path) == ["mine"]


def test_several_processes_share_a_folder_of_one_kind(tmp_path):
    share(tmp_path / "study", "study")
    with claim(tmp_path / "study/plain-0", "training run"):
        share(tmp_path / "study", "study")
    (tmp_path / "study/data.json").touch()
    with pytest.raises(BurnishError, match="what burnish made as .study"):
        share(tmp_path / "study", "evaluation")
    (tmp_path / "file").touch()
    with pytest.raises(BurnishError, match="holds file, study"):
        share(tmp_path, "study")


@pytest.mark.parametrize("what", ["pipe", "folder", "link", "words", "list"])
def test_an_odd_marker_is_one_line(tmp_path, what):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / MARK
    (tmp_path / "elsewhere").write_text("mine")
    {
        "pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "words": lambda: path.write_text("{"), "list": lambda: path.write_text("[1]"),
    }[what]()  # fmt: skip
    (tmp_path / "out/other").touch()
    with pytest.raises(BurnishError), claim(tmp_path / "out", "evaluation"):
        pass
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("name", ["link", "link/below", "x" * 300, "a\0b"])
def test_places_that_can_be_no_folder(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(BurnishError), claim(tmp_path / name, "evaluation"):
        pass
    assert os.listdir(tmp_path) == ["link"]


def test_a_lock_on_a_marker_that_is_gone_is_none(tmp_path, monkeypatch):
    """The holder may remove its folder between our opening of the marker and our lock."""
    plain, calls = outputs._lock, []

    def lock(handle, folder):
        if not calls:
            (folder / MARK).unlink()
            folder.rmdir()
        calls.append(handle)
        plain(handle, folder)

    monkeypatch.setattr(outputs, "_lock", lock)
    with claim(tmp_path / "out", "evaluation"):
        assert kind_of(tmp_path / "out") == "evaluation"
    assert len(calls) == 2


def test_mark_is_what_claim_looks_for(tmp_path):
    mark(tmp_path, "data set")
    require_own(tmp_path, "data set")
