"""Videos and film strips of a run, small enough to sit inside the page."""

import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.report.html import data_uri, file_uri, png_uri
from burnish.report.run_folder import Evaluation, Film

if TYPE_CHECKING:
    from PIL import Image

MAX_VIDEO_BYTES = 1_500_000
MAX_PAGE_BYTES = 16_000_000
MAX_STRIP_WIDTH = 1600
STRIP_FRAMES = 8
MOST_KEPT = 8 * STRIP_FRAMES


def films(one: Evaluation, limit: int = 8) -> str:
    """Figures of what was filmed in one evaluation, at most `limit`, as evenly over the tasks as they come.

    A small video is put in as it is, a large one as a strip of its frames.
    """
    figures, used = [], 0
    for film in one.films:
        if len(figures) == limit or used > MAX_PAGE_BYTES:
            break
        body = _body(film.video, film.strip)
        used += len(body)
        if body:
            wide = ' class="wide"' if body.startswith("<img") else ""
            figures.append(f"<figure{wide}>{body}<figcaption>{_caption(film)}</figcaption></figure>")
    return f'<div class="films">{"".join(figures)}</div>' if figures else ""


def _body(video: Path | None, strip: Path | None) -> str:
    """The element that shows a recording, "" when nothing of it can be read."""
    if video and video.stat().st_size <= MAX_VIDEO_BYTES:
        return f'<video src="{file_uri(video)}" controls muted loop playsinline preload="metadata"></video>'
    source = picture(strip) if strip else _strip_of(video) if video else ""
    return f'<img src="{source}" alt="frames of the episode, from first to last">' if source else ""


def _caption(film: Film) -> str:
    mark = f'<span class="{"ok" if film.success else "fail"}">{"solved" if film.success else "failed"}</span>'
    return f"{mark} · {escape(film.instruction)} · state {escape(film.initial_state)}"


def read_picture(path: Path) -> "Image.Image | None":
    """An RGB image; None where the file is broken, or a monster."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def picture(strip: Path) -> str:
    """A picture as a data URI, a very wide one scaled down; "" where it cannot be read."""
    small = read_picture(strip)
    if small is None:
        return ""
    if small.width <= MAX_STRIP_WIDTH and strip.stat().st_size < MAX_VIDEO_BYTES:
        return file_uri(strip)
    small.thumbnail((MAX_STRIP_WIDTH, MAX_STRIP_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def _strip_of(video: Path) -> str:
    """Evenly spaced frames of a video side by side; empty when it cannot be read."""
    import av
    import numpy as np

    frames, step = [], 1
    try:
        with av.open(str(video), format="mp4") as container:
            stride = max(1, container.streams.video[0].width * STRIP_FRAMES // MAX_STRIP_WIDTH)
            for index, frame in enumerate(container.decode(video=0)):
                if index % step == 0:
                    frames.append(frame.to_ndarray(format="rgb24")[::stride, ::stride])
                if len(frames) == MOST_KEPT:  # of a long film every second, then every fourth, ...
                    frames, step = frames[::2], 2 * step
    except (av.FFmpegError, IndexError):
        return ""
    if not frames:
        return ""
    picked = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
    return png_uri(np.ascontiguousarray(np.concatenate([frames[i] for i in picked], axis=1)))
