"""Question folders from anybody's question-answer pairs: a JSONL file, and the pictures that it names.

A line is `{"id": "q1", "image": "kitchen/001.jpg", "question": "what is on the table?", "answer": "a cup"}`. `id` and
`kind` may be missing, other keys are ignored. docs/questions.md says what the folder holds.
"""

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import require_space, write_json
from burnish.core.outputs import new_output
from burnish.core.progress import progress_bar
from burnish.core.reading import MOST_BYTES, inside, read_lines, regular_file
from burnish.data.frames import npy_header
from burnish.data.questions import KIND, MOST_TEXT, holds_questions

CAMERA = "image"
MOST_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes of 8 bits: others (depth, say) would lose their digits without a word."""


def import_questions(
    lines: Path, root: Path, *, images: Path | None = None, image_size: int = 96, progress: bool = True
) -> Path:
    """Make a question folder of a JSONL file, and return it.

    A picture is made `image_size` wide or high, whichever is longer, and stands in the middle of a black square.
    The folder is whole or absent; one that holds just what is asked for is left as it is.

    Args:
        lines: the JSONL file, UTF-8.
        root: folder to make.
        images: folder that the names of pictures begin from; None is that of `lines`.
        image_size: height and width of the stored images in pixels.
        progress: show a bar on stderr.

    Raises:
        BurnishError: a line that is none of the above, a picture that cannot be read or lies outside its folder,
            `root` holds something else, another process is making it, or the disk is full.
    """
    if not 8 <= image_size <= 4096:
        raise BurnishError(f"images of {image_size} pixels", "8 to 4096")
    folder = lines.parent if images is None else images
    entries, names = read_pairs(lines)
    paths = [(_find(folder, name, f"{lines}:{number}"), f"{lines}:{number}") for name, number in names.items()]
    meta = {
        "format": 1, "camera": CAMERA, "source": lines.name, "image_size": image_size, "images": len(paths),
        "questions": len(entries), "digest": _digest(lines, paths),
    }  # fmt: skip
    if holds_questions(root, meta):
        return root
    with new_output(root, KIND) as partial:
        _write(partial, entries, paths, meta, progress)
    return root


def read_pairs(lines: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The entries of questions.jsonl, whose "image" is a number, and for each picture in that order its first line."""
    entries: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    numbers: dict[str, int] = {}
    ids: set[str | int] = set()
    for line, row in read_lines(lines):
        where = f"{lines}:{line}"
        image = _text(row, "image", where)
        entry = {
            "image": numbers.setdefault(image, len(numbers)), "question": _text(row, "question", where),
            "answer": _text(row, "answer", where), "kind": _text({"kind": "other", **row}, "kind", where),
        }  # fmt: skip
        names.setdefault(image, line)
        if row.get("id") is not None:
            key = row["id"]
            if type(key) not in (str, int) or key in ids:
                raise BurnishError(f"{where} has the id {str(key)[:100]!r}", "a string or number that stands once")
            ids.add(key)
            entry["id"] = key
        entries.append(entry)
    if not entries:
        raise BurnishError(f"{lines} is empty", 'lines with "image", "question" and "answer"')
    return entries, names


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found = f"has no '{key}'" if key not in row else f"has {key} {str(value)[:100]!r}"
        raise BurnishError(f"{where} {found}", f'"{key}" with a text')
    if len(value) > MOST_TEXT or "\0" in value:
        raise BurnishError(f"{where} has a {key} of {len(value)} characters", f"at most {MOST_TEXT}, none of them null")
    return value.strip()


def _find(folder: Path, name: str, where: str) -> Path:
    try:
        return regular_file(inside(folder, name), most=MOST_BYTES)
    except BurnishError as error:
        raise BurnishError(f"{where}: {error}") from None


def _digest(lines: Path, paths: list[tuple[Path, str]]) -> str:
    """Changes with the lines, and with the sizes of the pictures."""
    sizes = [path.stat().st_size for path, _ in paths]
    return hashlib.sha256(lines.read_bytes() + str(sizes).encode()).hexdigest()[:16]


def _write(folder: Path, entries: list[dict], paths: list[tuple[Path, str]], meta: dict, progress: bool) -> None:
    size = meta["image_size"]
    header = npy_header((len(paths), size, size, 3), np.uint8)
    require_space(folder, len(header) + len(paths) * size * size * 3, f"{len(paths)} images in {folder}")
    with open(folder / "images.npy", "wb") as file:
        file.write(header)
        for path, where in progress_bar(paths, desc="images", unit="image", shown=progress):
            file.write(picture(path, size, where).tobytes())
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    write_json(folder / "meta.json", meta)


def picture(path: Path, size: int, where: str) -> np.ndarray:
    """uint8 [size, size, 3]: the picture of a file, upright, its longer edge `size`, on black.

    Raises:
        BurnishError: no picture of a known format, damaged, too large, or of more than 8 bits; begins with `where`.
    """
    broken = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error,
              zlib.error, Image.DecompressionBombError)  # fmt: skip
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BurnishError(f"{where}: {path} has {image.width} x {image.height} pixels",
                                   f"at most {MOST_PIXELS // 10**6} million")  # fmt: skip
            if image.mode not in _MODES:
                raise BurnishError(f"{where}: {path} has pixels of the kind {image.mode}", "8 bits for each colour")
            image = ImageOps.exif_transpose(image).convert("RGB")
            scale = size / max(image.size)
            width, height = (max(1, round(edge * scale)) for edge in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    except broken as error:
        line = one_line(error, 200)
        raise BurnishError(f"{where}: {path} is no readable picture ({line})", ", ".join(_FORMATS)) from None
    square = np.zeros((size, size, 3), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    return square
