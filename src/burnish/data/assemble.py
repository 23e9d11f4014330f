"""Puts recordings together as a LeRobotDataset v3, with the ground truth of every frame beside it.

LeRobot's own writer stores each frame as a PNG, encodes it, and copies the whole video file again for each episode.
Recordings are encoded already, so their packets are copied once; tables, statistics and metadata are LeRobot's.
"""

import io
import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq

from burnish.data.record import CODEC, ENCODER, PIXEL_FORMAT
from burnish.data.spool import StoredRecording, task_folder_name
from burnish.envs.base import Size, view_size

EPISODES_PER_TABLE = 64


def features_of(spec: dict[str, Any], image_size: Size) -> dict[str, dict]:
    """LeRobot's feature table for what is recorded (the index columns are added by LeRobot)."""
    features: dict[str, dict] = {
        f"observation.images.{camera}": {
            "dtype": "video", "shape": (*view_size(image_size, camera), 3), "names": ["height", "width", "channels"],
        }
        for camera in spec["cameras"]
    }  # fmt: skip
    for key, names in (("observation.state", spec["state_names"]), ("action", spec["action_names"])):
        features[key] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
    return features


def image_stats(histogram: np.ndarray, num_frames: int, quantiles: Iterable[float]) -> dict[str, np.ndarray]:
    """LeRobot's statistics of a camera, exactly, from how often each channel takes each value.

    Args:
        histogram: [3, 256] counts over all pixels of all frames.

    Returns:
        min, max, mean, std and quantiles, each [3, 1, 1] in [0, 1], and count [1] in frames.
    """
    values, total = np.arange(256), histogram.sum(1)
    mean, second = histogram @ values / total, histogram @ values**2 / total
    stats = {
        "min": np.array([np.flatnonzero(row)[0] for row in histogram], float),
        "max": np.array([np.flatnonzero(row)[-1] for row in histogram], float),
        "mean": mean,
        "std": np.sqrt(np.maximum(0, second - mean**2)),
    }
    for q in quantiles:
        reached = np.cumsum(histogram, 1) >= q * total[:, None]
        stats[f"q{int(q * 100):02d}"] = reached.argmax(1).astype(float)
    scaled = {name: (value / 255).reshape(3, 1, 1) for name, value in stats.items()}
    return {**scaled, "count": np.array([num_frames])}


class _Files:
    """Numbers of the files of one kind, LeRobot's way: a new one where the size limit would be passed."""

    def __init__(self, limit_mb: float, per_chunk: int):
        self._limit, self._per_chunk = limit_mb * 2**20, per_chunk
        self.chunk, self.file, self._size = 0, -1, float("inf")

    def place(self, num_bytes: int) -> bool:
        """Count `num_bytes` in; True where they open a new file."""
        fresh = self._size + num_bytes >= self._limit
        if fresh:
            self._size, self.file = 0, self.file + 1
            if self.file == self._per_chunk:
                self.chunk, self.file = self.chunk + 1, 0
        self._size += num_bytes
        return fresh


