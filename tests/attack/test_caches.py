"""Caches of frames and of teacher features that were cut, swapped, linked away or replaced by something else."""

import json
import os
import shutil

import dataset_fakes as fakes
import feature_fakes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.core.errors import BurnishError
from burnish.data.loader import RobotData

MINE = b"mine"


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """A data set with its frames decoded beside it. Do not write into it."""
    root = fakes.write_v3(tmp_path_factory.mktemp("decoded") / "set")
    read(root)
    return root


def read(root, **options):
    return RobotData(root, [], 4, 2, 0, augmented=False, progress=False, **options)


@pytest.fixture
def root(decoded, tmp_path):
    return shutil.copytree(decoded, tmp_path / "set")


def arrays(root):
    (path,) = (root / ".frames").glob("*.npy")
    return path


def noted(root):
    return arrays(root).with_suffix(".json")


def put(make):
    """Replaces the array by what `make` puts in its place."""

    def change(root):
        path = arrays(root)
        content = path.read_bytes()
        path.unlink()
        make(path, content)

    return change


def note(change):
    def edit(root):
        value = json.loads(noted(root).read_text())
        change(value)
        noted(root).write_text(json.dumps(value))

    return edit


def outside(path, content):
    """A link to a file of the user's."""
    other = path.parents[2] / "mine.npy"
    other.write_bytes(content)
    path.symlink_to(other)


def swapped(path, content):
    """The pictures of another data set of the same size."""
    header = content[: len(content) - 18 * 32 * 32 * 3]
    path.write_bytes(header + bytes(18 * 32 * 32 * 3))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def archive(path, content):
    np.savez(path.with_suffix(".npz"), np.zeros(3))
    path.with_suffix(".npz").rename(path)


