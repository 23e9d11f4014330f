"""Damaged data sets: inspection names what training refuses, and what training takes it reads right."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import dataset_fakes as fakes
import numpy as np
import pytest
from dataset_fakes import DATA, DATA2, EPISODES, FRONT, INFO, STATS, TASK_TABLE, VIDEO, VIDEO2, edit_json, edit_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.data.inspect import inspect_dataset
from burnish.data.loader import RobotData
from burnish.data.record import encode_video

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 100\n"
TO = f"videos/{FRONT}/to_timestamp"
FROM = f"videos/{FRONT}/from_timestamp"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {
        "v3": fakes.write_v3(folder / "v3"), "v2": fakes.write_v21(folder / "v2"),
        "pictures": fakes.write_v3(folder / "pictures", pictures=True),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def fake_policy(monkeypatch):
    from fake import register

    register(monkeypatch.setattr)


@pytest.fixture
def copy(good, tmp_path):
    return lambda kind: Path(shutil.copytree(good[kind], tmp_path / "set"))


def read(root: Path, **options) -> RobotData:
    return RobotData(
        root, [], 4, 2, 0, augmented=False, progress=False, cache_dir=str(root.parent / "cache"), **options
    )


def info(change):
    return lambda root: edit_json(root / INFO, change)


def stats(change):
    return lambda root: edit_json(root / STATS, change)


def table(name, change):
    return lambda root: edit_table(root / name, change)


def text(name, content):
    return lambda root: (root / name).write_text(content)


def put(column, row, value):
    """Changes one cell of a table."""
    return lambda columns: columns[column].__setitem__(row, value)


def feature(name, **changes):
    return info(lambda one: one["features"][name].update(changes))


def retype(name, column, values):
    """Replaces a column of a parquet file by one of another type."""

    def change(root: Path) -> None:
        import pyarrow.parquet as pq

        path = root / name
        columns = pq.read_table(path).to_pydict() | {column: values}
        columns = {key: one for key, one in columns.items() if one is not None}
        import pyarrow as pa

        pq.write_table(pa.table(columns), path)

    return change


def flip(name: str, share: float, count: int = 400):
    """Overwrites bytes in the middle of a file."""

    def change(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        at = int(len(content) * share)
        content[at : at + count] = b"\x55" * len(content[at : at + count])
        (root / name).write_bytes(bytes(content))

    return change


def cut(name: str, share: float):
    return lambda root: (root / name).write_bytes(
        (root / name).read_bytes()[: int((root / name).stat().st_size * share)]
    )


def video(name: str, frames: int = 18, size: int = 32):
    return lambda root: (root / name).write_bytes(encode_video(np.zeros((frames, size, size, 3), np.uint8), fakes.FPS))


def fifo(name: str):
    def change(root: Path) -> None:
        (root / name).unlink()
        os.mkfifo(root / name)

    return change


def outside(name: str):
    """Replaces a file by a link to its copy outside the data set."""

    def change(root: Path) -> None:
        moved = root.parent / "elsewhere"
        (root / name).rename(moved)
        (root / name).symlink_to(moved)

    return change


def picture(data: bytes):
    """Replaces the picture of frame 2 of episode 1."""
    return table(DATA, put(FRONT, 7, {"bytes": data, "path": None}))


def unlink(name: str):
    return lambda root: (root / name).unlink()


def rotate(column: str):
    return table(DATA, lambda c: c.__setitem__(column, c[column][1:] + c[column][:1]))


def shift(column: str, row: int, by: float):
    return table(EPISODES, lambda c: c[column].__setitem__(row, c[column][row] + by))


def swap(column: str, one: int, two: int, name: str = EPISODES):
    def change(c: dict) -> None:
        c[column][one], c[column][two] = c[column][two], c[column][one]

    return table(name, change)


REFUSED = {
    # meta/info.json
    "info-missing": ("v3", unlink(INFO), "no meta/info.json"),
    "info-cut": ("v3", text(INFO, "{"), "is not JSON"),
    "info-list": ("v3", text(INFO, "[]"), "a JSON object"),
    "info-null": ("v3", text(INFO, "null"), "a JSON object"),
    "info-deep": ("v3", text(INFO, "[" * 5000 + "]" * 5000), "nested too deep"),
    "info-utf16": ("v3", lambda r: (r / INFO).write_bytes((r / INFO).read_text().encode("utf-16")), "UTF-16"),
    "info-twice": ("v3", text(INFO, '{"fps": 1, "fps": 2}'), "twice"),
    "info-lfs": ("v3", text(INFO, LFS), "Git LFS"),
    "info-fifo": ("v3", fifo(INFO), "is a pipe"),
    "info-link": ("v3", outside(INFO), "outside"),
    "fps-missing": ("v3", info(lambda one: one.pop("fps")), "lacks fps"),
    "fps-zero": ("v3", info(lambda one: one.update(fps=0)), "fps is 0"),
    "fps-word": ("v3", info(lambda one: one.update(fps="ten")), "fps is 'ten'"),
    "fps-nan": ("v3", info(lambda one: one.update(fps=float("nan"))), "fps is nan"),
    "fps-true": ("v3", info(lambda one: one.update(fps=True)), "fps is True"),
    "version-old": ("v3", info(lambda one: one.update(codebase_version="v1.6")), "version v1.6"),
    "version-null": ("v3", info(lambda one: one.update(codebase_version=None)), "version None"),
    "version-list": ("v3", info(lambda one: one.update(codebase_version=["v3.0"])), "version ['v3.0']"),
    "version-wrong": ("v3", info(lambda one: one.update(codebase_version="v2.1")), "data_path"),
    "features-list": ("v3", info(lambda one: one.update(features=["action"])), "features are list"),
    "features-null": ("v3", info(lambda one: one.update(features=None)), "features are NoneType"),
    "dtype-missing": ("v3", info(lambda one: one["features"]["action"].pop("dtype")), "lacks dtype"),
    "dtype-number": ("v3", feature("action", dtype=3), "lacks dtype"),
    "shape-negative": ("v3", feature("action", shape=[-3]), "positive whole numbers"),
    "shape-word": ("v3", feature("action", shape=["three"]), "positive whole numbers"),
    "shape-null": ("v3", feature("action", shape=None), "positive whole numbers"),
    "shape-huge": ("v3", feature(FRONT, shape=[10**6, 10**6, 3]), "positive whole numbers"),
    "shape-flat": ("v3", feature(FRONT, shape=[3072]), "height, width and channels"),
    "shape-other": ("v3", feature("action", shape=[4]), "has 3 numbers a frame"),
    "name-slash": ("v3", info(lambda one: one["features"].update({"a/../b": one["features"]["action"]})), "slashes"),
    "data-path-null": ("v3", info(lambda one: one.update(data_path=None)), "data_path is None"),
    "data-path-field": ("v3", info(lambda one: one.update(data_path="{x.__class__}")), "a pattern with"),
    "data-path-wide": ("v3", info(lambda one: one.update(data_path="{chunk_index:999999999d}")), "a pattern with"),
    "data-path-brace": ("v3", info(lambda one: one.update(data_path="{chunk_index")), "a pattern with"),
    "data-path-out": ("v3", info(lambda one: one.update(data_path="../x.parquet")), "leads out of"),
    "video-path-null": ("v3", info(lambda one: one.update(video_path=None)), "video_path is None"),
    "video-path-out": ("v3", info(lambda one: one.update(video_path="../x.mp4")), "leads out of"),
    "video-path-abs": ("v3", info(lambda one: one.update(video_path="/etc/passwd")), "leads out of"),
    "action-missing": ("v3", info(lambda one: one["features"].pop("action")), "no feature 'action'"),
    "openpi": ("pictures", fakes.openpi, "--data.columns="),
    "chunks-zero": ("v2", info(lambda one: one.update(chunks_size=0)), "chunks_size is 0"),
    # tasks
    "tasks-missing": ("v3", unlink(TASK_TABLE), "is missing"),
    "tasks-garbage": ("v3", text(TASK_TABLE, "nothing"), "cannot be read"),
    "tasks-lfs": ("v3", text(TASK_TABLE, LFS), "Git LFS"),
    "tasks-columns": ("v3", table(TASK_TABLE, lambda c: c.pop("task_index")), "lacks the columns"),
    "tasks-twice": ("v3", table(TASK_TABLE, put("task_index", 1, 0)), "number 0 twice"),
    "tasks-gone": ("v3", table(TASK_TABLE, put("task_index", 1, 7)), "no instruction for 1"),
    "tasks-null": ("v3", table(TASK_TABLE, put("task", 0, None)), "no sentence"),
    "tasks-numbers": ("v3", retype(TASK_TABLE, "task", [3, 4]), "no sentence"),
    "tasks-index-null": ("v3", table(TASK_TABLE, put("task_index", 0, None)), "task_index is None"),
    "tasks-swapped": ("v3", swap("task", 0, 1, TASK_TABLE), "its rows say"),
    "tasks-v2-missing": ("v2", unlink("meta/tasks.jsonl"), "is missing"),
    "tasks-v2-line": ("v2", text("meta/tasks.jsonl", '{"task": "x"}\n'), "lacks task_index"),
    "tasks-v2-cut": ("v2", cut("meta/tasks.jsonl", 0.6), "is not JSON"),
    # episodes
    "episodes-missing": ("v3", lambda r: shutil.rmtree(r / "meta/episodes"), "is missing"),
    "episodes-empty": ("v3", unlink(EPISODES), "the table of episodes"),
    "episodes-twice": ("v3", table(EPISODES, put("episode_index", 1, 0)), "episode 0 twice"),
    "episodes-null": ("v3", table(EPISODES, put("episode_index", 1, None)), "episode_index is None"),
    "episodes-length": ("v3", table(EPISODES, put("length", 1, 7)), "6 frames in the data, 7 in the metadata"),
    "episodes-negative": ("v3", table(EPISODES, put("length", 1, -6)), "length is -6"),
    "episodes-words": ("v3", retype(EPISODES, "length", ["5", "6", "7"]), "length is '5'"),
    "episodes-column": ("v3", table(EPISODES, lambda c: c.pop("length")), "lacks the column length"),
    "episodes-renumbered": ("v3", swap("episode_index", 0, 1), "frames in the data"),
    "video-file-gone": ("v3", table(EPISODES, put(f"videos/{FRONT}/file_index", 2, 5)), "file-005.mp4"),
    "video-file-null": ("v3", table(EPISODES, put(f"videos/{FRONT}/file_index", 2, None)), "file_index is None"),
    "from-late": ("v3", shift(FROM, 1, 0.1), "episode 1: from_timestamp"),
    "from-early": ("v3", shift(FROM, 1, -0.1), "episode 1: from_timestamp"),
    "from-last-late": ("v3", shift(FROM, 2, 0.1), "episode 2: from_timestamp"),
    "from-negative": ("v3", shift(FROM, 0, -0.2), "episode 0: from_timestamp"),
    "from-nan": ("v3", table(EPISODES, put(FROM, 1, float("nan"))), "from_timestamp is nan"),
    "from-null": ("v3", table(EPISODES, put(FROM, 1, None)), "from_timestamp is nan"),
    "from-zeroed": ("v3", table(EPISODES, lambda c: c.__setitem__(FROM, [0.0] * 3)), "from_timestamp 0"),
    "from-zeroed-alone": (
        "v3", table(EPISODES, lambda c: (c.__setitem__(FROM, [0.0] * 3), c.pop(TO))), "from_timestamp 0"),
    "from-and-to": (
        "v3", table(EPISODES, lambda c: [c[k].__setitem__(2, c[k][2] + 0.1) for k in (FROM, TO)]), "episode 2"),
    "to-early": ("v3", shift(TO, 1, -0.2), "episode 1: from_timestamp"),
    "from-swapped": ("v3", swap(FROM, 0, 1), "from_timestamp"),
    "episodes-v2-missing": ("v2", unlink("meta/episodes.jsonl"), "is missing"),
    "episodes-v2-line": ("v2", text("meta/episodes.jsonl", '{"length": 3}\n'), "line 1 lacks episode_index"),
    # statistics
    "stats-missing": ("v3", unlink(STATS), "missing"),
    "stats-list": ("v3", text(STATS, "[1]"), "a JSON object"),
    "stats-null": ("v3", stats(lambda one: one["action"].update(mean=None)), "mean holds no numbers"),
    "stats-words": ("v3", stats(lambda one: one["action"].update(std=["a", "b", "c"])), "std holds no numbers"),
    "stats-nan": ("v3", stats(lambda one: one["action"].update(mean=[float("nan")] * 3)), "mean is not finite"),
    "stats-negative": ("v3", stats(lambda one: one["action"].update(std=[-1.0, 1.0, 1.0])), "std is negative"),
    "stats-size": ("v3", stats(lambda one: one["action"].update(max=[1.0])), "max has 1"),
    "stats-ragged": ("v3", stats(lambda one: one["action"].update(max=[[1.0], [1, 2]])), "max holds no numbers"),
    "stats-lack": ("v3", stats(lambda one: one["observation.state"].pop("mean")), "lack mean"),
    "stats-none": ("v3", stats(lambda one: one.pop("action")), "statistics lack"),
    "stats-feature-null": ("v3", stats(lambda one: one.update(action=None)), "mean holds no numbers"),
    # rows
    "rows-missing": ("v3", unlink(DATA), "is missing"),
    "rows-cut": ("v3", cut(DATA, 0.6), "cannot be read"),
    "rows-lfs": ("v3", text(DATA, LFS), "Git LFS"),
    "rows-link": ("v3", outside(DATA), "outside"),
    "rows-no-action": ("v3", table(DATA, lambda c: c.pop("action")), "lacks the column action"),
    "rows-no-keys": ("v3", table(DATA, lambda c: c.pop("frame_index")), "lacks the column frame_index"),
    "action-nan": ("v3", table(DATA, put("action", 7, [0.0, float("nan"), 0.0])), "a1 of episode 1 frame 2"),
    "action-inf": ("v3", table(DATA, put("action", 7, [float("inf"), 0.0, 0.0])), "a0 of episode 1 frame 2"),
    "action-null": ("v3", table(DATA, put("action", 7, None)), "frame 2 of episode 1 has no action"),
    "action-short": ("v3", table(DATA, put("action", 7, [1.0])), "has 1 numbers of action"),
    "action-words": ("v3", retype(DATA, "action", ["go"] * 18), "holds string"),
    "state-null": ("v3", table(DATA, put("observation.state", 3, None)), "no observation.state"),
    "state-hole": ("v3", table(DATA, put("observation.state", 3, [1.0, None, 1.0, 1.0])), "s1 of episode 0 frame 3"),
    "frame-skips": ("v3", table(DATA, put("frame_index", 4, 9)), "frame_index skips to 9"),
    "frame-twice": ("v3", table(DATA, put("frame_index", 4, 3)), "frame 3 stands twice"),
    "frame-null": ("v3", table(DATA, put("frame_index", 4, None)), "frame_index of row 4"),
    "frame-half": ("v3", retype(DATA, "frame_index", [k + 0.5 for _, k in fakes.FRAMES]), "frame_index of row 0"),
    "episode-other": ("v3", table(DATA, put("episode_index", 4, 1)), "frames in the data"),
    "episode-huge": ("v3", table(DATA, put("episode_index", 4, 2**60)), "episode_index of row 4"),
    "index-rotated": ("v3", rotate("index"), "index"),
    "index-swapped": ("v3", swap("index", 1, 2, DATA), "index 2 at frame 1"),
    "timestamps-zero": ("v3", table(DATA, lambda c: c.__setitem__("timestamp", [0.0] * 18)), "not at frame / fps"),
    "timestamps-rotated": ("v3", rotate("timestamp"), "not at frame / fps"),
    "timestamps-nan": ("v3", table(DATA, put("timestamp", 3, float("nan"))), "timestamp of row 3"),
    "task-index-gone": ("v3", table(DATA, put("task_index", 3, -1)), "no instruction for -1"),
    "rows-v2-missing": ("v2", unlink(DATA2), "episode_000001.parquet is missing"),
    "rows-v2-other": ("v2", table(DATA2, lambda c: c.__setitem__("episode_index", [2] * 6)), "episode"),
    # videos
    "video-missing": ("v3", unlink(VIDEO), "missing"),
    "video-garbage": ("v3", text(VIDEO, "no video" * 100), "unreadable"),
    "video-lfs": ("v3", text(VIDEO, LFS), "Git LFS"),
    "video-fifo": ("v3", fifo(VIDEO), "is a pipe"),
    "video-link": ("v3", outside(VIDEO), "outside"),
    "video-cut": ("v3", cut(VIDEO, 0.5), "video"),
    "video-damaged": ("v3", flip(VIDEO, 0.3), "damaged"),
    "video-short": ("v3", video(VIDEO, 17), "17"),
    "video-size": ("v3", video(VIDEO, 18, 48), "48x48"),
    "video-rate": ("v3", info(lambda one: one.update(fps=30)), "frame / fps"),
    "video-folder": ("v3", lambda r: (r / "videos").rename(r / "video"), "try: mv '"),
    "video-v2-short": ("v2", video(VIDEO2, 5), "5"),
    # pictures
    "picture-null": ("pictures", table(DATA, put(FRONT, 7, None)), "frame 2 has no picture"),
    "picture-empty": ("pictures", picture(b""), "frame 2 has no picture"),
    "picture-lost": ("pictures", table(DATA, put(FRONT, 7, {"bytes": None, "path": "x.png"})), "no file x.png"),
    "picture-book": ("pictures", table(DATA, put(FRONT, 7, {"bytes": None, "path": "x" * 5000})), "frame 2 has no"),
    "picture-cut": ("pictures", picture(fakes.png(fakes.picture(1, 2))[:60]), "frame 2"),
    "picture-text": ("pictures", picture(b"<html>"), "unreadable picture"),
    "picture-size": ("pictures", picture(fakes.png(np.zeros((9, 8, 3), np.uint8))), "9x8"),
    "picture-deep": ("pictures", picture(fakes.png(np.zeros((32, 32), np.uint16))), "I;16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_inspection_names_what_training_refuses(name, copy, refused, capfd):
    kind, damage, needle = REFUSED[name]
    root = copy(kind)
    damage(root)
    status = main(["data", "inspect", str(root)])
    said = "".join(capfd.readouterr())
    assert status in (1, 2) and "Traceback" not in said and needle in said, said
    line = refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={root.parent / 'run'}",
                    "--train.steps=1", f"--data.cache_dir={root.parent / 'cache'}"])  # fmt: skip
    same = {"picture": "frame 2", "video": ""}.get(name.split("-")[0], needle)
    assert same in line, line


def rlds(root: Path, name: str) -> None:
    (root / INFO).unlink()
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("{}")


def one_level_up(root: Path) -> None:
    shutil.move(root, root.parent / "inner")
    root.mkdir()
    shutil.move(root.parent / "inner", root / "inner")


EMPTY = {
    "nowhere": (lambda r: shutil.rmtree(r), "no data set at"),
    "a-file": (lambda r: (shutil.rmtree(r), r.write_text("x")), "is a file"),
    "rlds": (lambda r: rlds(r, "x-train.tfrecord-00000-of-00001"), "porting_datasets_v3"),
    "rlds-version": (lambda r: rlds(r, "1.0.0/dataset_info.json"), "porting_datasets_v3"),
    "one-level-up": (one_level_up, "/inner"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_folders_that_are_no_data_set(name, copy, refused):
    damage, needle = EMPTY[name]
    root = copy("v3")
    damage(root)
    refused(["data", "inspect", root], needle)
    refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={root.parent / 'run'}"], needle)


@pytest.mark.parametrize("columns", [
    "{action: nothing}", "{action: [actions, image]}", "{observation.images.front: state}", "{actions: action}",
    "{action: 3}", "{action: []}", "[action]", "{observation.images.: image}",
])  # fmt: skip
def test_maps_that_fit_nothing(columns, copy, refused):
    root = copy("pictures")
    fakes.openpi(root)
    refused(["train", f"--data.root={root}", "--policy.path=fake", f"--data.columns={columns}"], "data.columns")


@pytest.mark.parametrize(("option", "needle"), [
    ("--data.cameras=front", "try: --data.cameras=[front]"), ("--data.episodes=1", "try: --data.episodes=[1]"),
    ("--data.cameras=[side]", "--data.cameras=[front]"), ("--data.episodes=[9]", "(0 to 2)"),
    ("--data.episodes=[-1]", "(0 to 2)"), ("--data.cache_gb=-1", "at least 0"),
])  # fmt: skip
def test_requests_that_do_not_fit(option, needle, good, refused):
    refused(["train", f"--data.root={good['v3']}", "--policy.path=fake", option], needle)


CELLS = st.one_of(st.none(), st.integers(-3, 30), st.floats(-2, 30), st.just(float("nan")))
KEYS = ["frame_index", "episode_index", "index", "timestamp"]
PLACES = ["length", "dataset_from_index", "dataset_to_index", FROM, TO, "episode_index", "data/file_index"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.booleans(), column=st.integers(0, 6), row=st.integers(0, 17), value=CELLS, rotated=st.integers(0, 3))
def test_any_cell_is_refused_or_read_right(good, tmp_path_factory, rows, column, row, value, rotated):
    """A wrong value in any key column, and a rotation of it: both refuse in one line, or training reads right."""
    root = tmp_path_factory.mktemp("any") / "set"
    shutil.copytree(good["v3"], root, ignore=shutil.ignore_patterns(".frames"))
    name = KEYS[column % len(KEYS)] if rows else PLACES[column]

    def change(columns: dict) -> None:
        values = columns[name]
        values[row % len(values)] = value
        columns[name] = values[rotated:] + values[:rotated] if rotated < 3 else sorted(values, key=str)

    try:
        edit_table(root / (DATA if rows else EPISODES), change)
    except (TypeError, ValueError, OverflowError):
        return  # no such column can be written
    try:
        data = read(root)
    except BurnishError as error:
        assert "\n" not in str(error)
        with suppress(BurnishError):
            assert not inspect_dataset(root).ok
        return
    fakes.assert_reads_right(data)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.floats(0, 0.99), data=st.binary(min_size=1, max_size=60))
def test_any_damage_to_a_video_is_refused_or_read_right(good, tmp_path_factory, at, data):
    root = tmp_path_factory.mktemp("damaged") / "set"
    shutil.copytree(good["v2"], root, ignore=shutil.ignore_patterns(".frames"))
    content = bytearray((root / VIDEO2).read_bytes())
    place = int(at * len(content))
    content[place : place + len(data)] = data
    (root / VIDEO2).write_bytes(bytes(content))
    whole = inspect_dataset(root).ok
    try:
        found = read(root)
    except BurnishError as error:
        assert "\n" not in str(error) and "try: " in str(error) and not whole
        return
    assert len(found.indices) == 18
    if whole:
        fakes.assert_reads_right(read(root, episodes=[0, 2]))


def test_every_remedy_runs(copy, refused, capfd, monkeypatch):
    """The commands that messages suggest end without an error of usage."""
    import shlex
    import subprocess

    root = copy("v3")
    (root / "videos").rename(root / "video")
    line = refused(["train", f"--data.root={root}", "--policy.path=fake", f"--output={root.parent / 'run'}"], "try: mv")
    subprocess.run(shlex.split(line.rpartition("try: ")[2]), check=True)
    fakes.assert_reads_right(read(root))
    edit_table(root / DATA, put("action", 7, [0.0, float("nan"), 0.0]))
    words = ["train", f"--data.root={root}", "--policy.path=fake", f"--output={root.parent / 'run'}"]
    option = refused(words).rpartition("try: ")[2]
    assert option == "--data.episodes=[0,2]"
    fakes.assert_reads_right(read(root, episodes=[0, 2]))
    edit_json(root / STATS, lambda one: one.pop("action"))
    command = shlex.split(refused(words).rpartition("try: ")[2])
    assert command[:3] == ["burnish", "data", "inspect"] and main(command[1:]) == 1


def test_a_damaged_cache_note_is_decoded_again(copy):
    root = copy("v3")
    read(root)
    for note in (root.parent / "cache").glob("*.json"):
        note.write_text(json.dumps([1]))
    fakes.assert_reads_right(read(root))
