"""`python -m bench eval`: episodes per minute of `burnish eval` over `lerobot-eval` on one LIBERO task.

Speed: the same SmolVLA with random weights (so every episode runs to the limit), the same initial states, limit,
image size, cameras and number of simulator processes, each side with building its simulators, none filming.
LeRobot runs at its best setting: parallel environments, one for each core, and soft resets. What differs is what the
figure is about: LeRobot renders both cameras at every step as LIBERO does, burnish only when the policy replans,
without shadows and multisampling.

Outcomes: all 50 initial states, recorded expert actions (which solve the task in 76 to 91 steps), some of them spoilt,
plus a small part of the policy's actions, so that images matter and both successes and failures occur; noise is zero
and burnish renders as LIBERO does (+exact). Success and length of every episode must agree; the largest difference of
an executed action is reported.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.envs.base import expand, make_env

if TYPE_CHECKING:
    from burnish.evaluate.evaluation import Evaluation
    from burnish.policies.base import Policy

SUITE, TASK = "spatial", 0
ENV_ID = f"libero:{SUITE}/{TASK}"
EXACT_ID = f"{ENV_ID}+exact"
IMAGE_SIZE = 128
CAMERAS = ("agentview", "wrist")
PEER_CAMERAS = ("image", "image2")
POLICY_SHARE = 0.02
ROUND = 10
"""Episodes in flight where outcomes are compared."""
NO_MOTION = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The bench; `args.quick` only checks that it runs."""
    from burnish.core.provenance import machine
    from workshop.tiny import make_tiny

    episodes, max_steps, repeats = (2, 32, 1) if args.quick else (4, 280, 2)
    replayed, replay_steps = (4, 40) if args.quick else (50, 96)
    versions = machine()
    with TemporaryDirectory() as name:
        folder = Path(name)
        policy = make_tiny(
            "smolvla", folder / "policy", cameras=PEER_CAMERAS, state_dim=8, action_dim=7, image_size=IMAGE_SIZE
        )
        config = _peer_config(folder)
        speed = _speed(folder, policy, config, episodes, max_steps, repeats)
        outcomes = _outcomes(folder, policy, config, replayed, replay_steps)
    figures = {
        "speedup_over_lerobot_eval": median(speed["lerobot_seconds"]) / median(speed["burnish_seconds"]),
        "outcomes_equal": outcomes["equal"],
        "outcomes_compared": replayed,
        "burnish_episodes_per_minute": 60 * episodes / median(speed["burnish_seconds"]),
        "lerobot_episodes_per_minute": 60 * episodes / median(speed["lerobot_seconds"]),
    }
    return {
        "name": "eval",
        "device": versions.pop("device"),
        "versions": versions,
        "n": episodes * repeats,
        "figures": figures,
        "detail": {"speed": speed, "outcomes": outcomes, "differences": __doc__},
    }


def _peer_config(folder: Path) -> Path:
    """LIBERO configuration for LeRobot, made once for this run."""
    from bench.lerobot_peer import convert_initial_states

    expand(ENV_ID)  # a clear error where LIBERO is not installed
    target = folder / "libero"
    convert_initial_states(target, f"libero_{SUITE}")
    return target


