"""Decoded frames of a LeRobotDataset, kept as one memory-mapped uint8 array per camera.

Random access into compressed video costs a seek and several decoded frames for each sample; reading a memory-mapped
frame costs a copy. The videos are decoded once, in order, at the size that the policy sees. Where that would take too
much room on the disk they are decoded when asked for (`burnish.data.streamed`).
"""

import glob
import hashlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.files import alone, disk_errors, make_folder, require_space, sampled_digest, sync, write_json
from burnish.core.progress import progress_bar
from burnish.core.reading import read_object, regular_file
from burnish.data.checks import leaving, require
from burnish.data.dataset import Dataset, open_dataset
from burnish.data.streamed import Picture, Shape, StreamedFrames, placed_pictures, placed_video

CACHE_GB = 32.0
"""Largest cache of one data set, unless the recipe says otherwise."""
_VERSION = 3
_SAMPLE = 1 << 16
log = logging.getLogger("burnish")


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
    """`arrays` maps a camera to uint8 [N, H, W, 3], memory-mapped or decoded when indexed; entry i is row i."""

    arrays: dict[str, Any]
    hash: str


def open_frames(
    root: Path, cameras: Sequence[str], image_size: int = 0, cache_dir: str | Path = "", progress: bool = True,
    meta: Dataset | None = None, *, seen: int = 0, cache_gb: float = CACHE_GB, episodes: Sequence[int] = (),
) -> FrameCache:  # fmt: skip
    """Open the decoded frames, decoding what is not there yet.

    Args:
        cameras: full feature keys, e.g. "observation.images.front".
        image_size: longest edge in pixels, the shape of the image kept; 0 means what the policy sees.
        cache_dir: where the arrays live; empty means <root>/.frames, or the user's cache where that lacks some and may
            not be written.
        meta: what `open_dataset(root)` gave, where it has been read already.
        seen: longest edge that the policy resizes its images to; 0 keeps the recorded size.
        cache_gb: room that the arrays of all cameras may take together; beyond it frames are decoded when asked for.
        episodes: those whose frames must be there; none named means all.

    Raises:
        BurnishError: a camera that is not there, a picture of these episodes that is missing, unreadable or of another
            size than meta/info.json says, or the disk is full. Nothing is left behind then.
    """
    dataset = open_dataset(root) if meta is None else meta
    for camera in cameras:
        if camera not in dataset.camera_keys:
            raise BurnishError(f"{root} has no camera '{camera}'", f"one of {', '.join(dataset.camera_keys)}")
    chosen = require(dataset, episodes, cameras)
    key, shapes = dataset_hash(root), {camera: Shape.of(dataset, camera, image_size, seen) for camera in cameras}
    if sum(len(dataset.rows) * prod(shape.size) for shape in shapes.values()) > cache_gb * 1e9:
        if cache_gb:  # else nothing was to be kept
            log.info("the frames of %s take more than data.cache_gb (%g GB): decoded when needed", root, cache_gb)
        return FrameCache({c: StreamedFrames.open(dataset, c, shapes[c], chosen) for c in cameras}, key)
    wanted, arrays = {}, {}
    for camera, shape in shapes.items():
        height, width, _ = shape.size
        about = {"version": _VERSION, "data": key, "camera": camera, "shape": [len(dataset.rows), *shape.size],
                 "columns": list(dataset.features[camera]["columns"])}  # fmt: skip
        wanted[camera] = f"{camera}-{height}x{width}{'-seen' if shape.smooth else ''}-{key}.npy", about
    folder = _folder(root, cache_dir, lambda one: all(_is_current(one / n, a, chosen) for n, a in wanted.values()))
    for camera, (name, about) in wanted.items():
        path = folder / name
        if not _is_current(path, about, chosen):
            make_folder(folder)
            with disk_errors(folder), alone(folder):
                if not _is_current(path, about, chosen):  # another run may have decoded it while this one waited
                    _build(dataset, camera, shapes[camera], path, about, chosen, progress)
                    _drop_stale(folder, root, camera, key, everything=folder == root / ".frames")
        arrays[camera] = np.load(path, mmap_mode="r", allow_pickle=False)
    return FrameCache(arrays, key)


def _folder(root: Path, cache_dir: str | Path, whole: Callable[[Path], bool]) -> Path:
    """Where the arrays live; a data set that may not be written has them in the user's cache, unless it is `whole`."""
    beside = root / ".frames"
    if beside.is_symlink() and not cache_dir:
        raise BurnishError(f"{beside} is a link", "a folder of the data set itself, or data.cache_dir in a recipe",
                           f"rm {shlex.quote(str(beside))}")  # fmt: skip
    if cache_dir or os.access(beside if beside.exists() else root, os.W_OK) or whole(beside):
        return Path(cache_dir) if cache_dir else beside
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish" / "frames"
    log.warning("%s may not be written: decoded frames go to %s (elsewhere by a recipe's data.cache_dir)", root, folder)
    try:
        make_folder(folder)
    except BurnishError as error:
        raise BurnishError(f"neither {root} nor {folder} may be written", "a place for the decoded frames",
                           "export XDG_CACHE_HOME=DIR") from error  # fmt: skip
    return folder


