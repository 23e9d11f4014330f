"""Safetensors as streams: headers, reading a tensor by range, and digests, with numpy alone.

PyTorch takes half a gigabyte before it has done anything; a merge of any size needs a fifth of that.
Everything is read, computed and written in blocks of BLOCK elements; PIECE elements share one digest and one thread.
"""

import json
import math
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from burnish.core.errors import BurnishError
from burnish.core.reading import parse_json, regular_file

PIECE, BLOCK = 1 << 21, 1 << 18
_MAX_HEADER = 25_000_000  # a quarter of the format's own limit; a thousand tensors take a tenth of a megabyte
_MAX_DIMENSIONS = 16
_NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.uint8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
FLOATS = ("F64", "F32", "BF16", "F16")
"""Dtypes that can be added and subtracted, widest first."""
DTYPES = {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""The same as users name them."""


class TensorInfo(NamedTuple):
    """What a tensor is: dtype as safetensors names it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> np.dtype:
        """Numpy's type for the stored bits; bfloat16 travels as uint16."""
        return np.dtype(_NUMPY[self.dtype])

    @property
    def nbytes(self) -> int:
        return self.size * self.stored.itemsize


class TensorFile:
    """One safetensors file, read by range.

    Args:
        path: a regular file.
        root: folder that it must lie in, links followed; None allows any place.

    Attributes:
        tensors: what is in it, in the file's order.
        metadata: the header's own words.
    """

    def __init__(self, path: Path, root: Path | None = None):
        self.path = regular_file(path, root)
        try:
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            total = os.fstat(self._handle).st_size
            start = os.pread(self._handle, 8, 0)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, total - 8):
                raise BurnishError(f"{path} is truncated or no safetensors file", "a whole safetensors file")
            text = os.pread(self._handle, length, 8).decode("utf-8")
        except OSError as error:
            raise BurnishError(f"{path} cannot be read ({error.strerror})", "a safetensors file") from error
        except UnicodeDecodeError as error:
            raise BurnishError(f"{path} has an unreadable header", "a safetensors file") from error
        header = parse_json(text, f"the header of {path}")
        if not isinstance(header, dict):
            raise BurnishError(f"{path} has an unreadable header", "a JSON object of tensors")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        words = self.metadata.items() if isinstance(self.metadata, dict) else [(0, 0)]
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in words):
            raise BurnishError(f"__metadata__ in the header of {path} is damaged", "words by name, as the format says")
        found = _check_header(path, header, total - 8 - length)
        self.tensors = {name: info for name, (info, _) in found.items()}
        self._offsets = {name: 8 + length + offset for name, (_, offset) in found.items()}

    def read(self, name: str, start: int, stop: int, scratch: np.ndarray | None = None) -> np.ndarray:
        """Elements start:stop of the flattened tensor as stored bits.

        Args:
            scratch: float64 memory of at least stop - start elements to put them in; new memory without it, of which
                every page costs the system a fault.
        """
        kind = self.tensors[name].stored
        found = np.empty(stop - start, kind) if scratch is None else scratch.view(kind)[: stop - start]
        left = memoryview(found).cast("B") if found.size else memoryview(b"")
        offset = self._offsets[name] + start * found.itemsize
        while left:  # the system gives two gigabytes at a time
            count = os.preadv(self._handle, [left], offset)
            if count == 0:
                raise BurnishError(f"{self.path} became shorter while it was read", "a file that nobody writes")
            left, offset = left[count:], offset + count
        return found

    def digest(self, name: str) -> str:
        return digest_of(name, self.tensors[name], self.read)


def _check_header(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, tuple[TensorInfo, int]]:
    """Tensors with their offsets; refuses offsets that overlap, leave gaps or disagree with the shape."""
    found, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            info, (start, stop) = TensorInfo(entry["dtype"], tuple(entry["shape"])), entry["data_offsets"]
            if not name or not name.isprintable():
                raise BurnishError(f"{path} has a tensor called {name!r}", "names that can be printed")
            sizes = entry["shape"] if isinstance(entry["shape"], list) else [-1]
            if not all(type(size) is int and 0 <= size < 2**48 for size in sizes) or len(sizes) > _MAX_DIMENSIONS:
                shape = str(list(info.shape))
                raise BurnishError(f"{path}: '{name}' has shape {shape if len(shape) < 100 else shape[:97] + '...'}",
                                   f"a list of at most {_MAX_DIMENSIONS} whole numbers, none below 0")  # fmt: skip
            if info.dtype not in _NUMPY:
                raise BurnishError(f"{path}: '{name}' has dtype {info.dtype}", f"one of {', '.join(_NUMPY)}")
            whole = type(start) is int and type(stop) is int
            if not whole or start != end or stop - start != info.nbytes:
                raise BurnishError(f"{path}: the bytes of '{name}' do not fit its shape", "an undamaged file")
            found[name], end = (info, start), stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BurnishError(f"{path} has an unreadable header ({error!r})", "a safetensors file") from error
    if end != data_bytes:
        raise BurnishError(f"{path} is {'truncated' if data_bytes < end else 'too long'}: it holds {data_bytes} bytes "
                           f"of tensors", f"{end} bytes as its header says", "copy or download it again")  # fmt: skip
    return found


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each piece of a tensor with `size` elements; an empty tensor has one empty piece."""
    for start in range(0, max(size, 1), PIECE):
        yield start, min(start + PIECE, size)


def blocks(start: int, stop: int, step: int = BLOCK) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block of a piece; an empty piece has one empty block."""
    for at in range(start, max(stop, start + 1), step):
        yield at, min(at + step, stop)


def make_header(tensors: Mapping[str, TensorInfo], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header for tensors in the given order, and the place of each one's first byte in the file."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets, end = {}, 0
    for name, info in tensors.items():
        offsets[name], end = end, end + info.nbytes
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + offset for name, offset in offsets.items()}


class Digests:
    """Digests of tensors, gathered block by block from any number of threads.

    A tensor's digest is 32 hex digits over its type, its shape and the digests of its pieces, whatever file holds it.
    xxh3-128 tells damage and mix-ups apart at memory speed; it is no defence against a forger.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, dict[int, xxhash.xxh3_128]] = {}

    def add(self, name: str, start: int, bits: np.ndarray) -> None:
        """Count in the stored bits of a block; those of one piece must come in their order, from one thread."""
        pieces = self._pieces.setdefault(name, {})
        pieces.setdefault(start // PIECE, xxhash.xxh3_128()).update(bits)

    def of(self, name: str, info: TensorInfo) -> str:
        """The digest of a tensor whose every block was added."""
        whole = xxhash.xxh3_128(f"{info.dtype} {list(info.shape)}".encode())
        for _, piece in sorted(self._pieces[name].items()):
            whole.update(piece.digest())
        return whole.hexdigest()

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors of which something was added."""
        return iter(self._pieces)


def digest_of(name: str, info: TensorInfo, read: Callable[[str, int, int], np.ndarray]) -> str:
    """The digest of a stored tensor, read block by block."""
    digests = Digests()
    for piece in pieces(info.size):
        for start, stop in blocks(*piece):
            digests.add(name, start, read(name, start, stop))
    return digests.of(name, info)


def whole_digest(digests: Mapping[str, str]) -> str:
    """32 hex digits over all tensors of a checkpoint, the same however it is cut into files."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return xxhash.xxh3_128(lines.encode()).hexdigest()
