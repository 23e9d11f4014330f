"""The peer of `python -m bench eval`: LeRobot's own LIBERO evaluation, in a process of its own.

    LIBERO_CONFIG_PATH=... python -m bench.lerobot_peer REQUEST.json

It calls what `lerobot-eval` calls. The process is separate because LeRobot reads initial states from torch files, so
it needs a LIBERO configuration that nobody else should see.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PeerRequest:
    """What LeRobot is asked to run.

    Args:
        policy: LeRobot policy folder.
        suite, task: LeRobot's suite name and the task's index.
        image_size: of both cameras, in pixels.
        max_steps: limit in control steps.
        episodes: initial states 0 to episodes - 1.
        batch_size: parallel environments; divides `episodes` where there is a `replay`.
        hard_reset: LeRobot rebuilds the model at every reset (its default) or does not.
        output: where the answer is written, as JSON or (with `replay`) as .npz.
        replay: .npy with actions [episodes, steps, A] that the policy's are added to, or "".
        scale: factor of the policy's actions when `replay` is given.
    """

    policy: str
    suite: str
    task: int
    image_size: int
    max_steps: int
    episodes: int
    batch_size: int
    hard_reset: bool
    output: str
    replay: str = ""
    scale: float = 0.0

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def convert_initial_states(folder: Path, problem_folder: str) -> None:
    """Write LIBERO's initial states as the torch files that LeRobot expects, and a configuration that points there."""
    import torch
    import yaml
    from libero.libero import get_libero_path

    source, target = Path(get_libero_path("init_states")) / problem_folder, folder / "init_files" / problem_folder
    target.mkdir(parents=True)
    for file in sorted(source.glob("*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            (name,) = arrays.files
            torch.save(arrays[name], target / file.stem)
    (folder / "config.yaml").write_text(yaml.safe_dump({"init_states": str(folder / "init_files")}))


def _build(request: PeerRequest) -> dict[str, Any]:
    """Everything that LeRobot's `eval_main` builds before it evaluates."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.envs import make_env, make_env_pre_post_processors
    from lerobot.envs.configs import LiberoEnv
    from lerobot.policies import make_policy, make_pre_post_processors

    env = LiberoEnv(
        task=request.suite,
        task_ids=[request.task],
        episode_length=request.max_steps,
        observation_height=request.image_size,
        observation_width=request.image_size,
        hard_reset=request.hard_reset,
    )
    config = PreTrainedConfig.from_pretrained(request.policy, cli_overrides=["--device=cpu"])
    config.pretrained_path = Path(request.policy)
    policy = make_policy(config, env_cfg=env).eval()
    overrides = {"device_processor": {"device": "cpu"}}
    pre, post = make_pre_post_processors(config, request.policy, preprocessor_overrides=overrides)
    env_pre, env_post = make_env_pre_post_processors(env, config)
    return {
        "envs": make_env(env, n_envs=request.batch_size, use_async_envs=request.batch_size > 1),
        "policy": policy,
        "preprocessor": pre,
        "postprocessor": post,
        "env_preprocessor": env_pre,
        "env_postprocessor": env_post,
    }


def measure_speed(request: PeerRequest) -> None:
    """Time `lerobot-eval`'s evaluation without its videos, from the first simulator to the last episode."""
    import torch
    from lerobot.envs import close_envs
    from lerobot.scripts.lerobot_eval import eval_policy_all

    parts = _build(request)
    start, start_cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        info = eval_policy_all(**parts, n_episodes=request.episodes, start_seed=0)
    answer = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu + _simulator_cpu_seconds(),
        "successes": info["per_task"][0]["metrics"]["successes"],
    }
    close_envs(parts["envs"])
    Path(request.output).write_text(json.dumps(answer), encoding="utf-8")


def _simulator_cpu_seconds() -> float:
    """CPU time of the simulator processes: they have ended by now, and the fork server has added them up."""
    import psutil

    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def measure_outcomes(request: PeerRequest) -> None:
    """Run LeRobot's `rollout` on recorded actions plus the scaled actions of the policy, with its noise set to zero."""
    import torch
    from lerobot.envs import close_envs
    from lerobot.scripts.lerobot_eval import rollout
    from lerobot.utils.constants import ACTION

    parts = _build(request)
    ((env,),) = [group.values() for group in parts.pop("envs").values()]
    policy = parts["policy"]
    policy.model.sample_noise = lambda shape, device: torch.zeros(shape, dtype=torch.float32, device=device)
    replay = torch.from_numpy(np.load(request.replay, allow_pickle=False))
    rounds = []
    for first in range(0, request.episodes, request.batch_size):  # LeRobot goes on to the next initial states
        states = range(first, first + request.batch_size)
        parts["env_postprocessor"] = _add_replay(replay[states.start : states.stop], request.scale)
        with torch.no_grad():
            found = rollout(env, seeds=list(states), **parts)
        missing = replay.shape[1] - found[ACTION].shape[1]
        rounds.append({
            "success": found["success"].any(dim=1).numpy(), "steps": found["done"].int().argmax(dim=1).numpy() + 1,
            "actions": np.pad(found[ACTION].numpy(), ((0, 0), (0, missing), (0, 0))),
        })  # fmt: skip
    close_envs({"libero": {0: env}})
    np.savez(request.output, **{name: np.concatenate([one[name] for one in rounds]) for name in rounds[0]})


def _add_replay(replay: "torch.Tensor", scale: float) -> Callable[[dict], dict]:
    """What stands in for the environment's postprocessor: recorded actions plus the scaled ones of the policy."""
    from lerobot.utils.constants import ACTION

    step = iter(range(replay.shape[1]))
    return lambda transition: {ACTION: replay[:, next(step)] + scale * transition[ACTION]}


def main() -> None:
    request = PeerRequest(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    (measure_outcomes if request.replay else measure_speed)(request)


if __name__ == "__main__":
    main()
