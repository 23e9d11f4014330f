"""The tabletop's MuJoCo model and its layouts: a two-finger gripper over six coloured objects.

One model serves every scene: geom types, sizes and colours are rewritten in place, which costs microseconds
where a recompilation costs milliseconds. Lengths are in metres; x points right, y away from the front camera.

`Looks` draws another camera, light or table from the initial state alone; physics, instructions and success stay, so
that results with and without a suffix are paired.
"""

from dataclasses import dataclass

import numpy as np

from burnish.core.errors import BurnishError

COLOURS = {
    "red": (0.86, 0.08, 0.08), "green": (0.10, 0.58, 0.16), "blue": (0.10, 0.22, 0.85), "yellow": (0.95, 0.85, 0.10),
    "purple": (0.50, 0.12, 0.62), "orange": (0.98, 0.48, 0.04), "cyan": (0.10, 0.78, 0.82), "pink": (0.98, 0.56, 0.72),
}  # fmt: skip
SHAPES = ("cube", "cylinder", "ball")
NUM_OBJECTS = 6
HALF_SIZE = 0.026
PLATE_RADIUS = 0.06
PLATE_HALF_HEIGHT = 0.005
TABLE_REACH = 0.20
"""Objects start with |x|, |y| below this."""
MIN_GAP = 0.098
"""Smallest distance between two object centres, so that an open gripper fits between them."""
FINGER_RANGE = 0.05
CAMERAS = ("front", "side", "wrist")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "away": (0.0, 1.0), "nearer": (0.0, -1.0)}
"""Of a push, as unit vectors in x and y."""

_GEOM_TYPES = {"cube": 6, "cylinder": 5, "ball": 2, "plate": 5}  # mjtGeom: BOX, CYLINDER, SPHERE
_SIZES = {
    "cube": (HALF_SIZE,) * 3, "cylinder": (HALF_SIZE, HALF_SIZE, 0.0), "ball": (HALF_SIZE, 0.0, 0.0),
    "plate": (PLATE_RADIUS, PLATE_HALF_HEIGHT, 0.0),
}  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; `name` is how an instruction calls it, and is unique in its scene."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def rest_height(self) -> float:
        """Height of the centre when it lies on the table."""
        return PLATE_HALF_HEIGHT if self.shape == "plate" else HALF_SIZE

    @property
    def radius(self) -> float:
        return PLATE_RADIUS if self.shape == "plate" else HALF_SIZE


@dataclass(frozen=True)
class Layout:
    """A drawn scene: objects, their places [6, 2], and where the hand starts [3]."""

    objects: tuple[SceneObject, ...]
    places: np.ndarray
    hand: np.ndarray


def draw_layout(rng: np.random.Generator, num_plates: int) -> Layout:
    """Draw six objects of six different colours, the last `num_plates` of them plates."""
    colours = rng.permutation(list(COLOURS))[:NUM_OBJECTS]
    shapes = [str(s) for s in rng.choice(SHAPES, NUM_OBJECTS - num_plates)] + ["plate"] * num_plates
    objects = tuple(SceneObject(str(c), s) for c, s in zip(colours, shapes, strict=True))
    places: list[np.ndarray] = []
    while len(places) < NUM_OBJECTS:
        place = rng.uniform(-TABLE_REACH, TABLE_REACH, 2)
        radius = objects[len(places)].radius
        gaps = [MIN_GAP + (radius + o.radius - 2 * HALF_SIZE) for o in objects[: len(places)]]
        if all(np.linalg.norm(place - q) > g for q, g in zip(places, gaps, strict=True)):
            places.append(place)
        elif rng.random() < 0.005:  # a dead end: begin again
            places = []
    hand = np.array([*rng.uniform(-0.18, 0.18, 2), rng.uniform(0.14, 0.24)])
    return Layout(objects, np.array(places), hand)


