"""Depth of stored demonstrations: put back and rendered, it is what the simulator saw then."""

import json

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.data.views import FrameSource, FrameViews
from burnish.envs.base import make_env

SIDE = 48


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    """A folder as demonstrations leave it, and what was seen then."""
    root = tmp_path_factory.mktemp("rows") / "data"
    truth = root / "ground_truth" / "tabletop_lift"
    truth.mkdir(parents=True)
    env = make_env("tabletop:lift", SIDE)
    env.reset(5)
    expert, lines, seen, states, images = env.expert(5), [], [], [], []
    for frame in range(9):
        observation = env.observe(["front"])
        lines.append(json.dumps({"frame": frame, **env.ground_truth()}))
        seen.append(env.geometry("front"))
        states.append(observation.state)
        images.append(observation.images["front"])
        env.step(expert.act())
    env.close()
    (truth / "000000.jsonl").write_text("\n".join(lines) + "\n")
    row = {"episode_index": 0, "task_id": "tabletop:lift", "length": 9, "frames": "tabletop_lift/000000.jsonl"}
    (root / "ground_truth" / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    np.save(root / "front.npy", np.stack(images))
    return root, seen, np.stack(states)


def test_a_restored_frame_shows_what_was_there(episode):
    root, seen, states = episode
    views = FrameViews(FrameSource({"front": root / "front.npy"}, root, geometry=True))
    found = views(np.array([8, 0, 5]), states[[8, 0, 5]])
    views.close()
    assert found.images.shape == (3, 1, 3, SIDE, SIDE) and found.points.shape == (3, 1, SIDE, SIDE, 3)
    for place, frame in enumerate((8, 0, 5)):
        close = np.abs(found.points[place, 0].numpy() - seen[frame]["points"]).max(-1) < 2e-3
        assert close.mean() > 0.995  # all but a few pixels on an edge


def test_stored_depth_is_taken_where_it_lies(episode, tmp_path):
    root, seen, states = episode
    path = root / "ground_truth/tabletop_lift/000000.front.depth.npy"
    np.save(path, np.stack([s["depth"] for s in seen]).astype(np.float16))
    views = FrameViews(FrameSource({"front": root / "front.npy"}, root, geometry=True))
    found = views(np.array([3]), None)
    path.unlink()
    assert views._depth._env is None  # no simulator was needed
    gap = np.abs(found.points[0, 0].numpy() - seen[3]["points"])
    assert gap.max() < 2e-3  # half precision of metres


def test_what_cannot_be_put_back_is_told(episode, tmp_path):
    root, _, states = episode
    with pytest.raises(BurnishError, match="nothing tells where things were"):
        FrameViews(FrameSource({"front": root / "front.npy"}, tmp_path, geometry=True))
    other = tmp_path / "ground_truth"
    other.mkdir()
    row = {"episode_index": 0, "task_id": "libero:goal/0", "length": 9, "frames": "x.jsonl"}
    (other / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    (other / "x.jsonl").write_text("{}\n" * 9)
    views = FrameViews(FrameSource({"front": root / "front.npy"}, tmp_path, geometry=True))
    with pytest.raises(BurnishError, match="libero:goal/0 cannot be put back.*burnish data demos --geometry"):
        views(np.array([0]), states[:1])
