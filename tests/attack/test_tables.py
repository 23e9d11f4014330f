"""Tables of a v3 data set that parquet can hold and LeRobot never writes: types, bombs, broken text, names twice."""

import shutil
from pathlib import Path

import dataset_fakes as fakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_fakes import DATA, EPISODES, FRONT, INFO, STATS, TASK_TABLE, edit_json

from burnish.cli.main import main
from burnish.data.loader import RobotData

FROM = f"videos/{FRONT}/from_timestamp"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return fakes.write_v3(tmp_path_factory.mktemp("tables") / "set")


@pytest.fixture
def root(good, tmp_path, monkeypatch):
    from fake import register

    register(monkeypatch.setattr)
    return shutil.copytree(good, tmp_path / "set", ignore=shutil.ignore_patterns(".frames"))


def column(name: str, key: str, make):
    """Replaces a column of a table by what `make` makes of its values, an arrow array."""

    def change(root: Path) -> None:
        table = pq.read_table(root / name, partitioning=None)
        made = make(table[key].to_pylist())
        pq.write_table(table.set_column(table.column_names.index(key), key, made), root / name)

    return change


def typed(kind):
    return lambda values: pa.array(values).cast(kind)


def broken_text(values):
    """Strings whose bytes are no UTF-8."""
    data = b"\xff\xfe\xfd" * len(values)
    offsets = np.arange(0, len(data) + 1, 3, dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets.tobytes()), pa.py_buffer(data))


def twice(name: str, key: str):
    """A second column of the same name."""

    def change(root: Path) -> None:
        table = pq.read_table(root / name, partitioning=None)
        pq.write_table(table.append_column(key, table[key]), root / name)

    return change


def bomb(name: str, columns: dict[str, pa.Array], count: int):
    """A few bytes that stand for very many equal rows."""

    def change(root: Path) -> None:
        table = pa.table({key: pa.repeat(value, count) for key, value in columns.items()})
        pq.write_table(table, root / name, compression="zstd")

    return change


def lists(name: str, key: str, count: int):
    """One row that holds a list of very many numbers."""
    return column(name, key, lambda values: pa.array([[0] * count] + [None] * (len(values) - 1), pa.list_(pa.int8())))


def rows(name: str, count: int):
    def change(root: Path) -> None:
        pq.write_table(pq.read_table(root / name, partitioning=None).slice(0, count), root / name)

    return change


def info(**changes):
    return lambda root: edit_json(root / INFO, lambda one: one.update(changes))


def features(**changes):
    return lambda root: edit_json(root / INFO, lambda one: one["features"].update(changes))


