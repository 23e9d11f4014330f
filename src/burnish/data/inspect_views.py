"""The images of a data set: are all of them there and whole, what do they show, which way is up?"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.data.checks import each
from burnish.data.dataset import Dataset, Problem
from burnish.data.pictures import (
    Timeline,
    content,
    decode,
    decode_depth,
    decode_picture,
    find_video,
    header_fault,
    locate,
    read_cells,
    read_timeline,
)

FROZEN = 0.3  # mean change below this (of 255) between neighbouring frames counts as no change
_LOOKED_AT = 300


@dataclass
class View:
    """One camera of a data set.

    Args:
        size: (height, width) as stored; None when nothing could be decoded.
        codec: of the video, or "images in parquet".
        megabytes: of all its video files.
        brightness: mean over the sampled frames, 0 to 255.
        frozen_share: share of neighbouring frames in a sampled episode that do not differ.
        orientation: a hint in words, or the range of a depth view in the stored unit.
        thumbnails: [H, W, 3] uint8, first, middle and last frame of an episode.
        depth: whether it shows no colours.
    """

    name: str
    size: tuple[int, int] | None = None
    codec: str = "images in parquet"
    megabytes: float = 0.0
    brightness: float = 0.0
    frozen_share: float | None = None
    orientation: str = ""
    thumbnails: list[np.ndarray] = field(default_factory=list)
    depth: bool = False


def look_at_views(dataset: Dataset, quick: bool = False) -> tuple[list[View], list[Problem]]:
    """Views with thumbnails, and every fault of their files.

    Args:
        quick: read videos without decoding them, and only the pictures that are shown.
    """
    views, problems = [], []
    for name in dataset.views:
        one = dataset.features[name]
        view = View(name, depth=one["depth"] or one["shape"][2] != 3)
        look = _look_at_videos if one["dtype"] == "video" else _look_at_pictures
        found, frames = look(dataset, view, quick)
        problems += found
        if frames and not view.depth:
            _describe(dataset, view, frames)
        views.append(view)
    return views, problems


def _look_at_videos(dataset: Dataset, view: View, quick: bool) -> tuple[list[Problem], list[np.ndarray]]:
    """Every video file of a view: there, readable, as long as the rows, and the frames of an episode in the middle."""
    files: dict[str, list[int]] = defaultdict(list)
    for episode in dataset.episodes.values():
        files[episode.clips[view.name].file].append(episode.index)
    problems, shown, readable = [], [], {}
    for file, episodes in progress_bar(files.items(), desc=view.name, leave=False):
        try:
            path = find_video(dataset.root, file)
            readable[file] = timeline = read_timeline(path)
        except BurnishError as error:
            where = f"video {dataset.root / file} "
            problems.append(Problem("error", file, str(error).removeprefix(where).removeprefix("is "), tuple(episodes),
                                    view.name))  # fmt: skip
            continue
        view.size, view.codec = timeline.size, timeline.codec
        view.megabytes += path.stat().st_size / 1e6
        problems += _check_video(dataset, view, file, episodes, timeline)
    whole = [file for file in readable if not any(one.where == file for one in problems)] or list(readable)
    if view.depth or not whole:
        return problems, []
    middle = whole[len(whole) // 2]
    sample = files[middle][len(files[middle]) // 2]
    for file in whole if not quick else [middle]:
        wanted, path = _placed(dataset, view.name, file, files[file], readable[file]), dataset.root / file
        start, stop = dataset.rows.span(sample)
        seen = set()
        for row, picture in progress_bar(decode(path, wanted), desc=file, leave=False):
            seen.add(row)
            if file == middle and start <= row < min(stop, start + _LOOKED_AT):
                shown.append(picture)
            if quick and row >= min(stop, start + _LOOKED_AT) - 1:
                break
        if not quick:
            problems += _check_seen(dataset, view.name, file, sorted(set(wanted.values()) - seen))
    return problems, shown


def _placed(dataset: Dataset, camera: str, file: str, episodes: list[int], timeline: Timeline) -> dict[int, int]:
    wanted = {}
    for episode in episodes:
        start, stop = dataset.rows.span(episode)
        first, _ = locate(timeline, dataset.episodes[episode].clips[camera].start, stop - start, dataset.fps)
        stamps = timeline.stamps[first : first + stop - start].tolist()
        wanted |= dict(zip(stamps, range(start, stop), strict=False))
    return wanted


def _check_seen(dataset: Dataset, camera: str, file: str, missing: list[int]) -> list[Problem]:
    if not missing:
        return []
    episodes, frames = (dataset.rows.keys[name][missing] for name in ("episode_index", "frame_index"))
    what = f"damaged: {len(missing)} frames cannot be decoded, first frame {frames[0]} of episode {episodes[0]}"
    return [Problem("error", file, what, tuple(np.unique(episodes).tolist()), camera)]


def _check_video(dataset: Dataset, view: View, file: str, episodes: list[int], timeline: Timeline) -> list[Problem]:
    rows, fps = dataset.rows, dataset.fps
    count, found = sum(stop - start for start, stop in map(rows.span, episodes)), len(timeline)
    declared = tuple(dataset.features[view.name]["shape"][:2])
    if timeline.size != declared:
        (h, w), (height, width) = timeline.size, declared
        what = f"images are {h}x{w}, meta/info.json says {height}x{width} (height x width)"
        return [Problem("error", view.name, what, tuple(episodes), view.name)]
    if timeline.rate and abs(timeline.rate - fps) > 0.01 * fps:
        what = f"{timeline.rate:g} frames a second, meta/info.json says {fps:g}"
        return [Problem("error", file, what, tuple(episodes), view.name)]
    if found != count:
        what = f"too {'short' if found < count else 'long'}: {found} frames, {count} frames in the data"
        return [Problem("error", file, what, tuple(episodes), view.name, stops=found < count)]
    faults = []
    for episode in episodes:
        start, stop = rows.span(episode)
        what = locate(timeline, dataset.episodes[episode].clips[view.name].start, stop - start, fps)[1]
        if what:
            faults.append((episode, f"in {file} there are {what}"))
    return each(faults, camera=view.name)


def _look_at_pictures(dataset: Dataset, view: View, quick: bool) -> tuple[list[Problem], list[np.ndarray]]:
    """Every picture in the tables: there, and its header right; and three of an episode in the middle."""
    numbers = [number for number in dataset.rows.episodes.tolist() if number in dataset.episodes]
    if not numbers:
        return [], []
    sample = numbers[len(numbers) // 2]
    start, stop = dataset.rows.span(sample)
    picked, shown, faults = {0, (stop - start) // 2, stop - start - 1}, {}, {}
    size = tuple(dataset.features[view.name]["shape"][:2])
    files = dict.fromkeys(dataset.episodes[number].data_file for number in numbers)
    for file in [dataset.episodes[sample].data_file] if quick else files:
        for episode, frame, cell in progress_bar(read_cells(dataset, view.name, file), desc=view.name, leave=False):
            shows = episode == sample and frame in picked
            if quick and not shows:
                continue
            try:
                data = content(dataset.root, cell)
                fault = "" if view.depth else header_fault(data, size)
                if shows and not fault:
                    shown[frame] = decode_depth(data) if view.depth else decode_picture(data, size)
            except BurnishError as error:
                fault = str(error)
            if fault:
                faults.setdefault(episode, []).append((frame, fault))
    if view.depth and shown:
        low, high = min(one.min() for one in shown.values()), max(one.max() for one in shown.values())
        view.size = next(iter(shown.values())).shape[:2]
        view.orientation = f"depth, {low:g} to {high:g} in its own unit"
    found = [(episode, f"frame {many[0][0]} has {many[0][1]}" + (f", {len(many) - 1} more" if len(many) > 1 else ""))
             for episode, many in sorted(faults.items())]  # fmt: skip
    return each(found, camera=view.name), [shown[frame] for frame in sorted(shown)]


def _describe(dataset: Dataset, view: View, frames: list[np.ndarray]) -> None:
    """Fill in what the sampled frames show."""
    view.size = frames[0].shape[:2]
    view.thumbnails = [frames[0], frames[len(frames) // 2], frames[-1]]
    view.brightness = float(np.mean([frame.mean() for frame in frames]))
    if dataset.features[view.name]["dtype"] == "video" and len(frames) > 1:
        change = [np.abs(a.astype(np.int16) - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
        view.frozen_share = float(np.mean(np.array(change) < FROZEN))
    view.orientation = orientation_hint(view.thumbnails)


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
