"""burnish_discrete in closed loop and in training: burnish's commands and LeRobot's own."""

import numpy as np
import pytest
from lerobot_cli import LIMIT, SIZE, lerobot_eval, lerobot_train

from burnish.core.recipe import load_recipe
from burnish.data.demos import make_demos
from burnish.evaluate.rollout import evaluate
from burnish.policies import load_policy
from burnish.train.loop import train
from workshop.tiny import build_vlm


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
    info = lerobot_eval(trained.policy, tmp_path / "eval", monkeypatch, episodes=1)
    assert len(info["per_task"][0]["metrics"]["successes"]) == 1


def test_lerobot_train_goes_on_with_it(trained, demos, tmp_path, monkeypatch):
    saved = lerobot_train(trained.policy, demos, tmp_path / "train", monkeypatch)
    before, after = (load_policy(p).policy.state_dict() for p in (trained.policy, saved))
    changed = [name for name, value in before.items() if not np.array_equal(value, after[name])]
    assert any("action_embed" in name for name in changed) and any("vision_model" in name for name in changed)
