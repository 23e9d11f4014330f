"""A few pictures of a LeRobotDataset, without decoding the others."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError


def few_frames(meta: Any, root: Path, camera: str, frames: Sequence[int]) -> dict[int, np.ndarray]:
    """Pictures uint8 [H, W, 3] by frame index.

    Args:
        meta: LeRobot's metadata of `root`.
        camera: full feature key.
        frames: indices of the whole data set.

    Raises:
        BurnishError: a picture that is missing or unreadable.
    """
    wanted = sorted(set(map(int, frames)))
    found = _from_tables(root, camera, wanted) if camera in meta.image_keys else {}
    if camera not in meta.image_keys:
        for episode in meta.episodes.with_format(None):
            start = episode["dataset_from_index"]
            inside = [i - start for i in wanted if start <= i < episode["dataset_to_index"]]
            if inside:
                path = root / meta.get_video_file_path(episode["episode_index"], camera)
                first = episode[f"videos/{camera}/from_timestamp"]
                found |= {start + k: image for k, image in _from_video(path, first, inside, meta.fps).items()}
    missing = [i for i in wanted if i not in found]
    if missing:
        raise BurnishError(f"camera '{camera}' of {root} has no picture of frame {missing[0]}", "one for each frame",
                           f"burnish data inspect '{root}'")  # fmt: skip
    return found


def _from_tables(root: Path, camera: str, wanted: list[int]) -> dict[int, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image, UnidentifiedImageError

    found = {}
    for path in sorted((root / "data").rglob("*.parquet")):
        try:
            table = pq.read_table(path, columns=["index", camera], filters=[("index", "in", wanted)])
            for index, cell in zip(table["index"].to_pylist(), table[camera].to_pylist(), strict=True):
                found[index] = np.asarray(Image.open(BytesIO(cell["bytes"])).convert("RGB"))
        except (pa.ArrowException, UnidentifiedImageError, OSError, TypeError, KeyError) as error:
            line = " ".join(str(error).split())[:200]
            raise BurnishError(f"pictures of '{camera}' in {path} are unreadable ({line})") from error
    return found


def _from_video(path: Path, first: float, places: list[int], fps: float) -> dict[int, np.ndarray]:
    """Pictures of an episode that begins `first` seconds into the video, by place in the episode."""
    import av

    if not path.is_file():
        raise BurnishError(f"video {path} is missing", "every file that meta/episodes names", "copy it again")
    found, begin = {}, round(first * fps)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for place in places:
                if place in found:
                    continue
                container.seek(round((begin + place) / fps / stream.time_base), stream=stream)
                for frame in container.decode(stream):
                    at = None if frame.time is None else round(frame.time * fps) - begin
                    if at is not None and at >= place:
                        if at == place:
                            found[place] = frame.to_ndarray(format="rgb24")
                        break
    except (av.FFmpegError, IndexError) as error:
        raise BurnishError(f"video {path} is unreadable ({error})", "a whole video file",
                           "record or copy it again") from error  # fmt: skip
    return found
