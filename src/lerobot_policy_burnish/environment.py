"""`--env.type=burnish`: any burnish environment for LeRobot's own commands.

    lerobot-eval --policy.path=FOLDER --env.type=burnish --env.task=tabletop:lift --seed=0

runs the initial states of `burnish eval FOLDER --env tabletop:lift`. LeRobot asks for images at every step, so it is
slower.
"""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from burnish.core.errors import BurnishError
from burnish.envs.base import Env, EnvSpec, expand, make_env

FIRST_STATE = 1_000_000


@cache
def _spec(task_id: str) -> EnvSpec:
    env = make_env(task_id, 8)
    spec = env.spec
    env.close()
    return spec


@EnvConfig.register_subclass("burnish")
@dataclass
class BurnishEnvConfig(EnvConfig):
    """Fields of `--env.`.

    Args:
        task: burnish environment id, e.g. tabletop:lift, metaworld:mt10 or libero:spatial/3.
        image_size: side of the images in pixels; take what the policy was trained on.
        cameras: cameras to render; empty means the environment's default one. Where the policy knows them by other
            names, use LeRobot's `--rename_map`.
        episode_length: limit in control steps; 0 means the environment's own.
        first_state: initial state of seed 0, where the environment has unlimited ones; training uses small numbers.
    """

    task: str | None = "tabletop:lift"
    image_size: int = 128
    cameras: list[str] = field(default_factory=list)
    episode_length: int = 0
    first_state: int = FIRST_STATE

    def __post_init__(self) -> None:
        spec = _spec(expand(self.task)[0])
        self.fps = spec.fps
        self.cameras = list(self.cameras or spec.cameras[:1])
        unknown = [c for c in self.cameras if c not in spec.cameras]
        if unknown:
            raise BurnishError(f"unknown camera {', '.join(unknown)}", f"some of {', '.join(spec.cameras)}")
        image = PolicyFeature(type=FeatureType.VISUAL, shape=(self.image_size, self.image_size, 3))
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(len(spec.action_names),)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(len(spec.state_names),)),
            **{f"pixels/{camera}": image for camera in self.cameras},
        }
        self.features_map = {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            **{f"pixels/{camera}": f"{OBS_IMAGES}.{camera}" for camera in self.cameras},
        }

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "cameras": tuple(self.cameras),
            "episode_length": self.episode_length,
            "first_state": self.first_state,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """One vector environment for each single task that `task` stands for, under the name "burnish"."""
        vectors = {}
        for index, task_id in enumerate(expand(self.task)):
            makers = [
                partial(BurnishGymEnv, task_id, offset=i, stride=n_envs, **self.gym_kwargs) for i in range(n_envs)
            ]
            if use_async_envs and n_envs > 1:
                vectors[index] = _LazyAsyncVectorEnv(makers)
            else:
                vectors[index] = gym.vector.SyncVectorEnv(
                    [freeze_after_episode_end(maker) for maker in makers],
                    autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
                )
        return {self.type: vectors}


class BurnishGymEnv(gym.Env):
    """A single-task burnish environment as LeRobot expects it; the simulator is built at the first reset.

    Seed s starts initial state `first_state` + s where they are unlimited, else s modulo their number. A reset
    without a seed takes the next one that no other of the `stride` parallel environments takes.
    """

    def __init__(
        self,
        task_id: str,
        *,
        image_size: int,
        cameras: tuple[str, ...],
        episode_length: int = 0,
        first_state: int = FIRST_STATE,
        offset: int = 0,
        stride: int = 1,
    ):
        spec = _spec(task_id)
        self.task = task_id
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": spec.fps}
        self.render_mode = "rgb_array"
        self._max_episode_steps = episode_length or spec.max_steps
        self._image_size, self._cameras, self._first_state = image_size, cameras, first_state
        self._num_initial_states = spec.num_initial_states
        self._next_seed, self._stride = offset, stride
        self._env: Env | None = None
        self._steps = 0
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict({camera: image for camera in cameras}),
                "agent_pos": spaces.Box(-np.inf, np.inf, (len(spec.state_names),), np.float32),
            }
        )
        self.action_space = spaces.Box(
            spec.action_low.astype(np.float32), spec.action_high.astype(np.float32), dtype=np.float32
        )

    @property
    def task_description(self) -> str:
        """The instruction of the running episode."""
        return self._simulator.instruction

    @property
    def _simulator(self) -> Env:
        if self._env is None:
            self._env = make_env(self.task, self._image_size)
        return self._env

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is None:
            seed = self._next_seed
        self._next_seed = seed + self._stride
        n = self._num_initial_states
        self._simulator.reset(self._first_state + seed if n is None else seed % n)
        self._steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray):
        success = self._simulator.step(action)
        self._steps += 1
        truncated = not success and self._steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        camera = self._cameras[0]
        return self._simulator.observe((camera,)).images[camera]

    def _observation(self) -> dict[str, Any]:
        seen = self._simulator.observe(self._cameras)
        return {"pixels": seen.images, "agent_pos": seen.state}

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