def _is_current(path: Path, about: dict, chosen: Sequence[int]) -> bool:
    """Whether a finished array of exactly this data, with all chosen episodes, lies at `path`."""
    try:
        noted = read_object(path.with_suffix(".json"), path.parent)
        lacking, digest = noted.pop("lacking", []), noted.pop("digest", "")
        noted.pop("root", None)
        with open(regular_file(path, path.parent), "rb") as file:
            start = file.read(len(npy_header(about["shape"], np.uint8)))
        whole = start == npy_header(about["shape"], np.uint8) and sampled_digest(path) == digest
        return noted == about and whole and not set(lacking).intersection(chosen)
    except (BurnishError, TypeError, ValueError, OSError):  # missing, cut short, overwritten or another's
        return False


def _drop_stale(folder: Path, root: Path, camera: str, key: str, everything: bool) -> None:
    """Remove arrays of earlier states of this data set (another hash); `everything` here is this data set's."""
    for path in folder.glob(f"{glob.escape(camera)}-*.json"):
        if path.stem.endswith(key):
            continue
        try:
            own = everything or read_object(path).get("root") == str(root.resolve())
        except BurnishError:
            continue
        if own:
            path.unlink(missing_ok=True)
            path.with_suffix(".npy").unlink(missing_ok=True)


def _build(
    dataset: Dataset, camera: str, shape: Shape, path: Path, about: dict, chosen: Sequence[int], progress: bool
) -> None:
    """Decode one camera into `path`: a temporary file filled by position, forced to disk, renamed."""
    count, *size = about["shape"]
    if path.is_dir():
        raise BurnishError(f"{path} is a folder", "decoded frames, or nothing", f"rm -r {shlex.quote(str(path))}")
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*"):
        stale.unlink(missing_ok=True)
    header = npy_header(about["shape"], np.uint8)
    frame_bytes = prod(size)
    require_space(path.parent, len(header) + count * frame_bytes, f"decoding '{camera}' of {dataset.root}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    done, faults = np.zeros(count, dtype=bool), {}
    # A memory map on a full disk dies of SIGBUS; positioned writes raise an error that can be reported.
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        with (
            disk_errors(path),
            progress_bar(total=count, desc=f"decoding {camera}", unit="frame", shown=progress) as bar,
        ):
            os.pwrite(handle, header, 0)
            os.ftruncate(handle, len(header) + count * frame_bytes)

            def fill(job: Callable[[], Iterator[Picture]]) -> None:
                for row, image in job():
                    view = memoryview(np.ascontiguousarray(shape.resize(image))).cast("B")
                    if os.pwrite(handle, view, len(header) + row * frame_bytes) != frame_bytes:
                        raise OSError(28, "no space left")
                    done[row] = True
                    bar.update()

            with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
                for future in [pool.submit(fill, job) for job in _jobs(dataset, camera, shape, faults)]:
                    future.result()
            os.fsync(handle)
        lacking = _lacking(dataset, camera, done, faults, chosen)
        os.replace(temporary, path)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    more = {"lacking": lacking, "root": str(dataset.root.resolve()), "digest": sampled_digest(path)}
    write_json(path.with_suffix(".json"), about | more)


def _jobs(dataset: Dataset, camera: str, shape: Shape, faults: dict[int, str]) -> list[Callable[[], Iterator[Picture]]]:
    """Independent pieces of work; what they find wrong they note in `faults`, by episode."""
    files: dict[str, list[int]] = {}
    place = placed_pictures
    for episode in dataset.episodes.values():
        name = episode.data_file
        if camera in episode.clips:
            name, place = episode.clips[camera].file, placed_video
        files.setdefault(name, []).append(episode.index)
    return [lambda n=n, e=e: place(dataset, camera, shape, n, e, faults) for n, e in files.items()]


def _lacking(
    dataset: Dataset, camera: str, done: np.ndarray, faults: dict[int, str], chosen: Sequence[int]
) -> list[int]:
    """Episodes without all their pictures; BurnishError where a chosen one is among them."""
    for episode, start, count in zip(dataset.rows.episodes, dataset.rows.starts, dataset.rows.counts, strict=True):
        here = done[start : start + count]
        if not here.all():
            frame = int(np.argmin(here))
            faults.setdefault(int(episode), f"camera '{camera}' has no readable picture of frame {frame} of episode "
                              f"{episode} (damaged?), and {int((~here).sum()) - 1} more there")  # fmt: skip
    bad = sorted(set(faults).intersection(chosen))
    if bad:
        fix = leaving(dataset, set(chosen) - faults.keys())
        raise BurnishError(faults[bad[0]], fix="" if "; try: " in faults[bad[0]] else fix)
    return sorted(faults)


def npy_header(shape: Sequence[int], dtype: Any) -> bytes:
    """What stands before the values in a .npy file of this shape and type."""
    buffer, descr = BytesIO(), np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": tuple(shape)})
    return buffer.getvalue()
