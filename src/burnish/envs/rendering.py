"""Fast off-screen rendering of a MuJoCo scene: images, depth, object masks and world point maps.

Two things make it quick in software rendering. MuJoCo's default settings (four samples a pixel, shadows,
reflections) are off, which saves a factor of ten. And where a camera stands still, everything that has not moved
since the episode began is drawn once and kept as a background with its depth; each frame then draws only what has
moved and the nearer of both wins, pixel by pixel. In LIBERO this halves the cost of a frame.
"""

import atexit
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from burnish.envs.base import Size, view_size

# A geometry counts as moved beyond this displacement: a fifth of a pixel at 96 px and half a metre.
_MOVED_METRES = 2e-4
_MOVED_ROTATION = 5e-4  # largest change of an entry of the rotation matrix
_DRAWN_GROUP = 5  # what is to be drawn is put into this group while the scene is made


def choose_gl_backend() -> None:
    """Pick EGL where nothing was chosen and there is no display. Must run before the first `import mujoco`."""
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    # No threads for software rendering: there is a simulator for each core already, and small images gain nothing.
    os.environ.setdefault("LP_NUM_THREADS", "0")


def camera_pose(model, data, camera: str) -> dict:
    """Where a camera is: {"position": [3] metres, "rotation": [9] row-major camera-to-world, "fovy": degrees}.

    The camera looks along its own -z axis with +y up, as OpenGL has it.
    """
    camera_id = model.camera(camera).id
    return {
        "position": [round(float(v), 6) for v in data.cam_xpos[camera_id]],
        "rotation": [round(float(v), 6) for v in data.cam_xmat[camera_id]],
        "fovy": float(model.cam_fovy[camera_id]),
    }


