"""Safetensors as streams: headers, memory-mapped pieces and rounding, with numpy alone.

PyTorch takes half a gigabyte before it has done anything; a merge of any size needs a tenth of that.
A tensor is handled in pieces of PIECE elements, a piece in blocks of BLOCK elements that stay in the cache.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from burnish.core.errors import BurnishError

PIECE, BLOCK = 1 << 21, 1 << 15
WEIGHTS, INDEX, UNDO = "model.safetensors", "model.safetensors.index.json", "capability_undo.safetensors"
_MAX_HEADER = 100_000_000  # the limit of the safetensors format
_AROUND = 1 << 20  # bytes; Linux maps neighbours of a page that is read too: 64 kB at least, often more
_NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.uint8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
FLOATS = ("F64", "F32", "BF16", "F16")
"""Dtypes that can be added and subtracted, widest first."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a file: dtype as safetensors names it, shape, first byte, number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return np.dtype(_NUMPY[self.dtype]).itemsize


def raw_dtype(dtype: str) -> np.dtype:
    """Numpy's type for the stored bits; bfloat16 travels as uint16."""
    return np.dtype(_NUMPY[dtype])


def check_header(path: Path, header: Any, data_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Tensors by name from a parsed header; refuses offsets that overlap, leave gaps or disagree with the shape."""
    found, end = {}, 0
    try:
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(size) is int and size >= 0 for size in shape):
                raise BurnishError(f"{path}: '{name}' has shape {list(shape)}", "whole numbers, none below 0")
            if dtype not in _NUMPY:
                raise BurnishError(f"{path}: '{name}' has dtype {dtype}", f"one of {', '.join(_NUMPY)}")
            if start != end or stop - start != math.prod(shape) * raw_dtype(dtype).itemsize:
                raise BurnishError(f"{path}: the bytes of '{name}' do not fit its shape", "an undamaged file")
            found[name], end = (dtype, shape, start, stop - start), stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BurnishError(f"{path} has an unreadable header ({error!r})", "a safetensors file") from error
    if end != data_bytes:
        raise BurnishError(f"{path} is {'truncated' if data_bytes < end else 'too long'}: it holds {data_bytes} bytes "
                           f"of tensors", f"{end} bytes as its header says", "copy or download it again")  # fmt: skip
    return found


class TensorFile:
    """One safetensors file, memory-mapped; pages are handed back after use, so memory stays flat."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                total = os.fstat(file.fileno()).st_size
                start = file.read(8)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
                if length > min(_MAX_HEADER, total - 8):
                    raise BurnishError(f"{path} is truncated or no safetensors file", "a whole safetensors file")
                header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BurnishError(f"{path} cannot be read ({error.strerror})", "a safetensors file") from error
        except (ValueError, UnicodeDecodeError) as error:
            raise BurnishError(f"{path} has an unreadable header", "a safetensors file") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {} if isinstance(header, dict) else {}
        first = 8 + length
        self.slots = {
            name: Slot(dtype, shape, first + offset, nbytes)
            for name, (dtype, shape, offset, nbytes) in check_header(path, header, total - first).items()
        }

    def raw(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements start:stop of the flattened tensor as stored bits (a view into the map, not a copy)."""
        slot = self.slots[name]
        return np.frombuffer(self._map, raw_dtype(slot.dtype), stop - start, slot.offset + start * slot.itemsize)

    def release(self, name: str, start: int, stop: int) -> None:
        """Hand back the memory of elements start:stop; reading them again is possible."""
        slot = self.slots[name]
        # Reading one page maps its neighbours too. Unless they go as well, each tensor leaves some, and memory grows.
        first = max(0, slot.offset + start * slot.itemsize - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(len(self._map), slot.offset + stop * slot.itemsize + _AROUND)
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


class Checkpoint:
    """Tensors of a folder: one safetensors file, or shards with an index. Never reads pickled weights.

    Attributes:
        path: the folder, or the single file.
        slots: tensor name to Slot.
        file_of: tensor name to TensorFile.
        index: content of the shard index, None for a single file.
    """

    def __init__(self, path: Path | str, weights: str = WEIGHTS):
        self.path = Path(path)
        self.index: dict[str, Any] | None = None
        self.files = [TensorFile(file) for file in self._find(weights)]
        self.file_of = {name: file for file in self.files for name in file.slots}
        self.slots = {name: file.slots[name] for name, file in self.file_of.items()}
        if sum(len(file.slots) for file in self.files) != len(self.slots):
            raise BurnishError(f"{self.path}: a tensor is in two shards", "each tensor once")
        if self.index is not None:
            self._check_index(self.index["weight_map"])

    def _find(self, weights: str) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if (self.path / weights).is_file():
            return [self.path / weights]
        if (self.path / INDEX).is_file():
            return self._shards()
        single = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else []
        # LeRobot's statistics, and what `merge --undoable` keeps
        single = [file for file in single if not file.name.startswith("policy_") and file.name != UNDO]
        if len(single) == 1:
            return single
        pickled = self.path.is_dir() and any(self.path.glob("*.bin"))
        fix = "convert it with save_pretrained(..., safe_serialization=True)" if pickled else ""
        raise BurnishError(f"no weights at {self.path}", f"{weights} or {INDEX} with its shards", fix)

    def _shards(self) -> list[Path]:
        try:
            self.index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            names = sorted({Path(name).as_posix() for name in self.index["weight_map"].values()})
            self.index["metadata"] = dict(self.index.get("metadata") or {})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BurnishError(f"{self.path / INDEX} is unreadable ({error!r})", "a weight_map") from error
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise BurnishError(f"{self.path / INDEX} names '{outside[0]}'", "shards inside the folder")
        return [self.path / name for name in names]

    def place(self, file: TensorFile) -> str:
        """A file's name inside the folder; that of a single file which is no .safetensors (a cache's blob) is new."""
        if self.path.is_dir():
            return file.path.relative_to(self.path).as_posix()
        return file.path.name if file.path.suffix == ".safetensors" else WEIGHTS

    def _check_index(self, weight_map: dict[str, str]) -> None:
        wrong = sorted(set(weight_map) ^ set(self.slots))
        if wrong:
            where = "missing from the shards" if wrong[0] in weight_map else "not in the index"
            raise BurnishError(f"{self.path}: '{wrong[0]}' is {where} ({len(wrong)} in all)",
                               "shards that fit their index")  # fmt: skip

    def raw(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.file_of[name].raw(name, start, stop)

    def release(self, name: str, start: int, stop: int) -> None:
        self.file_of[name].release(name, start, stop)

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots.values())


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each piece of a tensor with `size` elements; an empty tensor has one empty piece."""
    for start in range(0, max(size, 1), PIECE):
        yield start, min(start + PIECE, size)


def header_bytes(slots: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, dict]:
    """A safetensors header for tensors (dtype, shape) in the given order, and each one's Slot in the file."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset, sizes = 0, {}
    for name, (dtype, shape) in slots.items():
        nbytes = math.prod(shape) * raw_dtype(dtype).itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        sizes[name], offset = (offset, nbytes), offset + nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    placed = {name: Slot(*slots[name], first + at, nbytes) for name, (at, nbytes) in sizes.items()}
    return struct.pack("<Q", len(text)) + text, placed


def digest_of(dtype: str, shape: tuple[int, ...], piece_digests: list[bytes]) -> str:
    """32 hex digits that identify a tensor whatever file holds it: its type, shape and the digests of its pieces.

    xxh3-128 tells damage and mix-ups apart at memory speed; it is no defence against a forger.
    """
    whole = xxhash.xxh3_128(f"{dtype} {list(shape)}".encode())
    for digest in piece_digests:
        whole.update(digest)
    return whole.hexdigest()


def tensor_digest(checkpoint: Checkpoint | TensorFile, name: str) -> str:
    """`digest_of` a stored tensor, read piece by piece."""
    slot = checkpoint.slots[name]
    found = []
    for start, stop in pieces(slot.size):
        found.append(xxhash.xxh3_128(checkpoint.raw(name, start, stop)).digest())
        checkpoint.release(name, start, stop)
    return digest_of(slot.dtype, slot.shape, found)


def whole_digest(digests: dict[str, str]) -> str:
    """32 hex digits over all tensors of a checkpoint, the same however it is cut into files."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return xxhash.xxh3_128(lines.encode()).hexdigest()
