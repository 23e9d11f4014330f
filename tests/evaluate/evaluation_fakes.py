"""A simulator and a policy small enough to predict by hand; importable by the simulator processes of the tests."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cluster_fakes import die_once

from burnish.core.errors import BurnishError
from burnish.envs.base import EnvSpec, Expert, Observation, view_size

GOAL = 3.0


class LineEnv:
    """A point on a line that must be pushed beyond 3 or below -3; the initial state decides which, and the start.

    The instruction says the side: "go right" or "go left". State 13 kills its process on the fifth step where
    BURNISH_TEST_CRASH is set, state 12 on the third where it finds the file die-once. The task "dull" has no expert.
    """

    def __init__(self, task: str, image_size: int):
        if task == "missing":
            raise BurnishError(f"unknown line task '{task}'")
        self.image_size = image_size
        limited = 6 if task == "limited" else None
        self.spec = EnvSpec(
            task_id=f"line:{task}",
            cameras=("front", "side"),
            state_names=("x",),
            action_names=("dx",),
            action_low=np.array([-1.0]),
            action_high=np.array([1.0]),
            fps=10,
            max_steps=12,
            num_initial_states=limited,
        )
        self.rendered = 0

    def reset(self, initial_state: int) -> None:
        rng = np.random.default_rng(initial_state)
        self.initial_state = initial_state
        self.x = float(rng.uniform(-1, 1))
        self.right = bool(rng.integers(2))
        self.says_right = self.right
        self.steps = 0

    @property
    def instruction(self) -> str:
        return "go right" if self.says_right else "go left"

    def alternative_instruction(self, seed: int) -> str:
        return "go left" if self.right else "go right"

    def set_instruction(self, text: str) -> None:
        self.says_right = text == "go right"

    def other_success(self) -> bool:
        return self.x < -GOAL if self.right else self.x > GOAL

    def failure(self) -> str:
        return "out of time" if self.steps == self.spec.max_steps else "dropped"

    def observe(self, cameras: Sequence[str] = ()) -> Observation:
        level = int(np.clip(20 * self.x + 128, 0, 255))
        images = {c: np.full((*view_size(self.image_size, c), 3), level, np.uint8) for c in cameras}
        return Observation(images, np.array([self.x], np.float32), self.instruction)

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        if self.initial_state == 13 and self.steps == 5 and os.environ.get("BURNISH_TEST_CRASH"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.initial_state == 12 and self.steps == 3:
            die_once(Path("die-once"))
        self.x += float(np.clip(action[0], -1, 1))
        return self.x > GOAL if self.right else self.x < -GOAL

    def expert(self, seed: int = 0) -> Expert:
        if self.spec.task_id == "line:dull":
            raise BurnishError("no scripted expert for line:dull")
        return _Pusher(1.0 if self.right else -1.0)

    def random_object_expert(self, seed: int) -> Expert:
        return _Pusher(float(np.random.default_rng(seed).choice([-1.0, 1.0])))

    def close(self) -> None: ...


class _Pusher:
    def __init__(self, action: float):
        self.action = action

    def act(self) -> np.ndarray:
        return np.array([self.action], np.float32)


def tasks(selector: str) -> list[str]:
    return {"": ["a", "b"], "mixed": ["a", "dull"]}.get(selector, [selector])


def make(selector: str, image_size: int) -> LineEnv:
    return LineEnv(selector, image_size)


def make_env(task_id: str, image_size: int) -> LineEnv:
    return make(task_id.partition(":")[2], image_size)


def register() -> None:
    """Make "line" known to `expand` in this process."""
    from burnish.envs.base import ENVS, EnvFamily

    if "line" not in ENVS:
        ENVS.register("line")(EnvFamily(tasks, make, rectangles=True))
        ENVS.register("squares")(EnvFamily(tasks, make))


def make_policy(listens: bool = True, slow: float = 0.0, size: tuple[int, int] = (8, 8)):
    """A noisy policy that goes where the sentence says (or always right), through a matrix product on the images."""
    import time

    import torch
    from torch import Tensor

    from burnish.core.types import Batch, Chunk, Draws
    from burnish.policies.base import Policy

    class LinePolicy(Policy):
        cameras = ("front",)
        chunk_size, n_action_steps, image_size, action_dim, num_layers = 4, 2, 8, 1, 1

        view_sizes = {"front": size}

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3 * 8 * 8, 1), 1e-3 if listens else 2e-3))
            self.widths: list[int] = []
            self.shapes: set[tuple[int, ...]] = set()

        def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None) -> Chunk:
            time.sleep(slow)
            image = batch["observation.images.front"]
            self.shapes.add(tuple(image.shape[1:]))
            assert float(image.max()) <= 1
            image = image[..., :8, :8]
            self.widths.append(len(image))
            longest = max(len(t) for t in batch["task"])
            seen = image.flatten(1) @ self.weight + 1e-9 * min(longest, 48)  # as padding to the longest text does
            way = torch.tensor([1.0 if not listens or t == "go right" else -1.0 for t in batch["task"]])
            return Chunk((0.35 * way[:, None, None] + 0.7 * draws.noise + 0.01 * seen[:, None]).detach())

        def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
            noise = torch.randn(batch_size, 4, 1, generator=generator)
            return Draws(noise, torch.rand(batch_size, generator=generator))

        def loss(self, batch, draws=None): ...
        def score(self, batch, actions, draws): ...
        def language(self, batch): ...
        def answer(self, batch, max_new_tokens=8): ...
        @contextmanager
        def capture(self, layers) -> Iterator: ...
        def backbone_parameters(self): ...
        def save(self, folder: Path) -> None: ...

    return LinePolicy()