class _VideoFile:
    """Joins encoded episodes into one mp4 without encoding again."""

    def __init__(self, path: Path, fps: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fps = fps
        self._container = av.open(str(path.absolute()), "w", format="mp4")
        self._stream = None
        self.num_frames = 0

    def append(self, episode: bytes) -> None:
        with av.open(io.BytesIO(episode)) as source:
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size == 0:  # the end of the stream
                    continue
                packet.stream = self._stream
                packet.time_base, packet.duration = Fraction(1, self._fps), 1
                packet.pts = packet.dts = self.num_frames
                self._container.mux(packet)
                self.num_frames += 1

    def close(self) -> None:
        self._container.close()


def assemble(
    folder: Path, name: str, recordings: Sequence[StoredRecording], spec: dict[str, Any], image_size: Size, robot: str
) -> int:
    """Write the data set of `recordings`, in that order, into the empty folder `folder`.

    Args:
        name: name of the data set, the second half of its repository id.
        spec: frame rate, names and cameras (`spec.json` of the spool).

    Returns:
        The number of frames.
    """
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    folder.rmdir()  # LeRobot wants to make it itself
    meta = LeRobotDatasetMetadata.create(
        repo_id=f"burnish/{name}", fps=spec["fps"], features=features_of(spec, image_size), robot_type=robot,
        root=folder, metadata_buffer_size=1000,
    )  # fmt: skip
    places: list[dict[str, Any]] = [{} for _ in recordings]
    for camera in spec["cameras"]:
        _write_videos(meta, camera, recordings, places)
    _write_tables(meta, recordings, places)
    _describe(meta)
    meta.finalize()
    _write_ground_truth(folder / "ground_truth", recordings)
    return meta.total_frames


def _write_videos(meta, camera: str, recordings: Sequence[StoredRecording], places: list[dict[str, Any]]) -> None:
    key, files, video = f"observation.images.{camera}", _Files(meta.video_files_size_in_mb, meta.chunks_size), None
    for recording, place in zip(recordings, places, strict=True):
        episode = recording[f"video.{camera}"].tobytes()
        if files.place(len(episode)):
            if video is not None:
                video.close()
            path = meta.video_path.format(video_key=key, chunk_index=files.chunk, file_index=files.file)
            video = _VideoFile(meta.root / path, meta.fps)
        start = video.num_frames
        video.append(episode)
        place[f"videos/{key}/chunk_index"] = files.chunk
        place[f"videos/{key}/file_index"] = files.file
        place[f"videos/{key}/from_timestamp"] = start / meta.fps
        place[f"videos/{key}/to_timestamp"] = video.num_frames / meta.fps
    if video is not None:
        video.close()


def _write_tables(meta, recordings: Sequence[StoredRecording], places: list[dict[str, Any]]) -> None:
    """The frame tables, and each episode's metadata and statistics."""
    from datasets import Dataset
    from lerobot.datasets.feature_utils import get_hf_features_from_features

    columns = get_hf_features_from_features(meta.features)
    files, writer, frames = _Files(meta.data_files_size_in_mb, meta.chunks_size), None, 0
    for first in range(0, len(recordings), EPISODES_PER_TABLE):
        batch = []
        for i, recording in enumerate(recordings[first : first + EPISODES_PER_TABLE], first):
            batch.append(_episode_columns(meta, recording, i, frames))
            frames += recording.facts["length"]
        joined = {name: np.concatenate([episode[name] for episode in batch]) for name in columns}
        table = Dataset.from_dict(joined, features=columns).with_format("arrow")[:]
        if files.place(table.nbytes):
            if writer is not None:
                writer.close()
            path = meta.root / meta.data_path.format(chunk_index=files.chunk, file_index=files.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = pq.ParquetWriter(path, table.schema, compression="snappy", use_dictionary=True,
                                      write_page_checksum=True)  # fmt: skip
        writer.write_table(table)
        for i, episode in enumerate(batch, first):
            start = int(episode["index"][0])
            places[i].update({
                "data/chunk_index": files.chunk, "data/file_index": files.file,
                "dataset_from_index": start, "dataset_to_index": start + len(episode["index"]),
            })  # fmt: skip
            _save_metadata(meta, recordings[i], i, episode, places[i])
    if writer is not None:
        writer.close()


def _episode_columns(meta, recording: StoredRecording, episode_index: int, start: int) -> dict[str, np.ndarray]:
    """The table of one episode; `start` is the index of its first frame in the data set."""
    length, instruction = recording.facts["length"], recording.facts["instruction"]
    meta.save_episode_tasks([instruction])
    frames = np.arange(length)
    return {
        "observation.state": recording["state"],
        "action": recording["action"],
        "timestamp": (frames / meta.fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(length, episode_index),
        "index": start + frames,
        "task_index": np.full(length, meta.get_task_index(instruction)),
    }


def _save_metadata(meta, recording, episode_index: int, columns: dict[str, np.ndarray], place: dict[str, Any]) -> None:
    from lerobot.datasets.compute_stats import DEFAULT_QUANTILES, compute_episode_stats

    stats = compute_episode_stats(columns, {key: meta.features[key] for key in columns})
    for key in meta.video_keys:
        histogram = recording[f"histogram.{key.removeprefix('observation.images.')}"]
        stats[key] = image_stats(histogram, recording.facts["length"], DEFAULT_QUANTILES)
    meta.save_episode(episode_index, recording.facts["length"], [recording.facts["instruction"]], stats, place)


def _describe(meta) -> None:
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.io_utils import write_info, write_stats

    encoder = RGBEncoderConfig(
        vcodec=CODEC.removeprefix("lib").replace("x264", "h264"), pix_fmt=PIXEL_FORMAT, g=int(ENCODER["g"]),
        crf=int(ENCODER["crf"]), preset=ENCODER["preset"],
    )  # fmt: skip
    for key in meta.video_keys:
        meta.update_video_info(key, video_encoder=encoder)
    write_info(meta.info, meta.root)
    # LeRobot leaves the statistics in the order of a set, which differs from process to process.
    write_stats({key: meta.stats[key] for key in meta.features if key in meta.stats}, meta.root)


def _write_ground_truth(folder: Path, recordings: Sequence[StoredRecording]) -> None:
    """`<task>/<episode>.jsonl` (one line a frame), `.depth.npy` and `.segmentation.npy`, and a table of episodes."""
    folder.mkdir()
    with open(folder / "episodes.jsonl", "w") as table:
        for index, recording in enumerate(recordings):
            task = task_folder_name(recording.facts["task_id"])
            (folder / task).mkdir(exist_ok=True)
            path = folder / task / f"{index:06d}.jsonl"
            path.write_bytes(recording["ground_truth"].tobytes())
            facts = {name: value for name, value in recording.facts.items() if name != "success"}
            table.write(json.dumps({"episode_index": index, **facts, "frames": f"{task}/{path.name}"}) + "\n")
            for name in recording.names:
                if name.startswith(("depth.", "segmentation.")):
                    kind, _, camera = name.partition(".")
                    np.save(folder / task / f"{index:06d}.{camera}.{kind}.npy", recording[name], allow_pickle=False)
