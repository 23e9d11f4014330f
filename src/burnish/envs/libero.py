"""LIBERO and LIBERO-PRO (the extra `burnish[libero]`) behind the environment protocol.

Selectors are suite names without the prefix `libero_`: spatial, object, goal, 10, 90, and LIBERO-PRO's perturbed
suites such as spatial_swap or goal_lan. Physics, initial states and success tests are LIBERO's own; what differs is
that nothing is rendered unless it is asked for, and then by `burnish.envs.rendering`: without shadows and at one sample
a pixel, a mean of 4 of 255 from LIBERO's own pictures. The suffix `+exact` (spatial/3+exact, spatial+exact) renders as
LIBERO does, five times as long a picture; it is what pictures recorded elsewhere are to be compared with.

Images are LIBERO's usual ones: the raw image rotated by 180 degrees, which is upright but mirrored left to right.
Observations are the ones LIBERO gives: robosuite reads sensors and cameras after the last but one of the 25 simulator
steps of a control step, so that is the moment which observations, images and ground truth show.
"""

import contextlib
import functools
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.envs.base import ENVS, EnvFamily, EnvSpec, Expert, Observation, Size, by_name, view_size
from burnish.envs.rendering import SceneRenderer, body_poses, camera_pose, geoms_of_bodies, project_points

EXACT = "+exact"
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
FPS = 20
# What an observation, an image or the ground truth needs of a moment.
SEEN = (
    "qpos", "xpos", "xquat", "xmat", "subtree_com", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos",
    "cam_xmat", "light_xpos", "light_xdir",
)  # fmt: skip
SETTLE_STEPS = 10
# The limits that evaluations of LIBERO use, by the suite a perturbed suite is made from.
MAX_STEPS = {"spatial": 280, "object": 280, "goal": 300, "10": 520, "90": 400}
STATE_NAMES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right")
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "grip")


