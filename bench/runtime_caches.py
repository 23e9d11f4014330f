"""What caches change and what they save, on the shipped base: exact ones nothing; old pictures and old prefixes by age.

Frames are those of the base's own episodes, reach and push, rendered at every control step, four actions a chunk.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

AGES, PAIRS, NOISES = (1, 2, 4, 8), 160, 6
CUTS = (0.92, 0.95, 0.98, 0.999)
"""Cosines of 8x8 pictures above which CrossVLA's cache takes the old prefix; .95 is its own."""
FIRST = 8_000_000


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors are in units of the base's spread over noises (s), on equal noise.

    Figures:
        caches_bitwise: what is found again has the bits of what is computed.
        hit_same_over_plain, hit_state_over_plain: time of a call on the same observation, and on one with another state
            alone, over one without caches; fused tier. For SmolVLA's own size see bench/real.py.
        old_images_error_8, old_prefix_error_1: errors of pictures eight steps old with the state of now, and of the
            whole prefix one step old.
        prefix_harmful_98: share of errors above s / 4 where the cosine of 8x8 pictures is at least .98.
    """
    import torch

    from burnish.policies import load_policy
    from burnish.runtime.observations import observations
    from burnish.runtime.verify import cached_bits

    torch.set_num_threads(1)
    policy = load_policy("small").eval()
    bits = cached_bits(policy, observations(policy, 1))
    saved = saving(policy, 3 if args.quick else 30)
    with torch.no_grad():
        rows, harm = errors(policy, 2 if args.quick else 16, 12 if args.quick else PAIRS)
    figures = {
        "caches_bitwise": all(bits.values()), "hit_same_over_plain": saved["same"] / saved["plain"],
        "hit_state_over_plain": saved["state"] / saved["plain"], "old_images_error_8": rows[-1]["old_pictures"],
        "old_prefix_error_1": rows[0]["old_prefix"], "prefix_harmful_98": harm["cuts"]["0.98"]["harmful"],
    }  # fmt: skip
    return figures, {"bits": bits, "process_ms": saved, "by_age": rows, "old_prefix": harm, "noises": NOISES}


def saving(policy: Any, rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of process time of a call, in turns."""
    import torch

    from burnish.runtime.executor import Runtime
    from burnish.runtime.observations import observations
    from burnish.sampling.kept import Kept

    plain, cached = Runtime(policy, tier="fused"), Runtime(policy, tier="fused", kept=Kept())
    batch, draws = observations(policy, 1), policy.draw(1, torch.Generator().manual_seed(0))
    spent: dict[str, list[float]] = {"plain": [], "same": [], "state": [], "miss": []}
    for i in range(rounds + warmup):
        state = {"observation.state": batch["observation.state"] + 0.01 * i}
        camera = next(name for name in batch if name.startswith("observation.images."))
        calls = {
            "plain": lambda: plain.act(batch, draws), "same": lambda: cached.act(batch, draws),
            "state": lambda state=state: cached.act(batch | state, draws),
            "miss": lambda i=i, camera=camera: cached.act(batch | {camera: batch[camera] * (1 - 0.01 * i)}, draws),
        }  # fmt: skip
        cached.act(batch, draws)
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if i >= warmup:
                spent[name].append(1000 * (time.process_time() - begin))
    return {name: statistics.median(values) for name, values in spent.items()}


def errors(policy: Any, episodes: int, pairs: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Errors by age, and how well the likeness of two pictures tells whether the old prefix does harm."""
    import torch

    from burnish.core.seeding import generator
    from burnish.runtime.caches import similarity
    from burnish.runtime.executor import Runtime

    runtime, runs = Runtime(policy), walks(policy, episodes)

    def chunks(seen: dict[str, Any], seed: Any) -> Any:
        return runtime.act(seen, policy.draw(len(seen["task"]), generator("caches", seed))).raw[
            ..., : policy.action_dim
        ]

    some = batch_of(policy, [run[t] for run in runs for t in range(0, len(run) - 1, 2)][:96])
    spread = float(torch.stack([chunks(some, k) for k in range(NOISES)]).var(0).mean().sqrt())
    rows, likeness, harms = [], [], []
    for age in AGES:
        both = [(run[t], run[t + age]) for run in runs for t in range(len(run) - age)]
        both = both[:: max(1, len(both) // pairs)][:pairs]
        old, new = (batch_of(policy, list(part)) for part in zip(*both, strict=True))
        state = "observation.state"
        true = chunks(new, age)

        def apart(seen: dict[str, Any], true: Any = true, age: int = age) -> Any:
            return (chunks(seen, age) - true).square().mean((1, 2)).sqrt() / spread

        prefix, pictures, states = apart(old), apart(old | {state: new[state]}), apart(new | {state: old[state]})
        rows.append({"age": age, "n": len(both), "old_prefix": float(prefix.mean()),
                     "old_pictures": float(pictures.mean()), "old_state": float(states.mean())})  # fmt: skip
        cameras = [name for name in old if name.startswith("observation.images.")]
        likeness += [min(similarity(old[c][i], new[c][i]) for c in cameras) for i in range(len(both))]
        harms += prefix.tolist()
    like, error = np.array(likeness), np.array(harms)
    cuts = {}
    for cut in CUTS:
        hit = like >= cut
        harmful = float((error[hit] > 0.25).mean()) if hit.any() else 0.0
        cuts[str(cut)] = {"reused": float(hit.mean()), "harmful": harmful,
                          "error": float(error[hit].mean()) if hit.any() else 0.0}  # fmt: skip
    return rows, {"spread": spread, "n": len(error), "harmful": float((error > 0.25).mean()), "cuts": cuts,
                  "auc": area(-like, error > 0.25)}  # fmt: skip


def area(score: np.ndarray, bad: np.ndarray) -> float:
    """Probability that a bad one scores higher than a good one (area under the curve)."""
    from scipy.stats import rankdata

    n, ranks = bad.sum(), rankdata(score)
    return float((ranks[bad].sum() - n * (n + 1) / 2) / (n * (len(bad) - n))) if 0 < n < len(bad) else 0.5


def walks(policy: Any, episodes: int) -> list[list[Any]]:
    """Observations of every control step of the base's own episodes, at most 24 of each."""
    from burnish.core.seeding import generator
    from burnish.envs.base import make_env

    envs = [make_env(f"tabletop:{family}", policy.image_size) for family in ("reach", "push")]
    found = []
    for k in range(episodes):
        env = envs[k % 2]
        env.reset(FIRST + k)
        seen, done, replan = [env.observe(policy.cameras)], False, 0
        while not done and len(seen) < 24:
            draws = policy.draw(1, generator("caches", k, replan))
            actions = policy.act(batch_of(policy, seen[-1:]), draws).actions[0].numpy()
            replan += 1
            for action in actions[:4]:
                done = env.step(np.clip(action, -1, 1))
                seen.append(env.observe(policy.cameras))
                if done:
                    break
        found.append(seen)
    return found


def batch_of(policy: Any, seen: list[Any]) -> dict[str, Any]:
    import torch

    images = {f"observation.images.{camera}": torch.from_numpy(np.stack([o.images[camera] for o in seen]))
              .permute(0, 3, 1, 2).float() / 255 for camera in policy.cameras}  # fmt: skip
    states = torch.from_numpy(np.stack([o.state for o in seen]))
    return {**images, "observation.state": states, "task": [o.instruction for o in seen]}
