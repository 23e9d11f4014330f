"""A scripted expert for LIBERO: picks the object of each goal "in" or "on" and places it where the goal says.

It reads object shapes and poses from the simulator, grasps what fits between the fingers across its narrowest width
and wider things (bowls, plates) by the rim, and tries again when a goal is not met. Goals that open, close or switch
something are not supported.
"""

import functools
from dataclasses import dataclass

import numpy as np

from burnish.envs.rendering import geoms_of_bodies

MAX_GRASP_WIDTH = 0.075
ACTION_METRES = 0.05  # a full action moves the controller's goal by this much
ACTION_RADIANS = 0.5
GAIN = 1.6  # of the steering towards a point; higher is brisker and less precise
APPROACH_HEIGHT = 0.10
CARRY_HEIGHT = 0.12
OPEN, CLOSE = -1.0, 1.0
# Every phase ends when its condition holds or after so many steps.
PHASE_LIMITS = {"above": 80, "down": 45, "close": 20, "lift": 40, "over": 100, "lower": 40, "open": 6, "up": 12}


def unsupported_goal(problem: dict) -> str:
    """Why the goal of a parsed LIBERO problem is beyond this expert; empty where it is not."""
    movable = {name for names in problem["objects"].values() for name in names}
    for condition in problem["goal_state"]:
        words = " ".join(condition)
        if len(condition) != 3 or condition[0] not in ("in", "on") or condition[1] not in movable:
            return f"its goal '{words}' is not picking and placing"
        if condition[0] == "in" and any(part in condition[2] for part in ("cabinet", "microwave")):
            return f"its goal '{words}' needs something opened first"
    return ""


def _half_turn(angle):
    """The equivalent gripper yaw in [-pi/2, pi/2): the two fingers are alike."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2


def _middle(points: np.ndarray) -> np.ndarray:
    return (points.max(0) + points.min(0)) / 2


class _Shapes:
    """World points on the surface of every object, read from the simulator."""

    def __init__(self, inner):
        import mujoco

        self._inner, self._kinds = inner, mujoco.mjtGeom
        self._model, self._data = inner.sim.model._model, inner.sim.data._data
        owners = geoms_of_bodies(self._model, list(inner.obj_body_id.values()))
        self._geoms = {name: np.flatnonzero(owners == i) for i, name in enumerate(inner.obj_body_id)}
        self._corners = functools.cache(self._sample)

    def points(self, name: str) -> np.ndarray:
        """[N, 3] world points of an object; an empty array where it has no solid geometry."""
        data = self._data
        clouds = [self._corners(g) @ data.geom_xmat[g].reshape(3, 3).T + data.geom_xpos[g] for g in self._geoms[name]]
        return np.concatenate(clouds) if clouds else np.empty((0, 3))

    def _sample(self, geom: int) -> np.ndarray:
        model, kind, size = self._model, self._model.geom_type[geom], self._model.geom_size[geom]
        if kind == self._kinds.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
            return model.mesh_vert[start : start + count][:: max(1, count // 400)]
        if kind == self._kinds.mjGEOM_BOX:
            return np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T * size
        if kind == self._kinds.mjGEOM_CYLINDER:
            around = np.linspace(0, 2 * np.pi, 12)
            ring = np.stack([size[0] * np.cos(around), size[0] * np.sin(around)], 1)
            return np.concatenate([np.c_[ring, np.full(12, side * size[1])] for side in (-1, 1)])
        return np.empty((0, 3))


@dataclass(frozen=True)
class _Grasp:
    point: np.ndarray  # [3] where the fingers close
    yaw: float  # direction in which they close
    top: float  # height of the object's top
    bottom: float


def _narrow_grasp(points: np.ndarray) -> _Grasp | None:
    """Across the narrowest width of the object's upper part; None where nothing fits between the fingers."""
    top, bottom = points[:, 2].max(), points[:, 2].min()
    height = max(top - min(0.035, 0.6 * (top - bottom)), bottom + 0.018)
    slab = points[np.abs(points[:, 2] - height) < 0.03]
    slab = slab if len(slab) > 6 else points
    yaws = np.linspace(0, np.pi, 36, endpoint=False)
    directions = np.stack([np.cos(yaws), np.sin(yaws)])
    widths = np.ptp(slab[:, :2] @ directions, axis=0)
    if widths.min() > MAX_GRASP_WIDTH:
        return None
    turning = 0.004 * np.abs(_half_turn(yaws - np.pi / 2))  # the arm's resting yaw closes along y
    best = int(np.argmin(widths + turning + 1e3 * (widths > MAX_GRASP_WIDTH + 0.003)))
    along, across = directions[:, best], np.array([-directions[1, best], directions[0, best]])
    middle = sum(axis * _middle(slab[:, :2] @ axis) for axis in (along, across))
    return _Grasp(np.array([*middle, height]), float(yaws[best]), top, bottom)


def _rim_grasp(points: np.ndarray, obstacles: list[np.ndarray]) -> _Grasp:
    """On the rim of a wide round object, away from its neighbours and near the arm's resting yaw."""
    top, bottom = points[:, 2].max(), points[:, 2].min()
    centre = _middle(points[:, :2])
    rim = points[points[:, 2] > top - 0.012]
    radius = np.median(np.linalg.norm(rim[:, :2] - centre, axis=1))
    high = [cloud[:, :2] for cloud in obstacles if len(cloud) and cloud[:, 2].max() > top - 0.03]
    scores, spots = [], []
    yaws = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    for yaw in yaws:
        spot = centre + radius * np.array([np.cos(yaw), np.sin(yaw)])
        clearance = min((np.linalg.norm(cloud - spot, axis=1).min() for cloud in high), default=1.0)
        scores.append(min(clearance, 0.06) - 0.02 * abs(_half_turn(yaw - np.pi / 2)))
        spots.append(spot)
    best = int(np.argmax(scores))
    return _Grasp(np.array([*spots[best], max(top - 0.022, bottom + 0.018)]), float(yaws[best]), top, bottom)


