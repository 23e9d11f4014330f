"""Small LeRobotDatasets of both versions, written by hand, whose every picture, action and sentence is known."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from burnish.data.record import encode_video

FPS, SIZE, LENGTHS = 10, 32, (5, 6, 7)
FRONT = "observation.images.front"
TASKS = ["lift the red cube", "open the drawer"]
FRAMES = [(e, k) for e, length in enumerate(LENGTHS) for k in range(length)]
INFO, STATS, TASK_TABLE = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES, DATA = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{FRONT}/chunk-000/file-000.mp4"
VIDEO2 = f"videos/chunk-000/{FRONT}/episode_000001.mp4"
DATA2 = "data/chunk-000/episode_000001.parquet"


def level(episode: int, frame: int) -> int:
    """The grey of a picture."""
    return 20 + 12 * FRAMES.index((episode, frame))


def action(episode: int, frame: int) -> list[float]:
    return [float(episode), float(frame), episode + frame / 10]


def state(episode: int, frame: int) -> list[float]:
    return [float(episode), float(frame), episode * 0.5 - frame, 1.0 + frame]


def picture(episode: int, frame: int) -> np.ndarray:
    """uint8 [32, 32, 3]"""
    return np.full((SIZE, SIZE, 3), level(episode, frame), np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def _info(version: str, kind: str) -> dict:
    features = {
        FRONT: {"dtype": kind, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": [4], "names": ["s0", "s1", "s2", "s3"]},
        "action": {"dtype": "float32", "shape": [3], "names": ["a0", "a1", "a2"]},
    }
    features |= {key: {"dtype": "int64", "shape": [1], "names": None}
                 for key in ("frame_index", "episode_index", "index", "task_index")}  # fmt: skip
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    new = version == "v3.0"
    data = (
        "chunk-{chunk_index:03d}/file-{file_index:03d}"
        if new
        else "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
    )
    video = "{video_key}/" + data if new else "chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}"
    old = {"total_chunks": 1, "total_videos": len(LENGTHS), "total_tasks": len(TASKS), "splits": {"train": "0:3"}}
    return ({} if new else old) | {
        "codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000,
        "total_episodes": len(LENGTHS), "total_frames": len(FRAMES), "data_path": f"data/{data}.parquet",
        "robot_type": "fake", "video_path": f"videos/{video}.mp4" if kind == "video" else None,
    }  # fmt: skip


def columns(frames: Sequence[tuple[int, int]], pictures: bool = False) -> dict[str, list]:
    """The table of some frames."""
    table = {
        "action": [action(*at) for at in frames], "observation.state": [state(*at) for at in frames],
        "timestamp": [k / FPS for _, k in frames], "frame_index": [k for _, k in frames],
        "episode_index": [e for e, _ in frames], "index": [FRAMES.index(at) for at in frames],
        "task_index": [e % 2 for e, _ in frames],
    }  # fmt: skip
    if pictures:
        table[FRONT] = [{"bytes": png(picture(*at)), "path": None} for at in frames]
    return table


def write_table(path: Path, table: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"action": pa.list_(pa.float32()), "observation.state": pa.list_(pa.float32()), "timestamp": pa.float32()}
    pq.write_table(pa.table({name: pa.array(column, kinds.get(name)) for name, column in table.items()}), path)


def _figures(values: np.ndarray) -> dict[str, list]:
    return {key: getattr(values, key)(0).tolist() for key in ("min", "max", "mean", "std")} | {"count": [len(values)]}


def _stats(frames: Sequence[tuple[int, int]]) -> dict[str, dict]:
    pairs = (("action", action), ("observation.state", state))
    return {name: _figures(np.array([make(*at) for at in frames], np.float32)) for name, make in pairs}


def write_v3(root: Path, pictures: bool = False) -> Path:
    """All episodes in one file of each kind; with `pictures` they stand in the table."""
    (root / "meta").mkdir(parents=True)
    (root / INFO).write_text(json.dumps(_info("v3.0", "image" if pictures else "video")))
    (root / STATS).write_text(json.dumps(_stats(FRAMES)))
    write_table(root / TASK_TABLE, {"task_index": [0, 1], "task": TASKS})
    write_table(root / DATA, columns(FRAMES, pictures))
    starts = np.cumsum([0, *LENGTHS]).tolist()
    episodes = {
        "episode_index": [0, 1, 2], "length": list(LENGTHS), "tasks": [[TASKS[e % 2]] for e in range(3)],
        "data/chunk_index": [0] * 3, "data/file_index": [0] * 3, "dataset_from_index": starts[:3],
        "dataset_to_index": starts[1:],
    }  # fmt: skip
    if not pictures:
        episodes |= {f"videos/{FRONT}/chunk_index": [0] * 3, f"videos/{FRONT}/file_index": [0] * 3,
                     f"videos/{FRONT}/from_timestamp": [s / FPS for s in starts[:3]],
                     f"videos/{FRONT}/to_timestamp": [s / FPS for s in starts[1:]]}  # fmt: skip
        (root / VIDEO).parent.mkdir(parents=True)
        (root / VIDEO).write_bytes(encode_video(np.stack([picture(*at) for at in FRAMES]), FPS))
    write_table(root / EPISODES, episodes)
    return root


def write_v21(root: Path, version: str = "v2.1") -> Path:
    """A file of each kind for every episode."""
    (root / "meta").mkdir(parents=True)
    (root / INFO).write_text(json.dumps(_info(version, "video")))
    write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])
    episodes, stats = [], []
    for e, length in enumerate(LENGTHS):
        frames = [(e, k) for k in range(length)]
        episodes.append({"episode_index": e, "length": length, "tasks": [TASKS[e % 2]]})
        stats.append({"episode_index": e, "stats": _stats(frames)})
        write_table(root / f"data/chunk-000/episode_{e:06d}.parquet", columns(frames))
        video = root / f"videos/chunk-000/{FRONT}/episode_{e:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        video.write_bytes(encode_video(np.stack([picture(*at) for at in frames]), FPS))
    write_lines(root / "meta/episodes.jsonl", episodes)
    if version == "v2.1":
        write_lines(root / "meta/episodes_stats.jsonl", stats)
    else:
        (root / STATS).write_text(json.dumps(_stats(FRAMES)))
    return root


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_lines(path: Path, change: Callable[[list[dict]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    write_lines(path, rows)


def edit_table(path: Path, change: Callable[[dict[str, list]], object]) -> None:
    """`change` edits the columns of a parquet file in place."""
    table = pq.read_table(path, partitioning=None).to_pydict()
    change(table)
    write_table(path, table)


def assert_reads_right(data: object) -> None:
    """Every chosen frame of a `RobotData` has its own picture, state, sentence and chunk."""
    for row in data.indices:
        e, k = int(data.episode_index[row]), int(data.meta.rows.keys["frame_index"][row])
        seen = data.observations(np.array([row]))
        assert abs(float(seen[FRONT].float().mean()) - level(e, k)) < 4, (e, k)
        assert seen["task"] == [TASKS[e % 2]]
        np.testing.assert_allclose(seen["observation.state"][0], state(e, k), atol=1e-6)
        chunk, padded = data.chunks(np.array([row]))
        last = LENGTHS[e] - 1
        np.testing.assert_allclose(chunk[0], [action(e, min(k + t, last)) for t in range(len(chunk[0]))], atol=1e-6)
        assert padded[0].tolist() == [k + t > last for t in range(len(chunk[0]))]


def openpi(root: Path) -> None:
    """Give a data set of `write_v3(pictures=True)` openpi's names."""
    names = {"action": "actions", "observation.state": "state", FRONT: "image"}
    edit_json(root / INFO, lambda one: one.update(features={names.get(k, k): v for k, v in one["features"].items()}))
    edit_json(root / STATS, lambda one: [one.__setitem__(names[k], one.pop(k)) for k in list(one)])
    write_table(root / DATA, {names.get(k, k): v for k, v in columns(FRAMES, pictures=True).items()})
