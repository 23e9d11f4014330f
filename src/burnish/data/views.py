"""What a data set's frames look like to a teacher: stored images, and depth rendered again from stored states.

Picklable and free of LeRobot, so that processes which fill the cache start quickly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.options import number
from burnish.core.reading import inside, read_lines, regular_file
from burnish.envs.base import make_env
from burnish.envs.rendering import point_map
from burnish.teachers.base import Views
from burnish.teachers.placing import Placement, place

RESTORABLE = "tabletop"


@dataclass(frozen=True)
class FrameSource:
    """Says where everything is; `FrameViews` opens it.

    Args:
        frames: camera to the .npy file of decoded frames, uint8 [N, H, W, 3], or to `StreamedFrames`.
        placements: how the policy pads each camera's view; none where it does not.
    """

    frames: dict[str, Any]
    root: Path
    geometry: bool
    placements: tuple[Placement, ...] = ()


def frame_source(
    data: Any, cameras: tuple[str, ...], geometry: bool, placements: tuple[Placement, ...] = ()
) -> FrameSource:
    """The source of a `RobotData`; raises BurnishError where depth is wanted and nothing tells it."""
    arrays = data.frames.arrays
    chosen = {camera: arrays[f"observation.images.{camera}"] for camera in cameras}
    frames = {camera: Path(a.filename) if isinstance(a, np.memmap) else a for camera, a in chosen.items()}
    if geometry:
        if data.several:
            raise BurnishError("a teacher that looks at the geometry, and several data sets (data.mix)", "one data set",
                               "another teacher, e.g. teacher: {name: folder, path: ...}")  # fmt: skip
        _episodes(data.root)
    return FrameSource(frames, Path(data.root), geometry, placements)


def has_geometry(root: Path, cameras: Sequence[str]) -> bool:
    """Whether depth of these cameras is kept beside a data set, or can be rendered again from its states."""
    if not (Path(root) / "ground_truth" / "episodes.jsonl").is_file():
        return False
    first = next(iter(_episodes(root)), {})
    if str(first.get("task_id", "")).partition(":")[0] == RESTORABLE:
        return True
    folder, frames = Path(root) / "ground_truth", str(first.get("frames", ""))
    return bool(frames) and all(_depth_file(folder, frames, camera).is_file() for camera in cameras)


class FrameViews:
    """Gives the views of a data set's frames; `source` as `frame_source` makes it."""

    def __init__(self, source: FrameSource):
        self.source = source
        self.arrays = {
            camera: np.load(one, mmap_mode="r", allow_pickle=False) if isinstance(one, Path) else one
            for camera, one in source.frames.items()
        }
        num_frames = next(iter(self.arrays.values())).shape[0]
        self._depth = _Depth(source.root, num_frames) if source.geometry else None

    def __call__(self, indices: np.ndarray, states: np.ndarray | None) -> Views:
        """Views of B frames; `states` [B, D] are their observed states (needed for rendered depth)."""
        frames = [torch.from_numpy(array[indices]).permute(0, 3, 1, 2).float() / 255 for array in self.arrays.values()]
        images_BV3HW = place(frames, self.source.placements)
        views = Views(images_BV3HW, torch.ones(images_BV3HW.shape[:2], dtype=torch.bool), tuple(self.arrays))
        if self._depth is not None:
            seen = [
                [self._depth(int(index), camera, array.shape[1], None if states is None else states[i])
                 for i, index in enumerate(indices)]
                for camera, array in self.arrays.items()
            ]  # fmt: skip
            depth = [torch.from_numpy(np.stack([one["depth"] for one in view]))[:, None] for view in seen]
            points = [torch.from_numpy(np.stack([one["points"] for one in view])).permute(0, 3, 1, 2) for view in seen]
            views.depth = place(depth, self.source.placements, repeat=True)[:, :, 0]
            views.points = place(points, self.source.placements, repeat=True).permute(0, 1, 3, 4, 2)
        return views

    def close(self) -> None:
        if self._depth is not None:
            self._depth.close()


