"""A course of three posts on the tabletop that its expert passes in three ways, with a trap for majorities.

    weave          to the plate behind the posts; an episode is lost when a post is moved
    weave:way      the first two control steps alone: solved where they are one of the three ways

The first step goes left or right of the front post, the second passes the two posts behind it:

    A  left, left   in 40 % of the demonstrations        A P P B C
    B  right, on    in 30 %                              . . P . .
    C  right, right in 30 %                              . . h . .

Step by step the majority is right (60 %), then left (40 %): together they hit the post in the middle, and so does every
other pair but A, B and C. Which way a demonstration takes follows from its seed and from nothing that can be seen.
Actions and state are the tabletop's, but a control step is two of its (8 cm, 5 Hz) and the gripper is closed.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.envs import tabletop_scene as scene
from burnish.envs.base import ENVS, EnvFamily, Expert, Size
from burnish.envs.tabletop import STEP_LENGTH, Tabletop

TASKS = ("plate", "way")
WAYS = {(-1, -1): 0.4, (1, 0): 0.3, (1, 1): 0.3}
"""Steps to the right (-1 is left) in the first and second control step, and the share of demonstrations."""
STEP = 2 * STEP_LENGTH
POSTS = ((0.0, 1.0), (0.0, 2.0), (-1.0, 2.0))
"""Places of the posts from where the hand starts, in steps to the right and away."""
PLATE, PLATE_SHIFT = 3, 0.03
"""Index of the plate, which lies 3.5 to 4 steps away, up to so many metres aside."""
HEIGHT = (0.03, 0.045)
"""Of the fingertips' middle: the fingers meet the posts and pass over the plate."""
MOVED, MAX_STEPS = 0.005, 12


def tasks(selector: str) -> list[str]:
    """`plate` for an empty selector, otherwise the one named."""
    if selector and selector not in TASKS:
        raise BurnishError(f"unknown task 'weave:{selector}'", f"one of {', '.join(TASKS)}")
    return [selector or TASKS[0]]


class Weave(Tabletop):
    """See `burnish.envs.base.Env` for the protocol."""

    alternative_instruction = random_object_expert = None  # type: ignore[assignment]  # there is but one plate

    def __init__(self, task: str, image_size: Size):
        super().__init__("reach", image_size)
        self.task = task
        steps = MAX_STEPS if task == "plate" else 2
        self.spec = replace(self.spec, task_id=f"weave:{task}", fps=self.spec.fps // 2, max_steps=steps)

    def reset(self, initial_state: int) -> None:
        rng = np.random.default_rng(derive_seed("weave", initial_state))
        colours = rng.permutation(list(scene.COLOURS))[: scene.NUM_OBJECTS]
        shapes = ["cylinder"] * len(POSTS) + ["plate", *rng.choice(scene.SHAPES, 2)]
        objects = tuple(scene.SceneObject(str(c), str(s)) for c, s in zip(colours, shapes, strict=True))
        start = np.array([rng.uniform(-0.02, 0.02), rng.uniform(-0.18, -0.16)])
        plate = start + (rng.uniform(-PLATE_SHIFT, PLATE_SHIFT), rng.uniform(3.5, 4) * STEP)
        aside = [(x * rng.uniform(0.17, 0.2), -rng.uniform(0.17, 0.2)) for x in (-1, 1)]
        places = np.array([*(start + np.array(POSTS) * STEP), plate, *aside])
        self.layout = scene.Layout(objects, places, np.array([*start, rng.uniform(*HEIGHT)]))
        self.source, self.target, self.candidates, self.direction = PLATE, None, [PLATE], ""
        self._instruction = f"weave to the {objects[PLATE].name}"
        scene.dress(self.model, self.layout)
        self._place()
        self.data.qpos[self._qpos["left"]] = self.data.qpos[self._qpos["right"]] = 0
        self.data.ctrl[:] = 0
        self._mujoco.mj_forward(self.model, self.data)
        self._moved, self._way = False, [float(self.data.mocap_pos[0, 0])]

    def step(self, action: np.ndarray) -> bool:
        super().step(action)
        solved = super().step(action)
        self._way.append(float(self.data.mocap_pos[0, 0]))
        return self.way() in WAYS and len(self._way) == 3 if self.task == "way" else solved

    def way(self) -> tuple[int, ...]:
        """Steps to the right in the first two control steps, rounded; shorter before they are over."""
        return tuple(np.rint(np.diff(self._way[:3]) / STEP).astype(int).tolist())

    def _solved(self, source: int) -> bool:
        posts = [self.object_position(i) - self._start[i] for i in range(len(POSTS))]
        self._moved = self._moved or any(np.linalg.norm(moved) > MOVED for moved in posts)
        gap = (self.object_position(PLATE) - self.hand_position())[:2]
        return not self._moved and bool(np.linalg.norm(gap) < scene.PLATE_RADIUS - 0.01)

    def failure(self) -> str:
        return "wrong object" if self._moved else "out of time"

    def expert(self, seed: int = 0) -> Expert:
        return WeaveExpert(self, seed)


class WeaveExpert:
    """Takes one of `WAYS` by its seed, then steers to the plate."""

    def __init__(self, env: Weave, seed: int):
        rng = np.random.default_rng(derive_seed("weave expert", seed))
        self.env, ways = env, list(WAYS)
        self.todo: Sequence[int] = list(ways[rng.choice(len(ways), p=list(WAYS.values()))])

    def act(self) -> np.ndarray:
        if self.todo:
            return np.array([self.todo.pop(0), 1, 0, 1], np.float32)
        gap = (self.env.object_position(PLATE) - self.env.data.mocap_pos[0])[:2]
        return np.array([*np.clip(gap / STEP, -1, 1), 0, 1], np.float32)


ENVS.register("weave")(EnvFamily(tasks, lambda selector, size: Weave(tasks(selector)[0], size), rectangles=True))
