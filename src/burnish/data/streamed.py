"""Where the pictures of a data set's rows are, and arrays of them that decode what is asked for."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from burnish.core.errors import BurnishError
from burnish.core.reading import inside
from burnish.data.dataset import Dataset, look
from burnish.data.pictures import (
    Timeline,
    content,
    decode,
    decode_picture,
    find_video,
    locate,
    open_video,
    read_cells,
    read_timeline,
)

OPEN_FILES = 16
"""Videos, or row groups of tables, that each thread keeps open."""
NEAR = 16
"""Frames ahead that are decoded through rather than sought."""

Picture = tuple[int, np.ndarray]
"""A row and its picture, uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Shape:
    """The size of pictures as stored and as training takes them.

    Args:
        recorded: (height, width).
        size: (height, width, 3).
        smooth: resized as policies do (bilinear), not by the means of boxes.
    """

    recorded: tuple[int, int]
    size: tuple[int, int, int]
    smooth: bool

    @classmethod
    def of(cls, dataset: Dataset, camera: str, image_size: int, seen: int) -> Self:
        """Longest edge `image_size`, or where that is 0 `seen`, the form kept; pictures are never enlarged."""
        height, width, _ = dataset.features[camera]["shape"]
        edge, longest = image_size or seen, max(height, width)
        if edge <= 0 or edge >= longest:
            return cls((height, width), (height, width, 3), False)
        if image_size:
            scale = edge / longest
            return cls((height, width), (max(1, round(height * scale)), max(1, round(width * scale)), 3), False)
        # The sizes that LeRobot's resize_with_pad computes: given pictures of that size it leaves them alone.
        ratio = longest / edge
        return cls((height, width), (max(1, int(height / ratio)), max(1, int(width / ratio)), 3), True)

    def resize(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] as stored to uint8 `size`."""
        height, width, _ = self.size
        if picture.shape[:2] == (height, width):
            return picture
        if not self.smooth:
            from PIL import Image

            return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))
        import torch

        channels_first = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(channels_first, (height, width), mode="bilinear", align_corners=False)
        return resized[0].permute(1, 2, 0).round_().clamp_(0, 255).to(torch.uint8).numpy()


def stamps_of_rows(
    dataset: Dataset, camera: str, shape: Shape, file: str, episodes: Sequence[int], faults: dict[int, str]
) -> tuple[Path, Timeline | None, dict[int, int]]:
    """A video's path and timeline, and the row of each stamp that belongs to one of `episodes`."""
    path, wanted = dataset.root / file, {}
    try:
        timeline = read_timeline(find_video(dataset.root, file))
        if timeline.size != shape.recorded:
            (h, w), (height, width) = timeline.size, shape.recorded
            raise BurnishError(f"{path} holds images of {h}x{w} pixels", f"{height}x{width} as in meta/info.json")
    except BurnishError as error:
        faults |= dict.fromkeys(episodes, str(error))
        return path, None, {}
    for episode in episodes:
        start, stop = dataset.rows.span(episode)
        first, what = locate(timeline, dataset.episodes[episode].clips[camera].start, stop - start, dataset.fps)
        if what and stop > start:
            faults[episode] = f"video {path}: of episode {episode} there is {what}"
        stamps = timeline.stamps[first : first + stop - start].tolist()
        wanted |= dict(zip(stamps, range(start, stop), strict=False))
    return path, timeline, wanted


def placed_video(
    dataset: Dataset, camera: str, shape: Shape, file: str, episodes: Sequence[int], faults: dict[int, str]
) -> Iterator[Picture]:
    """The pictures of one video file; what is wrong with it goes into `faults`, by episode."""
    path, timeline, wanted = stamps_of_rows(dataset, camera, shape, file, episodes, faults)
    if timeline is not None:
        yield from decode(path, wanted)