@contextlib.contextmanager
def _quiet():
    """Swallows what LIBERO and robosuite print when they are imported and built."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _libero():
    """The module libero.libero.benchmark; raises BurnishError where the extra is not installed."""
    try:
        with _quiet():
            from libero.libero import benchmark
    except ImportError as error:
        raise BurnishError(f"LIBERO cannot be imported ({error})", "the extra [libero]",
                           "pip install 'burnish[libero]'") from None  # fmt: skip
    return benchmark


def _path(kind: str, folder: str, name: str) -> str:
    from libero.libero import get_libero_path

    return os.path.normpath(os.path.join(get_libero_path(kind), folder, name))


def suites() -> list[str]:
    """Names of the suites that are complete in the installed package, without the prefix `libero_`."""
    return [suite.removeprefix("libero_") for suite in _libero().task_maps if _complete(suite)]


def _complete(suite: str) -> bool:
    tasks_by_name = _libero().task_maps.get(suite, {})
    return bool(tasks_by_name) and all(
        os.path.exists(_path("init_states", task.problem_folder, task.init_states_file + ".npz"))
        and os.path.exists(_path("bddl_files", task.problem_folder, task.bddl_file))
        for task in tasks_by_name.values()
    )


def _parse(selector: str) -> tuple[str, list, int | None]:
    """Suite name, its tasks and the index asked for (None for all) of a selector such as "goal/3" or "goal"."""
    suite, _, index = selector.removeprefix("libero_").partition("/")
    if not _complete(f"libero_{suite}"):
        raise BurnishError(f"unknown LIBERO suite '{suite}'", f"one of {', '.join(suites())}")
    tasks_of_suite = list(_libero().task_maps[f"libero_{suite}"].values())
    if not index:
        return suite, tasks_of_suite, None
    if not index.isdecimal() or int(index) >= len(tasks_of_suite):
        raise BurnishError(f"unknown task '{index}' of LIBERO suite '{suite}'", f"0 to {len(tasks_of_suite) - 1}")
    return suite, tasks_of_suite, int(index)


def _looks(selector: str) -> tuple[str, str]:
    """("spatial/3", "+exact") of "spatial/3+exact"; the second is empty without a suffix."""
    named, plus, look = selector.partition("+")
    if plus + look not in ("", EXACT):
        raise BurnishError(f"unknown LIBERO variant '+{look}'", f"{EXACT}, or none")
    return named, plus + look


def tasks(selector: str) -> list[str]:
    """Single-task selectors: "goal" gives "goal/0" to "goal/9", "goal/3" gives itself; a suffix holds for all."""
    named, looks = _looks(selector)
    suite, tasks_of_suite, index = _parse(named)
    return [f"{suite}/{i}{looks}" for i in range(len(tasks_of_suite)) if index in (None, i)]


def make(selector: str, image_size: Size) -> "Libero":
    """Build one task; the selector names a suite and a task, e.g. "spatial/0"."""
    named, looks = _looks(selector)
    suite, tasks_of_suite, index = _parse(named)
    if index is None:
        raise BurnishError(f"'{selector}' names a whole LIBERO suite", f"one task, e.g. {suite}/0")
    return Libero(suite, index, tasks_of_suite[index], image_size, fast_rendering=not looks)


class Libero:
    """One LIBERO task; see `burnish.envs.base.Env` for the protocol.

    Initial states 0 to 49 are the benchmark's fixed ones, for evaluation. From 50 on, the objects are placed by
    LIBERO's own sampler, seeded by the number: as many training states as wanted, none of them an evaluation state.

    Args:
        suite, index: e.g. "spatial", 0.
        task: the benchmark's task tuple.
        fast_rendering: False (the suffix +exact) renders as LIBERO does, with shadows and at four samples a pixel.
    """

    def __init__(self, suite: str, index: int, task, image_size: Size, fast_rendering: bool = True):
        import mujoco

        self.image_size: Size = image_size
        init_states = _path("init_states", task.problem_folder, task.init_states_file)
        self._init_states = _libero().load_initial_states(init_states)
        with _quiet():
            from libero.libero.envs.env_wrapper import ControlEnv

            self._inner = ControlEnv(
                bddl_file_name=_path("bddl_files", task.problem_folder, task.bddl_file), has_renderer=False,
                has_offscreen_renderer=False, use_camera_obs=False, hard_reset=False,
            ).env  # fmt: skip
        self._sim = self._inner.sim
        self._robot = self._inner.robots[0]
        self.model, self.data = self._sim.model._model, self._sim.data._data
        self._seen = mujoco.MjData(self.model)  # what an observation shows
        self._fast_rendering = fast_rendering
        self._renderer: SceneRenderer | None = None
        self._geom_objects = geoms_of_bodies(self.model, list(self._inner.obj_body_id.values()))
        self._fixtures = self._fixtures_in_file()
        self._substeps = int(self._inner.control_timestep / self._inner.model_timestep)
        base_suite = next(name for name in (*MAX_STEPS, "") if suite.startswith(name))
        self.spec = EnvSpec(
            task_id=f"libero:{suite}/{index}" + ("" if fast_rendering else EXACT), cameras=tuple(CAMERAS),
            state_names=STATE_NAMES, action_names=ACTION_NAMES, action_low=np.full(7, -1.0, np.float32),
            action_high=np.full(7, 1.0, np.float32), fps=FPS, max_steps=MAX_STEPS.get(base_suite, 400),
            num_initial_states=len(self._init_states), relative=(True,) * 6 + (False,),
        )  # fmt: skip
        sentence = task.language
        if suite.endswith(("_lan", "_task")):  # the sentence is in the problem file; its name is the old one
            sentence = " ".join(self._inner.parsed_problem["language_instruction"])
        self._instruction = sentence

    def _fixtures_in_file(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Body id of each fixture to its position and quaternion in the model file."""
        poses = {}
        for name, fixture in self._inner.fixtures_dict.items():
            element = self._inner.model.worldbody.find(f".//body[@name='{fixture.root_body}']")
            pose = element.get("pos", "0 0 0"), element.get("quat", "1 0 0 0")
            poses[self._inner.obj_body_id[name]] = tuple(np.fromstring(numbers, sep=" ") for numbers in pose)
        return poses

    @property
    def instruction(self) -> str:
        return self._instruction

    def reset(self, initial_state: int) -> None:
        if initial_state < 0:
            raise BurnishError(f"initial state {initial_state}", "a number from 0 on")
        fixed = initial_state < len(self._init_states)
        self._place(seed=initial_state)
        # The gripper ramps up its last command; robosuite forgets to start that again without a hard reset.
        self._robot.gripper.current_action = np.zeros_like(self._robot.gripper.current_action)
        if fixed:
            self._sim.set_state_from_flattened(self._init_states[initial_state])
            self._sim.forward()
            self._inner._check_success()
            self._inner._post_process()
        nothing = np.array([0.0] * 6 + [-1.0])
        for _ in range(SETTLE_STEPS):
            self.step(nothing)
        if self._renderer is not None:
            self._renderer.start_episode(self._seen)

    def _place(self, seed: int) -> None:
        """LIBERO's reset. Its samplers draw from numpy's global generator, so that is seeded and put back."""
        from robosuite.utils.errors import RandomizationError

        # Objects on fixtures are placed relative to where the model file has the fixture, so put it back there.
        for body, (position, quaternion) in self._fixtures.items():
            self.model.body_pos[body], self.model.body_quat[body] = position, quaternion
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            while True:
                try:
                    self._inner.reset()
                    return
                except RandomizationError:  # no free place was found: draw again, as LIBERO does
                    continue
        finally:
            np.random.set_state(before)

    def step(self, action: np.ndarray) -> bool:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise BurnishError(f"action of shape {action.shape}", "(7,) for LIBERO")
        self._simulate(action)
        inner = self._inner
        inner.timestep += 1
        inner.cur_time += inner.control_timestep
        inner._post_process()
        return bool(inner._check_success())

    def _simulate(self, action: np.ndarray) -> None:
        """robosuite's own step, bit for bit, without what nobody reads here.

        Its sensors are left out, and positions, contacts and velocities are computed once instead of three times a
        simulator step.
        """
        import mujoco

        model, data, robot = self.model, self.data, self._robot
        again = functools.partial(mujoco.mj_forwardSkip, model, data, int(mujoco.mjtStage.mjSTAGE_VEL), 0)
        arm, fingers = robot._ref_joint_actuator_indexes, robot._ref_joint_gripper_actuator_indexes
        low, high = robot.torque_limits
        closed, opened = model.actuator_ctrlrange[fingers].T
        middle, half = 0.5 * (opened + closed), 0.5 * (opened - closed)
        self._sim.forward = again  # the controller calls it
        try:
            for substep in range(self._substeps):
                mujoco.mj_forward(model, data)
                if substep == 0:
                    self._inner._pre_action(action, True)
                else:
                    robot.torques = np.clip(robot.controller.run_controller(), low, high)
                    data.ctrl[fingers] = middle + half * robot.gripper.format_action(action[6:])
                    data.ctrl[arm] = robot.torques
                again()
                mujoco.mj_Euler(model, data)
                if substep == self._substeps - 2:  # when robosuite looks
                    for name in SEEN:
                        np.copyto(getattr(self._seen, name), getattr(data, name))
        finally:
            del self._sim.forward

    def observe(self, cameras: Sequence[str] = ()) -> Observation:
        images = {name: self._draw().rgb(self._seen, self._camera(name))[:, ::-1] for name in cameras}
        return Observation(images, self._state(), self._instruction)

    def _state(self) -> np.ndarray:
        from robosuite.utils.transform_utils import convert_quat, quat2axisangle

        hand = self.model.body(self._robot.robot_model.eef_name).id
        quaternion = convert_quat(self._seen.xquat[hand], to="xyzw")
        position = self._seen.site_xpos[self._robot.eef_site_id]
        fingers = self._seen.qpos[self._robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, quat2axisangle(quaternion), fingers]).astype(np.float32)

    def expert(self, seed: int = 0) -> Expert:
        """The scripted expert; raises BurnishError for goals that it does not know."""
        from burnish.envs.libero_expert import LiberoExpert, unsupported_goal

        reason = unsupported_goal(self._inner.parsed_problem)
        if reason:
            raise BurnishError(f"no scripted expert for {self.spec.task_id} '{self._instruction}': {reason}")
        return LiberoExpert(self._inner)

    def ground_truth(self) -> dict[str, Any]:
        objects = body_poses(self._seen, self._inner.obj_body_id)
        goal = [list(condition) for condition in self._inner.parsed_problem["goal_state"]]
        cameras = {name: camera_pose(self.model, self._seen, camera) for name, camera in CAMERAS.items()}
        return {"objects": objects, "goal": goal, "cameras": cameras, "mirrored": True}

    def geometry(self, camera: str) -> dict[str, np.ndarray]:
        views = self._draw().geometry(self._seen, self._camera(camera), self._geom_objects)
        return {name: np.ascontiguousarray(view[:, ::-1]) for name, view in views.items()}

    def project(self, camera: str, points: np.ndarray) -> np.ndarray:
        places = project_points(
            self.model, self._seen, self._camera(camera), points, view_size(self.image_size, camera)
        )
        return np.stack([1 - places[:, 0], places[:, 1]], 1)  # images are mirrored, see `observe`

    def _camera(self, name: str) -> str:
        if name not in CAMERAS:
            raise BurnishError(f"unknown LIBERO camera '{name}'", f"one of {', '.join(CAMERAS)}")
        return CAMERAS[name]

    def _draw(self) -> SceneRenderer:
        if self._renderer is None:
            size, fast = by_name(self.image_size, CAMERAS), self._fast_rendering
            self._renderer = SceneRenderer(self.model, size, (0,), still_cameras=("agentview",), fast=fast)
            self._renderer.start_episode(self._seen)
        return self._renderer

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        with _quiet():
            self._inner.close()


ENVS.register("libero")(EnvFamily(tasks, make, rectangles=True))
