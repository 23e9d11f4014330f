"""Depth that lies beside a data set, for the teacher `geometry`: whatever is in its files ends in one line."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "methods" / "align"))

from align_student import load_student  # noqa: E402

from burnish.data.frames import npy_header  # noqa: E402

POSE = {"position": [0.0, 0.0, 1.0], "rotation": [1.0, 0, 0, 0, 1, 0, 0, 0, 1], "fovy": 45.0}
LENGTHS = (9, 10, 11)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    import burnish.policies

    monkeypatch.setattr(burnish.policies, "load_policy", load_student)


@pytest.fixture
def root(dataset, tmp_path):
    """The data set with depth and poses as demonstrations recorded with --geometry have them."""
    root = tmp_path / "data"
    shutil.copytree(dataset, root, ignore=shutil.ignore_patterns(".teachers"))
    truth = root / "ground_truth"
    (truth / "goal").mkdir(parents=True)
    rows = []
    for episode, length in enumerate(LENGTHS):
        name = f"goal/{episode:06d}"
        rows.append({"episode_index": episode, "task_id": "libero:goal/0", "length": length, "frames": f"{name}.jsonl"})
        lines = [json.dumps({"frame": k, "cameras": {"front": POSE}}) for k in range(length)]
        (truth / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        depth = np.random.default_rng(episode).random((length, 32, 32)) + 0.5
        np.save(truth / f"{name}.front.depth.npy", depth.astype(np.float16))
    (truth / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def words(root, output, options="cache: 'off'"):
    return [
        "train", f"--data.root={root}", f"--output={output}", "--policy.path=fake", "--train.steps=1",
        "--train.batch_size=2", "--train.self_check=false",
        f"--objectives=[{{name: align, teacher: geometry, {options}}}]",
    ]  # fmt: skip


def test_depth_as_it_should_be(root, tmp_path, accepted):
    accepted(words(root, tmp_path / "run"))


def episodes(truth, **fields):
    path = truth / "episodes.jsonl"
    rows = [{**json.loads(line), **fields} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def frames(truth, edit):
    for path in truth.glob("goal/*.jsonl"):
        lines = [edit(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def depths(truth, edit):
    for path in truth.glob("goal/*.npy"):
        edit(path)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def outside(path):
    other = path.parent.parent.parent / path.name
    shutil.move(path, other)
    path.symlink_to(other)


def camera(**fields):
    return lambda facts: {**facts, "cameras": {"front": {**POSE, **fields}}}


CASES = {
    "episodes empty": lambda t: (t / "episodes.jsonl").write_text(""),
    "episodes of lists": lambda t: (t / "episodes.jsonl").write_text("[1]\n"),
    "episodes cut": lambda t: (t / "episodes.jsonl").write_text('{"episode_index": 0, "len'),
    "episodes a pipe": lambda t: pipe(t / "episodes.jsonl"),
    "episodes without lengths": lambda t: (t / "episodes.jsonl").write_text('{"episode_index": 0}\n'),
    "lengths that are words": lambda t: episodes(t, length="nine"),
    "lengths that are negative": lambda t: episodes(t, length=-3),
    "lengths too short": lambda t: episodes(t, length=1),
    "lengths too long": lambda t: episodes(t, length=10**9),
    "frames outside": lambda t: episodes(t, frames="../../../etc/passwd"),
    "frames absolute": lambda t: episodes(t, frames="/etc/passwd"),
    "frames a number": lambda t: episodes(t, frames=3),
    "frames not there": lambda t: episodes(t, frames="goal/none.jsonl"),
    "frames of lists": lambda t: frames(t, lambda facts: [1]),
    "frames without cameras": lambda t: frames(t, lambda facts: {"frame": facts["frame"]}),
    "frames with cameras in a list": lambda t: frames(t, lambda facts: {**facts, "cameras": [1]}),
    "frames a pipe": lambda t: [pipe(path) for path in t.glob("goal/*.jsonl")],
    "frames too few": lambda t: [path.write_text("{}\n") for path in t.glob("goal/*.jsonl")],
    "no pose": lambda t: frames(t, lambda facts: {**facts, "cameras": {}}),
    "a pose of numbers": lambda t: frames(t, lambda facts: {**facts, "cameras": {"front": 3}}),
    "a rotation of four": lambda t: frames(t, camera(rotation=[1, 0, 0, 0])),
    "a rotation of words": lambda t: frames(t, camera(rotation=["a"] * 9)),
    "a position of two": lambda t: frames(t, camera(position=[1.0, 2.0])),
    "a field of view of words": lambda t: frames(t, camera(fovy="wide")),
    "a field of view that is none": lambda t: frames(t, camera(fovy=float("nan"))),
    "depth empty": lambda t: depths(t, lambda path: path.write_bytes(b"")),
    "depth cut": lambda t: depths(t, lambda path: path.write_bytes(path.read_bytes()[:200])),
    "depth pickled": lambda t: depths(t, lambda path: np.save(path, np.array([{}] * 11, object), allow_pickle=True)),
    "depth a pipe": lambda t: depths(t, pipe),
    "depth a link outside": lambda t: depths(t, outside),
    "depth of one row": lambda t: depths(t, lambda path: np.save(path, np.ones((1, 32, 32), np.float16))),
    "depth flat": lambda t: depths(t, lambda path: np.save(path, np.ones(11, np.float16))),
    "depth of words": lambda t: depths(t, lambda path: np.save(path, np.full((11, 32, 32), "near"))),
    "depth of 10^22 rows": lambda t: depths(t, lambda path: path.write_bytes(npy_header((10**22, 32, 32), np.float16))),
    "depth not finite": lambda t: depths(t, lambda path: np.save(path, np.full((11, 32, 32), np.nan, np.float16))),
}


@pytest.mark.parametrize("case", CASES)
def test_depth(root, tmp_path, refused, case):
    CASES[case](root / "ground_truth")
    refused(words(root, tmp_path / "run"))
