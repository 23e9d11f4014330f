"""The images of a data set: are the videos whole, what do they show, which way is up?"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.data.inspect_files import DatasetFiles, Episode, read_embedded_image

FROZEN = 0.3  # mean change below this (of 255) between neighbouring frames counts as no change


@dataclass
class View:
    """One camera of a data set.

    Args:
        size: (height, width) as stored; None when nothing could be decoded.
        codec: of the video, or "images in parquet".
        megabytes: of all its video files.
        brightness: mean over the sampled frames, 0 to 255.
        frozen_share: share of neighbouring frames in a sampled episode that do not differ.
        orientation: a hint in words.
        thumbnails: [H, W, 3] uint8, first, middle and last frame of an episode.
    """

    name: str
    size: tuple[int, int] | None = None
    codec: str = ""
    megabytes: float = 0.0
    brightness: float = 0.0
    frozen_share: float | None = None
    orientation: str = ""
    thumbnails: list[np.ndarray] = field(default_factory=list)


def look_at_views(files: DatasetFiles, quick: bool = False) -> tuple[list[View], list[tuple[str, str]]]:
    """Views with thumbnails, and (file, what is wrong) for every fault found; `quick` as in `inspect_dataset`."""
    views, faults = [], []
    for name in files.views:
        view, broken = View(name, codec="images in parquet"), []
        if name in files.videos:
            broken = _check_videos(files, name, quick, view)
        try:
            frames = _sample_frames(files, name, {where for where, _ in broken})
        except BurnishError as error:
            broken.append((name, str(error)))
            frames = []
        faults += broken
        if frames:
            faults += _describe(files, view, frames)
        views.append(view)
    return views, faults


def _check_videos(files: DatasetFiles, name: str, quick: bool, view: View) -> list[tuple[str, str]]:
    """Every video file of a view: there, readable, and as long as the metadata says."""
    expected: dict[Path, int] = defaultdict(int)
    for episode in files.episodes:
        expected[episode.clips[name].file] += episode.length
    faults = []
    for file, frames in progress_bar(expected.items(), desc=name, leave=False):
        where = _where(files, file)
        if not file.is_file():
            faults.append((where, "missing"))
            continue
        view.megabytes += file.stat().st_size / 1e6
        fault = _check_video(file, frames, files.fps, quick, view)
        if fault:
            faults.append((where, fault))
    return faults


def _check_video(file: Path, frames: int, fps: int, quick: bool, view: View) -> str:
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                return "holds no video"
            stream = container.streams.video[0]
            view.codec = stream.codec_context.name
            rate = float(stream.average_rate or 0)
            found = stream.frames if quick else 0
            # Read to the end without decoding: a file cut short shows there, not in its header.
            found = found or sum(1 for packet in container.demux(stream) if packet.size and not packet.is_corrupt)
    except (av.FFmpegError, OSError) as error:
        return f"unreadable ({error.strerror or error})"
    if found != frames:
        return f"too {'short' if found < frames else 'long'}: {found} frames, {frames} frames in the data"
    if rate and abs(rate - fps) > 0.01 * fps:
        return f"{rate:g} frames a second, meta/info.json says {fps}"
    return ""


def _where(files: DatasetFiles, file: Path) -> str:
    return str(file.relative_to(files.root))


def read_frames(episode: Episode, name: str, fps: int) -> Iterator[np.ndarray]:
    """Decode the frames [H, W, 3] uint8 of one episode and view, in order."""
    import av

    clip = episode.clips[name]
    try:
        with av.open(str(clip.file)) as container:
            stream = container.streams.video[0]
            start = clip.start - 0.5 / fps
            container.seek(max(0, int(start / stream.time_base)), stream=stream, backward=True)
            sent = 0
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= start:
                    yield frame.to_ndarray(format="rgb24")
                    sent += 1
                    if sent == episode.length:
                        return
    except (av.FFmpegError, OSError, IndexError) as error:
        raise BurnishError(f"{clip.file} cannot be decoded ({getattr(error, 'strerror', error)})") from None
    raise BurnishError(f"{clip.file}: episode {episode.index} ends after {sent} of {episode.length} frames")


def _sample_frames(files: DatasetFiles, name: str, broken: set[str]) -> list[np.ndarray]:
    """Frames of an episode in the middle whose file is whole: up to 300 of a video, or three embedded images."""
    readable = [e for e in files.episodes if name not in e.clips or _where(files, e.clips[name].file) not in broken]
    if not readable:
        return []
    episode = readable[len(readable) // 2]
    if name not in files.videos:
        picked = sorted({0, episode.length // 2, episode.length - 1})
        return [read_embedded_image(files, name, episode, frame) for frame in picked]
    return list(islice(read_frames(episode, name, files.fps), 300))


def _describe(files: DatasetFiles, view: View, frames: list[np.ndarray]) -> list[tuple[str, str]]:
    """Fill in what the sampled frames show; returns faults."""
    view.size = frames[0].shape[:2]
    view.thumbnails = [frames[0], frames[len(frames) // 2], frames[-1]]
    view.brightness = float(np.mean([frame.mean() for frame in frames]))
    if view.name in files.videos and len(frames) > 1:
        change = [np.abs(a.astype(np.int16) - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
        view.frozen_share = float(np.mean(np.array(change) < FROZEN))
    view.orientation = orientation_hint(view.thumbnails)
    return _check_size(files, view)


def _check_size(files: DatasetFiles, view: View) -> list[tuple[str, str]]:
    shape, names = files.features[view.name]["shape"], files.features[view.name].get("names") or []
    if len(shape) != 3:
        return [(view.name, f"shape {shape} in meta/info.json; expected three numbers")]
    channels_first = bool(names) and str(names[0]).startswith("c") or (not names and shape[0] == 3)
    declared = tuple(shape[1:]) if channels_first else tuple(shape[:2])
    if declared == view.size:
        return []
    found = f"{view.size[0]}x{view.size[1]}"
    return [(view.name, f"images are {found}, meta/info.json says {declared[0]}x{declared[1]} (height x width)")]


def orientation_hint(frames: list[np.ndarray]) -> str:
    """Which way up, guessed from where detail is: table and objects usually fill the lower half of an upright image."""
    grey = np.mean([frame.astype(np.float32).mean(-1) for frame in frames], axis=0)
    edges = np.abs(np.diff(grey, axis=1))[1:] + np.abs(np.diff(grey, axis=0))[:, 1:]
    half = len(edges) // 2
    top, bottom = float(edges[:half].mean()), float(edges[-half:].mean())
    if top + bottom < 0.5:
        return "almost no detail: blank or covered camera?"
    if top > 1.5 * bottom:
        ratio = top / max(bottom, 1e-3)
        return f"the top half has {ratio:.1f} times the detail of the bottom: upside down? (a hint; look)"
    if bottom > 1.5 * top:
        return "more detail in the bottom half, as in most upright views (a hint)"
    return "detail is evenly spread, no hint"
