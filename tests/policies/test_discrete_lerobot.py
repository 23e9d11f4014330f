"""burnish_discrete in closed loop and in training: burnish's commands and LeRobot's own."""

import importlib
import json
import sys

import numpy as np
import pytest

from burnish.core.recipe import load_recipe
from burnish.data.demos import make_demos
from burnish.evaluate.rollout import evaluate
from burnish.policies import load_policy
from burnish.policies.tiny import build_vlm
from burnish.train.loop import train

SIZE, LIMIT = 32, 6


def run(module, function, arguments, monkeypatch):
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    getattr(importlib.import_module(f"lerobot.scripts.{module}"), function)()


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    root = tmp_path_factory.mktemp("demos") / "data"
    make_demos("tabletop:reach", 2, root, image_size=SIZE, workers=1, progress=False)
    return root


@pytest.fixture(scope="module")
def trained(demos, tmp_path_factory):
    """Two steps of the ordinary loop from a VLM folder."""
    root = tmp_path_factory.mktemp("trained")
    vlm = build_vlm(root / "vlm")
    recipe = load_recipe(None, [
        "--policy.type=burnish_discrete", f"--policy.overrides={{vlm_model_name: {vlm}, bins: 16, block_size: 4}}",
        f"--data.root={demos}", f"--output={root / 'run'}", "--train.steps=2", "--train.batch_size=2",
        "--train.log_every=1",
    ])  # fmt: skip
    return train(recipe, progress=False)


def test_the_loop_trains_it_and_eval_measures_it(trained, tmp_path):
    assert 1 < trained.final["loss"] < 5
    ours = evaluate(
        trained.policy,
        "tabletop:reach",
        episodes=2,
        output=tmp_path / "ours",
        max_steps=LIMIT,
        workers=1,
        progress=False,
    )
    assert ours.overall.n == 2 and [r.steps for r in ours.records] == [LIMIT, LIMIT]


def test_lerobot_eval_runs_it(trained, tmp_path, monkeypatch):
    arguments = [
        f"--policy.path={trained.policy}", "--policy.device=cpu", "--env.type=burnish", "--env.task=tabletop:reach",
        f"--env.image_size={SIZE}", f"--env.episode_length={LIMIT}", "--eval.n_episodes=1", "--eval.batch_size=1",
        "--eval.use_async_envs=false", "--seed=0", f"--output_dir={tmp_path / 'eval'}",
    ]  # fmt: skip
    run("lerobot_eval", "eval_main", arguments, monkeypatch)
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert len(info["per_task"][0]["metrics"]["successes"]) == 1


def test_lerobot_train_goes_on_with_it(trained, demos, tmp_path, monkeypatch):
    arguments = [
        f"--policy.path={trained.policy}", "--policy.device=cpu", "--policy.push_to_hub=false",
        "--dataset.repo_id=local/reach", f"--dataset.root={demos}", "--steps=2", "--batch_size=2", "--num_workers=0",
        "--save_freq=2", "--log_freq=1", f"--output_dir={tmp_path / 'train'}", "--wandb.enable=false",
    ]  # fmt: skip
    run("lerobot_train", "train", arguments, monkeypatch)
    saved = next((tmp_path / "train" / "checkpoints").glob("*2/pretrained_model"))
    before, after = (load_policy(p).policy.state_dict() for p in (trained.policy, saved))
    changed = [name for name, value in before.items() if not np.array_equal(value, after[name])]
    assert any("action_embed" in name for name in changed) and any("vision_model" in name for name in changed)