def model_xml() -> str:
    """MJCF of the table, the three cameras, the gripper and six free bodies."""
    bodies = "".join(
        f'<body name="object{i}" pos="0 0 {0.1 * (i + 1)}"><freejoint name="object{i}"/>'
        f'<geom name="object{i}" type="box" size="{HALF_SIZE} {HALF_SIZE} {HALF_SIZE}" mass=".05" '
        f'friction="1.5 .05 .004" condim="6"/></body>'
        for i in range(NUM_OBJECTS)
    )
    finger = (
        '<body name="{n}" gravcomp="1"><joint name="{n}" type="slide" axis="{a} 0 0" range="0 {r}" damping="10"/>'
        '<geom type="box" size=".006 .014 .03" pos="{x} 0 .02" rgba=".2 .2 .22 1" mass=".05" '
        'friction="2 .1 .01" condim="6"/></body>'
    )
    sides = {"left": -1, "right": 1}
    fingers = "".join(finger.format(n=n, a=a, r=FINGER_RANGE, x=0.006 * a) for n, a in sides.items())
    actuator = f'kp="400" ctrlrange="0 {FINGER_RANGE}" forcerange="-15 15"'
    actuators = "".join(f'<position joint="{n}" {actuator}/>' for n in sides)
    return f"""<mujoco>
<option timestep=".005" cone="elliptic" impratio="10" noslip_iterations="2"/><size memory="8M"/>
<visual><quality shadowsize="0" offsamples="0"/><global offwidth="512" offheight="512"/>
<headlight ambient=".5 .5 .5" diffuse=".5 .5 .5"/></visual>
<asset><texture name="table" type="2d" builtin="checker" rgb1=".72 .62 .5" rgb2=".69 .59 .47" width="64" height="64"/>
<material name="table" texture="table" texrepeat="30 30"/></asset>
<worldbody><light pos="0 -.3 1.5" dir="0 .2 -1" castshadow="false"/>
<geom name="table" type="plane" size="2 2 .02" material="table" friction="1 .01 .002"/>
<camera name="front" pos="0 -.40 .58" xyaxes="1 0 0 0 .83 .56" fovy="43"/>
<camera name="side" pos=".44 0 .56" xyaxes="0 1 0 -.79 0 .61" fovy="44"/>
<body name="mocap" mocap="true" pos="0 0 .2"/>
<body name="hand" pos="0 0 .2" gravcomp="1"><freejoint name="hand"/>
<inertial pos="0 0 0" mass="1" diaginertia=".01 .01 .01"/>
<geom type="box" size=".045 .014 .012" pos="0 0 .062" rgba=".85 .85 .87 1" contype="0" conaffinity="0"/>
<geom type="cylinder" size=".012 .1" pos="0 0 .17" rgba=".9 .9 .92 1" contype="0" conaffinity="0"/>
<camera name="wrist" pos="0 -.07 .1" xyaxes="1 0 0 0 .9 .43" fovy="70"/>{fingers}</body>{bodies}</worldbody>
<equality><weld body1="mocap" body2="hand" solref=".02 1"/></equality>
<actuator>{actuators}</actuator></mujoco>"""


def dress(model, layout: Layout) -> None:
    """Rewrite the six object geoms of `model` in place to look and collide like `layout.objects`."""
    for i, obj in enumerate(layout.objects):
        geom = model.geom(f"object{i}").id
        size = np.array(_SIZES[obj.shape])
        model.geom_type[geom] = _GEOM_TYPES[obj.shape]
        model.geom_size[geom] = size
        model.geom_rgba[geom] = (*COLOURS[obj.colour], 1.0)
        extent = size if obj.shape == "cube" else np.array([obj.radius, obj.radius, obj.rest_height])
        # The broad phase reads these two; stale ones make a plate half invisible to the gripper.
        model.geom_rbound[geom] = np.linalg.norm(extent)
        model.geom_aabb[geom] = (0, 0, 0, *extent)


VARIANTS = ("camera", "light", "texture")
MOVING = "moving"
"""The one suffix that changes more than looks: see Tabletop._slide."""
SLIDE = 0.006
"""Metres that the object slides in a control step."""
CAMERA_SHIFT = 0.03
"""Standing cameras move by up to this many metres along each axis."""
CAMERA_TURN = 3.0
"""And turn by up to this many degrees about a random axis."""
_TEXTURES = {
    "check1": 'builtin="checker" rgb1=".35 .38 .42" rgb2=".62 .66 .7"',
    "check2": 'builtin="checker" rgb1=".82 .82 .8" rgb2=".45 .36 .28"',
    "flat1": 'builtin="flat" rgb1=".3 .34 .3" rgb2=".3 .34 .3"',
    "flat2": 'builtin="flat" rgb1=".88 .87 .85" rgb2=".88 .87 .85"',
    "flat3": 'builtin="flat" rgb1=".45 .5 .6" rgb2=".45 .5 .6"',
    "grade1": 'builtin="gradient" rgb1=".75 .7 .62" rgb2=".35 .3 .28"',
    "grade2": 'builtin="gradient" rgb1=".55 .6 .66" rgb2=".8 .8 .84"',
}