class _Depth:
    """Depth and world points of one frame and camera: stored beside the data set, or rendered from its states."""

    def __init__(self, root: Path, num_frames: int):
        self._folder, self._episodes = root / "ground_truth", _episodes(root)
        lengths = [episode["length"] for episode in self._episodes]
        if sum(lengths) != num_frames:
            raise BurnishError(f"{self._folder}/episodes.jsonl tells of {sum(lengths)} frames",
                               f"the {num_frames} of the data set")  # fmt: skip
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._frames = lru_cache(maxsize=64)(self._read)
        self._env, self._env_id = None, ("", 0)

    def __call__(self, index: int, camera: str, size: int, state: np.ndarray | None) -> dict[str, np.ndarray]:
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        episode, frame = self._episodes[place], index - int(self._starts[place])
        told = self._frames(episode["frames"])
        if len(told) != episode["length"]:
            raise BurnishError(f"{self._folder}/{episode['frames']} has {len(told)} lines",
                               f"one for each of {episode['length']} frames")  # fmt: skip
        facts, stored = told[frame], _depth_file(self._folder, episode["frames"], camera)
        if stored.exists():
            return _from_stored(_load_depth(stored, self._folder, episode["length"])[frame], facts, camera, stored)
        if episode["task_id"].partition(":")[0] != RESTORABLE:
            raise BurnishError(
                f"no depth of '{camera}' beside {self._folder.parent}, and {episode['task_id']} cannot be put back",
                "demonstrations with depth", "burnish data demos --geometry ...",
            )  # fmt: skip
        env = self._environment(episode["task_id"], size)
        try:
            env.restore(facts, state)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            where = f"line {frame + 1} of {self._folder}/{episode['frames']}"
            raise BurnishError(f"{where} does not say where things were ({error!r})", "what demos wrote") from error
        return env.geometry(camera)

    def _read(self, name: str) -> list[dict]:
        return [row for _, row in read_lines(inside(self._folder, name), self._folder)]

    def _environment(self, task_id: str, size: int):
        if self._env_id != (task_id, size):
            self.close()
            self._env, self._env_id = make_env(task_id, size), (task_id, size)
        return self._env

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env, self._env_id = None, ("", 0)


def _depth_file(folder: Path, frames: str, camera: str) -> Path:
    return folder / frames.replace(".jsonl", f".{camera}.depth.npy")


def _load_depth(path: Path, folder: Path, length: int) -> np.ndarray:
    """[T, H, W] of an episode, memory-mapped."""
    try:
        depth = np.load(regular_file(path, folder), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise BurnishError(f"{path} is no array of depth ({error})", "the file that demos wrote") from error
    if depth.ndim != 3 or len(depth) != length or not np.issubdtype(depth.dtype, np.floating):
        raise BurnishError(f"{path} has shape {depth.shape} of {depth.dtype}", f"[{length}, H, W] metres")
    return depth


def _from_stored(depth: np.ndarray, facts: dict, camera: str, path: Path) -> dict[str, np.ndarray]:
    """World points of a stored depth image, by the camera's pose in the frame's facts."""
    poses = facts.get("cameras")
    pose = poses.get(camera) if isinstance(poses, dict) else None
    sizes = {"position": 3, "rotation": 9, "fovy": 1}
    if not isinstance(pose, dict) or not all(_numbers(pose.get(key), count) for key, count in sizes.items()):
        raise BurnishError(f"no pose of camera '{camera}' beside {path}",
                           "demonstrations recorded again with --geometry")  # fmt: skip
    depth = np.array(depth, np.float32)
    turned = camera in facts.get("turned", ())
    # Stored views are upright; the pose is that of the simulator's camera, which may hang upside down or be mirrored.
    rows, columns = -1 if turned else 1, -1 if turned or facts.get("mirrored") else 1
    rotation = np.array(pose["rotation"]).reshape(3, 3)
    points = point_map(depth[::rows, ::columns], np.array(pose["position"]), rotation, pose["fovy"])
    return {"depth": depth, "points": np.ascontiguousarray(points[::rows, ::columns])}


def _episodes(root: Path) -> list[dict]:
    path = Path(root) / "ground_truth" / "episodes.jsonl"
    if not path.is_file():
        raise BurnishError(f"no {path}: nothing tells where things were", "demonstrations made by burnish data demos",
                           "another teacher, e.g. teacher: {name: folder, path: ...}")  # fmt: skip
    rows = [row for _, row in read_lines(path)]
    kinds = {"episode_index": int, "length": int, "frames": str, "task_id": str}
    if any(type(row.get(key)) is not kind for row in rows for key, kind in kinds.items()):
        raise BurnishError(f"{path} has a line without episode_index, length, frames and task_id", "what demos wrote")
    if any(row["length"] < 1 for row in rows):
        raise BurnishError(f"{path} has an episode of no frames", "what demos wrote")
    return sorted(rows, key=lambda row: row["episode_index"])


def _numbers(value: Any, count: int) -> bool:
    """Whether a value holds `count` finite numbers, in lists or alone."""
    flat = [value] if count == 1 else value
    while isinstance(flat, list) and flat and isinstance(flat[0], list):
        flat = [one for row in flat for one in (row if isinstance(row, list) else [row])]
    return isinstance(flat, list) and len(flat) == count and all(map(number, flat))
