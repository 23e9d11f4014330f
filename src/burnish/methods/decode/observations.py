"""A few observations to decode: of a data set where there is one, else random pictures."""

from pathlib import Path
from typing import Any

from burnish.core.types import Batch


def observations(policy: Any, count: int, root: str = "", seed: int = 0) -> Batch:
    """A batch of `count` observations that fit the policy; with `root` (a LeRobotDataset) also true actions.

    Raises:
        BurnishError: no data set there, or one without the policy's cameras.
    """
    import torch

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
