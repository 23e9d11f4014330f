"""A simulator and a policy for `burnish data pairs`; importable by the simulator processes of the tests."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from burnish.envs.base import EnvSpec, Observation


class WalkEnv:
    """A walk that starts at a place decided by the initial state and is solved beyond 1.5."""

    def __init__(self, task_id, image_size):
        self.image_size = image_size
        self.spec = EnvSpec(
            task_id=task_id, cameras=("front",), state_names=("x", "steps"), action_names=("dx", "dy"),
            action_low=np.array([-1.0, -1.0]), action_high=np.array([1.0, 1.0]), fps=10, max_steps=8,
        )  # fmt: skip
        self.instruction = "walk on"

    def reset(self, initial_state):
        self.x, self.steps = float(np.random.default_rng(initial_state).uniform(-0.5, 0.5)), 0

    def observe(self, cameras=()):
        level = int(np.clip(40 * self.x + 128, 0, 255))
        images = {c: np.full((self.image_size, self.image_size, 3), level, np.uint8) for c in cameras}
        return Observation(images, np.array([self.x, self.steps], np.float32), self.instruction)

    def step(self, action):
        self.x, self.steps = self.x + float(action[0]), self.steps + 1
        return self.x > 1.5

    def expert(self, seed=0):
        return type("Walker", (), {"act": lambda self: np.array([0.9, 0.0], np.float32)})()

    def ground_truth(self):
        return {"objects": {}}

    def close(self): ...


def make_env(task_id, image_size):
    return WalkEnv(task_id, image_size)


def make_fixed(task_id, image_size):
    env = WalkEnv(task_id, image_size)
    env.spec = replace(env.spec, num_initial_states=4)
    return env


def register():
    from burnish.envs.base import ENVS, EnvFamily

    if "walk" not in ENVS:
        ENVS.register("walk")(EnvFamily(lambda selector: ["far"], lambda s, size: WalkEnv(f"walk:{s}", size)))


def make_policy(push=0.2):
    """Chunks of three noisy steps, of which two are executed."""
    import torch

    from burnish.core.types import Chunk, Draws, PolicyLoss
    from burnish.policies.base import Captured, Policy

    class WalkPolicy(Policy):
        cameras, chunk_size, n_action_steps, image_size = ("front",), 3, 2, 16
        action_dim, num_layers = 2, 1

        def __init__(self):
            super().__init__()
            self.push = torch.nn.Parameter(torch.tensor(push))

        def draw(self, batch_size, generator):
            return Draws(
                torch.randn(batch_size, 3, 2, generator=generator), torch.rand(batch_size, generator=generator)
            )

        def act(self, batch, draws=None, prefix=None):
            return Chunk((self.push + 0.3 * draws.noise).detach())

        def loss(self, batch, draws=None):
            error = (batch["action"] - self.push).square().mean((1, 2))
            return PolicyLoss(error.mean(), error)

        def score(self, batch, actions, draws):
            return -(actions - self.push).square().sum((1, 2))

        def language(self, batch): ...
        def answer(self, batch, max_new_tokens=8): ...
        def backbone_parameters(self): ...
        def save(self, folder, *, home=None): ...

        @contextmanager
        def capture(self, layers):
            yield Captured()

    return WalkPolicy()