FRAMES = {
    "empty": put(lambda path, content: path.write_bytes(b"")),
    "cut": put(lambda path, content: path.write_bytes(content[:-5])),
    "longer": put(lambda path, content: path.write_bytes(content + b"x")),
    "no array": put(lambda path, content: path.write_bytes(b"no array")),
    "zeros": put(swapped),
    "floats": put(lambda path, content: np.save(path, np.zeros((18, 32, 32, 3)))),
    "turned": put(lambda path, content: np.save(path, np.asfortranarray(np.zeros((18, 32, 32, 3), np.uint8)))),
    "another size": put(lambda path, content: np.save(path, np.zeros((18, 16, 16, 3), np.uint8))),
    "objects": put(lambda path, content: np.save(path, np.array([Bomb()] * 18, dtype=object))),
    "an archive": put(archive),
    "a pipe": put(lambda path, content: os.mkfifo(path)),
    "a link away": put(outside),
    "a device": put(lambda path, content: path.symlink_to("/dev/zero")),
    "a link to itself": put(lambda path, content: path.symlink_to(path)),
    "a header of a terabyte": put(lambda path, content: path.write_bytes(content.replace(b"(18,", b"(99,", 1))),
    "gone": put(lambda path, content: None),
    "note gone": lambda root: noted(root).unlink(),
    "note cut": lambda root: noted(root).write_text("{"),
    "note a list": lambda root: noted(root).write_text("[]"),
    "note of another data set": note(lambda one: one.update(data="0" * 16)),
    "note of another version": note(lambda one: one.update(version=1)),
    "note of another camera": note(lambda one: one.update(camera="observation.images.wrist")),
    "note of fewer frames": note(lambda one: one["shape"].__setitem__(0, 3)),
    "note without a digest": note(lambda one: one.pop("digest")),
    "note with another digest": note(lambda one: one.update(digest="0" * 16)),
    "note of what lacks": note(lambda one: one.update(lacking=[0])),
    "note of text that lacks": note(lambda one: one.update(lacking="x")),
    "note of a list that lacks": note(lambda one: one.update(lacking=[[1]])),
    "note a pipe": lambda root: (noted(root).unlink(), os.mkfifo(noted(root))),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_decoded_again(name, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FRAMES[name](root)
    mine = tmp_path / "mine.npy"
    before = mine.read_bytes() if mine.exists() else b""
    fakes.assert_reads_right(read(root))
    assert arrays(root).is_file() and not arrays(root).is_symlink()
    assert (mine.read_bytes() if mine.exists() else b"") == before and not (tmp_path / "ran").exists()


def test_frames_that_are_whole_are_not_decoded_again(root, monkeypatch):
    from burnish.data import frames

    monkeypatch.setattr(frames, "_build", lambda *_: pytest.fail("decoded again"))
    fakes.assert_reads_right(read(root))


TRAIN = ["train", "--policy.path=fake", "--train.steps=1"]


@pytest.mark.parametrize("what", ["link", "file", "pipe", "array is a folder"])
def test_places_of_frames(what, root, tmp_path, refused, monkeypatch):
    """A link in a downloaded folder must not choose where gigabytes go, and which older files are removed."""
    from fake import register

    register(monkeypatch.setattr)
    beside, mine = root / ".frames", tmp_path / "mine"
    mine.mkdir()
    (mine / f"{fakes.FRONT}-other.json").write_bytes(MINE)
    if what == "array is a folder":
        path = arrays(root)
        path.unlink()
        path.mkdir()
        (path / "thesis.tex").write_bytes(MINE)
    else:
        shutil.rmtree(beside)
        makers = {"link": lambda: beside.symlink_to(mine), "file": lambda: beside.write_bytes(MINE),
                  "pipe": lambda: os.mkfifo(beside)}  # fmt: skip
        makers[what]()
    refused([*TRAIN, f"--data.root={root}", f"--output={tmp_path / 'run'}"], ".frames")
    assert os.listdir(mine) == [f"{fakes.FRONT}-other.json"]
    assert what != "array is a folder" or (path / "thesis.tex").read_bytes() == MINE


def test_a_stated_place_may_be_a_link(root, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    fakes.assert_reads_right(read(root, cache_dir=str(tmp_path / "link")))
    assert len(os.listdir(tmp_path / "disk")) == 2


@pytest.fixture(scope="module")
def data(dataset):
    return feature_fakes.make_data(dataset)


@pytest.fixture(scope="module")
def filled(data, edges, tmp_path_factory):
    """A cache of two layers. Do not write into it."""
    folder = tmp_path_factory.mktemp("features") / "cache"
    feature_fakes.fill(folder, feature_fakes.make_key(data), data)
    return folder


def replace(name, make):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        make(folder / name, content)

    return change


def swap(one, other):
    def change(folder):
        (folder / one).rename(folder / "x")
        (folder / other).rename(folder / one)
        (folder / "x").rename(folder / other)

    return change


def meta(change):
    def edit(folder):
        value = json.loads((folder / "meta.json").read_text())
        value = change(value) or value
        (folder / "meta.json").write_text(json.dumps(value))

    return edit


def statistics(change):
    def edit(folder):
        tensors = load_file(folder / "statistics.safetensors")
        change(tensors)
        save_file(tensors, folder / "statistics.safetensors")

    return edit


LAYER = "layer-0.npy"
FEATURES = {
    "layers swapped": swap("layer-0.npy", "layer-1.npy"),
    "empty": replace(LAYER, lambda path, content: path.write_bytes(b"")),
    "cut": replace(LAYER, lambda path, content: path.write_bytes(content[:-2])),
    "zeros": replace(LAYER, lambda path, content: path.write_bytes(content[:128] + bytes(len(content) - 128))),
    "gone": replace(LAYER, lambda path, content: None),
    "floats": replace(LAYER, lambda path, content: np.save(path, np.load(path.parent / "layer-1.npy").astype("f4"))),
    "objects": replace(LAYER, lambda path, content: np.save(path, np.array([Bomb()], dtype=object))),
    "an archive": replace(LAYER, archive),
    "a pipe": replace(LAYER, lambda path, content: os.mkfifo(path)),
    "a link away": replace(LAYER, outside),
    "a device": replace(LAYER, lambda path, content: path.symlink_to("/dev/zero")),
    "a folder": replace(LAYER, lambda path, content: path.mkdir()),
    "statistics gone": replace("statistics.safetensors", lambda path, content: None),
    "statistics cut": replace("statistics.safetensors", lambda path, content: path.write_bytes(content[:-3])),
    "statistics a pickle": replace("statistics.safetensors", lambda path, content: path.write_bytes(b"\x80\x04cos\n.")),
    "statistics a pipe": replace("statistics.safetensors", lambda path, content: os.mkfifo(path)),
    "statistics NaN": statistics(lambda one: one["mean.0"].fill_(float("nan"))),
    "statistics of others": statistics(lambda one: one["scale.0"].mul_(2)),
    "statistics lack": statistics(lambda one: one.pop("mean.1")),
    "statistics of another width": statistics(lambda one: one.update({"scale.0": torch.ones(3)})),
    "statistics of integers": statistics(lambda one: one.update({"scale.0": torch.ones(12, dtype=torch.int64)})),
    "meta cut": lambda folder: (folder / "meta.json").write_text("{"),
    "meta a list": meta(lambda one: [1]),
    "meta without shapes": meta(lambda one: one.pop("shapes") and None),
    "meta of numbers for shapes": meta(lambda one: one.update(shapes=[1])),
    "meta of other shapes": meta(lambda one: one["shapes"].update({"0": [1, 1, 2, 2, 12]})),
    "meta without digests": meta(lambda one: one.pop("digests") and None),
    "meta of text for digests": meta(lambda one: one.update(digests="x")),
    "meta of another digest": meta(lambda one: one["digests"].update({LAYER: "0" * 16})),
    "key null": meta(lambda one: one.update(key=None)),
    "key of another teacher": meta(lambda one: one["key"].update(teacher={"name": "other"})),
    "key of another data set": meta(lambda one: one["key"].update(data="0" * 16)),
    "key of another version": meta(lambda one: one["key"].update(version=1)),
    "meta a pipe": lambda folder: ((folder / "meta.json").unlink(), os.mkfifo(folder / "meta.json")),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_are_not_what_was_written(name, filled, data, edges, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(filled, tmp_path / "a/b/cache")
    FEATURES[name](folder)
    with pytest.raises(BurnishError) as caught:
        feature_fakes.fill(folder, feature_fakes.make_key(data), data)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_features_that_are_whole_are_taken(filled, data, edges, tmp_path):
    folder = shutil.copytree(filled, tmp_path / "moved")
    cache = feature_fakes.fill(folder, feature_fakes.make_key(data), data)
    assert torch.isfinite(cache.read(torch.arange(3))[0]).all()
