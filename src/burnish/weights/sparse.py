"""A few elements of many tensors: what rounding loses. Kept on disk while it grows, so memory stays flat."""

import os
import threading
from pathlib import Path

import numpy as np

from burnish.weights.tensorfile import TensorFile, header_bytes, raw_dtype

INDEX_SUFFIX, VALUE_SUFFIX = "::index", "::value"
_CHUNK = 1 << 20


class SparseWriter:
    """Collects (position, value) pairs of tensors in any order of their pieces.

    Args:
        part: the folder being written; a scratch file lies there until `write`.
        dtypes: tensor name to the safetensors dtype of its values.
    """

    def __init__(self, part: Path, dtypes: dict[str, str]):
        self.part, self.dtypes = part, dtypes
        self._path = part / "spill.bin"
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._end = os.fstat(self._handle).st_size
        self._records: dict[str, list[list[int]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, start: int, positions: np.ndarray, values: np.ndarray) -> None:
        """Positions within the flattened tensor, ascending, of the piece that begins at `start`."""
        if not positions.size:
            return
        data = positions.astype(np.int64).tobytes() + np.ascontiguousarray(values).tobytes()
        with self._lock:
            offset, self._end = self._end, self._end + len(data)
            self._records.setdefault(name, []).append([start, offset, positions.size])
        os.pwrite(self._handle, data, offset)

    def facts(self, name: str) -> list[list[int]]:
        """Where the pairs of `name` lie; `restore` takes this back."""
        return sorted(self._records.get(name, []))

    def restore(self, name: str, facts: list[list[int]]) -> None:
        if facts:
            self._records[name] = facts

    def count(self, name: str) -> int:
        return sum(count for _, _, count in self._records.get(name, []))

    @property
    def total(self) -> int:
        return sum(self.count(name) for name in self._records)

    def write(self, filename: str) -> None:
        """Sort everything into a safetensors file, or none when there is nothing."""
        if self._records:
            slots = {}
            for name in sorted(self._records):
                slots[name + INDEX_SUFFIX] = ("I64", (self.count(name),))
                slots[name + VALUE_SUFFIX] = (self.dtypes[name], (self.count(name),))
            header, _ = header_bytes(slots, {})
            with open(self.part / filename, "wb") as file:
                file.write(header)
                for name in sorted(self._records):
                    width = raw_dtype(self.dtypes[name]).itemsize
                    for _, offset, count in self.facts(name):
                        self._copy(file, offset, 8 * count)
                    for _, offset, count in self.facts(name):
                        self._copy(file, offset + 8 * count, width * count)
        self.close()
        self._path.unlink(missing_ok=True)

    def _copy(self, file, offset: int, nbytes: int) -> None:
        for at in range(0, nbytes, _CHUNK):
            file.write(os.pread(self._handle, min(_CHUNK, nbytes - at), offset + at))

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class SparseFile:
    """Reads what `SparseWriter` wrote; a file that is not there holds nothing."""

    def __init__(self, path: Path):
        self._file = TensorFile(path) if path.is_file() else None

    def between(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions relative to `start` and stored values of the elements in start:stop."""
        slot = self._file.slots.get(name + INDEX_SUFFIX) if self._file is not None else None
        if slot is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        index = self._file.raw(name + INDEX_SUFFIX, 0, slot.size)
        first, last = np.searchsorted(index, (start, stop))
        return index[first:last] - start, self._file.raw(name + VALUE_SUFFIX, int(first), int(last))

    def digest(self) -> str:
        """Identity of all that is in it; empty without a file."""
        from burnish.weights.tensorfile import tensor_digest, whole_digest

        if self._file is None:
            return ""
        return whole_digest({name: tensor_digest(self._file, name) for name in self._file.slots})
