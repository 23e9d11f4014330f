"""Pictures that are stored in the tables of a data set, or in files that the tables name."""

import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from burnish.core.errors import BurnishError, first_line
from burnish.core.reading import inside, regular_file
from burnish.data.dataset import Dataset

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
