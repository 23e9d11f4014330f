"""The rows of a LeRobotDataset by episode and frame, whatever the order in which they are stored."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from burnish.core.errors import BurnishError
from burnish.data.features import INDEX_COLUMNS
from burnish.data.tables import MOST, Unreadable, read_parquet


@dataclass(frozen=True)
class Rows:
    """The frames of a data set, N in all, sorted by episode and frame.

    Args:
        keys: "episode_index", "frame_index", "task_index", "index" int64 [N], and "timestamp" float64 [N].
        values: numeric feature to [N, D]; NaN where a row has another number of values.
        wrong: feature to (row, values found; -1 for null) of those rows.
        files: [N] which of `names` each row was read from.
        lost: file to the reason why it could not be read.
    """

    keys: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    wrong: dict[str, list[tuple[int, int]]]
    files: np.ndarray
    names: tuple[str, ...]
    lost: dict[str, BurnishError]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def episodes(self) -> np.ndarray:
        """[E] numbers of the episodes that have rows, ascending."""
        return np.unique(self.keys["episode_index"])

    @cached_property
    def starts(self) -> np.ndarray:
        """[E] first row of each of them."""
        return np.searchsorted(self.keys["episode_index"], self.episodes)

    @cached_property
    def counts(self) -> np.ndarray:
        """[E] rows of each of them."""
        return np.diff(np.append(self.starts, len(self)))

    @cached_property
    def ends(self) -> np.ndarray:
        """[N] the row after the last one of the episode that each row belongs to."""
        return np.repeat(self.starts + self.counts, self.counts)

    def span(self, episode: int) -> tuple[int, int]:
        """First row of an episode and the row after its last one; equal where it has none."""
        first, stop = np.searchsorted(self.keys["episode_index"], [episode, episode + 1])
        return int(first), int(stop)

    def of(self, episodes: Iterable[int]) -> "Rows":
        """The rows of some episodes."""
        keep = np.isin(self.keys["episode_index"], np.fromiter(episodes, np.int64))
        if keep.all():
            return self
        place = np.cumsum(keep) - 1
        wrong = {name: [(int(place[row]), n) for row, n in rows if keep[row]] for name, rows in self.wrong.items()}
        return replace(
            self, keys={name: one[keep] for name, one in self.keys.items()}, wrong=wrong, files=self.files[keep],
            values={name: one[keep] for name, one in self.values.items()},
        )  # fmt: skip


def read_rows(root: Path, files: Sequence[str], features: dict[str, dict], wanted: Sequence[str]) -> Rows:
    """Read the keys and the features `wanted` from the data files of a data set.

    Raises:
        BurnishError: no file can be read, or a file lacks a column, or holds keys that are no numbers. A file that is
            missing or damaged is only noted, so that one can train on the episodes of the others.
    """
    columns = [*INDEX_COLUMNS, *(column for name in wanted for column in features[name]["columns"])]

    def read(name: str) -> tuple[dict, dict, dict] | BurnishError:
        try:
            return _from_table(read_parquet(root, name, columns), str(root / name), features, wanted)
        except Unreadable as error:
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(read, files))
    lost = {name: part for name, part in zip(files, parts, strict=True) if isinstance(part, BurnishError)}
    good = [(place, part) for place, part in enumerate(parts) if not isinstance(part, BurnishError)]
    if not good:
        raise next(iter(lost.values()), BurnishError(f"{root} holds no data"))
    counts = [len(part[0]["index"]) for _, part in good]
    keys = {name: np.concatenate([part[0][name] for _, part in good]) for name in INDEX_COLUMNS}
    order = np.lexsort((keys["frame_index"], keys["episode_index"]))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    offsets = np.cumsum([0, *counts])
    return Rows(
        keys={name: one[order] for name, one in keys.items()},
        values={name: np.concatenate([part[1][name] for _, part in good])[order] for name in wanted},
        wrong={
            name: sorted((int(place[offsets[i] + row]), n) for i, (_, p) in enumerate(good) for row, n in p[2][name])
            for name in wanted
        },
        files=np.repeat([i for i, _ in good], counts)[order], names=tuple(files), lost=lost,
    )  # fmt: skip


def _from_table(table: Any, file: str, features: dict[str, dict], wanted: Sequence[str]) -> tuple[dict, dict, dict]:
    """Keys, values and rows of wrong width of one file."""
    keys, values, wrong = {}, {}, {}
    for name in INDEX_COLUMNS:
        numbers = _matrix(table[name], (1,), f"{file}: {name}")[0][:, 0].astype(np.float64)
        good = np.abs(numbers) < MOST  # false for NaN
        if name != "timestamp":
            good &= numbers == np.floor(numbers)
        if not good.all():
            row = int(np.argmin(good))
            raise BurnishError(f"{file}: {name} of row {row} is {numbers[row]:g}", "a number in every row")
        keys[name] = numbers if name == "timestamp" else numbers.astype(np.int64)
    for name in wanted:
        feature, parts, rows = features[name], [], {}
        for column, shape in zip(feature["columns"], feature["parts"], strict=True):
            part, found = _matrix(table[column], shape, f"{file}: {column}")
            if found and len(found) == len(part) and len({n for _, n in found} | {-1}) == 2:
                raise BurnishError(f"{file}: {column} has {found[0][1]} numbers a frame",
                                   f"{prod(shape)} as meta/info.json says")  # fmt: skip
            parts.append(part)
            rows |= dict(found)
        values[name], wrong[name] = np.concatenate(parts, 1), list(rows.items())
    return keys, values, wrong


def _matrix(column: Any, shape: tuple[int, ...], where: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """[N, size] numbers of scalars or (nested) lists, and (row, values found, -1 for null) where there are others."""
    array, size = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type), prod(shape)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if not _is_list(array.type):
        return _scalars(array, size, where)
    if _is_list(array.type.value_type):
        outer, rest = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
    else:
        outer, rest = size, (1,)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
    good = lengths == outer
    inner, _ = _matrix(pa.chunked_array([array.filter(pa.array(good)).flatten()]), rest, where)
    values = np.full((len(array), size), np.nan, inner.dtype)
    values[good] = inner.reshape(-1, size)
    return values, [(int(row), int(lengths[row])) for row in np.flatnonzero(~good)]


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _scalars(array: Any, size: int, where: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    kind = array.type
    known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if not any(is_one(kind) for is_one in known):
        raise BurnishError(f"{where} holds {kind}", "numbers")
    narrow = pa.types.is_float32(kind) or pa.types.is_float16(kind)
    values = np.asarray(array.to_numpy(zero_copy_only=False), np.float32 if narrow else np.float64).reshape(-1, 1)
    if size != 1:
        return np.full((len(array), size), np.nan, values.dtype), [(row, 1) for row in range(len(array))]
    null = np.flatnonzero(pc.is_null(array).to_numpy(zero_copy_only=False)) if array.null_count else ()
    return values, [(int(row), -1) for row in null]
