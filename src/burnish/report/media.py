"""Videos and film strips of a run, small enough to sit inside the page."""

import io
from html import escape
from pathlib import Path
from typing import Any

from burnish.report.html import data_uri, file_uri, png_uri
from burnish.report.run_folder import Evaluation

MAX_VIDEO_BYTES = 1_500_000
MAX_PAGE_BYTES = 16_000_000
MAX_STRIP_WIDTH = 1600
STRIP_FRAMES = 8


def films(one: Evaluation, limit: int = 8) -> str:
    """Figures of what was filmed in one evaluation, at most `limit`, as evenly over the tasks as they come.

    A small video is put in as it is, a large one as a strip of its frames.
    """
    figures, used = [], 0
    for film in one.films:
        if len(figures) == limit or used > MAX_PAGE_BYTES:
            break
        body = _body(one.folder / str(film.get("video")), one.folder / str(film.get("film_strip")))
        used += len(body)
        if body:
            wide = ' class="wide"' if body.startswith("<img") else ""
            figures.append(f"<figure{wide}>{body}<figcaption>{_caption(film)}</figcaption></figure>")
    return f'<div class="films">{"".join(figures)}</div>' if figures else ""


def _body(video: Path, strip: Path) -> str:
    """The element that shows a recording, "" when nothing of it can be read."""
    if video.is_file() and video.stat().st_size <= MAX_VIDEO_BYTES:
        return f'<video src="{file_uri(video)}" controls muted loop playsinline preload="metadata"></video>'
    source = _shrunk(strip) if strip.is_file() else _strip_of(video) if video.is_file() else ""
    return f'<img src="{source}" alt="film strip">' if source else ""


def _caption(film: dict[str, Any]) -> str:
    solved = bool(film.get("success"))
    mark = f'<span class="{"ok" if solved else "fail"}">{"solved" if solved else "failed"}</span>'
    return f"{mark} · {escape(film['instruction'] or film['task'])} · state {film['initial_state']}"


def _shrunk(strip: Path) -> str:
    """A film strip as a data URI; a very wide one is scaled down."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(strip) as image:
            if image.width <= MAX_STRIP_WIDTH and strip.stat().st_size < MAX_VIDEO_BYTES:
                return file_uri(strip)
            small = image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return ""
    small.thumbnail((MAX_STRIP_WIDTH, MAX_STRIP_WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def _strip_of(video: Path) -> str:
    """Evenly spaced frames of a video side by side; empty when it cannot be read."""
    import av
    import numpy as np

    try:
        with av.open(str(video)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError):
        return ""
    if not frames:
        return ""
    picked = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
    stride = max(1, frames[0].shape[1] * len(picked) // MAX_STRIP_WIDTH)
    return png_uri(np.ascontiguousarray(np.concatenate([frames[i][::stride, ::stride] for i in picked], axis=1)))
