"""LeRobot's own commands run our checkpoints, environments and data sets unchanged."""

import importlib.metadata
import shlex
import subprocess

import numpy as np
import pytest
from lerobot_cli import ENV, LIMIT, SIZE, lerobot_eval, lerobot_train

from burnish.core.errors import BurnishError
from burnish.envs.base import make_env
from burnish.evaluate.rollout import evaluate
from burnish.policies import load_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SmolVLA for the tabletop, as burnish saves it."""
    from workshop.tiny import make_tiny

    camera = make_env("tabletop:reach", 8).spec.cameras[0]
    return make_tiny(
        "smolvla", tmp_path_factory.mktemp("policy") / "p", cameras=[camera], state_dim=4, action_dim=4, image_size=SIZE
    )


def test_lerobot_discovers_the_plugin():
    from lerobot.envs.configs import EnvConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    assert {"burnish", "lerobot_policy_burnish"} <= names
    assert importlib.metadata.version("lerobot_policy_burnish") == importlib.metadata.version("burnish")
    register_third_party_plugins()
    assert "burnish" in EnvConfig.get_known_choices()


def test_lerobot_eval_runs_the_same_episodes(folder, tmp_path, monkeypatch):
    info = lerobot_eval(folder, tmp_path / "eval", monkeypatch, episodes=2)
    assert len(info["per_task"][0]["metrics"]["successes"]) == 2
    assert len(list((tmp_path / "eval").rglob("*.mp4"))) == 2
    ours = evaluate(
        folder, "tabletop:reach", episodes=2, output=tmp_path / "ours", max_steps=LIMIT, workers=1, progress=False
    )
    assert ours.settings["image_size"] == SIZE and ours.settings["n_action_steps"] == 8
    assert [r.steps for r in ours.records] == [LIMIT, LIMIT]


def test_lerobot_train_continues_our_checkpoint(folder, tmp_path, monkeypatch):
    from burnish.data.demos import make_demos

    root = tmp_path / "data"
    make_demos("tabletop:reach", 2, root, image_size=SIZE, workers=1, progress=False)
    measured = [*ENV, "--env_eval_freq=2", "--eval.n_episodes=1", "--eval.batch_size=1"]
    saved = lerobot_train(folder, root, tmp_path / "train", monkeypatch, *measured)
    with pytest.raises(BurnishError, match="no vlm/ in .*nothing outside the folder is read") as error:
        load_policy(saved)
    subprocess.run(shlex.split(str(error.value).split("; try: ")[1]), check=True)
    again = evaluate(
        saved, "tabletop:reach", episodes=1, output=tmp_path / "ours", max_steps=LIMIT, workers=1, progress=False
    )
    assert again.overall.n == 1, "burnish evaluates what lerobot-train wrote"


def test_seeds_are_initial_states_and_mistakes_are_named():
    from lerobot_policy_burnish.environment import BurnishEnvConfig

    config = BurnishEnvConfig(task="tabletop:reach", image_size=8, episode_length=2)
    (vector,) = config.create_envs(2)["burnish"].values()
    seen, _ = vector.reset(seed=[3, 4])
    env = make_env("tabletop:reach", 8)
    for row, seed in enumerate((3, 4)):
        env.reset(1_000_000 + seed)
        wanted = env.observe(tuple(config.cameras))
        assert np.array_equal(seen["agent_pos"][row], wanted.state)
        assert np.array_equal(seen["pixels"][config.cameras[0]][row], wanted.images[config.cameras[0]])
        assert vector.call("task_description")[row] == wanted.instruction
    for _ in range(2):
        _, _, terminated, truncated, _ = vector.step(np.zeros((2, 4), np.float32))
    assert truncated.all() and not terminated.any()
    vector.close()
    with pytest.raises(BurnishError, match="unknown camera top9"):
        BurnishEnvConfig(task="tabletop:reach", cameras=["top9"])
