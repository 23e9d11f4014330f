"""Meta-World (MT10 and its other single tasks) behind the environment protocol.

Selectors are `mt10` or a task name such as `reach-v3`. A control step repeats the action for five simulator steps,
which gives 16 Hz and makes Meta-World's own limit of 500 simulator steps 100 control steps. Initial state k is
Meta-World's reset with seed k.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.envs.base import ENVS, EnvFamily, EnvSpec, Expert, Observation, Size, by_name, view_size
from burnish.envs.rendering import SceneRenderer, body_poses, camera_pose, geoms_of_bodies, project_points

SIMULATOR_STEPS = 5
FPS = 16
MAX_STEPS = 100
CAMERAS = {"corner2": "corner2", "wrist": "gripperPOV"}
# The view that policies for Meta-World use: the camera moved nearer, its image turned by 180 degrees.
CORNER2_POSITION = (0.75, 0.075, 0.7)
TURNED = ("corner2",)

INSTRUCTIONS = {
    "reach-v3": "reach the red ball with the gripper",
    "push-v3": "push the red puck to the green ball",
    "pick-place-v3": "pick up the red puck and hold it at the blue ball",
    "door-open-v3": "pull the door of the safe open by its handle",
    "drawer-open-v3": "pull the green drawer open",
    "drawer-close-v3": "push the green drawer shut",
    "button-press-topdown-v3": "press the red button down from above",
    "peg-insert-side-v3": "insert the green peg into the hole in the red box",
    "window-open-v3": "slide the window open",
    "window-close-v3": "slide the window shut",
}
_NOT_OBJECTS = ("tablelink", "RetainingWall", "base", "mocap")


def tasks(selector: str) -> list[str]:
    """ "mt10" gives its ten tasks, a task name gives itself."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    if selector == "mt10":
        return list(INSTRUCTIONS)
    if selector not in ALL_V3_ENVIRONMENTS:
        raise BurnishError(f"unknown Meta-World task '{selector}'",
                           f"mt10 or one of {', '.join(sorted(ALL_V3_ENVIRONMENTS))}")  # fmt: skip
    return [selector]


def make(selector: str, image_size: Size) -> "MetaWorld":
    """Build one task, e.g. "reach-v3"."""
    names = tasks(selector)
    if len(names) > 1:
        raise BurnishError(f"'{selector}' names {len(names)} Meta-World tasks", "one task, e.g. reach-v3")
    return MetaWorld(names[0], image_size)


class MetaWorld:
    """One Meta-World task; see `burnish.envs.base.Env` for the protocol."""

    def __init__(self, name: str, image_size: Size):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.image_size: Size = image_size
        self._name = name
        self._env = env = ALL_V3_ENVIRONMENTS[name]()
        # What Meta-World's own set_task does for a task with visible goal, but with fresh draws at every reset.
        env._partially_observable = False
        del env.sawyer_observation_space  # was made for hidden goals
        env._set_task_called = True
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.max_path_length = 10**9  # the limit is ours: an episode may be given more steps
        self.model, self.data = env.model, env.data
        self.model.cam_pos[self.model.camera("corner2").id] = CORNER2_POSITION
        self._renderer: SceneRenderer | None = None
        self._bodies = self._object_bodies()
        self._geom_objects = geoms_of_bodies(self.model, list(self._bodies.values()))
        self._observation = np.zeros(39)
        self.spec = EnvSpec(
            task_id=f"metaworld:{name}", cameras=tuple(CAMERAS), state_names=("x", "y", "z", "opening"),
            action_names=("dx", "dy", "dz", "grip"), action_low=np.full(4, -1.0, np.float32),
            action_high=np.full(4, 1.0, np.float32), fps=FPS, max_steps=MAX_STEPS,
            relative=(True, True, True, False),
        )  # fmt: skip

    def _object_bodies(self) -> dict[str, int]:
        """Named bodies that are neither robot nor table, with the parts of doors, drawers and windows."""
        top: dict[int, str] = {}
        for body in range(1, self.model.nbody):
            parent = self.model.body_parentid[body]
            top[body] = self.model.body(body).name if parent == 0 else top[parent]
        named = {self.model.body(body).name: body for body in top if top[body] not in _NOT_OBJECTS}
        return {name: body for name, body in named.items() if name}

    @property
    def instruction(self) -> str:
        return INSTRUCTIONS.get(self._name, self._name.removesuffix("-v3").replace("-", " "))

    def reset(self, initial_state: int) -> None:
        if initial_state < 0:
            raise BurnishError(f"initial state {initial_state}", "a number from 0 on")
        self._env.seed(initial_state)
        self._observation, _ = self._env.reset()

    def step(self, action: np.ndarray) -> bool:
        action = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
        if action.shape != (4,):
            raise BurnishError(f"action of shape {action.shape}", "(4,) for Meta-World")
        solved = False
        for _ in range(SIMULATOR_STEPS):
            self._observation, _, _, _, info = self._env.step(action)
            solved = solved or bool(info["success"])
        return solved

    def observe(self, cameras: Sequence[str] = ()) -> Observation:
        images = {name: self._upright(name, self._draw().rgb(self.data, self._camera(name))) for name in cameras}
        return Observation(images, self._observation[:4].astype(np.float32), self.instruction)

    def expert(self, seed: int = 0) -> Expert:
        """Meta-World's own scripted policy with actions clipped to [-1, 1]; it has one style."""
        return _ScriptedPolicy(self)

    def ground_truth(self) -> dict[str, Any]:
        objects = body_poses(self.data, self._bodies)
        goal = [round(float(v), 5) for v in self._env._target_pos]
        cameras = {name: camera_pose(self.model, self.data, camera) for name, camera in CAMERAS.items()}
        return {"objects": objects, "goal": goal, "cameras": cameras, "turned": list(TURNED)}

    def geometry(self, camera: str) -> dict[str, np.ndarray]:
        views = self._draw().geometry(self.data, self._camera(camera), self._geom_objects)
        return {name: np.ascontiguousarray(self._upright(camera, view)) for name, view in views.items()}

    def project(self, camera: str, points: np.ndarray) -> np.ndarray:
        places = project_points(self.model, self.data, self._camera(camera), points, view_size(self.image_size, camera))
        return 1 - places if camera in TURNED else places

    def _upright(self, camera: str, view: np.ndarray) -> np.ndarray:
        return view[::-1, ::-1] if camera in TURNED else view

    def _camera(self, name: str) -> str:
        if name not in CAMERAS:
            raise BurnishError(f"unknown Meta-World camera '{name}'", f"one of {', '.join(CAMERAS)}")
        return CAMERAS[name]

    def _draw(self) -> SceneRenderer:
        if self._renderer is None:
            self._renderer = SceneRenderer(self.model, by_name(self.image_size, CAMERAS))
        return self._renderer

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()


class _ScriptedPolicy:
    """Meta-World's expert for the running episode."""

    def __init__(self, env: MetaWorld):
        from metaworld.policies import ENV_POLICY_MAP

        self._env = env
        self._policy = ENV_POLICY_MAP[env._name]()

    def act(self) -> np.ndarray:
        return np.clip(self._policy.get_action(self._env._observation), -1, 1).astype(np.float32)


ENVS.register("metaworld")(EnvFamily(tasks, make, rectangles=True))