MANY = 2001  # where 1000 are allowed
REFUSED = {
    # tasks
    "tasks of no text": column(TASK_TABLE, "task", broken_text),
    "tasks of bytes": column(TASK_TABLE, "task", lambda v: pa.array([b"a", b"b"])),
    "tasks of lists": column(TASK_TABLE, "task", lambda v: pa.array([["a"], ["b"]])),
    "tasks of dates": column(TASK_TABLE, "task", lambda v: pa.array([1, 2], pa.timestamp("s"))),
    "tasks of nothing": column(TASK_TABLE, "task", lambda v: pa.nulls(2)),
    "tasks that are a struct": column(TASK_TABLE, "task", lambda v: pa.array([{"a": 1}, {"a": 2}])),
    "task numbers of text": column(TASK_TABLE, "task_index", lambda v: pa.array(["0", "1"])),
    "task numbers of halves": column(TASK_TABLE, "task_index", lambda v: pa.array([0.5, 1.5])),
    "task numbers below 0": column(TASK_TABLE, "task_index", lambda v: pa.array([-1, 0])),
    "task numbers of dates": column(TASK_TABLE, "task_index", lambda v: pa.array([0, 1], pa.timestamp("s"))),
    "task numbers of truth": column(TASK_TABLE, "task_index", lambda v: pa.array([False, True])),
    "tasks, a column twice": twice(TASK_TABLE, "task"),
    "task numbers, a column twice": twice(TASK_TABLE, "task_index"),
    "tasks without rows": rows(TASK_TABLE, 0),
    "two thousand tasks": bomb(TASK_TABLE, {"task_index": pa.scalar(0, pa.int8()), "task": pa.scalar("a")}, MANY),
    # episodes
    "episodes without rows": rows(EPISODES, 0),
    "two thousand episodes": bomb(EPISODES, {
        "episode_index": pa.scalar(0, pa.int8()), "length": pa.scalar(1, pa.int8()),
        "data/chunk_index": pa.scalar(0, pa.int8()), "data/file_index": pa.scalar(0, pa.int8()),
        FROM: pa.scalar(0, pa.int8()), f"videos/{FRONT}/chunk_index": pa.scalar(0, pa.int8()),
        f"videos/{FRONT}/file_index": pa.scalar(0, pa.int8()),
    }, MANY),
    "an episode of two thousand sentences": lists(EPISODES, "tasks", MANY),
    "sentences of no text": column(EPISODES, "tasks", lambda v: pa.ListArray.from_arrays([0, 1, 2, 3], broken_text(v))),
    "lengths of lists": column(EPISODES, "length", lambda v: pa.array([[5], [6], [7]])),
    "lengths of dates": column(EPISODES, "length", lambda v: pa.array(v, pa.timestamp("s"))),
    "lengths of spans": column(EPISODES, "length", lambda v: pa.array(v, pa.duration("s"))),
    "lengths of truth": column(EPISODES, "length", lambda v: pa.array([True] * 3)),
    "lengths of structs": column(EPISODES, "length", lambda v: pa.array([{"a": 1}] * 3)),
    "lengths of bytes": column(EPISODES, "length", lambda v: pa.array([b"5"] * 3)),
    "lengths of halves": column(EPISODES, "length", lambda v: pa.array([5.5] * 3)),
    "lengths of a terabyte": column(EPISODES, "length", lambda v: pa.array([2**39] * 3)),
    "lengths beyond": column(EPISODES, "length", lambda v: pa.array([2**62] * 3)),
    "lengths of 0": column(EPISODES, "length", lambda v: pa.array([0] * 3)),
    "lengths, a column twice": twice(EPISODES, "length"),
    "numbers, a column twice": twice(EPISODES, "episode_index"),
    "numbers of a billion": column(EPISODES, "episode_index", lambda v: pa.array([0, 1, 10**9])),
    "numbers of text": column(EPISODES, "episode_index", lambda v: pa.array(["0", "1", "2"])),
    "files of text": column(EPISODES, "data/file_index", lambda v: pa.array(["../../x"] * 3)),
    "files of a billion": column(EPISODES, "data/file_index", lambda v: pa.array([2**39] * 3)),
    "files below 0": column(EPISODES, "data/chunk_index", lambda v: pa.array([-1] * 3)),
    "starts of text": column(EPISODES, FROM, lambda v: pa.array(["0"] * 3)),
    "starts of dates": column(EPISODES, FROM, lambda v: pa.array([0] * 3, pa.timestamp("s"))),
    "starts without end": column(EPISODES, FROM, lambda v: pa.array([float("inf")] * 3)),
    "starts of a year": column(EPISODES, FROM, lambda v: pa.array([3e7] * 3)),
    # rows
    "rows without rows": rows(DATA, 0),
    "rows, a column twice": twice(DATA, "action"),
    "keys, a column twice": twice(DATA, "frame_index"),
    "frames of text": column(DATA, "frame_index", lambda v: pa.array([str(x) for x in v])),
    "frames of dates": column(DATA, "frame_index", lambda v: pa.array(v, pa.timestamp("s"))),
    "frames of lists of two": column(DATA, "frame_index", lambda v: pa.array([[x, x] for x in v])),
    "episodes of nothing": column(DATA, "episode_index", lambda v: pa.nulls(len(v))),
    "episodes beyond": column(DATA, "episode_index", lambda v: pa.array([2**63 - 1] * len(v))),
    "actions of text": column(DATA, "action", lambda v: pa.array([["a", "b", "c"]] * len(v))),
    "actions of dates": column(DATA, "action", lambda v: pa.array([[1, 2, 3]] * len(v), pa.list_(pa.timestamp("s")))),
    "actions of structs": column(DATA, "action", lambda v: pa.array([{"x": 1.0}] * len(v))),
    "actions in lists in lists": column(DATA, "action", lambda v: pa.array([[[[1.0]]]] * len(v))),
    "actions of nothing": column(DATA, "action", lambda v: pa.nulls(len(v))),
    "actions of empty lists": column(DATA, "action", lambda v: pa.array([[]] * len(v), pa.list_(pa.float32()))),
    "actions beyond float32": column(DATA, "action", lambda v: pa.array([[1e300] * 3] * len(v))),
    "tasks of rows beyond": column(DATA, "task_index", lambda v: pa.array([2**40] * len(v))),
    # info.json
    "a width of ten million": features(action={"dtype": "float32", "shape": [10**7], "names": None}),
    "a width of a terabyte": features(action={"dtype": "float32", "shape": [2**40], "names": None}),
    "a dtype with code": features(action={"dtype": "__import__('os').system('touch ran')", "shape": [3]}),
    "a name with half a character": lambda root: (root / INFO).write_text(
        (root / INFO).read_text().replace('"a0"', '"\\ud800"')),
    "a picture of a million channels": features(**{FRONT: {"dtype": "video", "shape": [32, 32, 10**6], "names": None}}),
    "fps of a million": info(fps=10**6), "fps below 0": info(fps=-10), "fps tiny": info(fps=1e-300),
    "files by attribute": info(data_path="{chunk_index.__class__}"), "files by index": info(data_path="{0}"),
    "files by conversion": info(data_path="{chunk_index!r}"), "files of nothing": info(data_path=""),
    "files in the folder itself": info(data_path="."), "videos in a file": info(video_path="meta/info.json/x.mp4"),
    "videos in info.json": info(video_path="meta/info.json"), "videos of a null byte": info(video_path="a\0b"),
    "files of a null byte": info(data_path="a\0{chunk_index}"), "videos of the home": info(video_path="~/x.mp4"),
    "files of 5000 letters": info(data_path="a" * 5000), "no features": info(features={}),
    "statistics of a bomb": lambda root: (root / STATS).write_text(
        '{"action": {"mean": ' + "[" * 60 + "1" + "]" * 60 + "}}"),
    "statistics of text": lambda root: (root / STATS).write_text('{"action": "abc", "observation.state": "abc"}'),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_tables_that_cannot_be_read(name, root, tmp_path, refused, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("burnish.data.tables.MOST_CELLS", 1000)
    REFUSED[name](root)
    status = main(["data", "inspect", str(root)])
    said = "".join(capfd.readouterr())
    assert status in (1, 2) and "Traceback" not in said and "internal error" not in said, said
    refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={tmp_path / 'run'}", "--train.steps=1",
             f"--data.cache_dir={tmp_path / 'cache'}"])  # fmt: skip
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run/policy").exists()


