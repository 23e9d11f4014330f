"""Batches for training. Batch k depends on the seed, k and the rank alone, so any run can go on from any step."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.core.errors import BurnishError
from burnish.core.seeding import derive_seed, generator
from burnish.core.types import Batch, Window
from burnish.core.workers import WorkerPool
from burnish.data.augment import augment, to_float
from burnish.data.checks import colour_cameras, require, tell
from burnish.data.dataset import Dataset, look, open_dataset
from burnish.data.features import ACTION, IMAGES, STATE
from burnish.data.frames import CACHE_GB, open_frames
from burnish.data.questions import open_questions
from burnish.data.streamed import JoinedFrames, StreamedFrames


def decodes(array: Any) -> bool:
    """Whether indexing an array of frames decodes something."""
    if isinstance(array, JoinedFrames):
        return any(decodes(part) for part in array.parts)
    return isinstance(array, StreamedFrames)


class Decoders:
    """One process for each thread that asks; a process opens its videos itself and keeps them open.

    Args:
        arrays: camera to frames.
    """

    def __init__(self, arrays: Mapping[str, Any]):
        self.arrays, self._own, self._lock = dict(arrays), threading.local(), threading.Lock()
        self._pools: list[WorkerPool] = []

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The frames of these rows by camera; raises BurnishError where one is damaged or the process died."""
        pool = self._own.__dict__.get("pool")
        if pool is None:
            pool = self._own.pool = WorkerPool(_decode, self.arrays, count=1, name="the process that decodes frames")
            with self._lock:
                self._pools.append(pool)
        pool.send(0, rows, f"{rows.size} frames")
        return pool.receive()[0][2]

    def close(self) -> None:
        """End the processes; nobody may ask any more."""
        while self._pools:
            self._pools.pop().close()


def _decode(tasks: Iterable[np.ndarray], arrays: dict[str, Any]) -> Generator[dict[str, np.ndarray], None, None]:
    torch.set_num_threads(1)
    for rows in tasks:
        yield {camera: array[rows] for camera, array in arrays.items()}


class BatchSampler:
    """Which samples form batch k: endless shuffled epochs, each a permutation of its own.

    Args:
        batch_size: samples for each rank and batch.
        seed_parts: anything printable; equal parts give equal batches.
        rank, world: this process and the number of processes; together they read one global batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed_parts: tuple, rank: int = 0, world: int = 1):
        self.num_samples, self.batch_size, self.rank, self.world = num_samples, batch_size, rank, world
        # Two epochs can meet in one batch, and threads prepare several batches at once.
        self._permutation = lru_cache(maxsize=4)(
            lambda epoch: np.random.default_rng(derive_seed(*seed_parts, "order", epoch)).permutation(num_samples)
        )

    def indices(self, k: int) -> np.ndarray:
        """[batch_size] indices of the samples in batch k on this rank."""
        first = (k * self.world + self.rank) * self.batch_size
        return self.at(np.arange(first, first + self.batch_size))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Indices of the samples at these positions of the endless order that batches and ranks cut up."""
        epochs = places // self.num_samples
        parts = [self._permutation(int(e))[places[epochs == e] % self.num_samples] for e in np.unique(epochs)]
        return np.concatenate(parts)


