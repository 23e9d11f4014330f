"""A few observations to decode: of a data set where there is one, else random pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.core.errors import BurnishError
from burnish.core.types import Batch
from burnish.sampling.token_model import Prompt

if TYPE_CHECKING:
    from torch import Tensor


def observations(policy: Any, count: int, root: str = "", seed: int = 0) -> Batch:
    """A batch of `count` observations that fit the policy; with `root` (a LeRobotDataset) also true actions.

    Raises:
        BurnishError: no data set there, or one without the policy's cameras.
    """
    import torch

    if count < 1:
        raise BurnishError(f"{count} observations", "at least 1")
    from burnish.data.loader import RobotData, to_device

    if root:
        data = RobotData(Path(root), policy.cameras, policy.chunk_size, count, seed, augmented=False, progress=False)
        return data.finish(to_device(data.raw(0), policy.device), 0)
    draws = torch.Generator().manual_seed(seed)
    size, state = policy.image_size, policy.config.robot_state_feature.shape[0]
    batch: Batch = {
        f"observation.images.{camera}": torch.rand(count, 3, size, size, generator=draws) for camera in policy.cameras
    }
    batch["observation.state"] = torch.randn(count, state, generator=draws)
    batch["task"] = ["lift the red cube"] * count
    return to_device(batch, policy.device)


def split(prompt: Prompt) -> list[Prompt]:
    """The samples of a batch, one by one."""
    return [Prompt(prompt.states[b : b + 1], prompt.valid[b : b + 1]) for b in range(len(prompt.states))]


def true_tokens(policy: Any, batch: Batch) -> "Tensor":
    """Long [B, L], the tokens of the batch's true actions."""
    import torch

    with torch.no_grad(), policy.watch_tokens() as watched:
        policy.loss(batch)
    return watched[0].ids
