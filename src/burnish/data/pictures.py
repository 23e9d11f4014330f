"""Pictures of a data set: in its tables, in files that the tables name, and in videos."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from burnish.core.errors import BurnishError, first_line
from burnish.core.reading import inside, regular_file
from burnish.data.dataset import Dataset
from burnish.data.tables import misplaced

MOST_PIXELS = 1 << 26
_DEEP = ("I;16", "I;16L", "I;16B", "I", "F")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
"""Pillow knows others too, among them EPS, for which it runs Ghostscript."""
_ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}


def read_cells(dataset: Dataset, camera: str, file: str, groups: Sequence[int] = ()) -> Iterator[tuple[int, int, Any]]:
    """(episode, frame, what stands in the table) for every row of a data file, or of some of its row groups."""
    path, (column,) = regular_file(inside(dataset.root, file), dataset.root), dataset.features[camera]["columns"]
    try:
        table = pq.ParquetFile(path)
        if column not in table.schema_arrow.names:
            raise BurnishError(f"{path} lacks the column {column}", "every feature of meta/info.json")
        columns = ["episode_index", "frame_index", column]
        for batch in table.iter_batches(64, columns=columns, row_groups=list(groups) or None):
            yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BurnishError(f"{path} cannot be read ({str(error).splitlines()[0]})", "a whole parquet file") from None


def content(root: Path, cell: Any) -> bytes:
    """The bytes of a stored picture; raises BurnishError ("no picture") where there are none."""
    if isinstance(cell, dict):
        data, name = cell.get("bytes"), cell.get("path")
    else:
        data, name = (cell, None) if isinstance(cell, bytes) else (None, cell)
    if isinstance(data, bytes) and data:
        return data
    if isinstance(name, str) and name and os.path.isfile(root / name):
        return regular_file(inside(root, name), root).read_bytes()
    raise BurnishError(f"no picture, but {type(cell).__name__}" if cell is not None and not isinstance(cell, dict)
                       else "no picture" + (f" (no file {name})" if name else ""))  # fmt: skip


def open_picture(data: bytes) -> Any:
    """The PIL image, whose header alone is read; raises BurnishError where it is none, or of absurd size."""
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BurnishError(f"an unreadable picture ({first_line(error, 120)})") from None
    if image.width * image.height > MOST_PIXELS:
        raise BurnishError(f"a picture of {image.height}x{image.width} pixels")
    return image


def header_fault(data: bytes, size: tuple[int, int]) -> str:
    """What the header of a colour picture and its last bytes show to be wrong; "" if nothing."""
    try:
        image = open_picture(data)
    except BurnishError as error:
        return str(error)
    end = _ENDS.get(image.format)
    if end is not None and end not in data[-64:]:
        return f"a {image.format} picture that is cut short"
    return _form_fault(image, size)


def _form_fault(image: Any, size: tuple[int, int]) -> str:
    if image.mode in _DEEP:
        return f"a picture of mode {image.mode}: distances, not colours?"
    if (image.height, image.width) != size:
        return f"a picture of {image.height}x{image.width} pixels, meta/info.json says {size[0]}x{size[1]}"
    return ""


def decode_picture(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Colours uint8 [H, W, 3]; raises BurnishError where they cannot be had, or are of another size."""
    image = open_picture(data)
    fault = _form_fault(image, size)
    if fault:
        raise BurnishError(fault)
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise BurnishError(f"an unreadable picture ({first_line(error, 120)})") from None


def decode_depth(data: bytes) -> np.ndarray:
    """Distances [H, W] in the stored unit."""
    try:
        return np.asarray(open_picture(data))
    except (OSError, ValueError, SyntaxError) as error:
        raise BurnishError(f"an unreadable picture ({first_line(error, 120)})") from None


@dataclass(frozen=True)
class Timeline:
    """The frames of a video in the order in which they are shown.

    Args:
        stamps: [F] int64, the time of each in units of `base` seconds; unique, ascending.
        rate: frames a second on average; 0 where the file does not say.
        size: (height, width) in pixels.
    """

    stamps: np.ndarray
    base: float
    rate: float
    codec: str
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.stamps)


def find_video(root: Path, name: str) -> Path:
    """The path of a video; raises BurnishError where it is missing, no file, or outside the data set."""
    path = inside(root, name)
    if not path.exists():
        raise BurnishError(f"video {path} is missing", "every file that the metadata name",
                           misplaced(root, name) or "copy it again")  # fmt: skip
    return regular_file(path, root)


def open_video(path: Path) -> Any:
    """av's container of a film; a playlist, which would name other files, is none, and a path is never an address."""
    return av.open(str(path.absolute()), options={"format_whitelist": "mov,matroska,webm,avi"})


def read_timeline(path: Path) -> Timeline:
    """Read a video to its end without decoding it. Frames that an edit list cuts away are not counted."""
    try:
        with open_video(path) as container:
            if not container.streams.video:
                raise BurnishError(f"video {path} holds no video", "one video stream", "record or copy it again")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BurnishError(f"video {path} is unreadable (an unknown codec)", "a whole video", "copy it again")
            stamps = [
                packet.pts
                for packet in container.demux(stream)
                if packet.size and not packet.is_corrupt and not packet.is_discard and packet.pts is not None
            ]
            base, rate = float(stream.time_base or 0), float(stream.average_rate or 0)
            context = stream.codec_context
            codec, size = context.name, (context.height, context.width)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not stamps or base <= 0:
        raise BurnishError(f"video {path} is unreadable (it holds no frames)", "a whole video", "copy it again")
    return Timeline(np.unique(stamps), base, rate, codec, size)


def _unreadable(path: Path, error: Exception) -> BurnishError:
    line = (str(getattr(error, "strerror", None) or error) or type(error).__name__).splitlines()[0]
    return BurnishError(f"video {path} is unreadable ({line})", "a whole video file", "record or copy it again")


def locate(timeline: Timeline, start: float, length: int, fps: float) -> tuple[int, str]:
    """The first of `length` consecutive frames from `start` seconds on, at `fps`, and what is wrong ("" if nothing).

    Where some are missing the frames that are there come from that place on.
    """
    half, times = 0.5 / fps, timeline.stamps * timeline.base
    first = int(np.searchsorted(times, start - half))
    found = times[first : first + length]
    if not len(found) or found[0] >= start + half:
        return first, f"no frame at {start:g} s, where it begins"
    if len(found) < length:
        return first, f"{len(found)} of its {length} frames from {start:g} s on"
    off = np.abs(found - start - np.arange(length) / fps)
    if off.max() >= half:
        frame = int(np.argmax(off >= half))
        return first, f"frame {frame} at {found[frame]:.3f} s, not {start + frame / fps:.3f} s (frames are missing)"
    return first, ""


def decode(path: Path, wanted: Mapping[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """(wanted[stamp], picture uint8 [H, W, 3]) of every frame whose stamp is wanted, in order.

    Frames that are damaged are left out: who asked for them finds that they did not come.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError):
                continue
            for frame in frames:
                row = wanted.get(frame.pts)
                if row is not None and not frame.is_corrupt:
                    yield row, frame.to_ndarray(format="rgb24")