class RobotData:
    """The frames, states and actions of a LeRobotDataset as training batches.

    Args:
        cameras: names or full keys of the cameras wanted; empty means all that show colours.
        chunk_size: actions in a chunk; beyond the episode's ends the nearest one is repeated and marked as padding.
        batch_size, seed, rank, world: see `BatchSampler`.
        episodes: episode numbers to use; empty means all.
        image_size, cache_dir, cache_gb, seen: see `open_frames`.
        meta: what `open_dataset(root)` gave, where it has been read already.
        pictures: decode the frames; False leaves actions, states and instructions alone.
        window: what a sample has around its frame, see `Window`.

    A frame's index is its place among all rows by episode and frame, whatever the stored column "index" says.

    Raises:
        BurnishError: no data set there, unknown episode or camera, unreadable pictures, and all else that
            `burnish.data.checks.require` refuses.
    """

    several = False
    """Whether the rows come from more than one data set."""
    decoders: Decoders | None = None
    """Processes that decode, see `start_decoders`."""

    def __init__(
        self, root: Path, cameras: Sequence[str], chunk_size: int, batch_size: int, seed: int, *,
        episodes: Sequence[int] = (), image_size: int = 0, cache_dir: str = "", cache_gb: float = CACHE_GB,
        seen: int = 0, augmented: bool = True, rank: int = 0, world: int = 1, progress: bool = True,
        meta: Dataset | None = None, pictures: bool = True, window: Window = Window(),
    ):  # fmt: skip
        self.meta = open_dataset(root) if meta is None else meta
        self.root, self.chunk_size, self.augmented, self.seed = root, chunk_size, augmented, seed
        self.window = window
        self.cameras = [self._camera_key(c) for c in cameras] or colour_cameras(self.meta)
        chosen = require(self.meta, episodes, self.cameras)
        tell(self.meta, chosen)
        if pictures and not self.cameras:
            raise BurnishError(f"{root} has no camera that shows colours", f"a feature {IMAGES}<camera>", look(root))
        rows = self.meta.rows
        self.frames = None
        if pictures:
            self.frames = open_frames(root, self.cameras, image_size, cache_dir, progress, self.meta, seen=seen,
                                      cache_gb=cache_gb, episodes=episodes)  # fmt: skip
        values = {name: np.ascontiguousarray(one, np.float32) for name, one in rows.values.items()}
        self.actions, self.states = values[ACTION], values.get(STATE)
        self.task_index, self.episode_index = rows.keys["task_index"], rows.keys["episode_index"]
        self.tasks = {index: self.meta.instruction(index) for index in self.meta.tasks}
        self.ends = rows.ends
        self.starts = self.ends - np.repeat(rows.counts, rows.counts)
        last = np.maximum(self.ends - window.drop_last, self.starts + 1)  # of a short episode the first frame is kept
        self.indices = np.flatnonzero(np.isin(self.episode_index, chosen) & (np.arange(len(rows)) < last))
        if len(self.indices) == 0:
            raise BurnishError(f"{root} has no frames to train on", "at least one episode", "burnish data demos --help")
        self.sampler = BatchSampler(len(self.indices), batch_size, (seed, "robot"), rank, world)
        self.rank = rank

    @property
    def hash(self) -> str:
        """Changes with the data set, see `dataset_hash`."""
        return self.frames.hash

    def _camera_key(self, camera: str) -> str:
        known = self.meta.camera_keys
        key = camera if camera in known or camera.startswith(IMAGES) else IMAGES + camera
        if key not in known:
            dark = ", which shows no colours" if key in self.meta.views else ""
            raise BurnishError(f"the policy wants camera '{camera}'{dark or f', which {self.root} lacks'}",
                               f"one of {', '.join(known)}", look(self.root))  # fmt: skip
        return key

    def raw(self, k: int) -> Batch:
        """Batch k as stored: images still uint8 [B, (n,) H, W, 3]."""
        frames = self.indices[self.sampler.indices(k)]
        batch = self.observations(frames)
        batch["action"], batch["action_is_pad"] = map(torch.from_numpy, self.chunks(frames))
        batch["index"] = torch.from_numpy(frames.astype(np.int64))
        batch["episode_index"] = torch.from_numpy(self.episode_index[frames].astype(np.int64))
        return batch

    def start_decoders(self) -> None:
        """From now on frames that are not kept decoded are decoded in processes, one for each thread that asks."""
        if any(map(decodes, self.frames.arrays.values())):
            self.decoders = Decoders(self.frames.arrays)

    def close(self) -> None:
        """End those processes; frames are then decoded here again."""
        if self.decoders is not None:
            self.decoders.close()
        self.decoders = None

    def describe(self, folder: Path) -> None:
        """Note in a policy folder what it was trained on, where that is more than one data set."""

    def observations(self, frames: np.ndarray) -> Batch:
        """Images uint8 [B, (n,) H, W, 3], states and instructions of these frames [B]."""
        seen = frames
        if len(self.window.observations) > 1:
            seen = frames[:, None] + np.array(self.window.observations)
            seen = np.clip(seen, self.starts[frames][:, None], self.ends[frames][:, None] - 1)
        if self.decoders is None:
            found = {key: self.frames.arrays[key][seen] for key in self.cameras}
        else:
            found = self.decoders(seen)
        batch: Batch = {key: torch.from_numpy(found[key]) for key in self.cameras}
        if self.states is not None:
            batch["observation.state"] = torch.from_numpy(self.states[seen])
        batch["task"] = [self.tasks[int(i)] for i in self.task_index[frames]]
        return batch

    def chunks(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chunks [..., T, A] of `frames` [...], and which steps lie outside the episode, bool [..., T]."""
        steps = frames[..., None] + self.window.first_action + np.arange(self.chunk_size)
        start, end = self.starts[frames][..., None], self.ends[frames][..., None]
        return self.actions[np.clip(steps, start, end - 1)], (steps < start) | (steps >= end)

    def finish(self, batch: Batch, k: int) -> Batch:
        """Turn the images of `raw(k)` into (augmented) floats [B, (n,) 3, H, W] on the device where they are.

        The shift of a view is kept as "shift.<camera>", [B, 2] rows and columns, for whoever must move with it.
        """
        device = batch[self.cameras[0]].device
        draws = generator(self.seed, "augment", k, self.rank, device=str(device)) if self.augmented else None
        for key in self.cameras:
            if self.augmented:
                batch[key], batch[f"shift.{key.removeprefix(IMAGES)}"] = augment(batch[key], draws)
            else:
                batch[key] = to_float(batch[key])
        return batch


class LanguageData:
    """Question-answer batches from a question folder (see `burnish data questions`).

    Args:
        root: folder with images.npy, questions.jsonl and meta.json.
        batch_size, seed, rank, world: see `BatchSampler`.
        turns: questions about each image; with more than one, "question" and "answer" are lists of lists.
    """

    def __init__(self, root: Path, batch_size: int, seed: int, rank: int = 0, world: int = 1, turns: int = 1):
        found = open_questions(root)
        self.images, self.questions, camera = found.images, found.entries, found.camera
        self.key = camera if camera.startswith(IMAGES) else IMAGES + camera
        self.sampler = BatchSampler(len(self.questions), batch_size, (seed, "language"), rank, world)
        self.turns, self.seed = turns, seed
        self.about: dict[int, list[int]] = {}
        for i, question in enumerate(self.questions):
            self.about.setdefault(question["image"], []).append(i)

    def raw(self, k: int) -> Batch:
        """Batch k: images uint8 [B, H, W, 3], and lists "question", "answer" (of lists for several turns)."""
        chosen = self.sampler.indices(k)
        images = torch.from_numpy(self.images[[self.questions[i]["image"] for i in chosen]])
        keys = ("question", "answer")
        if self.turns == 1:
            return {self.key: images} | {key: [self.questions[i][key] for i in chosen] for key in keys}
        groups = [self._also_about(int(i), k) for i in chosen]
        asked = {key: [[self.questions[i][key] for i in group] for group in groups] for key in keys}
        return {self.key: images, **asked}

    def _also_about(self, index: int, k: int) -> list[int]:
        """Question `index` of batch k and up to turns - 1 others about its image."""
        others = [i for i in self.about[self.questions[index]["image"]] if i != index]
        drawn = np.random.default_rng(derive_seed("turns", self.seed, k, index)).permutation(len(others))
        return [index, *(others[i] for i in drawn[: self.turns - 1])]

    def finish(self, batch: Batch, k: int) -> Batch:
        """Turn the images into floats [B, 3, H, W]; questions about places and colours forbid augmentation."""
        batch[self.key] = to_float(batch[self.key])
        return batch


class Prefetch:
    """Runs `make(k)` for k = start, start + 1, ... in threads, ahead of the consumer and in order.

    `waited` is the total of seconds that the consumer stood still.
    """

    def __init__(self, make: Callable[[int], Batch], start: int, threads: int = 1, ahead: int = 3):
        self._make, self._next, self.waited = make, start, 0.0
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="burnish-data")
        self._pending: deque[Future[Batch]] = deque()
        for _ in range(threads + ahead - 1):
            self._submit()

    def _submit(self) -> None:
        self._pending.append(self._pool.submit(self._make, self._next))
        self._next += 1

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._submit()
        begin = time.perf_counter()
        batch = self._pending.popleft().result()
        self.waited += time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """Stop the threads; batches under way are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move all tensors; pinned ones without waiting."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def pin(batch: Batch) -> Batch:
    """Pin all tensors for a copy to an accelerator that needs no waiting."""
    return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