def split(selector: str) -> tuple[str, tuple[str, ...]]:
    """("lift", ("camera",)) of "lift+camera"; raises BurnishError on an unknown suffix."""
    named, *looks = selector.split("+")
    for look in looks:
        if look not in (*VARIANTS, MOVING):
            raise BurnishError(f"unknown tabletop variant '+{look}'", ", ".join(f"+{v}" for v in (*VARIANTS, MOVING)))
    return named, tuple(sorted(set(looks)))


def add_textures(xml: str) -> str:
    """The model with more materials for the table, in addition to its own."""
    assets = "".join(
        f'<texture name="{name}" type="2d" {kind} width="64" height="64"/>'
        f'<material name="{name}" texture="{name}" texrepeat="{12 if "check" in name else 1} 12"/>'
        for name, kind in _TEXTURES.items()
    )
    return xml.replace("</asset>", assets + "</asset>")


class Looks:
    """Rewrites cameras, lights and the table's material of one model; `draw` starts from the model's own each time.

    Args:
        model: mujoco.MjModel; for "texture" made with `add_textures`.
        looks: names from VARIANTS.
    """

    def __init__(self, model, looks: tuple[str, ...]):
        self._model, self._looks = model, looks
        head = model.vis.headlight
        self._plain = {
            "pos": model.cam_pos.copy(), "quat": model.cam_quat.copy(), "light": model.light_diffuse.copy(),
            "at": model.light_pos.copy(), "ambient": head.ambient.copy(), "diffuse": head.diffuse.copy(),
        }  # fmt: skip

    def draw(self, rng: np.random.Generator) -> None:
        """Dress the model for one episode."""
        # One stream for each kind, so that +camera+light shows the camera of +camera.
        streams = dict(zip(VARIANTS, rng.spawn(len(VARIANTS)), strict=True))
        for look in self._looks:
            getattr(self, f"_draw_{look}")(streams[look])

    def _draw_camera(self, rng: np.random.Generator) -> None:
        model, turn = self._model, np.deg2rad(CAMERA_TURN)
        for camera in range(model.ncam):
            if model.cam_bodyid[camera] != 0:  # the wrist camera is screwed to the hand
                continue
            model.cam_pos[camera] = self._plain["pos"][camera] + rng.uniform(-CAMERA_SHIFT, CAMERA_SHIFT, 3)
            axis = rng.normal(size=3)
            half = rng.uniform(0, turn) / 2
            step = np.array([np.cos(half), *(np.sin(half) * axis / np.linalg.norm(axis))])
            model.cam_quat[camera] = _multiply(self._plain["quat"][camera], step)

    def _draw_light(self, rng: np.random.Generator) -> None:
        # Never brighter than the plain scene, which is at the limit of white already.
        head, tint = self._model.vis.headlight, rng.uniform(0.75, 1.1, 3)
        head.ambient[:] = self._plain["ambient"] * rng.uniform(0.35, 0.85) * tint
        head.diffuse[:] = self._plain["diffuse"] * rng.uniform(0.2, 0.9) * tint
        self._model.light_diffuse[:] = self._plain["light"] * rng.uniform(0.2, 1.0)
        self._model.light_pos[:] = self._plain["at"] + rng.uniform(-0.8, 0.8, 3) * (1, 1, 0.3)

    def _draw_texture(self, rng: np.random.Generator) -> None:
        table = self._model.geom("table").id
        self._model.geom_matid[table] = self._model.material(str(rng.choice(list(_TEXTURES)))).id


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product of two quaternions (w, x, y, z)."""
    w, v, u, t = a[0], a[1:], b[0], b[1:]
    return np.array([w * u - v @ t, *(w * t + u * v + np.cross(v, t))])
