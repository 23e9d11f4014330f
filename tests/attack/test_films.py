"""Pictures and films of a data set that would call a program, name other files, or lie where a name looks like an
address."""

import os
import shutil
from pathlib import Path

import dataset_fakes as fakes
import numpy as np
import pytest
from dataset_fakes import DATA, FRONT, VIDEO, edit_table

from burnish.data.loader import RobotData


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {"v3": fakes.write_v3(folder / "v3"), "pictures": fakes.write_v3(folder / "pictures", pictures=True)}


@pytest.fixture
def copy(good, tmp_path, monkeypatch):
    from fake import register

    register(monkeypatch.setattr)
    return lambda kind: Path(shutil.copytree(good[kind], tmp_path / "set"))


def test_no_program_is_called_for_a_picture(copy, refused, monkeypatch):
    """Pillow would hand EPS to whatever is called gs."""
    program = copy("pictures").parent / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{program.parent}/ran'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    root = program.parents[1] / "set"
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    edit_table(root / DATA, lambda table: table[FRONT].__setitem__(7, {"bytes": data, "path": None}))
    refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={root.parent / 'run'}"], "frame 2")
    assert not (program.parent / "ran").exists()


def test_a_playlist_is_no_video(copy, refused):
    root = copy("v3")
    (root / VIDEO).rename((root / VIDEO).with_name("other.mp4"))
    (root / VIDEO).write_text("ffconcat version 1.0\nfile other.mp4\n")
    refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={root.parent / 'run'}"], "unreadable")


def test_a_time_is_no_protocol(copy, tmp_path, monkeypatch):
    """A relative folder such as 10:30, which a library of videos takes for an address."""
    from burnish.data.frames import open_frames
    from burnish.evaluate.simulators import write_video

    root = copy("v3").rename(tmp_path / "10:30")
    monkeypatch.chdir(root.parent)
    data = RobotData(Path(root.name), [], 4, 2, 0, augmented=False, progress=False, cache_dir=str(tmp_path / "cache"))
    fakes.assert_reads_right(data)
    streamed = open_frames(Path(root.name), [FRONT], progress=False, cache_gb=0).arrays[FRONT]
    assert streamed[3].shape == (32, 32, 3)
    write_video(Path("10:30/x.mp4"), [np.zeros((32, 32, 3), np.uint8)] * 3, 10)
    assert Path("10:30/x.mp4").stat().st_size > 0
