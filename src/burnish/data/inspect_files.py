"""Reads the files of a LeRobotDataset, v3.0 and v2.x in place, and says exactly what is wrong with one.

LeRobot's own class refuses v2.x and stops at the first fault with a stack trace; an inspection has to read on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.errors import BurnishError
from burnish.core.progress import progress_bar
from burnish.core.reading import read_object

VERSIONS = ("v2.0", "v2.1", "v3.0")
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class Clip:
    """Where the frames of one episode and view are: `file`, from `start` seconds on."""

    file: Path
    start: float


@dataclass(frozen=True)
class Episode:
    """What the metadata says of an episode; `length` in frames."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: Path
    clips: dict[str, Clip] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetFiles:
    """An opened data set.

    Args:
        version: "v2.0", "v2.1" or "v3.0".
        features: name to {"dtype", "shape", "names"} as info.json has it.
        episodes: in order of their index.
        tasks: task index to instruction.
        stats: feature to {"mean", "std", "min", "max", "q01", ...: flat array}; {} when the data set has none.
    """

    root: Path
    version: str
    fps: int
    features: dict[str, dict[str, Any]]
    episodes: list[Episode]
    tasks: dict[int, str]
    stats: dict[str, dict[str, np.ndarray]]
    info: dict[str, Any]

    @property
    def views(self) -> list[str]:
        return [name for name, feature in self.features.items() if feature["dtype"] in ("video", "image")]

    @property
    def videos(self) -> list[str]:
        return [name for name in self.views if self.features[name]["dtype"] == "video"]

    @property
    def numeric(self) -> list[str]:
        kinds = ("float", "int", "uint", "bool")
        return [name for name, one in self.features.items() if one["dtype"].startswith(kinds)]

    def names(self, feature: str) -> list[str]:
        """One name per dimension of a numeric feature."""
        size = prod(self.features[feature]["shape"]) or 1
        names = self.features[feature].get("names")
        if isinstance(names, dict):  # some writers group them: {"motors": [...]}
            names = [one for group in names.values() if isinstance(group, list) for one in group]
        return [str(name) for name in names] if names and len(names) == size else [str(i) for i in range(size)]


def open_dataset(root: Path | str) -> DatasetFiles:
    """Read the metadata.

    Raises:
        BurnishError: not a LeRobotDataset, an unknown version, or a metadata file that is missing or malformed.
    """
    root = Path(root)
    if not root.is_dir():
        raise BurnishError(f"no data set at {root}", "a LeRobotDataset folder")
    info = _read_info(root)
    version, features = info["codebase_version"], info["features"]
    read = _episodes_v3 if version == "v3.0" else _episodes_v2
    episodes = sorted(read(root, info), key=lambda episode: episode.index)
    if not episodes:
        raise BurnishError(f"{root} holds no episode")
    tasks = _tasks_v3(root) if version == "v3.0" else _tasks_v2(root)
    stats = _stats_v2(root) if version == "v2.1" else _stats_file(root)
    return DatasetFiles(root, version, int(info["fps"]), features, episodes, tasks, stats, info)


def read_columns(files: DatasetFiles) -> dict[str, np.ndarray]:
    """All numeric columns, episodes in order: [N] for index columns, [N, dims] float64 for the others.

    Raises:
        BurnishError: a data file is missing or unreadable, lacks a column, or has other dimensions than info.json.
    """
    wanted = list(dict.fromkeys([*files.numeric, *INDEX_COLUMNS]))
    paths = list(dict.fromkeys(episode.data_file for episode in files.episodes))
    parts = [_read_data(files, path, wanted) for path in progress_bar(paths, desc="data", leave=False)]
    return {name: np.concatenate([part[name] for part in parts]) for name in wanted}


def read_embedded_image(files: DatasetFiles, view: str, episode: Episode, frame: int) -> np.ndarray:
    """One image [H, W, 3] uint8 of a view that is stored inside the parquet files."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image, UnidentifiedImageError

    wanted = [("episode_index", "=", episode.index), ("frame_index", "=", frame)]
    table = pq.read_table(episode.data_file, columns=[view], filters=wanted)
    cell = next(iter(table[view].to_pylist()), None) or {}
    content = cell.get("bytes")
    try:
        source = io.BytesIO(content) if content else files.root / (cell.get("path") or "")
        return np.asarray(Image.open(source).convert("RGB"))
    except (UnidentifiedImageError, OSError):
        raise BurnishError(f"{episode.data_file}: no readable image of {view} in episode {episode.index}") from None


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not path.is_file():
        raise BurnishError(f"{root} has no meta/info.json", "a LeRobotDataset folder (v2.1 or v3.0)")
    info = read_object(path)
    missing = [key for key in ("codebase_version", "fps", "features", "data_path") if key not in info]
    if missing:
        raise BurnishError(f"{path} lacks {', '.join(missing)}")
    if info["codebase_version"] not in VERSIONS:
        raise BurnishError(f"{path}: version {info['codebase_version']}", f"one of {', '.join(VERSIONS)}")
    if not isinstance(info["fps"], int | float) or info["fps"] <= 0:
        raise BurnishError(f"{path}: fps is {info['fps']!r}", "a positive number")
    for name, feature in info["features"].items():
        if not isinstance(feature, dict) or "dtype" not in feature or "shape" not in feature:
            raise BurnishError(f"{path}: feature '{name}' lacks dtype or shape")
    if "action" not in info["features"]:
        raise BurnishError(f"{path} lists no feature 'action'")
    return info


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise BurnishError(f"{path} is missing")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BurnishError(f"{path} line {number} is not JSON ({error.msg})") from None
    return rows


def _read_parquet(path: Path, columns: Sequence[str] = ()):
    """The table of a file or folder, with all columns or those named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise BurnishError(f"{path} is missing")
    try:
        missing = set(columns) - set(pq.read_schema(path).names) if columns else ()
        if missing:
            lacking = ", ".join(name for name in columns if name in missing)
            raise BurnishError(f"{path} lacks the column {lacking}", "every feature of meta/info.json")
        return pq.read_table(path, columns=columns or None)
    except (pa.ArrowException, OSError) as error:
        raise BurnishError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None


