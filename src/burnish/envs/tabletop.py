"""The own tabletop: five task families over six coloured objects, where only language says which one is meant.

Families, from easy to hard: reach, push, lift, put_on, stack. Actions are [dx, dy, dz, grip]: a hand motion in
units of 4 cm per control step at 10 Hz, and grip > 0 to close. The state is hand position (3) and finger opening.

A suffix changes how the scene looks and nothing else: tabletop:lift+camera, +light, +texture, or several
(see tabletop_scene). With +moving the object in question slides over the table until it is lifted. Initial states
are those without the suffix.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed
from burnish.envs import tabletop_scene as scene
from burnish.envs.base import ENVS, EnvFamily, EnvSpec, Expert, Observation, Size, view_size
from burnish.envs.rendering import camera_geometry, camera_pose, make_room, project_points
from burnish.envs.tabletop_expert import MissingTabletopExpert, TabletopExpert

FAMILIES = ("reach", "push", "lift", "put_on", "stack")
MAX_STEPS = {"reach": 25, "push": 40, "lift": 40, "put_on": 60, "stack": 60}
STEP_LENGTH = 0.04
SUBSTEPS = 20

REACH_RADIUS = 0.028
REACH_HEIGHT = 0.10
PUSH_DISTANCE = 0.06
LIFT_HEIGHT = 0.07
MOVED, RAISED = 0.01, 0.03
"""Metres from its first place from which an object counts as moved, and height from which as taken."""


def tasks(selector: str) -> list[str]:
    """All five families (but push where objects move) for an empty selector, otherwise those named, separated by
    commas; a suffix holds for all.
    """
    named, looks = scene.split(selector)
    names = named.split(",") if named else [f for f in FAMILIES if f != "push" or scene.MOVING not in looks]
    for name in names:
        if name not in FAMILIES:
            raise BurnishError(f"unknown tabletop family '{name}'", f"one of {', '.join(FAMILIES)}")
        if name == "push" and scene.MOVING in looks:
            raise BurnishError("tabletop:push+moving, where an object could solve the task by itself", "another family")
    return ["+".join([name, *looks]) for name in names]


def make(selector: str, image_size: Size) -> "Tabletop":
    family, looks = scene.split(tasks(selector)[0])
    return Tabletop(family, image_size, looks)


class Tabletop:
    """One family on one reusable MuJoCo model; see `burnish.envs.base.Env` for the protocol."""

    def __init__(self, family: str, image_size: Size, looks: tuple[str, ...] = ()):
        import mujoco

        self._mujoco = mujoco
        self.family = family
        self.image_size: Size = image_size
        xml = scene.model_xml()
        self.model = mujoco.MjModel.from_xml_string(scene.add_textures(xml) if "texture" in looks else xml)
        shown = tuple(look for look in looks if look != scene.MOVING)
        self._looks = scene.Looks(self.model, shown) if shown else None
        self._slides = scene.MOVING in looks
        self.data = mujoco.MjData(self.model)
        make_room(self.model, image_size)
        self._renderers: dict[tuple[int, int], Any] = {}
        self._object_bodies = [self.model.body(f"object{i}").id for i in range(scene.NUM_OBJECTS)]
        self._hand_body = self.model.body("hand").id
        self._qpos = {n: int(self.model.joint(n).qposadr[0]) for n in ("hand", "left", "right")}
        self._object_qpos = [int(self.model.joint(f"object{i}").qposadr[0]) for i in range(scene.NUM_OBJECTS)]
        self.spec = EnvSpec(
            task_id="+".join([f"tabletop:{family}", *looks]),
            cameras=scene.CAMERAS,
            state_names=("x", "y", "z", "opening"),
            action_names=("dx", "dy", "dz", "grip"),
            action_low=np.full(4, -1.0, np.float32),
            action_high=np.full(4, 1.0, np.float32),
            fps=10,
            max_steps=MAX_STEPS[family],
            relative=(True, True, True, False),
        )

    def reset(self, initial_state: int) -> None:
        rng = np.random.default_rng(derive_seed("tabletop", self.family, initial_state))
        num_plates = 2 if self.family == "put_on" else 0
        self.layout = scene.draw_layout(rng, num_plates)
        self._draw_task(rng)
        scene.dress(self.model, self.layout)
        if self._looks is not None:
            self._looks.draw(np.random.default_rng(derive_seed("tabletop looks", self.family, initial_state)))
        self._place()

    def _draw_task(self, rng: np.random.Generator) -> None:
        """Which object must move (`source`), where to, and the sentence that says so."""
        movable = [i for i, o in enumerate(self.layout.objects) if o.shape != "plate"]
        if self.family in ("push", "stack"):  # balls roll away
            steady = [i for i in movable if self.layout.objects[i].shape != "ball"]
            movable = steady if len(steady) > 1 else movable
        if self.family == "stack":
            self.source, self.target = (int(i) for i in rng.permutation(movable)[:2])
        else:
            self.source = int(rng.choice(movable))
            plates = [i for i, o in enumerate(self.layout.objects) if o.shape == "plate"]
            self.target = int(rng.choice(plates)) if plates else None
        places = self.layout.places[self.source]
        # A push must have room on the table: only directions that point inwards at the edge.
        open_ways = [d for d, v in scene.DIRECTIONS.items() if np.dot(v, places) < scene.TABLE_REACH - 0.06]
        self.direction = str(rng.choice(open_ways))
        self.candidates = movable
        self._instruction = self._sentence(self.source)

    def _sentence(self, source: int) -> str:
        name = self.layout.objects[source].name
        if self.family == "reach":
            return f"reach the {name}"
        if self.family == "lift":
            return f"lift the {name}"
        if self.family == "push":
            return f"push the {name} {'to the ' if self.direction in ('left', 'right') else ''}{self.direction}"
        verb = "put" if self.family == "put_on" else "stack"
        return f"{verb} the {name} on the {self.layout.objects[self.target].name}"

    def _place(self) -> None:
        mujoco, data = self._mujoco, self.data
        mujoco.mj_resetData(self.model, data)
        for i, (obj, place) in enumerate(zip(self.layout.objects, self.layout.places, strict=True)):
            at = self._object_qpos[i]
            data.qpos[at : at + 7] = (*place, obj.rest_height + 0.0005, 1, 0, 0, 0)
        at = self._qpos["hand"]
        data.qpos[at : at + 7] = (*self.layout.hand, 1, 0, 0, 0)
        data.qpos[self._qpos["left"]] = data.qpos[self._qpos["right"]] = scene.FINGER_RANGE
        data.mocap_pos[0] = self.layout.hand
        data.ctrl[:] = scene.FINGER_RANGE
        for _ in range(SUBSTEPS):
            mujoco.mj_step(self.model, data)
        self._start = np.array([self.object_position(i) for i in range(scene.NUM_OBJECTS)])
        self._highest = self._start[:, 2].copy()
        self._first_reached: int | None = None

    @property
    def instruction(self) -> str:
        return self._instruction

    def set_instruction(self, text: str) -> None:
        """Change the instruction; success is still judged on the object that `reset` chose."""
        self._instruction = text

    def alternative_instruction(self, seed: int) -> str:
        taken = (self.source, self.target)
        others = [i for i in self.candidates if i not in taken]
        if not others:  # a stack of the only two that are no balls
            others = [i for i, o in enumerate(self.layout.objects) if o.shape != "plate" and i not in taken]
        self._other = int(np.random.default_rng(derive_seed("swap", seed)).choice(others))
        return self._sentence(self._other)

    def other_success(self) -> bool:
        """Whether the object of `alternative_instruction` is solved now."""
        return self._solved(self._other)

    def observe(self, cameras: Sequence[str] = ()) -> Observation:
        images = {camera: self._render(camera) for camera in cameras}
        opening = self.data.qpos[self._qpos["left"]] + self.data.qpos[self._qpos["right"]]
        state = np.array([*self.hand_position(), opening], np.float32)
        return Observation(images, state, self._instruction)

    def _renderer(self, camera: str) -> Any:
        """The renderer of a camera's image size, made when it is first asked for."""
        size = view_size(self.image_size, camera)
        if size not in self._renderers:
            self._renderers[size] = renderer = self._mujoco.Renderer(self.model, *size)
            flags = self._mujoco.mjtRndFlag
            for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
        return self._renderers[size]

    def _render(self, camera: str) -> np.ndarray:
        if camera not in scene.CAMERAS:
            raise BurnishError(f"the tabletop has no camera '{camera}'", f"one of {', '.join(scene.CAMERAS)}")
        renderer = self._renderer(camera)
        renderer.update_scene(self.data, camera=camera)
        return renderer.render()

    def step(self, action: np.ndarray) -> bool:
        action = np.asarray(action, np.float64)
        if action.shape != (4,):
            raise BurnishError(f"action of shape {action.shape}", "4 numbers: dx, dy, dz, grip")
        start = self.data.mocap_pos[0].copy()
        goal = start + np.clip(action[:3], -1, 1) * STEP_LENGTH
        goal = np.clip(goal, (-0.28, -0.28, 0.012), (0.28, 0.28, 0.32))
        self.data.ctrl[:] = 0.0 if action[3] > 0 else scene.FINGER_RANGE
        for k in range(SUBSTEPS):
            self.data.mocap_pos[0] = start + (goal - start) * (k + 1) / SUBSTEPS
            if self._slides:
                self._slide()
            self._mujoco.mj_step(self.model, self.data)
        self._note_reached()
        self._highest = np.maximum(self._highest, self.data.xpos[self._object_bodies, 2])
        return self._solved(self.source)

    def failure(self) -> str:
        """Why the running episode is not solved, see `envs.base.FailureKind`."""
        now = self.data.xpos[self._object_bodies]
        away, raised = now - self._start, self._highest - self._start[:, 2] > RAISED
        moved = np.linalg.norm(away, axis=1) > MOVED
        moved[self.source] &= not self._slides
        others = [i for i in self.candidates if i != self.source]
        if raised[self.source]:
            return "dropped" if away[self.source, 2] < RAISED / 2 else "out of time"
        pushed = self.family == "push" and not moved[self.source] and moved[others].any()
        if self._first_reached in others if self.family == "reach" else raised[others].any() or pushed:
            return "wrong object"
        nothing = self._first_reached is None if self.family == "reach" else not moved.any()
        return "did nothing" if nothing else "out of time"

    def _slide(self) -> None:
        """The object in question goes on through the middle of the table, at one speed, while it lies on it."""
        place, at = self.object_position(self.source), self._object_qpos[self.source]
        way = -self._start[self.source][:2]
        lies = place[2] < self._start[self.source][2] + 0.005
        if lies and np.abs(place[:2]).max() < scene.TABLE_REACH and (length := np.linalg.norm(way)):
            self.data.qpos[at : at + 2] += way * (scene.SLIDE / SUBSTEPS / length)

    def hand_position(self) -> np.ndarray:
        """[3] point between the fingertips."""
        return self.data.xpos[self._hand_body]

    def object_position(self, index: int) -> np.ndarray:
        """[3] centre of object `index`."""
        return self.data.xpos[self._object_bodies[index]]

    def _note_reached(self) -> None:
        hand = self.hand_position()
        if self._first_reached is None and hand[2] < REACH_HEIGHT:
            for i in range(scene.NUM_OBJECTS):
                if np.linalg.norm(self.object_position(i)[:2] - hand[:2]) < REACH_RADIUS:
                    self._first_reached = i

    def _solved(self, source: int) -> bool:
        position, start = self.object_position(source), self._start[source]
        if self.family == "reach":  # the first object reached decides, so sweeping over all of them fails
            return self._first_reached == source
        if self.family == "push":
            way = np.array(scene.DIRECTIONS[self.direction])
            moved = position[:2] - start[:2]
            return bool(moved @ way > PUSH_DISTANCE and np.abs(moved - (moved @ way) * way).max() < 0.05)
        if self.family == "lift":
            return bool(position[2] > start[2] + LIFT_HEIGHT and self.data.ctrl[0] == 0.0)
        return self._rests_on_target(source)

    def _rests_on_target(self, source: int) -> bool:
        """Released, on top of the target, and not held up by the hand."""
        position, target = self.object_position(source), self.object_position(self.target)
        height = self.layout.objects[source].rest_height + self.layout.objects[self.target].rest_height
        near = 0.05 if self.family == "put_on" else 0.025
        on_top = abs(position[2] - target[2] - height) < 0.012
        return bool(np.linalg.norm((position - target)[:2]) < near and on_top and self.data.ctrl[0] > 0)

    def expert(self, seed: int = 0) -> Expert:
        return TabletopExpert(self, self.source, seed)

    def missing_expert(self, seed: int) -> MissingTabletopExpert:
        """The expert that grasps beside its object; of lift alone."""
        if self.family != "lift":
            raise BurnishError(f"{self.spec.task_id} has no expert that misses", "tabletop:lift")
        return MissingTabletopExpert(self, self.source, seed)

    def random_object_expert(self, seed: int) -> Expert:
        """The expert that ignores language: it picks at random among the objects that could be meant."""
        rng = np.random.default_rng(derive_seed("random object", seed))
        others = [i for i in self.candidates if i != self.target]
        return TabletopExpert(self, int(rng.choice(others)), seed)

    def restore(self, facts: dict[str, Any], state: np.ndarray) -> None:
        """Put everything where an earlier frame had it, for looking at, not for stepping on.

        Args:
            facts: what `ground_truth` said then; a hand without "hand_quaternion" stood upright.
            state: the frame's observed state.
        """
        data, objects = self.data, list(facts["objects"].values())
        dressed = tuple(scene.SceneObject(o["colour"], o["shape"]) for o in objects)
        places = np.array([o["position"][:2] for o in objects])
        self.layout = scene.Layout(dressed, places, np.array(facts["hand"]))
        scene.dress(self.model, self.layout)
        self._mujoco.mj_resetData(self.model, data)
        for at, o in zip(self._object_qpos, objects, strict=True):
            data.qpos[at : at + 7] = (*o["position"], *o["quaternion"])
        at = self._qpos["hand"]
        data.qpos[at : at + 7] = (*facts["hand"], *facts.get("hand_quaternion", (1, 0, 0, 0)))
        data.qpos[self._qpos["left"]] = data.qpos[self._qpos["right"]] = float(state[3]) / 2
        data.mocap_pos[0] = facts["hand"]
        self._mujoco.mj_kinematics(self.model, data)
        self._mujoco.mj_camlight(self.model, data)
        for camera, pose in facts.get("cameras", {}).items():
            data.cam_xpos[self.model.camera(camera).id] = pose["position"]
            data.cam_xmat[self.model.camera(camera).id] = pose["rotation"]

    def ground_truth(self) -> dict[str, Any]:
        objects = {}
        for i, obj in enumerate(self.layout.objects):
            objects[obj.name] = {
                "position": self.object_position(i).round(6).tolist(),
                "quaternion": self.data.xquat[self._object_bodies[i]].round(6).tolist(),
                "colour": obj.colour,
                "shape": obj.shape,
            }
        names = list(objects)
        return {
            "objects": objects,
            "source": names[self.source],
            "target": None if self.target is None else names[self.target],
            "held": self.held_object(),
            "hand": self.hand_position().round(6).tolist(),
            "hand_quaternion": self.data.xquat[self._hand_body].round(6).tolist(),
            "cameras": {camera: camera_pose(self.model, self.data, camera) for camera in scene.CAMERAS},
        }

    def held_object(self) -> str | None:
        """Name of the object between closed fingers, if any."""
        hand = self.hand_position()
        if self.data.ctrl[0] > 0:
            return None
        for i, obj in enumerate(self.layout.objects):
            offset = self.object_position(i) - hand
            if np.linalg.norm(offset[:2]) < 0.02 and abs(offset[2]) < 0.03 and obj.shape != "plate":
                return obj.name
        return None

    def geometry(self, camera: str) -> dict[str, np.ndarray]:
        geoms = {int(self.model.geom(f"object{i}").id): i for i in range(scene.NUM_OBJECTS)}
        return camera_geometry(self.model, self.data, self._renderer(camera), camera, geoms)

    def project(self, camera: str, points: np.ndarray) -> np.ndarray:
        return project_points(self.model, self.data, camera, points, view_size(self.image_size, camera))

    def close(self) -> None:
        while self._renderers:
            self._renderers.popitem()[1].close()


ENVS.register("tabletop")(EnvFamily(tasks, make, rectangles=True))
