import errno
import os
import shutil

import pytest
from safetensors import SafetensorError

from burnish.core import files
from burnish.core.errors import BurnishError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path):
    files.write_text(tmp_path / "a", "one")
    files.write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two" and names(tmp_path) == ["a"]


def test_nothing_is_written_through_a_link_that_lay_there(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / f".a.{os.getpid()}").symlink_to(tmp_path / "mine")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()


def test_the_earlier_folder_outlives_a_writer_killed_between_its_renames(tmp_path):
    (tmp_path / ".x.old").mkdir()
    (tmp_path / ".x.old/a").write_text("earlier")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "x"):
        raise RuntimeError
    assert (tmp_path / "x/a").read_text() == "earlier" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    for name in (".x.mine", ".x.old.txt", ".x.2024", ".xy.new"):
        (tmp_path / name).mkdir()
    for name in (".x.gone", ".x.new", ".x.old"):
        (tmp_path / name).mkdir()
    with files.new_folder(tmp_path / "x"):
        pass
    assert names(tmp_path) == [".x.2024", ".x.mine", ".x.old.txt", ".xy.new", "x"]


def test_a_sweep_takes_what_killed_writers_left_of_any_folder(tmp_path):
    for name in (".000004.gone", ".000008.new", ".000008.old", ".notes", "000012", ".000012.old"):
        (tmp_path / name).mkdir()
    files.sweep(tmp_path)
    assert names(tmp_path) == [".notes", "000008", "000012"]
    (tmp_path / ".a[1].gone").mkdir()
    files.sweep(tmp_path, "a[1]")
    files.sweep(tmp_path / "none")
    assert names(tmp_path) == [".notes", "000008", "000012"]


def test_new_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("h")
        raise RuntimeError
    assert names(tmp_path) == []
    with files.new_folder(tmp_path / "x") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not (tmp_path / "x").exists()
    with files.new_folder(tmp_path / "x") as folder:
        (folder / "b").write_text("2")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["b"]


def test_leftovers_of_a_killed_writer_go_away(tmp_path):
    (tmp_path / ".x.new").mkdir()
    (tmp_path / ".x.new" / "half").write_text("h")
    with files.new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_line_whoever_writes(tmp_path, error):
    with pytest.raises(BurnishError, match="no room left"), files.new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), files.disk_errors(tmp_path):
        (tmp_path / "none").read_text()


def test_require_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    files.require_space(tmp_path / "not" / "there", 1, "a thing")
    with pytest.raises(BurnishError, match="a thing needs"):
        files.require_space(tmp_path, free * 2, "a thing")


def test_point_to_moves_at_once(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        files.point_to(tmp_path / "last", name)
        assert (tmp_path / "last").resolve().name == name
    assert names(tmp_path) == ["1", "2", "last"]
