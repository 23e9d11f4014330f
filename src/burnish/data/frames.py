"""Decoded frames of a LeRobotDataset, kept as one memory-mapped uint8 array per camera.

Random access into compressed video costs a seek and several decoded frames for each sample; reading a memory-mapped
frame costs a copy. The videos are decoded once, in order, at the training resolution.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.files import alone, disk_errors, require_space, sync, write_json
from burnish.core.progress import progress_bar

_VERSION = 1
_SAMPLE = 1 << 16


def load_metadata(root: Path):
    """LeRobotDatasetMetadata of a local folder, never looking for a hub; BurnishError when it is none."""
    from lerobot.datasets import LeRobotDatasetMetadata

    path, wanted = root / "meta" / "info.json", "a LeRobotDataset folder with meta/info.json"
    if not path.is_file():
        raise BurnishError(f"no data set at {root}", wanted, "burnish data demos --help")
    try:
        version = str(json.loads(path.read_text()).get("codebase_version"))
    except json.JSONDecodeError as error:
        raise BurnishError(f"{path} is no JSON ({error})", "a LeRobotDataset") from error
    if not version.startswith("v3"):
        convert = "python -m lerobot.scripts.convert_dataset_v21_to_v30"
        raise BurnishError(f"{root} is a data set of version {version}", "v3.0", convert)
    for name in ("meta/tasks.parquet", "meta/episodes"):
        if not (root / name).exists():
            raise BurnishError(f"{root} has no {name}", "a finished LeRobotDataset", f"burnish data inspect {root}")
    return LeRobotDatasetMetadata(repo_id=root.name, root=root)


def dataset_hash(root: Path) -> str:
    """16 hex digits that change with the data: names, sizes and both ends of every file of the data set."""
    digest = hashlib.sha256()
    for folder in ("meta", "data", "videos"):
        for path in sorted((root / folder).rglob("*")):
            if not path.is_file() or path.name.startswith("."):
                continue
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root)}\0{size}\0".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_SAMPLE))
                if size > 2 * _SAMPLE:
                    file.seek(-_SAMPLE, os.SEEK_END)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class FrameCache:
    """`arrays` maps a camera to uint8 [N, H, W, 3]; entry i is the frame whose "index" column is i."""

    arrays: dict[str, np.ndarray]
    hash: str


def open_frames(
    root: Path, cameras: Sequence[str], image_size: int = 0, cache_dir: str | Path = "", progress: bool = True,
    meta: Any = None,
) -> FrameCache:  # fmt: skip
    """Open the decoded frames, decoding what is not there yet.

    Args:
        root: LeRobotDataset folder (v3).
        cameras: full feature keys, e.g. "observation.images.front".
        image_size: longest edge in pixels, the shape of the image kept; 0 keeps the recorded size.
        cache_dir: where the arrays live; empty means <root>/.frames.
        meta: what `load_metadata(root)` gave, where it has been read already.

    Raises:
        BurnishError: a video is missing, unreadable or too short, has another size than meta/info.json says,
            or the disk is full. Nothing is left behind then.
    """
    meta = load_metadata(root) if meta is None else meta
    key = dataset_hash(root)
    folder = Path(cache_dir) if cache_dir else root / ".frames"
    arrays = {}
    for camera in cameras:
        if camera not in meta.camera_keys:
            raise BurnishError(f"{root} has no camera '{camera}'", f"one of {', '.join(meta.camera_keys)}")
        height, width = _target_size(_recorded_size(meta, camera), image_size)
        path = folder / f"{camera}-{height}x{width}-{key}.npy"
        about = {"version": _VERSION, "data": key, "camera": camera, "shape": [meta.total_frames, height, width, 3]}
        if not _is_current(path, about):
            with alone(folder):
                if not _is_current(path, about):  # another run may have decoded it while this one waited
                    _build(meta, root, camera, path, about, progress)
                    if not cache_dir:
                        _drop_stale(folder, camera, key)
        arrays[camera] = np.load(path, mmap_mode="r", allow_pickle=False)
    return FrameCache(arrays, key)


def _recorded_size(meta, camera: str) -> tuple[int, int]:
    feature = meta.features[camera]
    shape, names = tuple(feature["shape"]), list(feature.get("names") or [])
    if names and names[0] in ("channels", "channel", "c") or (not names and shape[0] == 3):
        shape = (shape[1], shape[2], shape[0])
    if len(shape) != 3 or shape[2] != 3:
        raise BurnishError(f"camera '{camera}' of {meta.root} has shape {shape}", "height x width x 3 colours")
    return shape[0], shape[1]


def _target_size(recorded: tuple[int, int], image_size: int) -> tuple[int, int]:
    if image_size <= 0 or image_size >= max(recorded):
        return recorded
    scale = image_size / max(recorded)
    return max(1, round(recorded[0] * scale)), max(1, round(recorded[1] * scale))


def _is_current(path: Path, about: dict) -> bool:
    """Whether a finished array of exactly this data lies at `path`; anything else is decoded again."""
    try:
        noted = json.loads(path.with_suffix(".json").read_text())
        return noted == about and list(np.load(path, mmap_mode="r", allow_pickle=False).shape) == about["shape"]
    except (ValueError, OSError):  # missing, cut short or overwritten
        return False


def _drop_stale(folder: Path, camera: str, key: str) -> None:
    """Remove arrays of an earlier state of this data set (another hash)."""
    for path in folder.glob(f"{camera}-*"):
        if not path.stem.endswith(key):
            path.unlink(missing_ok=True)


def _build(meta, root: Path, camera: str, path: Path, about: dict, progress: bool) -> None:
    """Decode one camera into `path`: a temporary file filled by position, forced to disk, renamed."""
    count, height, width, _ = about["shape"]
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*"):
        stale.unlink(missing_ok=True)
    header = npy_header(about["shape"], np.uint8)
    frame_bytes = height * width * 3
    require_space(path.parent, len(header) + count * frame_bytes, f"decoding '{camera}' of {root}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    done = np.zeros(count, dtype=bool)
    # A memory map on a full disk dies of SIGBUS; positioned writes raise an error that can be reported.
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        with (
            disk_errors(path),
            progress_bar(total=count, desc=f"decoding {camera}", unit="frame", shown=progress) as bar,
        ):
            os.pwrite(handle, header, 0)

            def fill(job) -> None:
                for index, frame in job():
                    view = memoryview(np.ascontiguousarray(_resize(frame, height, width))).cast("B")
                    if os.pwrite(handle, view, len(header) + index * frame_bytes) != frame_bytes:
                        raise OSError(28, "no space left")
                    done[index] = True
                    bar.update()

            with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
                for future in [pool.submit(fill, job) for job in _jobs(meta, root, camera)]:
                    future.result()
            os.fsync(handle)
        if not done.all():
            raise BurnishError(
                f"camera '{camera}' of {root} has no image for {int((~done).sum())} of {count} frames "
                f"(first: {int(np.argmin(done))})", "one for each frame", f"burnish data inspect {root}",
            )  # fmt: skip
        os.replace(temporary, path)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    write_json(path.with_suffix(".json"), about)


def npy_header(shape: Sequence[int], dtype: Any) -> bytes:
    """What stands before the values in a .npy file of this shape and type."""
    buffer, descr = BytesIO(), np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": tuple(shape)})
    return buffer.getvalue()


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))


def _jobs(meta, root: Path, camera: str):
    """Independent pieces of work, each a function that yields (index, image uint8 [H, W, 3])."""
    size = _recorded_size(meta, camera)
    if camera in meta.image_keys:
        return [lambda p=p: _read_images(p, camera, size) for p in sorted((root / "data").rglob("*.parquet"))]
    files: dict[Path, list[dict]] = {}
    for episode in meta.episodes.with_format(None):
        files.setdefault(root / meta.get_video_file_path(episode["episode_index"], camera), []).append(episode)
    return [lambda p=p, e=e: _read_video(p, e, camera, meta.fps, size) for p, e in files.items()]


def _read_images(path: Path, camera: str, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    import pyarrow.parquet as pq
    from PIL import Image, UnidentifiedImageError

    for group in pq.ParquetFile(path).iter_batches(256, columns=["index", camera]):
        for index, cell in zip(group["index"].to_pylist(), group[camera].to_pylist(), strict=True):
            try:
                frame = np.asarray(Image.open(BytesIO(cell["bytes"])).convert("RGB"))
            except (UnidentifiedImageError, OSError, TypeError) as error:
                raise BurnishError(f"image {index} of '{camera}' in {path} is unreadable ({error})") from error
            _check_size(frame, size, path)
            yield index, frame


def _read_video(
    path: Path, episodes: list[dict], camera: str, fps: float, size: tuple[int, int]
) -> Iterator[tuple[int, np.ndarray]]:
    import av

    if not path.is_file():
        raise BurnishError(f"video {path} is missing", "every file that meta/episodes names", "copy it again")
    indices = {}
    for episode in episodes:
        first = round(episode[f"videos/{camera}/from_timestamp"] * fps)
        start, stop = episode["dataset_from_index"], episode["dataset_to_index"]
        indices |= {first + k: start + k for k in range(stop - start)}
    found = 0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                index = indices.get(round(frame.time * fps)) if frame.time is not None else None
                if index is not None:
                    image = frame.to_ndarray(format="rgb24")
                    _check_size(image, size, path)
                    found += 1
                    yield index, image
    except (av.FFmpegError, IndexError) as error:
        raise BurnishError(f"video {path} is unreadable after {found} frames ({error})", "a whole video file",
                           "record or copy it again") from error  # fmt: skip
    if found < len(indices):
        raise BurnishError(f"video {path} has {found} frames", f"{len(indices)}", "record or copy it again")


def _check_size(image: np.ndarray, size: tuple[int, int], path: Path) -> None:
    if image.shape[:2] != size:
        raise BurnishError(f"{path} holds images of {image.shape[0]}x{image.shape[1]} pixels",
                           f"{size[0]}x{size[1]} as in meta/info.json")  # fmt: skip
