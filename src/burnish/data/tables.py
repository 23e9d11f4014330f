"""The tables of a LeRobotDataset as plain values by their keys: episodes, instructions, statistics.

Nothing depends on where a row stands: v3 keeps its tables in parquet files, v2 in JSON lines and one file an episode.
"""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from burnish.core.errors import BurnishError, first_line
from burnish.core.reading import inside, read_lines, read_object, regular_file

MOST = 1 << 40
"""Largest number of a row or a file, and of seconds, that is believed."""
MOST_EPISODES = 10_000_000
MOST_VALUES = 1 << 28
"""In the columns read from one file: a few bytes can stand for any number of equal rows."""
MOST_CELLS = 1 << 24
"""As MOST_VALUES, of metadata."""


@dataclass(frozen=True)
class Clip:
    """Where the pictures of one episode and camera are: in `file`, from `start` to `stop` seconds (None: not said)."""

    file: str
    start: float
    stop: float | None = None


@dataclass(frozen=True)
class Episode:
    """What the metadata says of an episode; `length` in frames, files relative to the data set.

    `span` is what it says of the first row and the one after the last; None where it says nothing.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: str
    clips: dict[str, Clip] = field(default_factory=dict)
    span: tuple[int | None, int | None] | None = None


class Unreadable(BurnishError):
    """A data file that is missing or damaged."""


def read_parquet(
    root: Path, name: str, columns: Sequence[str] = (), optional: Sequence[str] = (), most: int = MOST_VALUES
) -> Any:
    """The table of `root`/`name` with the columns named (none: all), and those of `optional` that it has.

    Pages are held against their checksums where the writer has put some there, as ours does.

    Raises:
        Unreadable: the file is missing, damaged, or outside the data set.
        BurnishError: it lacks a column, or holds over `most` values in them.
    """
    path = inside(root, name)
    try:
        regular_file(path, root)
        about = pq.read_metadata(path)
        present = about.schema.to_arrow_schema().names
    except BurnishError as error:
        if not path.exists():
            fix = misplaced(root, name)
            raise Unreadable(f"{path} is missing", "every file that the metadata names", fix) from None
        raise Unreadable(str(error)) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read ({first_line(error, 200)})", "a whole parquet file",
                         "copy it again") from None  # fmt: skip
    lacking = [column for column in columns if column not in present]
    if lacking:
        raise BurnishError(f"{path} lacks the column {', '.join(lacking)}", "every feature of meta/info.json")
    wanted = [*dict.fromkeys(columns), *(column for column in optional if column in present)]
    count = _count_values(about, tuple(wanted))
    if count > most:
        raise BurnishError(f"{path} holds {count} values in what is read of it", f"at most {most}")
    try:
        return pq.read_table(path, columns=wanted or None, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read ({first_line(error, 200)})", "a whole parquet file",
                         "copy it again") from None  # fmt: skip


def _count_values(about: Any, wanted: tuple[str, ...]) -> int:
    """Values in the columns `wanted` (none: all) of a file, by its metadata."""
    columns = [i for i in range(about.num_columns) if not wanted or about.schema.column(i).path.startswith(wanted)]
    return sum(about.row_group(g).column(i).num_values for g in range(about.num_row_groups) for i in columns)


def cells(table: Any, name: str, where: Any) -> list[Any]:
    """The values of a column; BurnishError where one is no value of its type, such as text that is not UTF-8."""
    try:
        return table[name].to_pylist()
    except (ValueError, OverflowError) as error:
        raise BurnishError(f"{where}: the column {name} holds what is no value ({first_line(error, 100)})") from None


def misplaced(root: Path, name: str) -> str:
    """A command that puts a folder of nearly the right name (video for videos) in its place; "" without one."""
    top = Path(name).parts[0]
    if (root / top).exists():
        return ""
    near = next((p for p in sorted(root.iterdir()) if p.is_dir() and p.name.rstrip("s").lower() == top.rstrip("s")), "")
    return f"mv '{near}' '{root / top}'" if near else ""


def template(info: dict[str, Any], key: str, allowed: Sequence[str], where: str) -> str:
    """The pattern of file names `info[key]`; raises BurnishError unless it is text with the fields `allowed` alone."""
    text = info.get(key)
    try:
        parts = list(string.Formatter().parse(text)) if isinstance(text, str) else None
    except ValueError:
        parts = None
    plain = parts is not None and all(
        name is None or name in allowed and not conversion and re.fullmatch(r"0?\d{0,2}d?", spec or "")
        for _, name, spec, conversion in parts
    )
    if not plain:
        raise BurnishError(f"{where}: {key} is {text!r}", f"a pattern with {', '.join(f'{{{x}}}' for x in allowed)}")
    return text


def read_episodes(root: Path, info: dict[str, Any], videos: dict[str, str], where: str) -> dict[int, Episode]:
    """Episodes by their number; `videos` maps a camera to the name under which its files are stored."""
    read = _episodes_v3 if info["codebase_version"].startswith("v3") else _episodes_v2
    episodes: dict[int, Episode] = {}
    for episode in read(root, info, videos, where):
        if episode.index in episodes:
            raise BurnishError(f"the metadata of {root} has episode {episode.index} twice", "each episode once")
        episodes[episode.index] = episode
    if not episodes:
        raise BurnishError(f"{root} holds no episode", "at least one", "burnish data demos --help")
    return dict(sorted(episodes.items()))


def _episodes_v3(root: Path, info: dict[str, Any], videos: dict[str, str], where: str) -> Iterable[Episode]:
    folder, pattern = "meta/episodes", re.compile(r"chunk-\d+/file-\d+\.parquet")
    if not (root / folder).is_dir():
        raise BurnishError(f"{root / folder} is missing", "a finished LeRobotDataset")
    names = sorted(p.relative_to(root).as_posix() for p in (root / folder).glob("*/*.parquet"))
    names = [name for name in names if pattern.fullmatch(name.removeprefix(f"{folder}/"))]
    if not names:
        raise BurnishError(f"{root / folder} holds no chunk-000/file-000.parquet", "the table of episodes")
    data_path = template(info, "data_path", ("chunk_index", "file_index"), where)
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    spans, parts = ("dataset_from_index", "dataset_to_index"), ("chunk_index", "file_index", "from_timestamp")
    if videos:
        video_path = template(info, "video_path", ("video_key", "chunk_index", "file_index"), where)
    needed += [f"videos/{stored}/{part}" for stored in videos.values() for part in parts]
    optional = ["tasks", *spans, *(f"videos/{stored}/to_timestamp" for stored in videos.values())]
    for name in names:
        table = read_parquet(root, name, needed, optional, MOST_CELLS)
        for row in _rows_of(table, root / name):
            at = f"{name}: episode {row['episode_index']}"
            clips = {}
            for camera, stored in videos.items():
                chunk, number, start = (row[f"videos/{stored}/{part}"] for part in parts)
                file = video_path.format(video_key=stored, chunk_index=_whole(chunk, at, "chunk_index"),
                                         file_index=_whole(number, at, "file_index"))  # fmt: skip
                stop = row.get(f"videos/{stored}/to_timestamp")
                clips[camera] = Clip(file, _float(start), None if stop is None else _float(stop))
            chunk, number = (_whole(row[f"data/{part}"], at, f"data/{part}") for part in parts[:2])
            span = tuple(None if row[key] is None else int(_float(row[key], -1)) for key in spans if key in row)
            yield Episode(
                _whole(row["episode_index"], at, "episode_index", MOST_EPISODES), _whole(row["length"], at, "length"),
                _texts(row.get("tasks")), data_path.format(chunk_index=chunk, file_index=number), clips,
                span if len(span) == 2 else None,
            )  # fmt: skip


def _rows_of(table: Any, where: Path) -> Iterable[dict[str, Any]]:
    columns = {name: cells(table, name, where) for name in table.column_names}
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _episodes_v2(root: Path, info: dict[str, Any], videos: dict[str, str], where: str) -> Iterable[Episode]:
    size = info.get("chunks_size", 1000)
    if type(size) is not int or size < 1:
        raise BurnishError(f"{where}: chunks_size is {size!r}", "a positive whole number")
    data_path = template(info, "data_path", ("episode_chunk", "episode_index"), where)
    if videos:
        video_path = template(info, "video_path", ("episode_chunk", "episode_index", "video_key"), where)
    path = root / "meta/episodes.jsonl"
    if not path.exists():
        raise BurnishError(f"{path} is missing", "the episodes of a LeRobotDataset v2")
    for number, row in read_lines(path, root):
        at = f"{path} line {number}"
        if "episode_index" not in row or "length" not in row:
            raise BurnishError(f"{at} lacks episode_index or length")
        index = _whole(row["episode_index"], at, "episode_index", MOST_EPISODES)
        place = {"episode_chunk": index // size, "episode_index": index}
        clips = {name: Clip(video_path.format(video_key=stored, **place), 0.0) for name, stored in videos.items()}
        yield Episode(index, _whole(row["length"], at, "length"), _texts(row.get("tasks")), data_path.format(**place),
                      clips)  # fmt: skip


def _whole(value: Any, where: str, what: str, most: int = MOST) -> int:
    """A whole number from 0 on; pandas makes floats of a column that lacks one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value % 1:
        raise BurnishError(f"{where}: {what} is {value!r}", "a whole number from 0 on")
    return int(value)


