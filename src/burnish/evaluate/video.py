"""A video and a film strip of one episode, written so that a kill leaves no partial file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from burnish.core.files import new_file


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int) -> None:
    """Write frames [H, W, 3] uint8 as H.264 mp4; an odd side loses its last row or column."""
    import av

    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with new_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "20", "preset": "fast"}
        for frame in frames:
            image = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_film_strip(path: Path, frames: Sequence[np.ndarray], count: int = 6) -> None:
    """Write `count` moments from first to last side by side as PNG."""
    from PIL import Image

    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    strip = np.concatenate([frames[i] for i in chosen], axis=1)
    with new_file(path) as temporary:
        Image.fromarray(strip).save(temporary, format="PNG")