class LiberoExpert:
    """Acts on a running LIBERO episode whose goal it knows (see `unsupported_goal`)."""

    def __init__(self, inner):
        self._inner = inner
        self._model, self._data = inner.sim.model._model, inner.sim.data._data
        self._robot = inner.robots[0]
        self._shapes = _Shapes(inner)
        self._plan()

    def _plan(self) -> None:
        """Choose the first goal that does not hold yet, the grasp and the place for it."""
        goals = self._inner.parsed_problem["goal_state"]
        open_goals = [goal for goal in goals if not self._inner._eval_predicate(goal)]
        _, self._object, target = (open_goals or goals)[0]
        points = self._shapes.points(self._object)
        others = [self._shapes.points(name) for name in self._inner.obj_body_id if name != self._object]
        self._grasp = _narrow_grasp(points) or _rim_grasp(points, others)
        self._target = self._place_of(target)
        self._carry_offset = np.zeros(2)
        self._enter("above")

    def _place_of(self, target: str) -> np.ndarray:
        """[3] centre of the surface on which the object is to be put down."""
        inner = self._inner
        if target in inner.obj_body_id:
            points = self._shapes.points(target)
            return np.array([*_middle(points[:, :2]), points[:, 2].max()])
        place = np.array(inner.sim.data.get_site_xpos(target))
        parent = getattr(inner.object_sites_dict.get(target), "parent_name", None)
        if parent in inner.obj_body_id:
            place[2] = self._shapes.points(parent)[:, 2].max()
        return place

    def _enter(self, phase: str) -> None:
        self._phase, self._steps = phase, 0

    def act(self) -> np.ndarray:
        site = self._robot.eef_site_id
        hand, rotation = self._data.site_xpos[site], self._data.site_xmat[site].reshape(3, 3)
        yaw_error = _half_turn(self._grasp.yaw - np.arctan2(rotation[1, 0], rotation[0, 0]))
        self._steps += 1
        phase = self._phase
        goal, reached = getattr(self, f"_{phase}")(hand, yaw_error)
        if reached or self._steps >= PHASE_LIMITS[phase]:
            self._leave(phase, hand)
        turn = np.cross(rotation[:, 2], [0.0, 0.0, -1.0])  # keeps the fingers pointing down
        turn[2] = 0.0 if phase in ("over", "lower", "open", "up") else turn[2] + yaw_error
        action = np.zeros(7, np.float32)
        action[:3] = np.clip(GAIN * (goal - hand) / ACTION_METRES, -1, 1)
        action[3:6] = np.clip(GAIN * turn / ACTION_RADIANS, -1, 1)
        action[6] = CLOSE if phase in ("close", "lift", "over", "lower") else OPEN
        return action

    def _leave(self, phase: str, hand: np.ndarray) -> None:
        if phase == "lift":
            points = self._shapes.points(self._object)
            if points[:, 2].max() < self._grasp.top + 0.02:  # it slipped: try again (plates tilt, hence the top)
                return self._plan()
            self._carry_offset = _middle(points[:, :2]) - hand[:2]
        order = list(PHASE_LIMITS)
        if phase == order[-1]:
            self._plan()
        else:
            self._enter(order[order.index(phase) + 1])

    # Each phase gives the point to steer to and whether it has been reached.

    def _above(self, hand, yaw_error):
        goal = np.array([*self._grasp.point[:2], self._grasp.top + APPROACH_HEIGHT])
        near = np.linalg.norm(goal[:2] - hand[:2]) < 0.008 and abs(goal[2] - hand[2]) < 0.02
        return goal, near and abs(yaw_error) < 0.06

    def _down(self, hand, yaw_error):
        return self._grasp.point, np.linalg.norm(self._grasp.point - hand) < 0.008

    def _close(self, hand, yaw_error):
        speed = np.abs(self._data.qvel[self._robot._ref_gripper_joint_vel_indexes]).max()
        return self._grasp.point, self._steps >= 9 and speed < 0.004

    @property
    def _hang(self) -> float:
        """How far the object reaches below the fingers."""
        return self._grasp.point[2] - self._grasp.bottom

    @property
    def _carry_z(self) -> float:
        return max(self._target[2] + self._hang + APPROACH_HEIGHT, self._grasp.top + CARRY_HEIGHT)

    def _lift(self, hand, yaw_error):
        return np.array([*self._grasp.point[:2], self._carry_z]), hand[2] > self._carry_z - 0.08

    def _over(self, hand, yaw_error):
        goal = np.array([*(self._target[:2] - self._carry_offset), self._carry_z])
        return goal, np.linalg.norm(goal[:2] - hand[:2]) < 0.010

    def _lower(self, hand, yaw_error):
        goal = np.array([*(self._target[:2] - self._carry_offset), self._target[2] + self._hang + 0.01])
        return goal, abs(hand[2] - goal[2]) < 0.012

    def _open(self, hand, yaw_error):
        return hand.copy(), False

    def _up(self, hand, yaw_error):
        return hand + [0.0, 0.0, 0.05], False
