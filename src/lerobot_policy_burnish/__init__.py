"""LeRobot plug-in: makes `burnish_discrete` and burnish's environments known to `lerobot-train` and `lerobot-eval`.

LeRobot imports every installed distribution whose name starts with lerobot_policy_. This package comes with burnish
and is announced under that name by `lerobot_policy_burnish.egg-info`, so that one installation of burnish suffices.
With BURNISH_RUNTIME set, LeRobot's flow-matching policies run through burnish's executor, see `executor.py`.
Where the plug-in is not found (an unusual installer), give `--env.discover_packages_path=lerobot_policy_burnish`.
"""

from burnish.policies.discrete.configuration_discrete import DiscreteConfig
from lerobot_policy_burnish import executor
from lerobot_policy_burnish.environment import BurnishEnvConfig

__all__ = ["BurnishEnvConfig", "DiscreteConfig", "executor"]
