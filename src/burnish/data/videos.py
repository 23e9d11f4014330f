"""Videos of a data set: which frames they hold, where those of an episode are, and the pictures themselves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.reading import inside, regular_file
from burnish.data.tables import misplaced


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
