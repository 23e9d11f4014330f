"""Where the numbers of a base or a fine-tune come from: a folder or a file of safetensors, by tensor and range."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.reading import inside, read_object
from burnish.weights.names import match_names
from burnish.weights.rounding import Buffers, widen
from burnish.weights.tensorfile import Digests, TensorFile, digest_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_stored = Buffers()


class Checkpoint:
    """Tensors of a folder: one safetensors file, or shards with an index. Never reads pickled weights.

    Args:
        path: the folder, or a single file.
        reference: names of another checkpoint that these should meet, see `match_names`; its own where not given.
        rules: (regular expression, replacement) applied to names first.

    Attributes:
        files: the file, or the shards.
        names: name to the name inside the files.
        tensors: name to TensorInfo.
        index: content of the shard index, None for a single file.

    Raises:
        BurnishError: no weights, an index or a file that is damaged, factors of adapters (which mean nothing alone).
    """

    def __init__(self, path: Path | str, reference: Iterable[str] | None = None, rules: Sequence[tuple[str, str]] = ()):
        self.path = Path(path)
        self.index: dict[str, Any] | None = None
        root = self.path if self.path.is_dir() else None
        self.files = [TensorFile(file, root) for file in self._find()]
        self._file_of = {name: file for file in self.files for name in file.tensors}
        if sum(len(file.tensors) for file in self.files) != len(self._file_of):
            raise BurnishError(f"{self.path}: a tensor is in two shards", "each tensor once")
        if self.index is not None:
            self._check_index(self.index["weight_map"])
        factor = next((name for name in self._file_of if "lora_" in name), None)
        if factor is not None:
            raise BurnishError(f"{self.path} holds the adapter factor '{factor}'",
                               "whole weights, or a peft adapter's folder as --tuned or --control",
                               "merge the adapter with peft first")  # fmt: skip
        renamed = match_names(self._file_of, reference or self._file_of, rules)
        self.names = {new: old for old, new in renamed.items()}
        self.tensors = {new: self._file_of[old].tensors[old] for new, old in self.names.items()}

    def _find(self) -> list[Path]:
        if not self.path.is_dir():
            if self.path.exists():
                return [self.path]
            raise BurnishError(f"no weights at {self.path}: there is no such folder or file",
                               f"a folder with {WEIGHTS} or {INDEX}, or a safetensors file")  # fmt: skip
        for name, shards in ((WEIGHTS, False), (INDEX, True)):
            if os.path.lexists(self.path / name):  # a link to nothing is named as that
                return self._shards() if shards else [self.path / name]
        single = sorted(self.path.glob("*.safetensors"))
        single = [file for file in single if not file.name.startswith("policy_")]  # LeRobot's statistics
        if len(single) == 1:
            return single
        pickled = any(self.path.glob("*.bin"))
        fix = "convert it with save_pretrained(..., safe_serialization=True)" if pickled else ""
        raise BurnishError(f"no weights at {self.path}", f"{WEIGHTS} or {INDEX} with its shards", fix)

    def _shards(self) -> list[Path]:
        file = self.path / INDEX
        index = read_object(file, self.path)
        names, metadata = index.get("weight_map"), index.get("metadata") or {}
        if not isinstance(names, dict) or not all(isinstance(shard, str) and shard for shard in names.values()):
            raise BurnishError(f"the index {file} is unreadable", "a weight_map, tensor to name of its shard")
        if not isinstance(metadata, dict):
            raise BurnishError(f"the index {file} has damaged metadata", "words by name")
        self.index = index | {"metadata": metadata}
        try:
            return [inside(self.path, shard) for shard in sorted({Path(name).as_posix() for name in names.values()})]
        except BurnishError as error:
            raise BurnishError(f"the index {file}: {error}") from None

    def _check_index(self, weight_map: dict[str, str]) -> None:
        wrong = sorted(set(weight_map) ^ set(self._file_of))
        if wrong:
            where = "missing from the shards" if wrong[0] in weight_map else "not in the index"
            raise BurnishError(f"{self.path}: '{wrong[0]}' is {where} ({len(wrong)} in all)",
                               "shards that fit their index")  # fmt: skip

    def place(self, file: TensorFile) -> str:
        """A file's name inside the folder; that of a single file which is no .safetensors (a cache's blob) is new."""
        if self.path.is_dir():
            return file.path.relative_to(self.path).as_posix()
        return file.path.name if file.path.suffix == ".safetensors" else WEIGHTS

    def read(self, name: str, start: int, stop: int, scratch: np.ndarray | None = None) -> np.ndarray:
        """Elements start:stop of the flattened tensor as stored bits, in `scratch` as `TensorFile.read` has it."""
        stored = self.names[name]
        return self._file_of[stored].read(stored, start, stop, scratch)

    def values(self, name: str, start: int, stop: int, out: np.ndarray, digests: Digests | None = None) -> np.ndarray:
        """Put elements start:stop (at most a block) into float64 `out`, exactly; stored bits are added to `digests`."""
        bits = self.read(name, start, stop, _stored(0, stop - start))
        if digests is not None:
            digests.add(name, start, bits)
        return widen(bits, self.tensors[name].dtype, out)

    def digest(self, name: str) -> str:
        """A tensor's digest, read now."""
        return digest_of(name, self.tensors[name], self.read)

    @property
    def stamp(self) -> list[Any]:
        """See `stamp`."""
        return stamp(self.path, [file.path for file in self.files])


def locate(path: Path | str) -> Path:
    """The folder or file of a checkpoint `path`; a bare name may be a base that ships with burnish.

    Raises:
        BurnishError: no path at all.
    """
    found = Path(path)
    try:
        there = found.exists()
    except (OSError, ValueError) as error:
        shown = str(path)[:60]
        raise BurnishError(f"{shown!r} is no path ({getattr(error, 'strerror', None) or error})", "a path") from None
    shipped = Path(__file__).resolve().parents[1] / "assets" / found
    return shipped if not there and len(found.parts) == 1 and found.name != ".." and shipped.is_dir() else found


def stamp(path: Path, files: Iterable[Path]) -> list[Any]:
    """Place, names, sizes and times of a source's files: whether a finished output was made from these."""
    facts = [(file.name, file.stat()) for file in sorted(files)]
    return [str(path.resolve()), *([name, fact.st_size, fact.st_mtime_ns] for name, fact in facts)]