def body_poses(data, bodies: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    """Name of each body to its "position" [3] in metres and "quaternion" [4], rounded to 5 digits."""
    return {
        name: {
            "position": [round(float(v), 5) for v in data.xpos[body]],
            "quaternion": [round(float(v), 5) for v in data.xquat[body]],
        }
        for name, body in bodies.items()
    }


def project_points(model, data, camera: str, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Image coordinates [N, 2] (u right, v down, 0 to 1 inside the image of `size` H, W) of world points [N, 3]."""
    camera_id = model.camera(camera).id
    local = (points - data.cam_xpos[camera_id]) @ data.cam_xmat[camera_id].reshape(3, 3)
    half = np.tan(np.deg2rad(model.cam_fovy[camera_id]) / 2)
    sides = half * np.array([size[1] / size[0], 1.0])  # the field of view is vertical
    return 0.5 + np.stack([local[:, 0], -local[:, 1]], 1) / (-local[:, 2:] * 2 * sides)


def point_map(depth: np.ndarray, position: np.ndarray, rotation: np.ndarray, fovy: float) -> np.ndarray:
    """World coordinates of every pixel of a depth image as the camera sees it (not mirrored or rotated).

    Args:
        depth: [H, W] distance along the optical axis in metres.
        position: [3] camera position. rotation: [3, 3] camera-to-world. fovy: vertical field of view in degrees.

    Returns:
        [H, W, 3] float32 world points.
    """
    height, width = depth.shape
    focal = 0.5 * height / np.tan(np.deg2rad(fovy) / 2)
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    right, up = (columns - (width - 1) / 2) / focal, -(rows - (height - 1) / 2) / focal
    rays = np.stack([right, up, -np.ones(depth.shape)], -1)
    return ((rays * depth[..., None]) @ np.asarray(rotation).T + position).astype(np.float32)


def geoms_of_bodies(model, body_ids: list[int]) -> np.ndarray:
    """[ngeom] for every geometry the index in `body_ids` of the body it belongs to (or an ancestor), else -1."""
    owner = np.full(model.nbody, -1, dtype=np.int32)
    index_of = {body: index for index, body in enumerate(body_ids)}
    for body in range(1, model.nbody):  # parents come before their children
        owner[body] = index_of.get(body, owner[model.body_parentid[body]])
    return owner[model.geom_bodyid]


def camera_geometry(model, data, renderer, camera: str, geom_objects: dict[int, int]) -> dict[str, np.ndarray]:
    """What `SceneRenderer.geometry` gives, by an ordinary mujoco.Renderer; `geom_objects` maps geometry to object."""
    import mujoco

    renderer.enable_depth_rendering()
    renderer.update_scene(data, camera=camera)
    depth = renderer.render().copy()
    renderer.disable_depth_rendering()
    renderer.enable_segmentation_rendering()
    renderer.update_scene(data, camera=camera)
    ids, kinds = np.moveaxis(renderer.render(), -1, 0)
    renderer.disable_segmentation_rendering()
    table = np.full(model.ngeom, -1, np.int32)
    table[list(geom_objects)] = list(geom_objects.values())
    is_geom = kinds == int(mujoco.mjtObj.mjOBJ_GEOM)
    camera_id = model.camera(camera).id
    rotation = data.cam_xmat[camera_id].reshape(3, 3)
    return {
        "depth": depth,
        "segmentation": np.where(is_geom, table[np.where(is_geom, ids, 0)], -1).astype(np.int32),
        "points": point_map(depth, data.cam_xpos[camera_id], rotation, model.cam_fovy[camera_id]),
    }


@dataclass
class _Background:
    """What a still camera sees of the geometries that have not moved; row 0 at the bottom, as OpenGL has it."""

    moved: np.ndarray  # [ngeom] bool: the geometries that are not in it
    rgb: np.ndarray  # [H, W, 3] uint8
    depth: np.ndarray  # [H, W] float32 depth buffer of the opaque ones, 0 far, 1 near
    glass: np.ndarray  # [H, W] float32 depth buffer of the translucent ones where they show, 0 elsewhere


def make_room(model, size: Size) -> tuple[int, int]:
    """Let the model's frame buffer hold every image of `size`; returns the largest height and width."""
    sizes = [view_size(size, camera) for camera in (size if isinstance(size, Mapping) else ("",))]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
    model.vis.global_.offheight = max(model.vis.global_.offheight, height)
    return height, width


def _free_contexts(gl, context) -> None:
    gl.make_current()
    context.free()
    gl.free()


class SceneRenderer:
    """Renders one MuJoCo model.

    Args:
        model: mujoco.MjModel; its sample count is changed before the rendering context is made.
        hidden_geom_groups: geometry groups that are not drawn (collision shapes in LIBERO).
        still_cameras: cameras that never move; for these `start_episode` switches on the kept background.
        fast: False keeps MuJoCo's own settings (shadows, reflections, four samples a pixel) and no background.
    """

    def __init__(self, model, size: Size, hidden_geom_groups=(), still_cameras=(), fast: bool = True):
        import mujoco

        self._mujoco, self._model, self._size = mujoco, model, size
        if fast:
            model.vis.quality.offsamples = 0
        height, width = make_room(model, size)
        self._still_cameras = tuple(still_cameras) if fast else ()
        self._option = mujoco.MjvOption()
        shown = set(np.flatnonzero(self._option.geomgroup)) - set(hidden_geom_groups)  # MuJoCo hides groups 3 to 5
        self._visible = np.isin(model.geom_group, list(shown))
        self._option.geomgroup[:] = [group == _DRAWN_GROUP for group in range(mujoco.mjNGROUP)]
        self._site_groups = self._option.sitegroup.copy()
        self._gl = mujoco.gl_context.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._free = weakref.finalize(self, _free_contexts, self._gl, self._context)
        self._free.atexit = False  # too late: MuJoCo closes EGL before; a hook registered now runs earlier
        atexit.register(self._free)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 1000)
        if fast:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._start: tuple[np.ndarray, np.ndarray] | None = None
        self._glassy = np.zeros(model.ngeom, bool)  # translucent, by its own colour or its material's
        self._backgrounds: dict[str, _Background] = {}

    def start_episode(self, data) -> None:
        """Take the present poses as the ones to keep in the background. Call at the end of every reset."""
        self._start = (data.geom_xpos.copy(), data.geom_xmat.copy())
        self._backgrounds.clear()
        if self._still_cameras:
            self._update_scene(data, self._still_cameras[0], self._visible)
            self._glassy[:] = False
            self._glassy[[g.objid for g in self._drawn_geoms() if 0 < g.rgba[3] < 1]] = True

    def rgb(self, data, camera: str) -> np.ndarray:
        """The image of a camera, [H, W, 3] uint8, row 0 on top. A function of the episode's start and `data` only."""
        alpha = self._model.site_rgba[:, 3]
        see_through = bool(np.any((alpha > 0) & (alpha < 1)))
        if camera in self._still_cameras and self._start is not None and not see_through:
            background = self._background(data, camera)
            if not (background.moved & self._glassy).any():
                self._update_scene(data, camera, background.moved & self._in_view(data, camera))
                image, depth = self._draw()
                nearer = depth > background.depth
                if not (nearer & (depth <= background.glass)).any():  # else something moves behind the glass
                    return np.where(nearer[..., None], image, background.rgb)[::-1]
        self._update_scene(data, camera, self._in_view(data, camera))
        return np.ascontiguousarray(self._draw(with_depth=False)[0][::-1])

    def geometry(self, data, camera: str, geom_objects: np.ndarray) -> dict[str, np.ndarray]:
        """Depth, object masks and world points of a camera, from one extra render.

        Args:
            geom_objects: [ngeom] object index of every geometry, -1 for none (see `geoms_of_bodies`).

        Returns:
            {"depth": [H, W] float32 metres along the optical axis, "segmentation": [H, W] int32, "points": [H, W, 3]}.
        """
        self._update_scene(data, camera, self._in_view(data, camera))
        with self._as_segments():
            colors, buffer = self._draw()
        depth = self._metres(buffer[::-1])
        camera_id = self._model.camera(camera).id
        rotation = data.cam_xmat[camera_id].reshape(3, 3)
        return {
            "depth": depth,
            "segmentation": self._objects(colors[::-1], geom_objects),
            "points": point_map(depth, data.cam_xpos[camera_id], rotation, self._model.cam_fovy[camera_id]),
        }

    def close(self) -> None:
        """Free the rendering context; also happens by itself when the process ends."""
        self._free()
        atexit.unregister(self._free)

    def _in_view(self, data, camera: str) -> np.ndarray:
        """[ngeom] whether any of a visible geometry can be in the image, by its bounding sphere."""
        camera_id = self._model.camera(camera).id
        local = (data.geom_xpos - data.cam_xpos[camera_id]) @ data.cam_xmat[camera_id].reshape(3, 3)
        height, width = view_size(self._size, camera)
        radius = self._model.geom_rbound
        slopes = np.tan(np.deg2rad(self._model.cam_fovy[camera_id]) / 2) * np.array([width / height, 1.0])
        beyond_side = (np.abs(local[:, :2]) + slopes * local[:, 2:] > radius[:, None] * np.sqrt(1 + slopes**2)).any(1)
        outside = beyond_side | (local[:, 2] > radius)
        return self._visible & ~(outside & (radius > 0))  # planes have no bounding sphere

    def _update_scene(self, data, camera: str, drawn: np.ndarray, with_sites: bool = True) -> None:
        mujoco, model = self._mujoco, self._model
        viewpoint = mujoco.MjvCamera()
        viewpoint.type = mujoco.mjtCamera.mjCAMERA_FIXED
        viewpoint.fixedcamid = model.camera(camera).id
        height, width = view_size(self._size, camera)
        self._rect = mujoco.MjrRect(0, 0, width, height)
        self._option.sitegroup[:] = self._site_groups if with_sites else 0
        groups = model.geom_group.copy()
        model.geom_group[:] = np.where(drawn, _DRAWN_GROUP, 0)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self._option, None, viewpoint, everything, self._scene)
        model.geom_group[:] = groups

    def _draw(self, with_depth: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        self._gl.make_current()
        self._mujoco.mjr_render(self._rect, self._scene, self._context)
        shape = (self._rect.height, self._rect.width)
        rgb = np.empty((*shape, 3), np.uint8)
        depth = np.empty(shape, np.float32) if with_depth else None
        self._mujoco.mjr_readPixels(rgb, depth, self._rect, self._context)
        return rgb, depth

    @contextmanager
    def _as_segments(self) -> Iterator[None]:
        """Draw each geometry in a colour that is its number, and opaque."""
        flags, kinds = self._scene.flags, self._mujoco.mjtRndFlag
        flags[kinds.mjRND_SEGMENT] = flags[kinds.mjRND_IDCOLOR] = 1
        try:
            yield
        finally:
            flags[kinds.mjRND_SEGMENT] = flags[kinds.mjRND_IDCOLOR] = 0

    def _background(self, data, camera: str) -> _Background:
        """The kept background for what has moved by now, drawn again when that set has changed."""
        model, (positions, rotations) = self._model, self._start
        moved = np.abs(data.geom_xpos - positions).max(1) > _MOVED_METRES
        moved |= np.abs(data.geom_xmat - rotations).max(1) > _MOVED_ROTATION
        # A robot moves as a whole, or each of its links would call for a new background of its own.
        root, fixed = model.body_rootid[model.geom_bodyid], model.body_weldid[model.geom_bodyid] == 0
        moved |= ~fixed & np.isin(root, root[moved])
        if camera in self._backgrounds and np.array_equal(self._backgrounds[camera].moved, moved):
            return self._backgrounds[camera]
        # What has not moved is drawn where it stood at the start, so that the image does not depend on when
        # this background happens to be made.
        now = (data.geom_xpos.copy(), data.geom_xmat.copy())
        data.geom_xpos[~moved], data.geom_xmat[~moved] = positions[~moved], rotations[~moved]
        self._update_scene(data, camera, self._visible & ~moved, with_sites=False)
        rgb, depth = self._draw()
        glass = np.zeros_like(depth)
        if self._glassy.any():
            self._update_scene(data, camera, self._visible & ~moved & ~self._glassy, with_sites=False)
            opaque, depth = self._draw()
            self._update_scene(data, camera, self._visible & ~moved & self._glassy, with_sites=False)
            with self._as_segments():
                glass = np.where((opaque != rgb).any(-1), self._draw()[1], 0)
        data.geom_xpos[:], data.geom_xmat[:] = now
        self._backgrounds[camera] = _Background(moved, rgb, depth, glass)
        return self._backgrounds[camera]

    def _metres(self, buffer: np.ndarray) -> np.ndarray:
        """Depth in metres of a reversed depth buffer (1 at the near plane, 0 at the far one)."""
        extent = self._model.stat.extent
        near, far = self._model.vis.map.znear * extent, self._model.vis.map.zfar * extent
        return (near * far / (near + buffer.astype(np.float64) * (far - near))).astype(np.float32)

    def _drawn_geoms(self) -> list:
        kind = self._mujoco.mjtObj.mjOBJ_GEOM
        return [geom for geom in self._scene.geoms[: self._scene.ngeom] if geom.objtype == kind]

    def _objects(self, colors: np.ndarray, geom_objects: np.ndarray) -> np.ndarray:
        ids = colors.astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])  # 0 is nothing, n + 1 is segment n
        table = np.full(self._scene.ngeom + 1, -1, np.int32)
        for geom in self._drawn_geoms():
            if geom.segid >= 0:
                table[geom.segid + 1] = geom_objects[geom.objid]
        return table[ids]
