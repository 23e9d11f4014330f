"""Videos and film strips of a run, small enough to sit inside the page."""

import io
from html import escape
from pathlib import Path

from burnish.report.html import data_uri, file_uri, png_uri

MAX_VIDEO_BYTES = 1_500_000
MAX_PAGE_BYTES = 16_000_000
MAX_STRIP_WIDTH = 1600
STRIP_FRAMES = 8


def films(folder: Path, limit: int = 8) -> str:
    """Figures of the recordings in one evaluation folder, at most `limit`, failures and successes as named.

    A small video is put in as it is, a large one as a strip of its frames.
    """
    videos = {file.stem: file for file in sorted(folder.rglob("*.mp4"))}
    strips = {file.stem.removesuffix("_strip"): file for file in sorted(folder.rglob("*_strip.png"))}
    figures, used = [], 0
    for stem in sorted({*videos, *strips}):
        if len(figures) == limit or used > MAX_PAGE_BYTES:
            break
        video, strip = videos.get(stem), strips.get(stem)
        if video and video.stat().st_size <= MAX_VIDEO_BYTES:
            body = f'<video src="{file_uri(video)}" controls muted loop playsinline preload="metadata"></video>'
            wide = ""
        else:
            source = _shrunk(strip) if strip else _strip_of(video)
            if not source:
                continue
            body, wide = f'<img src="{source}" alt="{escape(_title(stem))}">', ' class="wide"'
        used += len(body)
        figures.append(f"<figure{wide}>{body}<figcaption>{_caption(stem)}</figcaption></figure>")
    return f'<div class="films">{"".join(figures)}</div>' if figures else ""


def _title(stem: str) -> str:
    return stem.replace("_", " ").strip()


def _caption(stem: str) -> str:
    """The file's name as words; success or failure becomes a coloured mark."""
    words = _title(stem).split()
    for name, mark in (("success", "ok"), ("solved", "ok"), ("failure", "fail"), ("failed", "fail")):
        if name in words:
            words.remove(name)
            return f'<span class="{mark}">{name}</span> · {escape(" ".join(words))}'
    return escape(" ".join(words))


def _shrunk(strip: Path) -> str:
    """A film strip as a data URI; a very wide one is scaled down."""
    from PIL import Image

    with Image.open(strip) as image:
        if image.width <= MAX_STRIP_WIDTH and strip.stat().st_size < MAX_VIDEO_BYTES:
            return file_uri(strip)
        small = image.convert("RGB")
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
