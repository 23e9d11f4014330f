"""An environment: a point on a square that is to go where the green spot is."""

import numpy as np

from burnish.core.seeding import derive_seed
from burnish.envs.base import EnvFamily, EnvSpec, Observation

SPEED = 0.1


class Point:
    """State: position [2]; action: velocity [2]; solved within 0.1 of the target."""

    def __init__(self, image_size):
        self.image_size = image_size
        self.spec = EnvSpec(
            task_id="sample_point:go", cameras=("top",), state_names=("x", "y"), action_names=("dx", "dy"),
            action_low=-np.ones(2, np.float32), action_high=np.ones(2, np.float32), fps=10, max_steps=30,
        )  # fmt: skip
        self.instruction = "go to the green spot"

    def reset(self, initial_state):
        draws = np.random.default_rng(derive_seed("sample_point", initial_state))
        self.position, self.target = draws.uniform(0, 1, (2, 2)).astype(np.float32)

    def observe(self, cameras=()):
        images = {camera: self._draw() for camera in cameras}
        return Observation(images, self.position.copy(), self.instruction)

    def step(self, action):
        self.position = np.clip(self.position + SPEED * np.clip(action, -1, 1), 0, 1).astype(np.float32)
        return bool(np.abs(self.position - self.target).max() < SPEED)

    def expert(self, seed=0):
        return self

    def act(self):
        return np.clip((self.target - self.position) / SPEED, -1, 1).astype(np.float32)

    def ground_truth(self):
        spot = {"position": [*map(float, self.target), 0.0], "quaternion": [1.0, 0.0, 0.0, 0.0]}
        return {"objects": {"spot": spot}}

    def _draw(self):
        image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        for place, colour in ((self.target, (0, 255, 0)), (self.position, (255, 0, 0))):
            x, y = (place * (self.image_size - 1)).astype(int)
            image[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = colour
        return image

    def close(self):
        pass


def _make(selector, image_size):
    return Point(image_size)


def _tasks(selector):
    return ["go"]


FAMILY = EnvFamily(_tasks, _make)
