import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.envs import metaworld
from burnish.envs.base import expand, make_env

pytest.importorskip("metaworld")


@pytest.fixture(scope="module")
def env():
    env = make_env("metaworld:drawer-close-v3", 64)
    yield env
    env.close()


def _episode(env, initial_state: int) -> tuple[np.ndarray, bool]:
    env.reset(initial_state)
    expert, poses, solved = env.expert(), [], False
    for _ in range(env.spec.max_steps):
        solved = env.step(expert.act())
        poses.append(env.data.qpos.copy())
        if solved:
            break
    return np.array(poses), solved


def test_mt10_is_ten_tasks_with_different_instructions():
    ids = expand("metaworld:mt10")
    assert len(ids) == len(set(ids)) == 10
    assert len(set(metaworld.INSTRUCTIONS.values())) == 10


def test_unknown_task_names_the_known_ones():
    with pytest.raises(BurnishError, match="unknown Meta-World task 'fly-v3'.*reach-v3"):
        expand("metaworld:fly-v3")


def test_expert_solves_and_the_episode_repeats_bit_for_bit_after_another_one(env):
    first, solved = _episode(env, 3)
    other, _ = _episode(env, 4)
    again, _ = _episode(env, 3)
    assert solved
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], other[0])


def test_state_is_the_hand_and_nothing_about_objects(env):
    env.reset(0)
    state = env.observe().state
    assert state.shape == (4,) and state.dtype == np.float32
    assert np.allclose(state[:3], env.data.body("hand").xpos, atol=1e-6)
    assert 0 <= state[3] <= 1


def test_image_is_upright(env):
    """The wall behind the table is above the table, and the robot's base is at the left edge (corner2, turned)."""
    env.reset(0)
    image = env.observe(["corner2"]).images["corner2"].astype(int)
    red = (image[..., 0] > 90) & (image[..., 1] < 60) & (image[..., 2] < 60)
    columns = np.nonzero(red)[1]
    assert columns.size > 30 and np.median(columns) < 32
    assert env.observe().images == {}


def test_point_map_agrees_with_object_positions(env):
    env.reset(1)
    seen = env.geometry("corner2")
    objects = list(env.ground_truth()["objects"])
    mask = seen["segmentation"] >= 0
    assert mask.sum() > 20 and seen["segmentation"].max() < len(objects)
    centre = np.array(env.ground_truth()["objects"]["drawer"]["position"])
    assert np.linalg.norm(np.median(seen["points"][mask], 0) - centre) < 0.2
    table = seen["points"][~mask & (np.abs(seen["points"][..., 2]) < 0.003)]
    assert len(table) > 300  # the table top lies at height 0


def test_an_episode_may_be_longer_than_meta_worlds_own(env):
    env.reset(0)
    for _ in range(env.spec.max_steps + 2):
        env.step(np.zeros(4))


def test_wrong_action_is_refused(env):
    env.reset(0)
    with pytest.raises(BurnishError, match=r"\(7,\).*\(4,\)"):
        env.step(np.zeros(7))