def _episodes_v3(root: Path, info: dict[str, Any]) -> list[Episode]:
    table = _read_parquet(root / "meta/episodes")
    keep = [name for name in table.column_names if not name.startswith("stats/")]
    videos = [name for name, one in info["features"].items() if one["dtype"] == "video"]
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    needed += [f"videos/{name}/{part}" for name in videos for part in ("chunk_index", "file_index", "from_timestamp")]
    missing = [name for name in needed if name not in keep]
    if missing:
        raise BurnishError(f"{root / 'meta/episodes'} lacks the column {missing[0]}")
    episodes = []
    for row in table.select(keep).to_pylist():
        clips = {}
        for name in videos:
            place = {part: row[f"videos/{name}/{part}"] for part in ("chunk_index", "file_index")}
            file = root / info["video_path"].format(video_key=name, **place)
            clips[name] = Clip(file, float(row[f"videos/{name}/from_timestamp"]))
        data = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        tasks = tuple(row.get("tasks") or ())
        episodes.append(Episode(row["episode_index"], row["length"], tasks, root / data, clips))
    return episodes


def _episodes_v2(root: Path, info: dict[str, Any]) -> list[Episode]:
    path = root / "meta/episodes.jsonl"
    videos = [name for name, one in info["features"].items() if one["dtype"] == "video"]
    size = int(info.get("chunks_size") or 1000)
    episodes = []
    for number, row in enumerate(_read_lines(path), 1):
        if "episode_index" not in row or "length" not in row:
            raise BurnishError(f"{path} line {number} lacks episode_index or length")
        index = row["episode_index"]
        place = {"episode_chunk": index // size, "episode_index": index}
        clips = {name: Clip(root / info["video_path"].format(video_key=name, **place), 0.0) for name in videos}
        data = root / info["data_path"].format(**place)
        episodes.append(Episode(index, row["length"], tuple(row.get("tasks") or ()), data, clips))
    return episodes


def _tasks_v3(root: Path) -> dict[int, str]:
    table = _read_parquet(root / "meta/tasks.parquet")
    # pandas writes the instruction as the index: under the name "task" or, unnamed, as __index_level_0__.
    column = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if column is None or "task_index" not in table.column_names:
        raise BurnishError(f"{root / 'meta/tasks.parquet'} lacks the columns task_index and task")
    return dict(zip(table["task_index"].to_pylist(), table[column].to_pylist(), strict=True))


def _tasks_v2(root: Path) -> dict[int, str]:
    path = root / "meta/tasks.jsonl"
    rows = _read_lines(path)
    if any("task_index" not in row or "task" not in row for row in rows):
        raise BurnishError(f"{path}: a line lacks task_index or task")
    return {row["task_index"]: row["task"] for row in rows}


def _stats_file(root: Path) -> dict[str, dict[str, np.ndarray]]:
    path = root / "meta/stats.json"
    return {name: _arrays(one) for name, one in read_object(path).items()} if path.is_file() else {}


def _stats_v2(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """v2.1 keeps statistics per episode; pooled here by count."""
    path = root / "meta/episodes_stats.jsonl"
    if not path.is_file():
        return {}
    rows = [row.get("stats", {}) for row in _read_lines(path)]
    return {name: _pool([_arrays(row[name]) for row in rows if name in row]) for name in (rows[0] if rows else {})}


def _pool(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    pooled = {}
    if all("min" in part and "max" in part for part in parts):
        pooled["min"] = np.min([part["min"] for part in parts], axis=0)
        pooled["max"] = np.max([part["max"] for part in parts], axis=0)
    if all({"mean", "std", "count"} <= part.keys() for part in parts):
        weight = np.array([part["count"].reshape(-1)[0] for part in parts], dtype=np.float64)
        weight = weight[:, None] / weight.sum()
        mean = np.stack([part["mean"] for part in parts])
        pooled["mean"] = (weight * mean).sum(0)
        second = (weight * (np.stack([part["std"] for part in parts]) ** 2 + mean**2)).sum(0)
        pooled["std"] = np.sqrt(np.maximum(second - pooled["mean"] ** 2, 0.0))
    return pooled


def _arrays(one: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.asarray(value, dtype=np.float64).reshape(-1) for key, value in one.items()}


def _read_data(files: DatasetFiles, path: Path, wanted: list[str]) -> dict[str, np.ndarray]:
    import pyarrow as pa

    table = _read_parquet(path, wanted)
    out = {}
    for name in wanted:
        column = table[name].combine_chunks()
        if name in INDEX_COLUMNS:
            values = column.to_numpy(zero_copy_only=False)
            # v2 writers sometimes store scalars as lists of one
            out[name] = np.asarray([v[0] for v in values]) if values.dtype == object else values
            continue
        size, flat = prod(files.features[name]["shape"]) or 1, column
        while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
            flat = flat.flatten()
        if len(flat) != size * len(column):
            found = len(flat) / max(len(column), 1)
            raise BurnishError(f"{path}: {name} has {found:g} numbers a frame", f"{size} as meta/info.json says")
        out[name] = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(column), size)
    return out