def placed_pictures(
    dataset: Dataset, camera: str, shape: Shape, file: str, episodes: Sequence[int], faults: dict[int, str]
) -> Iterator[Picture]:
    """The same of pictures in a data file."""
    spans = {episode: dataset.rows.span(episode) for episode in episodes}
    try:
        for episode, frame, cell in read_cells(dataset, camera, file):
            start, stop = spans.get(episode, (0, 0))
            if not 0 <= frame < stop - start:
                continue
            try:
                yield start + frame, decode_picture(content(dataset.root, cell), shape.recorded)
            except BurnishError as error:
                faults.setdefault(episode, f"frame {frame} of episode {episode} has {error} ('{camera}' in {file})")
    except BurnishError as error:
        faults |= {episode: str(error) for episode in episodes if episode not in faults}


class StreamedFrames:
    """Frames [N, H, W, 3] that are decoded when they are indexed; picklable, and safe to share between threads.

    Args:
        root, camera_column: the data set and the stored name of its camera.
        names: files relative to the root.
        files: int32 [N] the file of each row; -1 where it has none.
        places: int64 [N] a frame's stamp in its video, or its row group and row: group << 32 | row.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, root: Path, column: str, names: Sequence[str], files: np.ndarray, places: np.ndarray,
                 shape: Shape, videos: bool):  # fmt: skip
        self.root, self.column, self.names, self.files, self.places = root, column, tuple(names), files, places
        self.form, self.videos, self.shape = shape, videos, (len(files), *shape.size)
        self._own = threading.local()

    @classmethod
    def open(cls, dataset: Dataset, camera: str, shape: Shape, chosen: Sequence[int]) -> Self:
        """The frames of some episodes; raises BurnishError where they are not all there."""
        rows, faults, column = dataset.rows, {}, dataset.features[camera]["columns"][0]
        files, places = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.int64)
        videos = dataset.features[camera]["dtype"] == "video"
        names: dict[str, list[int]] = {}
        for episode in map(dataset.episodes.__getitem__, chosen):
            names.setdefault(episode.clips[camera].file if videos else episode.data_file, []).append(episode.index)
        for number, (name, episodes) in enumerate(names.items()):
            if videos:
                found = stamps_of_rows(dataset, camera, shape, name, episodes, faults)[2]
                at, what = np.fromiter(found.values(), np.int64), np.fromiter(found, np.int64)
            else:
                at, what = _rows_in_groups(dataset, name, episodes, faults)
            files[at], places[at] = number, what
        bad = sorted(set(faults).intersection(chosen))
        if bad:
            raise BurnishError(faults[bad[0]])
        return cls(dataset.root, column, list(names), files, places, shape, videos)

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own = threading.local()

    def __getitem__(self, wanted: Any) -> np.ndarray:
        rows = np.arange(len(self))[wanted]
        flat = np.reshape(rows, -1)
        out = np.empty((len(flat), *self.shape[1:]), np.uint8)
        for i in np.lexsort((self.places[flat], self.files[flat])):
            out[i] = self.form.resize(self._picture(int(flat[i])))
        return out.reshape(*np.shape(rows), *self.shape[1:])

    def _picture(self, row: int) -> np.ndarray:
        number, place = int(self.files[row]), int(self.places[row])
        if number < 0:
            raise BurnishError(f"row {row} of {self.root} has no picture of {self.column}", fix=look(self.root))
        if self.videos:
            video = self._kept(number, lambda: _Video(inside(self.root, self.names[number])))
            return video.frame(place)
        group = place >> 32
        cells = self._kept((number, group), lambda: _group(self.root, self.names[number], group, self.column))
        try:
            return decode_picture(content(self.root, cells[place & 0xFFFFFFFF]), self.form.recorded)
        except BurnishError as error:
            raise BurnishError(f"row {row} of {self.root} has {error}", fix=look(self.root)) from None

    def _kept(self, key: Any, make: Any) -> Any:
        kept = self._own.__dict__.setdefault("kept", OrderedDict())
        if key not in kept:
            kept[key] = make()
            if len(kept) > (OPEN_FILES if self.videos else 2):
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


class _Video:
    """An open video that hands out frames by their stamp."""

    def __init__(self, path: Path):
        self._path, self._container = path, open_video(path)
        self._stream = self._container.streams.video[0]
        rate, base = float(self._stream.average_rate or 0), float(self._stream.time_base or 1)
        self._near = NEAR / rate / base if rate else 0
        self._frames: Any = iter(())
        self._last = -1

    def frame(self, stamp: int) -> np.ndarray:
        """uint8 [H, W, 3]; raises BurnishError where it cannot be decoded."""
        try:
            if not self._last < stamp <= self._last + self._near or self._last < 0:
                self._container.seek(stamp, stream=self._stream, backward=True)
                self._frames = self._container.decode(self._stream)
            for frame in self._frames:
                self._last = frame.pts if frame.pts is not None else self._last
                if frame.pts == stamp and not frame.is_corrupt:
                    return frame.to_ndarray(format="rgb24")
                if self._last >= stamp:
                    break
        except (av.FFmpegError, OSError, ValueError) as error:
            self._last = -1
            raise BurnishError(f"video {self._path} cannot be decoded ({error})", "a whole video") from None
        self._last = -1
        raise BurnishError(f"video {self._path} is damaged at {stamp * float(self._stream.time_base):.3f} s",
                           "a whole video", "copy it again")  # fmt: skip


def _group(root: Path, name: str, group: int, column: str) -> list[Any]:
    return pq.ParquetFile(inside(root, name)).read_row_group(group, columns=[column])[column].to_pylist()


def _rows_in_groups(
    dataset: Dataset, name: str, episodes: Sequence[int], faults: dict[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the data set that a data file holds, and the group and place of each in the file."""
    at, what = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    try:
        file = pq.ParquetFile(inside(dataset.root, name))
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["episode_index", "frame_index"])
            episode, frame = (table[key].to_numpy().astype(np.int64) for key in ("episode_index", "frame_index"))
            starts = np.searchsorted(dataset.rows.keys["episode_index"], episode)
            keep = np.isin(episode, episodes) & (frame >= 0) & (starts + frame < len(dataset.rows))
            at.append((starts + frame)[keep])
            what.append((np.int64(group) << 32 | np.arange(len(frame)))[keep])
    except (pa.ArrowException, OSError) as error:
        faults |= dict.fromkeys(episodes, f"{dataset.root / name} cannot be read ({error})")
    return np.concatenate(at), np.concatenate(what)


