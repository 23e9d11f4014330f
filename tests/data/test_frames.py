import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake import CAMERA, make_dataset

from burnish.core import files
from burnish.core.errors import BurnishError
from burnish.data import frames
from burnish.data.frames import dataset_hash, open_frames


@pytest.fixture
def own(dataset, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(dataset, tmp_path / "own", ignore=shutil.ignore_patterns(".frames"))
    return tmp_path / "own"


def video(root):
    return next((root / "videos").rglob("*.mp4"))


def cached(root):
    return sorted(p.name for p in (root / ".frames").iterdir()) if (root / ".frames").is_dir() else []


def test_rows_agree_with_lerobot(own):
    from lerobot.datasets import LeRobotDataset

    cache = open_frames(own, [CAMERA], progress=False)
    reader = LeRobotDataset("local/fake", root=own, video_backend="pyav")
    array = cache.arrays[CAMERA]
    assert array.shape == (len(reader), 32, 32, 3) and array.dtype == np.uint8
    for i in (0, 8, 9, 20, len(reader) - 1):  # 9 is the first frame of the second episode
        theirs = (reader[i][CAMERA].permute(1, 2, 0).numpy() * 255).round().astype(int)
        assert np.abs(array[i].astype(int) - theirs).max() <= 1
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_second_opening_decodes_nothing(own, monkeypatch):
    open_frames(own, [CAMERA], progress=False)
    monkeypatch.setattr(frames, "_build", None)
    open_frames(own, [CAMERA], progress=False)


def test_runs_that_start_together_decode_once(own, monkeypatch):
    built, build = [], frames._build

    def slow(*args):
        built.append(args)
        time.sleep(0.2)
        build(*args)

    monkeypatch.setattr(frames, "_build", slow)
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: open_frames(own, [CAMERA], progress=False), range(3)))
    assert len(built) == 1
    assert all(np.array_equal(one.arrays[CAMERA], opened[0].arrays[CAMERA]) for one in opened)


def test_smaller_frames_are_means(own):
    full = open_frames(own, [CAMERA], progress=False).arrays[CAMERA]
    half = open_frames(own, [CAMERA], image_size=16, progress=False).arrays[CAMERA]
    assert half.shape == (len(full), 16, 16, 3)
    means = full.reshape(len(full), 16, 2, 16, 2, 3).astype(float).mean((2, 4))
    assert np.abs(half - means).max() <= 1


def test_a_changed_data_set_is_decoded_anew(own):
    before = open_frames(own, [CAMERA], progress=False).hash
    with open(own / "meta" / "info.json", "a") as file:
        file.write(" ")
    after = open_frames(own, [CAMERA], progress=False).hash
    assert before != after == dataset_hash(own)
    assert cached(own) == [f"{CAMERA}-32x32-{after}.json", f"{CAMERA}-32x32-{after}.npy"]


def test_a_cut_cache_is_refused_and_decoded_anew(own):
    open_frames(own, [CAMERA], progress=False)
    path = next((own / ".frames").glob("*.npy"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (own / ".frames" / f".{path.name}.123").write_bytes(b"left by a killed process")
    assert open_frames(own, [CAMERA], progress=False).arrays[CAMERA].tobytes() in content
    path.with_suffix(".json").write_text(json.dumps({"version": 0}))
    open_frames(own, [CAMERA], progress=False)
    assert len(cached(own)) == 2


def test_unreadable_videos(own):
    path = video(own)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BurnishError, match=f"video .*{path.name}"):
        open_frames(own, [CAMERA], progress=False)
    path.write_bytes(b"no video at all" * 100)
    with pytest.raises(BurnishError, match="unreadable"):
        open_frames(own, [CAMERA], progress=False)
    path.unlink()
    with pytest.raises(BurnishError, match="missing"):
        open_frames(own, [CAMERA], progress=False)
    assert cached(own) == []


def test_wrong_image_size(own, tmp_path):
    other = make_dataset(tmp_path / "other", size=48)
    shutil.copy(video(other), video(own))
    with pytest.raises(BurnishError, match="48x48.*32x32"):
        open_frames(own, [CAMERA], progress=False)
    assert cached(own) == []


def test_full_disk(own, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames.os, "pwrite", full)
    with pytest.raises(BurnishError, match="no room left"):
        open_frames(own, [CAMERA], progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(BurnishError, match="MB left"):
        open_frames(own, [CAMERA], progress=False)
    assert cached(own) == []


def test_no_data_set_and_no_camera(own, tmp_path):
    with pytest.raises(BurnishError, match="no data set"):
        open_frames(tmp_path / "nowhere", [CAMERA])
    with pytest.raises(BurnishError, match="no camera 'observation.images.side'"):
        open_frames(own, ["observation.images.side"])
    info = json.loads((own / "meta" / "info.json").read_text())
    (own / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    with pytest.raises(BurnishError, match="data_path is"):  # v2.1 has other file names
        open_frames(own, [CAMERA])


def test_data_sets_that_may_not_be_written_share_a_cache_and_use_what_they_have(own, tmp_path, monkeypatch, caplog):
    whole, other = tmp_path / "whole", tmp_path / "other"
    for copy in (whole, other):
        shutil.copytree(own, copy)
    with open(other / "meta" / "info.json", "a") as file:
        file.write(" ")
    open_frames(whole, [CAMERA], progress=False)
    access, cache = os.access, tmp_path / "home/burnish/frames"
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and mode != os.W_OK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    open_frames(whole, [CAMERA], progress=False)
    assert caplog.text == "" and not cache.exists()
    for root in (own, other):
        open_frames(root, [CAMERA], progress=False)
    assert len(list(cache.glob("*.npy"))) == len(list(cache.glob("*.json"))) == 2 and "may not be" in caplog.text
