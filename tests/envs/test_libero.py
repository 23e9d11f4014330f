"""LIBERO against numbers recorded from the original benchmark and against the package's own environment."""

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.envs.base import expand, make_env

pytest.importorskip("libero", reason="needs the extra [libero]")
pytestmark = pytest.mark.libero

NOTHING = np.array([0, 0, 0, 0, 0, 0, -1.0])


@pytest.fixture(scope="module")
def env():
    env = make_env("libero:spatial/0", 128)
    yield env
    env.close()


@pytest.fixture(scope="module")
def stock():
    """The package's own environment with its own rendering of the same task."""
    from burnish.envs import libero

    with libero._quiet():
        from libero.libero.envs import OffScreenRenderEnv

        task = list(libero._libero().task_maps["libero_spatial"].values())[0]
        path = libero._path("bddl_files", task.problem_folder, task.bddl_file)
        names = {"camera_names": ["agentview"], "camera_heights": 128, "camera_widths": 128}
        env = OffScreenRenderEnv(bddl_file_name=path, hard_reset=False, **names)
    yield env
    env.close()


def test_start_equals_a_recorded_observation_of_the_original_benchmark(env):
    env.reset(0)  # settles for ten steps of NOTHING
    state = env.observe().state
    assert np.allclose(state[:3], [-0.21124163, -0.0110906, 1.17424952], atol=1e-7)
    assert np.allclose(state[6:], [0.03872337, -0.0387222], atol=1e-7)


def test_physics_equals_the_package_bit_for_bit_and_the_image_nearly(env, stock):
    state = np.random.get_state()
    np.random.seed(2)
    stock.reset()
    np.random.set_state(state)
    stock.set_init_state(env._init_states[2])
    for _ in range(10):
        stock.step(NOTHING)
    env.reset(2)
    expert = env.expert()
    for _ in range(8):
        action = expert.act()
        env.step(action)
        seen = stock.step(action)[0]
    assert np.array_equal(env.data.qpos, stock.env.sim.data.qpos)
    observation = env.observe(["agentview"])
    assert np.array_equal(observation.state[:3], seen["robot0_eef_pos"].astype(np.float32))
    assert np.array_equal(observation.state[6:], seen["robot0_gripper_qpos"].astype(np.float32))
    ours = observation.images["agentview"].astype(int)
    theirs = seen["agentview_image"][::-1, ::-1].astype(int)
    assert np.abs(ours - theirs).mean() < 8  # no shadows, no multisampling
    assert np.abs(ours[:, ::-1] - theirs).mean() > 16  # mirrored it would be another picture


def test_background_trick_changes_no_pixel_visibly(env):
    from burnish.envs.rendering import SceneRenderer

    env.reset(1)
    plain = SceneRenderer(env.model, 128, hidden_geom_groups=(0,))
    expert = env.expert()
    for step in range(30):
        if step % 6 == 0:
            quick = env.observe(["agentview"]).images["agentview"].astype(int)
            full = plain.rgb(env._seen, "agentview")[:, ::-1]
            assert (np.abs(quick - full).max(-1) > 8).sum() <= 3
        env.step(expert.act())
    plain.close()


def test_expert_solves_and_repeats_bit_for_bit_after_another_episode(env):
    def run(initial_state):
        env.reset(initial_state)
        expert, solved = env.expert(), False
        for _ in range(150):
            solved = env.step(expert.act())
            if solved:
                break
        return env.data.qpos.copy(), solved

    before = np.random.get_state()[1].copy()
    first, solved = run(50)
    run(0)
    again, _ = run(50)
    assert solved and np.array_equal(first, again)
    assert np.array_equal(before, np.random.get_state()[1])  # the global generator is left alone


def test_points_lie_on_the_objects(env):
    env.reset(0)
    for camera in ("agentview", "wrist"):
        seen, objects = env.geometry(camera), env.ground_truth()["objects"]
        names = list(objects)
        found = 0
        for index, name in enumerate(names):
            mask = seen["segmentation"] == index
            if name.startswith(("plate", "akita")) and mask.sum() > 40:
                centre = np.median(seen["points"][mask], 0)
                assert np.linalg.norm(centre[:2] - np.array(objects[name]["position"])[:2]) < 0.05
                found += 1
        assert found or camera == "wrist"


def test_suites_and_their_errors():
    assert len(expand("libero:spatial")) == 10
    assert expand("libero:goal_swap/3") == ["libero:goal_swap/3"]
    with pytest.raises(BurnishError, match="unknown LIBERO suite 'spatial_env'"):  # incomplete in the package
        expand("libero:spatial_env")
    with pytest.raises(BurnishError, match="unknown task '10' of LIBERO suite 'goal'"):
        expand("libero:goal/10")


def test_limits_follow_the_base_suite_and_states_are_fifty(env):
    from burnish.envs.libero import MAX_STEPS

    assert env.spec.max_steps == 280 and env.spec.num_initial_states == 50
    assert MAX_STEPS == {"spatial": 280, "object": 280, "goal": 300, "10": 520, "90": 400}


def test_what_the_expert_cannot_do_is_said():
    assert no_expert_reason("spatial", 4) == ""
    assert "open wooden_cabinet_1_middle_region" in no_expert_reason("goal", 0)
    assert "opened first" in no_expert_reason("goal", 3)


def no_expert_reason(suite, index):
    """Without building the simulator."""
    from burnish.envs import libero
    from burnish.envs.libero_expert import unsupported_goal

    _, tasks, _ = libero._parse(suite)
    with libero._quiet():
        from libero.libero.envs import bddl_utils

        path = libero._path("bddl_files", tasks[index].problem_folder, tasks[index].bddl_file)
        return unsupported_goal(bddl_utils.robosuite_parse_problem(path))


def test_missing_extra_says_how_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "libero.libero", None)
    with pytest.raises(BurnishError, match=r"pip install 'burnish\[libero\]'"):
        expand("libero:spatial")


def test_sampled_objects_stand_on_their_fixtures_after_any_number_of_resets():
    env = make_env("libero:spatial/7", 64)  # a bowl on the stove
    heights = []
    for initial_state in (50, 51, 50):
        env.reset(initial_state)
        objects = env.ground_truth()["objects"]
        heights.append(objects["akita_black_bowl_1"]["position"][2])
        apart = np.subtract(objects["akita_black_bowl_1"]["position"], objects["flat_stove_1"]["position"])
        assert np.linalg.norm(apart[:2]) < 0.25 and 0 < apart[2] < 0.1
    assert heights[0] == heights[2]
    env.close()