class JoinedFrames:
    """Frames [N, H, W, 3] of several data sets, one behind the other; picklable without the pictures.

    Args:
        parts: arrays as `open_frames` gives them; a number stands for so many frames of a camera that is not there.
        size: (H, W); frames of another size are resized into it with their form kept, on black.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, parts: Sequence[Any], size: tuple[int, int]):
        self.parts, self.size = list(parts), size
        self.firsts = np.cumsum([0, *(part if isinstance(part, int) else len(part) for part in parts)])
        self.shape = (int(self.firsts[-1]), *size, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: Any) -> np.ndarray:
        rows = np.arange(len(self))[wanted]
        flat = np.reshape(rows, -1)
        out = np.zeros((len(flat), *self.size, 3), np.uint8)
        owners = np.searchsorted(self.firsts, flat, side="right") - 1
        for d in np.unique(owners).tolist():
            part, mine = self.parts[d], np.flatnonzero(owners == d)
            if not isinstance(part, int):
                out[mine] = fitted(part[flat[mine] - self.firsts[d]], self.size)
        return out.reshape(*np.shape(rows), *self.size, 3)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled with all of its pictures.
        parts = [Path(part.filename) if isinstance(part, np.memmap) else part for part in self.parts]
        return {**self.__dict__, "parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.parts = [
            np.load(part, mmap_mode="r", allow_pickle=False) if isinstance(part, Path) else part for part in self.parts
        ]


def fitted(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [B, H, W, 3] resized (bilinear) to fit in the middle of `size`, with black bars where the form differs."""
    import torch

    height, width = pictures.shape[1:3]
    if (height, width) == size:
        return pictures
    scale = min(size[0] / height, size[1] / width)
    inner = [min(edge, max(1, round(own * scale))) for own, edge in zip((height, width), size, strict=True)]
    channels_first = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(channels_first, inner, mode="bilinear", antialias=True)
    out = np.zeros((len(pictures), *size, 3), np.uint8)
    top, left = ((edge - own) // 2 for own, edge in zip(inner, size, strict=True))
    out[:, top : top + inner[0], left : left + inner[1]] = resized.round_().clamp_(0, 255).permute(0, 2, 3, 1).byte()
    return out
