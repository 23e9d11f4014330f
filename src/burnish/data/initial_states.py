"""Initial states for trials on a robot: a photo that the scene is set up to match, and what the robot is told."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError, one_line
from burnish.core.options import read_options
from burnish.core.reading import read_object, regular_file
from burnish.data.dataset import open_dataset
from burnish.data.pictures import open_picture
from burnish.data.streamed import Shape, StreamedFrames

MOST_STATES, MOST_BYTES, MOST_TEXT, EDGE = 500, 50 << 20, 500, 1280
"""States, bytes of a picture, characters of a text, pixels of a photo's longer edge."""


@dataclass(frozen=True)
class State:
    """One initial state; `photo` is a JPEG in the folder of the trial, "" where there is none."""

    name: str = ""
    instruction: str = ""
    setup: str = ""
    photo: str = ""


Made = list[tuple[State, bytes]]
"""States with their photos, b"" where there is none."""


def states_in_folder(folder: Path) -> Made:
    """A state for every name in a folder: NAME.jpg or NAME.png, and NAME.json with "instruction" and "setup" in words.

    Raises:
        BurnishError: no folder, none or too many in it, a picture that is none, a JSON file of another form.
    """
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        kind = {".png": "photo", ".jpg": "photo", ".jpeg": "photo", ".json": "words"}.get(path.suffix.lower(), "")
        if kind and files.setdefault(path.stem, {}).setdefault(kind, path) != path:
            raise BurnishError(f"{folder} holds two pictures of {path.stem}", "one of each initial state")
    if not 1 <= len(files) <= MOST_STATES:
        raise BurnishError(f"{folder} holds {len(files)} initial states", f"1 to {MOST_STATES}: NAME.jpg, NAME.json")
    return [_read(name, folder, i, **found) for i, (name, found) in enumerate(files.items())]


def _read(
    name: str, folder: Path, number: int, photo: Path | None = None, words: Path | None = None
) -> tuple[State, bytes]:
    said = read_object(words, folder) if words else {}
    place = f"states/{number:03d}.jpg" if photo else ""
    state = read_options(State, {"name": name, "photo": place} | said, str(words))
    if {"photo", "name"} & said.keys() or max(len(state.instruction), len(state.setup)) > MOST_TEXT:
        raise BurnishError(f"{words} says more", f'"instruction" and "setup" of at most {MOST_TEXT} characters')
    if photo is None:
        return state, b""
    from PIL import ImageOps

    try:
        return state, _jpeg(ImageOps.exif_transpose(open_picture(regular_file(photo, folder, MOST_BYTES).read_bytes())))
    except (OSError, ValueError, SyntaxError, BurnishError) as error:
        raise BurnishError(f"{photo} cannot be read ({one_line(error, 200)})", "a PNG or JPEG picture") from None


def states_of_dataset(root: Path, most: int) -> Made:
    """The first frames of at most `most` episodes of a LeRobotDataset, evenly from all, by its first camera."""
    from PIL import Image

    data = open_dataset(root)
    if not data.camera_keys:
        raise BurnishError(f"{root} has no camera", "a data set with pictures")
    known, camera = list(data.episodes), data.camera_keys[0]
    places = np.unique(np.linspace(0, len(known) - 1, min(most, MOST_STATES, len(known))).round().astype(int))
    chosen = [known[i] for i in places]
    frames = StreamedFrames.open(data, camera, Shape.of(data, camera, EDGE, 0), chosen)
    said = [" / ".join(data.episodes[e].tasks)[:MOST_TEXT] for e in chosen]
    states = [State(f"episode {e}", said[i], "", f"states/{i:03d}.jpg") for i, e in enumerate(chosen)]
    photos = [_jpeg(Image.fromarray(frames[data.rows.span(e)[0]])) for e in chosen]
    return list(zip(states, photos, strict=True))


def _jpeg(picture: Any) -> bytes:
    picture, buffer = picture.convert("RGB"), BytesIO()
    picture.thumbnail((EDGE, EDGE))
    picture.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()