READ = {
    "numbers of 64 bits": column(DATA, "action", typed(pa.list_(pa.float64()))),
    "lists of a fixed length": column(DATA, "action", typed(pa.list_(pa.float32(), 3))),
    "large lists": column(DATA, "observation.state", typed(pa.large_list(pa.float32()))),
    "keys of 8 bits": column(DATA, "frame_index", typed(pa.int8())),
    "keys without a sign": column(DATA, "episode_index", typed(pa.uint64())),
    "keys of floats": column(EPISODES, "length", typed(pa.float64())),
    "large sentences": column(TASK_TABLE, "task", typed(pa.large_string())),
    "sentences in a dictionary": column(TASK_TABLE, "task", lambda v: pa.array(v).dictionary_encode()),
    "no sentences beside": lambda root: fakes.edit_table(root / EPISODES, lambda one: one.pop("tasks")),
    "other keys of info.json": info(robot_type=[1], splits="all", total_videos=-3, license={"a": 1}),
}


@pytest.mark.parametrize("name", READ)
def test_tables_that_are_read_right(name, root, tmp_path):
    READ[name](root)
    fakes.assert_reads_right(RobotData(root, [], 4, 2, 0, augmented=False, progress=False))


def test_damaged_pages_of_ours_are_told(root, tmp_path, refused):
    """Bytes that still decode, to other numbers: ours carry checksums, which others' writers leave out."""
    table = pq.read_table(root / DATA, partitioning=None)
    pq.write_table(table, root / DATA, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray((root / DATA).read_bytes())
    place = content.index(np.float32(fakes.action(2, 6)[2]).tobytes())
    content[place : place + 4] = np.float32(0.25).tobytes()
    (root / DATA).write_bytes(bytes(content))
    refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={tmp_path / 'run'}"], "cannot be read")


def test_our_own_tables_carry_checksums(tmp_path):
    """`page_checksum_verification` says nothing of a page without one: damage the page and see."""
    from burnish.data.tables import Unreadable, read_parquet

    assert (
        main(["data", "demos", "tabletop:reach", "1", str(tmp_path / "made"), "--image-size", "32", "--workers", "1"])
        == 0
    )
    path = tmp_path / "made" / DATA
    first = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[first + 60] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Unreadable):
        read_parquet(tmp_path / "made", DATA, ["observation.state"])
