"""How the tabletop looks out of distribution: another camera, another light, another table.

Only what is seen changes: initial states, physics, instructions and success stay those of the plain environment, so
that results with and without a suffix are paired. What a variant draws depends on the initial state alone.
"""

import numpy as np

from burnish.core.errors import BurnishError

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
