"""A few observations to decode: of a data set where there is one, else random images."""

from pathlib import Path

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.types import Batch
from burnish.data.dataset import open_named
from burnish.data.loader import RobotData, to_device
from burnish.policies.base import Policy
from burnish.policies.keys import IMAGES, STATE, TASK
from burnish.sampling.token_model import Prompt


def observations(policy: Policy, count: int, root: Path | str = "", seed: int = 0) -> Batch:
    """A batch of `count` observations that fit the policy; with `root` (a LeRobotDataset) also true actions.

    Which ones, or what random pictures, follows from `seed`.

    Raises:
        BurnishError: no data set there, or one without the policy's cameras.
    """
    if count < 1:
        raise BurnishError(f"{count} observations", "at least 1")
    if root:
        data = RobotData(Path(root), policy.cameras, policy.chunk_size, count, seed, augmented=False, progress=False,
                         cache_gb=0, window=policy.window, meta=open_named(root))  # fmt: skip
        return data.finish(to_device(data.raw(0), policy.device), 0)
    draws = torch.Generator().manual_seed(seed)
    moments = len(policy.window.observations)
    lead = (count, moments) if moments > 1 else (count,)
    batch: Batch = {f"{IMAGES}{camera}": torch.rand(*lead, 3, *size, generator=draws)
                    for camera, size in policy.view_sizes.items()}  # fmt: skip
    batch[STATE] = torch.randn(*lead, policy.state_dim, generator=draws)
    batch[TASK] = ["lift the red cube"] * count
    return to_device(batch, policy.device)


def split(prompt: Prompt) -> list[Prompt]:
    """The samples of a batch, one by one."""
    return [Prompt(prompt.states[b : b + 1], prompt.valid[b : b + 1]) for b in range(len(prompt.states))]


@torch.no_grad()
def true_tokens(policy: Policy, batch: Batch) -> Tensor:
    """Long [B, L], the tokens of the batch's true actions."""
    with policy.watch_tokens() as watched:
        policy.loss(batch)
    return watched[0].ids