def _ask_peer(folder: Path, config: Path, **request: Any) -> Path:
    from bench.lerobot_peer import PeerRequest

    suffix = ".npz" if request.get("replay") else ".json"
    output, file = folder / f"answer{suffix}", folder / "request.json"
    PeerRequest(suite=f"libero_{SUITE}", task=TASK, image_size=IMAGE_SIZE, output=str(output), **request).write(file)
    environment = {**os.environ, "LIBERO_CONFIG_PATH": str(config), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("MUJOCO_GL", "egl")
    environment.setdefault("MUJOCO_EGL_DEVICE_ID", "0")  # else robosuite reads CUDA_VISIBLE_DEVICES="" as one
    done = subprocess.run(
        [sys.executable, "-m", "bench.lerobot_peer", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise BurnishError(f"LeRobot's evaluation failed: {last[0]}", "lerobot 0.6 with LIBERO installed")
    return output


def _speed(folder: Path, policy: Path, config: Path, episodes: int, max_steps: int, repeats: int) -> dict[str, Any]:
    """Both sides in turn, `repeats` times. CPU seconds tell a busy machine: their ratio hardly feels other work."""
    from burnish.evaluate.rollout import evaluate

    cores = len(os.sched_getaffinity(0))
    ours, theirs, cpu = [], [], {"burnish_cpu_seconds": [], "lerobot_cpu_seconds": []}
    for repeat in range(repeats):
        before = os.times()
        found = evaluate(
            policy, ENV_ID, episodes=episodes, output=folder / f"speed{repeat}", max_steps=max_steps, workers=cores,
            batch_size=min(cores, episodes), image_size=IMAGE_SIZE, cameras=CAMERAS, video=False,
        )  # fmt: skip
        ours.append(found.seconds)
        cpu["burnish_cpu_seconds"].append(sum(os.times()[:4]) - sum(before[:4]))
        answer = _ask_peer(
            folder, config, policy=str(policy), max_steps=max_steps, episodes=episodes, hard_reset=False,
            batch_size=min(cores, episodes),
        )  # fmt: skip
        content = json.loads(answer.read_text(encoding="utf-8"))
        theirs.append(content["seconds"])
        cpu["lerobot_cpu_seconds"].append(content["cpu_seconds"])
    return {
        "episodes": episodes,
        "max_steps": max_steps,
        "image_size": IMAGE_SIZE,
        "cameras": 2,
        "n_action_steps": found.settings["n_action_steps"],
        "simulator_processes": cores,
        "steps_of_burnish": [r.steps for r in found.records],
        "burnish_seconds": ours,
        "lerobot_seconds": theirs,
        **cpu,
    }


def _outcomes(folder: Path, policy: Path, config: Path, episodes: int, max_steps: int) -> dict[str, Any]:
    replay = _recorded(episodes, max_steps)
    np.save(folder / "replay.npy", replay)
    answer = _ask_peer(
        folder, config, policy=str(policy), max_steps=max_steps, episodes=episodes, batch_size=min(ROUND, episodes),
        hard_reset=True, replay=str(folder / "replay.npy"), scale=POLICY_SHARE,
    )  # fmt: skip
    with np.load(answer, allow_pickle=False) as arrays:
        peer = {name: arrays[name] for name in arrays.files}
    arguments = (policy, replay, max_steps, peer["actions"])
    same, same_difference = _our_outcomes(folder / "same", EXACT_ID, *arguments)
    fast, fast_difference = _our_outcomes(folder / "fast", ENV_ID, *arguments)
    theirs = list(zip(peer["success"].tolist(), peer["steps"].tolist(), strict=True))
    return {
        "equal": same == theirs,
        "largest_action_difference": same_difference,
        "equal_with_our_rendering": fast == theirs,
        "largest_action_difference_with_our_rendering": fast_difference,
        "burnish": same,
        "burnish_with_our_rendering": fast,
        "lerobot": theirs,
    }


def _recorded(episodes: int, max_steps: int) -> np.ndarray:
    """Expert actions [episodes, max_steps + 8, A]; in every third episode the gripper never closes."""
    env = make_env(ENV_ID, IMAGE_SIZE)
    actions = np.tile(NO_MOTION, (episodes, max_steps + 8, 1))
    for state in range(episodes):
        env.reset(state)
        expert = env.expert()
        for step in range(max_steps):
            actions[state, step] = expert.act()
            if env.step(actions[state, step]):
                break
        if state % 3 == 2:
            actions[state, :, -1] = -1
    env.close()
    return actions


def _our_outcomes(
    output: Path, env: str, policy: Path, replay: np.ndarray, max_steps: int, peer_actions: np.ndarray
) -> tuple[list[tuple[bool, int]], float]:
    """(success, steps) of every episode, and the largest difference to the actions that LeRobot executed."""
    from burnish.evaluate.rollout import evaluate
    from burnish.policies import load_policy

    loaded, taken = load_policy(policy), {}
    _replay(loaded, env, replay, taken)
    found: Evaluation = evaluate(
        loaded, env, episodes=len(replay), output=output, max_steps=max_steps, image_size=IMAGE_SIZE,
        cameras=CAMERAS, video=False, batch_size=min(ROUND, len(replay)),
    )  # fmt: skip
    outcomes = [(r.success, r.steps) for r in found.records]
    difference = 0.0
    for (state, replan), chunk in taken.items():
        start = replan * len(chunk)
        theirs = peer_actions[state, start : min(start + len(chunk), outcomes[state][1])]
        if len(theirs):
            difference = max(difference, float(np.abs(chunk[: len(theirs)] - theirs).max()))
    return outcomes, difference


def _replay(policy: "Policy", env: str, replay: np.ndarray, taken: dict[tuple[int, int], np.ndarray]) -> None:
    """Let `policy.act` return recorded actions plus a share of its own, and file them under (state, replan).

    Which episode a row belongs to is given by the seed of its noise; it travels in the unused flow time.
    """
    import torch

    from burnish.core.types import Chunk, Draws

    steps = policy.n_action_steps
    tags = {
        derive_seed(0, env, state, replan): state * 1000 + replan
        for state in range(len(replay))
        for replan in range(replay.shape[1] // steps)
    }
    act, draw = policy.act, policy.draw
    recorded = torch.from_numpy(replay)

    def tagged(batch_size: int, generator: torch.Generator) -> Draws:
        plain = draw(batch_size, generator)
        tag = torch.full_like(plain.time, tags[generator.initial_seed()])
        return Draws(torch.zeros_like(plain.noise), tag)

    def replayed(batch: dict, draws: Draws) -> Chunk:
        own = act(batch, Draws(draws.noise, torch.ones_like(draws.time))).actions[:, :steps]
        keys = [divmod(int(tag), 1000) for tag in draws.time]
        base = torch.stack([recorded[state, replan * steps : (replan + 1) * steps] for state, replan in keys])
        actions = base + POLICY_SHARE * own
        pairs = list(zip(keys, actions.numpy(), strict=True))
        taken.update(reversed(pairs))  # padding repeats the last request: its first row is the real one
        return Chunk(actions)

    policy.act, policy.draw = replayed, tagged
