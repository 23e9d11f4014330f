"""Demonstrations: what is recorded is what happened, LeRobot reads it, and a kill at any instant changes nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.data import assemble as assembling
from burnish.data.demos import _Share, _share_out, make_demos
from burnish.data.inspect import inspect_dataset
from burnish.data.record import colour_histogram
from burnish.data.spool import Recording, StoredRecording, write_recording
from burnish.envs.base import make_env

SIZE = 64
SETTINGS = dict(image_size=SIZE, cameras=("front", "wrist"), seed=5, workers=2, geometry=True, progress=False)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return make_demos("tabletop:lift,reach", 5, tmp_path_factory.mktemp("demos") / "set", **SETTINGS)


@pytest.fixture(scope="module")
def dataset(demos):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("burnish/set", root=demos.root, video_backend="pyav")


def _table(demos) -> list[dict]:
    return [json.loads(line) for line in (demos.root / "ground_truth/episodes.jsonl").open()]


def test_episodes_are_shared_evenly_and_ordered_by_initial_state(demos):
    table = _table(demos)
    assert demos.episodes == len(table) == 5
    assert sorted(row["task_id"] for row in table) == ["tabletop:lift"] * 3 + ["tabletop:reach"] * 2
    assert [row["initial_state"] for row in table] == sorted(row["initial_state"] for row in table)
    assert min(row["initial_state"] for row in table) == SETTINGS["seed"]
    facts = json.loads((demos.root / "burnish_demos.json").read_text())
    low, high = facts["expert"]["wilson95"]
    assert 0 < low <= demos.success_rate <= high + 1e-12 and facts["versions"]["lerobot"]
    assert "expert solved 5 of 5" in str(demos) or demos.attempts > 5


def test_replaying_gives_the_recorded_states_actions_and_images(demos, dataset):
    row = _table(demos)[0]
    env = make_env(row["task_id"], SIZE)
    env.reset(row["initial_state"])
    expert = env.expert(row["initial_state"])
    lines = (demos.root / "ground_truth" / row["frames"]).read_text().splitlines()
    depth = np.load(demos.root / "ground_truth" / row["frames"].replace(".jsonl", ".front.depth.npy"))
    assert len(lines) == row["length"] == len(depth)
    for step in range(row["length"]):
        frame, now = dataset[step], env.observe(["front", "wrist"])
        assert frame["task"] == row["instruction"] == now.instruction
        assert np.array_equal(frame["observation.state"].numpy(), now.state)
        assert np.abs(depth[step] - env.geometry("front")["depth"]).max() < 1e-3
        assert json.loads(lines[step])["objects"] == json.loads(json.dumps(env.ground_truth()["objects"]))
        for camera in ("front", "wrist"):
            image = frame[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255
            assert np.abs(image - now.images[camera]).mean() < 4
        action = expert.act()
        assert np.array_equal(frame["action"].numpy(), action)
        solved = env.step(action)
    assert solved
    env.close()


def test_lerobot_reads_chunks_and_earlier_frames_at_episode_ends(demos):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    fps = json.loads((demos.root / "meta/info.json").read_text())["fps"]
    steps = {"action": [i / fps for i in range(8)], "observation.images.front": [-1 / fps, 0.0]}
    dataset = LeRobotDataset("burnish/set", root=demos.root, delta_timestamps=steps, video_backend="pyav")
    assert dataset.num_episodes == 5 and len(dataset) == demos.frames
    last = _table(demos)[0]["length"] - 1
    item = dataset[last]
    assert item["action"].shape[0] == 8 and item["action_is_pad"].tolist() == [False] + [True] * 7
    assert item["observation.images.front"].shape == (2, 3, SIZE, SIZE)


def test_statistics_are_those_of_all_frames(demos, dataset):
    stats = dataset.meta.stats
    for key in ("observation.state", "action"):
        values = np.array(dataset.hf_dataset[key])
        assert np.allclose(stats[key]["mean"], values.mean(0), atol=1e-6)
        assert np.allclose(stats[key]["std"], values.std(0), atol=1e-5)
        assert np.allclose(stats[key]["min"], values.min(0)) and np.allclose(stats[key]["max"], values.max(0))
        assert stats[key]["count"] == len(values)
    images = np.stack([dataset[i]["observation.images.front"].numpy() for i in range(0, len(dataset), 3)])
    assert np.allclose(stats["observation.images.front"]["mean"].ravel(), images.mean((0, 2, 3)), atol=0.02)
    assert dataset.meta.total_frames == demos.frames


def test_image_statistics_equal_lerobots_own():
    from lerobot.datasets.compute_stats import DEFAULT_QUANTILES, get_feature_stats

    generator = np.random.default_rng(0)
    frames = np.clip(generator.normal([60, 120, 200], 30, (4, 16, 16, 3)), 0, 255).astype(np.uint8)
    theirs = get_feature_stats(frames.transpose(0, 3, 1, 2), axis=(0, 2, 3), keepdims=True)
    ours = assembling.image_stats(colour_histogram(frames), 4, DEFAULT_QUANTILES)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        expected = value if name == "count" else value[0] / 255
        assert ours[name].shape == expected.shape
        assert np.allclose(ours[name], expected, atol=0.06 / 255), name  # their quantile bins are 0.05 wide


def test_the_same_call_again_changes_nothing_and_another_one_is_refused(demos):
    before = _content(demos.root)
    assert make_demos("tabletop:lift,reach", 5, demos.root, **SETTINGS) == demos
    assert _content(demos.root) == before
    with pytest.raises(BurnishError, match="made with seed 5; expected the same settings.*seed 6"):
        make_demos("tabletop:lift,reach", 5, demos.root, **{**SETTINGS, "seed": 6})


def test_some_demonstrations_miss_when_asked_to_and_the_data_set_says_which(tmp_path):
    root, options = tmp_path / "set", dict(image_size=32, workers=1, progress=False)
    made = make_demos("tabletop:lift", 8, root, misses=0.5, **options)
    rows = [json.loads(line) for line in (root / "ground_truth/episodes.jsonl").open()]
    missing = [row["episode_index"] for row in rows if row.get("misses")]
    assert missing == [i for i, row in enumerate(rows) if derive_seed("miss", row["initial_state"]) % 1000 < 500]
    assert 0 < made.misses == len(missing) < 8 and made.successes == 8 - len(missing) <= made.attempts
    assert f"{len(missing)} of the demonstrations miss the object" in str(made)
    (hint,) = [one for one in inspect_dataset(root, quick=True).problems if "beside their object" in one.what]
    assert hint.kind == "hint" and f"{len(missing)} of 8" in hint.what and str(missing[0]) in hint.where
    with pytest.raises(BurnishError, match="made with misses 0.5; expected the same settings.*misses 0.0"):
        make_demos("tabletop:lift", 8, root, **options)
    with pytest.raises(BurnishError, match="no expert that misses"):
        make_demos("tabletop:reach", 1, tmp_path / "none", misses=1.0, **options)
    with pytest.raises(BurnishError, match="misses 1.5; expected a share"):
        make_demos("tabletop:lift", 1, tmp_path / "none", misses=1.5)


def test_bad_requests_are_one_clear_line_and_leave_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(BurnishError, match="not empty and no data set of burnish data demos"):
        make_demos("tabletop:lift", 1, tmp_path / "mine")
    with pytest.raises(BurnishError, match="at least 1"):
        make_demos("tabletop:lift", 0, tmp_path / "none")
    with pytest.raises(BurnishError, match="unknown environment 'kitchen'"):
        make_demos("kitchen", 1, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_unknown_camera_is_named(tmp_path):
    with pytest.raises(BurnishError, match="unknown camera 'roof'"):
        make_demos("tabletop:lift", 1, tmp_path / "set", cameras=["roof"], workers=1, progress=False)
    assert not (tmp_path / "set").exists()


def test_full_disk_while_recording_leaves_no_half_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    recording = Recording({"task_id": "t"}, {"state": np.zeros((2, 3), np.float32)})
    with pytest.raises(BurnishError, match="no room left while writing"):
        write_recording(tmp_path / "000000.solved.safetensors", recording)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_assembling_keeps_the_episodes_and_the_same_call_continues(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ("tabletop:reach", 2, tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(assembling, "_write_tables", full)
        with pytest.raises(BurnishError, match="no room left while writing"):
            make_demos(*arguments, image_size=SIZE, workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set.partial"]
    kept = sorted((tmp_path / "set.partial").glob("*/*.solved.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2 and times == [path.stat().st_mtime_ns for path in kept]
    assert make_demos(*arguments, image_size=SIZE, workers=1, progress=False).episodes == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_damaged_recording_is_named(tmp_path):
    path = tmp_path / "000000.solved.safetensors"
    path.write_bytes(b"not a recording")
    with pytest.raises(BurnishError, match="000000.solved.safetensors is damaged"):
        StoredRecording(path)


@given(outcomes=st.lists(st.booleans(), min_size=60, max_size=60), wanted=st.integers(1, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_attempts_that_count_do_not_depend_on_the_order_in_which_they_end(outcomes, wanted, data):
    outcomes = [outcome or number % 4 == 0 for number, outcome in enumerate(outcomes)]
    share = _Share("task", {})
    share.wanted = wanted
    processes = data.draw(st.integers(1, 4))
    while True:
        while len(share.running) < processes and (number := share.next_attempt()) is not None:
            share.running.add(number)
        if not share.running:
            break
        number = data.draw(st.sampled_from(sorted(share.running)))
        share.add(number, outcomes[number])
    expected, solved = [], 0
    for number, outcome in enumerate(outcomes):
        if solved == wanted:
            break
        expected.append(number)
        solved += outcome
    assert share.used() == expected
    assert sorted(share.results) == expected  # none was run in vain


def test_tasks_without_an_expert_give_their_share_to_the_others():
    shares = [_Share(name, {}) for name in "abc"]
    _share_out(shares, 7)
    assert [share.wanted for share in shares] == [3, 2, 2]
    shares[1].skipped = "its goal is not picking and placing"
    _share_out(shares, 7)
    assert (shares[0].wanted, shares[2].wanted) == (4, 3)
    shares[0].skipped = shares[2].skipped = "nor these"
    with pytest.raises(BurnishError, match="nor these"):
        _share_out(shares, 7)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# BURNISH_KILLS=20 runs the long version; the default keeps the suite short.
KILLS = int(os.environ.get("BURNISH_KILLS", "1"))


def test_killed_at_random_instants_the_data_set_is_the_uninterrupted_one(demos, tmp_path):
    """By the command line, which makes the very bytes of Python; from before the first episode to the last rename."""
    root, killed = tmp_path / "set", 0
    command = [
        sys.executable, "-m", "burnish.cli.main", "data", "demos", demos.env, str(demos.episodes), str(root),
        "--image-size", str(SIZE), "--cameras", "front,wrist", "--seed", "5", "--workers", "2", "--geometry",
    ]  # fmt: skip
    generator = np.random.default_rng()
    while killed < KILLS:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_episodes(process, root.with_name("set.partial"), generator.integers(0, 6))
        try:
            process.wait(generator.uniform(0, 0.4))
            check_same(root, demos.root)  # it came to its end: check it and begin another
            shutil.rmtree(root)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if root.exists():  # whole or absent
            assert (root / "burnish_demos.json").exists()
    final = subprocess.run(command, capture_output=True, text=True)
    assert final.returncode == 0 and "5 demonstrations" in final.stdout, final.stderr
    check_same(root, demos.root)


def wait_for_episodes(process, partial: Path, number: int) -> None:
    """Until so many episodes are kept; with none, until the command has begun its work."""
    while process.poll() is None and not (
        partial.is_dir() and len(list(partial.glob("*/*.solved.safetensors"))) >= number
    ):
        time.sleep(0.01)


def check_same(root, whole):
    ours, theirs = _content(root), _content(whole)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name] != theirs[name]]
    assert not different and not root.with_name("set.partial").exists()
