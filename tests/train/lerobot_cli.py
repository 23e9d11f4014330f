"""LeRobot's own commands in this process, on tabletop:reach and a policy folder of tiny size."""

import importlib
import json
import sys

SIZE, LIMIT = 32, 6
ENV = ["--env.type=burnish", "--env.task=tabletop:reach", f"--env.image_size={SIZE}", f"--env.episode_length={LIMIT}"]


def _run(module, function, arguments, monkeypatch):
    """What the installed command does: import plug-ins, then parse the command line."""
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    getattr(importlib.import_module(f"lerobot.scripts.{module}"), function)()


def lerobot_eval(policy, output, monkeypatch, episodes):
    """Its eval_info.json."""
    arguments = [
        f"--policy.path={policy}", "--policy.device=cpu", *ENV, f"--eval.n_episodes={episodes}",
        f"--eval.batch_size={episodes}", "--eval.use_async_envs=false", "--seed=0", f"--output_dir={output}",
    ]  # fmt: skip
    _run("lerobot_eval", "eval_main", arguments, monkeypatch)
    return json.loads((output / "eval_info.json").read_text())


def lerobot_train(policy, dataset, output, monkeypatch, *more):
    """Two steps; returns the folder of the policy that it saved."""
    arguments = [
        f"--policy.path={policy}", "--policy.device=cpu", "--policy.push_to_hub=false", "--dataset.repo_id=local/reach",
        f"--dataset.root={dataset}", "--steps=2", "--batch_size=2", "--num_workers=0", "--save_freq=2", "--log_freq=1",
        f"--output_dir={output}", "--wandb.enable=false", *more,
    ]  # fmt: skip
    _run("lerobot_train", "train", arguments, monkeypatch)
    return next((output / "checkpoints").glob("*2/pretrained_model"))
