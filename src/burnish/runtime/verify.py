"""Which of its promises a policy's runtime keeps here: tiers, samplers, caches; and what old pictures would cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from burnish.core.types import Batch, Window
from burnish.data.loader import RobotData, to_device
from burnish.policies.base import Policy
from burnish.policies.keys import IMAGES, STATE, TASK
from burnish.runtime.choose import REFERENCE, compare_samplers
from burnish.runtime.executor import Runtime
from burnish.runtime.observations import observations
from burnish.sampling.kept import Kept

CHECKED = ("exact", "fused", "bf16")
"""Tiers; compiling takes minutes."""
AGES = (1, 2, 4, 8)
"""Control steps."""


def verify_runtime(policy: Policy, data: Path | str, *, count: int = 48, noises: int = 4, seed: int = 0,
                   samplers: Sequence[str] = (), progress: bool = True) -> dict[str, Any]:  # fmt: skip
    """`choose.compare_samplers` (the policy's own steps are "sampler" where none keeps to the rule), and:

    "tiers": by name, see `executor.Sampler.compare`. "caches": whether what is found again has the bits of what is
    computed, for the same observation, another state, and another picture. "old_pictures": see `old_pictures`.

    Args, errors: as of `compare_samplers`.
    """
    found = compare_samplers(policy, data, count=count, noises=noises, seed=seed, samplers=samplers, progress=progress)
    found["sampler"] = found["own"] if found["sampler"] == REFERENCE else found["sampler"]
    batch = observations(policy, 3, data, seed)
    found["tiers"] = {tier: Runtime(policy, tier=tier).verify(batch) for tier in CHECKED}
    found["caches"] = cached_bits(policy, batch)
    found["old_pictures"] = old_pictures(policy, data, found["spread"], count, seed)
    return found


def cached_bits(policy: Policy, batch: Batch) -> dict[str, bool]:
    """Whether the exact tier with caches gives its own bits without, for what follows upon `batch`."""
    plain, cached = Runtime(policy), Runtime(policy, kept=Kept())
    draws = policy.draw(len(batch[TASK]), torch.Generator().manual_seed(0))
    picture = next(name for name in batch if name.startswith(IMAGES))
    following = {"same": batch, "state": {**batch, STATE: batch[STATE] + 0.1},
                 "picture": {**batch, picture: batch[picture] * 0.9}}  # fmt: skip
    cached.act(batch, draws)
    return {name: torch.equal(cached.act(one, draws).actions, plain.act(one, draws).actions)
            for name, one in {**following, "again": following["state"]}.items()}  # fmt: skip


@torch.no_grad()
def old_pictures(policy: Policy, data: Path | str, spread: float, count: int, seed: int) -> list[dict[str, float]]:
    """Errors, in units of the policy's spread, of chunks made of pictures some control steps old and the state of now
    ("images"), and of pictures and a state that old ("prefix"), on equal noise; means over observations.
    """
    window = Window((*(-age for age in reversed(AGES)), 0))
    frames = RobotData(Path(data), policy.cameras, policy.chunk_size, count, seed, augmented=False, progress=False,
                       window=window)  # fmt: skip
    batch = frames.finish(to_device(frames.raw(0), policy.device), 0)
    runtime, draws = Runtime(policy), policy.draw(count, torch.Generator().manual_seed(seed))

    def chunk(pictures: int, state: int) -> torch.Tensor:
        seen = {name: value[:, pictures] for name, value in batch.items() if name.startswith(IMAGES)}
        raw = runtime.act({**seen, STATE: batch[STATE][:, state], TASK: batch[TASK]}, draws).raw
        return raw[..., : policy.action_dim].float()

    true, rows = chunk(-1, -1), []
    for place, age in zip(range(len(AGES) - 1, -1, -1), AGES, strict=True):
        apart = {"images": chunk(place, -1) - true, "prefix": chunk(place, place) - true}
        rows.append(
            {"age": age, **{k: float(d.square().mean((1, 2)).sqrt().mean() / spread) for k, d in apart.items()}}
        )
    return rows