def _float(value: Any, other: float = float("nan")) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
    return float(value) if good else other


def _texts(value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(one for one in several if isinstance(one, str))


def read_tasks(root: Path, version: str) -> dict[int, Any]:
    """Task index to instruction as it is stored, which may be no sentence."""
    if version.startswith("v3"):
        table, path = read_parquet(root, "meta/tasks.parquet", most=MOST_CELLS), root / "meta/tasks.parquet"
        text = _text_column(table)
        if text is None or "task_index" not in table.column_names:
            raise BurnishError(f"{path} lacks the columns task_index and task")
        rows = zip(cells(table, "task_index", path), cells(table, text, path), strict=True)
    else:
        path = root / "meta/tasks.jsonl"
        if not path.exists():
            raise BurnishError(f"{path} is missing", "the instructions of a LeRobotDataset v2")
        lines = list(read_lines(path, root))
        if any("task_index" not in row or "task" not in row for _, row in lines):
            raise BurnishError(f"{path}: a line lacks task_index or task")
        rows = ((row["task_index"], row["task"]) for _, row in lines)
    tasks: dict[int, Any] = {}
    for key, task in rows:
        index = _whole(key, f"the tasks of {root}", "task_index")
        if index in tasks:
            raise BurnishError(f"the tasks of {root} have number {index} twice", "each number once")
        tasks[index] = task
    return tasks


def _text_column(table: Any) -> str | None:
    """The column of instructions. pandas may write it as an index, named "task" or __index_level_0__."""
    names = [name for name in table.column_names if name != "task_index"]
    is_text = (pa.types.is_string, pa.types.is_large_string)
    texts = [name for name in names if any(one(table[name].type) for one in is_text)]
    ranked = [name for name in ("task", "__index_level_0__") if name in texts] + (texts if len(texts) == 1 else [])
    return next(iter([*ranked, *(name for name in ("task", "__index_level_0__") if name in names)]), None)


def read_statistics(root: Path, version: str, lengths: dict[int, int]) -> dict[str, dict[str, Any]]:
    """Statistics as they are stored, by feature and figure; v2.1 keeps them for each episode, pooled here by length."""
    path, lines = root / "meta/stats.json", root / "meta/episodes_stats.jsonl"
    if version.startswith("v2") and lines.exists():
        parts: dict[str, list[dict[str, Any]]] = {}
        for _, row in read_lines(lines, root):
            stats, index = row.get("stats"), row.get("episode_index")
            length = lengths.get(index, 1) if isinstance(index, int) else 1
            for name, one in stats.items() if isinstance(stats, dict) else ():
                parts.setdefault(name, []).append({"count": [length], **one} if isinstance(one, dict) else {})
        return {name: _pool(several) for name, several in parts.items()}
    if not path.exists():
        return {}
    return {name: one if isinstance(one, dict) else {"mean": one} for name, one in read_object(path, root).items()}


def _pool(parts: list[dict[str, Any]]) -> dict[str, Any]:
    pooled: dict[str, Any] = {}
    try:
        figures = {key: np.stack([np.asarray(part[key], np.float64) for part in parts])
                   for key in ("min", "max", "mean", "std", "count") if all(key in part for part in parts)}  # fmt: skip
    except (TypeError, ValueError):
        return parts[0]  # what holds no numbers is named where the figures are checked
    for key, reduce in (("min", np.min), ("max", np.max)):
        if key in figures:
            pooled[key] = reduce(figures[key], axis=0)
    if {"mean", "std", "count"} <= figures.keys():
        mean, count = figures["mean"], figures["count"].reshape(len(parts), -1)[:, 0]
        weight = (count / count.sum()).reshape(-1, *[1] * (mean.ndim - 1))
        pooled["mean"], pooled["count"] = (weight * mean).sum(0), np.array([count.sum()])
        second = (weight * (figures["std"] ** 2 + mean**2)).sum(0)
        pooled["std"] = np.sqrt(np.maximum(second - pooled["mean"] ** 2, 0.0))
    return pooled
